"""`bitstrata inspect`: what quantization does to a trained network, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bitstrata.cli.common import environment, need_training, output, parse_bits, write_json


@dataclass(frozen=True)
class Inspect:
    """Print a run's layers at each precision: noise, clipping, zeros, code use; SAT's two training rules in words; how
    the precisions' objectives agree; gradients by channel, what normalizations divide by, the loss around the weights.
    Writes RUN/inspect.json, RUN/inspect.png and pictures named RUN/inspect-*.png."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of `train` or `quantize`."""
    bits: str | None = None
    """Precisions to inspect, as 1,2,4; default all."""
    images: int = 256
    """Training images that activations and gradients are measured on."""
    landscape: int = 0
    """Points of the loss surface along each of its two directions, odd; each takes one evaluation of the images. 0: no
    surface."""
    root: Path | None = None
    """Directory of the data set's files, if it has moved."""

    def run(self) -> None:
        """Print the tables."""
        need_training("inspect", "matplotlib")
        from bitstrata.cli import figures, inspection
        from bitstrata.cli.saved import SavedRun
        from bitstrata.prepare import precisions

        figures.check(self.landscape)
        run = SavedRun(self.run_dir, self.root)
        data = run.data("train")
        model = run.model(data)
        wanted = parse_bits(self.bits) if self.bits is not None else precisions(model)
        found = inspection.inspect(model, data, wanted, self.images)
        found |= figures.measure(model, data, self.images, self.landscape)
        self._print(found)
        figures.show(found, output())
        write_json(self.run_dir / "inspect.json", {**found, "images": self.images, **environment()})
        if found["precisions"]:
            inspection.draw(found, self.run_dir / "inspect.png")
        figures.draw(found, self.run_dir)

    def _print(self, found: dict[str, Any]) -> None:
        from rich.table import Table

        console = output()
        for bits, layers in found["precisions"].items():
            table = Table(title=f"{bits} bits", title_justify="left")
            for column in ("layer", "weight dB", "clipped", "not zero", "codes", "input dB", "clipped", "not zero"):
                table.add_column(column, justify="left" if column == "layer" else "right")
            for name, parts in layers["signals"].items():
                table.add_row(name, *_cells(parts["weight"], codes=True), *_cells(parts["input"], codes=False))
            console.print(table)
            console.print(layers["rules"]["text"], highlight=False)
        geometry = found["objectives"]
        if geometry is not None:
            table = Table(title="objectives of the precisions, gradients to what they share", title_justify="left")
            for column in ("bits", "loss", "gradient norm", "factor (MGD)", "cosines"):
                table.add_column(column, justify="right")
            for i, bits in enumerate(geometry["precisions"]):
                cosines = " ".join(f"{value:+.2f}" for value in geometry["cosines"][i])
                row = (geometry["losses"][i], geometry["norms"][i], geometry["factors"][i])
                table.add_row(str(bits), *(f"{value:.4g}" for value in row), cosines)
            console.print(table)


def _cells(signal: dict[str, Any] | None, *, codes: bool) -> list[str]:
    if signal is None:
        return ["-"] * (4 if codes else 3)
    sqnr = "-" if signal["sqnr"] is None else f"{signal['sqnr']:.1f}"
    used = sum(1 for count in signal["counts"] if count)
    shares = [sqnr, f"{signal['clipped']:.1%}", f"{signal['nonzero']:.1%}"]
    return [*shares, f"{used} of {len(signal['counts'])}"] if codes else shares
