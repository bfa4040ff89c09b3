"""Validation: every way a program can be wrong ends in a ProgramError that says where and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers_programs import plain_program, residual_program

from bitstrata_runtime import AffineInfo, ArtifactError, Factors, Node, Program, ProgramError, Weights, derive
from bitstrata_runtime.graph import validate

Change = Callable[[Program], Program]


def test_kinds_shapes_and_grids_are_inferred():
    infos = validate(plain_program())
    found = {name: (info.kind, info.shape, info.layer) for name, info in infos.items()}
    assert found == {
        "x": ("code", (3, 6, 6), "stem"),
        "stem.acc": ("acc", (7, 6, 6), "stem"),
        "mid.in": ("code", (7, 6, 6), "mid"),
        "mid.acc": ("acc", (5, 6, 6), "mid"),
        "mid.out": ("fixed", (5, 6, 6), None),
        "pooled": ("fixed", (5, 3, 3), None),
        "head.in": ("code", (5, 3, 3), "head"),
        "flat": ("code", (45, 1, 1), "head"),
        "head.acc": ("acc", (10, 1, 1), "head"),
        "logits": ("fixed", (10, 1, 1), None),
    }


def node(name: str, /, **fields: Any) -> Change:
    """Replace fields of a node; attrs are merged, an attribute of value ... is removed."""

    def change(program: Program) -> Program:
        def edit(item: Node) -> Node:
            if item.name != name:
                return item
            attrs = {**item.attrs, **fields.get("attrs", {})}
            kept = {key: value for key, value in attrs.items() if value is not ...}
            return replace(item, **{**fields, "attrs": kept})

        return replace(program, nodes=tuple(edit(item) for item in program.nodes))

    return change


def attrs(name: str, **values: Any) -> Change:
    return node(name, attrs=values)


def layer(name: str, /, **fields: Any) -> Change:
    return lambda program: replace(program, layers={**program.layers, name: replace(program.layers[name], **fields)})


def field(**fields: Any) -> Change:
    return lambda program: replace(program, **fields)


def insert(before: str, *new: Node, **fields: Any) -> Change:
    """Add nodes in front of the node `before`."""

    def change(program: Program) -> Program:
        at = next(i for i, item in enumerate(program.nodes) if item.name == before)
        return replace(program, nodes=(*program.nodes[:at], *new, *program.nodes[at:]), **fields)

    return change


def factors(key: str, **fields: Any) -> Change:
    def change(program: Program) -> Program:
        held = program.factors[key]
        affine, step = {**held.affine, **fields.get("affine", {})}, {**held.step, **fields.get("step", {})}
        drop = fields.get("drop", ())
        affine, step = ({k: v for k, v in table.items() if k not in drop} for table in (affine, step))
        return replace(program, factors={**program.factors, key: Factors(affine, step)})

    return change


def weights(name: str, codes: Any, bits: Any) -> Change:
    return lambda program: replace(program, weights={**program.weights, name: Weights(codes, bits)})


IDENTITY = {"c": [0, 5, 1], "h": [0, 6, 1], "w": [0, 6, 1]}
POOL = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1]}
NODES: list[tuple[str, Change, str]] = [
    ("unknown operation", node("pooled", op="gelu"), r"node 'pooled' \(gelu\): unknown operation"),
    ("operation of another type", node("pooled", op=3), "unknown operation"),
    ("unknown attribute", attrs("pooled", ceil=True), r"\(maxpool\): attributes missing: \[\], unknown: \['ceil'\]"),
    ("missing attribute", attrs("pooled", kernel=...), r"attributes missing: \['kernel'\]"),
    ("empty name", node("pooled", name=""), "node name '' is not"),
    ("name twice", node("mid.out", name="mid.acc"), "node 'mid.acc' .*: another node has the same name"),
    ("missing reference", node("pooled", inputs=("nowhere",)), "input 'nowhere' is not the name of an earlier node"),
    ("forward reference", node("pooled", inputs=("logits",)), "input 'logits' is not the name of an earlier"),
    ("itself", node("pooled", inputs=("pooled",)), "input 'pooled' is not the name of an earlier"),
    ("reference of another type", node("pooled", inputs=(["x"],)), "is not the name of an earlier"),
    ("too many inputs", node("pooled", inputs=("mid.out", "mid.out")), "takes 1 inputs, has 2"),
    ("no inputs", node("pooled", inputs=()), "takes 1 inputs, has 0"),
    ("conv of fixed point", node("mid.acc", inputs=("stem.acc",)), "input 'stem.acc' is of kind 'acc', must be code"),
    ("pool of accumulators", node("pooled", inputs=("mid.acc",)), "is of kind 'acc', must be fixed or code"),
    ("requant of codes", node("head.in", inputs=("mid.in",)), "is of kind 'code', must be acc or fixed"),
    ("two inputs", insert("mid.in", Node("x2", "input")), r"exactly one 'input' node, has 2: \['x', 'x2'\]"),
    ("stride zero", attrs("mid.acc", stride=[0, 1]), r"attribute 'stride' = \[0, 1\]: must be 2 integers in \[1, "),
    ("stride of floats", attrs("mid.acc", stride=[1.0, 1]), "attribute 'stride'"),
    ("stride of truths", attrs("mid.acc", stride=[True, 1]), "attribute 'stride'"),
    ("stride a string", attrs("mid.acc", stride="11"), "attribute 'stride'"),
    ("stride too long", attrs("mid.acc", stride=[1, 1, 1]), "attribute 'stride'"),
    ("stride beyond limits", attrs("mid.acc", stride=[1, 1 << 40]), "attribute 'stride'"),
    ("negative padding", attrs("mid.acc", padding=[0, 0, -1, 0]), "attribute 'padding'"),
    ("dilation zero", attrs("mid.acc", dilation=[1, 0]), "attribute 'dilation'"),
    ("groups zero", attrs("mid.acc", groups=0), r"attribute 'groups' = 0: must be an integer in \[1, "),
    ("groups wrong", attrs("mid.acc", groups=5), "with groups = 5 takes 35 input channels"),
    ("unknown layer", attrs("mid.acc", layer="none"), "attribute 'layer' = 'none': no such layer"),
    ("layer of another type", attrs("mid.acc", layer=["mid"]), "no such layer"),
    ("layer of other channels", attrs("mid.acc", layer="stem"), "takes 3 input channels, .* the input has 7"),
    (
        "window too large",
        attrs("mid.acc", dilation=[4, 4]),
        "a window of 9 x 9 .* is larger than the padded map of 8 x 8",
    ),
    ("pool too large", attrs("pooled", kernel=[2, 7]), "a window of 2 x 7 .* is larger than the padded map of 6 x 6"),
    ("padding of all of a window", attrs("pooled", padding=[0, 2, 0, 0]), "a window could lie outside the map"),
    ("huge padding", attrs("mid.acc", padding=[1 << 15] * 4), r"the padded map \(7, 65542, 65542\) exceeds"),
    ("unknown target", attrs("mid.in", to="none"), "attribute 'to' = 'none': no such layer"),
    ("unknown affine", attrs("mid.in", affine=["none"]), "no affine 'none'"),
    ("affine a string", attrs("mid.in", affine="stem.bn"), "must be a list of names"),
    ("affine of other channels", attrs("mid.in", affine=["stem.bn", "mid.bn"]), "'mid.bn' has 5 channels, the input 7"),
    ("no affine on accumulators", attrs("mid.in", affine=[]), "the first affine must be owned by that layer"),
    ("affine of another layer", attrs("logits", affine=["alien"]), "an accumulator of layer 'head', so the first"),
    ("clip reversed", attrs("mid.in", clip=[1, 0]), r"'clip' = \[1, 0\]: the lower bound exceeds the upper"),
    ("clip infinite", attrs("mid.in", clip=[0, math.inf]), "'clip' = .* must be two numbers"),
    ("clip not a number", attrs("mid.in", clip=[math.nan, None]), "must be two numbers"),
    ("clip truth", attrs("mid.in", clip=[True, None]), "must be two numbers"),
    ("clip too short", attrs("mid.in", clip=[0]), "must be two numbers"),
    ("slice beyond", insert("pooled", Node("s", "slice", ("mid.out",), {**IDENTITY, "c": [0, 6, 1]})), "stop <= 5"),
    ("slice empty", insert("pooled", Node("s", "slice", ("mid.out",), {**IDENTITY, "h": [2, 2, 1]})), "'h' = "),
    ("slice step 0", insert("pooled", Node("s", "slice", ("mid.out",), {**IDENTITY, "w": [0, 6, 0]})), "step >= 1"),
    ("slice backwards", insert("pooled", Node("s", "slice", ("mid.out",), {**IDENTITY, "w": [5, 0, -1]})), "'w' = "),
    (
        "negative pad",
        insert("pooled", Node("p", "pad", ("mid.out",), {"c": [0, 0], "h": [-1, 0], "w": [0, 0]})),
        "attribute 'h'",
    ),
    (
        "pad beyond limits",
        insert("pooled", Node("p", "pad", ("mid.out",), {"c": [0, 0], "h": [1 << 16, 0], "w": [1 << 16, 0]})),
        r"result of shape \(5, 65542, 65542\) exceeds",
    ),
    (
        "too many channels",
        insert("pooled", Node("p", "pad", ("mid.out",), {"c": [1 << 16, 0], "h": [0, 0], "w": [0, 0]})),
        r"result of shape \(65541, 6, 6\) exceeds 65536 channels",
    ),
    (
        "sum of different shapes",
        insert("head.in", Node("sum", "add", ("mid.out", "pooled"))),
        r"different shapes: \(5, 6, 6\) and \(5, 3, 3\)",
    ),
    (
        "sum with a pooled value",
        insert("head.in", Node("mean", "avgpool", ("mid.out",), POOL), Node("sum", "add", ("mid.out", "mean"))),
        "input 'mean' was pooled with a divisor that is no power of two",
    ),
]
TABLES: list[tuple[str, Change, str]] = [
    ("unknown output", field(output="none"), "output 'none' is not the name of a node"),
    ("output of codes", field(output="head.in"), "output 'head.in' is of kind 'code', must be 'fixed'"),
    ("output of accumulators", field(output="head.acc"), "is of kind 'acc'"),
    ("unknown input kind", field(input_kind="audio"), "input_kind = 'audio'"),
    ("empty input", field(input_shape=(3, 0, 6)), "input_shape = 0: must be an integer"),
    ("flat input", field(input_shape=(3, 6)), "input_shape = .*: must be 3 integers"),
    ("no precision", field(precisions=()), "precisions = .*: must be a non-empty tuple"),
    ("unordered precisions", field(precisions=(1, 3, 2, 4)), "must ascend"),
    ("precision twice", field(precisions=(1, 1, 2, 3, 4)), "must ascend"),
    ("precision a string", field(precisions=("1",)), "precisions, entry = '1'"),
    ("a precision without bits", layer("mid", weight_bits={1: 1, 2: 2}), r"of weight_bits: missing \[3, 4\]"),
    ("an unknown precision's range", layer("mid", input_range=dict.fromkeys(range(1, 6), (0, 1))), r"unknown \[5\]"),
    ("a precision without form", layer("mid", integer_form={}), r"of integer_form: missing \[1, 2, 3, 4\]"),
    ("layer of another name", layer("mid", name="other"), "layer 'mid': its own name is 'other'"),
    ("unknown kind", layer("mid", kind="rnn"), "kind = 'rnn'"),
    ("empty shape", layer("mid", shape=(5, 0, 3, 3)), "shape = 0"),
    ("huge shape", layer("mid", shape=(65536, 65536, 3, 3)), "exceeds a kernel"),
    ("shape of the weights", layer("mid", shape=(5, 7, 3, 1)), r"shape \(5, 7, 3, 1\), are int8 \(5, 7, 3, 3\)"),
    ("bits beyond 8", layer("mid", source_bits=9), "source_bits = 9"),
    ("bits beyond the source", layer("mid", weight_bits={1: 1, 2: 2, 3: 3, 4: 5}), r"weight_bits\[4\] = 5"),
    ("no bits", layer("mid", weight_bits={1: 0, 2: 2, 3: 3, 4: 4}), r"weight_bits\[1\] = 0"),
    ("mul zero", layer("mid", integer_form=dict.fromkeys((1, 2, 3, 4), (0, 1))), r"integer_form\[1\], mul = 0"),
    ("mul beyond", layer("mid", integer_form=dict.fromkeys((1, 2, 3, 4), (257, 1))), r"integer_form\[1\] = 257"),
    ("add beyond", layer("mid", integer_form=dict.fromkeys((1, 2, 3, 4), (1, -257))), r"integer_form\[1\] = -257"),
    ("wide weights", layer("stem", integer_form=dict.fromkeys((1, 2, 3, 4), (256, -1))), r"\[-32769, .*beyond int16"),
    ("add a float", layer("mid", integer_form=dict.fromkeys((1, 2, 3, 4), (1, 0.5))), r"integer_form\[1\] = 0.5"),
    ("range reversed", layer("mid", input_range=dict.fromkeys((1, 2, 3, 4), (3, 0))), "must ascend"),
    ("range of no type", layer("mid", input_range=dict.fromkeys((1, 2, 3, 4), (-1, 128))), "within uint8 or int8"),
    ("range beyond", layer("mid", input_range=dict.fromkeys((1, 2, 3, 4), (0, 256))), r"input_range\[1\] = 256"),
    ("range of other pixels", layer("stem", input_range=dict.fromkeys((1, 2, 3, 4), (0, 254))), r"reads pixels"),
    (
        "pad code out of range",
        layer("mid", pad_code={1: (1,), 2: (4,), 3: (0,), 4: (0,)}),
        r"pad_code\[2\] \(within the input_range\) = 4: must be an integer in \[0, 3\]",
    ),
    (
        "pad codes of other channels",
        layer("mid", pad_code={1: (0,), 2: (0, 0), 3: (0,), 4: (0,)}),
        r"pad_code\[2\] has 2 entries, the input 7 channels",
    ),
    ("no pad code", layer("mid", pad_code=dict.fromkeys((1, 2, 3, 4), ())), r"pad_code\[1\] = \(\): must be a non-"),
    ("a precision without pad code", layer("mid", pad_code={1: (0,)}), r"precisions of pad_code: missing \[2, 3, 4\]"),
    ("a precision without offset", layer("mid", input_offset={}), "precisions of input_offset: missing"),
    ("no offset", layer("mid", input_offset=dict.fromkeys((1, 2, 3, 4), ())), r"input_offset\[1\] = \(\): must be"),
    (
        "an offset a channel inside",
        layer("mid", input_offset={**dict.fromkeys((1, 2, 3), (0.5,)), 4: (0.5,) * 7}),
        r"node 'mid.in': .* layer 'mid', whose input_offset\[4\] has 7 entries; only the network's input may",
    ),
    (
        "offset not finite",
        layer("stem", input_offset=dict.fromkeys((1, 2, 3, 4), (math.nan,))),
        r"input_offset\[1\] = \(nan,\): must be a non-empty tuple of finite numbers",
    ),
    (
        "offsets of other channels",
        layer("stem", input_offset=dict.fromkeys((1, 2, 3, 4), (1.0, 2.0))),
        r"input_offset\[1\] has 2 entries",
    ),
    ("owner unknown", field(affines={"a": AffineInfo("none", 1)}), "affine 'a': its owner 'none' is not a layer"),
    ("affine without channels", field(affines={"a": AffineInfo("mid", 0)}), "affine 'a': channels = 0"),
    ("no weights", field(weights={}), r"weights: missing \['stem', 'mid', 'head'\]"),
    ("weights of floats", weights("mid", np.zeros((5, 7, 3, 3)), 4), "must be an int8 array"),
    ("weights a list", weights("mid", [1], 4), "are list"),
    ("weights beyond their bits", weights("mid", np.full((5, 7, 3, 3), -5, np.int8), 3), "from -5 to -5, beyond 3"),
    ("more bits than the layer", weights("mid", np.zeros((5, 7, 3, 3), np.int8), 5), "weights: bits = 5"),
    ("unknown factors", field(factors={"9": Factors()}), "factors '9': is neither a precision of"),
    ("step missing", factors("2", drop=("mid",)), r"factors '2': step: missing \['mid'\]"),
    ("affine missing", factors("2", drop=("mid.bn",)), r"factors '2': affine: missing \['mid.bn'\]"),
    ("step zero", factors("2", step={"mid": 0.0}), "step of layer 'mid' = 0.0"),
    ("step negative", factors("2", step={"mid": -1.0}), "step of layer 'mid' = -1.0"),
    ("step not a number", factors("2", step={"mid": math.nan}), "step of layer 'mid' = nan"),
    ("step infinite", factors("2", step={"mid": math.inf}), "step of layer 'mid' = inf"),
    ("affine infinite", factors("2", affine={"mid.bn": np.full((2, 5), np.inf)}), "entries that are not finite"),
    ("affine not a number", factors("2", affine={"mid.bn": np.full((2, 5), np.nan)}), "entries that are not finite"),
    ("affine of another shape", factors("2", affine={"mid.bn": np.zeros((2, 4))}), r"\(2, 5\), is float64 \(2, 4\)"),
    ("affine of another type", factors("2", affine={"mid.bn": np.zeros((2, 5), "f4")}), "must be a float64 array"),
    ("plan of a number", field(plans={"2": {}}), "plan '2': its name must be"),
    ("plan incomplete", field(plans={"p": {"mid": 1}}), r"plan 'p': .*missing \['stem', 'head'\]"),
    ("plan of no precision", field(plans={"p": dict.fromkeys(("stem", "mid", "head"), 5)}), "no precision 5"),
]


def alien(program: Program) -> Program:
    """The program with one more affine that no node uses."""
    program = replace(program, affines={**program.affines, "alien": AffineInfo("mid", 10)})
    for held in program.factors.values():
        held.affine["alien"] = np.zeros((2, 10))
    return program


@pytest.mark.parametrize(("change", "message"), [pytest.param(*case[1:], id=case[0]) for case in NODES])
def test_wrong_nodes_are_errors(change, message):
    program = alien(plain_program())
    derive(program, 2)
    with pytest.raises(ProgramError, match=message):
        derive(change(program), 2)


@pytest.mark.parametrize(("change", "message"), [pytest.param(*case[1:], id=case[0]) for case in TABLES])
def test_wrong_tables_are_errors(change, message):
    with pytest.raises(ProgramError, match=message):
        derive(change(plain_program()), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (factors("mixed", step={"head": 1.0}), r"factors 'mixed': step \(a plan .* unknown \['head'\]"),
        (factors("mixed", affine={"none": np.zeros((2, 1))}), r"factors 'mixed': affine: .*\['none'\]"),
    ],
)
def test_wrong_factors_of_a_plan_are_errors(change, message):
    with pytest.raises(ProgramError, match=message):
        derive(change(residual_program()), 2)


def test_an_input_that_no_layer_reads_is_an_error():
    program = plain_program()
    with pytest.raises(ProgramError, match=r"node 'x' \(input\): no conv reads it"):
        validate(replace(program, nodes=program.nodes[:1], output="x"))


def test_the_sum_of_all_products_is_limited():
    program = plain_program()
    nodes = [Node(f"again{i}", "conv", ("x",), program.nodes[1].attrs) for i in range(500)]
    with pytest.raises(ProgramError, match="multiply-accumulates an image exceed the limit"):
        validate(replace(program, input_shape=(3, 4000, 4000), nodes=(program.nodes[0], *nodes)))


def test_one_exception_type_covers_all():
    assert issubclass(ProgramError, ArtifactError)
    assert issubclass(ArtifactError, ValueError)
