"""Every switch of every recipe changes what is computed: the output, a gradient, or an initial step."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.objectives import make_loss

SWITCHES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("strata", {}, {"w": (1, 2, 4)}),
    ("strata", {}, {"a": 8}),
    ("strata", {}, {"per_channel": True}),
    ("strata", {}, {"scales": "tied"}),
    ("strata", {"w": (1, 2, 4, 8)}, {"target_db": None}),
    ("strata", {}, {"edges": "inner"}),
    ("strata", {}, {"edges": "float"}),
    ("strata", {}, {"edge_bits": 4}),
    ("strata", {}, {"distill": None}),
    ("strata", {}, {"distill": "kl"}),
    ("lsq", {}, {"bits": 2}),
    ("lsq", {}, {"a": 3}),
    ("lsq", {}, {"per_channel": True}),
    ("lsq", {}, {"numel": "batch"}),
    ("lsq", {}, {"init": "mse"}),
    ("lsq", {}, {"init": 0.1}),
    ("lsq", {}, {"edges": "inner"}),
    ("lsq", {}, {"edge_bits": 4}),
    ("lsq_plus", {}, {"bits": 3}),
    ("lsq_plus", {}, {"a": 2}),
    ("lsq_plus", {}, {"per_channel": True}),
    ("lsq_plus", {}, {"numel": "batch"}),
    ("lsq_plus", {}, {"act_init": "minmax"}),
    ("lsq_plus", {}, {"act_init": 0.1}),
    ("lsq_plus", {}, {"edges": "inner"}),
    ("lsq_plus", {}, {"edge_bits": 4}),
    ("dorefa", {}, {"bits": 3}),
    ("dorefa", {}, {"a": 2}),
    ("dorefa", {}, {"scheme": "modified"}),
    ("dorefa", {}, {"scheme": "centered"}),
    ("dorefa", {"scheme": "centered"}, {"scheme": "modified"}),
    ("dorefa", {"bits": 1}, {"one_bit": "sat"}),
    ("dorefa", {}, {"detach_max": True}),
    ("dorefa", {}, {"edges": "inner"}),
    ("dorefa", {}, {"edge_bits": 4}),
    ("pact", {}, {"bits": 3}),
    ("pact", {}, {"a": 2}),
    ("pact", {}, {"alpha": 2.0}),
    ("pact", {}, {"double_side": True}),
    ("pact", {}, {"edges": "inner"}),
    ("pact", {}, {"edge_bits": 4}),
    ("cg_pact", {}, {"bits": 3}),
    ("cg_pact", {}, {"a": 2}),
    ("cg_pact", {}, {"alpha": 2.0}),
    ("cg_pact", {}, {"double_side": True}),
    ("cg_pact", {}, {"edges": "inner"}),
    ("cg_pact", {}, {"edge_bits": 4}),
    ("sat", {}, {"bits": 2}),
    ("sat", {}, {"a": 3}),
    ("sat", {}, {"rescale": None}),
    ("sat", {}, {"rescale": "stddev"}),
    ("sat", {}, {"convs": "all"}),
    ("sat", {}, {"convs": "none"}),
    ("sat", {}, {"var_mode": "std"}),
    ("sat", {}, {"scheme": "centered"}),
    ("sat", {}, {"detach_max": True}),
    ("sat", {}, {"alpha": 2.0}),
    ("sat", {}, {"double_side": True}),
    ("sat", {}, {"gradient": "pact"}),
    ("sat", {}, {"edges": "inner"}),
    ("sat", {}, {"edge_bits": 4}),
    ("uniq", {}, {"bits": 1}),
    ("uniq", {}, {"a": 4}),
    ("uniq", {}, {"per_channel": True}),
    ("uniq", {}, {"init": "lsq"}),
    ("uniq", {}, {"init": 0.2}),
    ("uniq", {}, {"signed_input": "cut"}),
    ("uniq", {}, {"numel": "sample"}),
    ("uniq", {}, {"edges": "float"}),
    ("uniq", {}, {"edge_bits": 4}),
    ("uniq", {}, {"downsample": "float"}),
    ("vertical", {}, {"bits": (2, 4)}),
    ("vertical", {}, {"a": 4}),
    ("vertical", {}, {"compensation": False}),
    ("vertical", {}, {"ste_include_z": False}),
    ("vertical", {}, {"act_init": "minmax"}),
    ("vertical", {}, {"act_init": "lsq"}),
    ("vertical", {}, {"act_init": "mse"}),
    ("vertical", {}, {"numel": "batch"}),
    ("vertical", {}, {"distill": None}),
    ("vertical", {}, {"distill": "kl"}),
    ("vertical", {}, {"combine": "mgd"}),
    ("vertical", {}, {"norm_levels": "statistics"}),
    ("vertical", {}, {"norm_levels": "shared"}),
    ("vertical", {}, {"own_edges": True}),
    ("vertical", {}, {"edges": "inner"}),
    ("vertical", {}, {"edge_bits": 4}),
    ("adabits", {}, {"bits": (1, 4)}),
    ("adabits", {}, {"a": 4}),
    ("adabits", {}, {"scheme": "centered"}),
    ("adabits", {}, {"alpha": 2.0}),
    ("adabits", {}, {"alpha": "mse"}),
    ("adabits", {}, {"edges": "inner"}),
    ("ascending", {}, {"bits": (2, 3)}),
    ("ascending", {}, {"a": 4}),
    ("ascending", {}, {"edges": "inner"}),
    ("int8", {}, {"a": None}),
    ("int8", {}, {"per_channel": True}),
    ("int8", {}, {"range": "full"}),
    ("int8", {}, {"edges": "int8"}),
    ("maqd", {}, {"m_w": 15}),
    ("maqd", {}, {"m_a": 8}),
    ("maqd", {}, {"s": 0.5}),
    ("maqd", {}, {"delta_mode": "M/2"}),
    ("maqd", {}, {"weight_ste": "literal"}),
    ("maqd", {}, {"ws_scale": "fan_in"}),
    ("maqd", {"m_a": 4}, {"act_surrogate": "literal"}),
    ("maqd", {}, {"act_surrogate": "ste"}),
    ("maqd", {}, {"alpha": 0.5}),
    ("maqd", {}, {"gamma": 0.5}),
    ("maqd", {}, {"norm": "batch"}),
    ("maqd", {}, {"edges": "int8"}),
]

NOT_COMPUTATION = {
    ("strata", "sampling"),  # which precisions a step of the Trainer has, tested with sampling
    ("uniq", "warmup"),  # changes the schedule, tested with schedules
    ("shiftquant", "on_nonfinite"),  # where numbers are not finite, tested with the recipe
}
SWITCHES += [
    ("shiftquant", {}, {name: value})
    for name, value in (
        ("w", 3),
        ("a", 5),
        ("g", 6),
        ("groups", 2),
        ("norm", "l2"),
        ("norm", "l1_float"),
        ("norm", "batch"),
        ("edge_bits", 4),
        ("act_rounding", "stochastic"),
        ("grad_rounding", "nearest"),
        ("unsigned_nonneg", True),
        ("clip_ratio", 0.5),
        ("grad_grid", "powers"),
        ("seed", 1),
    )
]


class Net(nn.Module):
    """A stem, a block with a shortcut, a layer that reads negative inputs, a layer without normalization, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8))
        self.shortcut = nn.Conv2d(8, 8, 1, 2, bias=False)
        self.signed = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.bare = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act2 = nn.ReLU()
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.conv(x) + self.shortcut(x)
        x = self.pool(self.act(self.signed(x)))
        return self.head(self.act2(self.norm(self.bare(x))).flatten(1))


def fingerprint(recipe: bs.Recipe) -> list[Tensor]:
    """Outputs of a calibrated model at every precision, in training and evaluation, and all gradients of one step."""
    torch.manual_seed(0)
    model = Net()
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    bs.quantize_(model, recipe, x[:4])
    if recipe.integers:
        return integer_fingerprint(model, x, y)
    bs.calibrate_(model, [x[:8], x[8:]])
    names = ("distill", "teacher", "combine", "reduction")
    options = {"gamma": recipe.objective.gamma} if recipe.objective.loss == "maqd" else {}
    loss = make_loss(recipe.objective.loss, **options)
    levels = bs.joint_backward(model, x, y, loss=loss, **{k: recipe.training[k] for k in names})
    found = [level.logits for level in levels.values()]
    found += [p.grad if p.grad is not None else torch.zeros(()) for p in model.parameters()]
    model.eval()
    for p in bs.precisions(model):
        with bs.precision(model, p), torch.no_grad():
            found.append(model(x))
    return found


def integer_fingerprint(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The same of a network that trains in integers."""
    logits = model(x)
    nn.functional.cross_entropy(logits, y).backward()
    found = [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        return [*found, model.eval()(x)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "base", "change"), SWITCHES, ids=lambda v: str(v).replace(" ", ""))
def test_a_switch_changes_the_result(name: str, base: dict[str, Any], change: dict[str, Any]) -> None:
    first = fingerprint(bs.recipes.get(name, **base))
    assert same(first, fingerprint(bs.recipes.get(name, **base)))  # the harness itself repeats
    assert not same(first, fingerprint(bs.recipes.get(name, **{**base, **change})))


def test_every_field_of_every_recipe_is_among_the_switches() -> None:
    fields = {
        (name, field)
        for name in bs.recipes.names()
        for field in inspect.signature(bs.recipes.base.describe(name).make).parameters
    }
    assert fields == {(name, field) for name, _, change in SWITCHES for field in change} | NOT_COMPUTATION
