"""A network in all the forms that are timed, made once in a folder and read by the processes that time it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _networks import Case, calibration, float_network, pixels, program
from _peers import OnnxFiles, export, have_onnx
from numpy.typing import NDArray
from torch import nn

import bitstrata as bs
import bitstrata_runtime as runtime

# Weight and activation widths as a row's `bits` names them -> (artifact, precision).
EQUAL = {str(bits): ("equal", bits) for bits in (1, 2, 4, 8)}
EDGE = {f"w{bits}a8": ("edge", bits) for bits in (1, 2, 3, 4)}
WIDTHS = EQUAL | EDGE


@dataclass(frozen=True)
class Prepared:
    """One network. images: as many as the largest batch; a batch is the first of them."""

    case: Case
    folder: Path
    images: NDArray[np.uint8]

    @classmethod
    def make(cls, case: Case, folder: Path, widths: tuple[str, ...], images: int) -> Prepared:
        """Write the float network, its ONNX forms, the artifacts that `widths` need, and what they must compute."""
        made = cls.of(case, folder, images)
        model = float_network(case)
        torch.save(model, folder / "float.pt")
        if have_onnx():
            export(model, calibration(case), folder)
        for name, w, a in (("equal", (1, 2, 4, 8), "same"), ("edge", (1, 2, 3, 4), 8)):
            if any(WIDTHS[width][0] == name for width in widths):
                bs.pack(program(case, model, w, a), folder / f"{name}.strata")
        for width in widths:
            np.save(folder / f"{width}.npy", made.session(width, executor="oracle").run_raw(made.images[[0, -1]]))
        return made

    @classmethod
    def of(cls, case: Case, folder: Path, images: int) -> Prepared:
        """What `make` wrote."""
        return cls(case, folder, pixels(case, images))

    def session(self, width: str, **options: object) -> runtime.Session:
        """A session at one of `WIDTHS`; options as of `bitstrata_runtime.load`."""
        artifact, bits = WIDTHS[width]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return runtime.load(self.folder / f"{artifact}.strata", bits=bits, **options)  # type: ignore[arg-type]

    def expected(self, width: str) -> NDArray[np.int32]:
        """The exact executor's integers for the first and the last image."""
        found: NDArray[np.int32] = np.load(self.folder / f"{width}.npy")
        return found

    def float_network(self) -> nn.Module:
        """The network in float32, in evaluation mode."""
        model: nn.Module = torch.load(self.folder / "float.pt", weights_only=False)
        return model

    def onnx(self) -> OnnxFiles | None:
        """Its ONNX files, None where none could be made."""
        return OnnxFiles(self.folder / "float32.onnx", self.folder / "int8.onnx") if have_onnx() else None
