"""`bitstrata inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitstrata.cli import main


def test_tables_file_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    common = ["--data", "digits", "--model", "digits_cnn", "--train-limit", "128", "--test-limit", "50"]
    short = ["--float-epochs", "1", "--epochs", "1", "--verify-images", "2", "--threads", "1"]
    assert main(["train", *common, *short, "--bits", "1,2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--images", "64"]) == 0
    shown = capsys.readouterr().out
    assert "Rule I " in shown
    assert "factor (MGD)" in shown
    found = json.loads((out / "inspect.json").read_text())
    assert set(found["precisions"]) == {"1", "2"}
    first = next(iter(found["precisions"]["1"]["signals"].values()))
    assert first["input"] is None  # pixels
    inner = list(found["precisions"]["1"]["signals"].values())[1]
    assert len(inner["weight"]["counts"]) == 2
    assert (out / "inspect.png").stat().st_size > 1000


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "not a run directory" in capsys.readouterr().err
