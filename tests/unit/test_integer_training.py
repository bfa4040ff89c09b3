"""integer_: whole models that train in integers, and what they keep for the backward pass."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_integer import gauss, same
from torch import Tensor, nn

from bitstrata import integer_, quantize_, recipes, saved_memory, zoo
from bitstrata.integer import IntegerRule
from bitstrata.nn import (
    IntegerConv1d,
    IntegerConv2d,
    IntegerLinear,
    L1BatchNorm2d,
    QuantizedL1BatchNorm1d,
    QuantizedL1BatchNorm2d,
)
from bitstrata.prepare import integer_layers, load_noise_state_, noise_state
from bitstrata.prepare.integer_training import CounterRounding


class Backwards(nn.Module):
    """Runs its layers in another order than it holds them, one of them twice and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.idle = nn.Linear(4, 4)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.again = self.norm
        self.stem = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.again(self.middle(self.middle(x))).relu()
        return self.head(F.adaptive_avg_pool2d(x, (2, 1)).flatten(1))


X = gauss(6, 4, 5, 5)


def built(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return integer_(Backwards(), X, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Loss and gradients of one step; the optimizer takes it."""
    model.zero_grad()
    loss = model(X).square().mean()
    loss.backward()
    out = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    if optimizer is not None:
        optimizer.step()
    return out


def test_layers_change_class_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = Backwards()
    model.middle.weight = nn.Parameter(model.middle.weight.detach())
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    twin = copy.deepcopy(model)
    assert integer_(model, X, norm="batch") is model
    assert {name: type(m) for name, m in integer_layers(model).items()} == {
        "head": IntegerLinear,
        "middle": IntegerConv2d,
        "stem": IntegerConv2d,
    }
    assert type(model.idle) is nn.Linear
    assert type(model.norm) is nn.BatchNorm2d
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model.load_state_dict(twin.state_dict())
    assert model.training


def test_first_and_last_in_order_of_execution_have_the_edge_width() -> None:
    layers = integer_layers(built(w=3, a=4, g=5, edge_bits=7))
    widths = {name: (m.rule.w, m.rule.a, m.rule.g) for name, m in layers.items()}
    assert widths == {"stem": (7, 7, 7), "middle": (3, 4, 5), "head": (7, 7, 7)}
    assert [layers["stem"].state.name, layers["head"].state.name] == ["IntegerConv2d 'stem'", "IntegerLinear 'head'"]


def shown(options: object) -> str:
    """Options as the test's name shows them, the same in every process."""
    return re.sub(r"<function .*? at 0x\w+>", "function", str(options))


@pytest.mark.parametrize(
    ("norm", "kind", "l2"),
    [
        (None, QuantizedL1BatchNorm2d, False),
        ("l1_quantized", QuantizedL1BatchNorm2d, False),
        ("l2_quantized", QuantizedL1BatchNorm2d, True),
        ("l1", L1BatchNorm2d, None),
        ("batch", nn.BatchNorm2d, None),
    ],
)
def test_normalizations(norm: str | None, kind: type[nn.Module], l2: bool | None) -> None:
    model = built(norm=norm)
    assert type(model.norm) is kind
    assert model.norm is model.again
    assert getattr(model.norm, "l2", None) == l2


def test_methods_are_what_they_set() -> None:
    rules = {}
    for method in ("shift", "int8_naive", "int8_sr"):
        model = built(method=method)
        rules[method] = model.middle.rule
        assert isinstance(model.norm, QuantizedL1BatchNorm2d)
        assert model.norm.l2 == (method != "shift")
        assert isinstance(model.norm.rounding, CounterRounding) == (method != "int8_naive")
    assert rules["shift"] == IntegerRule()
    assert rules["int8_sr"] == IntegerRule(w=8, a=8, g=8, method="tensor")
    assert rules["int8_naive"] == IntegerRule(w=8, a=8, g=8, method="tensor", grad_rounding="nearest")
    assert built(method="int8_sr", w=8, norm="batch").middle.rule == rules["int8_sr"]


@pytest.mark.parametrize(
    "change",
    [
        {"w": 3},
        {"a": 3},
        {"g": 3},
        {"groups": 1},
        {"edge_bits": 4},
        {"norm": "l1"},
        {"norm": "l2_quantized"},
        {"norm": "batch"},
        {"l1_scale": "1"},
        {"method": "int8_sr"},
        {"method": "int8_naive"},
        {"act_rounding": "stochastic"},
        {"unsigned_nonneg": True},
        {"seed": 1},
        {"filter": lambda name, _: name != "middle"},
    ],
    ids=shown,
)
def test_every_option_changes_the_step(change: dict[str, Any]) -> None:
    base = step(built())
    assert same(base, step(built()))
    assert not all(torch.equal(a, b) for a, b in zip(base, step(built(**change)), strict=True))


@pytest.mark.parametrize("form", ["shift", "grouped"])
def test_the_form_changes_nothing(form: str) -> None:
    assert same(step(built()), step(built(form=form)))


def test_resuming_continues_exactly() -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model = built(seed=4)
    one = optimizer(model)
    step(model, one)
    weights, noise = copy.deepcopy(model.state_dict()), noise_state(model)
    assert noise["middle"]["seed"] == 4
    assert set(noise) == {"head", "middle", "stem", "norm"}
    assert len({entry["stream"] >> 40 for entry in noise.values()}) == 4  # streams of their own
    expected = [*step(model, one), *step(model, one)]
    torch.rand(7)
    other = built(seed=9)
    other.load_state_dict(weights)
    load_noise_state_(other, noise)
    two = optimizer(other)
    assert same(expected, [*step(other, two), *step(other, two)])
    with pytest.raises(ValueError, match=r"load_noise_state_: the state is of \['stem'\], the model's generators of"):
        load_noise_state_(other, {"stem": noise["stem"]})


def test_a_model_learns_at_four_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 1, 8, 8)
    y = (x[:, 0, :, :4].mean((1, 2)) > x[:, 0, :, 4:].mean((1, 2))).long()
    model = integer_(zoo.create("digits_cnn", classes=2, width=4), x[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        for i in range(0, 256, 64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i : i + 64]), y[i : i + 64]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).float().mean()) > 0.85


def test_one_dimensional_models() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = gauss(5, 4, 5)
    integer_(model, x)
    assert type(model[0]) is IntegerConv1d
    assert type(model[1]) is QuantizedL1BatchNorm1d
    model(x).sum().backward()
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "preact_resnet20", "digits_resnet"])
def test_networks_of_the_zoo_take_a_step(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.create(name)
    x = torch.randn(2, 1 if name.startswith("digits") else 3, 8, 8)
    layers = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())
    integer_(model, x)
    assert len(integer_layers(model)) == layers
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(entry.state.noise.stream % (1 << 40) == 1 for entry in integer_layers(model).values())


def test_transformer_layers_run_in_integers_in_evaluation_too() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1)
    x = torch.randn(2, 5, 8)
    plain = copy.deepcopy(encoder).eval()
    integer_(encoder, x, w=2, a=2, edge_bits=2)
    assert set(integer_layers(encoder)) == {"layers.0.self_attn", "layers.0.linear1", "layers.0.linear2"}
    assert type(encoder.layers[0].self_attn.out_proj) is not IntegerLinear  # attention reads its weight itself
    encoder(x).sum().backward()
    with torch.no_grad():
        trained_mode, evaluated = encoder(x), encoder.eval()(x)
        torch.testing.assert_close(trained_mode, evaluated)  # torch's attention has two forms, the rest is the same
        assert not torch.allclose(evaluated, plain(x), atol=1e-2)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(2, 1 / 14), (4, 1 / 7), (8, 1 / 3.8)])
def test_layers_keep_packed_codes_only(bits: int, share: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    plain = zoo.create("digits_cnn")
    float_memory = saved_memory(plain, x)
    integer_memory = saved_memory(integer_(plain, x, w=bits, a=bits, g=bits, edge_bits=bits, norm="batch"), x)
    assert list(float_memory.layers) == list(integer_memory.layers) == ["0", "3", "6", "11"]
    for name, layer in integer_memory.layers.items():
        assert float_memory.layers[name].kept == layer.float32 == float_memory.layers[name].float32
        assert 0 < layer.kept <= share * layer.float32
    shapes = {"0": (8 * 64, 1), "3": (16 * 8 * 64, 16), "6": (32 * 8 * 16, 32), "11": (128 * 8, 128)}
    for name, (codes, channels) in shapes.items():  # codes, 2 bits a channel, the scale
        assert integer_memory.layers[name].kept == codes * bits // 8 + (channels + 3) // 4 + 4


def test_layers_used_twice_and_frozen_layers() -> None:
    model = built(norm="batch")
    both = saved_memory(model, (X,))
    assert both.layers["middle"].float32 == 2 * 4 * 6 * 8 * 25
    assert "idle" not in both.layers
    model.middle.weight.requires_grad_(False)
    frozen = saved_memory(model, X)
    assert frozen.layers["middle"].kept == 0
    assert both.total - frozen.total == both.layers["middle"].kept
    assert not model.middle._forward_hooks
    assert not model.middle._forward_pre_hooks


# --- refused, and the model as it was ---------------------------------------------------------------------------------


def poisoned(where: str) -> Backwards:
    model = Backwards()
    with torch.no_grad():
        model.get_parameter(where)[0] = torch.nan if where != "norm.bias" else torch.inf
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w": 9}, "IntegerRule: w: bits must be an integer in 2..8, got 9"),
        ({"w": 0}, "integer_: w must be in 2..8, got 0"),
        ({"edge_bits": 1}, "IntegerRule: w: bits must be an integer in 2..8, got 1"),
        ({"groups": 0}, "IntegerRule: groups must be an integer in 1..8, got 0"),
        ({"norm": "layer"}, "integer_: norm must be one of l1_quantized, l1, l2_quantized, batch, got 'layer'"),
        ({"method": "int4"}, "integer_: method must be one of shift, int8_naive, int8_sr, got 'int4'"),
        ({"method": "int8_sr", "g": 4}, "integer_: method 'int8_sr' has 8 bits; got g=4"),
        ({"l1_scale": "2"}, "integer_: BatchNorm2d 'norm': .*l1_scale must be one of"),
        ({"form": "fast"}, "form must be one of"),
        ({"seed": -1}, "seed must be in 0..2\\^64 - 1, got -1"),
        (
            {"filter": lambda *_: False},
            "integer_: no layer to convert among 4 candidates: .*kept in float by the filter",
        ),
    ],
    ids=shown,
)
def test_options_out_of_range_leave_the_model(options: dict[str, Any], message: str) -> None:
    refused(Backwards(), X, message, **options)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (poisoned("stem.weight"), X, "integer_: Conv2d 'stem': 36 of 288 values of weight are not finite"),
        (poisoned("norm.bias"), X, "integer_: BatchNorm2d 'norm': 1 of 8 values of bias are not finite"),
        (Backwards(), X * torch.inf, "integer_: the input of layer 'stem' on the example: .* not finite"),
        (Backwards(), X[:0], "integer_: the input of layer 'stem' on the example: it has no elements"),
        (
            nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
            X,
            "integer_: BatchNorm2d '1': .*no running statistics",
        ),
        (nn.Sequential(nn.ReLU()), X, "integer_: no layer to convert among 0 candidates: none"),
        (nn.Conv2d(4, 2, 1), X, "integer_: the model is a bare Conv2d; wrap it in nn.Sequential or use to_"),
    ],
)
def test_models_that_are_refused_stay_as_they_are(model: nn.Module, example: Tensor, message: str) -> None:
    refused(model, example, message)


def refused(model: nn.Module, example: Tensor, message: str, **options: Any) -> None:
    before = [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)]
    with pytest.raises(ValueError, match=message):
        integer_(model, example, **options)
    assert [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)] == before


def test_a_model_is_converted_once() -> None:
    with pytest.raises(ValueError, match="integer_: the model is quantized or in integers already"):
        integer_(built(), X)
    with pytest.raises(ValueError, match="integer_: the model is quantized or in integers already"):
        integer_(quantize_(Backwards(), recipes.strata(), X), X)
    with pytest.raises(TypeError, match=r"integer_: model must be a torch\.nn\.Module, got str"):
        integer_("model", X)  # type: ignore[arg-type]


def test_errors_in_training_name_the_layer() -> None:
    model = built()
    with pytest.raises(ValueError, match="IntegerConv2d 'stem': 600 of 600 elements of the activation"):
        model(X * torch.inf)
    skipping = built(on_nonfinite="skip", norm="batch")
    (skipping(X).sum() * torch.inf).backward()
    assert [m.state.skipped for m in integer_layers(skipping).values()] == [1, 0, 0]
    assert all(not p.grad.any() for p in skipping.parameters() if p.grad is not None)  # the head passes zeros on
