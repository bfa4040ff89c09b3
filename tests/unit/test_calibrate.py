"""Calibration of activation steps, and re-estimation of batch-normalization statistics."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.functional import rectified_step
from bitstrata.nn import PrecisionBatchNorm
from bitstrata.quantizers.base import ActivationQuantizer

STRATA = bs.recipes.strata(w=(1, 2, 4))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 4, 4, generator=generator) * (i + 1) for i in range(count)]


def quantized(recipe=STRATA) -> nn.Module:
    return bs.quantize_(net(), recipe, batches(1)[0])


def steps(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "act_quant" in name}


@pytest.mark.parametrize("reverse", [False, True])
def test_the_largest_batch_sets_the_step(reverse):
    """The golden batches of UniQ's equation 10."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 1))
    data = [torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])]
    recipe = bs.recipes.strata(w=(2,))
    recipe = dataclasses.replace(recipe, edge_activation=recipe.activation, edge_bits=2)
    bs.quantize_(model, recipe, data[0])
    bs.calibrate_(model, data[::-1] if reverse else data)
    assert model[1].act_quant.step.item() == pytest.approx(1.02895748, rel=1e-5)


def test_every_step_of_every_precision_is_set():
    model = quantized()
    assert all(s.item() == 1.0 for s in steps(model).values())
    assert bs.calibrate_(model, batches()) is model
    inner = {"3.act_quant.steps.1", "3.act_quant.steps.2", "3.act_quant.steps.4"}
    assert set(steps(model)) == inner | {"0.act_quant.steps.shared", "8.act_quant.steps.shared"}
    assert len({s.item() for s in steps(model).values()}) == 5
    model.eval()
    for p in (1, 2, 4):
        with bs.precision(model, p):
            assert bool(torch.isfinite(model(batches()[0])).all())


def test_steps_see_quantized_inputs_in_training_mode():
    """The second layer's statistic is that of the first one's quantized output, normalized by each batch itself."""
    data = batches()
    model = quantized()
    twin = copy.deepcopy(model)
    bs.calibrate_(model, data)
    largest = 0.0
    twin.train()
    twin[0].act_quant.observing = True
    for x in data:
        with torch.no_grad():
            y = twin[2](twin[1](twin[0](x)))
        largest = max(largest, (2 * y.square().mean()).sqrt().item())
    assert model[3].act_quant.steps["4"].item() == pytest.approx(rectified_step(4) * largest, rel=1e-6)


def test_shared_edge_steps_are_the_maximum_over_batches():
    data = batches()
    model = bs.calibrate_(quantized(), data)
    expected = max(2 * x.abs().mean().item() / 127**0.5 for x in data)
    assert model[0].act_quant.step.item() == pytest.approx(expected, rel=1e-6)


def test_a_second_calibration_starts_anew():
    model = bs.calibrate_(quantized(), batches())
    again = copy.deepcopy(model)
    bs.calibrate_(again, [0.01 * batches()[0]])
    assert again[0].act_quant.step.item() < 0.02 * model[0].act_quant.step.item()


def test_some_precisions_only():
    model = bs.calibrate_(quantized(), batches(), precisions=[2])
    assert [model[3].act_quant.steps[p].item() == 1.0 for p in ("1", "2", "4")] == [True, False, True]
    model.eval()
    with pytest.raises(
        RuntimeError, match=r"UniqActivation: no step size at precision 4: run bitstrata.calibrate_\(model, "
    ):
        model(batches()[0])
    with bs.precision(model, 2):
        model(batches()[0])


def test_uncalibrated_evaluation_is_an_error():
    with pytest.raises(
        RuntimeError, match=r"^LSQActivation: no step size at precision 4: run bitstrata.calibrate_\(model"
    ):
        quantized().eval()(batches()[0])


def test_the_first_training_batch_initialises():
    model, x = quantized(), batches()[0]
    model.train()(x)
    after = steps(model)
    assert after["3.act_quant.steps.4"].item() != 1.0
    assert after["3.act_quant.steps.1"].item() == 1.0
    model(100 * x)
    assert steps(model) == after
    with bs.precision(model, 1):
        model(x)
    assert steps(model)["3.act_quant.steps.1"].item() != 1.0


def test_modes_precisions_and_parameters_are_restored():
    model = quantized()
    model.eval()
    model[1].train()
    bs.set_precision(model, {"3": 1})
    modes = [m.training for m in model.modules()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "act_quant" not in n}
    bs.calibrate_(model, batches())
    bs.reestimate_batchnorm_(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert (model[0].precision, model[3].precision, model[8].precision) == (4, 1, 4)
    assert not any(m.observing for m in model.modules() if isinstance(m, ActivationQuantizer))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        if name in weights:
            assert torch.equal(parameter, weights[name])


def test_a_failure_restores_too():
    model = quantized().eval()
    with pytest.raises(
        ValueError, match=r"^calibrate_: 192 of 192 values of batch 1 are not finite .*, shape \(4, 3, 4, 4\)$"
    ):
        bs.calibrate_(model, [batches()[0], torch.full((4, 3, 4, 4), float("nan"))])
    assert not any(m.training for m in model.modules())
    assert not any(m.observing for m in model.modules() if isinstance(m, ActivationQuantizer))


def test_all_zero_batches_are_passed_over():
    data = batches()
    model, other = quantized(), quantized()
    bs.calibrate_(model, [torch.zeros(4, 3, 4, 4), data[0]])
    bs.calibrate_(other, [data[0], torch.zeros(4, 3, 4, 4)])
    assert model[0].act_quant.step.item() == other[0].act_quant.step.item() != 1.0
    only = bs.calibrate_(quantized(), [torch.zeros(4, 3, 4, 4)])
    assert only[0].act_quant.initialized.tolist() == [False]


def test_batches_as_loaders_yield_them():
    data = batches()
    model, other = quantized(), quantized()
    bs.calibrate_(model, data)
    bs.calibrate_(other, ((x, torch.zeros(4)) for x in data))  # a generator of (input, target)
    assert steps(model) == steps(other)


@pytest.mark.parametrize("function", [bs.calibrate_, bs.reestimate_batchnorm_])
def test_refusals(function):
    name = function.__name__
    with pytest.raises(ValueError, match=rf"^{name}: the model has no quantized layers; call quantize_ first$"):
        function(net(), batches())
    with pytest.raises(ValueError, match=rf"^{name}: no batches given$"):
        function(quantized(), [])
    with pytest.raises(ValueError, match=rf"^{name}: 3 is not among the model's precisions \(1, 2, 4\)$"):
        function(quantized(), batches(), precisions=(2, 3))


# ---- batch normalization


def test_reestimation_is_the_plain_average():
    data = batches()
    model = bs.calibrate_(quantized(), data)
    with torch.no_grad():
        for level in model[1].levels.values():
            level.running_mean.fill_(99.0)
    momenta = [level.momentum for level in model[1].levels.values()]
    assert bs.reestimate_batchnorm_(model, data) is model
    assert [level.momentum for level in model[1].levels.values()] == momenta
    for p in (1, 2, 4):
        with bs.precision(model, p), torch.no_grad():
            outputs = [model[0](x).transpose(0, 1).reshape(4, -1) for x in data]
        mean = torch.stack([y.mean(1) for y in outputs]).mean(0)
        var = torch.stack([y.var(1) for y in outputs]).mean(0)
        level = model[1].levels[str(p)]
        torch.testing.assert_close(level.running_mean, mean)
        torch.testing.assert_close(level.running_var, var)
        assert level.num_batches_tracked == 3


def test_reestimation_of_some_precisions_leaves_the_others():
    model = bs.calibrate_(quantized(), batches())
    before = copy.deepcopy(model.state_dict())
    bs.reestimate_batchnorm_(model, batches(), precisions=[1])
    for key, value in model.state_dict().items():
        changed = "levels.1.running" in key or "levels.1.num_batches" in key
        assert changed != torch.equal(value, before[key]) or (changed and "num_batches" in key), key


def test_calibration_moves_the_statistics_of_each_precision():
    model = bs.calibrate_(quantized(), batches())
    norms = [m for m in model.modules() if isinstance(m, PrecisionBatchNorm)]
    assert len(norms) == 2
    for norm in norms:
        assert all(level.num_batches_tracked == 3 for level in norm.levels.values())
    assert not torch.equal(norms[1].levels["1"].running_mean, norms[1].levels["4"].running_mean)
