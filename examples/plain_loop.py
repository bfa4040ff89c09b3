"""A loop of one's own: learning-rate schedule, gradient clipping, an artifact at the end.

python examples/plain_loop.py
"""

from __future__ import annotations

import sys

import torch
from digits import accuracies, loaders, pretrained
from torch import nn

import bitstrata as bs


def main(quick: bool = False, artifact: str = "digits.strata") -> dict[int, float]:
    torch.manual_seed(0)
    train, test = loaders(quick)
    model = pretrained(train, epochs=2 if quick else 10)

    example, _ = next(iter(train))
    # The network reads pixel / 255, so mean is 0 and std is 1; the integer program then reads the uint8 pixel.
    bs.quantize_(model, bs.recipes.strata(w=(1, 2, 4)), example, input=bs.Pixels((0.0,), (1.0,)))
    bs.calibrate_(model, [example])

    epochs = 1 if quick else 5
    optimizer = torch.optim.SGD(bs.parameter_groups(model, weight_decay=1e-4), lr=0.02, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=epochs * len(train))
    model.train()
    for _ in range(epochs):
        for images, labels in train:
            optimizer.zero_grad()
            bs.joint_backward(model, images, labels)  # all precisions; gradients are in .grad afterwards
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    program = bs.lower(model.eval(), example)
    bs.pack(program, artifact, overwrite=True)
    return accuracies(model, test)


if __name__ == "__main__":
    for bits, accuracy in main("--quick" in sys.argv).items():
        print(f"{bits} bits: {accuracy:.2%}")
