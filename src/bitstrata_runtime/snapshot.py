"""A program at one precision, ready to run: what a run uses from its start to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from .derive import Precision
from .images import channels_last
from .plan import Plan
from .program import Program
from .reference import DTYPES

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Integers: TypeAlias = "NDArray[np.integer[Any]]"


class Executor(Protocol):
    """Runs one plan. Codes and results are (N, H, W, C); see `reference.ReferenceExecutor`, the normative one."""

    def run(self, codes: Integers) -> NDArray[np.int32]: ...

    def run_all(self, codes: Integers) -> dict[str, Integers]: ...


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A program at one precision. Never changes; any number of threads may run it at the same time.

    Made by `Session.at`. precision is what was asked for: an int, a plan's name or a map layer -> precision;
    precision_map is that of every layer. program holds what had been read when this was made.
    """

    precision: Precision
    precision_map: Mapping[str, int]
    program: Program
    plan: Plan
    executor: Executor

    def run(self, x: ArrayLike, *, floats: bool = False) -> NDArray[np.float32]:
        """Logits: float32 (N, classes), or (N, C, H, W) where the output is a map.

        x: (N, C, H, W), of any memory layout; series may be (N, C, L) and features (N, C). A program on pixels takes
        uint8; with floats=True, real pixels in [0, 1], which are multiplied by 255 and rounded (any normalization is in
        the program). A program on codes takes floats only: floats=True and real values, normalized as in training,
        which are rounded to the input's grid (spec/numerics.md, section 5). Raises ValueError for another dtype, shape
        or range, and for NaN.
        """
        scale = self.plan.values[self.plan.output].scale
        return (self.run_raw(x, floats=floats) * np.float64(scale if scale is not None else 1.0)).astype(np.float32)

    def run_raw(self, x: ArrayLike, *, floats: bool = False) -> NDArray[np.int32]:
        """The output's integers, int32 of `run`'s shape: logits = scale * integer. x and errors as in `run`."""
        result = self.executor.run(self.encode(x, floats=floats))
        if result.shape[1:3] == (1, 1):
            return result[:, 0, 0, :]
        return np.ascontiguousarray(result.transpose(0, 3, 1, 2))

    def run_all(self, x: ArrayLike, *, floats: bool = False) -> dict[str, Integers]:
        """Every value by name, integers (N, H, W, C), the input's codes included. x and errors as in `run`."""
        return self.executor.run_all(self.encode(x, floats=floats))

    def encode(self, x: ArrayLike, *, floats: bool = False) -> Integers:
        """The input's codes (N, H, W, C) for `x`, as `run` makes them."""
        try:
            array = np.asarray(x)
        except (ValueError, TypeError) as error:
            raise ValueError(f"run: input is no array: {error}") from error
        shape = tuple(self.program.input_shape)
        array = as_maps(array, shape)
        if array.ndim != 4 or array.shape[1:] != shape:
            expected = f"(N, {', '.join(map(str, shape))})"
            raise ValueError(f"run: input must be {expected}, is {array.shape}{_hint(array.shape, shape)}")
        if not floats:
            if self.program.input_kind != "pixels":
                raise ValueError("run: the program's input are real values; pass them with floats=True")
            if array.dtype != np.uint8:
                raise ValueError(f"run: input must be uint8 pixels, is {array.dtype}; floats need floats=True")
            return channels_last(array)
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"run: with floats=True the input must be floating point, is {array.dtype}")
        finite = np.isfinite(array)
        if not finite.all():
            where = tuple(int(i) for i in np.unravel_index(int(finite.argmin()), array.shape))
            raise ValueError(f"run: input has values that are not finite, the first is {array[where]} at {where}")
        return self._encode_floats(array.transpose(0, 2, 3, 1).astype(np.float64))

    def _encode_floats(self, x: NDArray[np.float64]) -> Integers:
        value = self.plan.values[self.plan.input]
        if self.program.input_kind == "pixels":
            if x.size and not 0.0 <= x.min() <= x.max() <= 1.0:
                raise ValueError(f"run: real pixels must lie in [0, 1], reach [{x.min()}, {x.max()}]")
            codes = np.rint(x * 255.0)
        else:
            codes = np.rint(x / self.plan.input_step - np.asarray(self.plan.input_offset))
        return np.ascontiguousarray(np.clip(codes, value.lo, value.hi), dtype=DTYPES[value.dtype])


def as_maps(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Series (N, C, L) and features (N, C) as the maps (N, C, 1, L) and (N, C, 1, 1) that programs hold."""
    channels, height, width = shape
    series = array.ndim == 3 and height == 1 and array.shape[1:] == (channels, width)
    features = array.ndim == 2 and height == width == 1 and array.shape[1] == channels
    return array.reshape(len(array), *shape) if series or features else array


def _hint(given: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What may have been meant by an input of a wrong shape."""
    channels, height, width = shape
    if given[1:] == (height, width, channels):
        return "; channels seem to be last: pass x.transpose(0, 3, 1, 2)"
    if given == (height, width, channels):
        return "; channels seem to be last and the batch is missing: pass x.transpose(2, 0, 1)[None]"
    if given == shape:
        return "; the batch is missing: pass x[None]"
    return ""
