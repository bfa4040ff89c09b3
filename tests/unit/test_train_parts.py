"""Parts of the trainer: schedule, configuration, checkpoints, metrics, progress."""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import re

import numpy as np
import pytest
import torch

from bitstrata.train import CheckpointError, TrainConfig, checkpoint
from bitstrata.train.metrics import MetricsLog, read
from bitstrata.train.progress import LiveReporter, PlainReporter, per_level, quiet, reporter
from bitstrata.train.schedule import lr_factor, lr_factor_of


def test_cosine_with_warmup():
    factors = [lr_factor(step, 12, 4, "cosine") for step in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.5)
    assert factors[11] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_constant_schedule_and_bounds():
    assert [lr_factor(step, 4, 2, "constant") for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(3, 4, 4, "cosine") == 1.0
    with pytest.raises(ValueError, match="step 4 is outside the schedule of 4 steps"):
        lr_factor(4, 4, 0, "cosine")


def test_warmup_is_counted_in_epochs():
    config = TrainConfig(epochs=2, warmup=0.5)
    assert lr_factor_of(config, 0, 10) == 0.2
    assert lr_factor_of(config, 4, 10) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"warmup": 11}, "warmup=11 must not exceed epochs=10"),
        ({"optimizer": "lion"}, "optimizer='lion' must be one of 'sgd', 'adam'"),
        ({"clip_grad": 0.0}, "clip_grad=0.0 must be positive"),
        ({"threads": 0}, "threads=0 must be at least 1"),
    ],
)
def test_configuration_rejects(fields, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**fields)


def test_crash_before_the_rename_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    checkpoint.save(path, {"step": 1, "weight": torch.arange(3.0)})

    def crash(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(CheckpointError, match=r"run\.ckpt: cannot be written \(power cut\); checkpoints .* intact"):
            checkpoint.save(path, {"step": 2, "weight": torch.zeros(3)})
    assert not (tmp_path / "run.ckpt.tmp").exists()
    state = checkpoint.load(path)
    assert state["step"] == 1
    assert torch.equal(state["weight"], torch.arange(3.0))
    checkpoint.save(path, {"step": 3})
    assert checkpoint.load(path)["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_crash_while_writing_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    checkpoint.save(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Bomb()), "truncated"])
def test_unreadable_checkpoints_are_errors_and_run_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.ckpt"
    if content == "truncated":
        checkpoint.save(path, {"weight": torch.zeros(1000)})
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.ckpt: not readable"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


def test_other_formats_are_named(tmp_path):
    torch.save({"format": 99}, tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match="format 99, this version reads formats 1 and 2"):
        checkpoint.load(tmp_path / "new.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="format 'list'"):
        checkpoint.load(tmp_path / "list.ckpt")


def draw() -> tuple[float, ...]:
    return (*torch.rand(3).tolist(), *torch.randn(3).tolist(), *np.random.randn(3), random.random(), random.gauss())


def test_every_generator_comes_back(tmp_path):
    checkpoint.seed_all(7)
    draw()
    np.random.randn()  # leaves half of a pair of normal numbers behind
    random.gauss()
    checkpoint.save(tmp_path / "run.ckpt", {"rng": checkpoint.rng_state()})
    expected = draw()
    checkpoint.seed_all(8)
    assert draw() != expected
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "run.ckpt")["rng"])
    assert draw() == expected


def test_metrics_are_cut_back_to_the_position(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "joint")
    log.write("step", step=1)
    position = log.position()
    log.write("step", step=2)
    log.cut(position)
    log.write("step", step=2, again=True)
    assert read(tmp_path / "metrics.jsonl") == [
        {"run": "joint", "event": "step", "step": 1},
        {"run": "joint", "event": "step", "step": 2, "again": True},
    ]
    with pytest.raises(ValueError, match=r"metrics\.jsonl: \d+ bytes, but the checkpoint was taken at 9999"):
        log.cut(9999)


def test_a_finished_stage_leaves_the_lines_of_later_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, second = MetricsLog(path, "float"), MetricsLog(path, "joint")
    first.write("step", step=1)
    position = first.position()
    second.write("step", step=1)
    before = path.read_bytes()
    first.cut(position)
    assert path.read_bytes() == before


def test_a_stage_that_starts_over_drops_its_own_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, "float").write("step", step=1)
    joint = MetricsLog(path, "joint")
    joint.write("step", step=1)
    with path.open("a") as stream:
        stream.write('{"run": "joint", "ev')
    joint.drop_run()
    assert read(path) == [{"run": "float", "event": "step", "step": 1}]


def test_metrics_refuse_values_that_are_not_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "float")
    with pytest.raises(ValueError, match="JSON"):
        log.write("step", loss=float("nan"))
    assert log.position() == 0


def test_plain_reporter_prints_first_last_and_notes():
    stream = io.StringIO()
    with reporter("joint", 3, 0, stream=stream, every_s=3600) as report:
        assert isinstance(report, PlainReporter)
        for step in (1, 2, 3):
            report.step(step, 0, 8, {1: 2.5, 4: 1.25}, lr=0.05 / step, accuracy={1: 0.125, 4: 0.5})
        report.evaluation(0, 2, {1: 0.25, 4: 0.75})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    first = "[joint] step 1/3 epoch 1  loss 4b 1.250  1b 2.500  training accuracy 4b 50.0%  1b 12.5%  lr 0.05  "
    assert lines[0].startswith(first)
    assert re.search(r"  \d+ images/s  0\.0 min left$", lines[0])
    assert lines[1].startswith("[joint] step 3/3")
    assert "lr 0.0167" in lines[1]
    assert lines[2] == "[joint] epoch 1/2  accuracy 4b 75.00%  1b 25.00%"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_reporter_on_a_terminal():
    stream = Terminal()
    with reporter("joint", 2, 0, stream=stream) as report:
        assert isinstance(report, LiveReporter)
        report.step(1, 0, 8, {2: 1.5, 4: 0.75}, lr=0.05, accuracy={2: 0.25, 4: 0.5})
        report.evaluation(0, 1, {4: 0.875})
        report.step(2, 0, 8, {2: 1.25, 4: 0.5}, lr=0.025, accuracy={2: 0.375, 4: 0.625})
    text = stream.getvalue()
    assert "epoch 1/1  accuracy 4b 87.50%" in text
    assert "2/2" in text
    assert "lr 0.025" in text
    last = [line.split() for line in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text).splitlines()][-2:]
    assert last == [["4b", "0.5000", "62.50%", "87.50%"], ["2b", "1.2500", "37.50%", "-"]]


def test_quiet_shows_nothing(capsys):
    with quiet("joint", 2, 0) as report:
        report.step(1, 0, 8, {4: 0.75}, lr=0.05, accuracy={4: 0.5})
        report.evaluation(0, 1, {4: 0.5})
        report.note("text")
    assert capsys.readouterr() == ("", "")


def test_levels_are_shown_widest_first():
    assert per_level({1: 0.5, 2: 0.25, 8: 1.0}, ".2f") == "8b 1.00  2b 0.25  1b 0.50"
    assert per_level({"float": 0.5}, ".0%") == "float 50%"
