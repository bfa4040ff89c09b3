"""Where batch normalization goes: into the affine of its layer, or an affine of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_lowering import Net, assert_equal, images, normalised, prepared
from torch import Tensor, nn

import bitstrata as bs
from bitstrata_runtime import Program


def check(net: nn.Module, shape: tuple[int, ...] = (3, 6, 6)) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    codes = images(shape)
    model = prepared(net, normalised(codes), pixels=True)
    program = bs.lower(model, normalised(codes))
    assert_equal(model, program, codes, isas=())
    return model, program


def net(run: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> Net:
    return Net(
        lambda n, x: n.head(F.adaptive_avg_pool2d(n.last(run(n, F.relu(n.stem(x)))), 1).flatten(1)),
        stem=nn.Conv2d(3, 4, 3),
        last=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        head=nn.Linear(4, 3),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        **modules,
    )


def own_affines(program: Program) -> set[str]:
    return set(program.affines) - set(program.layers)


def test_after_a_convolution_it_is_folded() -> None:
    model, program = check(net(lambda n, x: F.relu(n.bn(n.conv(x)))))
    assert own_affines(program) == set()
    for p in program.precisions:
        level = model.bn.levels[str(p)]
        gain = level.weight.double() / torch.sqrt(level.running_var.double() + level.eps)
        with bs.precision(model, p):
            unit = model.conv.weight_quant.grid().scale.double() / 2 * model.conv.act_quant.step.double()
        mine = program.factors[str(p)].affine["conv"]
        np.testing.assert_allclose(mine[0], (unit * gain).detach().numpy(), rtol=1e-6)
        shift = level.bias.double() + (model.conv.bias.double() - level.running_mean.double()) * gain
        np.testing.assert_allclose(mine[1], shift.detach().numpy(), rtol=1e-6, atol=1e-9)
        assert (mine[0] < 0).any()
        assert (mine[0] == 0).any()


def test_every_precision_has_its_own() -> None:
    _, program = check(net(lambda n, x: n.bn(n.conv(x))))
    low, high = (program.factors[str(p)].affine["conv"] for p in program.precisions)
    assert (low[1] != high[1]).all()


@pytest.mark.parametrize(
    "run",
    [
        lambda n, x: F.relu(n.bn(n.conv(x) + x)),
        lambda n, x: n.bn(F.relu(n.conv(x))),
        lambda n, x: n.bn(F.max_pool2d(n.conv(x), 2)),
        lambda n, x: n.bn(F.avg_pool2d(n.conv(x), 3)),
        lambda n, x: n.bn(x[:, :, ::2]),
        lambda n, x: n.bn(n.conv(x).clamp(-0.5, 0.5)),
        lambda n, x: F.relu(n.bn(n.conv(x))) + n.conv(x),
        lambda n, x: n.bn(n.bn(n.conv(x))),
        lambda n, x: n.bn(n.conv(F.relu(n.bn(n.conv(x))))) + n.bn(x),
    ],
    ids=[
        "after a sum",
        "after a rectifier",
        "after a max pool",
        "after an average",
        "after a slice",
        "after a clip",
        "layer run again without it",
        "applied twice in a row",
        "shared with another value",
    ],
)
def test_elsewhere_it_is_an_affine_of_its_own(run: Callable[[Net, Tensor], Tensor]) -> None:
    _, program = check(net(run))
    assert own_affines(program) == {"bn"}


def test_of_a_result_that_is_used_twice_it_is_an_affine_of_its_own() -> None:
    def run(n: Net, x: Tensor) -> Tensor:
        y = n.conv(x)
        return F.relu(n.bn(y)) + y

    _, program = check(net(run))
    assert own_affines(program) == {"bn"}
    assert [list(n.attrs["affine"]) for n in program.nodes if n.op == "rescale"][:2] == [["conv", "bn"], ["conv"]]


def test_layer_and_normalization_used_twice_together_are_folded() -> None:
    block = lambda n, x: F.relu(n.bn(n.conv(x)))  # noqa: E731
    _, program = check(net(lambda n, x: block(n, block(n, x))))
    assert own_affines(program) == set()
    assert [node.op for node in program.nodes].count("conv") == 5


def test_two_in_a_row() -> None:
    _, program = check(net(lambda n, x: n.second(n.bn(n.conv(x))), second=nn.BatchNorm2d(4)))
    assert own_affines(program) == {"second"}
    assert program.affines["second"].owner == "last"


def test_its_precision_is_that_of_its_owner() -> None:
    model, program = check(net(lambda n, x: F.relu(n.bn(n.conv(x) + x))))
    assert program.affines["bn"].owner == model.bn.owner == "last"


def test_pre_activation_after_the_stem_and_before_the_head() -> None:
    def run(n: Net, x: Tensor) -> Tensor:
        x = n.stem(x)
        x = n.conv(F.relu(n.bn1(x))) + x
        return n.head(F.adaptive_avg_pool2d(F.relu(n.bn2(x)), 1).flatten(1))

    _, program = check(
        Net(
            run,
            stem=nn.Conv2d(3, 4, 3, bias=False),
            bn1=nn.BatchNorm2d(4),
            conv=nn.Conv2d(4, 4, 3, padding=1),
            bn2=nn.BatchNorm2d(4),
            head=nn.Linear(4, 3),
        )
    )
    assert own_affines(program) == {"bn1", "bn2"}  # the stem's result also goes past bn1


@pytest.mark.parametrize("affine", [True, False])
def test_after_a_linear_layer(affine: bool) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8, affine=affine), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3)
    )
    _, program = check(model, (3, 4, 4))
    assert own_affines(program) == set()


def test_zero_gain_everywhere() -> None:
    model = net(lambda n, x: F.relu(n.bn(n.conv(x))))
    codes = images((3, 6, 6))
    prepared(model, normalised(codes), pixels=True)
    for level in model.bn.levels.values():
        nn.init.zeros_(level.weight)
    assert_equal(model, bs.lower(model, normalised(codes)), codes, isas=())
