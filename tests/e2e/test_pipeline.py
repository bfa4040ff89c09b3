"""From a float network to an artifact that is upgraded bit by bit: the whole path on real digits, in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata_runtime import Program

MEAN, STD = 0.3, 0.35


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels (N, 1, 8, 8) uint8 and labels, for training and for testing."""
    sets = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.as_tensor(np.minimum(sets.images * 16, 255).astype(np.uint8)).unsqueeze(1)
    labels = torch.as_tensor(sets.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return pixels[train], labels[train], pixels[test], labels[test]


def as_floats(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (pixels.to(dtype) / 255 - MEAN) / STD


def train_float_(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        rows = torch.arange(step * 100, step * 100 + 100) % len(y)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def train_jointly_(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), lr=0.02, momentum=0.9)
    for step in range(steps):
        rows = torch.arange(step * 100, step * 100 + 100) % len(y)
        optimizer.zero_grad()
        losses = bs.joint_backward(model, x[rows], y[rows])
        assert sorted(losses) == [1, 2, 3, 4]
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels, test_pixels, test_labels = digits()
    x = as_floats(pixels)
    model = bs.zoo.digits_cnn(width=8)
    train_float_(model, x, labels, steps=24)
    bs.quantize_(model, bs.recipes.strata(), x[:8], input=bs.Pixels((MEAN,), (STD,)))
    bs.calibrate_(model, [x[:200], x[200:400]])
    train_jointly_(model, x, labels, steps=24)
    bs.reestimate_batchnorm_(model, x.split(200))
    return model.eval(), test_pixels, test_labels


@pytest.fixture(scope="module")
def program(trained: tuple[nn.Module, Tensor, Tensor]) -> Program:
    model, pixels, _ = trained
    return bs.lower(model, as_floats(pixels[:1]))


@pytest.fixture(scope="module")
def artifact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "digits.strata"
    bs.pack(program, path, {"made by": "a test"})
    return path


def test_training_has_learned_something(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = trained
    for p in (1, 2, 3, 4):
        with bs.precision(model, p), torch.no_grad():
            accuracy = (model(as_floats(pixels)).argmax(1) == labels).double().mean()
        assert accuracy > 0.7, p


def test_verified(trained: tuple[nn.Module, Tensor, Tensor], program: Program) -> None:
    model, pixels, _ = trained
    report = bs.verify(model, program, pixels[:64])
    assert report.ok, str(report)


def test_upgrades_read_one_stratum_and_one_set_of_factors_each(artifact: Path) -> None:
    session = runtime.load(artifact, 1)
    sizes = {path.name: path.stat().st_size for path in artifact.iterdir()}
    first = ["manifest.json", "base.safetensors", "resident.safetensors", "factors-1.safetensors"]
    assert sorted(session.reads) == sorted((name, sizes[name]) for name in first)
    for p in (2, 3, 4):
        before = len(session.reads)
        session.upgrade(p)
        added = [f"stratum-{p}.safetensors", f"factors-{p}.safetensors"]
        assert sorted(session.reads[before:]) == sorted((name, sizes[name]) for name in added)
    before = list(session.reads)
    session.downgrade(1)
    assert session.reads == before
    assert {name for name, _ in before} == set(sizes)  # by now every file was read, once
    assert len(before) == len(sizes)


def test_engine_equals_reference_on_every_test_image(
    trained: tuple[nn.Module, Tensor, Tensor], artifact: Path, program: Program
) -> None:
    pixels = trained[1].numpy()
    reference = runtime.load(artifact, 1, executor="reference")
    engines = [runtime.load(artifact, 1, executor="engine", isa=isa) for isa in runtime.available_isas()]
    for p in program.precisions:
        reference.set_precision(p)
        expected = reference.run_raw(pixels)
        for engine in engines:
            engine.set_precision(p)
            np.testing.assert_array_equal(engine.run_raw(pixels), expected)


def test_classes_are_those_of_the_float64_model(
    trained: tuple[nn.Module, Tensor, Tensor], artifact: Path, program: Program
) -> None:
    model, pixels, _ = trained
    twin = bs.lowering.trace.double_copy(model)
    session = runtime.load(artifact, 1, executor="reference")
    for p in program.precisions:
        session.set_precision(p)
        with bs.precision(twin, p), torch.no_grad():
            theirs = twin(as_floats(pixels, torch.float64)).argmax(1).numpy()
        assert (session.run(pixels.numpy()).argmax(1) == theirs).mean() >= 0.999
