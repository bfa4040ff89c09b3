"""`bitstrata inspect`: what quantization does to a trained network, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bitstrata.cli.common import environment, need_training, output, parse_bits, write_json

WEIGHTS = ("layer", "dB", "step", "clipped", "not zero", "codes", "variance ratio", "gradient", "kappa_1")
INPUTS = ("layer", "dB", "step", "deviation", "clipped", "not zero")


@dataclass(frozen=True)
class Inspect:
    """Print a run's layers at each precision: noise, steps, clipping, zeros, code use, variances; SAT's two training
    rules in words; how the precisions' objectives agree; how often codes changed, if --diagnose has counted that;
    gradients by channel, what normalizations divide by, the loss around the weights.

    Writes RUN/inspect.json and pictures: inspect.png (weights on their grids) and inspect-*.png (layers, objectives of
    several precisions, gradients, norms, landscape; of a run with --diagnose time and precisions)."""

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
        """Print the tables, write the files."""
        need_training("inspect", "matplotlib")
        from bitstrata.cli import figures, inspection, inspection_plots
        from bitstrata.cli.saved import SavedRun
        from bitstrata.prepare import precisions
        from bitstrata.train import snapshot

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
        written = inspection_plots.draw(self.run_dir, found, snapshot.layers(model)) if found["precisions"] else []
        written += figures.draw(found, self.run_dir)
        output().print(f"drawn: {', '.join(str(path) for path in written)}", soft_wrap=True)

    def _print(self, found: dict[str, Any]) -> None:
        console = output()
        for bits, one in found["precisions"].items():
            layers, signals = one["rules"]["layers"], one["signals"]
            weights = [(name, *_weight(parts["weight"], layers.get(name))) for name, parts in signals.items()]
            console.print(_table(f"{bits} bits: weights", WEIGHTS, weights))
            inputs = [(name, *_input(parts["input"])) for name, parts in signals.items()]
            console.print(_table(f"{bits} bits: inputs of layers", INPUTS, inputs))
            zeros = ", ".join(f"{name} = {share:.1%}" for name, share in one["nonzero"].items())
            console.print(f"Not zero of all layers together: {zeros}")
            console.print(one["rules"]["text"], highlight=False)
        if found["objectives"] is not None:
            console.print(_objectives(found["objectives"]))
        flips = _flips(self.run_dir)
        if flips is not None:
            console.print(flips)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column == head[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _weight(signal: dict[str, Any], rule: dict[str, Any] | None) -> list[str]:
    used = sum(1 for count in signal["counts"] if count)
    shares = [_number(signal["sqnr"], ".1f"), _number(signal["step"], ".3g")]
    shares += [f"{signal['clipped']:.1%}", f"{signal['nonzero']:.1%}", f"{used} of {len(signal['counts'])}"]
    return [*shares, *(_number((rule or {}).get(name), ".3g") for name in ("ratio", "gradient", "kappa1"))]


def _input(signal: dict[str, Any] | None) -> list[str]:
    if signal is None:
        return ["-"] * 5
    numbers = [_number(signal["sqnr"], ".1f"), _number(signal["step"], ".3g"), _number(signal["deviation"], ".3g")]
    return [*numbers, f"{signal['clipped']:.1%}", f"{signal['nonzero']:.1%}"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _objectives(geometry: dict[str, Any]) -> Any:
    rows = []
    for i, bits in enumerate(geometry["precisions"]):
        cosines = " ".join(_number(value, "+.2f") for value in geometry["cosines"][i])
        numbers = (_number(geometry[name][i], ".4g") for name in ("losses", "norms", "factors"))
        rows.append((str(bits), *numbers, cosines))
    head = ("bits", "loss", "gradient norm", "factor (MGD)", "cosines")
    return _table("objectives of the precisions, gradients to what they share", head, rows)


def _flips(directory: Path) -> Any:
    """How often codes changed between the last two measurements during training; None if nobody counted."""
    from bitstrata import report
    from bitstrata.report.diagnosis import stages

    for stage in reversed(stages(report.read(directory))):
        events = [event for event in stage.of("diagnosis") if "flips" in event["layers"]]
        if events:
            strata = events[-1]["layers"]["flips"]
            layers = dict.fromkeys(layer for part in strata.values() for layer in part)
            rows = [(layer, *(_number(part.get(layer), ".2%") for part in strata.values())) for layer in layers]
            title = f"codes that changed from step {events[-1].get('since')} to {events[-1]['step']}, by stratum"
            return _table(title, ("layer", *strata), rows)
    return None
