"""Native derivation equals `derive`: every constant, bound, scale and parameter, or a refusal of both."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_capi import build, succeed
from helpers_plan_text import argument, lines
from helpers_programs import (
    PRECISIONS,
    chain_program,
    conv,
    fill,
    layer,
    plain_program,
    pool,
    requant,
    rescale,
    residual_program,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.random_programs import choices, programs

from bitstrata_runtime import AffineInfo, Node, Program, ProgramError, derive
from bitstrata_runtime.artifact import write

pytestmark = pytest.mark.native

Compare = Callable[[Program, Sequence[Any]], list[str]]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs these artifacts after a power failure."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """Derives both ways at each choice and asserts equality; returns the native messages of what both refuse."""
    dump, folder, numbers = build() / "derive_dump", tmp_path_factory.mktemp("derivation"), itertools.count()

    def check(program: Program, chosen: Sequence[Any]) -> list[str]:
        path = folder / f"{next(numbers)}.strata"
        write(program, path)
        found = succeed(dump, path, *(argument(program, choice) for choice in chosen)).splitlines()
        errors = [line.removeprefix("error ") for line in found if line.startswith("error ")]
        expected = []
        for choice in chosen:
            expected.append(f"choice {argument(program, choice)}")
            try:
                expected += lines(derive(program, choice))
            except ProgramError:
                expected.append("error")
        assert ["error" if line.startswith("error ") else line for line in found] == expected
        return errors

    return check


def everything(program: Program) -> list[Any]:
    return [*program.precisions, *program.plans]


def test_programs_made_by_hand(compare: Compare) -> None:
    mixed = {"stem": 2, "block.conv": 8, "head": 4}
    assert compare(plain_program(), everything(plain_program())) == []
    assert compare(residual_program(), [*everything(residual_program()), mixed]) == []
    chain = chain_program([5, 300, 7, 3], [8, 2, 4], (1, 2, 4, 8), resident=True)
    assert compare(chain, everything(chain)) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_programs(compare: Compare, data: st.DataObject) -> None:
    program = data.draw(programs())
    compare(program, [*everything(program), data.draw(choices(program)), data.draw(choices(program))])


@pytest.mark.soak
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_random_programs(compare: Compare, data: st.DataObject) -> None:
    program = data.draw(programs(blocks=6))
    compare(program, [*everything(program), data.draw(choices(program)), data.draw(choices(program))])


def test_numbers_of_every_size(compare: Compare) -> None:
    """Gains, offsets, steps and clips far from 1: constants at the ends of their range, and beyond it."""
    rng = np.random.default_rng(0)
    refused = plans = 0
    for _ in range(60):
        program = residual_program()
        for factors in program.factors.values():
            for name, found in factors.affine.items():
                sizes = np.ldexp(1.0, rng.integers(-70, 40, found.shape)) if rng.uniform() < 0.3 else 1.0
                signs = rng.choice([-1.0, 0.0, 1.0], found.shape, p=[0.3, 0.1, 0.6])
                factors.affine[name] = found * sizes * signs
            for name in factors.step:
                factors.step[name] *= float(np.ldexp(1.0, rng.integers(-30, 30))) if rng.uniform() < 0.2 else 1.0
        clip = [None, float(rng.uniform(0, 4))] if rng.uniform() < 0.5 else [-1e30, 1e30]
        node = replace(program.nodes[2], attrs={**program.nodes[2].attrs, "clip": clip})
        program = replace(program, nodes=(*program.nodes[:2], node, *program.nodes[3:]))
        errors = compare(program, everything(program))
        refused, plans = refused + len(errors), plans + len(everything(program)) - len(errors)
    assert plans > 20
    assert refused > 20


def test_zoo_networks(compare: Compare) -> None:
    torch = pytest.importorskip("torch")
    from helpers_lowering import images, normalised, prepared

    import bitstrata as bs

    for name, options, shape in (
        ("resnet20", {"width": 8, "shortcut": "B"}, (3, 16, 16)),
        ("mobilenet_v2", {"width": 0.1, "stem": "cifar"}, (3, 16, 16)),
    ):
        torch.manual_seed(0)
        codes = images(shape, count=2)
        recipe = bs.recipes.strata(w=(1, 2, 3, 4))
        model = prepared(bs.zoo.create(name, **options), normalised(codes), recipe, pixels=True)
        program = bs.lower(model, normalised(codes))
        mixed = {item: 1 + index % 4 for index, item in enumerate(program.layers)}
        assert compare(program, [*everything(program), mixed]) == []


# What cannot be derived: the native message names the same place and cause.


def tiny(tail: tuple[Node, ...] = (), channels: int = 1, gain: float = 1.0, **fields: Any) -> Program:
    """Codes of 8 bits -> one 8-bit 1x1 layer "l" with gain -> fixed point "y" -> tail."""
    ranges = fields.pop("input_range", {8: (0, 255)})
    layers = {"l": layer("l", (2, channels, 1, 1), planes=False, precisions=(8,), input_range=ranges, **fields)}
    nodes = (Node("x", "input"), conv("c", "x", "l"), rescale("y", "c", "l.s"), *tail)
    affines = {"l.s": AffineInfo("l", 2)}
    program = Program((channels, 4, 4), "codes", nodes, nodes[-1].name, layers, affines, (8,), {}, {})
    fill(program, 0)
    program.factors["8"].affine["l.s"] = np.stack([np.full(2, gain), np.zeros(2)])
    return program


def wide_layer() -> Program:
    program = tiny(channels=1 << 13, gain=1e-6)
    layers = {"l": replace(program.layers["l"], integer_form={8: (256, 0)})}
    program.weights["l"].codes[1] = 127
    return replace(program, layers=layers)


REFUSED: dict[str, tuple[Callable[[], Program], str]] = {
    "accumulator": (wide_layer, "node 'c' (conv): accumulator overflow: layer 'l' at precision 8 can reach ["),
    "fixed point": (lambda: tiny(gain=1e9), "node 'y' (rescale): values up to"),
    "fixed point, beyond float64": (lambda: tiny(gain=1e305), "node 'y' (rescale): values up to"),
    "clip": (
        lambda: tiny((Node("k", "clip", ("y",), {"clip": [1e9, None]}),)),
        "node 'k' (clip): clip (1e+09, none) in units of",
    ),
    "pooled away": (
        lambda: tiny(
            tuple(
                Node(
                    f"p{i}",
                    "avgpool",
                    (f"p{i - 1}" if i else "y",),
                    {"kernel": [16, 16], "stride": [1, 1], "padding": [8, 7, 8, 7]},
                )
                for i in range(30)
            ),
            gain=0.0,
        ),
        "the scale of the result,",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(compare: Compare, case: str) -> None:
    make, message = REFUSED[case]
    (error,) = compare(make(), [8])
    assert message in error


def test_sums_of_codes_beyond_8_bits(compare: Compare) -> None:
    program = plain_program()
    nodes = list(program.nodes)
    nodes[3:4] = [pool("sums", "avgpool", "mid.in", 3, 1), conv("mid.acc", "sums", "mid", padding=2)]
    errors = compare(replace(program, nodes=tuple(nodes)), PRECISIONS)
    assert len(errors) == 0 or all("sums of codes can reach" in error for error in errors)
    nodes[3] = pool("sums", "avgpool", "mid.in", 5, 1)
    nodes[4] = conv("mid.acc", "sums", "mid", padding=3)
    errors = compare(replace(program, nodes=tuple(nodes)), PRECISIONS)
    assert "node 'sums' (avgpool): sums of codes can reach [0, 375], beyond the range [0, 255] of u8" in errors[-1]


def test_layers_that_share_codes_must_agree(compare: Compare) -> None:
    ranges = {p: (0, (1 << p) - 1) for p in PRECISIONS}
    layers = {name: layer(name, (2, 3, 1, 1), input_range=ranges) for name in "ab"}
    nodes = (
        Node("x", "input"),
        conv("ca", "x", "a"),
        conv("cb", "x", "b"),
        rescale("ya", "ca", "a.s"),
        rescale("yb", "cb", "b.s"),
        Node("y", "add", ("ya", "yb")),
    )
    affines = {"a.s": AffineInfo("a", 2), "b.s": AffineInfo("b", 2)}
    program = fill(Program((3, 2, 2), "codes", nodes, "y", layers, affines, PRECISIONS, {}, {}), 0)
    (error,) = compare(program, [{"a": 2, "b": 3}, {"a": 3, "b": 3}])
    assert "'a'" in error
    assert "'b'" in error


def test_unknown_choices(compare: Compare, tmp_path: Path) -> None:
    path = tmp_path / "net.strata"
    write(plain_program(), path)
    found = succeed(build() / "derive_dump", path, "bits:5", "plan:fast", "map:1,2", "map:1,2,9").splitlines()
    assert [line.split()[0] for line in found] == ["choice", "error"] * 4
    for line, text in zip(found[1::2], ("5", "fast", "head", "9"), strict=True):
        assert text in line


def test_requant_without_constants(compare: Compare) -> None:
    program = plain_program()
    program.factors["2"].affine["stem.bn"][0, 3] = 1e12
    (error,) = compare(program, PRECISIONS)
    assert "node 'mid.in' (requant): channel 3: no requantization constants: one input unit is" in error
    nodes = list(program.nodes)
    nodes[2] = requant("mid.in", "stem.acc", "mid", "stem.bn", clip=(1e6, None))
    assert len(compare(replace(program, nodes=tuple(nodes)), PRECISIONS)) == 1
