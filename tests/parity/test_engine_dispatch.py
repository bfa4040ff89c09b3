"""Which kernels run, on how many threads, in which memory: none of it changes the integers."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from bitstrata_runtime import plan as p
from bitstrata_runtime.engine import EngineExecutor, Resources, available_isas, emulated_isas, kernel_table
from bitstrata_runtime.reference import ReferenceExecutor

C = 12
ISAS = (*available_isas(), *emulated_isas())


def conv(name: str, x: int, y: int, rng: np.random.Generator, **kw: int) -> p.Conv:
    channels, out, groups, bits = kw.get("channels", C), kw.get("out", C), kw.get("groups", 1), kw.get("bits", 2)
    k, stride = kw.get("kernel", 3), kw.get("stride", 1)
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (out, channels // groups, k, k)).astype(np.int8)
    pad_code = np.zeros(channels, np.int32)
    sizes = ((stride, stride), (k // 2,) * 4, (1, 1), groups)
    return p.Conv(name, (x,), y, name, codes, 2, 1, *sizes, pad_code)


def requant(name: str, x: int, y: int, shift: int, hi: int, *, channels: int = C) -> p.Requant:
    constants = (np.full(channels, 3, np.int32), np.full(channels, 1 << shift, np.int64))
    lo = 0 if hi < 2**31 - 1 else -(2**31) + 1
    return p.Requant(name, (x,), y, *constants, np.full(channels, shift, np.uint8), lo, hi)


def residual_plan() -> p.Plan:
    """Every operation, values that live long and short, and all three of the AVX2 convolutions."""
    rng = np.random.default_rng(0)
    wide, top = (-(2**31), 2**31 - 1), 2**31 - 1

    def acc(name: str, h: int, w: int, c: int = C) -> p.Value:
        return p.Value(name, (h, w, c), "i32", *wide)

    def codes(name: str, h: int, w: int, hi: int) -> p.Value:
        return p.Value(name, (h, w, C), "u8", 0, hi)

    values = (
        p.Value("x", (9, 8, 3), "u8", 0, 255),
        acc("stem", 9, 8),
        acc("residual", 9, 8),
        codes("a", 9, 8, 3),
        acc("conv", 9, 8),
        codes("b", 9, 8, 3),
        acc("depthwise", 9, 8),
        acc("fixed", 9, 8),
        acc("sum", 9, 8),
        acc("clipped", 9, 8),
        acc("half", 5, 4),
        acc("more", 5, 4, 24),
        acc("largest", 3, 2, 24),
        acc("pooled", 1, 1, 24),
        acc("flat", 1, 1, 24),
        p.Value("c", (1, 1, 24), "u8", 0, 15),
        acc("linear", 1, 1, 10),
        acc("logits", 1, 1, 10),
    )
    ops = (
        conv("stem", 0, 1, rng, channels=3, bits=8),
        requant("residual", 1, 2, 4, top),
        requant("a", 2, 3, 12, 3),
        conv("conv", 3, 4, rng),
        requant("b", 4, 5, 5, 3),
        conv("depthwise", 5, 6, rng, groups=C),
        requant("fixed", 6, 7, 0, top),
        p.Add("sum", (2, 7), 8, 1, -2),
        p.Clip("clipped", (8,), 9, -50000, 70000),
        p.Slice("half", (9,), 10, (0, 9, 2), (0, 8, 2), (0, C, 1)),
        p.Pad("more", (10,), 11, (0, 0), (0, 0), (5, 7)),
        p.MaxPool("largest", (11,), 12, (3, 3), (2, 2), (1, 1, 1, 1)),
        p.SumPool("pooled", (12,), 13, (3, 2), (1, 1), (0, 0, 0, 0), 1),
        p.Flatten("flat", (13,), 14),
        requant("c", 14, 15, 12, 15, channels=24),
        conv("linear", 15, 16, rng, channels=24, out=10, kernel=1, bits=4),
        requant("logits", 16, 17, 1, top, channels=10),
    )
    return p.Plan(values, ops, 0, len(values) - 1, 1.0, (0.0,))


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 9, 8, 3)).astype(np.uint8)


def assert_runs_equal(engine: EngineExecutor, x: np.ndarray, expected: dict[str, np.ndarray], output: str) -> None:
    for _ in range(5):
        np.testing.assert_array_equal(engine.run(x), expected[output])
        for name, value in engine.run_all(x).items():
            np.testing.assert_array_equal(value, expected[name], name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 65])
def test_threads_and_memory(isa: str, threads: int, batch: int) -> None:
    plan, x = residual_plan(), pixels(batch)
    expected = ReferenceExecutor(plan).run_all(x)
    engine = EngineExecutor(plan, isa=isa, threads=threads)
    assert expected["logits"].std() > 0
    assert expected["c"].std() > 0
    for _ in range(3):
        np.testing.assert_array_equal(engine.run(x), expected["logits"])
        everything = engine.run_all(x)
        assert everything.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(everything[name], value, name)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_threads_share_the_rows_of_one_image(threads: int, batch: int) -> None:
    """Work large enough to be shared within an image, on every phase of a convolution."""
    rng = np.random.default_rng(0)
    shape = (31, 33, C)
    values = (p.Value("x", shape, "u8", 0, 3), p.Value("y", shape, "i32", -(2**31), 2**31 - 1))
    plan = p.Plan(values, (conv("y", 0, 1, rng),), 0, 1, 1.0, (0.0,))
    x = rng.integers(0, 4, (batch, *shape)).astype(np.uint8)
    expected = ReferenceExecutor(plan).run(x)
    for isa in ISAS:
        engine = EngineExecutor(plan, isa=isa, threads=threads)
        for _ in range(20):
            np.testing.assert_array_equal(engine.run(x), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_tiles_of_one_image(isa: str, threads: int) -> None:
    """Convolutions followed by operations on the same pixels: tiles, values of which only a tile exists, and others."""
    rng = np.random.default_rng(0)
    wide, top, shape = (-(2**31), 2**31 - 1), 2**31 - 1, (53, 31, C)
    codes = [p.Value(name, shape, "u8", 0, 3) for name in "xad"]
    sums = [p.Value(name, shape, "i32", *wide) for name in ("first", "b", "second", "c", "sum", "clipped")]
    values = (*codes, *sums)
    ops = (
        conv("first", 0, 3, rng),
        requant("a", 3, 1, 5, 3),
        requant("b", 3, 4, 4, top),
        conv("second", 1, 5, rng),
        requant("c", 5, 6, 2, top),
        p.Add("sum", (6, 4), 7, 1, -2),
        p.Clip("clipped", (7,), 8, -50, 70),
        requant("d", 8, 2, 5, 3),
    )
    plan = p.Plan(values, ops, 0, 2, 1.0, (0.0,))
    x = rng.integers(0, 4, (2, *shape)).astype(np.uint8)
    expected = ReferenceExecutor(plan).run_all(x)
    assert all(value.std() > 0 for value in expected.values())
    engine = EngineExecutor(plan, isa=isa, threads=threads)
    assert_runs_equal(engine, x, expected, "d")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_shortcut_does_with_a_sum_runs_in_its_tiles(isa: str, threads: int) -> None:
    """Readers of a sum are listed behind the other branch; they run with the sum, which no memory is kept for then."""
    rng = np.random.default_rng(0)
    wide, top, shape = (-(2**31), 2**31 - 1), 2**31 - 1, (29, 31, C)
    codes = [p.Value(name, shape, "u8", 0, 3) for name in ("x", "a", "late", "end")]
    sums = [p.Value(name, shape, "i32", *wide) for name in ("p", "q", "u", "v", "sum", "branch", "clipped", "again")]
    values = (*codes, *sums)
    ops = (
        conv("p", 0, 4, rng),
        requant("u", 4, 6, 4, top),
        conv("q", 0, 5, rng),
        requant("v", 5, 7, 2, top),
        p.Add("sum", (6, 7), 8, 0, 0),
        requant("a", 8, 1, 5, 3),
        conv("branch", 1, 9, rng),
        p.Clip("clipped", (8,), 10, -300, 300),
        requant("late", 10, 2, 4, 3),
        p.Add("again", (9, 10), 11, 0, 0),
        requant("end", 11, 3, 5, 3),
    )
    plan = p.Plan(values, ops, 0, 3, 1.0, (0.0,))
    x = rng.integers(0, 4, (2, *shape)).astype(np.uint8)
    expected = ReferenceExecutor(plan).run_all(x)
    assert all(value.std() > 0 for value in expected.values())
    engine = EngineExecutor(plan, isa=isa, threads=threads)
    work = {op.name: engine.work(op.output) for op in ops}
    for name in ("sum", "a", "clipped", "late"):
        assert work[name]["group"] == work["sum"]["group"], name
    assert work["sum"]["output_in_tile"]
    assert not work["clipped"]["output_in_tile"]  # the other sum reads it
    assert work["branch"]["group"] == work["again"]["group"] > work["sum"]["group"]
    assert_runs_equal(engine, x, expected, "end")
    times = np.array([row[1] for row in engine.time_ops(x, 9)])
    assert times.shape == (9, len(ops))
    names = [op.name for op in ops]
    assert times.min(0)[names.index("branch")] > times.min(0)[names.index("late")]  # times are in the plan's order


def test_memory_is_reused() -> None:
    plan = residual_plan()
    total = sum(int(np.prod(v.shape)) * (4 if v.dtype == "i32" else 1) for v in plan.values[1:-1])
    engine = EngineExecutor(plan, isa="generic")
    assert engine.chunk > 1
    assert 0 < engine.arena_bytes < engine.chunk * total * 0.6


def test_concurrent_callers() -> None:
    plan = residual_plan()
    inputs = [pixels(n) for n in (1, 4, 9)]
    expected = [ReferenceExecutor(plan).run(x) for x in inputs]
    engine = EngineExecutor(plan, threads=2)
    failures: list[int] = []

    def call(i: int) -> None:
        for _ in range(30):
            if not np.array_equal(engine.run(inputs[i]), expected[i]):
                failures.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert failures == []


def test_executors_share_threads_and_memory() -> None:
    plan, x = residual_plan(), pixels(9)
    expected = ReferenceExecutor(plan).run(x)
    resources = Resources(2, callers=3)
    assert (resources.threads, resources.callers, resources.bytes) == (2, 3, 0)
    executors = [EngineExecutor(plan, resources=resources, isa=isa) for isa in available_isas()]
    most = max(executor.run_bytes for executor in executors)
    assert resources.bytes == 2 * most  # a caller's and the other thread's
    for threads in (1, 3, 2):
        resources.set_threads(threads)
        assert resources.threads == threads
        for executor in executors:
            np.testing.assert_array_equal(executor.run(x), expected)
        assert resources.bytes == threads * most
    resources.trim(executors[0].run_bytes)
    assert resources.bytes == 2 * executors[0].run_bytes
    assert executors[0].constant_bytes > sum(op.codes.size for op in plan.ops if isinstance(op, p.Conv))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "threads is 0, not in 1..256"),
        ((257,), "threads is 257, not in 1..256"),
        ((1, 0), "callers = 0: must be a positive"),
        ((1, 5000), "callers is 5000, not in 1..4096"),
    ],
)
def test_wrong_resources(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(*arguments)
    if len(arguments) == 1:
        with pytest.raises(ValueError, match=message):
            Resources().set_threads(*arguments)


@pytest.mark.parametrize("isa", ISAS)
def test_override_dispatches(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSTRATA_ISA", isa)
    by_environment = EngineExecutor(residual_plan())
    monkeypatch.setenv("BITSTRATA_ISA", "generic")
    by_argument = EngineExecutor(residual_plan(), isa=isa)
    expected = {
        "generic": dict.fromkeys(("stem", "conv", "depthwise", "linear"), "generic"),
        "avx2": {"stem": "avx2-wide", "conv": "avx2-narrow", "depthwise": "avx2-depthwise", "linear": "avx2-narrow"},
        "avx2vnni": {
            "stem": "avx2vnni",
            "conv": "avx2vnni",
            "depthwise": "avx2-depthwise",
            "linear": "avx2vnni-direct",
        },
        "avx512vnni": {
            "stem": "avx512vnni",
            "conv": "avx512vnni",
            "depthwise": "avx512vnni-depthwise",
            "linear": "avx512vnni-direct",
        },
        "amx": {"stem": "amx", "conv": "amx", "depthwise": "avx512vnni-depthwise", "linear": "amx-direct"},
        "neon": {"stem": "neon", "conv": "neon", "depthwise": "neon-depthwise-narrow", "linear": "neon-direct"},
        "neon-dot": {
            "stem": "neon-dot",
            "conv": "neon-dot",
            "depthwise": "neon-depthwise-narrow",
            "linear": "neon-dot-direct",
        },
        "amx-emulated": {
            "stem": "amx-emulated",
            "conv": "amx-emulated",
            "depthwise": "generic",
            "linear": "amx-emulated-direct",
        },
    }[isa]
    for executor in (by_environment, by_argument):
        assert executor.isa == isa
        assert executor.kernels == expected


def counts_bits() -> bool:
    """Whether this processor has AVX-512 VPOPCNTDQ."""
    return "avx512_vpopcntdq" in Path("/proc/cpuinfo").read_text(encoding="ascii")


@pytest.mark.parametrize("isa", available_isas())
def test_low_bits_have_their_own_kernels(isa: str) -> None:
    rng = np.random.default_rng(0)
    shape, wide = (14, 14, 128), (-(2**31), 2**31 - 1)
    chosen = {}
    for a_bits, w_bits in ((1, 1), (2, 2), (4, 4), (8, 8)):
        values = (p.Value("x", shape, "u8", 0, 2**a_bits - 1), p.Value("y", shape, "i32", *wide))
        plan = p.Plan(values, (conv("y", 0, 1, rng, channels=128, out=128, bits=w_bits),), 0, 1, 1.0, (0.0,))
        chosen[a_bits, w_bits] = EngineExecutor(plan, isa=isa).kernels["y"]
    tables = {"avx2": "avx2-table"}
    pairs = dict.fromkeys(("avx2", "avx2vnni"), "avx2-table-pairs")
    counts = {"avx512vnni": "avx512vpopcnt"} if counts_bits() else {}
    vnni = {name: f"{name}-winograd-four" for name in ("avx2vnni", "avx512vnni")}
    few = {"avx2": "avx2-winograd"} | vnni
    assert chosen[1, 1] == (few | pairs | counts).get(isa, isa)
    assert chosen[2, 2] == (few | tables | vnni).get(isa, isa)
    assert chosen[4, 4] == few.get(isa, isa)
    assert chosen[8, 8] == {"avx2": "avx2-winograd-wide"}.get(isa, isa)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(("a_bits", "w_bits"), [(1, 1), (2, 1), (2, 2), (4, 4), (8, 8)])
def test_limits_count_what_a_product_takes(isa: str, a_bits: int, w_bits: int) -> None:
    """Of the peak's products: one for each pair of planes, or of a plane and a digit of two bits; four for six, where
    two outputs are computed together, and six for twelve, where four are; else one.
    """
    shape, wide = (14, 14, 128), (-(2**31), 2**31 - 1)
    values = (p.Value("x", shape, "u8", 0, 2**a_bits - 1), p.Value("y", shape, "i32", *wide))
    op = conv("y", 0, 1, np.random.default_rng(0), channels=128, out=128, bits=w_bits)
    executor = EngineExecutor(p.Plan(values, (op,), 0, 1, 1.0, (0.0,)), isa=isa)
    work = executor.work(1)
    expected = {
        "avx2-table": ("vpshufb + vpaddb", w_bits * ((a_bits + 1) // 2)),
        "avx2-table-pairs": ("3 vpshufb + 4 vpaddb + vpsrlw", w_bits),
        "avx2-winograd-wide": ("vpmaddwd + vpaddd", 6 * 4 / (3 * 14)),
        f"{isa}-winograd-four": (work["peak"], 6 * 4 / (3 * 14)),
        "avx512vpopcnt": ("vpandd + vpopcntd + vpaddd", w_bits * a_bits),
    }
    kernel = executor.kernels["y"]
    peak, passes = expected.get(kernel, (work["peak"], 2 / 3 if kernel.endswith("-winograd") else 1))
    assert (work["peak"], work["passes"]) == (peak, passes)


def test_default_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITSTRATA_ISA", raising=False)
    assert EngineExecutor(residual_plan()).isa == available_isas()[-1]
    monkeypatch.setenv("BITSTRATA_ISA", "")
    assert EngineExecutor(residual_plan()).isa == available_isas()[-1]
    assert available_isas()[0] == "generic"
    assert set(available_isas()).isdisjoint(emulated_isas())


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"isa=sse9: not an instruction set of this build; available: generic"):
        EngineExecutor(residual_plan(), isa="sse9")
    monkeypatch.setenv("BITSTRATA_ISA", "AVX2")
    with pytest.raises(ValueError, match=r"BITSTRATA_ISA=AVX2: not an instruction set"):
        EngineExecutor(residual_plan())


@pytest.mark.skipif("amx" in available_isas(), reason="this processor has AMX")
def test_an_instruction_set_that_the_processor_lacks() -> None:
    wanted = r"isa=amx: (this processor|not an instruction set).*available: generic"
    with pytest.raises(ValueError, match=wanted) as raised:
        EngineExecutor(residual_plan(), isa="amx")
    (row,) = [row for row in kernel_table() if row.isa == "amx"]
    assert row.lacks in str(raised.value) or "not compiled" in row.lacks


def test_the_table_tells_what_runs_and_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITSTRATA_ISA", raising=False)
    rows = kernel_table()
    assert [row.isa for row in rows if not row.lacks and not row.emulated] == list(available_isas())
    assert [row.isa for row in rows if not row.lacks and row.emulated] == list(emulated_isas())
    assert {"generic", "avx2", "avx2vnni", "avx512vnni", "amx", "amx-emulated"} <= {row.isa for row in rows}
    assert [row.isa for row in rows if row.chosen] == [available_isas()[-1]]
    for name, chosen in (("generic", ["generic"]), ("amx-emulated", ["amx-emulated"]), ("sse9", [])):
        monkeypatch.setenv("BITSTRATA_ISA", name)
        assert [row.isa for row in kernel_table() if row.chosen] == chosen
    flags = cpu_flags()
    if not flags:
        return
    for row in rows:
        if row.lacks.startswith("processor flag"):
            named = [word.strip(",") for word in row.lacks.split() if word[:3] in ("avx", "bmi", "amx")]
            assert named
            assert not all(name in flags for name in named)


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.parametrize("isa", emulated_isas())
def test_emulated_instruction_sets_are_no_default(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITSTRATA_ISA", raising=False)
    assert EngineExecutor(residual_plan()).isa != isa
    monkeypatch.setenv("BITSTRATA_ISA", isa)
    assert EngineExecutor(residual_plan()).isa == isa
    with pytest.raises(ValueError, match=r"isa=sse9: .*") as raised:
        EngineExecutor(residual_plan(), isa="sse9")
    assert isa not in str(raised.value)
