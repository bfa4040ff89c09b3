"""Whether the engine computes what was trained."""

from __future__ import annotations

from collections.abc import Sequence

from ..markup import Markup, details, el
from ..registry import Panel
from ..runs import Run


def needs(run: Run) -> str | None:
    """A verification."""
    if isinstance(run.results.get("verify"), dict):
        return None
    return "not verified: there is no artifact" if "no_artifact" in run.results else "not verified yet"


def render(runs: Sequence[Run]) -> Markup:
    """A verdict a run, with the report behind it."""
    return el("ul", *map(_verdict, runs), class_="plain")


def _verdict(run: Run) -> Markup:
    found = run.results["verify"]
    good = found.get("ok") is True
    badge = el("span", "passed" if good else "FAILED", class_="good" if good else "bad")
    images = f", {found['images']} images" if "images" in found else ""
    report = el("pre", str(found.get("report", "no report")), tabindex="0")
    return el("li", el("p", el("b", run.name), f"{images}: ", badge), details("Report", report))


PANEL = Panel(
    "Verification",
    "Trained network, reference executor and engine compared layer by layer: the engine's integers must equal the "
    "reference's; codes that differ from the network's are counted, with their distance from the rounding threshold.",
    70,
    needs,
    render,
)
