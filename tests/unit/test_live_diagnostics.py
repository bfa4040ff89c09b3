"""Diagnostics while training: they change nothing, are the functions' numbers, and go on across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.diagnostics import CodeFlips, Live, kept, layer_signals, measure, nonzero_activations, training_rules
from bitstrata.diagnostics.measure import WHAT
from bitstrata.objectives import min_norm_point
from bitstrata.recipes.base import names
from bitstrata.train import Callback, Moment, TrainConfig, Trainer, quiet
from bitstrata.train.metrics import read, reproducible
from bitstrata.train.tensorboard import scalars

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, checkpoint_every=2, log_every=2)


def images(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return list(zip(x.split(8), torch.randint(0, 3, (count,), generator=generator).split(8), strict=True))


def network(recipe: bs.Recipe | None = None, *, calibrated: bool = True, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    if recipe is not None:
        bs.quantize_(model, recipe, images()[0][0])
        if calibrated:
            bs.calibrate_(model, [images()[0][0]])
    return model


def strata() -> bs.Recipe:
    return bs.recipes.strata(w=(1, 2, 4))


def train(model: nn.Module, out: Path | None = None, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    trainer = Trainer(model, config, images(), images(), out, reporter=quiet, **options)
    trainer.fit()
    return trainer


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def diagnoses(out: Path) -> list[dict[str, Any]]:
    return [event for event in read(out / "metrics.jsonl") if event["event"] == "diagnosis"]


def plain(out: Path) -> list[dict[str, Any]]:
    return reproducible(event for event in read(out / "metrics.jsonl") if event["event"] != "diagnosis")


@pytest.mark.parametrize(("calibrated", "combine"), [(True, "mgd"), (False, "scalarization")])
def test_training_ends_in_the_same_bits_with_and_without(calibrated, combine, tmp_path):
    config = TrainConfig(**{**CONFIG.to_dict(), "combine": combine})
    alone, watched = (network(strata(), calibrated=calibrated) for _ in range(2))
    train(alone, tmp_path / "alone", config)
    live = Live(every=3)
    train(watched, tmp_path / "watched", config, callbacks=[live])
    assert_same(alone, watched)
    assert plain(tmp_path / "alone") == plain(tmp_path / "watched")
    assert live.measurements == 4
    assert set(live.milliseconds) == {"signals", "rules", "moo", "flips"}
    assert all(value > 0 for value in live.milliseconds.values())


def test_a_fused_network_trains_to_the_same_bits_and_names_its_layers(tmp_path):
    def fused() -> nn.Module:
        return bs.fuse(network(strata(), dropout=0.0))

    alone, watched = fused(), fused()
    train(alone)
    train(watched, tmp_path, callbacks=[Live(every=2)])
    assert_same(alone, watched)
    assert set(diagnoses(tmp_path)[0]["layers"]["weight_sqnr"]["4"]) == {"0", "3", "8"}


def test_a_resumed_run_has_the_record_of_an_undisturbed_one(tmp_path):
    whole = network(strata())
    train(whole, tmp_path / "whole", callbacks=[Live(every=3)])
    trainer = Trainer(
        network(strata()), CONFIG, images(), images(), tmp_path / "cut", reporter=quiet, callbacks=[Live(every=3)]
    )
    objective = trainer.objective

    def failing(model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
        if trainer.position.step == 7:  # the look at 6 lies behind the checkpoint at 6, and is made again
            raise KeyError("stop")
        return objective(model, inputs, targets)

    trainer.objective = failing
    with pytest.raises(KeyError):
        trainer.fit()
    resumed = network(strata())
    train(resumed, tmp_path / "cut", callbacks=[Live(every=3)])
    assert_same(whole, resumed)
    found, expected = (reproducible(diagnoses(tmp_path / name)) for name in ("cut", "whole"))
    # The failing run's objective is one of its own, so its losses for "moo" differ; all else is the same.
    assert [event["step"] for event in found] == [event["step"] for event in expected] == [0, 3, 6, 8]
    assert found[2:] == expected[2:]
    assert [event.get("since") for event in found] == [None, 0, 3, 6]
    assert "flips" in found[2]["layers"]


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_numbers_are_those_of_the_functions(tmp_path):
    model = network(strata(), dropout=0.0)
    seen: list[dict[str, Any]] = []

    class Same(Callback):
        def look(self, moment: Moment) -> None:
            with bs.precision(moment.model, 2):
                signals = layer_signals(moment.model, [moment.inputs])
                ratios = nonzero_activations(moment.model, [moment.inputs])
                rules = training_rules(moment.model, entropy, (moment.inputs, moment.targets), training=True)
            seen.append({"signal": signals["3"], "R_a": ratios.pooled, "rules": rules})

        def due(self, step: int, total: int) -> bool:
            return step in (0, total)

    train(model, tmp_path, callbacks=[Live(every=100), Same()])
    for event, mine in zip(diagnoses(tmp_path), seen, strict=True):
        layers, whole = event["layers"], event["whole"]

        def at(name: str, layers: dict[str, Any] = layers) -> float:
            return layers[name]["2"]["3"]

        assert at("weight_sqnr") == pytest.approx(mine["signal"].weight.sqnr, rel=1e-4)
        assert at("weight_step") == pytest.approx(mine["signal"].weight.step, rel=1e-4)
        assert at("weight_clipped") == pytest.approx(mine["signal"].weight.clipped, rel=1e-4)
        assert at("input_sqnr") == pytest.approx(mine["signal"].input.sqnr, rel=1e-4)
        assert at("input_step") == pytest.approx(mine["signal"].input.step, rel=1e-4)
        assert at("input_deviation") == pytest.approx(mine["signal"].input.deviation, rel=1e-4)
        assert at("input_nonzero") == pytest.approx(mine["signal"].input.nonzero, rel=1e-4)
        assert whole["R_a"]["2"] == pytest.approx(mine["R_a"], rel=1e-4)
        assert whole["kappa0"]["2"] == pytest.approx(mine["rules"].kappa0, rel=1e-4)
        assert at("kappa1") == pytest.approx(mine["rules"].layers["3"].kappa1, rel=1e-4)
        assert at("variance_ratio") == pytest.approx(mine["rules"].layers["3"].ratio, rel=1e-4)
        assert at("gradient_variance") == pytest.approx(mine["rules"].layers["3"].gradient, rel=1e-4)


def test_factors_are_those_that_multiple_gradient_descent_takes(tmp_path):
    taken: list[dict[int, float]] = []
    config = TrainConfig(**{**CONFIG.to_dict(), "combine": "mgd", "epochs": 1})
    model = network(strata(), dropout=0.0)
    trainer = Trainer(model, config, images(), None, tmp_path, reporter=quiet, callbacks=[Live(every=1, what=["moo"])])
    run = trainer.objective.__class__.__call__

    class Noted(type(trainer.objective)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            results = run(self, *args)
            taken.append({p: result.alpha for p, result in results.items()})
            return results

    trainer.objective.__class__ = Noted
    trainer.fit()
    events = diagnoses(tmp_path)
    assert len(taken) == 4
    assert len(events) == 5
    for event, alphas in zip(events, taken, strict=False):
        assert event["whole"]["moo_factor"] == {str(p): pytest.approx(alphas[p], abs=1e-4) for p in sorted(alphas)}
        norms, cosines = event["whole"]["moo_norm"], event["whole"]["moo_cosine"]
        levels = (1, 2, 4)
        gram = torch.tensor(
            [
                [
                    norms[str(a)] * norms[str(b)] * (1.0 if a == b else cosines[f"{max(a, b)}-{min(a, b)}"])
                    for b in levels
                ]
                for a in levels
            ],
            dtype=torch.float64,
        )
        factors = min_norm_point(gram=gram).tolist()
        assert list(event["whole"]["moo_factor"].values()) == pytest.approx(factors, abs=5e-3)


def test_flips_compare_with_the_measurement_before(tmp_path):
    model = network(strata())
    codes = CodeFlips(model)
    train(model, tmp_path, callbacks=[Live(every=100, what=["flips"])])
    first, last = diagnoses(tmp_path)
    assert first["layers"] == {}
    assert (last["since"], last["step"]) == (0, 8)
    expected = codes.update()
    for plane, of_layers in last["layers"]["flips"].items():
        for layer, share in of_layers.items():
            assert share == pytest.approx(expected[layer][int(plane) - 1], rel=1e-4)


def test_codes_of_another_network_are_refused():
    flips, other = CodeFlips(network(strata())), CodeFlips(nn.Sequential(*network(strata())[:7]))
    with pytest.raises(ValueError, match="'8' has the shape None, expected \\(3, 16\\)"):
        flips.load_state(other.state())
    flips.load_state(flips.state())
    assert all(set(shares) == {0.0} for shares in flips.update().values())


def test_float_networks_have_the_rules_alone(tmp_path):
    train(network(), tmp_path, callbacks=[Live(every=4)])
    event = diagnoses(tmp_path)[0]
    assert set(event["whole"]) == {"kappa0"}
    assert set(event["layers"]) == {"kappa1", "gradient_variance"}
    assert set(event["layers"]["gradient_variance"]["float"]) == {"0", "3", "8"}


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = network(strata())
    trainer = Trainer(model, CONFIG, images(), None, tmp_path, reporter=quiet, callbacks=[Live()])
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        trainer.fit()
    (event,) = diagnoses(tmp_path)
    assert event["reason"] == "'3.weight' is not finite"
    assert event["layers"] == {}


def test_kept_puts_first_steps_back():
    model = network(strata(), calibrated=False).train()
    with kept(model, training=True):
        for p in (1, 2, 4):
            with bs.precision(model, p):
                model(images()[0][0])
    quantizers = [layer.act_quant for layer in (model[3], model[8])]
    assert not any(quantizer.is_initialized() for quantizer in quantizers)


def test_what_is_not_to_be_had_is_an_error_before_training(tmp_path):
    one = network(bs.recipes.lsq(2))
    cases = [
        (one, ["moo"], "'moo' is not to be had: the network has one precision, 2"),
        (network(), ["sqnr"], "'sqnr' is not to be had: the network is float"),
        (one, ["entropy"], "what must be among sqnr, .*, moo, got 'entropy'"),
        (one, "sqnr", "what must be a collection of names, got 'sqnr'"),
        (one, [], "got nothing"),
    ]
    for model, what, message in cases:
        with pytest.raises(ValueError, match=message):
            train(model, tmp_path, callbacks=[Live(what=what)])
    assert not (tmp_path / "metrics.jsonl").exists()
    for arguments in ({"every": 0}, {"images": 0}, {"images": True}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Live(**arguments)
    with pytest.raises(ValueError, match="measure: images must be at least 1"):
        measure(one, images()[0], images=0)


def test_callbacks_are_told_apart():
    with pytest.raises(TypeError, match=r"callbacks must be of bitstrata\.train\.Callback, got int"):
        Trainer(network(), CONFIG, images(), callbacks=[3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="two callbacks are called 'diagnostics'"):
        Trainer(network(), CONFIG, images(), callbacks=[Live(), Live()])


def test_tensorboard_gets_a_scalar_of_every_number():
    fields = {"layers": {"flips": {"1": {"conv": 0.5}}}, "whole": {"R_w": {"4": 0.25}}, "ms": {}, "step": 3}
    assert dict(scalars("diagnosis", fields)) == {"R_w/4": 0.25, "flips/conv/1": 0.5}


def test_every_name_of_what_gives_its_values():
    found = measure(network(strata()), images()[0])
    expected = {name for what, values in WHAT.items() if what != "flips" for name in values}
    assert set(found.layers) | set(found.whole) == expected
    assert set(found.layers["weight_sqnr"]) == {"1", "2", "4"}
    assert set(found.whole["moo_cosine"]) == {"2-1", "4-1", "4-2"}


@pytest.mark.filterwarnings("ignore:quantize_")
@pytest.mark.parametrize("name", sorted(set(names()) - {"shiftquant"}))
def test_every_recipe_can_be_measured_and_is_left_as_it_was(name):
    model = network(bs.recipes.get(name)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    found = measure(model, images()[0])
    assert set(found.layers["weight_step"]) == {str(p) for p in bs.precisions(model)}
    assert {"weight_step", "input_sqnr", "kappa1", "gradient_variance"} <= set(found.layers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
