"""Maximum pooling in a fused step: equal to torch's in every bit, forward and backward."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import bitstrata as bs
import bitstrata_runtime as bs_runtime
from bitstrata.fused.units import MaxPool
from bitstrata.integer.pool import ALIGNMENT
from bitstrata_runtime import _engine


class Network(nn.Module):
    """Convolution, normalization, perhaps a rectifier, pooling; then more of it and a classifier."""

    def __init__(self, pool: nn.Module, rectified: bool, also: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.relu = nn.ReLU() if rectified else nn.Identity()
        self.pool = pool
        self.second = nn.Conv2d(12, 70, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(70)
        self.last = nn.Linear(70, 5)
        self.also = also

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm(self.first(x)))
        pooled = self.pool(y)
        z = self.norm2(self.second(pooled)).mean((2, 3))
        z = z + y.mean((1, 2, 3))[:, None] if self.also else z
        return self.last(z)


POOLS = {
    "3, 2, 1": (nn.MaxPool2d(3, 2, padding=1), True),
    "2": (nn.MaxPool2d(2), True),
    "overlapping": (nn.MaxPool2d(3, 1, padding=1), True),
    "gaps": (nn.MaxPool2d((2, 1), (3, 2)), True),
    "ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), False),
    "dilated": (nn.MaxPool2d(2, 1, dilation=2), False),
    "large": (nn.MaxPool2d((5, 7), padding=(2, 3)), True),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("also", [False, True])
def test_equal_to_the_unfused_network(pool, rectified, also):
    torch.manual_seed(1)
    module, fusable = POOLS[pool]
    x = torch.randn(3, 3, 11, 9)
    model = bs.integer_(Network(module, rectified, also), x).train()
    with torch.no_grad():
        model.norm.weight.uniform_(-1, 1)  # falling channels: their largest result is of their smallest code
        model.norm.weight[3] = 0
        model.norm.bias.uniform_(-0.3, 0.3)
    twin = copy.deepcopy(model)
    fused = bs.fuse(model)
    assert any(isinstance(unit, MaxPool) for unit in fused._units) == fusable
    for network in (fused, twin):
        for _ in range(2):
            loss = network(x).square().sum()
            loss.backward()
    assert torch.equal(fused(x), twin(x))
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("pool", [name for name, (_, fusable) in POOLS.items() if fusable])
def test_gradients_made_in_strips_of_large_maps(pool):
    torch.manual_seed(3)
    x = torch.randn(2, 3, 131, 61)  # 12 channels: strips of 44 rows, the last one shorter
    model = bs.integer_(Network(POOLS[pool][0], True), x).train()
    twin = copy.deepcopy(model)
    for network in (bs.fuse(model), twin):
        network(x).square().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("isa", bs_runtime.available_isas())
def test_equal_on_every_instruction_set(isa, monkeypatch):
    torch.manual_seed(2)
    x = torch.randn(3, 3, 11, 9)
    model = bs.integer_(Network(nn.MaxPool2d(3, 2, padding=1), True), x).train()
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    monkeypatch.setenv("BITSTRATA_ISA", isa)
    bs.fuse(model)(x).square().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("also", [False, True])
def test_codes_that_only_a_pooling_reads_are_kept_as_maxima_and_signs(also):
    """In an L1 normalization: an L2 one has codes in its gradient. What something else reads too is kept whole."""
    x, kept = torch.randn(3, 3, 12, 10), {}
    for norm in ("l1_quantized", "l2_quantized"):
        torch.manual_seed(4)
        model = bs.integer_(Network(nn.MaxPool2d(2), True, also), x, norm=norm).train()
        twin = copy.deepcopy(model)
        fused = bs.fuse(model)
        loss = fused(x).square().sum()
        kept[norm] = fused._pool.lent
        loss.backward()
        assert fused._pool.lent == 0
        twin(x).square().sum().backward()
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad)
    whole, quarter = (-(-3 * positions * 12 // ALIGNMENT) * ALIGNMENT for positions in (120, 30))
    assert kept["l2_quantized"] - kept["l1_quantized"] == (0 if also else whole - 2 * quarter)


@pytest.mark.parametrize("isa", bs_runtime.available_isas())
@pytest.mark.parametrize("channels", [1, 12, 64, 70])
def test_maxima_and_signs_are_those_of_numpy(isa, channels):
    rng = np.random.default_rng(channels)
    window = ((7, 5), (3, 2), (2, 1), (1, 0))
    codes = rng.integers(-3, 4, (2, 7, 5, channels)).astype(np.int8)
    places = np.empty((2, 4, 4, channels), np.uint8)
    maxima, signs = np.empty(places.shape, np.int8), np.empty((2, (7 * 5 * channels + 3) // 4), np.uint8)
    expected, back = np.empty_like(maxima), np.sign(codes)
    for at in np.ndindex(places.shape):
        image, y, x, c = at
        inside = [p for p in range(6) if 0 <= 2 * y - 1 + p // 2 < 7 and 0 <= x + p % 2 < 5]
        place = int(rng.choice(inside))
        places[at], pixel = place, (image, 2 * y - 1 + place // 2, x + place % 2, c)
        expected[at] = back[pixel] = codes[pixel]
    _engine.keep_maxima(codes, places, window, maxima, signs, isa, 2)
    np.testing.assert_array_equal(maxima, expected)
    found = np.full_like(codes, 99)
    _engine.put_maxima(maxima, signs, places, window, found, isa, 2)
    np.testing.assert_array_equal(found, back)


def test_windows_that_do_not_fit():
    x = torch.randn(2, 3, 8, 8)
    model = bs.integer_(Network(nn.MaxPool2d(5), True), x).train()
    with pytest.raises(ValueError, match=r"windows \(5, 5\) do not fit into maps of 4x4 with padding \(0, 0\)"):
        bs.fuse(model)(x[:, :, :4, :4])
