"""The roofline table: what layers are, what they lose, and what is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import bitstrata_runtime as runtime
from bitstrata_runtime.plan import Conv, Plan, Requant, Value
from bitstrata_runtime.profile import Level, Machine, OpProfile, Profile

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("roofline", FOLDER / "roofline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "roofline", module)
    spec.loader.exec_module(module)
    return module


def op(name: str, group: int, us: float, compute: float, memory: float, **changes: object) -> OpProfile:
    kind = "conv" if name.startswith("conv") else "requant"
    fields: dict[str, object] = {
        "name": name,
        "kind": kind,
        "shape": (4, 4, 8),
        "kernel": "fast" if kind == "conv" else "",
        "seconds": us / 1e6,
        "operations": 100,
        "input_bytes": 100,
        "output_bytes": 100,
        "weight_bytes": 50,
        "scratch_bytes": 0,
        "group": group,
        "peak": "dot" if kind == "conv" else "",
        "compute_seconds": compute / 1e6,
        "memory_seconds": memory / 1e6,
    }
    return OpProfile(**{**fields, **changes})  # type: ignore[arg-type]


def two_layers() -> tuple[Plan, Profile]:
    """conv1 (3x3, 2 to 8) with a requantization, then conv2 (depthwise) alone."""
    values = (
        Value("x", (4, 4, 2), "u8", 0, 1),
        Value("conv1", (4, 4, 8), "i32", -99, 99),
        Value("codes", (4, 4, 8), "u8", 0, 255),
        Value("conv2", (4, 4, 8), "i32", -99, 99, 1.0),
    )
    rest = (1, 0, (1, 1), (1, 1, 1, 1), (1, 1))
    c = np.zeros(8, np.int64)
    plan = Plan(
        values,
        (
            Conv("conv1", (0,), 1, "first", np.zeros((8, 2, 3, 3), np.int8), *rest, 1, np.zeros(2, np.int32)),
            Requant("requant1", (1,), 2, c.astype(np.int32), c, c.astype(np.uint8), 0, 255),
            Conv("conv2", (2,), 3, "second", np.zeros((8, 1, 3, 3), np.int8), *rest, 8, np.zeros(8, np.int32)),
        ),
        0,
        3,
        1.0,
        (0.0,),
    )
    machine = Machine("avx2", 1, {"dot": 1e9}, (Level("L1", None, 1e9),))
    ops = (op("conv1", 0, 10, 6, 2), op("requant1", 0, 7, 0, 1), op("conv2", 1, 8, 2, 4))
    return plan, Profile(machine, 1, 5, 30e-6, ops)


def test_a_layer_is_what_runs_together(roofline: ModuleType) -> None:
    plan, profile = two_layers()
    first, second = roofline.layers_of("net", 2, plan, profile)
    assert (first.layer, first.kernel, first.case, first.isa, first.bits) == ("first", "fast", "net", "avx2", 2)
    assert (first.us, first.share, first.share_of_time) == pytest.approx((17, 7 / 17, 17 / 30))
    assert (first.products_us, first.rest_us, first.lost_us) == pytest.approx((4, 6, 10))
    assert (first.bound, second.bound) == ("compute", "memory")
    assert (second.us, second.share, second.products_us, second.rest_us) == pytest.approx((8, 0.5, 4, 0))
    assert first.shape == "3x3/1, 2 to 8, 4x4"
    assert second.shape == "3x3/1, 8 to 8 in 8 groups, 4x4"
    assert [row.layer for row in roofline.worst([second, first])] == ["first", "second"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seconds": 6.5e-6}, "what follows the products, above all requant (7.0 us)"),
        ({"seconds": 30e-6, "scratch_bytes": 200}, "products: staging its input (0 kB written and read again"),
        ({"seconds": 30e-6, "weight_bytes": 2000}, "products: 2 kB of weights pass by for 16 pixels"),
        ({"seconds": 30e-6}, "products: 18 products an output, few beside"),
    ],
)
def test_what_holds_a_layer_back(roofline: ModuleType, changes: dict[str, float], reason: str) -> None:
    plan, profile = two_layers()
    ops = (op("conv1", 0, 10, 6, 2, **changes), *profile.ops[1:2])
    assert roofline.held_back_by(plan, plan.ops[0], ops).startswith(reason)
    assert "depthwise" in roofline.held_back_by(plan, plan.ops[2], profile.ops[2:])


def test_tables_and_rows_hold_every_layer(roofline: ModuleType, tmp_path: Path) -> None:
    plan, profile = two_layers()
    rows = [row for bits in (1, 8) for row in roofline.layers_of("net", bits, plan, profile)]
    text = roofline.write(tmp_path / "roofline.json", rows).read_text()
    assert "| `first` | 3x3/1, 2 to 8, 4x4 | 41%, 17.0 us | 41%, 17.0 us |" in text
    assert "| all layers | | 44%, 25 us | 44%, 25 us |" in text
    assert text.index("| 1 | `first` | fast | 57% | 41% (compute) | 4.0, 6.0 |") < text.index("| 1 | `second` |")
    written = json.loads((tmp_path / "roofline.json").read_text())
    assert [dict(zip(written["columns"], row, strict=True))["layer"] for row in written["rows"]] == [
        "first",
        "second",
    ] * 2
    assert written["cpu"]


@pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
def test_the_short_form_measures_every_layer(
    roofline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = roofline.Case("resnet20", "resnet20", 32, 10, (("width", 4),))
    monkeypatch.setitem(roofline.CASES, "resnet20", case)
    target = tmp_path / "found.json"
    roofline.main(["--quick", "--bits", "2", "--json", str(target)])
    written = json.loads(target.read_text())
    rows = [dict(zip(written["columns"], row, strict=True)) for row in written["rows"]]
    layers = [row["layer"] for row in rows if row["bits"] == 2]
    assert {"conv1", "layer1.0.conv1", "layer3.2.conv2", "linear"} <= set(layers)
    assert len(layers) == len(rows)
    assert all(row["us"] > 0 and row["share"] > 0 for row in rows if row["kernel"] not in ("slice", "flatten", "pad"))
    assert capsys.readouterr().out.count("| `layer3.2.conv2` |") >= 1
    with pytest.raises(SystemExit):
        roofline.main(["--quick", "--bits", "9"])
    assert "--bits: 9 is not among" in capsys.readouterr().err
