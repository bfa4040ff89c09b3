"""Values over epochs: one chart a group of runs, the mean over seeds as a line, their range as a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import look
from .chart import chart, color
from .markup import Markup, details, el, join, table
from .runs import Group, Run, Stage, groups


@dataclass(frozen=True)
class Source:
    """A kind of line: `event` and `field` of the metrics file, under a name; dashed, or solid with markers."""

    name: str
    event: str
    field: str
    dashed: bool = False


@dataclass(frozen=True)
class Curve:
    """One line: mean, least and largest over the runs, where at least one run has a value."""

    stage: str
    level: str
    source: Source
    x: list[float]
    mean: list[float]
    least: list[float]
    largest: list[float]


def curves(group: Group, sources: Sequence[Source]) -> list[Curve]:
    """Every line of a group."""
    points: dict[tuple[str, str, Source], dict[float, list[float]]] = {}
    for run in group.runs:
        for stage in run.stages:
            for source in sources:
                for level, series in stage.series(source.event, source.field).items():
                    for x, value in series:
                        points.setdefault((stage.name, level, source), {}).setdefault(round(x, 4), []).append(value)
    found = []
    for (name, level, source), at in points.items():
        values = [at[x] for x in sorted(at)]
        means = [sum(v) / len(v) for v in values]
        found.append(Curve(name, level, source, sorted(at), means, [*map(min, values)], [*map(max, values)]))
    return found


def render(
    runs: Sequence[Run],
    sources: Sequence[Source],
    what: str,
    form: Callable[[float], str],
    dress: Callable[[Any, float, float], None],
    *,
    beside: bool = False,
) -> Markup:
    """A figure for each group. what: the y axis; form: a value as text; dress: sets up the y axis, given the
    axes and the least and largest of all values, so that figures can be compared. beside: other charts stand beside
    these, and the axis of epochs begins with the first value.
    """
    found = [(group, curves(group, sources)) for group in groups(runs)]
    everything = [line for _, lines in found for line in lines]
    levels = look.ordered({line.level for line in everything})
    used = [source for source in sources if any(line.source == source for line in everything)]
    styles = {source.name: "dashed" if source.dashed else "solid" for source in used} if len(used) > 1 else None
    legend = look.key({look.named(level): look.of_level(level) for level in levels}, dashed=styles)
    right = max(max(line.x) for line in everything)
    left = min(min(line.x) for line in everything) if beside else 0.0
    span = min(min(line.least) for line in everything), max(max(line.largest) for line in everything)
    figures = []
    for group, lines in found:
        draw = _drawing(group, lines, lambda axes: dress(axes, *span), left, right)
        picture = chart(_described(what, group, lines, form), draw, alone=len(found) == 1 and not beside)
        title = el("h3", group.label) if len(found) > 1 else Markup()
        figures.append(el("figure", title, picture, _numbers(group, lines, levels, form)))
    return el("div", legend, el("div", *figures, class_="figures"))


def _drawing(
    group: Group, lines: Sequence[Curve], dress: Callable[[Any], None], left: float, right: float
) -> Callable[[Any, bool], None]:
    def draw(axes: Any, narrow: bool) -> None:
        for line in lines:
            style = look.of_level(line.level)
            tone = color(style.color)
            if line.source.dashed:
                axes.plot(line.x, line.mean, color=tone, linestyle=(0, (4, 3)), linewidth=1.4)
                continue
            axes.plot(line.x, line.mean, color=tone, marker=style.marker, markevery=max(1, len(line.x) // 12))
            if len(group.runs) > 1:
                axes.fill_between(line.x, line.least, line.largest, color=tone, alpha=0.16, linewidth=0)
        dress(axes)
        axes.set_xlabel("epoch")
        room = 0.03 * ((right - left) or 1.0)
        axes.set_xlim(left - room if left else 0.0, right + room)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5 if narrow else 9)
        stages = max((run.stages for run in group.runs), key=len)
        _mark_stages(axes, [stage for stage in stages if stage.before >= left])

    return draw


def _mark_stages(axes: Any, stages: Sequence[Stage]) -> None:
    """The name of each stage above its part of the axis, and a line where a later one begins."""
    for stage in stages:
        if stage.before:
            axes.axvline(stage.before, color=color("muted"), linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"stage {stage.name}", (stage.before, 1), (4 if stage.before else 0, 4),
            xycoords=("data", "axes fraction"), textcoords="offset points", color=color("muted"), fontsize=11,
        )  # fmt: skip


def _described(what: str, group: Group, lines: Sequence[Curve], form: Callable[[float], str]) -> str:
    """The text alternative: where each solid line ends."""
    last = {(line.stage, line.level): line.mean[-1] for line in lines if not line.source.dashed}
    ends = [f"{look.named(level)} {form(value)} (stage {stage})" for (stage, level), value in last.items()]
    return f"{what} over epochs, {group.label}. Last values: {'; '.join(ends) or 'none'}."


def _numbers(group: Group, lines: Sequence[Curve], levels: Sequence[str], form: Callable[[float], str]) -> Markup:
    """All points as tables, for those who read rather than look."""
    tables = []
    for source in dict.fromkeys(line.source for line in lines):
        mine = {line.level: dict(zip(line.x, line.mean, strict=True)) for line in lines if line.source == source}
        rows: dict[float, dict[str, float]] = {}
        for line in lines:
            if line.source == source:
                for x, value in zip(line.x, line.mean, strict=True):
                    rows.setdefault(x, {})[line.level] = value
        shown = [level for level in levels if level in mine]
        body = [[f"{x:g}", *(form(rows[x][v]) if v in rows[x] else "–" for v in shown)] for x in sorted(rows)]
        mean = ", mean over seeds" if len(group.runs) > 1 else ""
        tables.append(table(f"{source.name}{mean}", ["epoch", *map(look.named, shown)], body))
    return details("Numbers", join(tables))
