"""Images to channels last, by the extension and by numpy."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import bitstrata_runtime as runtime
from bitstrata_runtime.images import channels_last


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 1, 4, 4), (3, 5, 9, 8), (2, 130, 3, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("compiled", [True, False])
def test_it_is_the_transposition(shape, compiled, monkeypatch):
    if compiled and not runtime.available_isas():
        pytest.skip("the engine is not built")
    if not compiled:
        monkeypatch.delitem(sys.modules, "bitstrata_runtime._engine", raising=False)
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (x, x[:, :, ::-1], np.asfortranarray(x)):
        found = channels_last(given)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, given.transpose(0, 2, 3, 1))
