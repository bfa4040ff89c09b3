"""Panels of what `bitstrata inspect` and `bitstrata plan` leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_report import INSPECTED, PLANNED

from bitstrata import report
from bitstrata.report.panels import gradients, landscape, normalizations, plans, signals


@pytest.fixture
def run(tmp_path: Path) -> report.Run:
    (tmp_path / "inspect.json").write_text(json.dumps(INSPECTED))
    (tmp_path / "plans.json").write_text(json.dumps(PLANNED))
    return report.read(tmp_path)


def test_signals_name_layers_and_rules(run: report.Run) -> None:
    assert signals.needs(run) is None
    page = signals.render([run])
    assert "conv&lt;1&gt;" in page
    assert "conv<1>" not in page
    assert "<td>12.3</td><td>25.0%</td><td>50.0%</td><td>2 of 3</td>" in page
    assert "Rule II is broken" in page
    assert "<td>3.5</td>" in page
    assert "<td>0.75</td>" in page


def test_gradients_are_drawn_and_listed(run: report.Run) -> None:
    assert gradients.needs(run) is None
    page = gradients.render([run])
    assert page.count('class="wide"') == 2
    assert "conv&lt;1&gt;: 1.75 times a channel&#x27;s own range with one range, 1.13 with groups" in page
    assert "<td>3</td><td>75.0%</td><td>1.75</td><td>1.13</td><td>1 + 1 + 0 + 1</td>" in page


def test_norms_are_drawn_and_listed(run: report.Run) -> None:
    assert normalizations.needs(run) is None
    page = normalizations.render([run])
    assert page.count('class="wide"') == 2
    assert "bn&lt;1&gt;: L1 12, L2 2" in page
    assert "<td>3</td><td>12</td><td>2</td><td>0.001</td><td>0.001</td><td>1.23%</td><td>25.00%</td>" in page


def test_the_surface_is_drawn_and_described(run: report.Run) -> None:
    assert landscape.needs(run) is None
    page = landscape.render([run])
    assert "loss 1.25 at the weights, 1.25 to 4 around them" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize(
    ("panel", "key", "values"),
    [
        (gradients, "gradients", [None, [], {"fc": {}}, {"fc": {"counts": [0], "ranges": [1], "groups": [0]}}]),
        (normalizations, "normalizations", [None, [], {}, {"bn": {"channels": 1, "l1": {}}}]),
        (landscape, "landscape", [None, {"axis": [0, 1, 2], "loss": [[1, 2, 3]]}, {"axis": [1], "loss": [[1]]}]),
    ],
)
def test_broken_parts_are_left_out(panel, key, values, tmp_path: Path) -> None:
    reason = str(panel.needs(report.read(tmp_path)))
    assert "`bitstrata inspect" in reason
    for value in values:
        (tmp_path / "inspect.json").write_text(json.dumps({key: value}))
        assert panel.needs(report.read(tmp_path)) is not None


def test_plans_are_drawn_and_listed(run: report.Run) -> None:
    assert plans.needs(run) is None
    page = plans.render([run])
    assert "87.50% at 2.0 KiB" in page
    assert "<svg" in page
    assert "broken" not in page


def test_reasons(tmp_path: Path) -> None:
    empty = report.read(tmp_path)
    assert "bitstrata inspect" in str(signals.needs(empty))
    assert "bitstrata plan" in str(plans.needs(empty))
    (tmp_path / "inspect.json").write_text("{}")
    (tmp_path / "plans.json").write_text('{"rows": [{"name": 1}]}')
    assert signals.needs(report.read(tmp_path)) is not None
    assert plans.needs(report.read(tmp_path)) == "plans.json holds no plans"
