"""Random valid programs for property tests: `programs()` and `choices(program)` are hypothesis strategies.

Structure (operations, shapes, precisions, grids) is drawn; numbers (weights, factors) come from a drawn seed, scaled so
that real values stay near 1 and codes use their range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from bitstrata_runtime.program import AffineInfo, Factors, Layer, Node, Program, Weights

Draw = Callable[[st.SearchStrategy[Any]], Any]
PRECISION_SETS = ((1,), (2, 4), (1, 2, 3), (1, 4, 8), (2, 8))
SIGNED = {p: (-(1 << (p - 1)), (1 << (p - 1)) - 1) for p in range(1, 9)}
UNSIGNED = {p: (0, (1 << p) - 1) for p in range(1, 9)}
SYMMETRIC = {p: (-high, high) for p, (_, high) in SIGNED.items()}
ODD = {p: (0, max(high - 1, 1)) for p, (_, high) in UNSIGNED.items()}
FORMS = ((1, 0), (2, 1), (4, 1), (8, 3))


class _Builder:
    """A program under construction; every method appends nodes and returns the name of the value they make."""

    def __init__(self, draw: Draw, wide: bool = False) -> None:
        self.draw, self.wide = draw, wide
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.precisions: tuple[int, ...] = draw(st.sampled_from(PRECISION_SETS))
        self.nodes: list[Node] = []
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.layers: dict[str, Layer] = {}
        self.affines: dict[str, AffineInfo] = {}
        self.sizes: dict[str, float] = {}  # affine -> typical magnitude of what it is applied to

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def node(self, op: str, inputs: tuple[str, ...], shape: tuple[int, int, int], **attrs: Any) -> str:
        name = f"{op}{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, attrs))
        self.shapes[name] = shape
        return name

    # Windows

    def window(self, size: int, largest: int = 3) -> tuple[int, int, int, int, int]:
        """Kernel, stride, dilation, padding before and after that fit an axis of `size`; and its result's size."""
        kernel = self.draw(st.integers(1, min(largest, size)))
        before, after = self.pick(0, kernel // 2), self.pick(0, kernel // 2)
        dilation = self.pick(1, 2) if 2 * (kernel - 1) < size else 1
        return kernel, self.pick(1, 1, 2), dilation, before, after

    @staticmethod
    def out_size(size: int, axis: tuple[int, int, int, int, int]) -> int:
        kernel, stride, dilation, before, after = axis
        return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1

    def pooling(self, shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], dict[str, list[int]]]:
        """The shape that pooling a map of `shape` gives, and the attributes of the node."""
        channels, *sizes = shape
        axes = [self.window(size) for size in sizes]
        outs = [self.out_size(size, (k, s, 1, b, a)) for size, (k, s, _, b, a) in zip(sizes, axes, strict=True)]
        attrs = {
            "kernel": [axis[0] for axis in axes],
            "stride": [axis[1] for axis in axes],
            "padding": [pad for axis in axes for pad in axis[3:]],
        }
        return (channels, outs[0], outs[1]), attrs

    def pool(self, op: str, source: str) -> str:
        shape, attrs = self.pooling(self.shapes[source])
        return self.node(op, (source,), shape, **attrs)

    def pooled_layer(self, source: str, entry: str | None = None) -> tuple[Layer, dict[str, Any], Callable[[str], str]]:
        """As `layer_after`, of a layer that may read sums of its codes; and what makes these from its codes."""
        if entry == "pixels" or not self.pick(True, False, False):
            return *self.layer_after(source, entry), lambda codes: codes
        shape, pooling = self.pooling(self.shapes[source])
        self.shapes["pooled"] = shape
        layer, attrs = self.layer_after("pooled", entry, pooling=pooling)
        return layer, attrs, lambda codes: self.node("avgpool", (codes,), shape, **pooling)

    # Layers

    def ranges(self, entry: str | None, pooling: dict[str, list[int]] | None) -> dict[int, tuple[int, int]]:
        """Ranges of codes, whose sums over the windows of `pooling` fit 8 bits."""
        if entry == "pixels":
            return dict.fromkeys(self.precisions, (0, 255))
        table = self.pick(UNSIGNED, SIGNED, SYMMETRIC, ODD)
        window = math.prod(pooling["kernel"]) if pooling else 1
        least, most = -(128 // window), (255 if table[8][0] == 0 else 127) // window
        chosen = {p: table[p] if self.pick(True, True, False) else table[8] for p in self.precisions}
        return {p: (max(low, least), min(high, most)) for p, (low, high) in chosen.items()}

    def grid(
        self, bounds: tuple[int, int], channels: int, entry: str | None
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Pad code and offset of an input grid that may have one."""
        if entry == "pixels":
            pads = tuple(int(c) for c in self.rng.integers(0, 256, channels))
            return pads, tuple(float(-c) for c in self.rng.uniform(90, 140, channels))
        low, high = bounds
        count = self.pick(1, channels) if entry else 1
        offsets = tuple(float(z) for z in self.rng.normal(0, 1 + (high - low) / 4, count))
        return tuple(min(max(round(-z), low), high) for z in offsets[: self.pick(1, count)]), offsets

    def layer(
        self,
        shape: tuple[int, int, int, int],
        channels: int,
        entry: str | None,
        pooling: dict[str, list[int]] | None = None,
    ) -> Layer:
        """A new layer; `entry` is the input kind if it reads the network's input."""
        nested, planes = self.pick(True, False), self.pick(True, False)
        source_bits = self.pick(*(b for b in (1, 2, 3, 4, 8) if nested or b > 1)) if planes else 8
        ranges = self.ranges(entry, pooling)
        grids = dict.fromkeys(self.precisions, ((0,), (0.0,)))
        padded = pooling is not None and any(pooling["padding"])
        if entry == "pixels" or (self.pick(True, False) and not padded):
            grids = {p: self.grid(bounds, channels, entry) for p, bounds in ranges.items()}
        name = f"layer{len(self.layers)}"
        layer = Layer(
            name=name,
            kind="conv" if shape[2] * shape[3] > 1 else "linear",
            shape=shape,
            source_bits=source_bits,
            planes=planes,
            weight_bits={p: min(p, source_bits) if planes else 8 for p in self.precisions},
            integer_form={p: self.pick(*FORMS[1:]) if nested else FORMS[0] for p in self.precisions},
            input_range=ranges,
            pad_code={p: pads for p, (pads, _) in grids.items()},
            input_offset={p: offset for p, (_, offset) in grids.items()},
            grid="nested" if nested else "zero",
        )
        self.layers[name] = layer
        return layer

    def affine(self, owner: str, channels: int, size: float) -> str:
        name = f"{owner}.affine{len(self.affines)}"
        self.affines[name] = AffineInfo(owner, channels)
        self.sizes[name] = size
        return name

    def layer_after(
        self,
        source: str,
        entry: str | None = None,
        linear: bool = False,
        pooling: dict[str, list[int]] | None = None,
    ) -> tuple[Layer, dict[str, Any]]:
        """A layer that can read a value of `source`'s shape, and the attributes of its conv node."""
        channels, *sizes = self.shapes[source]
        divisors = [g for g in (1, 2, 3, 4, channels) if channels % g == 0]
        axes = [(1, 1, 1, 0, 0)] * 2 if linear else [self.window(size) for size in sizes]
        if self.wide and not linear and self.pick(True, False):  # as most layers of most networks are
            groups, out = 1, self.draw(st.integers(33, 70))
            axes[1] = (3, 1, 1, 1, 1)
        else:
            groups = 1 if linear else self.pick(1, *divisors)
            most = self.pick(6, 20, 70) if self.wide else 6
            out = groups * self.draw(st.integers(1, max(1, most // groups)))
        kernel_h, kernel_w = (axis[0] for axis in axes)
        attrs = {
            "stride": [axis[1] for axis in axes],
            "dilation": [axis[2] for axis in axes],
            "padding": [pad for axis in axes for pad in axis[3:]],
            "groups": groups,
        }
        return self.layer((out, channels // groups, kernel_h, kernel_w), channels, entry, pooling), attrs

    def conv(self, source: str, layer: Layer, attrs: dict[str, Any]) -> tuple[str, str]:
        """The conv node, and the affine that its layer owns."""
        outs = []
        for axis, size in enumerate(self.shapes[source][1:]):
            stride, dilation, pads = attrs["stride"][axis], attrs["dilation"][axis], attrs["padding"][2 * axis :][:2]
            outs.append(self.out_size(size, (layer.shape[2 + axis], stride, dilation, *pads)))
        acc = self.node("conv", (source,), (layer.shape[0], *outs), layer=layer.name, **attrs)
        weight = max(2.0 ** (bits - 1) * layer.integer_form[p][0] for p, bits in layer.weight_bits.items())
        code = max(max(-low, high, 1) for low, high in layer.input_range.values())
        size = math.sqrt(math.prod(layer.shape[1:])) * weight * code / 3
        return acc, self.affine(layer.name, layer.shape[0], size)

    def clip(self) -> list[float | None]:
        return self.pick([0.0, None], [0.0, 6.0], [-1.5, 1.0], [None, None], [None, 0.75])

    def codes(self, source: str, layer: Layer, affines: list[str]) -> str:
        if self.pick(True, False):
            affines = [*affines, self.affine(layer.name, self.shapes[source][0], 1.0)]
        return self.node("requant", (source,), self.shapes[source], to=layer.name, affine=affines, clip=self.clip())

    def fixed(self, acc: str, affines: list[str]) -> str:
        return self.node("rescale", (acc,), self.shapes[acc], affine=affines, clip=self.clip())

    # Blocks, each from a `fixed` value to a `fixed` value

    def branch(self, source: str) -> str:
        layer, attrs, sums = self.pooled_layer(source)
        acc, affine = self.conv(sums(self.codes(source, layer, [])), layer, attrs)
        if self.pick(True, False, False):
            following, attrs, sums = self.pooled_layer(acc)
            acc, affine = self.conv(sums(self.codes(acc, following, [affine])), following, attrs)
        return self.fixed(acc, [affine])

    def crop(self, source: str, channels: bool = True) -> str:
        bounds: dict[str, list[int]] = {}
        outs = []
        for key, size in zip("chw", self.shapes[source], strict=True):
            start = self.draw(st.integers(0, size - 1)) if channels or key != "c" else 0
            stop = self.draw(st.integers(start + 1, size)) if channels or key != "c" else size
            bounds[key] = [start, stop, self.pick(1, 2) if channels or key != "c" else 1]
            outs.append(len(range(*bounds[key])))
        return self.node("slice", (source,), (outs[0], outs[1], outs[2]), **bounds)

    def fit(self, source: str, shape: tuple[int, int, int]) -> str:
        """Slice and pad `source` to `shape`, as a shortcut without weights does."""
        have = self.shapes[source]
        cut = {key: [0, min(h, w), 1] for key, h, w in zip("chw", have, shape, strict=True)}
        middle = (min(have[0], shape[0]), min(have[1], shape[1]), min(have[2], shape[2]))
        source = self.node("slice", (source,), middle, **cut)
        gaps = {key: w - h for key, h, w in zip("chw", middle, shape, strict=True)}
        return self.node("pad", (source,), shape, **{key: [gap // 2, gap - gap // 2] for key, gap in gaps.items()})

    def residual(self, source: str) -> str:
        branch = self.branch(source)
        return self.node("add", (branch, self.fit(source, self.shapes[branch])), self.shapes[branch])

    def pooled(self, source: str) -> str:
        pooled = self.pool("avgpool", source)
        return self.node("rescale", (pooled,), self.shapes[pooled], affine=[], clip=[None, None])

    def block(self, source: str) -> str:
        make = self.pick(
            self.branch,
            self.residual,
            self.residual,
            self.crop,
            self.pooled,
            lambda x: self.pool("maxpool", x),
            lambda x: self.node("clip", (x,), self.shapes[x], clip=self.clip()),
        )
        return make(source)

    def start(self, kind: str) -> str:
        side = self.pick(7, 13) if self.wide else 7
        shape = (self.draw(st.integers(1, 4)), self.draw(st.integers(3, side)), self.draw(st.integers(3, side)))
        codes = self.node("input", (), shape)
        if self.pick(True, False, False):
            codes = self.crop(codes, channels=False)
        layer, attrs, sums = self.pooled_layer(codes, kind)
        acc, affine = self.conv(sums(codes), layer, attrs)
        return self.fixed(acc, [affine])

    def finish(self, source: str) -> str:
        """A linear layer on the flattened codes."""
        channels, height, width = self.shapes[source]
        count = channels * height * width
        self.shapes["flat"] = (count, 1, 1)
        layer, attrs = self.layer_after("flat", linear=True)
        codes = self.codes(source, layer, [])
        if self.pick(True, False):
            codes = self.pool("maxpool", codes)
            count = math.prod(self.shapes[codes])
            layer = self.layers[layer.name] = _with_inputs(layer, count)
        flat = self.node("flatten", (codes,), (count, 1, 1))
        acc, affine = self.conv(flat, layer, attrs)
        return self.fixed(acc, [affine])

    # Numbers

    def weights(self) -> dict[str, Weights]:
        """Codes of the whole range; of every other layer without the lowest one, such as -1, 0, 1 in two bits."""
        result = {}
        for index, (name, layer) in enumerate(self.layers.items()):
            half = 1 << layer.source_bits >> 1
            codes = self.rng.integers(min(index % 2 - half, 0), half, layer.shape)
            result[name] = Weights(codes.astype(np.int8), layer.source_bits)
        return result

    def affine_values(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Gains of either sign, now and then 0; moderate offsets."""
        channels = self.affines[name].channels
        gain = self.rng.uniform(-2, 2, channels) / self.sizes[name]
        gain[self.rng.uniform(size=channels) < 0.05] = 0.0
        return np.stack([gain, self.rng.normal(0, 0.3, channels)])

    def factors(self, precision: int) -> Factors:
        steps = {}
        for name, layer in self.layers.items():
            low, high = layer.input_range[precision]
            steps[name] = float(self.rng.uniform(1, 3) / max(-low, high, 1))
        return Factors({name: self.affine_values(name) for name in self.affines}, steps)

    def plan(self) -> tuple[dict[str, int], Factors]:
        chosen = {name: int(self.rng.choice(self.precisions)) for name in self.layers}
        names = [name for name in self.affines if self.rng.uniform() < 0.5]
        return chosen, Factors({name: self.affine_values(name) for name in names})


def _with_inputs(layer: Layer, count: int) -> Layer:
    fields = {**vars(layer), "shape": (layer.shape[0], count, 1, 1)}
    return Layer(**fields)


@st.composite
def programs(draw: Draw, blocks: int = 3, wide: bool = False) -> Program:
    """A valid program of up to `blocks` random blocks between a first and a last layer; it has the plan "mixed".

    wide: also layers of up to 70 channels and larger maps, which fill vectors and tiles; many of them have three
    neighbouring columns of weights and stride 1.
    """
    builder = _Builder(draw, wide)
    kind = builder.pick("pixels", "codes")
    value = builder.start(kind)
    for _ in range(draw(st.integers(0, blocks))):
        value = builder.block(value)
    if builder.pick(True, True, False):
        value = builder.finish(value)
    chosen, reestimated = builder.plan()
    factors = {str(p): builder.factors(p) for p in builder.precisions}
    return Program(
        input_shape=builder.shapes[builder.nodes[0].name],
        input_kind=kind,
        nodes=tuple(builder.nodes),
        output=value,
        layers=builder.layers,
        affines=builder.affines,
        precisions=builder.precisions,
        weights=builder.weights(),
        factors={**factors, "mixed": reestimated},
        plans={"mixed": chosen},
    )


def choices(program: Program) -> st.SearchStrategy[Any]:
    """Precisions, plans and per-layer maps that `program` can run at."""
    maps = st.fixed_dictionaries({name: st.sampled_from(program.precisions) for name in program.layers})
    return st.one_of(st.sampled_from(program.precisions), st.sampled_from(sorted(program.plans)), maps)


def input_codes(program: Program, low: int, high: int, count: int, seed: int) -> np.ndarray[Any, Any]:
    """`count` inputs (N, H, W, C) of the plan's input dtype: one all lowest, one all highest, then random ones."""
    rng = np.random.default_rng(seed)
    channels, height, width = program.input_shape
    codes = rng.integers(low, high + 1, (count, height, width, channels))
    codes[0], codes[1 % count] = low, high
    codes[2:4] = rng.choice([low, high], codes[2:4].shape)
    return codes.astype(np.uint8 if low >= 0 else np.int8)
