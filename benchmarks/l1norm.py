"""Time of the quantized L1 normalizations, of batches and of layers, forward and backward, against torch's.

    python benchmarks/l1norm.py --json benchmarks/results/l1norm.json

Three forms of every shape of a batch normalization, all in training mode, channels last, running statistics updated,
with the gradients of the input, weight and bias:

SHAPE: `QuantizedL1BatchNorm2d` as `integer_` makes it, from a float32 tensor to a float32 tensor and back, eight bits
    inside, gradients rounded stochastically. Torch: `BatchNorm2d` of float32, or of bfloat16 with float32 parameters.
SHAPE-l2: the same with l2=True, which divides by the standard deviation as torch does.
SHAPE-fused: what a fused step computes between two convolutions. Ours, forward: from the first product's int32 sums,
    their scales and their bounds in each channel, which that product gives as it ends, to the 8-bit codes that are
    kept, and to the second product's codes of max(0, result). Backward: those codes once more (the weight's gradient
    needs them, and they are not kept), then from the int32 sums of the second product's input gradient, with their
    range where the rectifier passes them, which that product gives as it ends, to the first product's gradient codes.
    Torch: batch normalization and an in-place ReLU from float to float; it makes no codes for what comes next, and its
    convolutions would need none. `bits` is the width of the codes for the products.

Two forms of every shape of a layer normalization, whose names end in -ln and -ln-l2: `QuantizedL1LayerNorm` over the
last dimension, from float32 to float32 and back, rounded as above, against torch's `LayerNorm` of float32, or of
bfloat16 with float32 parameters.

NETWORK, NETWORK-l2, NETWORK-fused, where all shapes of a network were timed: the sums of their times, each counted as
often as the network has normalizations of that shape.

Where the C library is glibc it keeps freed memory, for torch as for us: times of the largest shapes would vary by
three. See benchmarks/README.md for how rows are read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import (
    Effort,
    Row,
    Setting,
    Times,
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
from numpy.typing import NDArray
from torch import Tensor, nn

import bitstrata_runtime as runtime
from bitstrata.functional.l1norm import quantized_norm
from bitstrata.fused.values import Format
from bitstrata.integer import shift_quantize
from bitstrata.integer.engine_codes import array
from bitstrata.integer.engine_norm import NormRule, batch_norm
from bitstrata.integer.pool import Pool
from bitstrata.integer.rounding import CounterGenerator, CounterRounding
from bitstrata.nn import QuantizedL1BatchNorm2d, QuantizedL1LayerNorm
from bitstrata.train import keep_freed_memory

QUICK, FULL = Effort(rounds=3, turn_s=0.02), Effort(rounds=9, turn_s=0.1)
DTYPES = {"torch-fp32": torch.float32, "torch-bf16": torch.bfloat16}
FORMS = ("l1", "l2", "fused")
GROUPS = 4
Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A tensor (batch, channels, size, size), and how many of them the network normalizes in one step."""

    network: str
    batch: int
    channels: int
    size: int
    count: int

    @property
    def name(self) -> str:
        """As rows name it."""
        return f"{self.network}-{self.channels}x{self.size}x{self.size}"

    @property
    def rows(self) -> tuple[int, int]:
        """Positions, channels."""
        return self.batch * self.size * self.size, self.channels


@dataclass(frozen=True)
class LayerCase:
    """A tensor (batch, tokens, width), normalized over its width."""

    name: str
    batch: int
    tokens: int
    width: int

    def random(self, seed: int) -> Tensor:
        """Gaussian, float32, tokens of different size."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.tokens, self.width)
        return torch.randn(shape, generator=generator) * (torch.rand((*shape[:2], 1), generator=generator) + 0.5)


CASES: dict[str, Case | LayerCase] = {
    case.name: case
    for case in (
        Case("resnet18", 8, 64, 112, 1),
        Case("resnet18", 8, 64, 56, 4),
        Case("resnet18", 8, 128, 28, 5),
        Case("resnet18", 8, 256, 14, 5),
        Case("resnet18", 8, 512, 7, 5),
        Case("resnet20", 128, 16, 32, 7),
        Case("resnet20", 128, 32, 16, 7),
        Case("resnet20", 128, 64, 8, 7),
        LayerCase("vit-64x65x192-ln", 64, 65, 192),
        LayerCase("vit-8x197x768-ln", 8, 197, 768),
        LayerCase("text-32x128x512-ln", 32, 128, 512),
    )
}


@dataclass(frozen=True)
class Sums:
    """A product's accumulators, int32 (rows, channels), their channels' scales, and bounds in each channel."""

    acc: Tensor
    scale: Tensor
    least: Tensor
    most: Tensor

    @classmethod
    def random(cls, rows: tuple[int, int], seed: int) -> Sums:
        """Gaussian sums; the channels' scales range over a factor of 32."""
        generator = torch.Generator().manual_seed(seed)
        acc = (torch.randn(rows, generator=generator) * 500).to(torch.int32)
        scale = torch.exp2(-5 * torch.rand(rows[1], generator=generator)) / 500
        return cls(acc, scale, acc.amin(0), acc.amax(0))

    def real(self, case: Case) -> Tensor:
        """The tensor they stand for, float32 (batch, channels, size, size), channels last in memory."""
        nhwc = (self.acc.float() * self.scale).view(case.batch, case.size, case.size, case.channels)
        return nhwc.permute(0, 3, 1, 2)


def main() -> None:
    """Time every case and print the rows."""
    arguments = _arguments()
    keep_freed_memory()
    rows: list[Row] = []
    for name in arguments.cases:
        case = CASES[name]
        _verify(case, arguments.bits) if isinstance(case, Case) else _verify_layer(case)
        for threads in arguments.threads:
            with step(f"{name}, {threads} threads"):
                torch.set_num_threads(threads)
                measured = _measured if isinstance(case, Case) else _measured_layer
                rows += measured(case, threads, arguments)
    rows += _totals(rows)
    finish(arguments, rows, (), engine_isas=list(runtime.available_isas()), groups=GROUPS)


def _totals(rows: Sequence[Row]) -> list[Row]:
    """The rows of whole networks, of which every shape is among `rows`."""
    totals = []
    for network in dict.fromkeys(case.network for case in CASES.values() if isinstance(case, Case)):
        counts = {
            case.name: case.count for case in CASES.values() if isinstance(case, Case) and case.network == network
        }
        groups: dict[tuple[Any, ...], list[tuple[int, Row]]] = {}
        for row in rows:
            shape = next((name for name in counts if row.case in {name, f"{name}-l2", f"{name}-fused"}), None)
            if shape is not None:
                key = row.case.removeprefix(shape), row.threads, row.isa, row.bits, row.peer
                groups.setdefault(key, []).append((counts[shape], row))
        for (form, threads, isa, bits, peer), members in groups.items():
            if len(members) == len(counts):
                times = {who: _total(members, who) for who in ("ours", "peer")}
                row = Row.of(Setting(f"{network}{form}", threads, isa, bits), times, "ours", "peer")
                totals.append(replace(row, peer=peer))
    return totals


def _total(members: Sequence[tuple[int, Row]], who: str) -> Times:
    columns = (f"{who}_ms", f"{who}_ms_min", f"{who}_ms_max")
    return Times(*(sum(count * getattr(row, column) for count, row in members) for column in columns))


def _measured(case: Case, threads: int, arguments: argparse.Namespace) -> Iterator[Row]:
    x, gradient = Sums.random(case.rows, 0), Sums.random(case.rows, 1)
    for form in arguments.forms:
        fused = form == "fused"
        title = case.name if form == "l1" else f"{case.name}-{form}"
        ours: dict[tuple[str, int], Work] = {}
        for isa in arguments.isas:
            for bits in arguments.bits if fused else (8,):
                run = _fused(x, gradient, bits) if fused else _module(case, x, gradient, l2=form == "l2")
                ours[isa, bits] = _on(isa, run)
        peers = {name: _torch(case, x, gradient, dtype, rectify=fused) for name, dtype in DTYPES.items()}
        yield from _compared(title, threads, ours, peers, arguments)


def _measured_layer(case: LayerCase, threads: int, arguments: argparse.Namespace) -> Iterator[Row]:
    x, gradient = case.random(0), case.random(1)
    for form in arguments.forms:
        if form == "fused":
            continue
        norm = _layer_norm(case.width, l2=form == "l2")
        run = _there_and_back(norm, x, gradient, rectify=False)
        ours = {(isa, 8): _on(isa, run) for isa in arguments.isas}
        peers = {
            name: _there_and_back(nn.LayerNorm(case.width), x.to(dtype), gradient.to(dtype), rectify=False)
            for name, dtype in DTYPES.items()
        }
        yield from _compared(case.name if form == "l1" else f"{case.name}-{form}", threads, ours, peers, arguments)


def _compared(
    title: str,
    threads: int,
    ours: Mapping[tuple[str, int], Work],
    peers: Mapping[str, Work],
    arguments: argparse.Namespace,
) -> Iterator[Row]:
    contestants = {f"{isa} {bits}": clock(run) for (isa, bits), run in ours.items()}
    contestants |= {name: clock(run) for name, run in peers.items()}
    times = interleave(contestants, effort(arguments, QUICK, FULL))
    for isa, bits in ours:
        for peer in peers:
            yield Row.of(Setting(title, threads, isa, str(bits)), times, f"{isa} {bits}", peer)


def _on(isa: str, run: Work) -> Work:
    """`run` with the kernels of an instruction set."""

    def wrapped() -> Any:
        os.environ["BITSTRATA_ISA"] = isa
        return run()

    return wrapped


def _norm(channels: int, *, l2: bool) -> QuantizedL1BatchNorm2d:
    """As `integer_` makes it, with a generator of its own."""
    rounding = CounterRounding(CounterGenerator(0))
    return QuantizedL1BatchNorm2d(channels, l1_scale="1" if l2 else "sqrt(pi/2)", l2=l2, rounding=rounding)


def _layer_norm(width: int, *, l2: bool) -> QuantizedL1LayerNorm:
    """With a generator of its own for the gradient's rounding."""
    rounding = CounterRounding(CounterGenerator(0))
    return QuantizedL1LayerNorm(width, l1_scale="1" if l2 else "sqrt(pi/2)", l2=l2, rounding=rounding)


def _there_and_back(norm: nn.Module, x: Tensor, gradient: Tensor, *, rectify: bool) -> Work:
    """Forward, and the gradients of x, weight and bias."""
    leaf = x.clone().requires_grad_()
    wanted = (leaf, *norm.parameters())

    def run() -> tuple[Tensor, ...]:
        y = norm(leaf)
        if rectify:
            y = F.relu(y, inplace=True)
        return (y, *torch.autograd.grad(y, wanted, gradient))

    return run


def _module(case: Case, x: Sums, gradient: Sums, *, l2: bool) -> Work:
    return _there_and_back(_norm(case.channels, l2=l2), x.real(case), gradient.real(case), rectify=False)


def _torch(case: Case, x: Sums, gradient: Sums, dtype: torch.dtype, *, rectify: bool) -> Work:
    real, back = (sums.real(case).to(dtype) for sums in (x, gradient))
    return _there_and_back(nn.BatchNorm2d(case.channels), real, back, rectify=rectify)


def _fused(x: Sums, gradient: Sums, bits: int) -> Work:
    """Normalization, rectifier and the codes of the products on both sides, as a fused step computes them."""
    module = _norm(x.acc.shape[1], l2=False)
    form, noise = Format(bits, GROUPS), CounterGenerator(1)
    rows, channels = shape = x.acc.shape[0], x.acc.shape[1]
    pool = Pool()  # all of these are in its memory in a step
    sums, arriving = pool.take(shape, np.int32), pool.take(shape, np.int32)
    sums[:], arriving[:] = array(x.acc), array(gradient.acc)
    kept, back = pool.take(shape, np.int8), pool.take(shape, np.int8)
    out, again, gradient_out = (pool.take(shape, np.uint8) for _ in range(3))

    def codes(norm: Any, to: NDArray[np.uint8]) -> Any:
        return norm.to_codes(kept, True, form.bits, form.groups, True, form.absorbed, 1.0, None, to)

    parts = (sums, array(x.scale), array(x.least), array(x.most), kept)
    running = array(module.running_mean), array(module.running_deviation)

    def forward() -> tuple[NormRule, Any, bool]:
        rule = module.engine_rule()
        assert rule is not None
        norm = rule.start(rows, channels, module.weight, module.bias)
        return rule, norm, norm.forward(*parts)

    def passed() -> float:
        """The gradient's largest magnitude where the rectifier passes it."""
        _, norm, _ = forward()
        result = np.empty(shape, np.float32)
        norm.to_f32(kept, True, None, result, None)
        return float((np.abs(arriving.astype(np.float32) * array(gradient.scale)) * (result > 0)).max())

    largest = passed()

    def run() -> tuple[Any, ...]:
        rule, norm, finite = forward()
        norm.track(*running, module.momentum)
        grid = codes(norm, out)
        codes(norm, again)
        incoming = (arriving, array(gradient.scale), largest, kept, True, rule.noise(), back)
        finite = norm.backward(*incoming) and finite
        affine = norm.weight_gradient, norm.bias_gradient
        asked = (form.bits, form.groups, form.absorbed, noise.take())
        gradient_grid = norm.gradient_codes(back, kept, *asked, gradient_out)
        if not finite:
            raise SystemExit("fused normalization: not finite")
        return torch.from_numpy(out), grid, torch.from_numpy(gradient_out), gradient_grid, affine

    return run


def _verify(case: Case, widths: tuple[int, ...]) -> None:
    """SystemExit unless both of our forms give what the definitions do, on two samples of the case."""
    few = replace(case, batch=2)
    x, gradient = Sums.random(few.rows, 0), Sums.random(few.rows, 1)
    real = x.real(few)
    for l2 in (False, True):
        norm = _norm(case.channels, l2=l2)
        rule = norm.engine_rule()
        assert rule is not None
        options = {"bits": 8, "eps": rule.eps, "l1_scale": norm.l1_scale, "l2": l2}
        shaped = (t.detach().view(1, -1, 1, 1) for t in (norm.weight, norm.bias))
        expected = quantized_norm(real, *shaped, (0, 2, 3), rounding=norm.rounding, **options)[0]
        if not torch.equal(norm(real), expected):
            raise SystemExit(f"{case.name}: the normalization (l2={l2}) differs from its definition")
    for bits in widths:
        out, grid, gradient_out, gradient_grid, _ = _fused(x, gradient, bits)()
        codes, back = _by_parts(few, real, gradient.real(few), bits)
        for name, found, (unit, exponents), wanted in (
            ("result", out, grid, codes),
            ("gradient", gradient_out, gradient_grid, back),
        ):
            if not torch.equal(_values(found, unit, exponents, bits), wanted):
                raise SystemExit(f"{case.name}, {bits} bits: the fused {name} differs from that of its parts")


def _verify_layer(case: LayerCase) -> None:
    """SystemExit unless both of our forms give what the definition does, result and gradients."""
    few = replace(case, batch=2)
    rows, gradient = (few.random(seed).view(-1, case.width) for seed in range(2))
    for l2 in (False, True):
        norm = _layer_norm(case.width, l2=l2)
        found = _there_and_back(norm, rows, gradient, rectify=False)()
        leaf, *affine = (t.detach().clone().requires_grad_() for t in (rows, norm.weight[None], norm.bias[None]))
        rounding = CounterRounding(CounterGenerator(0))
        y, _, _ = quantized_norm(leaf, *affine, (1,), l1_scale=norm.l1_scale, l2=l2, rounding=rounding)
        expected = (y, *torch.autograd.grad(y, (leaf, *affine), gradient))
        if not all(torch.equal(a, b.view(a.shape)) for a, b in zip(found, expected, strict=True)):
            raise SystemExit(f"{case.name}: the normalization (l2={l2}) differs from its definition")


def _by_parts(case: Case, x: Tensor, gradient: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantized result and gradient of normalization and rectifier, each computed apart: float64 (rows, channels)."""
    leaf, norm = x.clone().requires_grad_(), _norm(case.channels, l2=False)
    rule = norm.engine_rule()
    assert isinstance(rule, NormRule)
    y = F.relu(batch_norm(leaf, norm.weight, norm.bias, rule)[0])
    (back,) = torch.autograd.grad(y, leaf, gradient)
    quantized = (
        shift_quantize(y.detach(), bits, GROUPS, 1),
        shift_quantize(back, bits, GROUPS, 1, rounding="stochastic", generator=CounterGenerator(1)),
    )
    values = []
    for q in quantized:
        scale = q.scale.double() * torch.exp2(-q.exponents.double())
        values.append(q.codes.movedim(1, -1).reshape(case.rows).double() * scale)
    return values[0], values[1]


def _values(stored: Tensor, scale: float, exponents: Any, bits: int) -> Tensor:
    """What stored codes stand for: float64 (rows, channels)."""
    shifts = -torch.from_numpy(exponents).double()
    if Format(bits, GROUPS).absorbed:
        shifts = torch.full_like(shifts, float(1 - GROUPS))
    return stored.view(torch.int8).double() * (scale * torch.exp2(shifts))


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--cases", type=names, help=f"default all: {','.join(CASES)}; with --quick four of them")
    made.add_argument("--forms", type=names, default=FORMS, help="default all: l1,l2,fused (not of layers)")
    made.add_argument("--threads", type=numbers, help="default 1,2 as far as there are cores; with --quick 1")
    made.add_argument("--bits", type=numbers, default=(4,), help="of the products' codes in the fused form, default 4")
    made.add_argument("--isas", type=names, help="of the engine, default the fastest")
    arguments = made.parse_args()
    available = runtime.available_isas()
    if not available:
        raise SystemExit("l1norm: the engine is not built here")
    quick = ("resnet18-64x56x56", "resnet18-512x7x7", "resnet20-16x32x32", "vit-64x65x192-ln")
    arguments.cases = arguments.cases or (quick if arguments.quick else tuple(CASES))
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (1, 2)[: usable_cores()])
    arguments.isas = arguments.isas or available[-1:]
    known = {"cases": tuple(CASES), "forms": FORMS, "bits": tuple(range(2, 9)), "isas": available}
    for option, choices in known.items():
        for value in getattr(arguments, option):
            if value not in choices:
                made.error(f"--{option}: {value} is not among {', '.join(map(str, choices))}")
    return arguments


if __name__ == "__main__":
    main()
