"""Panels of what training with `--diagnose`, `bitstrata inspect` and `bitstrata plan` leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_report import INSPECTED, PLANNED, diagnosis, write_run, write_unfinished

from bitstrata import report
from bitstrata.report import chart, multiples
from bitstrata.report.markup import el
from bitstrata.report.panels import (
    by_layer,
    gradients,
    landscape,
    layers_time,
    normalizations,
    objectives,
    plans,
    signals,
)


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
    assert "<td>12.3</td><td>25.0%</td><td>50.0%</td><td>2 of 3</td><td>0.1</td>" in page
    assert "<td>0.875</td><td>2e-05</td><td>3.5</td>" in page
    assert "R_w 62.5%, R_a 37.5%" in page
    assert "Rule II is broken" in page
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
    assert "--diagnose" in str(layers_time.needs(empty))
    assert "--diagnose" in str(objectives.needs(empty))
    assert "bitstrata inspect" in str(by_layer.needs(empty))
    (tmp_path / "inspect.json").write_text("{}")
    (tmp_path / "plans.json").write_text('{"rows": [{"name": 1}]}')
    assert signals.needs(report.read(tmp_path)) is not None
    assert plans.needs(report.read(tmp_path)) == "plans.json holds no plans"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts by their descriptions alone, which is faster."""
    monkeypatch.setattr(chart, "_svg", lambda words, draw, form: el("svg", role="img", aria_label=words))


def test_layers_over_time_have_a_drawing_of_every_value_and_say_what_measuring_took(tmp_path: Path) -> None:
    found = report.read(write_run(tmp_path / "run"))
    assert layers_time.needs(found) is None
    page = layers_time.render([found])
    assert page.count('class="multiple"') == 2 * 14
    assert page.count('class="pane on"') == 1
    assert '<option value="block.conv" selected>' in page  # the stem is the same at every precision
    words = "signal to noise of the weight, dB, over epochs 2 to 4.5. Last values: 4 bits 4.4; 2 bits 8.8; 1 bit 17.5."
    assert words in page
    assert "Last values: stratum 1 0.57 %; stratum 2 1.1 %" in page
    assert "stage joint, epochs 2 to 4.5, 6 measurements" in page
    assert "6 measurements of 60 ms, 12 % of the time" in page
    assert '<th scope="row">step of the weight, 4 bits</th><td>1.25</td><td>4.38</td>' in page


def test_several_runs_have_a_selector_and_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [report.read(write_run(tmp_path / f"run{seed}", seed)) for seed in (0, 1, 2)]
    page = layers_time.render(runs)
    assert [f'<option value="{i}">run{i}</option>' in page for i in range(3)] == [True] * 3
    assert 'data-run="2" data-layer="stem"' in page
    monkeypatch.setattr(layers_time, "MOST", 4)
    page = layers_time.render(runs)
    assert "Left out for the size of the page: run2." in page
    assert 'data-run="2"' not in page


def test_precisions_over_time_are_charts_with_their_numbers(tmp_path: Path, undrawn: None) -> None:
    found = report.read(write_run(tmp_path / "run"))
    assert objectives.needs(found) is None
    page = objectives.render([found])
    ends = "1 bit 0.2 (stage joint); 2 bits 0.4 (stage joint); 4 bits 0.8 (stage joint)."
    assert f"Factors of multiple-gradient descent over epochs, run. Last values: {ends}" in page
    assert "Norm of the gradient to the shared weights over epochs" in page
    assert "R_a over epochs, run. Last values: 1 bit 20 % (stage joint)" in page
    assert '<th scope="row">4 and 1 bits</th><td>+0.25</td><td>+0.88</td>' in page
    assert "<td>0.25</td>" in page  # of the norms, in the table of numbers


def test_layers_come_from_the_inspection_or_else_from_the_last_measurement(tmp_path: Path) -> None:
    complete, stopped = write_run(tmp_path / "run"), write_unfinished(tmp_path / "stopped", joint_epochs=1)
    page = by_layer.render([report.read(complete)])
    assert "after training, by bitstrata inspect: 2 layers" in page
    assert "inputs not zero, R_a, over layers 1 to 2. Last values: 4 bits 50.0 %." in page
    page = by_layer.render([report.read(stopped)])
    assert "at the last measurement of stage joint: 2 layers" in page
    assert "weights not zero, R_w, over layers 1 to 2. Last values: 4 bits 3.8 %; 2 bits 7.5 %; 1 bit 15.0 %." in page
    assert "logarithmic" in page


def test_values_that_do_not_change_or_not_suit_a_logarithm_are_drawn_all_the_same() -> None:
    value = multiples.Value("share", lambda v: f"{v:g}", log=True, band=(0.1, 10.0))
    look = multiples.look.of_level("2")
    for points in ([(0.0, 1.0)], [(0.0, 0.0), (1.0, 2.0)], [(0.0, 3.0), (1.0, 3.0)]):
        drawn = multiples.small(value, [multiples.Line("2 bits", look, points)], (0.0, 1.0), "time")
        assert "nan" not in drawn
        assert drawn.count('class="run"') == 1
    many = [(float(i), float(i)) for i in range(1000)]
    short = multiples.thinned(many)
    assert (len(short), short[0], short[-1]) == (multiples.MOST, many[0], many[-1])


def test_events_without_numbers_are_no_measurement(tmp_path: Path) -> None:
    run = write_unfinished(tmp_path / "run")
    nothing = {**diagnosis({"run": "joint", "step": 3, "epoch": 0}), "layers": {}, "whole": {}, "ms": {}}
    (run / "metrics.jsonl").write_text(json.dumps(nothing) + "\n")
    found = report.read(run)
    assert found.problems == []
    assert layers_time.needs(found) is not None
