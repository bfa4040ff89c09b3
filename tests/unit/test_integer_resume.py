"""Integer training through the Trainer: an interrupted run continues with the same noise; lowering says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata import prepare
from bitstrata.lowering import LowerError


def loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(12, 1, 8, 8, generator=generator), torch.arange(12) % 10) for _ in range(3)]


def model() -> nn.Module:
    torch.manual_seed(0)
    net = bs.zoo.create("digits_cnn", width=4)
    return bs.integer_(net, torch.randn(2, 1, 8, 8), w=4, a=4, g=4, seed=5)


def trainer(net: nn.Module, out: Path) -> bs.Trainer:
    return bs.Trainer(net, bs.TrainConfig(epochs=3, lr=0.05, seed=1, eval_every=0), loader(), out_dir=out)


class InterruptionError(Exception):
    pass


def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = model()
    trainer(whole, tmp_path / "whole").fit()
    broken = model()
    first = trainer(broken, tmp_path / "broken")
    steps, step = [], first._step

    def interrupted(images: Tensor, labels: Tensor) -> dict[int | str, float]:
        steps.append(None)
        if len(steps) > 5:
            raise InterruptionError
        return step(images, labels)

    first._step = interrupted  # type: ignore[method-assign]
    with pytest.raises(InterruptionError):
        first.fit()
    resumed = model()
    trainer(resumed, tmp_path / "broken").fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    fresh = model()
    fresh.load_state_dict(whole.state_dict())
    assert prepare.noise_state(resumed) == prepare.noise_state(whole) != prepare.noise_state(fresh)


def test_lower_names_the_layer_and_the_way_out() -> None:
    with pytest.raises(
        LowerError, match=r"'\w+.*' trains in integers whose ranges follow each batch; .*freeze_\(model, batches\)"
    ):
        bs.lower(model(), torch.randn(1, 1, 8, 8))
