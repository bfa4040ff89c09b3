"""The compiled extension, made by bindings/module.cc. `engine.EngineExecutor` is what to use."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
Triple = tuple[int, int, int]
Sides = tuple[int, int, int, int]

def available_isas() -> list[str]: ...

class Graph:
    """Methods that add an operation return the index of its result; the input is 0."""

    def __init__(self, isa: str, threads: int) -> None: ...
    def input(self, shape: Triple, dtype: str, lo: int, hi: int, /) -> int: ...
    def conv(
        self,
        name: str,
        x: int,
        codes: NDArray[np.int8],
        mul: int,
        add: int,
        stride: Pair,
        padding: Sides,
        dilation: Pair,
        groups: int,
        pad_code: NDArray[np.int32],
    ) -> int: ...
    def requant(
        self,
        name: str,
        x: int,
        multiplier: NDArray[np.int32],
        bias: NDArray[np.int64],
        shift: NDArray[np.uint8],
        lo: int,
        hi: int,
        dtype: str,
    ) -> int: ...
    def add(self, name: str, a: int, b: int, shift_a: int, shift_b: int) -> int: ...
    def clip(self, name: str, x: int, lo: int, hi: int) -> int: ...
    def max_pool(self, name: str, x: int, kernel: Pair, stride: Pair, padding: Sides) -> int: ...
    def sum_pool(self, name: str, x: int, kernel: Pair, stride: Pair, padding: Sides, shift: int) -> int: ...
    def slice(self, name: str, x: int, h: Triple, w: Triple, c: Triple) -> int: ...
    def pad(self, name: str, x: int, h: Pair, w: Pair, c: Pair) -> int: ...
    def flatten(self, name: str, x: int) -> int: ...
    def finish(self, output: int) -> None: ...
    def run(self, x: NDArray[Any], wanted: list[int]) -> list[NDArray[Any]]: ...
    def shape(self, value: int, /) -> Triple: ...
    def dtype(self, value: int, /) -> str: ...
    def kernel(self, value: int, /) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def chunk(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...

# Integer products of a training step (bindings/products.cc). Arrays are C-contiguous, numpy's or torch's; results are
# written into the arrays passed for them. ValueError for shapes, dtypes and ranges that do not fit.
Array = Any

def conv_forward(
    x: Array,
    range: Pair,
    w: Array,
    stride: Pair,
    dilation: Pair,
    padding: Sides,
    groups: int,
    isa: str,
    threads: int,
    *,
    shift: Array | None = None,
    acc: Array | None = None,
    lo: Array | None = None,
    hi: Array | None = None,
    values: Array | None = None,
    factor: Array | None = None,
) -> None: ...
def conv_input_grad(
    g: Array,
    range: Pair,
    w: Array,
    stride: Pair,
    dilation: Pair,
    padding: Sides,
    groups: int,
    isa: str,
    threads: int,
    *,
    shift: Array | None = None,
    acc: Array | None = None,
    lo: Array | None = None,
    hi: Array | None = None,
    values: Array | None = None,
    factor: Array | None = None,
) -> None: ...
def conv_weight_grad(
    g: Array,
    x: Array,
    stride: Pair,
    dilation: Pair,
    padding: Sides,
    groups: int,
    isa: str,
    threads: int,
    *,
    gw: Array | None = None,
    values: Array | None = None,
    out_factor: Array | None = None,
    in_factor: Array | None = None,
) -> None: ...
def product_kernels(
    isa: str, size: Pair, channels: Pair, kernel: Pair, groups: int, range: Pair, weights: Pair
) -> tuple[str, str]:
    """Names of the kernels of a product and of its weight gradient."""
