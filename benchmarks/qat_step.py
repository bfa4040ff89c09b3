"""Time and memory of one step of quantization-aware training, against full precision and other programs.

    python benchmarks/qat_step.py --json benchmarks/results/qat_step.json
    python benchmarks/qat_step.py --cases resnet18 --no-memory
    python benchmarks/qat_step.py --cases resnet20,resnet18 --contestants torch-bf16-full,fused-bf16 --rounds 40

A step clears the gradients, runs forward in training mode with cross entropy, backward, and SGD with momentum, on the
same batch and the same architecture; batches and weights are channels last. `-fp32` computes in float32, `-bf16` under
bfloat16 autocast, with parameters in float32. Ours: `bs` is the model that `quantize_` gives, `fused` what `fuse` makes
of it, on integer kernels. The yardstick is `torch-bf16-full`: the float network under autocast.

The case resnet20-joint is a joint step at 1, 2, 3 and 4 bits (`joint`), and one that trains the narrowest, the widest
and one other (`sandwich`), against float steps.

Memory: each contestant runs a few steps in processes of its own, the median of three counts. `ours_mb`, `peer_mb`: how
far its peak resident set rises above the resident set just before the first step; in 2^20 bytes. With --keep-freed
glibc keeps what a step frees, as in `bitstrata train`. See benchmarks/README.md for how rows are read.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import _qat_peers as peers
import torch
import torch.nn.functional as F
from _common import (
    Effort,
    Row,
    Setting,
    clock,
    effort,
    finish,
    interleave,
    names,
    numbers,
    parser,
    step,
    usable_cores,
)
from _memory import KEEP_FREED, in_own_processes, rise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.nn.layers import QuantizedLayer
from bitstrata.train import keep_freed_memory
from bitstrata_runtime import _engine

QUICK, FULL = Effort(rounds=2, turn_s=0.0), Effort(rounds=7, turn_s=0.0, steady=2)
BITS, JOINT = 4, (1, 2, 3, 4)
FULL_BF16 = "torch-bf16-full"
PEERS = (
    *(FULL_BF16, "hand-lsq-fp32", "hand-lsq-bf16", "brevitas-fp32", "brevitas-bf16"),
    *("torchao", "torchao-bf16"),  # the first in float32
)
OURS = ("fused-bf16", "fused-fp32", "bs-bf16", "bs-fp32")
JOINT_PEERS = (FULL_BF16, "torch-fp32-full")
JOINT_OURS = ("joint-bf16", "joint-fp32", "sandwich-bf16", "sandwich-fp32")
_MAKERS: dict[str, peers.Maker] = {
    "hand": peers.hand_lsq,
    "brevitas": peers.brevitas,
    "torchao": peers.torchao,
}


@dataclass(frozen=True)
class Case:
    """A zoo network on random images (3, side, side), and who takes part. ResNet-20 has projections."""

    name: str
    network: str
    side: int
    batch: int
    ours: tuple[str, ...] = OURS
    peers: tuple[str, ...] = PEERS
    options: tuple[tuple[str, str], ...] = ()

    @property
    def bits(self) -> str:
        """Of ours, as rows name them."""
        return ",".join(map(str, JOINT)) if self.ours[0] in JOINT_OURS else f"w{BITS}a{BITS}"

    def only(self, batch: int, left_out: Mapping[str, str], quick: bool) -> Case:
        """With another batch, and without those that cannot run; with `quick` of ours only bfloat16."""
        families = tuple(left_out)
        ours = [who for who in self.ours if not who.startswith(families) and (who.endswith("bf16") or not quick)]
        return replace(
            self,
            batch=batch,
            ours=tuple(ours),
            peers=tuple(who for who in self.peers if not who.startswith(families)),
        )


CASES = {
    case.name: case
    for case in (
        Case("resnet20", "resnet20", 32, 128, options=(("shortcut", "B"),)),
        Case("resnet18", "resnet18", 224, 8),
        Case("resnet20-joint", "resnet20", 32, 128, JOINT_OURS, JOINT_PEERS),
    )
}
QUICK_BATCHES = {"resnet20": 32, "resnet18": 2, "resnet20-joint": 16}


class Contestant:
    """A network of a case, its batch and its optimizer; calling it runs a step and gives the loss.

    Args:
        who: one of the case's `ours` or `peers`.
        recipe: of ours, at 4 bits; joint contestants have strata.
    """

    def __init__(self, case: Case, who: str, recipe: str = "lsq") -> None:
        torch.manual_seed(0)
        self.who, self.family = who, who.partition("-")[0]
        self.amp = torch.bfloat16 if "bf16" in who else None
        images = torch.randn(case.batch, 3, case.side, case.side)
        self.x = images.contiguous(memory_format=torch.channels_last)
        self.targets = torch.arange(case.batch) % 10
        model = bs.zoo.create(case.network, classes=10, **dict(case.options)).train()
        model = model.to(memory_format=torch.channels_last)
        self.model = self._quantized(model, recipe).to(memory_format=torch.channels_last)
        self._start(self.model)
        if self.family == "fused":
            self.model = bs.fuse(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
        self._levels = itertools.cycle([JOINT] if self.family == "joint" else [(1, 2, 4), (1, 3, 4)])

    def _quantized(self, model: nn.Module, recipe: str) -> nn.Module:
        if self.family == "torch":
            return model
        if self.family in _MAKERS:
            return _MAKERS[self.family](model, self.x, BITS)
        if self.family in ("joint", "sandwich"):
            return bs.quantize_(model, bs.recipes.strata(JOINT), self.x[:2])
        return bs.quantize_(model, RECIPES[recipe], self.x[:2])

    @torch.no_grad()
    def _start(self, model: nn.Module) -> None:
        """Let the steps of activations be set, by two images."""
        if self.family in ("joint", "sandwich"):
            bs.calibrate_(model, [self.x[:2]]).train()
        else:
            self._forward(model, self.x[:2])

    def _forward(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp is not None):
            return model(x)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        if self.family in ("joint", "sandwich"):
            levels = next(self._levels)
            losses = bs.joint_backward(self.model, self.x, self.targets, precisions=levels, amp=self.amp)
            loss = torch.as_tensor(sum(float(one.loss) for one in losses.values()))
        else:
            loss = F.cross_entropy(self._forward(self.model, self.x), self.targets)
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def check(self) -> None:
        """A step; SystemExit unless loss and gradients are finite, all weights have one, and operands few values."""
        loss = self()
        for name, p in self.model.named_parameters():
            if p.dim() > 1 and (p.grad is None or not bool(p.grad.any())):
                raise SystemExit(f"{self.who}: no gradient of {name}")
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                raise SystemExit(f"{self.who}: the gradient of {name} is not finite")
        if not math.isfinite(loss.item()):
            raise SystemExit(f"{self.who}: the loss is not finite")
        if self.family != "torch":
            self._check_values()

    def _check_values(self) -> None:
        """Inner layers multiply at most 2^bits values a channel of the weight, and as many of the input."""
        seen = _Operands()
        if self.family != "fused":
            with torch.no_grad(), seen:
                self._forward(self.model, self.x[:2])
        else:
            layers = [layer for layer in self.model.modules() if isinstance(layer, QuantizedLayer)]
            seen.counts = [(2**BITS, _most_values(layer.quantized_weight().detach())) for layer in layers]
        if len(seen.counts) < 3:
            raise SystemExit(f"{self.who}: the layers' operands could not be seen")
        for i, counts in enumerate(seen.counts[1:-1], 1):
            if max(counts) > 2**BITS:
                raise SystemExit(
                    f"{self.who}: layer {i} of {len(seen.counts)} multiplies {counts} values of input, weight"
                )


class _Operands(TorchDispatchMode):
    """Counts the different values in input and weight (the most of a channel) of each convolution and linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.counts.append((args[0].unique().numel(), _most_values(args[1])))
        elif func is torch.ops.aten.addmm.default:
            self.counts.append((args[1].unique().numel(), _most_values(args[2].t())))
        return func(*args, **(kwargs or {}))


def _most_values(weight: Tensor) -> int:
    return max(channel.unique().numel() for channel in weight)


def recipes() -> dict[str, bs.Recipe]:
    """Name -> recipe of ours with weights and activations of 4 bits."""
    made = bs.recipes
    return {"lsq": made.lsq(BITS), "uniq": made.uniq(BITS), "strata": made.strata((BITS,)), "pact": made.pact(BITS)}


RECIPES = recipes()


class Measured:
    """Times and memory of all contestants of a case."""

    def __init__(self, case: Case, threads: int, arguments: argparse.Namespace) -> None:
        self.case, self.threads, self.arguments = case, threads, arguments
        torch.set_num_threads(threads)
        everybody = (*case.peers, *case.ours)
        contestants = {who: Contestant(case, who, arguments.recipe) for who in everybody}
        for contestant in contestants.values():
            contestant.check()
        self.times = interleave({who: clock(run) for who, run in contestants.items()}, effort(arguments, QUICK, FULL))
        del contestants
        weighed = (FULL_BF16, *case.ours) if arguments.quick else everybody
        self.memory = {who: self._memory_of(who) for who in weighed} if arguments.memory else {}

    def _memory_of(self, who: str) -> float:
        options = {
            "--cases": self.case.name,
            "--batch": self.case.batch,
            "--threads": self.threads,
            "--recipe": self.arguments.recipe,
            "--memory-of": who,
        }
        return in_own_processes(__file__, options, f"{self.case.name}, {who}", quick=self.arguments.quick)

    def rows(self) -> Iterator[Row]:
        """Each of ours against each peer."""
        for ours, peer in itertools.product(self.case.ours, self.case.peers):
            isa = _engine.chosen_isa("") if ours.startswith("fused") else torch.backends.cpu.get_cpu_capability()
            extra: dict[str, Any] = {"mode": ours, "batch": self.case.batch, "recipe": self.recipe}
            if ours in self.memory and peer in self.memory:
                mine, other = self.memory[ours], self.memory[peer]
                extra |= {"ours_mb": mine, "peer_mb": other, "memory_ratio": mine / other}
            yield Row.of(Setting(self.case.name, self.threads, isa, self.case.bits), self.times, ours, peer, **extra)

    @property
    def recipe(self) -> str:
        """Of ours."""
        return "strata" if self.case.ours[0] in JOINT_OURS else self.arguments.recipe

    @cached_property
    def to_full(self) -> dict[str, dict[str, float]]:
        """Contestant -> its time, and memory, over those of `torch-bf16-full`."""
        found: dict[str, dict[str, float]] = {}
        for who, ms in self.times.items():
            found[who] = {"time": ms.median / self.times[FULL_BF16].median}
            if who in self.memory:
                found[who] |= {"memory": self.memory[who] / self.memory[FULL_BF16], "mb": self.memory[who]}
        return found

    def report(self) -> None:
        """Print what a step costs in steps of full precision."""
        print(f"\n{self.case.name}, batch {self.case.batch}, {self.threads} threads: of {FULL_BF16}")
        for who, of in self.to_full.items():
            memory = f"   memory {of['memory']:6.3f} ({of['mb']:.0f} MB)" if "memory" in of else ""
            print(f"  {who:18} time {of['time']:6.3f}{memory}")

    def record(self) -> dict[str, Any]:
        """For the result file."""
        return {"case": self.case.name, "threads": self.threads, "contestants": self.to_full}


def main() -> None:
    """Time every case, measure memory, and print the rows."""
    arguments = _arguments()
    if arguments.memory_of is not None:
        print(_memory(arguments.chosen[0], arguments.memory_of, arguments))
        return
    for family, why in arguments.left_out.items():
        print(f"{family}-* left out: {why}")
    found: list[Measured] = []
    for case in arguments.chosen:
        for threads in arguments.threads:
            with step(f"{case.name} batch {case.batch}, {threads} threads"):
                found.append(Measured(case, threads, arguments))
    for measured in found:
        measured.report()
    finish(
        arguments,
        [row for measured in found for row in measured.rows()],
        ("brevitas", "torchao"),
        engine_isas=list(runtime.available_isas()),
        missing_peers=[f"{family}: {why}" for family, why in arguments.left_out.items()],
        to_full=[measured.record() for measured in found],
    )


def _memory(case: Case, who: str, arguments: argparse.Namespace) -> float:
    """MB by which the peak resident set of some steps is above the resident set before them."""
    torch.set_num_threads(arguments.threads[0])
    Contestant(replace(case, batch=2), who, arguments.recipe).check()
    return rise(Contestant(case, who, arguments.recipe))


def _fused_refusal() -> str | None:
    """Why `fuse` does not take a model of quantization-aware training; None if it does."""
    x = torch.randn(2, 3, 8, 8)
    model = bs.zoo.create("resnet20", shortcut="B").train()
    bs.quantize_(model, RECIPES["lsq"], x)
    model(x)
    try:
        bs.fuse(model)
    except bs.FuseError as error:
        return str(error)
    return None


def _left_out() -> dict[str, str]:
    """Family of contestants -> why it does not take part."""
    found = peers.missing()
    refusal = _fused_refusal()
    return found if refusal is None else {**found, "fused": refusal}


def _among(made: argparse.ArgumentParser, case: Case, wanted: tuple[str, ...]) -> Case:
    """The case with nobody else."""
    unknown = [who for who in wanted if who not in (*case.peers, *case.ours)]
    if unknown:
        made.error(f"--contestants: {unknown[0]} is not among {', '.join((*case.peers, *case.ours))} of {case.name}")
    ours, others = (tuple(who for who in those if who in wanted) for those in (case.ours, case.peers))
    if not ours or FULL_BF16 not in others:
        made.error(f"--contestants: {FULL_BF16} and one of {', '.join(case.ours)} must be among them")
    return replace(case, ours=ours, peers=others)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--cases", type=names, help=f"default all: {','.join(CASES)}; with --quick resnet20")
    made.add_argument("--batch", type=int, help="default 128, 8 and 128 in this order; with --quick 32, 2 and 16")
    made.add_argument("--threads", type=numbers, help="default 2 as far as there are cores; with --quick 1")
    made.add_argument("--contestants", type=names, help="only these, which then follow each other closely")
    made.add_argument("--recipe", choices=tuple(RECIPES), default="lsq", help="of ours; the peers' quantizer is lsq")
    made.add_argument("--keep-freed", action="store_true", help=KEEP_FREED)
    made.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    made.add_argument("--memory-of", metavar="CONTESTANT", help="print its memory alone, in MB; first case and threads")
    arguments = made.parse_args()
    if arguments.keep_freed and not keep_freed_memory():
        made.error("--keep-freed: the C library is not glibc")
    if not runtime.available_isas():
        raise SystemExit("qat_step: the engine is not built here")
    if arguments.batch is not None and arguments.batch < 2:
        made.error(f"--batch {arguments.batch}: batch normalization needs at least 2 images")
    arguments.cases = arguments.cases or (("resnet20",) if arguments.quick else tuple(CASES))
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (min(2, usable_cores()),))
    for name in arguments.cases:
        if name not in CASES:
            made.error(f"--cases: {name} is not among {', '.join(CASES)}")
    peers.quiet()
    arguments.left_out = {} if arguments.memory_of else _left_out()
    batches = {name: QUICK_BATCHES[name] if arguments.quick else CASES[name].batch for name in arguments.cases}
    arguments.chosen = [
        CASES[name].only(arguments.batch or batches[name], arguments.left_out, arguments.quick)
        for name in arguments.cases
    ]
    if arguments.contestants:
        arguments.chosen = [_among(made, case, arguments.contestants) for case in arguments.chosen]
    first = arguments.chosen[0]
    if arguments.memory_of is not None and arguments.memory_of not in (*first.ours, *first.peers):
        made.error(f"--memory-of: {arguments.memory_of} is not among {', '.join((*first.ours, *first.peers))}")
    return arguments


if __name__ == "__main__":
    main()
