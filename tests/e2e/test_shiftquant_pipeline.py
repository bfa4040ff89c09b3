"""Training in integers, and integer gradients under other recipes, from the float network to the integer engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli import main
from bitstrata.recipes import Part

MEAN, STD = 0.3, 0.35
R = bs.recipes


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalized images (1797, 1, 8, 8) and labels in random order: 1200 to train on, the others to test."""
    sets = pytest.importorskip("sklearn.datasets").load_digits()
    x = (torch.as_tensor(sets.images / 16.0, dtype=torch.float32).unsqueeze(1) - MEAN) / STD
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.as_tensor(sets.target)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def network() -> nn.Module:
    torch.manual_seed(0)
    return bs.zoo.create("digits_resnet", width=8)


def train(model: nn.Module, step: Callable[[Tensor, Tensor], Any], steps: int, lr: float) -> None:
    x, y, _, _ = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        batch = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        step(x[batch], y[batch])
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module) -> float:
    _, _, x, y = digits()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize(
    "recipe", [R.shiftquant(), R.shiftquant(6, 6, 6, norm="l2", groups=2)], ids=["4 bits", "6 bits, L2"]
)
def test_a_network_trained_in_integers_runs_in_the_engine(recipe: bs.Recipe, tmp_path: Path) -> None:
    x, _, test, labels = digits()
    model = bs.quantize_(network(), recipe, x[:4])
    train(model, lambda a, b: F.cross_entropy(model(a), b).backward(), steps=120, lr=0.05)
    dynamic = accuracy(model)
    assert dynamic > 0.85
    bs.freeze_(model, x[:512].split(64))
    assert abs(accuracy(model) - dynamic) < 0.03

    program = bs.lower(model, x[:1])
    report = bs.verify(model, program, test[:48].double())
    assert report.ok, str(report)
    assert report.first_difference == "none"
    bs.pack(program, tmp_path / "net.strata")
    session = runtime.load(tmp_path / "net.strata")
    logits = session.run(test.numpy(), floats=True)
    with torch.no_grad():
        ours = model(test)
    assert np.mean(logits.argmax(1) == ours.argmax(1).numpy()) >= 0.995
    engine = float(np.mean(logits.argmax(1) == labels.numpy()))
    assert abs(engine - accuracy(model)) <= 0.005
    reference = runtime.load(tmp_path / "net.strata", executor="reference")
    few = test[:4].numpy()
    assert np.array_equal(session.run_raw(few, floats=True), reference.run_raw(few, floats=True))


@pytest.mark.parametrize(
    ("make", "bits"),
    [(lambda: R.uniq(4), 4), (lambda: R.lsq(3), 4), (lambda: R.strata(w=(2, 4)), 6)],
    ids=["uniq", "lsq", "strata"],
)
def test_integer_gradients_train_other_recipes_as_well_as_float_ones(
    make: Callable[[], bs.Recipe], bits: int, tmp_path: Path
) -> None:
    x, _, test, _ = digits()
    found: dict[bool, dict[int, float]] = {}
    weights: list[Tensor] = []
    for integer in (False, True):
        recipe = make()
        if integer:
            recipe = dataclasses.replace(recipe, gradient=Part("shiftquant", "gradient", {"g": bits}))
        model = network()
        bs.quantize_(model, recipe, x[:4])
        bs.calibrate_(model, [x[:64], x[64:128]])
        distill = recipe.objective.distill
        train(model, lambda a, b: bs.joint_backward(model, a, b, distill=distill), steps=120, lr=0.02)  # noqa: B023
        found[integer] = {}
        weights.append(next(model.parameters()).detach().clone())
        for p in bs.precisions(model):
            with bs.precision(model, p):
                found[integer][p] = accuracy(model)
    for p, value in found[True].items():
        assert value > 0.8
        assert value > found[False][p] - 0.06
    assert not torch.equal(*weights)
    program = bs.lower(model, x[:1])
    assert bs.verify(model, program, test[:32].double()).ok


def test_the_command_line_goes_all_the_way(tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = ["--data", "digits", "--model", "digits_resnet", "--recipe", "shiftquant", "--out", str(out)]
    sizes = ["--train-limit", "256", "--test-limit", "64", "--float-epochs", "1", "--epochs", "1"]
    assert main(["train", *base, *sizes, "--bits", "5", "--set", "g=6", "--verify-images", "16"]) == 0
    results = json.loads((out / "results.json").read_text())
    (row,) = results["rows"]
    assert (row["bits"], results["verify"]["ok"], row["top1_agreement"]) == (5, True, 1.0)
    assert row["engine_accuracy"] == row["fake_accuracy"]
    assert main(["verify", str(out), "--images", "8", "--all"]) == 0
    assert main(["lower", str(out)]) == 0
    assert main(["eval", str(out), "--json", str(tmp_path / "network.json")]) == 0
    options = ["--data", "digits", "--limit", "64", "--json", str(tmp_path / "engine.json")]
    assert main(["eval", str(out / "model.strata"), *options]) == 0
    network_accuracy = json.loads((tmp_path / "network.json").read_text())["float"]
    assert json.loads((tmp_path / "engine.json").read_text())["5"] == network_accuracy == row["fake_accuracy"]
    assert main(["bench", str(out / "model.strata"), "--runs", "1", "--repeats", "1"]) == 0
