"""The page: head, runs at a glance, panels; styles and script inside, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from . import look
from .markup import Markup, el, join, note
from .panels.results import bytes_of
from .registry import Panel, all_panels
from .runs import Group, Run, groups, is_number

#: Forbids the browser to load anything at all.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
NOT_SHOWN = "Not shown"
FACTS = ("model", "data", "recipe", "bits", "float_epochs", "epochs", "lr", "batch_size", "checkpoint")


def document(runs: Sequence[Run], title: str) -> str:
    """The whole document for at least one run."""
    views = [(f"panel-{i}", _View(panel, runs)) for i, panel in enumerate(all_panels())]
    shown = [(key, view) for key, view in views if view.having]
    empty = [view for _, view in views if not view.having]
    links = [el("li", el("a", view.panel.title, href=f"#{key}")) for key, view in shown]
    if empty:
        links.append(el("li", el("a", NOT_SHOWN, href="#not-shown")))
    body = el(
        "body",
        el("a", "Skip to the results", href="#main", class_="skip"),
        el("header", el("h1", title), el("p", _subtitle(runs), class_="lead")),
        el("nav", el("ul", *links), aria_label="Panels"),
        el("main", _glance(runs), *(_section(*each) for each in shown), _not_shown(empty), id="main", tabindex="-1"),
        el("footer", el("p", "Written by ", el("b", "bitstrata report"), ". This page loads nothing from anywhere.")),
        el("script", Markup(_file("page.js"))),
    )
    return f"<!doctype html>\n{el('html', _head(title), body, lang='en')}\n"


def _head(title: str) -> Markup:
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("link", rel="icon", href="data:,"),
        el("title", f"{title} – bitstrata report"),
        el("style", Markup(_file("page.css"))),
        el("script", Markup("document.documentElement.classList.add('js')")),
    )


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _subtitle(runs: Sequence[Run]) -> str:
    done = sum(run.complete for run in runs)
    if len(runs) == 1:
        return f"One run, {runs[0].state}."
    return f"{done} complete, {len(runs) - done} unfinished." if done < len(runs) else "All complete."


def _glance(runs: Sequence[Run]) -> Markup:
    cards = [_card(group) for group in groups(runs)]
    heading = el("h2", "Runs", id="runs") if len(cards) > 1 else el("h2", "Run", id="runs")
    return el("section", heading, el("div", *cards, class_="cards"), aria_labelledby="runs")


def _card(group: Group) -> Markup:
    """What was run, how far it came, and what it reached, for runs that differ in nothing but the seed."""
    run = group.runs[0]
    facts = [(name.replace("_", " "), run.config[name]) for name in FACTS if run.config.get(name) not in (None, [])]
    seeds = [str(r.config["seed"]) for r in group.runs if "seed" in r.config]
    if seeds:
        facts.append(("seeds" if len(seeds) > 1 else "seed", ", ".join(seeds)))
    states = {r.state: r for r in group.runs}
    shown = [run] if len(states) == 1 else group.runs
    verdicts = [
        el("p", f"{r.name}: " if len(states) > 1 else "", el("span", r.state, class_="good" if r.complete else "open"))
        for r in shown
    ]
    problems = [el("p", f"{r.name}: {problem}", class_="bad") for r in group.runs for problem in r.problems]
    listed = [part for name, value in facts for part in (el("div", el("dt", name), el("dd", value)),)]
    return el("article", el("h3", group.label), *verdicts, *problems, _tiles(group), el("dl", *listed), class_="card")


def _tiles(group: Group) -> Markup:
    """The accuracies in large figures, widest precision first."""
    tiles = []
    rows = [row for run in group.runs for row in run.rows]
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        mine = [row for row in rows if row["bits"] == bits]
        values = [_accuracy(row) for row in mine]
        known = [value for value in values if value is not None]
        if known:
            size = bytes_of(mine[0])
            under = f"{size / 1024:.1f} KiB" if is_number(size) else ""
            share = f"{100 * sum(known) / len(known):.1f}"
            level = look.of_level(str(bits)).color
            figure = el("span", share, el("small", " %"), class_="figure")
            tiles.append(
                el(
                    "li",
                    el("span", look.named(str(bits))),
                    figure,
                    el("span", under),
                    style=f"border-color:var(--{level})",
                )
            )
    return el("ul", *tiles, class_="tiles") if tiles else Markup()


def _accuracy(row: dict[str, object]) -> float | None:
    """The engine's accuracy, or the fake-quantized network's where there is no artifact."""
    for name in ("engine_accuracy", "fake_accuracy"):
        value = row.get(name)
        if isinstance(value, int | float) and is_number(value):
            return float(value)
    return None


class _View:
    """A panel, the runs that have its data, and why each other run has not."""

    def __init__(self, panel: Panel, runs: Sequence[Run]) -> None:
        self.panel = panel
        reasons = [(run, _reason(panel, run)) for run in runs]
        self.having = [run for run, reason in reasons if reason is None]
        self.lacking = [
            f"{run.name}: {reason}" if len(runs) > 1 else reason for run, reason in reasons if reason is not None
        ]


def _section(key: str, view: _View) -> Markup:
    """A panel with the runs that have its data; one line for each that has not."""
    return el(
        "section",
        el("h2", view.panel.title, id=f"{key}-title"),
        el("p", view.panel.description, class_="lead"),
        _rendered(view.panel, view.having),
        join(note(line) for line in view.lacking),
        id=key,
        aria_labelledby=f"{key}-title",
    )


def _not_shown(views: Sequence[_View]) -> Markup:
    """One list of the panels that no run has data for, with what would give it."""
    if not views:
        return Markup()
    listed = [part for view in views for part in (el("dt", view.panel.title), *(el("dd", x) for x in view.lacking))]
    return el(
        "section",
        el("h2", NOT_SHOWN, id="not-shown-title"),
        el("p", "Panels that have no data yet, and why.", class_="lead"),
        el("dl", *listed, class_="plain"),
        id="not-shown",
        aria_labelledby="not-shown-title",
    )


def _reason(panel: Panel, run: Run) -> str | None:
    try:
        return panel.needs(run)
    except Exception as error:  # whatever a damaged run contains, the other panels are to be seen
        return f"its data cannot be read ({type(error).__name__}: {error})"


def _rendered(panel: Panel, runs: Sequence[Run]) -> Markup:
    try:
        return panel.render(runs)
    except Exception as error:  # likewise
        return note(f"This panel cannot be drawn from what these runs contain ({type(error).__name__}: {error}).")
