"""Integer training of an LSTM that forecasts the ETTh1 series: seven hourly values, a day ahead."""

from __future__ import annotations

import argparse

import torch
from _study import Metrics, Options, Study, converted, main, optimizer_for, settings, step

from bitstrata import data, zoo


def run(options: Options, seed: int, args: argparse.Namespace) -> Metrics:
    """ND and RMSE on the test part, all series together in the file's units."""
    series = data.read_ett(args.data, ends=(8_640, 11_520, 14_400))  # 12, 4 and 4 months of 30 days
    torch.manual_seed(seed)
    model = zoo.LSTMForecaster(len(series.names), args.horizon, hidden=args.hidden, base=args.base)
    starts = series.starts("train", args.length, args.horizon)
    converted(model, series.windows(starts[: args.batch], args.length, args.horizon)[0], options, seed, args)
    optimizer, schedule = optimizer_for(model, args.lr, 0.0, args.steps)
    random = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(args.steps):
        chosen = starts[torch.randint(len(starts), (args.batch,), generator=random)]
        window, target = series.windows(chosen, args.length, args.horizon)
        step(model, (model(window) - target).abs().mean(), optimizer, schedule)
    model.eval()
    forecasts, targets = [], []
    for chosen in series.starts("test", args.length, args.horizon)[:: args.stride].split(64):
        window, target = series.windows(chosen, args.length, args.horizon)
        with torch.no_grad():
            forecasts.append(model(window))
        targets.append(target)
    forecast, actual = series.restored(torch.cat(forecasts)), series.restored(torch.cat(targets))
    return {
        "nd": round(data.normalized_deviation(forecast, actual), 5),
        "rmse": round(data.normalized_rmse(forecast, actual), 5),
    }


if __name__ == "__main__":
    arguments = {
        "data": str, "length": 24, "horizon": 24, "hidden": 64, "base": "last", "steps": 200, "batch": 64, "lr": 5e-3,
        "stride": 6,
    }  # fmt: skip
    compared = settings(8, 4)
    # The LSTM is the first layer and the head the last: without edge_bits both would stay at 8 bits.
    compared["shift 4/4/4"] = {"w": 4, "a": 4, "g": 4, "groups": 4, "edge_bits": 4}
    main(Study(__doc__.splitlines()[0], compared, run, arguments))
