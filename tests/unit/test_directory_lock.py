"""Two processes in one run directory: the second is refused, and a killed one leaves nothing in the way."""

from __future__ import annotations

import errno
import os
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from bitstrata.cli import main
from bitstrata.train import DirectoryInUseError, TrainConfig, Trainer, lock, quiet
from bitstrata.train.lock import DirectoryLock


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A process that does the work and then waits until it is killed, at the latest at the end of the block."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(tell, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"1"
        yield child
    finally:
        os.close(ready)
        kill(child)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):  # it was killed before
        pass


def trainer(out: Path) -> Trainer:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    return Trainer(nn.Linear(3, 2), TrainConfig(epochs=1, lr=0.1, batch_size=4), batches, None, out, reporter=quiet)


def test_the_second_process_is_refused_and_changes_nothing(tmp_path: Path, capsys) -> None:
    trainer(tmp_path).fit()
    (tmp_path / "config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with forked(lambda: DirectoryLock(tmp_path).take()) as child:
        message = f"{tmp_path}: process {child} on {os.uname().nodename} trains in this directory; wait until it has"
        with pytest.raises(DirectoryInUseError, match=message):
            trainer(tmp_path).fit(resume=False)
        command = f"train --data digits --model digits_cnn --bits 2 --epochs 1 --quiet --fresh --out {tmp_path}"
        assert main(command.split()) == 1
        assert message in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != ".lock"} == before
    trainer(tmp_path).fit()
    assert sorted(before) == sorted(file.name for file in tmp_path.iterdir())  # nothing is left of the lock


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    with forked(lambda: DirectoryLock(tmp_path).take()) as child:
        kill(child)
        assert (tmp_path / ".lock").exists()
        DirectoryLock(tmp_path).take()
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} ")


def test_processes_that_a_killed_one_has_forked_do_not_hold_its_lock(tmp_path: Path) -> None:
    number = tmp_path / "grandchild"

    def work() -> None:
        DirectoryLock(tmp_path).take()
        grandchild = os.fork()
        if grandchild == 0:
            signal.pause()
        number.write_text(str(grandchild))

    with forked(work) as child:
        kill(child)
        try:
            with DirectoryLock(tmp_path) as mine:
                mine.take()
                os.kill(int(number.read_text()), 0)  # it is alive
        finally:
            os.kill(int(number.read_text()), signal.SIGKILL)


def test_a_process_takes_it_several_times_and_keeps_it_to_the_last_release(tmp_path: Path) -> None:
    refused, out = [], tmp_path / "new" / "run"

    def attempt() -> None:
        try:
            DirectoryLock(out).take()
        except DirectoryInUseError:
            return
        raise AssertionError

    with DirectoryLock(out) as outer:
        assert not out.exists()
        outer.take()
        outer.take()
        trainer(out).fit()
        with DirectoryLock(tmp_path / "new" / ".." / "new" / "run") as inner:
            inner.take()
        with forked(attempt):
            refused.append(True)
        assert (out / ".lock").exists()
    assert refused
    assert not (out / ".lock").exists()
    with forked(lambda: DirectoryLock(out).take()):
        pass


def test_a_lock_that_was_given_back_in_between_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    real, calls = lock.fcntl, []

    def flock(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()  # as its holder does, after this process has opened it
        calls.append(handle)
        real.flock(handle, how)

    monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=real.LOCK_EX, LOCK_NB=real.LOCK_NB))
    with DirectoryLock(tmp_path) as mine:
        mine.take()
        assert len(calls) == 2
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} ")


def test_where_there_are_no_locks_training_goes_on(tmp_path: Path, monkeypatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with pytest.warns(UserWarning, match=r"\.lock: cannot be locked \(No locks available\); no other process may"):
        trainer(tmp_path / "nolocks").fit()
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    trainer(tmp_path / "windows").fit()
    for name in ("nolocks", "windows"):
        assert (tmp_path / name / "train.ckpt").exists()
