"""Runs of the command line that are killed (SIGKILL) at random moments and then continued to the end.

    python tests/helpers_kill.py --kills 50 --json build/kill_series.json

A kill comes after a random time, spread evenly over the whole run, or at a random call that makes a file durable or
gives it its name, before or after it. Every run is a process of its own, forked from one that has imported everything,
so that the time of a run is its work. Each continued run has to end in the weights, the artifact and the record of
metrics of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from bitstrata.cli import main, outcome, pipeline
from bitstrata.cli.common import environment, write_json
from bitstrata.train import Trainer, checkpoint
from bitstrata.train.keeper import Keeper
from bitstrata.train.metrics import reproducible

COMMON = (
    "train --data digits --model digits_cnn --model-set width=8 --float-epochs {epochs} --epochs {epochs} --lr 0.05 "
    "--batch-size 64 --train-limit 512 --test-limit 100 --calibration-batches 1 --verify-images 4 "
    "--checkpoint-every 3 --threads 1 --log-every 2"
)
RECIPES = {"strata": "--bits 1,2,4", "shiftquant": "--recipe shiftquant"}
CALLS = ("fsync", "replace", "link", "rename", "unlink")


class Phase:
    """What a run is doing, in memory that outlives it, and how many file calls it has made."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)

    def write(self, text: str, calls: int | None = None) -> None:
        count = self.calls if calls is None else calls
        self.memory[:] = f"{count}\n{text}\n".encode().ljust(4096, b"\0")

    @property
    def text(self) -> str:
        return self._lines()[1]

    @property
    def calls(self) -> int:
        return int(self._lines()[0] or 0)

    def _lines(self) -> list[str]:
        return self.memory[:].rstrip(b"\0").decode().split("\n")[:2]


def instrument(phase: Phase, die_at: float | None) -> None:
    """Make this process tell its phase and, at call number `die_at`, kill itself: before the call, after it at n.5."""

    def told(owner: Any, name: str, words: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            around, text = phase.text, words(*args)
            phase.write(text)
            result = original(*args, **kwargs)
            between = around == "starting" or around.startswith("after ")
            phase.write(f"after {text}" if between else around)
            return result

        setattr(owner, name, wrapped)

    told(Trainer, "_step", lambda trainer, *_: f"{trainer.name}: step {trainer.position.step + 1}")
    told(Trainer, "_evaluation", lambda trainer, *_: f"{trainer.name}: evaluating")
    told(Trainer, "_begin", lambda trainer, *_: f"{trainer.name}: beginning")
    told(Keeper, "save", lambda keeper, state, *_: f"{keeper.name}: saving after step {state['position']['step']}")
    for owner, name, words in (
        (pipeline, "begin", "opening the data"),
        (pipeline, "claim", "claiming the directory"),
        (pipeline, "quantized", "quantizing, calibrating"),
        (outcome, "packed", "lowering, packing"),
        (outcome, "measured_rows", "measuring"),
        (outcome, "verified", "verifying"),
        (pipeline, "write_json", "writing the options"),
        (outcome, "write_json", "writing results"),
    ):
        told(owner, name, lambda *_, words=words: words)
    for name in CALLS:
        count_calls(name, phase, die_at)


def count_calls(name: str, phase: Phase, die_at: float | None) -> None:
    """Count the calls of a function of `os` that changes files."""
    original = getattr(os, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        number = phase.calls + 1
        phase.write(phase.text, number)
        if die_at == number:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return original(*args, **kwargs)
        finally:  # a call that fails, as that of a file that is not there, is a moment too
            if die_at == number + 0.5:
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, counted)


def run(argv: list[str], *, after: float | None = None, at_call: float | None = None) -> tuple[int, Phase, float]:
    """One run in a process of its own, killed `after` seconds or `at_call`; exit status, last phase, seconds."""
    phase = Phase()
    phase.write("starting", 0)
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            instrument(phase, at_call)
            code = main(argv)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # a zombie at worst: nobody has waited for it
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), phase, time.monotonic() - begun


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of the final weights, of the artifact and of the record of metrics without times."""
    weights = hashlib.sha256()
    for stage in ("float", "joint"):
        state = checkpoint.load(out / f"{stage}.ckpt")
        for name, value in sorted(state["model"].items()):
            weights.update(name.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    artifact = hashlib.sha256()
    for file in sorted((out / "model.strata").iterdir()):
        artifact.update(file.name.encode() + file.read_bytes())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    record = hashlib.sha256(json.dumps(reproducible(lines)).encode())
    return {"weights": weights.hexdigest(), "artifact": artifact.hexdigest(), "record": record.hexdigest()}


def series(kills: int, seed: int, recipe: str, epochs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """First the undisturbed run, then one row a kill: three in five by time, two in five by call."""
    argv = [*COMMON.format(epochs=epochs).split(), *RECIPES[recipe].split(), "--out"]
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        main([*argv, str(folder / "warm")])  # in this process: imports everything that the runs will need
    code, phase, seconds = run([*argv, str(folder / "whole")])
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code} while {phase.text}")
    expected = fingerprint(folder / "whole")
    yield {"recipe": recipe, "seconds": round(seconds, 3), "file_calls": phase.calls, **expected}
    chance = random.Random(seed)
    timed = round(0.6 * kills)
    moments = [{"after": seconds * (i + chance.random()) / timed} for i in range(timed)]
    moments += [{"at_call": chance.randint(1, phase.calls) + chance.choice((0, 0.5))} for _ in range(kills - timed)]
    for number, moment in enumerate(moments):
        out, code = folder / f"cut{number}", 0
        while code != -signal.SIGKILL:  # the machine may have been slower when the undisturbed run was timed
            shutil.rmtree(out, ignore_errors=True)
            code, phase, _ = run([*argv, str(out)], **moment)
            if code != -signal.SIGKILL:
                moment = {key: 0.8 * value if key == "after" else value for key, value in moment.items()}  # noqa: PLW2901
                if code != 0:
                    raise RuntimeError(f"a run ended with {code} while {phase.text}")
        again, last, _ = run([*argv, str(out)])
        found = fingerprint(out) if again == 0 else {}
        yield {
            "recipe": recipe,
            "moment": f"{moment['after']:.3f} s" if "after" in moment else f"file call {moment['at_call']:g}",
            "died": phase.text,
            "continued": "to the end" if again == 0 else f"exit code {again} while {last.text}",
            **{f"{part}_equal": found.get(part) == expected[part] for part in expected},
        }
        shutil.rmtree(out, ignore_errors=True)


def command() -> int:
    """The series for each recipe; writes the table and prints a summary. Exit code 0: all equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each of the two stages")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipes = options.recipes.split(",")
    shares = [len(range(i, options.kills, len(recipes))) for i in range(len(recipes))]
    undisturbed, rows = [], []
    for recipe, share in zip(recipes, shares, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            found = series(share, options.seed, recipe, options.epochs, Path(folder))
            undisturbed += itertools.islice(found, 1)
            for row in found:
                rows.append(row)
                print(json.dumps(row), flush=True)
    equal = sum(row["weights_equal"] and row["artifact_equal"] and row["record_equal"] for row in rows)
    table = {"kills": len(rows), "equal": equal, **environment(), "undisturbed": undisturbed, "rows": rows}
    if options.json is not None:
        write_json(options.json, table)
    print(f"{equal} of {len(rows)} continued runs end in the same weights, artifact and record")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(command())
