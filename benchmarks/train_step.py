"""Time and memory of one training step in integers, against a float step of the same network by torch.

    python benchmarks/train_step.py --json benchmarks/results/train_step.json
    python benchmarks/train_step.py --profile --cases resnet20 --threads 1

Every contestant runs forward and cross entropy in training mode, backward, and SGD with momentum on the same batch,
activations channels last. Ours: the network after `integer_` with one width for weights, activations and gradients (the
first and the last layer have eight), and `fuse` where the network is convolutional; in `vit-recompute` the forward
pass is under `recompute_outputs`. Peers: the float network in float32, or under bfloat16 autocast.

Memory: each contestant runs a few steps in processes of its own, the median of three counts. `ours_mb`, `peer_mb`: how
far its peak resident set rises above the resident set just before the first step, when model, batch and optimizer are
there; in 2^20 bytes. What the libraries need only once is touched before, by a step on a batch of two. Steps are timed
as they follow each other in training: in each turn two that are counted, after one that is not. With --keep-freed glibc
keeps what a step frees, as in `bitstrata train`: torch's own steps gain most by it. See benchmarks/README.md for how
rows are read.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from _common import Effort, Row, Setting, clock, effort, finish, interleave, names, numbers, parser, step, usable_cores
from _memory import KEEP_FREED, in_own_processes, rise
from torch import Tensor, nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.fused import fuse
from bitstrata.prepare.integer_training import integer_
from bitstrata.train import keep_freed_memory
from bitstrata_runtime import _engine

QUICK, FULL = Effort(rounds=2, turn_s=0.0), Effort(rounds=9, turn_s=0.0, steady=2)
PEERS = ("torch-fp32", "torch-bf16")


@dataclass(frozen=True)
class Case:
    """A zoo network on random images (3, side, side), and the widths of ours. ResNet-20 has projections (the paper)."""

    name: str
    network: str
    side: int
    batch: int
    bits: tuple[int, ...]
    fused: bool
    options: tuple[tuple[str, str], ...] = ()
    recompute: bool = False  # ours, under `recompute_outputs`

    @property
    def title(self) -> str:
        """As rows name it."""
        return f"{self.name} batch {self.batch}"


CASES = {
    case.name: case
    for case in (
        Case("resnet20", "resnet20", 32, 128, (4,), True, (("shortcut", "B"),)),
        Case("resnet18", "resnet18", 224, 8, (4,), True),
        Case("vit", "vit_cifar", 32, 64, (6, 4), False),
        Case("vit-recompute", "vit_cifar", 32, 64, (4,), False, recompute=True),
    )
}
QUICK_BATCHES = {"resnet20": 32, "resnet18": 2, "vit": 8, "vit-recompute": 8}


class Contestant:
    """A network of a case, its batch and its optimizer; calling it runs a step.

    Args:
        who: one of PEERS, or "ours-BITS".
    """

    def __init__(self, case: Case, who: str) -> None:
        torch.manual_seed(0)
        model = bs.zoo.create(case.network, classes=10, **dict(case.options)).train()
        images = torch.randn(case.batch, 3, case.side, case.side)
        self.x = images.contiguous(memory_format=torch.channels_last)
        self.targets = torch.arange(case.batch) % 10
        self.who, self.autocast = who, who == "torch-bf16"
        self.recompute = case.recompute and who not in PEERS
        if who in PEERS:  # weights in the layout of the gradients that each side's kernels give, as SGD likes it
            self.model: nn.Module = model.to(memory_format=torch.channels_last)
        else:
            self.model = _in_integers(model, case, int(who.removeprefix("ours-")))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, foreach=True)

    def loss(self) -> Tensor:
        """Of the batch."""
        context = bs.recompute_outputs() if self.recompute else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast), context:
            return F.cross_entropy(self.model(self.x), self.targets)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def check(self) -> None:
        """A step; SystemExit unless its loss is finite and every parameter has got a finite gradient."""
        loss = self()
        gradients = [p.grad for p in self.model.parameters()]
        if not math.isfinite(loss.item()) or not all(g is not None and bool(g.isfinite().all()) for g in gradients):
            raise SystemExit(f"{self.who}: a step gives a loss or gradients that are missing or not finite")


def _in_integers(model: nn.Module, case: Case, bits: int) -> nn.Module:
    example = torch.randn(2, 3, case.side, case.side).contiguous(memory_format=torch.channels_last)
    integer_(model, example, w=bits, a=bits, g=bits)
    return fuse(model) if case.fused else model


def main() -> None:
    """Time every case, measure memory, and print the rows."""
    arguments = _arguments()
    if arguments.memory_of is not None:
        print(_rise(arguments.chosen[0], arguments.memory_of, arguments.threads[0]))
        return
    rows: list[Row] = []
    profiles: list[Profile] = []
    for case in arguments.chosen:
        for threads in arguments.threads:
            with step(f"{case.title}, {threads} threads"):
                rows += _measured(case, threads, arguments, profiles)
    _report_memory(rows)
    for profile in profiles:
        profile.report()
    records = [profile.record() for profile in profiles]
    finish(arguments, rows, (), engine_isas=list(runtime.available_isas()), profiles=records)


def _measured(case: Case, threads: int, arguments: argparse.Namespace, profiles: list[Profile]) -> Iterator[Row]:
    torch.set_num_threads(threads)
    everybody = [*(f"ours-{bits}" for bits in case.bits), *PEERS]
    contestants = {who: Contestant(case, who) for who in everybody}
    for contestant in contestants.values():
        contestant.check()
    times = interleave({who: clock(run) for who, run in contestants.items()}, effort(arguments, QUICK, FULL))
    if arguments.profile:
        title = f"{case.title}, {threads} thread{'s' if threads > 1 else ''}"
        for who in everybody[: len(case.bits)]:
            profiles.append(Profile.of(f"{title}, {who}", contestants[who], 2 if arguments.quick else 10))
    del contestants
    quick = arguments.quick
    peaks = {who: _peak(case, who, threads, quick=quick) for who in everybody} if arguments.memory else {}
    for bits in case.bits:
        for peer in PEERS:
            memory = _memory_columns(peaks, f"ours-{bits}", peer)
            yield Row.of(
                Setting(case.title, threads, _engine.chosen_isa(""), str(bits)), times, f"ours-{bits}", peer, **memory
            )


# Memory


def _memory_columns(peaks: Mapping[str, float], ours: str, peer: str) -> dict[str, float]:
    if not peaks:
        return {}
    return {"ours_mb": peaks[ours], "peer_mb": peaks[peer], "memory_ratio": peaks[ours] / peaks[peer]}


def _peak(case: Case, who: str, threads: int, *, quick: bool) -> float:
    """`_rise` in processes of its own."""
    options = {"--cases": case.name, "--batch": case.batch, "--threads": threads, "--memory-of": who}
    return in_own_processes(__file__, options, f"{case.title}, {who}", quick=quick)


def _rise(case: Case, who: str, threads: int) -> float:
    """MB by which the peak resident set of some steps is above the resident set before them."""
    torch.set_num_threads(threads)
    Contestant(replace(case, batch=2), who).check()
    return rise(Contestant(case, who))


def _report_memory(rows: list[Row]) -> None:
    for row in rows:
        if row.extra:
            what = f"{row.case}, {row.threads} thread{'s' if row.threads > 1 else ''}, ours {row.bits} to {row.peer}"
            mb, of, ratio = (row.extra[key] for key in ("ours_mb", "peer_mb", "memory_ratio"))
            print(f"memory: {what:58} {mb:8.1f} MB of {of:8.1f} MB, ratio {ratio:.3f}")


# Where the time of our step goes


@dataclass
class Profile:
    """Seconds and calls over `steps` steps: inside functions of the engine, and of the phases of a step."""

    title: str
    steps: int
    functions: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, title: str, contestant: Contestant, steps: int) -> Profile:
        """Run the steps."""
        made = cls(title, steps)
        with made._watched():
            for _ in range(steps):
                contestant.optimizer.zero_grad(set_to_none=True)
                loss = made._timed("forward and loss", made.phases, contestant.loss)()
                made._timed("backward", made.phases, loss.backward)()
                made._timed("optimizer", made.phases, contestant.optimizer.step)()
        return made

    @staticmethod
    def _timed(name: str, seconds: dict[str, list[float]], function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.setdefault(name, []).append(time.perf_counter() - begun)

        return timed

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Time what the package calls of the engine: its functions, its classes and their methods, by their names."""
        public = [(_engine, name) for name in dir(_engine) if not name.startswith("_") and name != "Graph"]
        owners = [getattr(_engine, name) for _, name in public if isinstance(getattr(_engine, name), type)]
        methods = [(owner, name) for owner in owners for name in dir(owner) if not name.startswith("_")]
        places = [(where, name) for where, name in (*methods, *public) if callable(getattr(where, name))]
        before = [getattr(where, name) for where, name in places]
        try:
            for (where, name), function in zip(places, before, strict=True):
                shown = name if where is _engine else f"{where.__name__}.{name}"
                setattr(where, name, self._timed(shown, self.functions, function))
            yield
        finally:
            for (where, name), function in zip(places, before, strict=True):
                setattr(where, name, function)

    def lines(self) -> Iterator[tuple[str, int, float]]:
        """Name, calls in a step, ms of a step."""
        for name, seconds in sorted(self.functions.items(), key=lambda item: -sum(item[1])):
            yield name, round(len(seconds) / self.steps), sum(seconds) * 1e3 / self.steps
        yield "python and torch", 0, self.whole_ms - sum(sum(s) for s in self.functions.values()) * 1e3 / self.steps

    @property
    def whole_ms(self) -> float:
        """Of a step."""
        return sum(sum(seconds) for seconds in self.phases.values()) * 1e3 / self.steps

    def report(self) -> None:
        """Print the table."""
        print(f"\n{self.title}: mean of {self.steps} steps\n  {'':26}{'calls':>6}{'ms':>10}{'share':>8}")
        for name, calls, ms in self.lines():
            print(f"  {name:26}{calls or '':>6}{ms:10.3f}{ms / self.whole_ms:8.1%}")
        print(f"  {'whole step':26}{'':>6}{self.whole_ms:10.3f}")
        means = (f"{name} {sum(s) * 1e3 / self.steps:.3f} ms" for name, s in self.phases.items())
        print(f"  {', '.join(means)}")

    def record(self) -> dict[str, Any]:
        """For the result file."""
        lines = [{"function": name, "calls": calls, "ms": ms} for name, calls, ms in self.lines()]
        phases = {name: sum(seconds) * 1e3 / self.steps for name, seconds in self.phases.items()}
        return {"case": self.title, "steps": self.steps, "step_ms": self.whole_ms, "phases_ms": phases, "parts": lines}


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--cases", type=names, help=f"default all: {','.join(CASES)}; with --quick resnet20,vit")
    made.add_argument("--batch", type=int, help="default 128, 8 and 64 in this order; with --quick 32, 2 and 8")
    made.add_argument("--bits", type=numbers, help="of ours, default 4, for vit 6,4; with --quick the first of them")
    made.add_argument("--threads", type=numbers, help="default 1,2 as far as there are cores; with --quick 1")
    made.add_argument("--profile", action="store_true", help="also print where the time of our step goes")
    made.add_argument("--keep-freed", action="store_true", help=KEEP_FREED)
    made.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    made.add_argument("--memory-of", metavar="CONTESTANT", help="print its memory alone, in MB; first case and threads")
    arguments = made.parse_args()
    if arguments.keep_freed and not keep_freed_memory():
        made.error("--keep-freed: the C library is not glibc")
    if not runtime.available_isas():
        raise SystemExit("train_step: the engine is not built here")
    if arguments.batch is not None and arguments.batch < 2:
        made.error(f"--batch {arguments.batch}: batch normalization needs at least 2 images")
    arguments.cases = arguments.cases or (("resnet20", "vit") if arguments.quick else tuple(CASES))
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (1, 2)[: usable_cores()])
    for option, known in (("cases", tuple(CASES)), ("bits", tuple(range(2, 9)))):
        for value in getattr(arguments, option) or ():
            if value not in known:
                made.error(f"--{option}: {value} is not among {', '.join(map(str, known))}")
    whos = (*PEERS, *(f"ours-{bits}" for bits in range(2, 9)))
    if arguments.memory_of is not None and arguments.memory_of not in whos:
        made.error(f"--memory-of: {arguments.memory_of} is not among {', '.join(whos)}")
    arguments.chosen = [_chosen(CASES[name], arguments) for name in arguments.cases]
    return arguments


def _chosen(case: Case, arguments: argparse.Namespace) -> Case:
    bits = arguments.bits or (case.bits[:1] if arguments.quick else case.bits)
    return replace(
        case, bits=bits, batch=arguments.batch or (QUICK_BATCHES[case.name] if arguments.quick else case.batch)
    )


if __name__ == "__main__":
    main()
