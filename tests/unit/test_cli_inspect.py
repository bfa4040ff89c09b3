"""`bitstrata inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bitstrata as bs
from bitstrata.cli import main, saved
from bitstrata.cli.loading import load_data


def test_tables_file_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    common = ["--data", "digits", "--model", "digits_cnn", "--train-limit", "128", "--test-limit", "50"]
    short = ["--float-epochs", "1", "--epochs", "1", "--verify-images", "2", "--threads", "1"]
    assert main(["train", *common, *short, "--bits", "1,2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--images", "64", "--landscape", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Rule I " in shown
    assert "factor (MGD)" in shown
    found = json.loads((out / "inspect.json").read_text())
    assert set(found["precisions"]) == {"1", "2"}
    first = next(iter(found["precisions"]["1"]["signals"].values()))
    assert first["input"] is None  # pixels
    inner = list(found["precisions"]["1"]["signals"].values())[1]
    assert len(inner["weight"]["counts"]) == 2
    assert list(found["gradients"]) == list(found["precisions"]["1"]["signals"])
    assert found["normalizations"]
    assert all(one["l1"]["norm"] > one["l2"]["norm"] > 0 for one in found["normalizations"].values())
    assert len(found["landscape"]["loss"]) == len(found["landscape"]["axis"]) == 3
    assert "Loss surface: " in shown
    for name in ("inspect", "inspect-gradients", "inspect-norms", "inspect-landscape"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_a_run_in_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that trained in integers has no precisions, and all else is measured."""

    class Saved:
        def __init__(self, path: Path, root: Path | None) -> None:
            self.path = path

        def data(self, split: str) -> bs.data.Dataset:
            return load_data("digits", None, split, 64)

        def model(self, data: bs.data.Dataset) -> nn.Module:
            torch.manual_seed(0)
            return bs.integer_(bs.zoo.create("digits_cnn"), torch.randn(2, 1, 8, 8)).eval()

    monkeypatch.setattr(saved, "SavedRun", Saved)
    assert main(["inspect", str(tmp_path), "--images", "32"]) == 0
    assert "channels a group" in capsys.readouterr().out
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert found["precisions"] == {}
    assert found["gradients"]
    assert found["normalizations"]
    assert found["landscape"] is None
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["inspect-gradients.png", "inspect-norms.png"]


@pytest.mark.parametrize("points", ["2", "1", "-3"])
def test_no_such_surface(points: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--landscape", points]) == 1
    assert f"--landscape {points}: expected an odd number of at least 3" in capsys.readouterr().err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "not a run directory" in capsys.readouterr().err
