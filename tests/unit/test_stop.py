"""SIGTERM and Ctrl-C: the step is finished, everything is saved, the process ends with 0, and the run goes on."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitstrata.cli import main, outcome, pipeline
from bitstrata.train import TrainConfig, Trainer, TrainingStopped, checkpoint
from bitstrata.train.metrics import read, reproducible

CONFIG = TrainConfig(epochs=3, lr=0.02, batch_size=8, log_every=1)
HANDLED = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def _handlers_and_threads() -> Iterator[None]:
    handlers, threads = [signal.getsignal(number) for number in HANDLED], torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert [signal.getsignal(number) for number in HANDLED] == handlers


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 3
    x = torch.randn(24, 6, generator=generator) + y.view(-1, 1).float() - 1
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


class Watched(list):
    """Test batches that do something when they are asked for."""

    def __init__(self, values: Any, act: Any) -> None:
        super().__init__(values)
        self.act = act

    def __iter__(self) -> Iterator[Any]:
        for value in super().__iter__():
            self.act()
            yield value


def trainer(out: Path | None, act: Any = lambda: None) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    return Trainer(model, CONFIG, batches(), Watched(batches(), act), out)


def signalled(run: Trainer, at: int, *signals: signal.Signals) -> Trainer:
    """Signals arrive during the step that follows `at` steps."""
    objective = run.objective

    def interrupting(*given: Any) -> Any:
        if run.position.step == at:
            for number in signals:
                os.kill(os.getpid(), number)
        return objective(*given)

    run.objective = interrupting
    return run


def assert_goes_on(out: Path) -> None:
    """The run in `out` ends as one that was never stopped, in weights, random numbers and record."""
    whole, resumed = trainer(out / "whole"), trainer(out)
    expected = whole.fit(), torch.rand(1)
    assert (resumed.fit(), torch.rand(1)) == expected
    for (name, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    events = [reproducible(read(folder / "metrics.jsonl")) for folder in (out / "whole", out)]
    assert events[0] == events[1]


@pytest.mark.parametrize("number", HANDLED)
@pytest.mark.parametrize("at", [0, 4, 5, 8])
def test_the_step_is_finished_and_saved(tmp_path: Path, capsys, number: signal.Signals, at: int) -> None:
    with pytest.raises(TrainingStopped) as stopped:
        signalled(trainer(tmp_path), at, number).fit()
    assert stopped.value.code == 0
    assert checkpoint.load(tmp_path / "train.ckpt")["position"]["step"] == at + 1
    message = f"{number.name}: train stopped after step {at + 1} of 9, saved in {tmp_path / 'train.ckpt'}; run the same"
    assert message in capsys.readouterr().err
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("times", [4, 8])
def test_an_evaluation_is_broken_off_and_done_again(tmp_path: Path, times: int) -> None:
    calls = []

    def act() -> None:
        calls.append(torch.rand(1))  # an evaluation that draws random numbers
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        trainer(tmp_path, act).fit()
    position = checkpoint.load(tmp_path / "train.ckpt")["position"]
    assert (position["step"], position["epochs"]) == {4: (6, 1), 8: (9, 2)}[times]
    assert [event["event"] for event in read(tmp_path / "metrics.jsonl")].count("eval") == position["epochs"]
    whole, resumed = (trainer(folder, lambda: torch.rand(1)) for folder in (tmp_path / "whole", tmp_path))
    assert whole.fit() == resumed.fit()
    for value, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        signalled(trainer(tmp_path), 4, signal.SIGINT, signal.SIGINT).fit()
    assert checkpoint.load(tmp_path / "train.ckpt")["position"]["step"] == 3
    assert_goes_on(tmp_path)


def test_without_files_the_message_says_so(capsys) -> None:
    run = signalled(trainer(None), 4, signal.SIGTERM)
    with pytest.raises(TrainingStopped):
        run.fit()
    assert "nothing was saved, as the trainer has no out_dir" in capsys.readouterr().err
    assert run.evaluate().keys() == {"float"}  # a stop that was obeyed is over


def test_another_thread_trains_without_handlers() -> None:
    seen = []

    def act() -> None:
        seen.append([signal.getsignal(number) for number in HANDLED])

    before = [signal.getsignal(number) for number in HANDLED]
    thread = threading.Thread(target=trainer(None, act).fit)
    thread.start()
    thread.join()
    assert seen == [before] * 9


TRAIN = shlex.split(
    "train --data digits --model digits_cnn --model-set width=4 --bits 1,2 --float-epochs 1 --epochs 1 --batch-size 64 "
    "--train-limit 192 --test-limit 40 --calibration-batches 1 --verify-images 2 --threads 1 --out"
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The directory of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert main([*TRAIN, str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "place",
    [(Trainer, "_step"), (pipeline, "quantized"), (outcome.bs, "pack"), (outcome, "measured_rows")],
)
def test_the_command_ends_with_0_wherever_it_is(
    whole_run: Path, tmp_path: Path, monkeypatch, capsys, place: tuple[Any, str]
) -> None:
    owner, name = place
    original = getattr(owner, name)

    def interrupting(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting)
        assert main([*TRAIN, str(tmp_path / "cut")]) == 0
    assert "SIGTERM: " in capsys.readouterr().err
    assert not (tmp_path / "cut" / "results.json").exists()
    assert main([*TRAIN, str(tmp_path / "cut")]) == 0
    for file in (whole_run / "model.strata").iterdir():
        assert (tmp_path / "cut" / "model.strata" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "cut").glob(".*"))


def test_the_command_goes_on_under_other_conditions_only_if_told_to(tmp_path: Path, monkeypatch, capsys) -> None:
    original = Trainer._step

    def interrupting(self: Trainer, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupting)
        assert main([*TRAIN, str(tmp_path)]) == 0
    monkeypatch.setenv("BITSTRATA_ISA", "generic")
    assert main([*TRAIN, str(tmp_path)]) == 1
    assert "bitstrata's instruction set: " in capsys.readouterr().err
    with pytest.warns(UserWarning, match="will not be the same to the bit"):
        assert main([*TRAIN, str(tmp_path), "--allow-inexact"]) == 0
    assert (tmp_path / "results.json").exists()
