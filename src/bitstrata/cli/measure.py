"""What is measured of a trained network and of its artifact: predictions, agreement, layers, latency (torch side)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bitstrata_runtime as runtime
from bitstrata.data import Dataset, FloatDataset
from bitstrata.lowering import double_copy
from bitstrata.prepare import precision

BATCH = 250


def executor() -> str:
    """What runs an artifact: the engine where it is built, else the float64 oracle, which gives the same integers."""
    return "engine" if runtime.available_isas() else "oracle"


def isa_in_use(session: runtime.Session, isa: str | None) -> str:
    """The instruction set whose kernels a session runs; "none" where the engine is not built."""
    if executor() != "engine":
        return "none"
    from bitstrata_runtime.engine import EngineExecutor

    return EngineExecutor(session.plan, isa=isa).isa


def images_of(dataset: Dataset, batch: int = BATCH) -> Iterator[Tensor]:
    """Inputs of a data set, such as uint8 images (batch, C, H, W), a batch at a time."""
    for start in range(0, len(dataset), batch):
        yield dataset.batch(range(start, min(start + batch, len(dataset))))[0]


def normalized64(images: Tensor, dataset: Dataset) -> Tensor:
    """(pixel / 255 - mean) / std in float64; inputs that are no pixels as they are."""
    if isinstance(dataset, FloatDataset):
        return images.double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    return (images.double() / 255 - mean) / std


def reference_top1(model: nn.Module, dataset: Dataset, levels: Sequence[int]) -> dict[int, NDArray[np.int64]]:
    """Classes that the fake-quantized network predicts in float64, per precision, in the data set's order.

    Float32 rounding flips codes near a threshold, and flips cascade; float64 is the fake network's own answer.
    """
    exact = double_copy(model)
    found: dict[int, list[Tensor]] = {level: [] for level in levels}
    with torch.no_grad():
        for images in images_of(dataset):
            inputs = normalized64(images, dataset)
            for level in levels:
                with precision(exact, level):
                    found[level].append(exact(inputs).argmax(1))
    return {level: torch.cat(parts).numpy() for level, parts in found.items()}


def inputs_of(program: runtime.Program, images: Tensor, dataset: Dataset) -> NDArray[Any]:
    """uint8 images as the program takes them: pixels as they are, else normalized float64."""
    return images.numpy() if program.input_kind == "pixels" else normalized64(images, dataset).numpy()


def engine_top1(session: runtime.Session, dataset: Dataset) -> NDArray[np.int64]:
    """Classes that a session predicts, in the data set's order."""
    floats = session.program.input_kind != "pixels"
    found = []
    for images in images_of(dataset):
        found.append(session.run(inputs_of(session.program, images, dataset), floats=floats).argmax(1))
    return np.concatenate(found)


def share_equal(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Share of equal entries."""
    return float(np.mean(a == b))


def disagreements(
    engine: NDArray[np.int64], model: NDArray[np.int64], labels: NDArray[np.int64]
) -> list[dict[str, int]]:
    """Every image that engine and fake-quantized network classify differently, with both classes and its label."""
    return [
        {"image": int(i), "label": int(labels[i]), "engine": int(engine[i]), "model": int(model[i])}
        for i in np.flatnonzero(engine != model)
    ]


def values_differing(
    path: Path, bits: int, dataset: Dataset, isas: Sequence[str | None] = (None,), against: str = "reference"
) -> dict[str | None, list[str]]:
    """Per instruction set, the values of the program at which the engine differs from the reference in any integer.

    against: "reference", the normative executor, or "oracle", the same with convolutions as exact matrix products.
    """
    reference = runtime.load(path, bits=bits, executor=against)
    engines = {isa: runtime.load(path, bits=bits, executor="engine", isa=isa) for isa in isas}
    differing: dict[str | None, dict[str, None]] = {isa: {} for isa in isas}
    floats = reference.program.input_kind != "pixels"
    for images in images_of(dataset):
        inputs = inputs_of(reference.program, images, dataset)
        expected = reference.run_all(inputs, floats=floats)
        for isa, engine in engines.items():
            found = engine.run_all(inputs, floats=floats)
            if found.keys() != expected.keys():
                raise RuntimeError(
                    f"engine and reference name different values: {sorted(found.keys() ^ expected.keys())}"
                )
            wrong = [name for name in expected if not np.array_equal(found[name], expected[name])]
            differing[isa].update(dict.fromkeys(wrong))
    return {isa: list(names) for isa, names in differing.items()}


def latency_ms(session: runtime.Session, image: NDArray[np.uint8], repeats: int = 50) -> float:
    """Median milliseconds of one run on `image` (N, C, H, W), after five runs to warm up."""
    for _ in range(5):
        session.run(image)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        session.run(image)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3


def bytes_fetched(session: runtime.Session) -> int:
    """Bytes of all files and parts of files that the session has read so far."""
    return sum(int(size) for _, size in session.reads)
