"""Time of ShiftQuant's integer product, quantization of its operands included, against float and integer peers.

    python benchmarks/shiftmm.py --json benchmarks/results/shiftmm.json

Ours is what the forward pass of a layer does: codes of the activation, four groups of channels, and of the weight, then
the product to float32, by the public functions. See benchmarks/README.md for what the peers are and how rows are read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from _common import (
    Clocked,
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
from torch import Tensor

import bitstrata_runtime as runtime
from bitstrata.integer import (
    Geometry,
    ShiftQuantized,
    WeightCodes,
    conv_forward,
    group_order,
    hadamard_quantize,
    linear_forward,
    shift_quantize,
    weight_codes,
)

QUICK, FULL, SLOW = Effort(rounds=3, turn_s=0.03), Effort(rounds=7, turn_s=0.1), Effort(rounds=2, turn_s=0.0)
GROUPS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Contestants = dict[str, Clocked]


@dataclass(frozen=True)
class Case:
    """X of shape (rows, in) times the transpose of W (out, in), or with a kernel a convolution of (batch, in, size,
    size). coded: operands are quantized before the clock starts.
    """

    name: str
    batch: int
    ins: int
    outs: int
    size: int = 1
    kernel: int = 0
    stride: int = 1
    coded: bool = False

    @property
    def geometry(self) -> Geometry:
        """Of a convolution; "same" padding."""
        return Geometry(self.stride, self.kernel // 2)

    def operands(self) -> tuple[Tensor, Tensor]:
        """float32 X, channels last in memory, whose channels have ranges over a factor of 32; and W."""
        generator = torch.Generator().manual_seed(0)
        ranges = torch.exp2(-5 * torch.rand(self.ins, generator=generator))
        if not self.kernel:
            x = torch.randn(self.batch, self.ins, generator=generator) * ranges
            return x, torch.randn(self.outs, self.ins, generator=generator) / self.ins**0.5
        x = torch.randn(self.batch, self.ins, self.size, self.size, generator=generator) * ranges[:, None, None]
        shape = self.outs, self.ins, self.kernel, self.kernel
        weight = torch.randn(*shape, generator=generator) / (self.ins * self.kernel**2) ** 0.5
        return (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))  # type: ignore[return-value]


CASES = {
    case.name: case
    for case in (
        Case("gemm1024", 1024, 1024, 1024),
        Case("gemm1024-kernel", 1024, 1024, 1024, coded=True),
        Case("vit-768x768", 1576, 768, 768),
        Case("vit-768x3072", 1576, 768, 3072),
        Case("vit-3072x768", 1576, 3072, 768),
        Case("resnet20-3x3-16", 128, 16, 16, 32, 3),
        Case("resnet20-3x3-16-32-s2", 128, 16, 32, 32, 3, 2),
        Case("resnet20-3x3-32", 128, 32, 32, 16, 3),
        Case("resnet20-3x3-64", 128, 64, 64, 8, 3),
        Case("resnet18-7x7-3-64-s2", 8, 3, 64, 224, 7, 2),
        Case("resnet18-3x3-64", 8, 64, 64, 56, 3),
        Case("resnet18-3x3-64-128-s2", 8, 64, 128, 56, 3, 2),
        Case("resnet18-3x3-128", 8, 128, 128, 28, 3),
        Case("resnet18-3x3-256", 8, 256, 256, 14, 3),
        Case("resnet18-3x3-512", 8, 512, 512, 7, 3),
    )
}


def main() -> None:
    """Time every case and print the rows."""
    arguments = _arguments()
    rows: list[Row] = []
    for name in arguments.cases:
        for threads in arguments.threads:
            with step(f"{name}, {threads} threads"):
                rows += _measured(CASES[name], threads, arguments)
    finish(arguments, rows, (), engine_isas=list(runtime.available_isas()), groups=GROUPS)


def _measured(case: Case, threads: int, arguments: argparse.Namespace) -> Iterator[Row]:
    x, weight = case.operands()
    torch.set_num_threads(threads)
    dtypes = ("fp32",) if case.coded or arguments.quick else tuple(DTYPES)
    ours: dict[tuple[str, str, int], str] = {}
    contestants: Contestants = {}
    for isa in arguments.isas:
        for bits in arguments.bits:
            for dtype in dtypes:
                ours[isa, dtype, bits] = f"ours {isa} {dtype} {bits}"
                run = _coded(case, x, weight, bits) if case.coded else _product(case, x.to(DTYPES[dtype]), weight, bits)
                contestants[f"ours {isa} {dtype} {bits}"] = clock(_on(isa, run))
    shared, by_bits, slow = _peers(case, x, weight, arguments)
    contestants |= {name: clock(_on(arguments.isas[-1], run)) for name, run in (shared | by_bits).items()}
    times = interleave(contestants, effort(arguments, QUICK, FULL))
    times |= interleave({name: clock(run) for name, run in slow.items()}, SLOW)
    for (isa, dtype, bits), name in ours.items():
        title = case.name if case.coded or len(dtypes) == 1 else f"{case.name} {dtype} rows"
        yield from _rows(Setting(title, threads, isa, str(bits)), times, name, (*shared, *by_bits, *slow))


def _rows(setting: Setting, times: Mapping[str, Times], ours: str, peers: tuple[str, ...]) -> Iterator[Row]:
    for peer in peers:
        name, _, bits = peer.partition(" at ")
        if bits in ("", setting.bits):
            row = Row.of(setting, times, ours, peer)
            yield replace(row, peer=name)


def _on(isa: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with the kernels of an instruction set."""

    def wrapped() -> object:
        os.environ["BITSTRATA_ISA"] = isa
        return run()

    return wrapped


def _multiply(case: Case, x: ShiftQuantized, w: WeightCodes) -> Tensor:
    if case.kernel:
        return conv_forward(x, w, case.geometry, form="engine")
    return linear_forward(x, w, form="engine")


def _product(case: Case, x: Tensor, weight: Tensor, bits: int, groups: int = GROUPS) -> Callable[[], Tensor]:
    """Quantization of both operands and the product, after a check of the integers."""

    def run() -> Tensor:
        return _multiply(case, shift_quantize(x, bits, groups, 1), weight_codes(weight, bits))

    few = replace(case, batch=2)
    xq, w = shift_quantize(x[:2], bits, groups, 1), weight_codes(weight, bits)
    exact = conv_forward(xq, w, case.geometry, form="float64") if case.kernel else linear_forward(xq, w, form="float64")
    if not torch.equal(_multiply(few, xq, w), exact):
        raise SystemExit(f"{case.name}, {bits} bits: the product differs from the reference")
    return run


def _coded(case: Case, x: Tensor, weight: Tensor, bits: int, groups: int = GROUPS) -> Callable[[], Tensor]:
    """The product alone."""
    xq, w = shift_quantize(x, bits, groups, 1), weight_codes(weight, bits)
    return lambda: _multiply(case, xq, w)


def _peers(
    case: Case, x: Tensor, weight: Tensor, arguments: argparse.Namespace
) -> tuple[dict[str, Callable[[], object]], ...]:
    """Peers of every width, peers at one width ("name at bits"), and slow ones, which are timed apart."""
    shared: dict[str, Callable[[], object]] = {}
    slow: dict[str, Callable[[], object]] = {}
    by_bits: dict[str, Callable[[], object]] = {}
    if not case.coded:
        shared["torch-fp32"] = _float(case, x, weight, torch.float32)
        shared["torch-bf16"] = _float(case, x, weight, torch.bfloat16)
        slow["torch-fp16"] = _float(case, x, weight, torch.float16)
    if not case.kernel:
        left, right = shift_quantize(x, 8, 1, 1).codes, weight_codes(weight, 8).codes
        shared["torch-int8"] = lambda: torch._int_mm(left, right.T)
    for bits in arguments.bits:
        plain = _coded if case.coded else _product
        by_bits[f"plain-int8 at {bits}"] = plain(case, x, weight, bits, 1)
        if not case.kernel:
            by_bits[f"grouped-gemm at {bits}"] = _grouped(x, weight, bits, coded=case.coded)
        if not case.kernel and not case.coded:
            by_bits[f"hadamard at {bits}"] = _hadamard(case, x, weight, bits)
    return shared, by_bits, slow


def _float(case: Case, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """torch's own product of operands that are in its data type already."""
    x, weight = x.to(dtype), weight.to(dtype)
    if not case.kernel:
        return lambda: F.linear(x, weight)
    return lambda: F.conv2d(x, weight, stride=case.stride, padding=case.kernel // 2)


def _grouped(x: Tensor, weight: Tensor, bits: int, *, coded: bool) -> Callable[[], Tensor]:
    """One plain product for each group of channels, by torch's int8 kernels; shifted, added, scaled in float32."""

    def multiply(xq: ShiftQuantized, w: WeightCodes) -> Tensor:
        order, counts = group_order(xq.exponents, xq.groups)
        codes, rows = xq.codes[:, order], w.codes[:, order].T.contiguous()
        acc: Any = 0
        begin = 0
        for e, count in enumerate(counts):
            if count:
                part = slice(begin, begin + count)
                acc = acc + (torch._int_mm(codes[:, part].contiguous(), rows[part]) << (xq.groups - 1 - e))
            begin += count
        out: Tensor = acc.to(torch.float32) * (xq.scale * 2.0 ** (1 - xq.groups) * w.scale)
        return out

    fixed = shift_quantize(x, bits, GROUPS, 1), weight_codes(weight, bits)
    if coded:
        return lambda: multiply(*fixed)
    return lambda: multiply(shift_quantize(x, bits, GROUPS, 1), weight_codes(weight, bits))


def _hadamard(case: Case, x: Tensor, weight: Tensor, bits: int) -> Callable[[], Tensor]:
    """A block Hadamard transform of both operands, one scale each, and our plain product."""

    def run() -> Tensor:
        a, b = hadamard_quantize(x, bits), hadamard_quantize(weight, bits)
        one = torch.zeros(x.shape[1], dtype=torch.uint8)
        xq = ShiftQuantized(a.coded.codes, one, a.coded.scale.reshape(()), bits, 1, 1)
        w = WeightCodes(b.coded.codes, b.coded.scale.reshape(()).expand(len(weight)).contiguous(), bits, "out")
        return _multiply(case, xq, w)

    return run


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--cases", type=names, help=f"default all: {','.join(CASES)}; with --quick four of them")
    made.add_argument("--threads", type=numbers, help="default 1,2 as far as there are cores; with --quick 1")
    made.add_argument("--bits", type=numbers, default=(4, 6), help="of activations and weights, default 4,6")
    made.add_argument("--isas", type=names, help="of the engine, default the fastest")
    arguments = made.parse_args()
    available = runtime.available_isas()
    if not available:
        raise SystemExit("shiftmm: the engine is not built here")
    quick = ("gemm1024", "gemm1024-kernel", "resnet20-3x3-16", "resnet18-3x3-128")
    arguments.cases = arguments.cases or (quick if arguments.quick else tuple(CASES))
    arguments.threads = arguments.threads or ((1,) if arguments.quick else (1, 2)[: usable_cores()])
    arguments.isas = arguments.isas or available[-1:]
    for option, known in (("cases", tuple(CASES)), ("bits", tuple(range(2, 9))), ("isas", available)):
        for value in getattr(arguments, option):
            if value not in known:
                made.error(f"--{option}: {value} is not among {', '.join(map(str, known))}")
    return arguments


if __name__ == "__main__":
    main()
