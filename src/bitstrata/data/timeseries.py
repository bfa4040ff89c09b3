"""Time series in a table, standardized windows of them, and two measures of forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dataset import DataError
from .lines import number, read_lines

PARTS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class TimeSeries:
    """Series that run in parallel, at equal steps of time.

    values: float64 (T, series), as in the file.
    names: of the series.
    ends: rows at which the training, validation and test part end; each begins where the one before ends.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...]
    ends: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise DataError(f"time series: values {self.values.shape} do not fit {len(self.names)} names")
        train, valid, test = self.ends
        if not 0 < train < valid < test <= len(self.values):
            raise DataError(f"time series: ends {self.ends} do not ascend within {len(self.values)} rows")

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of each series over the training part."""
        mean: NDArray[np.float64] = self.values[: self.ends[0]].mean(0)
        return mean

    @property
    def std(self) -> NDArray[np.float64]:
        """(Population) standard deviation of each series over the training part; 1 for a constant series."""
        std: NDArray[np.float64] = self.values[: self.ends[0]].std(0)
        return np.where(std > 0, std, 1.0)

    def standardized(self) -> Tensor:
        """(values - mean) / std as float32 (T, series)."""
        return torch.from_numpy(((self.values - self.mean) / self.std).astype(np.float32))

    def restored(self, standardized: Tensor) -> NDArray[np.float64]:
        """Standardized (..., series) in the file's units, float64."""
        restored: NDArray[np.float64] = standardized.double().numpy() * self.std + self.mean
        return restored

    def starts(self, part: str, length: int, horizon: int) -> Tensor:
        """First rows of all windows, ascending, whose `horizon` targets lie in that part.

        The `length` rows before the targets may reach into the part before, whose values are known by then.
        ValueError for another part than "train", "valid" and "test", or one that has no such window.
        """
        if part not in PARTS:
            raise ValueError(f"time series: part must be one of {', '.join(PARTS)}, got {part!r}")
        if length < 1 or horizon < 1:
            raise ValueError(f"time series: length and horizon must be positive, got {length} and {horizon}")
        begins = (0, *self.ends)[PARTS.index(part)]
        first = max(0, begins - length)
        last = self.ends[PARTS.index(part)] - length - horizon
        if last < first:
            raise ValueError(f"time series: no window of {length} + {horizon} rows has its targets in part {part!r}")
        return torch.arange(first, last + 1)

    def windows(self, starts: Tensor, length: int, horizon: int) -> tuple[Tensor, Tensor]:
        """Standardized windows float32 (B, length, series) at `starts` and targets (B, horizon, series)."""
        rows = self.standardized()[starts[:, None] + torch.arange(length + horizon)]
        return rows[:, :length], rows[:, length:]


def read_ett(path: str | Path, *, ends: Sequence[int] | None = None) -> TimeSeries:
    """A table with a header, a date in the first column and one series a further column: plain CSV, .gz or .xz.

    The form of the electricity transformer data sets (Zhou et al., Informer, 2021).

    Args:
        ends: of `TimeSeries`; None for 60, 80 and 100 % of the rows.

    Raises:
        DataError: the file cannot be read, has no header or rows, a row has another number of columns than the header,
            a cell is not a finite number, or the dates do not ascend as text.
    """
    path = Path(path)
    lines = read_lines(path)
    if not lines or lines[0].count(",") < 1:
        raise DataError(f"{path}, line 1: expected a header 'date,NAME,...', found {(lines or [''])[0][:60]!r}")
    _, *names = lines[0].split(",")
    rows, date = [], ""
    for index, line in enumerate(lines[1:], 2):
        where = f"{path}, line {index}"
        moment, *cells = line.split(",")
        if len(cells) != len(names):
            raise DataError(f"{where}: expected {len(names) + 1} columns, found {len(cells) + 1}")
        if moment <= date:
            raise DataError(f"{where}: date {moment!r} is not later than {date!r} in the line before")
        date = moment
        rows.append([number(cell, where, f"column {name!r}") for cell, name in zip(cells, names, strict=True)])
    if len(rows) < 5:
        raise DataError(f"{path}: {len(rows)} rows are too few for three parts")
    if ends is None:
        ends = (len(rows) * 3 // 5, len(rows) * 4 // 5, len(rows))
    try:
        return TimeSeries(np.array(rows, np.float64), tuple(names), _three(ends))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _three(ends: Sequence[int]) -> tuple[int, int, int]:
    if len(ends) != 3:
        raise DataError(f"time series: ends must be three rows, got {tuple(ends)}")
    return (ends[0], ends[1], ends[2])


def normalized_deviation(forecast: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """ND = sum |actual - forecast| / sum |actual|, over all elements, in the file's units.

    Source: Salinas et al., DeepAR, 2020; Yu et al., Temporal regularized matrix factorization, 2016.
    Raises ValueError for shapes that differ or an actual of zeros alone.
    """
    return float(np.abs(actual - forecast).sum() / (_scale(forecast, actual) * actual.size))


def normalized_rmse(forecast: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """RMSE = sqrt(mean (actual - forecast)^2) / mean |actual|, over all elements, in the file's units.

    Source and errors as `normalized_deviation`.
    """
    return float(np.sqrt(np.square(actual - forecast).mean()) / _scale(forecast, actual))


def _scale(forecast: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    if forecast.shape != actual.shape:
        raise ValueError(f"forecast {forecast.shape} and actual {actual.shape} differ in shape")
    scale = float(np.abs(actual).mean()) if actual.size else 0.0
    if scale == 0:
        raise ValueError(f"the mean of |actual| is 0 over {actual.size} elements: nothing to normalize by")
    return scale
