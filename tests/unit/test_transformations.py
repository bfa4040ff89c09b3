"""The papers' inference forms, from trained networks to integers: closed forms, exhaustively over what can occur."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from helpers_passes import lowered, trained
from numpy.typing import NDArray

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli.info import operations_of
from bitstrata.functional.vertical import vertical_offset
from bitstrata.lowering.factors import integer_form
from bitstrata.nn.norm import PrecisionBatchNorm
from bitstrata_runtime.artifact import Artifact
from bitstrata_runtime.attrs import clip_bounds
from bitstrata_runtime.lookup import as_tables
from bitstrata_runtime.operations import Operations, count
from bitstrata_runtime.plan import Conv, Plan, Requant, Thresholds, Value
from bitstrata_runtime.planes import pack_plane, unpack_plane
from bitstrata_runtime.reference import ReferenceExecutor, conv
from bitstrata_runtime.thresholds import as_thresholds

Ints = NDArray[np.int64]


def behind_convolutions(plan: Plan) -> list[tuple[Conv, Thresholds]]:
    """Convolutions and the thresholds that read their sums."""
    sources = {op.output: op for op in plan.ops if isinstance(op, Conv)}
    return [(sources[op.inputs[0]], op) for op in plan.ops if isinstance(op, Thresholds) and op.inputs[0] in sources]


def codes_at(op: Thresholds, x: Ints) -> Ints:
    """(entries, C) codes of all channels at every x."""
    return op.base + op.sign * (x[:, None, None] > op.after).sum(axis=1)


# SAT, appendix S7


@pytest.mark.parametrize(("name", "bits"), [("resnet20", 2), ("mobilenet_v2", 4)])
def test_batch_normalization_is_a_bias_and_a_clipping_level(name: str, bits: int) -> None:
    """m = round(k clip(x + B, min(0, C), max(0, C))), B = beta / gamma c, C = alpha / gamma c, at every sum x."""
    options = {"width": 4} if name == "resnet20" else {"width": 0.25, "stem": "cifar"}
    program, _ = lowered(bs.recipes.sat(bits), name, **options)
    plan = as_thresholds(runtime.derive(program, bits))
    nodes = {node.name: node for node in program.nodes}
    factors, top, checked = program.factors[str(bits)], 2**bits - 1, 0
    for layer, op in behind_convolutions(plan):
        (affine,) = nodes[op.name].attrs["affine"]
        gain, beta = factors.affine[affine]  # gamma c and beta, SAT's layer scale included
        alpha = factors.step[nodes[op.name].attrs["to"]] * top
        level = min(alpha, clip_bounds(nodes[op.name])[1] or alpha)  # of a ReLU6, where that is lower
        lo, hi = plan.values[layer.output].lo, plan.values[layer.output].hi
        x = np.unique(np.linspace(lo, hi, min(hi - lo + 1, 2000)).round().astype(np.int64))
        safe = np.where(gain == 0, 1.0, gain)
        shift, end = beta / safe, level / safe
        product = top / alpha * safe * np.clip(x[:, None] + shift, np.minimum(end, 0), np.maximum(end, 0))
        product = np.where(gain == 0, top / alpha * np.clip(beta, 0, level), product)
        near = np.abs(product - np.floor(product) - 0.5) < 1e-6  # within the rounding of the constants
        assert near.mean() < 0.01
        assert ((codes_at(op, x) == np.floor(product + 0.5)) | near).all()
        checked += x.size * gain.size
        assert (gain < 0).any()
        assert (gain == 0).any()
    assert checked > 10_000


def test_the_layer_scale_of_sat_leaves_no_operation() -> None:
    program, _ = lowered(bs.recipes.sat(2, convs="all"), "resnet20", width=4)
    plan = runtime.derive(program, 2)
    kinds = Counter(type(op).__name__ for op in plan.ops)
    bare, _ = lowered(bs.recipes.sat(2, rescale=None), "resnet20", width=4)
    assert kinds == Counter(type(op).__name__ for op in runtime.derive(bare, 2).ops)
    # A scale of the logits changes what one unit of them means, and no integer.
    head = program.nodes[-1]
    doubled = dict(program.factors["2"].affine)
    (affine,) = head.attrs["affine"]
    doubled[affine] = doubled[affine] * 2
    program.factors["2"].affine.update(doubled)
    other = runtime.derive(program, 2)
    a, b = plan.ops[-1], other.ops[-1]
    assert isinstance(a, Requant)
    assert isinstance(b, Requant)
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("multiplier", "bias", "shift"))
    assert other.values[other.output].scale == 2 * (plan.values[plan.output].scale or 0)


# MaQD


@pytest.mark.parametrize(("m_w", "m_a"), [(3, 2), (15, 4), (255, 8)])
def test_layer_batch_normalization_is_merged_into_thresholds(m_w: int, m_a: int) -> None:
    """x > T for gamma > 0, x < T for gamma < 0, T = D (mu + (level - beta) sd / gamma): MaQD section 3.3."""
    model, _ = trained(bs.recipes.maqd(m_w, m_a), width=4)
    program = bs.lower(model, torch.zeros(1, 3, 32, 32))
    plan = as_thresholds(runtime.derive(program, program.precisions[0]))
    found = behind_convolutions(plan)
    layers = dict(model.named_modules())
    norms = {m.owner: m.level for m in model.modules() if isinstance(m, PrecisionBatchNorm)}
    assert len(found) > 10
    for layer, op in found[1:]:  # the first layer reads pixels
        assert op.after.shape[0] == m_a - 1
        norm, module = norms[layer.layer], layers[layer.layer]
        mean, sd = float(norm.running_mean), float((norm.running_var + norm.eps).sqrt())
        gamma, beta = (v.detach().double().numpy() for v in (norm.weight, norm.bias))
        pool = 1 if module.input_pool is None else module.input_pool.kernel_size**2  # sums of codes, not averages
        unit = 2 / (m_w - 1) / (m_a - 1) / pool
        lo, hi = plan.values[layer.output].lo, plan.values[layer.output].hi
        x = np.unique(np.linspace(lo, hi, min(hi - lo + 1, 500)).round().astype(np.int64))
        levels = (np.arange(1, m_a) - 0.5) / (m_a - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            limit = (mean + (levels[:, None] - beta) * sd / gamma) / unit
        up, down = x[:, None, None] > limit, x[:, None, None] < limit
        fires = np.where(gamma > 0, up, np.where(gamma < 0, down, beta > levels[:, None]))
        near = (np.abs(x[:, None, None] - limit) < 1e-6 * np.abs(limit)).any(axis=1)
        assert ((codes_at(op, x) == fires.sum(axis=1)) | near).all()
        assert near.mean() < 0.01


# Vertical layering


def test_compensation_in_integers_for_every_code_and_width() -> None:
    for bits in range(2, 9):
        codes = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
        for width in range(2, bits + 1):
            z, (mul, add) = vertical_offset(bits, width), integer_form(vertical_offset(bits, width), "w")
            k = bits - width
            assert (mul, add) == ((2 ** (k + 1), 2**k - 1) if k else (1, 0))
            upper = codes >> k
            assert (mul * upper + add == mul * (upper + z)).all()  # exact: z is a binary fraction
            # z is the mean of what the dropped bits stand for
            assert all(2**k * (c + z) == codes[upper == c].mean() for c in np.unique(upper))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_compensation_is_a_box_sum_that_all_outputs_of_a_group_share(groups: int) -> None:
    rng, (mul, add) = np.random.default_rng(groups), (8, 3)
    codes = rng.integers(-2, 2, (8, 4 // groups, 3, 3)).astype(np.int8)
    x = rng.integers(0, 16, (2, 7, 6, 4)).astype(np.int64)
    rest = ((2, 1), (1, 1, 1, 1), (1, 1), groups, np.array([0, 1, 2, 3], np.int32))
    whole, plain, box = (
        conv(Conv("c", (0,), 1, "c", c, m, a, *rest), x)
        for c, m, a in ((codes, mul, add), (codes, 1, 0), (np.zeros_like(codes), 1, 1))
    )
    assert np.array_equal(whole, mul * plain + add * box)
    shared = box.reshape(*box.shape[:3], groups, -1)
    assert (shared == shared[..., :1]).all()


# UniQ and the nested symmetric grid


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_is_a_sum_of_planes_of_one_and_minus_one(bits: int) -> None:
    codes = np.arange(-(1 << (bits - 1)), 1 << (bits - 1)).astype(np.int8)
    planes = [
        2 * unpack_plane(pack_plane(codes, bits, i), codes.shape, "w").astype(np.int64) - 1 for i in range(1, bits + 1)
    ]
    for width in range(1, bits + 1):  # the first planes are the narrower code's
        upper = codes.astype(np.int64) >> (bits - width)
        assert (2 * upper + 1 == sum(2 ** (width - 1 - i) * planes[i] for i in range(width))).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_convolution_is_a_sum_of_convolutions_with_planes(bits: int) -> None:
    """Products with a plane count ones: sum p a = 2 popcount(digit and a) - sum a for inputs of one bit."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 3, 3, 3)).astype(np.int8)
    x = rng.integers(0, 2, (2, 6, 6, 3)).astype(np.int64)
    rest = ((1, 1), (1, 1, 1, 1), (1, 1), 1, np.zeros(3, np.int32))
    whole = conv(Conv("c", (0,), 1, "c", codes, 2, 1, *rest), x)
    total = np.zeros_like(whole)
    for i in range(1, bits + 1):
        digits = unpack_plane(pack_plane(codes, bits, i), codes.shape, "w")
        plane, ones = (
            conv(Conv("c", (0,), 1, "c", digits, 2, -1, *rest), x),
            conv(Conv("c", (0,), 1, "c", digits, 1, 0, *rest), x),
        )
        box = conv(Conv("c", (0,), 1, "c", np.ones_like(digits), 1, 0, *rest), x)
        assert np.array_equal(plane, 2 * ones - box)
        total += 2 ** (bits - i) * plane
    assert np.array_equal(whole, total)
    value = Value("x", (6, 6, 3), "u8", 0, 1), Value("out", whole.shape[1:], "i32", -9999, 9999, 1.0)
    plan = Plan(value, (Conv("c", (0,), 1, "c", codes, 2, 1, *rest),), 0, 1, 1.0, (0.0,))
    assert np.array_equal(ReferenceExecutor(plan).run(x.astype(np.uint8)), whole)
    for isa in runtime.available_isas():
        from bitstrata_runtime.engine import EngineExecutor

        assert np.array_equal(EngineExecutor(plan, isa=isa).run(x.astype(np.uint8)), whole), isa


# From training to a device


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (bs.recipes.sat(2), "resnet20"),
        (bs.recipes.maqd(3, 2), "maqd_vgg"),
        (bs.recipes.vertical((2, 3)), "resnet20"),
        (bs.recipes.uniq(1, warmup=False), "resnet20"),
    ],
    ids=["sat", "maqd", "vertical", "uniq"],
)
def test_every_form_is_lowered_packed_run_and_verified(recipe: bs.Recipe, name: str, tmp_path) -> None:
    model, images = trained(recipe, name, width=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = bs.lower(model, torch.zeros(1, 3, 32, 32))
    bs.pack(program, tmp_path / "m.strata")
    passes = (lambda plan: as_thresholds(plan, 255), as_tables)
    for bits in program.precisions:
        plain = runtime.load(tmp_path / "m.strata", bits=bits, executor="oracle")
        session = runtime.load(tmp_path / "m.strata", bits=bits, passes=passes)
        assert np.array_equal(session.run(images), plain.run(images))
        counted = [sum(count(plan).values(), Operations()) for plan in (session.plan, plain.plan)]
        assert counted[0].rescalings < counted[1].rescalings
    shown = operations_of(Artifact.open(tmp_path / "m.strata"))[-1]  # as `bitstrata info --operations` has it
    assert (shown["form"], shown["rescalings"]) == ("comparison, table", counted[0].rescalings)
    assert (shown["multiplications"] == 0) == (recipe.name == "maqd")
    report = bs.verify(model, program, images[:1], passes=passes)
    assert report.ok, str(report)
