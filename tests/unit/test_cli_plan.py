"""`bitstrata plan`: widths by layer within a budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitstrata_runtime as runtime
from bitstrata.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits at 1, 2 and 4 bits."""
    out = tmp_path_factory.mktemp("run") / "digits"
    common = ["--data", "digits", "--model", "digits_cnn", "--train-limit", "256", "--test-limit", "100"]
    short = ["--float-epochs", "1", "--epochs", "1", "--verify-images", "2", "--threads", "1"]
    assert main(["train", *common, *short, "--bits", "1,2,4", "--out", str(out)]) == 0
    return out


def test_a_curve_from_the_narrowest_to_the_widest(run: Path) -> None:
    assert main(["plan", str(run), "--batches", "2", "--budget", "1bits", "1.7bits", "4bits"]) == 0
    rows = json.loads((run / "plans.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["plan-1bits", "plan-1.7bits", "plan-4bits"]
    assert rows[0]["bits"] == 1
    assert 1 < rows[1]["bits"] <= 1.7
    assert rows[2]["bits"] == 4
    assert rows[0]["bytes"] < rows[1]["bytes"] < rows[2]["bytes"]
    session = runtime.load(run / "model.strata", bits="plan-1.7bits")
    assert set(session.precision_map.values()) >= {1}
    assert (run / "plans.png").stat().st_size > 1000


def test_a_budget_in_bytes(run: Path) -> None:
    assert main(["plan", str(run), "--batches", "1", "--budget", "1bits"]) == 0
    least = json.loads((run / "plans.json").read_text())["rows"][0]["bytes"]
    assert main(["plan", str(run), "--batches", "1", "--budget", str(least + 300)]) == 0
    assert least <= json.loads((run / "plans.json").read_text())["rows"][0]["bytes"] <= least + 300


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("much", "--budget much: write 2.6bits, or bytes such as 150000 or 150KiB"),
        ("0.9bits", "--budget 0.9bits: the narrowest plan has 1 bits a weight"),
        ("12", "--budget 12: the narrowest plan has 1 bits a weight"),
    ],
)
def test_budgets_that_are_none(run: Path, capsys: pytest.CaptureFixture[str], budget: str, message: str) -> None:
    before = (run / "model.strata" / "manifest.json").read_bytes()
    assert main(["plan", str(run), "--budget", budget]) == 1
    assert message in capsys.readouterr().err
    assert (run / "model.strata" / "manifest.json").read_bytes() == before
