"""The text of model.c: tables of a schedule, and the function that runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitstrata_runtime import intervals
from bitstrata_runtime.plan import Add, Clip, Conv, Flatten, MaxPool, Op, Pad, Requant, Slice, SumPool

from . import requant
from .memory import Arena, value_name
from .packing import PackedConv
from .requant import Form, Short, Thresholds
from .schedule import Schedule
from .tables import Tables

_TYPES = {"u8": "BS_U8", "s8": "BS_S8", "i32": "BS_I32"}


def scratch_name(op: Op) -> str:
    """The arena's name for the scratch of an operation."""
    return f"scratch of {op.name}"


def accumulator_bounds(op: Op, plan: Schedule) -> requant.Bounds:
    """The least and largest accumulator of each channel of a convolution, for inputs within their value's bounds."""
    assert isinstance(op, Conv)
    source = plan.values[op.inputs[0]]
    inputs = intervals.constant(source.lo, source.hi, source.shape[2])
    if any(op.padding):
        inputs = intervals.join(inputs, op.pad_code)
    return intervals.conv(op.codes, op.mul, op.add, op.groups, inputs)


class Emitter:
    """Writes the tables of one schedule. convs: op.output -> its packed weights."""

    def __init__(self, plan: Schedule, convs: Mapping[int, PackedConv], arena: Arena, tiles: list[int]) -> None:
        self.plan, self.convs, self.arena, self.tiles = plan, convs, arena, tiles
        self.tables = Tables()
        self.bounds = {index: accumulator_bounds(op, plan) for index, op in plan.makers(Conv).items()}
        self.forms: dict[str, int] = {}  # kernel -> operations, for reports

    def write(self) -> str:
        """All tables, the last of which is `groups`."""
        self.tables.structs("bs_value", "values", [self._value(index) for index in range(len(self.plan.values))])
        rows = []
        for position, group in enumerate(self.plan.groups):
            steps = [self._step(op) for op in group.ops]
            self.tables.structs("bs_step", f"steps{position}", steps)
            rows.append(
                {
                    "steps": f"steps{position}",
                    "pixels": group.pixels,
                    "count": len(group.ops),
                    "tile": self.tiles[position],
                    "backward": int(self.arena.backward[position]),
                }
            )
        self.tables.structs("bs_group", "groups", rows)
        return "\n".join(self.tables.text)

    def _value(self, index: int) -> dict[str, object]:
        value = self.plan.values[index]
        height, width, channels = value.shape
        ends = {self.plan.input: "BS_INPUT", self.plan.output: "BS_OUTPUT"}
        place = ends.get(index, "BS_ARENA" if index in self.plan.maps else "BS_TILE")
        return {
            "height": height,
            "width": width,
            "channels": channels,
            "offset": self.arena.offsets.get(value_name(index), 0),
            "type": _TYPES[value.dtype],
            "place": place,
        }

    def _step(self, op: Op) -> dict[str, object]:
        kernel, args = _WRITERS[type(op)](self, op)
        self.forms[kernel] = self.forms.get(kernel, 0) + 1
        return {
            "run": kernel,
            "out": f"&values[{op.output}]",
            "a": f"&values[{op.inputs[0]}]",
            "b": f"&values[{op.inputs[1]}]" if len(op.inputs) > 1 else None,
            "args": args,
            "scratch": self.arena.offsets.get(scratch_name(op), 0),
        }

    def _struct(self, op: Op, ctype: str, fields: Mapping[str, object]) -> str:
        return self.tables.struct(ctype, f"args{op.output}", fields)

    def _conv(self, op: Conv) -> tuple[str, str]:
        c, tag = self.convs[op.output], str(op.output)
        array = self.tables.array
        fields = {
            "window": _window(op.codes.shape[2:], op.stride, op.padding, op.dilation),
            "weights": array(f"weights{tag}", c.weights),
            "base": None if c.base is None else array(f"base{tag}", c.base),
            "pad": None if c.pad is None else array(f"pad{tag}", c.pad),
            "depth": c.depth,
            "row_words": c.weights.shape[1],
            "words": c.words,
            "groups": op.groups,
            "block": c.block,
            "multiplier": c.multiplier,
            "addend": c.addend,
            "low": c.low,
            "bits": c.bits,
            "pad_code": c.pad_code,
            "turns": c.turns,
        }
        return f"bs_conv_{c.kernel}", self._struct(op, "bs_conv", fields)

    def _requant(self, op: Requant) -> tuple[str, str]:
        source = op.inputs[0]
        bounds = self.bounds.get(source)
        form: Form = requant.choose(op, self.plan.values[source], self.plan.values[op.output], bounds)
        if isinstance(form, Thresholds):
            return self._thresholds(op, form)
        array, tag = self.tables.array, str(op.output)
        common = {
            "multiplier": array(f"multiplier{tag}", form.multiplier),
            "shift": array(f"shift{tag}", form.shift),
            "lowest": form.lowest,
            "highest": form.highest,
            "shared": int(len(form.shift) == 1),
        }
        if isinstance(form, Short):
            own = {"addend": array(f"addend{tag}", form.addend)}
            if form.start is not None and form.stop is not None:
                own |= {"from": array(f"from{tag}", form.start), "to": array(f"to{tag}", form.stop)}
            return "bs_requant_short", self._struct(op, "bs_requant_short_args", {**common, **own})
        own = {"bias": array(f"bias{tag}", form.bias)}
        kernel = "bs_requant_split" if form.split else "bs_requant_wide"
        return kernel, self._struct(op, "bs_requant_wide_args", {**common, **own})

    def _thresholds(self, op: Requant, form: Thresholds) -> tuple[str, str]:
        falling = None
        if form.falling.any():
            bits = np.packbits(np.pad(form.falling, (0, -len(form.falling) % 32)), bitorder="little")
            falling = self.tables.array(f"falling{op.output}", bits.view("<u4").astype(np.uint32))
        name = "bs_thresholds16" if form.thresholds.dtype == np.int16 else "bs_thresholds32"
        fields = {
            "thresholds": self.tables.array(f"thresholds{op.output}", form.thresholds),
            "falling": falling,
            "lowest": form.lowest,
            "highest": form.highest,
            "count": form.thresholds.shape[1],
            "shared": int(len(form.falling) == 1),
        }
        return name, self._struct(op, "bs_thresholds", fields)

    def _add(self, op: Add) -> tuple[str, str]:
        return "bs_add", self._struct(op, "bs_add_args", {"shift_a": op.shift_a, "shift_b": op.shift_b})

    def _clip(self, op: Clip) -> tuple[str, str]:
        return "bs_clip", self._struct(op, "bs_clip_args", {"lowest": op.lo, "highest": op.hi})

    def _max_pool(self, op: MaxPool) -> tuple[str, str]:
        return "bs_max_pool", self._struct(op, "bs_window", _window(op.kernel, op.stride, op.padding, (1, 1)))

    def _sum_pool(self, op: SumPool) -> tuple[str, str]:
        fields = {"window": _window(op.kernel, op.stride, op.padding, (1, 1)), "shift": op.shift}
        return "bs_sum_pool", self._struct(op, "bs_sum_pool_args", fields)

    def _slice(self, op: Slice) -> tuple[str, str]:
        fields: dict[str, object] = {}
        for name, bounds in (("row", op.h), ("column", op.w), ("channel", op.c)):
            fields |= {name: bounds[0], f"{name}_step": bounds[2]}
        return "bs_slice", self._struct(op, "bs_slice_args", fields)

    def _pad(self, op: Pad) -> tuple[str, str]:
        return "bs_pad", self._struct(op, "bs_pad_args", {"top": op.h[0], "left": op.w[0], "front": op.c[0]})

    def _flatten(self, op: Flatten) -> tuple[str, None]:
        return "bs_flatten", None


_WRITERS: dict[type[Op], Any] = {
    Conv: Emitter._conv,
    Requant: Emitter._requant,
    Add: Emitter._add,
    Clip: Emitter._clip,
    MaxPool: Emitter._max_pool,
    SumPool: Emitter._sum_pool,
    Slice: Emitter._slice,
    Pad: Emitter._pad,
    Flatten: Emitter._flatten,
}


def _window(kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, int]:
    return {
        "kernel_h": kernel[0],
        "kernel_w": kernel[1],
        "stride_h": stride[0],
        "stride_w": stride[1],
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "top": padding[0],
        "left": padding[2],
    }
