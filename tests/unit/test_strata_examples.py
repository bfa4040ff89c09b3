"""The nested symmetric grid: the quantizer, the stored planes and UniQ's grid say the same; signal-to-noise table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitstrata.functional import nested_step, symmetric_step
from bitstrata.quantizers import build
from bitstrata.quantizers.nested import NestedSymmetric
from bitstrata_runtime.planes import pack_plane, unpack_plane, widen


def tied(source: int, step: float) -> NestedSymmetric:
    """The quantizer for all widths up to `source`, in float64."""
    made = build("nested", "weight", {"scales": "tied"}, bits={b: b for b in range(1, source + 1)}).double()
    assert isinstance(made, NestedSymmetric)
    with torch.no_grad():
        made.step.fill_(step)
    return made


def signs(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """The stored planes, most significant first, as -1 and +1."""
    planes = (unpack_plane(pack_plane(codes, bits, i), codes.shape, "test") for i in range(1, bits + 1))
    return [2.0 * plane.astype(np.float64) - 1.0 for plane in planes]


def test_planes_of_one_code():
    """Code 1 of three bits is stored as 1, 0, 1: 0.25 (4 - 2 + 1) = 0.75 at D = 0.5."""
    planes = signs(np.array([1], np.int8), 3)
    assert [plane.item() for plane in planes] == [1, -1, 1]
    quantizer = tied(3, 0.5)
    assert quantizer.codes(torch.tensor([0.9], dtype=torch.float64)).item() == 1
    assert quantizer(torch.tensor([0.9], dtype=torch.float64)).item() == 0.25 * (4 - 2 + 1) == 0.75


@pytest.mark.parametrize("source", range(1, 9))
def test_every_code_at_every_width(source):
    """Shifting a code, re-quantizing its value at step 2^(n-b) D, and reading its upper planes are one."""
    step = 0.3125
    quantizer = tied(source, step)
    codes = np.arange(-(2 ** (source - 1)), 2 ** (source - 1)).astype(np.int8)
    values = (torch.from_numpy(codes).double() + 0.5) * step
    quantizer.precision = source
    assert torch.equal(quantizer(values), values)
    planes = signs(codes, source)
    held = None
    for bits in range(1, source + 1):
        quantizer.precision = bits
        wide = step * 2 ** (source - bits)
        shifted = codes >> (source - bits)
        held = widen(held, unpack_plane(pack_plane(codes, source, bits), codes.shape, "test"))
        np.testing.assert_array_equal(held, shifted)
        np.testing.assert_array_equal(quantizer.codes(values).numpy(), shifted)
        again = tied(bits, wide)
        assert torch.equal(again.codes(values), quantizer.codes(values))
        assert torch.equal(again(values), quantizer(values))
        from_planes = wide / 2 * sum(2 ** (bits - 1 - i) * planes[i] for i in range(bits))
        np.testing.assert_array_equal(quantizer(values).detach().numpy(), from_planes)


@pytest.mark.parametrize("source", range(1, 9))
def test_the_step_of_every_width_changes_as_if_it_were_alone(source):
    """A width's loss changes the source step in the proportion in which it changes the step of its own grid."""
    step, generator = 0.0371, torch.Generator().manual_seed(source)
    quantizer = tied(source, step)
    inside = step * (2 ** (source - 1) - 0.5)
    w = (2 * torch.rand(500, generator=generator, dtype=torch.float64) - 1) * inside
    sensitivity = torch.randn(500, generator=generator, dtype=torch.float64)
    for bits in range(1, source + 1):
        alone = build("nested", "weight", {"scales": "tied"}, bits={bits: bits}).double()
        with torch.no_grad():
            alone.step.fill_(step * 2 ** (source - bits))
        quantizer.precision = bits
        quantizer.step.grad = None
        (quantizer(w) * sensitivity).sum().backward()
        (alone(w) * sensitivity).sum().backward()
        changes = [(q.step.grad / q.step.detach()).item() for q in (quantizer, alone)]
        assert changes[0] == pytest.approx(changes[1], rel=1e-9)


def test_clipped_weights_change_the_range_alike_at_four_bits_and_more():
    """They add 2^(b-1) steps each, of a step that is 2^(1-b) of the range: the factor takes 4^(b-4) out of that."""
    w, changes = torch.tensor([-3.0, 2.5, 0.0, 4.0], dtype=torch.float64), []
    sensitivity = torch.tensor([0.3, -0.7, 0.0, 0.2], dtype=torch.float64)
    for bits in range(1, 9):
        quantizer = build("nested", "weight", {"scales": "tied"}, bits={bits: bits}).double()
        with torch.no_grad():
            quantizer.step.fill_(2.0 * 2.0 ** (1 - bits))  # clips at 2
        (quantizer(w) * sensitivity).sum().backward()
        changes.append((quantizer.step.grad / quantizer.step.detach()).item())
    top = (-0.3 - 0.7 + 0.2) * (
        1 - 2.0 ** -torch.arange(1, 9, dtype=torch.float64)
    )  # the outermost level, of the range
    lsq = [4.0 ** (b - 1) / 2 * (4 * max(2 ** (b - 1) - 1, 1)) ** -0.5 for b in range(1, 5)]
    assert changes == pytest.approx([t * (lsq[min(b, 4) - 1]) for b, t in enumerate(top.tolist(), 1)], rel=1e-12)


@pytest.mark.parametrize("source", range(1, 9))
def test_the_levels_are_uniqs(source):
    """UniQ, eq. 3, in its own form: (round(clamp(w/D + (2^b-1)/2, 0, 2^b-1)) - (2^b-1)/2) D."""
    step, generator = 0.0371, torch.Generator().manual_seed(source)
    quantizer = tied(source, step)
    w = (2.4 * torch.rand(5000, generator=generator, dtype=torch.float64) - 1.2) * step * 2 ** (source - 1)
    for bits in range(1, source + 1):
        quantizer.precision = bits
        wide, top = step * 2 ** (source - bits), 2**bits - 1
        uniq = ((w / wide + top / 2).clamp(0, top).round() - top / 2) * wide
        torch.testing.assert_close(quantizer(w).detach(), uniq, rtol=1e-14, atol=0)
        levels = torch.tensor([(c - top / 2) * wide for c in range(2**bits)], dtype=torch.float64)
        torch.testing.assert_close(quantizer(w).detach().unique(), levels, rtol=1e-14, atol=0)


# ---- signal to noise


def cells(step: float, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source codes, and the probability and first moment of N(0, 1) in their cells, in closed form."""
    codes = np.arange(-(2 ** (source - 1)), 2 ** (source - 1))
    borders = [-math.inf, *(codes[1:] * step), math.inf]
    below = np.array([0.5 * math.erfc(-b / math.sqrt(2)) for b in borders])
    density = np.array([math.exp(-b * b / 2) / math.sqrt(2 * math.pi) for b in borders])
    return codes, np.diff(below), -np.diff(density)


def decibels(step: float, widths: tuple[int, ...], bits: int, *, free: bool) -> float:
    source = max(widths)
    codes, probability, moment = cells(step, source)
    level = (codes >> (source - bits)) + 0.5
    cross, power = (level * moment).sum(), (level**2 * probability).sum()
    scale = cross / power if free else step * 2 ** (source - bits)
    return -10 * math.log10(1 - 2 * scale * cross + scale**2 * power)


@pytest.mark.parametrize(
    ("widths", "free", "constant", "expected"),
    [
        ((1, 2, 3, 4), True, 0.3073, [4.40, 8.87, 14.23, 19.15]),
        ((1, 2, 3, 4), False, 0.2874, [3.12, 8.95, 14.26, 18.57]),
        ((2, 3, 4), True, 0.3073, [8.87, 14.23, 19.15]),
    ],
)
def test_four_bits_nest_almost_for_free(widths, free, constant, expected):
    step = nested_step(widths, free=free)
    assert round(step, 4) == constant
    assert [round(decibels(step, widths, b, free=free), 2) for b in widths] == expected


def test_eight_bits_cost_the_narrow_widths():
    widths = tuple(range(1, 9))
    found = [round(decibels(0.02724, widths, b, free=True), 2) for b in widths]
    assert found == [4.40, 6.93, 12.22, 18.03, 23.94, 29.74, 35.04, 39.06]
    assert nested_step(widths) == pytest.approx(0.02724, abs=3e-5)


def test_widths_of_their_own():
    found = [round(decibels(symmetric_step(b), (b,), b, free=False), 2) for b in range(1, 9)]
    assert found == [4.40, 9.25, 14.27, 19.38, 24.57, 29.83, 35.17, 40.57]
