"""Odd models and odd calls, for every recipe: frozen or tied layers, memory, half precision, copies, misuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering import LowerError
from bitstrata.nn import QuantizedLayer

R = bs.recipes
NAMES = tuple(name for name in R.names() if not R.get(name).integers)  # what trains in integers is tested by itself
X = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 1, 0, 1, 1])


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def calibrated(name: str, model: nn.Module | None = None, x: Tensor = X) -> nn.Module:
    return bs.calibrate_(bs.quantize_(net() if model is None else model, R.get(name), x), [x])


def train_step(model: nn.Module, x: Tensor = X) -> None:
    model.train().zero_grad()
    bs.joint_backward(model, x, Y[: len(x)])


def exact(model: nn.Module, x: Tensor = X) -> None:
    report = bs.verify(model.eval(), bs.lower(model, x), x)
    assert report.ok, report.first_difference


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


# ---- frozen and tied


def the_weight(model: nn.Module) -> list[nn.Parameter]:
    return [model[3].weight]


def the_layer(model: nn.Module) -> list[nn.Parameter]:
    return list(model[3].parameters())


def the_quantizers(model: nn.Module) -> list[nn.Parameter]:
    return [p for key, p in model.named_parameters() if "_quant" in key]


@pytest.mark.parametrize(
    ("name", "choose"),
    [(name, the_layer) for name in NAMES]
    + [(name, choose) for name in ("lsq_plus", "maqd", "sat", "strata") for choose in (the_weight, the_quantizers)],
)
def test_frozen_parameters_get_no_gradient_and_change_no_other(name, choose: Callable):
    model = calibrated(name)
    free = copy.deepcopy(model)
    frozen = choose(model)
    for parameter in frozen:
        parameter.requires_grad_(False)
    train_step(model)
    train_step(free)
    for parameter, other in zip(model.parameters(), free.parameters(), strict=True):
        if any(parameter is q for q in frozen) or other.grad is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, other.grad)
    if choose is the_layer:
        exact(model)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_frozen_in_float_stays_frozen(name):
    model = net()
    model[1].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    train_step(calibrated(name, model))
    assert model[3].weight.grad is None
    assert all(not level.weight.requires_grad and level.bias.requires_grad for level in model[1].levels.values())
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^joint_backward: the loss at precision \d depends on no parameter that is tr"
    ):
        train_step(model)


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)]
    layers[4].weight = layers[2].weight
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_in_two_layers(name):
    model = calibrated(name, tied(), ROWS)
    assert model[4].weight is model[2].weight
    untied = copy.deepcopy(model)
    untied[4].weight = nn.Parameter(untied[2].weight.detach().clone())
    train_step(model, ROWS)
    train_step(untied, ROWS)
    torch.testing.assert_close(model[2].weight.grad, untied[2].weight.grad + untied[4].weight.grad)
    exact(model, ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_one_module_in_two_places(name):
    torch.manual_seed(0)
    layer, norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU(), layer, norm, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 2))
    calibrated(name, model, ROWS)
    assert model[3] is model[6]
    assert model[1] is model[4]
    train_step(model, ROWS)
    assert finite(model)
    exact(model, ROWS)


# ---- memory formats and dtypes


def transposed_in_memory(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_memory_format_changes_nothing(name):
    model = calibrated(name).double().eval()
    x = X.double()
    inputs = (x.to(memory_format=torch.channels_last), transposed_in_memory(x), x.repeat_interleave(2, 0)[::2])
    last, moved = copy.deepcopy(model).to(memory_format=torch.channels_last), copy.deepcopy(model)
    for index in (0, 3):
        moved[index].weight.data = transposed_in_memory(moved[index].weight.data)
        assert not moved[index].weight.is_contiguous()
    for p in {bs.precisions(model)[0], bs.precisions(model)[-1]}:
        for other in (model, last, moved):
            bs.set_precision(other, p)
        for index in (0, 3):
            assert torch.equal(moved[index].weight_codes(), model[index].weight_codes())
            assert torch.equal(last[index].quantized_weight(), model[index].quantized_weight())
        for other in (model, last, moved):
            for same in inputs:
                torch.testing.assert_close(other(same), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    model = calibrated(name).to(dtype)
    train_step(model, X.to(dtype))
    assert finite(model)
    for p in bs.precisions(model):
        with bs.precision(model, p):
            assert bool(torch.isfinite(model.eval()(X.to(dtype))).all())
            for layer in (m for m in model.modules() if isinstance(m, QuantizedLayer)):
                value = layer.weight_grid().dequantize(layer.weight_codes()).double()
                weight = layer.quantized_weight()
                assert weight.dtype == dtype
                assert (
                    float(((weight.double() - value).abs() / value.abs().clamp_min(1e-9)).max())
                    <= torch.finfo(dtype).eps
                )
    exact(model if dtype == torch.float16 else calibrated(name, net().to(dtype), X.to(dtype)))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model = calibrated(name).train()
    for p in bs.precisions(model):
        with bs.precision(model, p), torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(X)
        assert out.dtype == torch.bfloat16
        F.cross_entropy(out.float(), Y[:4]).backward()
    assert model[3].weight.grad.dtype == torch.float32
    assert finite(model)


# ---- copies


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state(name: str, model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = bs.quantize_(net(7), R.get(name), X)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("name", NAMES)
def test_copies_compute_the_same_and_are_independent(name):
    model = calibrated(name).eval()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model), by_state(name, model)]
    mine = {p.data_ptr() for p in model.parameters()}
    low, high = bs.precisions(model)[0], bs.precisions(model)[-1]
    for other in copies:
        for p in bs.precisions(model):
            bs.set_precision(model, p)
            bs.set_precision(other, p)
            assert torch.equal(other.eval()(X), model(X))
        assert not mine & {p.data_ptr() for p in other.parameters()}
        bs.set_precision(other, low)
        assert (model[3].precision, model[1].precision, other[1].precision) == (high, high, low)


@pytest.mark.parametrize(
    ("name", "other"), [("strata", "uniq"), ("lsq", "vertical"), ("sat", "maqd"), ("uniq", "int8")]
)
def test_the_state_of_another_recipe(name, other):
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for Sequential"):
        bs.quantize_(net(), R.get(name), X).load_state_dict(calibrated(other).state_dict())


# ---- odd calls


@pytest.mark.parametrize("name", NAMES)
def test_calls_in_the_wrong_order(name):
    model = bs.quantize_(net(), R.get(name), X)
    with pytest.raises(
        LowerError, match=r"^lower: layer '0': \w+Activation: no step size at precision \d: run bitstrata"
    ):
        bs.lower(model, X)
    with pytest.raises(RuntimeError, match=r"^\w+Activation: no step size at precision \d: run bitstrata\.calibrate_"):
        model.eval()(X)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^quantize_: the model is quantized already; start from a float model$"):
        bs.quantize_(model, R.get(name), X)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"^quantize_: no layer to quantize among 0 candidates: none ran$"):
        bs.quantize_(nn.Sequential(nn.ReLU()), R.get(name), X)
    with pytest.raises(ValueError, match=r"^calibrate_: the model has no quantized layers; call quantize_ first$"):
        bs.calibrate_(net(), [X])


@pytest.mark.parametrize("value", [0, 7, -1, "4", 4.0, True, None, 2.5])
def test_unknown_precisions(value):
    for name in ("strata", "maqd"):
        model = calibrated(name)
        before = [m.precision for m in model.modules() if isinstance(m, QuantizedLayer)]
        with pytest.raises(
            ValueError, match=rf"^set_precision: '?{value}'? is not among the precisions \(.*\) of '0'$"
        ):
            bs.set_precision(model, value)
        assert [m.precision for m in model.modules() if isinstance(m, QuantizedLayer)] == before


@pytest.mark.parametrize(
    ("example", "error", "note"),
    [
        (X[:, :2], RuntimeError, r"torch.float32 of shape (4, 2, 4, 4)"),
        (
            X.long(),
            RuntimeError,
            "torch.int64 of shape (4, 3, 4, 4); "
            "give floats as the model reads them, such as (pixel / 255 - mean) / std",
        ),
        (X.numpy(), TypeError, "ndarray; give torch tensors"),
        ("image.png", TypeError, "str; give torch tensors"),
        (None, TypeError, "NoneType; give torch tensors"),
        ((X, X), TypeError, "torch.float32 of shape (4, 3, 4, 4), torch.float32 of shape (4, 3, 4, 4)"),
    ],
)
def test_examples_that_do_not_fit(example, error, note):
    model = net()
    with pytest.raises(error) as caught:
        bs.quantize_(model, R.strata(), example)
    assert caught.value.__notes__ == [f"quantize_: the model does not run on example_inputs, {note}"]
    assert not any(isinstance(m, QuantizedLayer) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_pixels_beyond_their_range_saturate(name):
    pixels = bs.Pixels((0.5,) * 3, (0.25,) * 3)
    model = bs.quantize_(net(), R.get(name), X, input=pixels)
    bs.calibrate_(model, [X]).eval()
    wild = 20 * X
    assert torch.equal(model(wild), model(wild.clamp(-2, 2)))
    assert sorted({0, 255} - set(model[0].act_quant.codes(wild).flatten().tolist())) == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), r"^lower: Conv2d '3' is in float; quantize it"),
        (
            lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
            r"^lower: module '3' of type ConvTranspose2d has no integer form",
        ),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_layers_without_a_quantized_form_stay_in_float(name, layer, message):
    model = net()
    model[3] = layer()
    kind = type(model[3])
    train_step(calibrated(name, model))
    assert type(model[3]) is kind
    assert finite(model)
    with pytest.raises(LowerError, match=message):
        bs.lower(model.eval(), X)
