"""The weight gradient of a quantization-aware step, of every instruction set, against torch's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_guarded import guarded_copy
from torch import Tensor

from bitstrata_runtime import _engine

Array = np.ndarray[Any, Any]


def rows_of(values: Tensor) -> Array:
    """Floats as bfloat16 in memory that ends at a page which nobody may touch."""
    return guarded_copy(values.bfloat16().view(torch.int16).numpy().view(np.uint16))


def exact(x: Array, g: Tensor, shape: tuple[int, ...], layout: tuple[int, int, int]) -> Array:
    """Of stride, padding and dilation `layout`."""
    maps, weight = torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2), torch.zeros(shape, dtype=torch.float64)
    arguments = (*((n, n) for n in layout), False, (0, 0), 1, (False, True, False))
    of_result = g.double().permute(0, 3, 1, 2)
    return torch.ops.aten.convolution_backward(of_result, maps, weight, None, *arguments)[1].numpy()


class Case:
    """Codes and a gradient of a convolution of random shape; dense: 3x3, at every position."""

    def __init__(self, seed: int, dense: bool, most: int = 40) -> None:
        rng = np.random.default_rng(seed)
        pick = rng.integers
        self.stride, self.dilation = int(pick(1, 3)), int(pick(1, 3))
        self.kernel = (int(pick(1, 4)), int(pick(1, 4)))
        self.pad = int(pick(0, 3))
        if dense:
            self.stride = self.dilation = 1
            self.kernel = (3, 3)
        batch, inputs, outputs = int(pick(1, 6)), int(pick(1, most)), int(pick(1, 2 * most))
        spans = [(k - 1) * self.dilation + 1 for k in self.kernel]
        h, w = (int(pick(max(span - 2 * self.pad, 1), 18)) for span in spans)
        out = [(size + 2 * self.pad - span) // self.stride + 1 for size, span in zip((h, w), spans, strict=True)]
        lo, hi = [(0, 15), (0, 255), (-128, 127), (-8, 7)][seed % 4]
        codes = rng.integers(lo, hi + 1, (batch, h, w, inputs)).astype(np.int8 if lo < 0 else np.uint8)
        self.range, self.x, self.g_shape, self.rng = (lo, hi), guarded_copy(codes), (batch, *out, outputs), rng
        self.weight = (outputs, inputs, *self.kernel)

    def integers(self) -> Tensor:
        return torch.from_numpy(self.rng.integers(-8, 9, self.g_shape).astype(np.float32))

    def normal(self) -> Tensor:
        return torch.from_numpy(self.rng.normal(0, 1, self.g_shape).astype(np.float32)).bfloat16().float()

    def found(self, g: Tensor, factor: Array, isa: str, threads: int) -> Array:
        """In both orders of memory, which hold the same bits."""
        plain, last = (self.laid_out(g, factor, isa, threads, channels_last=last) for last in (False, True))
        assert plain.tobytes() == last.transpose(0, 3, 1, 2).tobytes()
        return plain

    def laid_out(self, g: Tensor, factor: Array, isa: str, threads: int, *, channels_last: bool) -> Array:
        outputs, inputs, height, width = self.weight
        shape = (outputs, height, width, inputs) if channels_last else self.weight
        out = guarded_copy(np.full(shape, np.nan, np.float32))
        stride, dilation, pad = ((n, n) for n in (self.stride, self.dilation, self.pad))
        g_rows, factor = rows_of(g), guarded_copy(factor)
        layout = (stride, dilation, pad, channels_last)
        _engine.qat_weight_gradient(self.x, self.range, g_rows, factor, *layout, out, isa, threads)
        return out

    def expected(self, x: Array, g: Tensor) -> Array:
        return exact(x, g, self.weight, (self.stride, self.pad, self.dilation))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_gradients_that_are_small_integers_are_exact(seed: int, dense: bool) -> None:
    case = Case(seed, dense)
    g, factor = case.integers(), np.exp2(case.rng.integers(-3, 4, case.weight[0])).astype(np.float32)
    expected = case.expected(case.x, g) * factor[:, None, None, None]
    for isa in _engine.available_isas():
        if isa == "generic" and seed % 4:  # its loops are slow
            continue
        for threads in (1, 3):
            assert (case.found(g, factor, isa, threads) == expected).all(), (isa, threads)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_bfloat16_gradients_to_rounding(seed: int, dense: bool) -> None:
    """Each sum to a few roundings in float32 of the absolute values it is made of; a dense one may have sums of two
    gradients rounded to bfloat16, which is as much as the rounding of the gradients themselves: half a unit in the last
    place of each product, in the root mean square.
    """
    case = Case(100 + seed, dense)
    g, one = case.normal(), np.ones(case.weight[0], np.float32)
    codes = np.abs(case.x.astype(np.int32))
    expected, size = case.expected(case.x, g), case.expected(codes, g.abs())
    products = np.sqrt(case.expected(codes**2, g**2).mean())
    for isa in _engine.available_isas():
        if isa == "generic" or _engine.float_products(isa) != "generic":
            error = case.found(g, one, isa, 2) - expected
            if dense and isa != "generic":
                assert np.sqrt((error**2).mean()) <= 2.0**-9 * products
            else:
                assert (np.abs(error) <= 2.0**-20 * size + 1e-30).all(), isa


@pytest.mark.parametrize(
    ("batch", "size", "inputs", "outputs"), [(24, 32, 8, 16), (3, 40, 5, 130), (40, 7, 3, 8), (9, 30, 16, 8)]
)
def test_bits_do_not_depend_on_the_number_of_threads(batch: int, size: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 16, (batch, size, size, inputs)).astype(np.uint8)
    g = rows_of(torch.from_numpy(rng.normal(0, 1, (batch, size, size, outputs)).astype(np.float32)))
    factor, found = rng.normal(0, 1, outputs).astype(np.float32), []
    for threads in (1, 2, 3, 8):
        out = np.empty((outputs, inputs, 3, 3), np.float32)
        _engine.qat_weight_gradient(x, (0, 15), g, factor, (1, 1), (1, 1), (1, 1), False, out, "", threads)
        found.append(out)
    assert all((found[0] == other).all() for other in found[1:])


def test_bad_arguments_are_named() -> None:
    x, g = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 5), np.uint16)
    one, out = np.ones(5, np.float32), np.zeros((5, 3, 3, 3), np.float32)

    good = {
        "x": x,
        "range": (0, 15),
        "g": g,
        "factor": one,
        "stride": (1, 1),
        "dilation": (1, 1),
        "padding": (1, 1),
        "channels_last": False,
        "out": out,
    }
    good |= {"isa": "", "threads": 1}
    _engine.qat_weight_gradient(**good)  # type: ignore[arg-type]
    for message, bad in (
        ("threads must be at least 1, got 0", {"threads": 0}),
        ("different batches", {"x": x[:1]}),
        ("weight does not fit", {"out": out[:4]}),
        ("weight does not fit", {"channels_last": True, "out": np.zeros((5, 3, 3, 4), np.float32)}),
        ("factor must have one element", {"factor": one[:2]}),
        ("codes must be int8 or uint8", {"x": x.astype(np.int16)}),
        ("qat_weight_gradient.*output height", {"stride": (2, 2)}),
    ):
        with pytest.raises(ValueError, match=message):
            _engine.qat_weight_gradient(**{**good, **bad})  # type: ignore[arg-type]
