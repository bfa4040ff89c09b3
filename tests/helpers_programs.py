"""Small programs made by hand, for tests of whatever stores, derives or runs programs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from bitstrata_runtime.program import AffineInfo, Factors, Layer, Node, Program, Weights

PRECISIONS = (1, 2, 3, 4)


def conv(name: str, source: str, layer: str, stride: int = 1, padding: int = 0) -> Node:
    attrs = {
        "layer": layer,
        "stride": [stride, stride],
        "padding": [padding] * 4,
        "dilation": [1, 1],
        "groups": 1,
    }
    return Node(name, "conv", (source,), attrs)


def requant(
    name: str, source: str, to: str, *affine: str, clip: tuple[float | None, float | None] | None = None
) -> Node:
    attrs: dict[str, Any] = {"to": to, "affine": list(affine)}
    if clip is not None:
        attrs["clip"] = list(clip)
    return Node(name, "requant", (source,), attrs)


def rescale(name: str, source: str, *affine: str) -> Node:
    return Node(name, "rescale", (source,), {"affine": list(affine)})


def pool(name: str, op: str, source: str, kernel: int, stride: int) -> Node:
    return Node(name, op, (source,), {"kernel": [kernel] * 2, "stride": [stride] * 2, "padding": [0] * 4})


def layer(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    source_bits: int = 4,
    planes: bool = True,
    precisions: tuple[int, ...] = PRECISIONS,
    input_range: dict[int, tuple[int, int]] | None = None,
    pad_code: tuple[int, ...] = (0,),
    input_offset: tuple[float, ...] = (0.0,),
    **fields: Any,
) -> Layer:
    """A layer on the nested symmetric grid (planes) or on an 8-bit grid with a zero (resident).

    pad_code and input_offset are those of every precision.
    """
    return Layer(
        name=name,
        kind="linear" if shape[2:] == (1, 1) else "conv",
        shape=shape,
        source_bits=source_bits if planes else 8,
        planes=planes,
        weight_bits={p: min(p, source_bits) if planes else 8 for p in precisions},
        integer_form=dict.fromkeys(precisions, (2, 1) if planes else (1, 0)),
        input_range=input_range or {p: (0, (1 << p) - 1) for p in precisions},
        pad_code=dict.fromkeys(precisions, pad_code),
        input_offset=dict.fromkeys(precisions, input_offset),
        grid="strata" if planes else "lsq",
        **fields,
    )


def fill(program: Program, seed: int) -> Program:
    """Random weights and factors for every layer, precision and plan of `program`, in place."""
    rng = np.random.default_rng(seed)
    for item in program.layers.values():
        half = 1 << (item.source_bits - 1)
        codes = rng.integers(-half, half, item.shape).astype(np.int8)
        codes.flat[0], codes.flat[-1] = -half, half - 1
        program.weights[item.name] = Weights(codes, item.source_bits)
    plans = {name: list(program.affines)[:1] for name in program.plans}
    for key in (*map(str, program.precisions), *plans):
        factors = Factors()
        for name in plans.get(key, program.affines):
            channels = program.affines[name].channels
            factors.affine[name] = np.stack([rng.uniform(0.002, 0.02, channels), rng.normal(0, 0.1, channels)])
        if key not in plans:
            factors.step = {name: float(rng.uniform(0.05, 0.2)) for name in program.layers}
        program.factors[key] = factors
    return program


def plain_program(seed: int = 0, prefix: str = "") -> Program:
    """Pixels -> 8-bit resident conv -> conv (4 bits in planes) -> max pool -> linear (2 bits in planes); no plan.

    Plane sizes are no multiples of 8, so there are padding bits; `prefix` lengthens every layer's name.
    """
    stem, mid, head = (prefix + name for name in ("stem", "mid", "head"))
    pixels = dict.fromkeys(PRECISIONS, (0, 255))
    layers = (
        layer(
            stem,
            (7, 3, 3, 3),
            planes=False,
            input_range=pixels,
            pad_code=(124, 116, 104),
            input_offset=(-123.675, -116.28, -103.53),
        ),
        layer(mid, (5, 7, 3, 3)),
        layer(head, (10, 45, 1, 1), source_bits=2, input_range=pixels),
    )
    nodes = (
        Node("x", "input"),
        conv("stem.acc", "x", stem, padding=1),
        requant("mid.in", "stem.acc", mid, f"{stem}.bn", clip=(0.0, None)),
        conv("mid.acc", "mid.in", mid, padding=1),
        rescale("mid.out", "mid.acc", f"{mid}.bn"),
        pool("pooled", "maxpool", "mid.out", 2, 2),
        requant("head.in", "pooled", head, clip=(0, 6.5)),
        Node("flat", "flatten", ("head.in",)),
        conv("head.acc", "flat", head),
        rescale("logits", "head.acc", f"{head}.affine"),
    )
    return fill(
        Program(
            input_shape=(3, 6, 6),
            input_kind="pixels",
            nodes=nodes,
            output="logits",
            layers={item.name: item for item in layers},
            affines={
                f"{stem}.bn": AffineInfo(stem, 7),
                f"{mid}.bn": AffineInfo(mid, 5),
                f"{head}.affine": AffineInfo(head, 10),
            },
            precisions=PRECISIONS,
            weights={},
            factors={},
            provenance={"recipe": "strata", "seed": seed, "accuracy": [0.5, None, 1e-07], "note": "früh ✓"},
        ),
        seed,
    )


def residual_program(seed: int = 1) -> Program:
    """Floats -> 8-bit resident conv -> residual block (8 planes, served at 2, 4 and 8) -> pool -> 8-bit linear.

    Has the plan "mixed", which re-estimates one affine.
    """
    precisions = (2, 4, 8)
    signed = dict.fromkeys(precisions, (-128, 127))
    layers = (
        layer("stem", (8, 2, 3, 3), planes=False, precisions=precisions, input_range=signed),
        layer("block.conv", (8, 8, 3, 3), source_bits=8, precisions=precisions),
        layer("head", (4, 8, 1, 1), planes=False, precisions=precisions, input_range=signed),
    )
    nodes = (
        Node("x", "input"),
        conv("stem.acc", "x", "stem", padding=1),
        rescale("stream", "stem.acc", "stem.scale"),
        requant("block.in", "stream", "block.conv", "block.bn", clip=(0.0, None)),
        conv("block.acc", "block.in", "block.conv", padding=1),
        rescale("branch", "block.acc", "block.scale"),
        Node("sum", "add", ("stream", "branch")),
        pool("pooled", "avgpool", "sum", 5, 5),
        requant("head.in", "pooled", "head", "head.bn"),
        conv("head.acc", "head.in", "head"),
        rescale("logits", "head.acc", "head.scale"),
    )
    owners = {"stem.scale": "stem", "block.bn": "block.conv", "block.scale": "block.conv", "head.bn": "head"}
    channels = dict.fromkeys(owners, 8) | {"head.scale": 4}
    return fill(
        Program(
            input_shape=(2, 5, 5),
            input_kind="codes",
            nodes=nodes,
            output="logits",
            layers={item.name: item for item in layers},
            affines={name: AffineInfo(owners.get(name, "head"), count) for name, count in channels.items()},
            precisions=precisions,
            weights={},
            factors={},
            plans={"mixed": {"stem": 8, "block.conv": 4, "head": 2}},
            provenance={},
        ),
        seed,
    )


def chain_program(
    widths: list[int], source_bits: list[int], precisions: tuple[int, ...], *, resident: bool, seed: int = 2
) -> Program:
    """A chain of 1x1 layers, widths[i] -> widths[i+1]; layer i has source_bits[i] planes, the first may be resident."""
    layers, nodes, affines = [], [Node("x", "input")], {}
    for index, (inner, out) in enumerate(itertools.pairwise(widths)):
        name = f"layer{index}"
        planes = not (resident and index == 0)
        bits = dict.fromkeys(precisions, (0, 255)) if index == 0 else None
        layers.append(
            layer(
                name,
                (out, inner, 1, 1),
                source_bits=source_bits[index],
                planes=planes,
                precisions=precisions,
                input_range=bits,
            )
        )
        affines[f"{name}.bn"] = AffineInfo(name, out)
        nodes.append(conv(f"{name}.acc", nodes[-1].name, name))
        if index + 2 < len(widths):
            nodes.append(requant(f"{name}.out", nodes[-1].name, f"layer{index + 1}", f"{name}.bn"))
    nodes.append(rescale("logits", nodes[-1].name, f"{layers[-1].name}.bn"))
    program = Program(
        input_shape=(widths[0], 1, 1),
        input_kind="codes",
        nodes=tuple(nodes),
        output="logits",
        layers={item.name: item for item in layers},
        affines=affines,
        precisions=precisions,
        weights={},
        factors={},
    )
    return fill(program, seed)


def assert_same_program(found: Program, expected: Program) -> None:
    """Equality of everything but weights and factors, which `assert_same_weights` and `assert_same_factors` compare."""
    for name in ("input_shape", "input_kind", "output", "affines", "precisions", "plans", "provenance", "nodes"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.layers == expected.layers
    assert list(found.layers) == list(expected.layers)
    assert list(found.affines) == list(expected.affines)


def assert_same_weights(found: dict[str, Weights], expected: dict[str, Weights], planes: dict[str, int]) -> None:
    """`found` holds, of each layer, the first planes[layer] planes of `expected` (all of them for other layers)."""
    assert found.keys() == expected.keys()
    for name, weights in found.items():
        full = expected[name]
        bits = planes.get(name, full.bits)
        assert weights.bits == bits
        assert weights.codes.dtype == np.int8
        np.testing.assert_array_equal(weights.codes, full.codes >> (full.bits - bits))


def assert_same_factors(found: dict[str, Factors], expected: dict[str, Factors], keys: set[str]) -> None:
    """`found` holds exactly the factors `keys` of `expected`, bit for bit."""
    assert found.keys() == keys
    for key, factors in found.items():
        assert list(factors.affine) == list(expected[key].affine)
        assert factors.step == expected[key].step
        for name, array in factors.affine.items():
            assert array.dtype == np.float64
            np.testing.assert_array_equal(array, expected[key].affine[name])
