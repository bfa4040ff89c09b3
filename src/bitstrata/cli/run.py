"""`bitstrata run`: one input through an artifact; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bitstrata.cli.common import CommandError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Run:
    """Run an artifact on an image or an array and print the most likely classes."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact directory."""
    input: Path
    """A .npy array, (C, H, W) or (N, C, H, W), uint8 pixels or what else the program reads, such as series (N, C, L)
    and features (N, C); or an image file (needs Pillow)."""
    bits: str
    """Precision to run at: a number, or the name of a plan."""
    top: int = 5
    """Classes to print for each image."""
    output: Path | None = None
    """Write the logits, float32 (N, classes), to this .npy file instead of printing."""
    floats: bool = False
    """The array holds floats in [0, 1] in place of uint8 pixels; programs that read no pixels take floats anyway."""
    executor: Literal["engine", "reference", "oracle"] | None = None
    """The compiled engine, the slow reference, or the reference by matrix products; default what is there."""
    isa: str | None = None
    """Instruction set of the engine; the best one by default."""
    threads: int = 1
    """Threads of the engine."""

    def run(self) -> None:
        """Print class, logit and share of the softmax; or write the logits."""
        import bitstrata_runtime as runtime

        bits: Any = int(self.bits) if self.bits.isdecimal() else self.bits
        session = runtime.load(self.artifact, bits=bits, executor=self.executor, isa=self.isa, threads=self.threads)
        array = read_input(self.input, session.program.input_shape)
        logits = session.run(array, floats=self.floats or session.program.input_kind != "pixels")
        if self.output is not None:
            import numpy as np

            np.save(self.output, logits)
            print(f"{self.output}: logits of {len(logits)} images")
            return
        for index, row in enumerate(logits.reshape(len(logits), -1)):
            self._print_row(index, row)

    def _print_row(self, index: int, row: NDArray[np.float32]) -> None:
        import numpy as np

        shares = np.exp(row - row.max())
        shares /= shares.sum()
        best = np.argsort(-row, kind="stable")[: self.top]
        print(f"image {index}: " + "  ".join(f"class {k} ({row[k]:+.3f}, {shares[k]:.1%})" for k in best))


def read_input(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    """An array (N, C, H, W) from a file; CommandError if it does not fit the program's (C, H, W)."""
    import numpy as np

    from bitstrata_runtime.snapshot import as_maps

    if not path.is_file():
        raise CommandError(f"--input {path}: no such file")
    array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _read_image(path, shape[0])
    array = as_maps(array, shape)
    array = array[np.newaxis] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[1:] != tuple(shape):
        raise CommandError(f"--input {path}: shape {array.shape}, the program reads (N, {', '.join(map(str, shape))})")
    return array


def _read_image(path: Path, channels: int) -> NDArray[np.uint8]:
    import numpy as np

    try:
        from PIL import Image
    except ImportError:
        raise CommandError(f"--input {path}: reading images needs Pillow; install it, or pass a .npy array") from None
    if channels not in (1, 3):
        raise CommandError(f"--input {path}: the program reads {channels} channels, an image file gives 1 or 3")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
