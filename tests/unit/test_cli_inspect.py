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
from bitstrata.train.metrics import read


def test_tables_file_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    common = ["--data", "digits", "--model", "digits_cnn", "--train-limit", "128", "--test-limit", "50"]
    short = ["--float-epochs", "1", "--epochs", "1", "--verify-images", "2", "--threads", "1"]
    looking = ["--diagnose", "steps,flips,moo", "--diagnose-every", "2", "--batch-size", "32"]
    assert main(["train", *common, *short, *looking, "--bits", "1,2", "--out", str(out)]) == 0
    assert "diagnosis: 3 measurements of " in capsys.readouterr().out
    events = [event for event in read(out / "metrics.jsonl") if event["event"] == "diagnosis"]
    assert [(event["run"], event["step"]) for event in events] == [("joint", 0), ("joint", 2), ("joint", 4)]
    assert set(events[1]["layers"]) == {"weight_step", "input_step", "flips"}
    assert set(events[1]["whole"]) == {"moo_loss", "moo_norm", "moo_factor", "moo_cosine"}
    assert main(["inspect", str(out), "--images", "64", "--landscape", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Rule I " in shown
    assert "factor (MGD)" in shown
    assert "variance ratio" in shown
    assert "R_w = " in shown
    assert "R_a = " in shown
    assert "codes that changed from step 2 to 4, by stratum" in shown
    found = json.loads((out / "inspect.json").read_text())
    assert set(found["precisions"]) == {"1", "2"}
    first = next(iter(found["precisions"]["1"]["signals"].values()))
    assert first["input"] is None  # pixels
    inner = list(found["precisions"]["1"]["signals"].values())[1]
    assert len(inner["weight"]["counts"]) == 2
    assert set(found["precisions"]["1"]["nonzero"]) == {"R_w", "R_a"}
    assert list(found["gradients"]) == list(found["precisions"]["1"]["signals"])
    assert found["normalizations"]
    assert all(one["l1"]["norm"] > one["l2"]["norm"] > 0 for one in found["normalizations"].values())
    assert len(found["landscape"]["loss"]) == len(found["landscape"]["axis"]) == 3
    assert "Loss surface: " in shown
    kinds = ("layers", "objectives", "time", "precisions", "gradients", "norms", "landscape")
    names = ("inspect", *(f"inspect-{kind}" for kind in kinds))
    assert [name for name in names if (out / f"{name}.png").stat().st_size < 5000] == []


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diagnose", "snr"], "--diagnose 'snr' is unknown; did you mean 'sqnr'?"),
        (["--diagnose", "moo", "--bits", "2"], "--diagnose moo: is about several precisions, and --bits names one"),
        (["--diagnose", "all", "--diagnose-every", "0"], "--diagnose-every: must be at least 1 step, got 0"),
        (["--diagnose", "all", "--recipe", "shiftquant"], "--diagnose: recipe 'shiftquant' trains in integers"),
    ],
)
def test_what_cannot_be_diagnosed_is_an_error_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", "digits", "--model", "digits_cnn", "--out", str(out), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
