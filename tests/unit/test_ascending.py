"""The ascending weight quantizer: codes, values and gradients against scalar closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.quantizers import build
from bitstrata.quantizers.ascending import AscendingWeight

BITS = {2: 2, 3: 3, 4: 4}
W = [-5.0, -2.0, -1.3, -1.0, -0.75, -0.5, -0.3, 0.0, 0.1, 0.25, 0.375, 0.6, 1.0, 1.1, 4.0]


def quantizer(weight: Tensor, step: float = 1.0, bits: dict[int, int] | None = None) -> AscendingWeight:
    made = AscendingWeight(bits or BITS).to(weight.dtype)
    made.init_(weight)
    with torch.no_grad():
        made.step.fill_(step)
    for p in made.bits:
        made.start_planes_(weight, p)
    return made


def weight() -> Tensor:
    return torch.tensor(W, dtype=torch.float64)


def at(made: AscendingWeight, p: int) -> AscendingWeight:
    made.precision = p
    return made


def test_codes_follow_the_recursion_from_given_planes():
    made, w = quantizer(weight()), weight()
    first = torch.tensor([0.5, -0.5, 0.0, 1e-9] * 4, dtype=torch.float64)[:15]
    second = torch.tensor([-1.0, 2.0, 3.0] * 5, dtype=torch.float64)
    with torch.no_grad():
        made.planes["3"].copy_(first)
        made.planes["4"].copy_(second)
    base = [max(-2, min(1, round(v))) for v in W]  # Python rounds half to even too
    bit1 = [int(v > 0) for v in first.tolist()]  # zero counts as 0
    bit2 = [int(v > 0) for v in second.tolist()]
    assert at(made, 2).codes(w).tolist() == base
    assert at(made, 3).codes(w).tolist() == [2 * c + b for c, b in zip(base, bit1, strict=True)]
    assert at(made, 4).codes(w).tolist() == [4 * c + 2 * b + d for c, b, d in zip(base, bit1, bit2, strict=True)]


def test_codes_nest_by_shift_and_values_are_those_of_the_grid():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, 3, 3, generator=generator)
    made = AscendingWeight(BITS, channels=6)
    made.init_(w)
    with torch.no_grad():
        for plane in made.planes.values():
            plane.copy_(torch.randn(plane.shape, generator=generator))
    codes = {p: at(made, p).codes(w) for p in BITS}
    assert torch.equal(codes[4] >> 1, codes[3])
    assert torch.equal(codes[4] >> 2, codes[2])
    for p in BITS:
        grid = at(made, p).grid(w)
        assert (grid.lo, grid.hi, grid.offset) == (-(2 ** (p - 1)), 2 ** (p - 1) - 1, 0.0)
        assert torch.equal(grid.scale, made.step.detach() * 2.0 ** (2 - p))
        assert codes[p].dtype == torch.int32
        assert int(codes[p].min()) >= grid.lo
        assert int(codes[p].max()) <= grid.hi
        assert torch.equal(made(w), grid.dequantize(codes[p]))


def test_planes_start_at_the_nearest_of_the_two_values():
    w = weight()
    made = quantizer(w)
    for p in (3, 4):
        lower = at(made, p - 1)(w).detach()
        fine = 2.0 ** (2 - p)
        taken = at(made, p)(w).detach()
        other = torch.where(taken == lower, lower + fine, lower)
        assert bool(((taken - w).abs() <= (other - w).abs()).all())
    assert at(made, 3)(w).tolist()[-4:] == [1.0, 1.0, 1.0, 1.5]


def test_the_first_plane_starts_as_the_distance_from_the_middle():
    w = weight()
    plane = quantizer(w).planes["3"]
    base = [max(-2, min(1, round(v))) for v in W]
    assert plane.tolist() == pytest.approx([v - (c + 0.25) for v, c in zip(W, base, strict=True)])


@pytest.mark.parametrize("p", [2, 3, 4])
def test_gradients_by_hand(p):
    step = 0.5
    w = (weight() * 0.5).requires_grad_()
    made = at(quantizer(w.detach(), step), p)
    upstream = torch.linspace(-1, 2, len(W), dtype=torch.float64)
    (made(w) * upstream).sum().backward()
    scale = (len(W) * 1) ** -0.5
    total = 0.0
    for i, (v, g) in enumerate(zip(W, upstream.tolist(), strict=True)):  # v = w / step
        code = max(-2, min(1, round(v)))
        inside = -2 <= v <= 1
        bits = [float(made.planes[str(k)][i] > 0) for k in range(3, p + 1)]
        fraction = sum(b / 2 ** (j + 1) for j, b in enumerate(bits))
        total += g * (code - (v if inside else 0.0) + fraction)
        assert w.grad[i].item() == (g if inside else 0.0)
        for j, k in enumerate(range(3, p + 1)):
            assert made.planes[str(k)].grad[i].item() == pytest.approx(g * step / 2 ** (j + 1), rel=1e-12)
    assert made.step.grad.item() == pytest.approx(scale * total, rel=1e-9)
    assert all(made.planes[str(k)].grad is None for k in range(p + 1, 5))


def test_gradients_a_channel_are_those_of_channels_alone():
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    made = AscendingWeight(BITS, channels=3).double()
    made.init_(w)
    made(w).square().sum().backward()
    for row in range(3):
        one = AscendingWeight(BITS).double()
        one.init_(w[row])
        one(w[row]).square().sum().backward()
        assert made.step.grad[row].item() == pytest.approx(one.step.grad.item(), rel=1e-12)
        torch.testing.assert_close(made.planes["4"].grad[row], one.planes["4"].grad)


def test_init_of_the_base_step():
    w = weight()
    made = AscendingWeight(BITS).double()
    made.init_(w)
    assert made.step.item() == pytest.approx(2 * w.abs().mean().item())  # Q_P = 1
    fixed = AscendingWeight(BITS, init=0.125).double()
    fixed.init_(w)
    assert fixed.step.item() == 0.125


def test_parameters_keep_their_identity_when_set_again():
    made = AscendingWeight(BITS)
    planes = list(made.planes.values())
    made.init_(torch.randn(4, 3))
    made.init_(torch.randn(4, 3))
    assert all(a is b for a, b in zip(planes, made.planes.values(), strict=True))
    assert {p.shape for p in planes} == {(4, 3)}


def test_enhancements_belong_to_the_precision_that_adds_them():
    made = quantizer(weight())
    assert {p: len(g) for p, g in made.enhancement_parameters().items()} == {2: 0, 3: 1, 4: 1}
    gap = quantizer(weight(), bits={2: 2, 5: 5})
    assert [len(g) for g in gap.enhancement_parameters().values()] == [0, 3]
    assert at(gap, 5).codes(weight()).shape == (15,)
    edge = quantizer(weight(), bits={2: 8, 4: 8})
    assert [len(g) for g in edge.enhancement_parameters().values()] == [0, 0]
    assert made.precision_parameters() == {}


def test_a_zero_or_negative_step_counts_as_the_smallest_one():
    w = weight()
    made = quantizer(w, step=-1.0)
    value = made(w)
    value.sum().backward()
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(made.step.grad).all())
    assert float(made.grid(w).scale) > 0


def test_refusals():
    with pytest.raises(ValueError, match=r"^AscendingWeight: the narrowest width must be 2 or more .*, got 1$"):
        AscendingWeight({1: 1, 2: 2})
    with pytest.raises(ValueError, match=r"^AscendingWeight: init must be one of"):
        AscendingWeight(BITS, init="best")
    made = AscendingWeight(BITS)
    with pytest.raises(ValueError, match=r"planes are for a weight of shape \(0,\), got \(4, 3\); init_ sets them up$"):
        made(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"^AscendingWeight: 5 is not among the precisions \(2, 3, 4\)$"):
        made.start_planes_(torch.randn(4, 3), 5)
    assert isinstance(build("ascending", "weight", {"init": "mse"}, bits=BITS), AscendingWeight)


def test_a_state_sets_up_a_quantizer_that_saw_no_weight():
    made = quantizer(weight())
    fresh = AscendingWeight(BITS).double()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(weight()), made(weight()))


def test_state_goes_to_another_model():
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = nn.Linear(6, 4, bias=False)
        model = nn.Sequential(layer)
        layer.weight_quant = AscendingWeight(BITS)
        layer.weight_quant.init_(layer.weight)
        return model

    one, other = network(0), network(1)
    other.load_state_dict(one.state_dict())
    x = one[0].weight.detach()
    assert torch.equal(one[0].weight_quant(x), other[0].weight_quant(x))
    assert torch.equal(other[0].weight_quant.planes["4"], one[0].weight_quant.planes["4"])


def test_half_precision_weights_keep_their_dtype():
    made = AscendingWeight(BITS)
    made.init_(torch.randn(4, 3))
    assert made(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16
    assert bs.quantizers.describe("ascending", "weight").options == ("init",)
