"""Weight standardization: worked examples of MaQD's eq. 4, its gradient and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitstrata.quantizers import build_transform, names


def standardize(**options: object):
    return build_transform("standardize", options)


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_it_is_registered():
    assert "standardize" in names("transform")
    assert repr(standardize()) == "Standardize(eps_ws=0.0001, ws_scale='unit')"


def test_worked_examples():
    w = double([1, 2, 3, 6], [0, 0, 0, 4])
    expected = double([-1.06904497, -0.53452248, 0, 1.60356745], [-0.57735027] * 3 + [1.73205081])
    torch.testing.assert_close(standardize(eps_ws=0.0)(w), expected, rtol=0, atol=1e-8)
    row = double([-1.06904115, -0.53452057, 0, 1.60356172])
    torch.testing.assert_close(standardize()(w)[:1], row, rtol=0, atol=1e-8)


def test_fan_in_leaves_out_the_root_of_the_fan_in():
    w = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    unit, literal = standardize()(w), standardize(ws_scale="fan_in")(w)
    torch.testing.assert_close(literal * 36**0.5, unit, rtol=1e-12, atol=0)
    assert float(unit.flatten(1).std(dim=1, correction=0).sub(1).abs().max()) < 1e-4


def test_rows_stand_alone_and_layouts_do_not_matter():
    w = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    rule = standardize()
    assert torch.equal(rule(w)[2:3], rule(w[2:3]))
    torch.testing.assert_close(rule(w.to(memory_format=torch.channels_last)), rule(w), rtol=1e-12, atol=1e-14)
    wide = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(rule(wide[:, ::2]), rule(wide[:, ::2].contiguous()), rtol=1e-12, atol=1e-14)


def test_the_gradient_flows_through_mean_and_variance():
    w = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"eps_ws": 0.0}, {"ws_scale": "fan_in"}):
        assert torch.autograd.gradcheck(standardize(**options), (w,), eps=1e-6, atol=1e-6)
    standardize(eps_ws=0.0)(w).pow(3).sum().backward()
    grad = w.grad
    assert float(grad.abs().max()) > 0.1
    assert float(grad.sum(dim=1).abs().max()) < 1e-9
    assert float((grad * w.detach()).sum(dim=1).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_channels_become_zero(dtype):
    w = torch.zeros(3, 9, dtype=dtype)
    w[1] = 0.5
    w[2] = torch.arange(9.0)
    w.requires_grad_()
    out = standardize()(w)
    out.sum().backward()
    assert out.dtype == dtype
    assert out[:2].abs().max() == 0
    assert bool(out.isfinite().all())
    assert bool(w.grad.isfinite().all())
    assert float(standardize()(torch.full((2, 9), 0.1)).abs().max()) < 1e-5  # the mean of nine 0.1 is not 0.1


def test_half_precision_is_rounded_once():
    w = torch.randn(2, 600).to(torch.bfloat16)
    assert torch.equal(standardize()(w), standardize()(w.float()).to(torch.bfloat16))


def test_errors():
    with pytest.raises(ValueError, match=r"Standardize: eps_ws must be finite and at least 0, got -1\.0"):
        standardize(eps_ws=-1.0)
    with pytest.raises(ValueError, match=r"Standardize: eps_ws must be finite and at least 0, got nan"):
        standardize(eps_ws=float("nan"))
    with pytest.raises(ValueError, match=r"Standardize: ws_scale must be 'unit' or 'fan_in', got 'root'"):
        standardize(ws_scale="root")
    for shape in ((6,), (6, 1), (6, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"Standardize: a weight of shape \(6,.*\) has fewer than two elements"):
            standardize()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"transform 'standardize' has no option 'gain'"):
        standardize(gain=1)
