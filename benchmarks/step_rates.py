"""Does the learning rate of step sizes need a search of its own? Accuracy on digits against a factor on that rate.

    python benchmarks/step_rates.py [--quick] [--json FILE]

A float network (`digits_resnet`) is trained once a seed; then its copies are trained at one precision each, with the
learning rate of all parameters of quantizers multiplied by a factor. 1 is what `Trainer` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import bitstrata as bs
from bitstrata.cli.common import environment
from bitstrata.data import Loader, RandomCrop
from bitstrata.quantizers.base import Quantizer
from bitstrata.train import TrainConfig, Trainer


def loaders(seed: int) -> tuple[Loader, Loader]:
    train, test = (bs.data.load("digits", None, split) for split in ("train", "test"))
    batches = Loader(train, 64, train=True, transform=RandomCrop((8, 8), 1), seed=seed, drop_last=True)
    return batches, Loader(test, 256, train=False)


def floating(seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = bs.zoo.create("digits_resnet", width=8)
    config = TrainConfig(epochs=epochs, lr=0.1, batch_size=64, warmup=1.0, seed=seed, eval_every=0)
    Trainer(model, config, loaders(seed)[0]).fit()
    return model


def accuracy(model: nn.Module, bits: int, factor: float, seed: int, epochs: int) -> float:
    """Test accuracy after quantized training at one precision."""
    train, test = loaders(seed)
    model = copy.deepcopy(model)
    images = [train.batch(0, step)[0] for step in range(4)]
    bs.quantize_(model, bs.recipes.strata(w=(bits,)), images[0])
    bs.calibrate_(model, images)
    config = TrainConfig(epochs=epochs, lr=0.02, batch_size=64, seed=seed, eval_every=0)
    trainer = Trainer(model, config, train, test)
    steps = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    for group in trainer.optimizer.param_groups:
        if all(id(p) in steps for p in group["params"]):
            group["peak_lr"] *= factor
    return trainer.fit()[bits]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, two factors")
    parser.add_argument("--bits", default="2,4")
    parser.add_argument("--factors", default="0.01,0.1,0.3,1,3,10")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = [float(factor) for factor in options.factors.split(",")]
    seeds, epochs, factors = (range(1), 1, [1.0, 3.0]) if options.quick else (range(4), 10, given)
    models = {seed: floating(seed, 1 if options.quick else 12) for seed in seeds}
    rows = []
    for bits in map(int, options.bits.split(",")):
        for factor in factors:
            found = [accuracy(models[seed], bits, factor, seed, epochs) for seed in seeds]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            rows.append(
                {"bits": bits, "factor": factor, "mean": statistics.mean(found), "stdev": spread, "runs": found}
            )
            print(f"{bits} bits  x{factor:<5g} {statistics.mean(found):7.2%}  +- {spread:.2%}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, **environment()}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
