"""Recurrent forecaster of time series."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import check_positive


class LSTMForecaster(nn.Module):
    """A window (B, T, series) to the `horizon` values that follow, (B, horizon, series).

    An `nn.LSTM` reads the window; a linear layer maps its last hidden state to all later values at once.

    Args:
        series: how many run in parallel; all are read and all forecast.
        residual: forecasts are differences to the window's last value, so that an untrained network repeats it.

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
        residual: bool = True,
    ) -> None:
        super().__init__()
        check_positive("LSTMForecaster", series=series, horizon=horizon, hidden=hidden, layers=layers)
        self.series, self.horizon, self.residual = series, horizon, residual
        self.lstm = nn.LSTM(series, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, horizon * series)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, window: Tensor) -> Tensor:
        if window.dim() != 3 or window.shape[1] < 1 or window.shape[2] != self.series:
            raise ValueError(
                f"LSTMForecaster: window must be (B, T, {self.series}) with T >= 1, got {tuple(window.shape)}"
            )
        states, _ = self.lstm(window)
        change = self.head(states[:, -1]).unflatten(1, (self.horizon, self.series))
        return change + window[:, -1:] if self.residual else change
