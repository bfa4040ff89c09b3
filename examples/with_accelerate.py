"""Hugging Face accelerate: quantize first, then let it prepare the model.

python examples/with_accelerate.py
accelerate launch examples/with_accelerate.py
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from digits import accuracies, loaders, pretrained

import bitstrata as bs


def main(quick: bool = False, artifact: str = "digits-accelerate.strata") -> dict[int, float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    train, test = loaders(quick)
    model = pretrained(train, epochs=2 if quick else 10)

    example, _ = next(iter(train))
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 4)), example, input=bs.Pixels((0.0,), (1.0,)))
    bs.calibrate_(model, [example])

    epochs = 1 if quick else 5
    optimizer = torch.optim.SGD(bs.parameter_groups(model, weight_decay=1e-4), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(train))
    model, optimizer, train, schedule = accelerator.prepare(model, optimizer, train, schedule)
    model.train()
    for _ in range(epochs):
        for images, labels in train:
            optimizer.zero_grad()
            bs.joint_backward(model, images, labels)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    network = accelerator.unwrap_model(model).cpu().eval()
    if accelerator.is_main_process:
        bs.pack(bs.lower(network, example), artifact, overwrite=True)
    return accuracies(network, test)


if __name__ == "__main__":
    for bits, accuracy in main("--quick" in sys.argv).items():
        print(f"{bits} bits: {accuracy:.2%}")
