"""LSQ's worked examples at the level of quantizers, the gradient-scale helper, and ranges of four weight grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitstrata.functional.ste import grad_scale
from bitstrata.quantizers import build

WEIGHTS = [-3, -0.9, -0.4, 0.1, 0.3, 0.8, 1.4]
INPUTS = [0, 0.2, 0.6, 1.3, 1.9, 4]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_step(role: str, name: str, bits: int, step: float, **options: object):
    quantizer = build(name, role, options, bits={bits: bits}).double()
    with torch.no_grad():
        quantizer.step.fill_(step)
    if role == "activation":
        quantizer.initialized.fill_(True)
    return quantizer


@pytest.mark.parametrize(
    ("bits", "values", "mask", "scaled", "g"),
    [
        (2, [-1, -1, -0.5, 0, 0.5, 0.5, 0.5], [0, 1, 1, 1, 1, 0, 0], -0.07559289, 0.37796447),
        (3, [-2, -1, -0.5, 0, 0.5, 1, 1.5], [0, 1, 1, 1, 1, 1, 1], -0.78558440, 0.21821789),
        (4, [-3, -1, -0.5, 0, 0.5, 1, 1.5], [1, 1, 1, 1, 1, 1, 1], 0.4 * 0.14285714, 0.14285714),
    ],
)
def test_weights(bits, values, mask, scaled, g):
    quantizer = at_step("weight", "lsq", bits, 0.5)
    v = double(*WEIGHTS).requires_grad_()
    value = quantizer(v)
    value.sum().backward()
    assert value.tolist() == values
    assert quantizer.codes(v.detach()).tolist() == [int(x / 0.5) for x in values]
    assert v.grad.tolist() == mask
    assert quantizer.step.grad.item() == pytest.approx(scaled, abs=1e-8)
    assert (7 * (2 ** (bits - 1) - 1)) ** -0.5 == pytest.approx(g, abs=1e-8)


@pytest.mark.parametrize(("numel", "count"), [("sample", 6), ("batch", 12)])
def test_activations(numel, count):
    """The gradient of the step sums 5.8 a sample; N counts the features of a sample or the elements of the batch."""
    quantizer = at_step("activation", "lsq", 2, 0.5, numel=numel)
    x = double(*INPUTS).repeat(2, 1).requires_grad_()
    value = quantizer(x)
    value.sum().backward()
    assert value.tolist() == [[0, 0, 0.5, 1.5, 1.5, 1.5]] * 2
    assert x.grad.tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert quantizer.step.grad.item() == pytest.approx(2 * 5.8 / math.sqrt(3 * count))


def test_the_gradient_scale_leaves_the_value():
    p = double(0.3, -1.7, 1e-300).requires_grad_()
    scaled = grad_scale(p, 0.125)
    assert scaled.tolist() == p.tolist()
    upstream = double(1.0, -2.0, 3.0)
    scaled.backward(upstream)
    assert torch.equal(p.grad, 0.125 * upstream)


def test_ranges_of_the_two_bit_weight_grids():
    """LSQ reaches further below zero than above; UniQ and DoReFa are symmetric."""
    v = double(-5, 5)
    assert at_step("weight", "lsq", 2, 1.0)(v).tolist() == [-2, 1]
    assert at_step("weight", "uniq", 2, 1.0)(v).tolist() == [-1.5, 1.5]
    assert at_step("weight", "lsq_plus", 2, 1.0)(v).tolist() == [-2, 1]
    assert build("dorefa", "weight", {}, bits={2: 2}).double()(v).tolist() == [-1, 1]
    assert build("int8", "weight", {}, bits={2: 2}).double()(v).tolist() == [-5, 5]


def test_one_bit_lsq_is_undefined_and_one_bit_uniq_is_not():
    for name in ("lsq", "lsq_plus"):
        with pytest.raises(ValueError, match=r"undefined at 1 bit \(the largest code is 0\)"):
            build(name, "weight", {}, bits={1: 1})
    assert at_step("weight", "uniq", 1, 1.0)(double(-5, 0, 5)).tolist() == [-0.5, -0.5, 0.5]
