"""Float checkpoints as training scripts leave them, loaded into a network without running code of the file."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bitstrata.cli.common import CommandError
from bitstrata.cli.weights import load_weights

State = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2), model=nn.Linear(2, 2)))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def averaged(model: nn.Module) -> State:
    return AveragedModel(model).state_dict()


WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}, "lr": 0.1}},
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.9), "path": Path("x")},
    "net": lambda s: {"net": s, "acc": 91.5},
    "ema alone": lambda s: {"ema": s},
    "nested": lambda s: {"model": {"state_dict": s}},
    "own name": lambda s: {"student": s, "epoch": 1},
    "data parallel": lambda s: prefixed("module.", s),
    "compiled": lambda s: {"model": prefixed("_orig_mod.", s)},
    "compiled and parallel": lambda s: prefixed("module._orig_mod.", s),
    "compiled part": lambda s: {key.replace("conv.", "conv._orig_mod."): value for key, value in s.items()},
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 0.1}},
    "lightning with a criterion": lambda s: {"state_dict": {**prefixed("net.", s), "criterion.weight": torch.ones(2)}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_every_usual_wrapping_loads(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = net()
    torch.save(WRAPPED[name](dict(source.state_dict())), tmp_path / "w.pth")
    target = net()
    load_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    printed = capsys.readouterr().out
    assert ("not used, because outside 'net.': criterion.weight" in printed) == ("criterion" in name)


def test_averaged_weights_and_a_choice_of_entry(tmp_path: Path) -> None:
    source, ema = net(), net()
    torch.save(
        {"model": source.state_dict(), "ema": averaged(ema), "deep": {"best": ema.state_dict()}}, tmp_path / "w.pt"
    )
    for entry, wanted in ((None, source), ("ema", ema), ("deep.best", ema)):
        target = net()
        load_weights(target, tmp_path / "w.pt", entry)
        assert torch.equal(target.conv.weight, wanted.conv.weight)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match=r"no entry 'emma'; it has: model, ema, deep"):
        load_weights(net(), tmp_path / "w.pt", "emma")


def test_several_states_without_a_usual_name(tmp_path: Path) -> None:
    torch.save({"teacher": net().state_dict(), "student": net().state_dict()}, tmp_path / "w.pt")
    with pytest.raises(CommandError, match=r"it has: teacher, student; name the entry with --entry"):
        load_weights(net(), tmp_path / "w.pt")


class Unknown:
    pass


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            net,
            r"pickled Python objects \(.*would run code .* looks like a whole model.*\.state_dict\(\), \"weights\.pt\"",
        ),
        (
            lambda: {"state_dict": net().state_dict(), "config": Unknown()},
            r"pickled Python objects \(.*\.Unknown\).*save the weights alone: .*\[\"state_dict\"\]",
        ),
    ],
)
def test_pickled_objects_are_refused_with_the_remedy(saved: Callable[[], Any], message: str, tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "w.pt")
    with pytest.raises(CommandError, match=message):
        load_weights(net(), tmp_path / "w.pt")


def test_another_network_is_told_by_the_names_that_fit_best(tmp_path: Path) -> None:
    state = prefixed("module.", net().state_dict())
    del state["module.conv.bias"]
    state["module.extra"] = torch.ones(1)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CommandError, match=r"does not fit the network: missing conv\.bias; unexpected extra$"):
        load_weights(net(), tmp_path / "w.pt")
