"""Channel ranges of gradients, and norms of what normalizations read, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.diagnostics import LayerRanges, gradient_ranges, norm_statistics, plot_norms, plot_ranges
from bitstrata.diagnostics.norms import channel_norms
from bitstrata.diagnostics.plot_layers import chosen
from bitstrata.diagnostics.ranges import BINS
from bitstrata.fused import fuse
from bitstrata.nn import L1BatchNorm2d

GOLDEN = [8, 5, 4, 3.9, 2.1, 2, 1, 0.9, 0.5, 0.1, 0]


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def of_gradient(gradient: Tensor, groups: int = 4) -> LayerRanges:
    """What is found for a layer at whose output this gradient arrives."""
    layer = nn.Linear(2, gradient.shape[1])
    loss = lambda m, x: (m(x) * gradient).sum()  # noqa: E731
    return gradient_ranges(layer, loss, torch.randn(len(gradient), 2), groups=groups)[""]


def test_ranges_and_groups_of_a_known_gradient() -> None:
    order = torch.randperm(len(GOLDEN), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(GOLDEN)[order] * torch.tensor([[0.25], [-1.0], [0.0]])
    found = of_gradient(rows)
    assert found.largest == 8
    assert found.ranges == pytest.approx([r / 8 for r in GOLDEN])
    assert found.groups == (0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3)
    used = GOLDEN[:-1]
    assert found.diversity == pytest.approx(sum(8 / r for r in used) / 10)
    tops = [8, 8, 4, 4, 4, 2, 1, 1, 1, 1]
    assert found.grouped == pytest.approx(sum(t / r for t, r in zip(tops, used, strict=True)) / 10)
    assert sum(found.counts) == 33
    assert found.counts[0] == 1  # -8
    assert found.counts[BINS // 2 + round(2 / 8 * BINS / 2)] >= 1  # 8 / 4
    small = sum(abs(g) / 8 < 1 / BINS for g in rows.flatten().tolist())
    assert found.near_zero() == pytest.approx(small / 33)
    assert of_gradient(rows, groups=1).grouped == pytest.approx(found.diversity)


def test_a_gradient_of_zeros_and_the_run_with_the_largest() -> None:
    zero = of_gradient(torch.zeros(4, 3))
    assert (zero.largest, zero.ranges, zero.groups, zero.diversity, zero.grouped) == (0, (0,) * 3, (3,) * 3, 1, 1)
    assert zero.near_zero() == 1
    layer = nn.Linear(2, 2)
    g = torch.tensor([[1.0, -3.0]])
    twice = gradient_ranges(layer, lambda m, x: (m(x) * g).sum() - 5 * (m(x) * g).sum(), torch.ones(1, 2))[""]
    assert twice.largest == 15
    assert twice.ranges == pytest.approx((1, 1 / 3))


def test_ranges_of_a_network_leave_it_alone_and_name_what_is_wrong() -> None:
    model = network().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = gradient_ranges(model, entropy, batch(), training=True)
    assert list(found) == ["0", "3", "8"]
    assert [layer.channels for layer in found.values()] == [6, 5, 3]
    assert all(1 <= layer.grouped <= layer.diversity for layer in found.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"gradient_ranges: groups must be an integer in 1\.\.8, got 9"):
        gradient_ranges(model, entropy, batch(), groups=9)
    with pytest.raises(ValueError, match="gradient_ranges: the gradient at layer '8' contains NaN or infinity"):
        gradient_ranges(model, lambda m, b: entropy(m, b) * math.inf, batch())


def test_norms_of_known_channels() -> None:
    """x = 1, 2, 4, 9: mean 4, deviations -3, -2, 0, 5; the second channel three times that, the third constant."""
    one = torch.tensor([1.0, 2, 4, 9])
    x = torch.stack([one, 3 * one, torch.full((4,), 7.0)]).t().reshape(2, 2, 3).permute(0, 2, 1)
    found = channel_norms(x, bits=4)
    assert (found.channels, found.count) == (3, 4)
    l1, l2 = 10.0, math.sqrt(38)
    assert found.l1.norm == pytest.approx((l1 + 3 * l1) / 3)
    assert found.l2.norm == pytest.approx((l2 + 3 * l2) / 3)
    assert found.ratio == pytest.approx(l1 / (2 * l2))
    # a step of 30/7 and codes 2 and 7, so sigma^q is 60/7 and 30
    assert found.l1.gap == pytest.approx((7 / 60 - 1 / 10) / 2)
    assert found.l1.relative == pytest.approx(1 / 12)
    assert found.l2.relative == pytest.approx(1 / 12)  # the channels' ratio is the same


def test_a_small_channel_has_the_code_one_and_a_factor_changes_nothing_relative() -> None:
    x = torch.tensor([[1.0, -1.0], [1e-4, -1e-4]]).t()
    found = channel_norms(x, bits=8)
    assert found.l1.relative == pytest.approx((1 - 1e-4 * 127) / 2, rel=1e-5)
    scaled = channel_norms(x * 37.0, bits=8)
    assert scaled.l1.relative == pytest.approx(found.l1.relative)
    assert scaled.l1.gap == pytest.approx(found.l1.gap / 37)
    nothing = channel_norms(torch.ones(3, 2))
    assert (nothing.l1.norm, nothing.l1.gap, nothing.l2.relative, nothing.ratio) == (0, 0, 0, 1)


def test_norms_are_those_of_the_inputs_of_every_kind_of_batch_normalization() -> None:
    model = network()
    x = batch()[0]
    found = norm_statistics(model, x)
    assert list(found) == ["1", "4"]
    with torch.no_grad():
        read = model[0](x)
    assert asdict(found["1"]) == asdict(channel_norms(read))
    assert found["1"].count == 8 * 16
    model[1] = L1BatchNorm2d(6)
    assert asdict(norm_statistics(model, (x,))["1"]) == asdict(found["1"])
    nested = network()
    bs.quantize_(nested, bs.recipes.strata(w=(1, 2)), x)
    bs.calibrate_(nested, [x])
    assert list(norm_statistics(nested, x)) == ["1", "4"]  # not "1.levels.2"
    integer = bs.integer_(network(), x)
    before = {key: value.clone() for key, value in integer.state_dict().items()}
    assert list(norm_statistics(integer, x, training=True)) == ["1", "4"]
    assert all(torch.equal(value, before[key]) for key, value in integer.state_dict().items())
    assert norm_statistics(nn.Linear(3, 2), torch.ones(4, 3)) == {}


def test_bad_norms() -> None:
    with pytest.raises(ValueError, match=r"bits must be an integer in 2\.\.8, got 9"):
        norm_statistics(network(), batch()[0], bits=9)
    with pytest.raises(ValueError, match=r"the input of '1' must be \(N, C, \.\.\.\), finite and not empty"):
        norm_statistics(network(), batch()[0] * math.nan)
    net = bs.integer_(bs.zoo.create("digits_resnet"), torch.randn(4, 1, 8, 8))
    with pytest.raises(ValueError, match="norm_statistics: the layers of a fused network do not run one by one"):
        norm_statistics(fuse(net), torch.randn(4, 1, 8, 8))


def test_pictures(tmp_path: Path) -> None:
    found = gradient_ranges(network(), entropy, batch(), training=True)
    zero = of_gradient(torch.zeros(4, 3))
    plot_ranges({**found, "zero": zero}, tmp_path / "ranges.png")
    plot_norms(norm_statistics(network(), batch()[0]), tmp_path / "norms.svg", along="layer")
    assert (tmp_path / "ranges.png").stat().st_size > 5000
    assert "L1" in (tmp_path / "norms.svg").read_text()
    for plot in (plot_ranges, plot_norms):
        with pytest.raises(ValueError, match=f"{plot.__name__}: no "):
            plot({}, tmp_path / "none.png")


def test_layers_drawn_span_the_diversities() -> None:
    found = {f"l{i}": of_gradient(torch.tensor([[1.0, 2.0**-i]]), groups=1) for i in (5, 0, 3, 1, 2, 4)}
    assert chosen(found, 3) == ["l5", "l0", "l2"]
    assert chosen(found, 9) == list(found)
