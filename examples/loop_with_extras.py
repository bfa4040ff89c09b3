"""What else loops do: averaged weights (EMA), bfloat16, gradient accumulation, gradient checkpointing, workers.

python examples/loop_with_extras.py
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from digits import Net, accuracies, datasets, loaders, pretrained
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import bitstrata as bs

MICRO_BATCHES = 2


class Checkpointed(Net):
    """Computes the blocks again in the backward pass in place of keeping what is inside them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.fc(F.max_pool2d(x, 4).flatten(1))


def main(quick: bool = False, artifact: str = "digits-ema.strata") -> dict[int, float]:
    torch.manual_seed(0)
    train, test = loaders(quick)
    model = Checkpointed()
    model.load_state_dict(pretrained(train, epochs=2 if quick else 10).state_dict())

    example, _ = next(iter(train))
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 4)), example, input=bs.Pixels((0.0,), (1.0,)))
    bs.calibrate_(model, [example])
    bs.accumulate_(model, MICRO_BATCHES)  # step sizes' gradients count the elements of the whole batch
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    micro = DataLoader(datasets(quick)[0], 32 // MICRO_BATCHES, shuffle=True, drop_last=True, num_workers=2)
    optimizer = torch.optim.AdamW(bs.parameter_groups(model, weight_decay=1e-2), lr=1e-3)
    model.train()
    for _ in range(1 if quick else 5):
        for step, (images, labels) in enumerate(micro, start=1):
            # bfloat16 has the exponents of float32: no GradScaler. joint_loss divides like any loss.
            loss = bs.joint_loss(model, images, labels, amp=torch.bfloat16)
            (loss / MICRO_BATCHES).backward()
            if step % MICRO_BATCHES == 0:
                optimizer.step()
                optimizer.zero_grad()
                averaged.update_parameters(model)

    network = averaged.module
    bs.pack(bs.lower(network.eval(), example), artifact, overwrite=True)
    return accuracies(network, test)


if __name__ == "__main__":
    for bits, accuracy in main("--quick" in sys.argv).items():
        print(f"{bits} bits: {accuracy:.2%}")
