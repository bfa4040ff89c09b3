"""What a user can give wrong on the training side: widths, numbers that are not finite, data without content."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering import LowerError
from bitstrata.nn import PrecisionBatchNorm, QuantizedLayer
from bitstrata.quantizers.base import ActivationQuantizer
from bitstrata.quantizers.registry import build

R = bs.recipes
ALL_NAMES = R.names()
NAMES = tuple(name for name in ALL_NAMES if not R.get(name).integers)  # what trains in integers is tested by itself
SEVERAL = ("adabits", "ascending", "strata", "vertical")  # recipes of several widths
NAN, INF = float("nan"), float("inf")
PIXELS = bs.Pixels((0.5,) * 3, (0.25,) * 3)


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


X = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 0, 1])


def quantized(name: str, model: nn.Module | None = None, x: Tensor = X, **options: Any) -> nn.Module:
    return bs.quantize_(net() if model is None else model, R.get(name), x, **options)


def calibrated(name: str, model: nn.Module | None = None, x: Tensor = X, **options: Any) -> nn.Module:
    return bs.calibrate_(quantized(name, model, x, **options), [x])


def with_bad(x: Tensor, bad: float, count: int = 1) -> Tensor:
    x = x.clone()
    x.reshape(-1)[:count] = bad
    return x


def is_float(model: nn.Module) -> bool:
    return not any(isinstance(m, QuantizedLayer | PrecisionBatchNorm | nn.Identity) for m in model.modules())


# ---- widths


@pytest.mark.parametrize("bits", [0, -1, 9, 2.5, True, "4", NAN])
@pytest.mark.parametrize("name", [n for n in ALL_NAMES if n not in ("int8", "maqd")])
def test_wrong_weight_widths(name, bits):
    first = next(iter(inspect.signature(getattr(R, name)).parameters))
    value = (bits,) if name in SEVERAL else bits
    with pytest.raises(ValueError, match=rf"{name}.*(precisions must be|weight widths must be).*got \(.*{bits}.*\)"):
        R.get(name, **{first: value})


@pytest.mark.parametrize("bits", [0, -1, 9, 2.5, True, "4", NAN])
@pytest.mark.parametrize("name", [n for n in ALL_NAMES if n != "maqd"])
def test_wrong_activation_widths(name, bits):
    with pytest.raises(ValueError, match=rf"(activation width must be 1\.\.8|a must be 'same', a width).*got .*{bits}"):
        R.get(name, a=bits)


@pytest.mark.parametrize("bits", [0, 1, 9, 2.5, True, "4", None])
def test_wrong_edge_widths(bits):
    for name in ALL_NAMES:
        if "edge_bits" in inspect.signature(getattr(R, name)).parameters:
            with pytest.raises(ValueError, match=rf"^Recipe '{name}': edge_bits must be 2\.\.8, got .*{bits}"):
                R.get(name, edge_bits=bits)


@pytest.mark.parametrize("states", [-3, 0, 1, 2, 4, 256, 2.5, True, "3"])
def test_wrong_weight_states(states):
    with pytest.raises(ValueError, match=rf"states must be an odd integer of at least 3, got '?{states}'?$"):
        R.maqd(states)


@pytest.mark.parametrize("states", [0, 1, 257, True])
def test_wrong_activation_states(states):
    with pytest.raises(ValueError, match=r"maqd: m_a must be a whole number of states, 2\.\.256, or None, got"):
        R.maqd(3, states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: R.lsq(1), r"^LSQWeight: undefined at 1 bit"),
        (lambda: R.lsq_plus(1), r"^LSQPlusWeight: undefined at 1 bit"),
        (lambda: R.vertical((1, 2)), r"^VerticalWeight: needs at least 2 bits, got 1 at precision 1"),
        (lambda: R.ascending((1, 2)), r"^AscendingWeight: the narrowest width must be 2 or more .*, got 1$"),
    ],
)
def test_grids_that_have_no_single_bit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("width", [0, 9, 2.5, True, "4", None])
@pytest.mark.parametrize(("name", "role"), [("uniq", "weight"), ("uniq", "activation"), ("dorefa", "weight")])
def test_a_quantizer_by_itself_checks_its_widths(name, role, width):
    with pytest.raises(ValueError, match=rf"bits must be 1\.\.8, got '?{width}'? at precision 4$"):
        build(name, role, {}, bits={4: width})


# ---- parameters that are not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_finite_are_refused_before_anything_changes(name, bad):
    model = net()
    model[3].weight.data.reshape(-1)[:2] = bad
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^quantize_: Conv2d '3': 2 of 144 values of weight are not finite"):
        quantized(name, model)
    assert is_float(model)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("key", ["0.bias", "1.weight", "4.running_mean", "4.running_var", "7.weight"])
def test_other_numbers_that_are_not_finite_are_named(key):
    model = net()
    model.state_dict()[key].reshape(-1)[0] = NAN
    layer, tensor = key.split(".")
    with pytest.raises(ValueError, match=rf"^quantize_: \w+ '{layer}': 1 of \d+ values of {tensor} are not finite"):
        quantized("strata", model)
    assert is_float(model)


def test_layers_that_stay_in_float_may_hold_anything():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = net(), nn.Linear(2, 2)
            nn.init.constant_(self.unused.weight, NAN)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = calibrated("uniq", Spare())
    assert bool(torch.isfinite(model.eval()(X)).all())


@pytest.mark.parametrize("name", NAMES)
def test_lower_refuses_numbers_that_became_nan_and_names_them(name):
    good = calibrated(name)
    keys = [k for k, p in good.named_parameters() if p.is_floating_point()]
    keys += [k for k, _ in good.named_buffers() if k.endswith(("running_mean", "running_var"))]
    assert {k.split(".")[0] for k in keys} == {"0", "1", "3", "4", "7"}
    for key in keys:
        model = copy.deepcopy(good)
        model.state_dict()[key].reshape(-1)[0] = NAN
        module, _, rest = key.partition(".")
        with pytest.raises(LowerError, match=rf"^lower: module '{module}': 1 of \d+ values of {rest} are not finite"):
            bs.lower(model, X)


def test_what_only_other_precisions_use_may_be_broken():
    model = calibrated("strata")
    with torch.no_grad():
        for key in ("steps.1", "ratios.1"):
            next(p for k, p in model[3].named_parameters() if k.endswith(key)).fill_(NAN)
        model[1].levels["1"].weight.fill_(NAN)
        model[1].levels["1"].running_var.fill_(NAN)
    assert bs.lower(model, X, (2, 4)).precisions == (2, 4)
    with pytest.raises(LowerError, match=r"^lower: module '1': 4 of 4 values of levels\.1\.weight are not finite"):
        bs.lower(model, X, (1, 2))


# ---- data that are not finite


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("use", [bs.calibrate_, bs.reestimate_batchnorm_])
@pytest.mark.parametrize("options", [{}, {"input": PIXELS}])
@pytest.mark.parametrize("name", NAMES)
def test_calibration_refuses_data_that_are_not_finite(name, options, use, bad):
    model = quantized(name, **options)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=rf"^{use.__name__}: 3 of 192 values of batch 1 are not finite .*, shape \(4, 3, 4, 4\)$"
    ):
        use(model, [X, with_bad(X, bad, 3)])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_activations_that_overflow_inside_are_named_by_layer():
    class Big(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e38 * 1e38

    model = bs.quantize_(
        nn.Sequential(nn.Linear(4, 4, bias=False), Big(), nn.Linear(4, 2)), R.uniq(edges="inner"), torch.zeros(2, 4)
    )
    with pytest.raises(
        ValueError, match=r"^calibrate_: input of layer '2': UniqActivation: cannot set the step.*not fi"
    ):
        bs.calibrate_(model, [torch.randn(2, 4)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.observing for m in model.modules() if isinstance(m, ActivationQuantizer))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", NAMES)
def test_an_example_that_is_not_finite_tells_nothing(name, bad):
    model = net()
    with pytest.raises(
        ValueError, match=r"^quantize_: the input of layer '0' on the example: 1 of 192 values of it are"
    ):
        quantized(name, model, with_bad(X, bad))
    assert is_float(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"input": PIXELS}])
@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_turned_into_a_code(name, options, training):
    model = calibrated(name, **options).train(training)
    for p in bs.precisions(model):
        with bs.precision(model, p):
            assert bool(torch.isnan(model(with_bad(X, NAN))[0]).all())


@pytest.mark.parametrize("name", ["maqd", "strata"])
def test_training_stops_at_a_batch_that_is_not_finite(name):
    model = calibrated(name, input=PIXELS)
    before = model[3].weight.detach().clone()
    config = bs.TrainConfig(epochs=1, batch_size=4, precisions=bs.precisions(model), **{"lr": 0.05})
    with pytest.raises(
        FloatingPointError,
        match=r"^Trainer: step 0: the loss at precision \d is nan; the batch itself holds values that are not finite",
    ):
        bs.Trainer(model, config, [(with_bad(X, NAN), Y)]).fit()
    assert torch.equal(model[3].weight, before)


# ---- data without content


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batches given"),
        ([X, X[:0]], ValueError, r"batch 1 has no elements, shape \(0, 3, 4, 4\)"),
        (X, TypeError, r"batches must be an iterable of batches, got one tensor of shape \(4, 3, 4, 4\); give \[x\]"),
    ],
)
@pytest.mark.parametrize("use", [bs.calibrate_, bs.reestimate_batchnorm_])
def test_batches_without_content(use, batches, error, message):
    for name in NAMES:
        with pytest.raises(error, match=f"^{use.__name__}: {message}$"):
            use(quantized(name), batches)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_example_tells_nothing(name):
    model = net()
    with pytest.raises(
        ValueError, match=r"^quantize_: the input of layer '0' on the example: it has no elements, shape \(0"
    ):
        quantized(name, model, X[:0])
    assert is_float(model)


def finite_training(model: nn.Module, x: Tensor) -> None:
    model.train()
    bs.joint_backward(model, x, Y[: len(x)])
    for p in bs.precisions(model):
        with bs.precision(model, p):
            assert bool(torch.isfinite(model(x)).all())
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), key


def exact(model: nn.Module, x: Tensor) -> None:
    report = bs.verify(model.eval(), bs.lower(model, x), x)
    assert report.ok, report.first_difference


def zero_channel(model: nn.Module) -> None:
    for index in (0, 3, 7):
        model[index].weight[1] = 0


def zero_everywhere(model: nn.Module) -> None:
    for index in (0, 3, 7):
        model[index].weight.zero_()


def constant_everywhere(model: nn.Module) -> None:
    for index in (0, 3, 7):
        model[index].weight.fill_(-0.1)


@pytest.mark.parametrize("spoil", [zero_channel, zero_everywhere, constant_everywhere])
@pytest.mark.parametrize(
    ("name", "per_channel"),
    [
        (name, per_channel)
        for name in NAMES
        for per_channel in (False, True)
        if not per_channel or "per_channel" in inspect.signature(getattr(R, name)).parameters
    ],
)
def test_weights_without_content(name, per_channel, spoil: Callable[[nn.Module], None]):
    options = {"per_channel": True} if per_channel else {}
    model = net()
    with torch.no_grad():
        spoil(model)
    bs.calibrate_(bs.quantize_(model, R.get(name, **options), X), [X])
    finite_training(model, X)
    exact(model, X)


NO_STEP = ("cg_pact", "dorefa", "maqd", "pact", "sat", "adabits")  # their inner grids need no data


@pytest.mark.filterwarnings("ignore:calibrate_. no step is set")
@pytest.mark.parametrize("name", NAMES)
def test_a_dead_layer_trains_and_evaluates(name):
    """Behind a ReLU that lets nothing through; it can be lowered once it has a step."""
    model = net()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1)
    calibrated(name, model)
    finite_training(model, X)
    for p in bs.precisions(model):
        with bs.precision(model, p):
            assert bool(torch.isfinite(model.eval()(X)).all())
    if name not in NO_STEP:
        with pytest.raises(
            LowerError, match=r"^lower: layer '3': \w+: no step size at precision \d: run bitstrata\.cal"
        ):
            bs.lower(model, X)
        with torch.no_grad():
            for level in model[1].levels.values():
                level.bias.fill_(1)
        bs.calibrate_(model, [X])
    exact(model, X)


def test_calibration_warns_of_layers_that_saw_zeros_only():
    model = quantized("vertical")
    with pytest.warns(UserWarning, match=r"^calibrate_: no step is set for the input of '0' at precision 4, '0' at pr"):
        bs.calibrate_(model, [torch.zeros_like(X)])
    assert bool(torch.isfinite(model.eval()(torch.zeros_like(X))).all())
    with pytest.raises(RuntimeError, match=r"^LSQActivation: no step size at precision 4"):
        model(X)
    with pytest.raises(LowerError, match=r"^lower: layer '0': LSQActivation: no step size at precision 4"):
        bs.lower(model, X)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name):
    model = calibrated(name)
    finite_training(model, X[:1])
    exact(model, X[:1])
    assert model(X[:0]).shape == (0, 2)
