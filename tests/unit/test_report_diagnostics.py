"""Panels of what `bitstrata inspect` and `bitstrata plan` leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_report import INSPECTED, PLANNED

from bitstrata import report
from bitstrata.report.panels import plans, signals


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
