"""`bitstrata export`: an artifact as C for microcontrollers; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bitstrata.cli.common import CommandError, human_bytes, read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitstrata_runtime import Session


@dataclass(frozen=True)
class Export:
    """Write an artifact at one precision as C99 for microcontrollers: integers only, no allocation, no libraries."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact directory."""
    bits: str
    """Precision: a number, the name of a plan, or a JSON file that maps every layer to its precision."""
    out: Path
    """Folder that the files go to."""
    format: Literal["c"] = "c"
    """C99."""
    name: str = "model"
    """Name of the files, and prefix of what they declare."""
    test_vector: Path | None = None
    """Input that main.c runs and checks: a .npy array (C, H, W), or an image file (needs Pillow); default random."""
    floats: bool = False
    """The test vector holds floats, for programs whose input is not pixels."""

    def run(self) -> None:
        """Write the files and print what they need."""
        import bitstrata_runtime as runtime
        from bitstrata.export import export_c

        session = runtime.load(self.artifact, bits=self._precision(), executor="oracle")
        vector = None if self.test_vector is None else self._codes(session, self.test_vector)
        title = f"{self.artifact.name} at {self.bits} bits" if self.bits.isdecimal() else f"{self.artifact.name}"
        made = export_c(session.plan, self.out, name=self.name, title=title, vector=vector)
        print(f"{self.out}: {', '.join(file.name for file in made.files)}")
        print(f"arena {human_bytes(made.arena_bytes)} of RAM, tables {human_bytes(made.table_bytes)} of flash")
        print(f"try it: cc -std=c99 -O2 {self.out}/*.c -o try && ./try")

    def _precision(self) -> Any:
        if self.bits.endswith(".json"):
            chosen = read_json(Path(self.bits))
            if not isinstance(chosen, dict):
                raise CommandError(f"--bits {self.bits}: expected a JSON object of layer names and precisions")
            return chosen
        return int(self.bits) if self.bits.isdecimal() else self.bits

    def _codes(self, session: Session, path: Path) -> NDArray[Any]:
        """The input's codes (H, W, C)."""
        from bitstrata.cli.run import read_input

        array = read_input(path, session.program.input_shape)
        if len(array) != 1:
            raise CommandError(f"--test-vector {path}: holds {len(array)} inputs, expected one")
        return session.encode(array, floats=self.floats)[0]
