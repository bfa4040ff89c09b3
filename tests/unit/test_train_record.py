"""What training records beside losses: where the time goes, step sizes, layers, TensorBoard's events."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitstrata as bs
from bitstrata.train import TrainConfig, Trainer, quiet, snapshot
from bitstrata.train.metrics import read, reproducible
from bitstrata.train.snapshot import layers, spread, steps
from bitstrata.train.tensorboard import scalars
from bitstrata.train.timing import PARTS, Clock

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, log_every=1)


def images(count: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return list(zip(x.split(8), torch.randint(0, 3, (count,), generator=generator).split(8), strict=True))


def network(recipe: bs.Recipe | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    if recipe is not None:
        bs.quantize_(model, recipe, images()[0][0])
        bs.calibrate_(model, [images()[0][0]])
    return model


def strata(**fields: object) -> bs.Recipe:
    return bs.recipes.strata(w=(1, 2, 4), **fields)


# --- the clock --------------------------------------------------------------------------------------------------------


class Ticks:
    """A clock that shows what it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ticks(monkeypatch) -> Ticks:
    made = Ticks()
    monkeypatch.setattr("bitstrata.train.timing.time.perf_counter", made)
    return made


def test_no_second_counts_twice(ticks):
    clock = Clock()
    ticks.pass_(1)
    with clock("logging"):
        ticks.pass_(2)
        with clock("checkpoint"):
            ticks.pass_(4)
        ticks.pass_(8)
    wall, seconds = clock.lap()
    assert wall == 15
    assert {part: s for part, s in seconds.items() if s} == {"logging": 10, "checkpoint": 4}
    ticks.pass_(3)
    assert clock.lap() == (3, dict.fromkeys(PARTS, 0.0))


def test_a_lap_inside_a_part_divides_it(ticks):
    clock = Clock()
    with clock("evaluation"):
        ticks.pass_(2)
        assert clock.lap()[1]["evaluation"] == 2
        ticks.pass_(5)
    assert clock.lap()[1]["evaluation"] == 5


def test_waiting_for_items_is_told_from_working_on_them(ticks):
    def slow():
        for item in range(3):
            ticks.pass_(10)
            yield item
        ticks.pass_(1)

    clock, seen = Clock(), []
    for item in clock.each("data", slow()):
        ticks.pass_(100)
        seen.append(item)
    wall, seconds = clock.lap()
    assert (seen, wall, seconds["data"]) == ([0, 1, 2], 331, 31)


class Slow(nn.Linear):
    """A layer that takes 7 seconds, or fails."""

    def __init__(self, ticks: Ticks) -> None:
        super().__init__(2, 2)
        self.ticks, self.broken = ticks, False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.ticks.pass_(7)
        if self.broken:
            raise ArithmeticError("no result")
        return super().forward(input)


def test_forward_passes_are_told_from_the_rest_of_the_step(ticks):
    clock, model = Clock(), Slow(ticks)
    with clock.forward_of(model):
        with clock("backward"):
            model(torch.zeros(1, 2))
            ticks.pass_(2)
            model(torch.zeros(1, 2))
        with clock("evaluation"):
            model(torch.zeros(1, 2))
        model(torch.zeros(1, 2))
    with clock("backward"):
        model(torch.zeros(1, 2))  # no longer watched
    _, seconds = clock.lap()
    assert {part: s for part, s in seconds.items() if s} == {"forward": 14, "backward": 9, "evaluation": 7}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_exception_closes_what_it_leaves_open(ticks):
    clock, model = Clock(), Slow(ticks)
    model.broken = True
    with clock.forward_of(model), pytest.raises(ArithmeticError), clock("backward"):
        model(torch.zeros(1, 2))
    ticks.pass_(50)
    with clock("data"):
        ticks.pass_(1)
    _, seconds = clock.lap()
    assert {part: s for part, s in seconds.items() if s} == {"forward": 7, "data": 1}


def test_parts_have_fixed_names():
    with pytest.raises(KeyError, match="no part 'thinking'; there are: data, forward"):
        Clock()("thinking")


# --- events of a stage ------------------------------------------------------------------------------------------------


def test_every_epoch_records_its_time_and_its_grids(tmp_path):
    trainer = Trainer(network(strata()), CONFIG, images(), images(), tmp_path, name="joint", reporter=quiet)
    trainer.fit()
    events = read(tmp_path / "metrics.jsonl")
    times = [event for event in events if event["event"] == "time"]
    assert [event["steps"] for event in times] == [3, 3]
    for event in times:
        assert set(event["seconds"]) == set(PARTS)
        assert sum(event["seconds"].values()) <= event["wall"] + 1e-3
        assert all(event["seconds"][part] > 0 for part in ("data", "forward", "backward", "optimizer", "evaluation"))
    assert times[0]["seconds"]["checkpoint"] == 0
    assert times[1]["seconds"]["checkpoint"] > 0  # the first epoch's, which was written after its line
    grids = [event for event in events if event["event"] == "grids"]
    assert [event["epoch"] for event in grids] == [0, 1]
    assert grids[-1]["layers"] == json.loads(json.dumps(steps(trainer.model)))
    assert grids[0]["layers"] != grids[1]["layers"]
    assert not trainer.model._forward_hooks


def test_a_run_is_the_same_whether_or_not_it_is_recorded(tmp_path):
    first, second = network(strata()), network(strata())
    Trainer(first, CONFIG, images(), images(), tmp_path / "a", tensorboard=tmp_path / "tb", reporter=quiet).fit()
    Trainer(second, CONFIG, images(), images(), reporter=quiet).fit()
    assert all(torch.equal(first.state_dict()[key], value) for key, value in second.state_dict().items())
    third = network(strata())
    Trainer(third, CONFIG, images(), images(), tmp_path / "b", reporter=quiet).fit()
    both = [reproducible(read(tmp_path / run / "metrics.jsonl")) for run in "ab"]
    assert both[0] == both[1]
    assert {event["event"] for event in both[0]} == {"step", "epoch", "eval", "grids"}
    assert all("images_per_s" not in event for event in both[0])


def test_float_stages_record_times_and_no_layers(tmp_path):
    Trainer(network(), CONFIG, images(), out_dir=tmp_path, name="float", reporter=quiet).fit()
    assert {event["event"] for event in read(tmp_path / "metrics.jsonl")} == {"step", "epoch", "time"}
    assert not list(tmp_path.glob("*.layers.json"))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"per_channel": True}], ids=["tensor", "channel"])
def test_layers_hold_grids_and_histograms(fields):
    model = network(strata(**fields))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = {entry["name"]: entry for entry in json.loads(json.dumps(layers(model, bins=16)))}
    assert list(found) == ["0", "3", "6"]
    assert [entry["edge"] for entry in found.values()] == [True, False, True]
    layer = model[3]
    for precision in (1, 2, 4):
        view = found["3"]["precisions"][str(precision)]
        with bs.precision(model, precision), torch.no_grad():
            grid, codes, weight = layer.weight_grid(), layer.weight_codes(), layer.effective_weight()
        scale = grid.scale.view(-1, 1, 1, 1)
        shown = (weight / scale if fields else weight).detach().numpy()
        unit = 1.0 if fields else float(scale)
        assert view["unit"] == ("step" if fields else "value")
        assert view["bits"] == precision
        assert view["levels"] == pytest.approx(
            [unit * (c + grid.offset) for c in range(grid.lo, grid.hi + 1)], rel=1e-5
        )
        used = [float((codes == c).float().mean()) for c in range(grid.lo, grid.hi + 1)]
        assert view["used"] == pytest.approx(used, rel=1e-3)
        assert sum(view["counts"]) == weight.numel()
        # torch counts in float32, so a weight on the border of two bins may lie in either
        assert np.abs(np.cumsum(view["counts"]) - np.cumsum(np.histogram(shown, 16)[0])).max() <= 1
        assert view["range"] == pytest.approx([shown.min(), shown.max()], rel=1e-5)
        assert view["step"] == spread(grid.scale)
        assert len(view["step"]) == (3 if fields else 1)
        assert view["input"]["codes"] == [0, 2**precision - 1]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_is_not_finite_or_not_known_is_left_out(tmp_path):
    model = network(strata())
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    found = {entry["name"]: entry for entry in layers(model)}
    assert found["3"]["precisions"] == {}
    assert set(found["6"]["precisions"]) == {"1", "2", "4"}
    with torch.no_grad():
        for step in model[3].act_quant.steps.values():
            step.fill_(torch.inf)
    assert steps(model)["3"]["1"]["input"] == []
    snapshot.write(tmp_path / "x.layers.json", model, step=1)
    assert json.loads((tmp_path / "x.layers.json").read_text())["step"] == 1
    fresh = network()
    bs.quantize_(fresh, strata(), images()[0][0])
    assert "input" not in steps(fresh)["3"]["4"]  # before any data
    with pytest.raises(ValueError, match="layers: bins must be at least 1, got 0"):
        layers(model, bins=0)


def test_a_crash_keeps_the_layers_of_before(tmp_path, monkeypatch):
    path = tmp_path / "joint.layers.json"
    snapshot.write(path, network(strata()), step=1)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        snapshot.write(path, network(strata()), step=2)
    assert json.loads(path.read_text())["step"] == 1


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "pact", "dorefa", "sat", "maqd", "uniq", "vertical", "adabits"])
def test_every_recipe_can_be_recorded(name):
    model = network(bs.recipes.get(name))
    found = layers(model)
    assert found
    assert all(view["levels"] and sum(view["counts"]) for e in found for view in e["precisions"].values())
    json.dumps([found, steps(model)], allow_nan=False)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def written(directory: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard reads the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory))
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def test_tensorboard_gets_scalars_of_every_precision(tmp_path):
    pytest.importorskip("tensorboard")
    Trainer(
        network(strata()), CONFIG, images(), images(), tmp_path / "run", tensorboard=tmp_path / "tb", name="joint"
    ).fit()
    found = written(tmp_path / "tb" / "joint")
    levels = ("1b", "2b", "4b")
    assert set(found) == {
        *(
            f"{kind}/{level}"
            for kind in ("loss/step", "loss/epoch", "accuracy/train", "accuracy/eval")
            for level in levels
        ),
        *(f"seconds/{part}" for part in PARTS),
        "lr",
        "images_per_s",
    }
    for event in read(tmp_path / "run" / "metrics.jsonl"):
        for tag, value in scalars(event["event"], event):
            assert found[tag][event["step"]] == pytest.approx(value, rel=1e-6)
    assert sorted(found["loss/step/4b"]) == [1, 2, 3, 4, 5, 6]


def test_a_resumed_stage_leaves_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    model = network()
    places = {"out_dir": tmp_path / "run", "tensorboard": tmp_path / "tb", "reporter": quiet}
    stopped = Trainer(model, CONFIG, images(), **places)
    step = stopped._step

    def interrupted(*batch: torch.Tensor) -> dict:
        if stopped.position.step == 5:
            raise KeyboardInterrupt
        return step(*batch)

    stopped._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert max(written(tmp_path / "tb" / "train")["lr"]) == 5
    Trainer(network(), CONFIG, images(), **places).fit()
    assert sorted(written(tmp_path / "tb" / "train")["lr"]) == [1, 2, 3, 4, 5, 6]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r'tensorboard logs: .*pip install "bitstrata\[tensorboard\]"'):
        Trainer(network(), CONFIG, images(), tensorboard=tmp_path)
