"""What the studies here share: arguments, runs that continue where they stopped, means, and where they were taken."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitstrata import integer_
from bitstrata_runtime.engine import available_isas

Options = dict[str, Any] | None
Metrics = dict[str, float]


def settings(*widths: int, groups: int = 4) -> dict[str, Options]:
    """Float32, the two int8 forms, and ShiftQuant at each of the widths."""
    shift = {f"shift {b}/{b}/{b}": {"w": b, "a": b, "g": b, "groups": groups} for b in widths}
    return {"fp32": None, "int8_naive": {"method": "int8_naive"}, "int8_sr": {"method": "int8_sr"}, **shift}


@dataclass(frozen=True)
class Study:
    """One study.

    run: (options of integer_, seed, arguments) to numbers by name; None as options means float32.
    arguments: name -> default, or type where the argument is required; lists of numbers by `nargs="+"`.
    """

    title: str
    settings: dict[str, Options]
    run: Callable[[Options, int, argparse.Namespace], Metrics]
    arguments: dict[str, Any]
    note: str = ""


def converted(model: nn.Module, example: Any, options: Options, seed: int, args: argparse.Namespace) -> nn.Module:
    """The model itself for float32, else in integers, multiplied in the form that `--form` names."""
    if options is None:
        return model
    form = {} if args.form is None else {"form": args.form}
    return integer_(model, example, seed=seed, **form, **options)


def optimizer_for(model: nn.Module, rate: float, decay: float, steps: int) -> tuple[Any, Any]:
    """AdamW, and a rate that rises over a twentieth of the steps and falls as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=decay)
    rise = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return optimizer, schedule


def step(model: nn.Module, loss: Tensor, optimizer: Any, schedule: Any, clip: float = 1.0) -> float:
    """One step of the optimizer, the gradient's norm clipped; the loss."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    schedule.step()
    return float(loss.detach())


def main(study: Study) -> None:
    """Run what is missing in the file of results, one run after the other; write the file after each."""
    parser = argparse.ArgumentParser(description=study.title)
    for name, default in study.arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, type):
            parser.add_argument(flag, type=default, required=True)
        else:
            parser.add_argument(flag, type=type(default), default=default)
    parser.add_argument("--settings", nargs="+", default=list(study.settings), choices=list(study.settings))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--form", help="how integers are multiplied; default: that of integer_")
    parser.add_argument("--json", type=Path, help="results; runs that are there already are not repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fixed = {k: v for k, v in vars(args).items() if k not in _FREE}
    fixed["data"] = Path(args.data).name  # where it lies does not matter
    rows = _earlier(args.json, fixed)
    for name in args.settings:
        row = rows.setdefault(name, {"setting": name, "options": study.settings[name], "runs": []})
        for seed in args.seeds:
            if any(run["seed"] == seed for run in row["runs"]):
                continue
            begin = time.perf_counter()
            metrics = study.run(study.settings[name], seed, args)
            seconds = round(time.perf_counter() - begin, 1)
            row["runs"].append({"seed": seed, **metrics, "seconds": seconds, "commit": commit()})
            row |= _summary(row["runs"])
            shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            print(f"{name:14} seed {seed}  {shown}  {seconds} s", flush=True)
            if args.json:
                _write(args.json, {"title": study.title, "note": study.note, **_where(), "arguments": fixed}, rows)


_FREE = ("json", "settings", "seeds")
_ABOUT = ("seed", "seconds", "commit")


def _earlier(path: Path | None, fixed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of a file of results; they must have been taken with the same arguments."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["arguments"] != fixed:
        raise SystemExit(
            f"{path} holds results of other arguments, {found['arguments']}; now {fixed}: name another file"
        )
    return {row["setting"]: row for row in found["rows"]}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample) of every number over the seeds."""
    names = [name for name in runs[0] if name not in _ABOUT]
    columns = {name: [run[name] for run in runs] for name in names}
    return {
        "mean": {name: round(statistics.mean(column), 5) for name, column in columns.items()},
        "spread": {name: round(statistics.stdev(c), 5) if len(c) > 1 else 0.0 for name, c in columns.items()},
    }


def _write(path: Path, head: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Whole or not at all, so that an interruption leaves the file before."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**head, "rows": list(rows.values())}, indent=1) + "\n")
    partial.replace(path)


def commit() -> str:
    """The commit of this folder, with "-dirty" where files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _where() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else f"model name:{platform.processor()}"
    return {
        "cpu": info.split("model name", 1)[1].split(":", 1)[1].split("\n", 1)[0].strip(),
        "instruction_set": available_isas()[-1],
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
