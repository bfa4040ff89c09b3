"""Recurrent forecaster of time series."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import check_choice, check_positive

BASES = ("last", "repeat", "zero")


class LSTMForecaster(nn.Module):
    """A window (B, T, series) to the `horizon` values that follow, (B, horizon, series).

    An `nn.LSTM` reads the window; a linear layer maps its last hidden state to all later values at once.

    Args:
        series: how many run in parallel; all are read and all forecast.
        base: what the network's output is added to, and what it forecasts untrained: "last", the window's last value;
            "repeat", its last `horizon` values (a day, where days resemble each other); "zero", nothing.

    Source: Hochreiter and Schmidhuber, Long short-term memory, 1997.
    """

    def __init__(
        self,
        series: int,
        horizon: int,
        *,
        hidden: int = 64,
        layers: int = 1,
        dropout: float = 0.0,
        base: str = "last",
    ) -> None:
        super().__init__()
        check_positive("LSTMForecaster", series=series, horizon=horizon, hidden=hidden, layers=layers)
        check_choice("LSTMForecaster", "base", base, BASES)
        self.series, self.horizon, self.base = series, horizon, base
        self.lstm = nn.LSTM(series, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, horizon * series)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, window: Tensor) -> Tensor:
        least = self.horizon if self.base == "repeat" else 1
        if window.dim() != 3 or window.shape[1] < least or window.shape[2] != self.series:
            raise ValueError(
                f"LSTMForecaster: window must be (B, T, {self.series}) with T >= {least}, got {tuple(window.shape)}"
            )
        states, _ = self.lstm(window)
        change = self.head(states[:, -1]).unflatten(1, (self.horizon, self.series))
        return change if self.base == "zero" else change + window[:, -least:]
