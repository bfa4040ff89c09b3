"""Learning rates of the papers' schedules, and the options of a configuration."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

import bitstrata as bs
from bitstrata.train import TrainConfig
from bitstrata.train.config import differences
from bitstrata.train.schedule import lr_factor, lr_factor_of


def rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    return [config.lr * lr_factor_of(config, s, steps_per_epoch) for s in range(config.epochs * steps_per_epoch)]


def test_one_bit_adam_schedule_of_uniq():
    config = TrainConfig(
        epochs=90, lr=0.004, warmup=5, warmup_lr=0.001, schedule="cosine_epoch", optimizer="adam", weight_decay=0
    )
    lr = rates(config, 3)
    assert lr[:15] == pytest.approx([0.001] * 15, rel=1e-15)
    assert lr[15:18] == [0.004] * 3
    for epoch in range(5, 90):
        expected = 0.004 * (1 + math.cos(math.pi * (epoch - 5) / 85)) / 2
        assert lr[3 * epoch : 3 * epoch + 3] == pytest.approx([expected] * 3, rel=1e-12)
    assert lr[-1] < 0.004 * 0.0004  # one epoch before zero


def test_a_constant_warm_up_with_a_cosine_by_iteration():
    lr = rates(TrainConfig(epochs=10, lr=0.004, warmup=2, warmup_lr=0.001), 4)
    assert lr[:8] == pytest.approx([0.001] * 8)
    assert lr[8] == 0.004
    assert lr[9] == pytest.approx(0.002 * (1 + math.cos(math.pi / 32)))


def test_schedule_of_scale_adjusted_training():
    config = TrainConfig(epochs=150, lr=0.4, warmup=5, warmup_start=256 / 2048, batch_size=2048)
    lr = rates(config, 10)
    assert [lr[s] for s in (0, 25, 50, 775)] == pytest.approx([0.05, 0.225, 0.4, 0.2])
    assert lr[1] - lr[0] == pytest.approx(0.35 / 50)
    assert lr[-1] == pytest.approx(0, abs=1e-6)
    assert lr[50:] == sorted(lr[50:], reverse=True)


def test_warm_up_from_above_the_peak():
    lr = rates(TrainConfig(epochs=3, lr=0.1, warmup=1, warmup_start=2.0, schedule="constant"), 4)
    assert lr == pytest.approx([0.2, 0.175, 0.15, 0.125] + [0.1] * 8)


def test_cosine_by_epoch_starts_anew_each_epoch():
    lr = rates(TrainConfig(epochs=4, lr=1.0, schedule="cosine_epoch"), 5)
    for epoch in range(4):
        assert lr[5 * epoch : 5 * epoch + 5] == pytest.approx([(1 + math.cos(math.pi * epoch / 4)) / 2] * 5)
    by_iteration = rates(TrainConfig(epochs=4, lr=1.0), 5)
    assert by_iteration[::5] == lr[::5]
    assert all(a < b for i, (a, b) in enumerate(zip(by_iteration, lr, strict=True)) if i % 5)


def test_rising_warm_up_without_a_start_ends_at_the_peak():
    assert [lr_factor(s, 8, 4, "constant") for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor(s, 8, 4, "constant", start=0.5) for s in range(5)] == [0.5, 0.625, 0.75, 0.875, 1.0]
    assert lr_factor(3, 8, 4, "cosine", level=0.3) == 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_start": -0.1}, r"warmup_start=-0.1 must not be negative$"),
        ({"warmup_lr": 0.0}, r"warmup_lr=0.0 must be positive$"),
        ({"warmup_lr": 0.1, "warmup_start": 0.5}, r"warmup_start=0.5 is void with warmup_lr=0.1$"),
        ({"warmup": 0.5, "schedule": "cosine_epoch"}, r"warmup=0.5 must be a whole number of epochs with schedule="),
        ({"schedule": "step"}, r"schedule='step' must be one of 'cosine', 'cosine_epoch', 'constant'$"),
        ({"decay": "none"}, r"decay='none' must be one of 'all', 'weights', 'weights_no_depthwise'$"),
        ({"loss": "hinge"}, r"loss='hinge' must be one of 'cross_entropy', 'maqd'$"),
        ({"loss_gamma": 1.5}, r"loss_gamma=1.5 must be in \[0, 1\]$"),
        ({"loss": "maqd", "label_smoothing": 0.1}, r"label_smoothing=0.1 is void with loss='maqd'$"),
        ({"distill": "mse"}, r"distill='mse' must be one of 'cosine', 'kl', None$"),
        ({"distill_weight": -1.0}, r"distill_weight=-1.0 must not be negative$"),
        ({"distill_temperature": 2.0}, r"distill_temperature=2.0 is void with distill='cosine'$"),
        ({"distill": "kl", "distill_temperature": 0.0}, r"distill_temperature=0.0 must be positive$"),
        ({"teacher": "first"}, r"teacher='first' must be one of 'next', 'widest'$"),
        ({"combine": "mean"}, r"combine='mean' must be one of 'scalarization', 'mgd'$"),
        ({"reduction": "max"}, r"reduction='max' must be one of 'mean', 'sum'$"),
        ({"combine": "mgd", "reduction": "sum"}, r"reduction='sum' is void with combine='mgd'$"),
        ({"precisions": ()}, r"precisions=\(\) must name at least one precision, or be None$"),
        ({"weight_decay": float("nan")}, r"weight_decay=nan must not be negative$"),
        ({"lr": float("inf")}, r"lr=inf must be positive$"),
    ],
)
def test_configuration_rejects(fields, message):
    with pytest.raises(ValueError, match=f"^TrainConfig: {message}"):
        TrainConfig(**fields)


def test_from_a_recipe_with_overrides():
    recipe = SimpleNamespace(
        training={"lr": 0.004, "optimizer": "adam", "warmup": 5.0, "warmup_lr": 0.001, "epochs": 90}
    )
    config = TrainConfig.from_recipe(recipe, epochs=10, seed=3)
    assert config == TrainConfig(lr=0.004, optimizer="adam", warmup=5.0, warmup_lr=0.001, epochs=10, seed=3)
    assert TrainConfig.from_recipe(SimpleNamespace(training={})) == TrainConfig()


@pytest.mark.parametrize("name", bs.recipes.names())
def test_every_recipe_gives_a_configuration(name):
    recipe = bs.recipes.get(name)
    config = TrainConfig.from_recipe(recipe, epochs=400)
    assert config.epochs == 400
    assert {k: v for k, v in recipe.training.items() if k != "epochs"}.items() <= config.to_dict().items()


def test_from_a_recipe_with_a_name_that_is_no_field():
    with pytest.raises(ValueError, match=r"^TrainConfig: no field 'momentums', 'rate'; there are: amp, batch_size, "):
        TrainConfig.from_recipe(SimpleNamespace(training={"rate": 1}), momentums=0.9)
    with pytest.raises(ValueError, match=r"^TrainConfig: lr=-1 must be positive$"):
        TrainConfig.from_recipe(SimpleNamespace(training={"lr": -1}))


def test_a_configuration_survives_json_values():
    config = TrainConfig(precisions=(1, 2))
    assert TrainConfig(**{**config.to_dict(), "precisions": [1, 2]}) == config


def test_a_field_that_a_saved_configuration_does_not_know_has_its_default():
    config = TrainConfig(lr=0.2)
    old = {name: value for name, value in config.to_dict().items() if name not in ("combine", "warmup_start")}
    assert differences(old, config.to_dict()) == []
    assert differences(old, TrainConfig(lr=0.2, combine="mgd").to_dict()) == [
        "combine: 'scalarization' saved, 'mgd' now"
    ]
    assert differences({**old, "gone": 1}, config.to_dict()) == ["gone: 1 saved, 'absent' now"]
