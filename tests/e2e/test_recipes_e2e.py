"""Every recipe from a float network to the integer engine: train, lower, pack, load, run, verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.lowering import LowerError
from bitstrata.objectives import make_loss
from bitstrata.recipes import Part

MEAN, STD = 0.3, 0.35
R = bs.recipes


def resnet() -> nn.Module:
    return bs.zoo.create("digits_resnet", width=8)


def vgg() -> nn.Module:
    return bs.zoo.create("maqd_vgg", in_channels=1, width=8)


def maqd_resnet() -> nn.Module:
    return bs.zoo.create("maqd_preact_resnet", in_channels=1, width=4)


def mobilenet() -> nn.Module:
    return bs.zoo.create("mobilenet_v2", in_channels=1, width=0.25, stem="cifar")


def preact() -> nn.Module:
    return bs.zoo.create("preact_resnet20", in_channels=1, width=8)


def bottleneck() -> nn.Module:
    return bs.zoo.create("preact_resnet50", in_channels=1, width=8, stem="cifar")


CASES: dict[str, tuple[Callable[[], bs.Recipe], Callable[[], nn.Module]]] = {
    "strata": (R.strata, resnet),
    "lsq 2": (lambda: R.lsq(2), resnet),
    "lsq_plus 3, signed inputs": (lambda: R.lsq_plus(3), mobilenet),
    "lsq_plus 2 and 1": (lambda: R.lsq_plus(2, a=1), preact),
    "dorefa 1": (lambda: R.dorefa(1), resnet),
    "dorefa 4": (lambda: R.dorefa(4), resnet),
    "pact 4": (lambda: R.pact(4), resnet),
    "pact 4, both sides": (lambda: R.pact(4, double_side=True), mobilenet),
    "cg_pact 2": (lambda: R.cg_pact(2), preact),
    "sat 2": (lambda: R.sat(2), bottleneck),
    "sat 4": (lambda: R.sat(4), mobilenet),
    "sat 3, stddev": (lambda: R.sat(3, rescale="stddev", convs="all"), preact),
    "uniq 1": (lambda: R.uniq(1, per_channel=True), preact),
    "uniq 2": (R.uniq, resnet),
    "uniq 8": (lambda: R.uniq(8), preact),
    "vertical": (R.vertical, resnet),
    "vertical without compensation": (lambda: R.vertical(compensation=False), preact),
    "vertical 2 to 8": (lambda: R.vertical(bits=(2, 4, 8)), resnet),
    "vertical, one norm": (lambda: R.vertical(norm_levels="shared"), resnet),
    "vertical, own statistics": (lambda: R.vertical(norm_levels="statistics", combine="mgd"), resnet),
    "adabits": (R.adabits, resnet),
    "adabits centered": (lambda: R.adabits(scheme="centered"), preact),
    "ascending": (R.ascending, resnet),
    "int8": (R.int8, resnet),
    "int8, full range": (lambda: R.int8(range="full", per_channel=True), mobilenet),
    "maqd 3 and 2": (R.maqd, vgg),
    "maqd 15 and 4": (lambda: R.maqd(15, 4), maqd_resnet),
    "maqd 255 and 8": (lambda: R.maqd(255, 8, edges="int8"), vgg),
    "maqd 7 and 5, M/2": (lambda: R.maqd(7, 5, delta_mode="M/2"), maqd_resnet),
    "mixed: UniQ weights, CG-PACT, layer-batch norm, MaQD loss": (
        lambda: dataclasses.replace(
            R.uniq(2),
            name="mixed",
            activation=Part("pact", "activation", {"gradient": "cg"}),
            norm="layer_batch",
            objective=R.Objective(loss="maqd"),
        ),
        resnet,
    ),
    "mixed: strata on standardized weights, rescaled": (
        lambda: dataclasses.replace(
            R.strata(w=(1, 2, 4)),
            name="mixed",
            transform=Part("standardize", "transform"),
            rescale=Part("constant", "rescale", {"convs": "all"}),
        ),
        preact,
    ),
    "mixed: strata companded by tanh, LSQ+ activations": (
        lambda: dataclasses.replace(
            R.strata(w=(2, 4)),
            name="mixed",
            transform=Part("tanh", "transform"),
            activation=Part("lsq_plus", "activation"),
        ),
        resnet,
    ),
}


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (1797, 1, 8, 8) and labels in random order, and the last third of the pixels."""
    sets = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.as_tensor(np.minimum(sets.images * 16, 255).astype(np.uint8)).unsqueeze(1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], torch.as_tensor(sets.target)[order], pixels[order[1200:]]


def as_floats(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def trained(make: Callable[[], bs.Recipe], build: Callable[[], nn.Module], steps: int = 6) -> nn.Module:
    """A few steps of float training, then a few of the recipe's own objective."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels, _ = digits()
    x, recipe, model = as_floats(pixels), make(), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        rows = slice(100 * step, 100 * step + 100)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    bs.quantize_(model, recipe, x[:4], input=bs.Pixels((MEAN,), (STD,)))
    bs.calibrate_(model, [x[:150], x[150:300]])
    optimizer = torch.optim.SGD(bs.parameter_groups(model, 1e-4), lr=0.01, momentum=0.9)
    objective = {key: recipe.training[key] for key in ("distill", "teacher", "combine", "reduction")}
    for step in range(steps):
        rows = slice(100 * step, 100 * step + 100)
        optimizer.zero_grad()
        losses = bs.joint_backward(model, x[rows], labels[rows], loss=loss_of(recipe), **objective)
        assert all(bool(torch.isfinite(row.loss)) for row in losses.values())
        optimizer.step()
    bs.reestimate_batchnorm_(model, x[:1200].split(300))
    return model.eval()


def loss_of(recipe: bs.Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    options = {"gamma": recipe.objective.gamma} if recipe.objective.loss == "maqd" else {}
    return make_loss(recipe.objective.loss, **options)


@pytest.mark.parametrize("case", CASES)
def test_recipe_runs_in_integers(case: str, tmp_path: Path) -> None:
    model = trained(*CASES[case])
    pixels = digits()[0]
    program = bs.lower(model, as_floats(pixels[:1]))
    assert program.precisions == bs.precisions(model)
    report = bs.verify(model, program, pixels[:120])
    assert report.ok, str(report)
    assert not report.mismatches
    bs.pack(program, tmp_path / "net.strata")
    double = bs.lowering.double_copy(model)
    for p in program.precisions:
        session = runtime.load(tmp_path / "net.strata", bits=p)
        ours = session.run(pixels.numpy()).argmax(1)
        with bs.precision(double, p), torch.no_grad():
            theirs = double((pixels.double() / 255 - MEAN) / STD).argmax(1).numpy()
        assert np.mean(ours == theirs) >= 0.999
        reference = runtime.load(tmp_path / "net.strata", bits=p, executor="reference")
        assert np.array_equal(session.run_raw(pixels[:4].numpy()), reference.run_raw(pixels[:4].numpy()))


@pytest.mark.parametrize(
    ("make", "build"),
    [
        (lambda: R.strata(a=None), resnet),
        (lambda: R.lsq(3, a=None), resnet),
        (lambda: R.lsq_plus(3, a=None), resnet),
        (lambda: R.dorefa(2, a=None), resnet),
        (lambda: R.pact(2, a=None), resnet),
        (lambda: R.cg_pact(2, a=None), resnet),
        (lambda: R.sat(2, a=None), preact),
        (lambda: R.uniq(1, a=None), preact),
        (lambda: R.vertical(a=None), resnet),
        (lambda: R.adabits(a=None), resnet),
        (lambda: R.ascending(a=None), resnet),
        (lambda: R.int8(a=None), resnet),
        (lambda: R.maqd(3, None), vgg),
    ],
)
def test_weight_only_forms_train_and_are_refused_by_lower(
    make: Callable[[], bs.Recipe], build: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    pixels, labels, _ = digits()
    x, model, recipe = as_floats(pixels[:64]), build(), make()
    bs.quantize_(model, recipe, x[:4])
    bs.joint_backward(model, x, labels[:64], loss=loss_of(recipe))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with pytest.raises(LowerError, match="reads float activations; an integer program needs a recipe"):
        bs.lower(model.eval(), x[:1])


def test_own_edges_are_lowered_one_precision_at_a_time(tmp_path: Path) -> None:
    model = trained(lambda: R.vertical(own_edges=True), resnet)
    pixels = digits()[2]
    x = as_floats(pixels[:1])
    with pytest.raises(LowerError, match=r"weights of their own at every precision.*precisions=\(2,\)"):
        bs.lower(model, x)
    for p in (2, 4):
        program = bs.lower(model, x, precisions=(p,))
        assert program.precisions == (p,)
        assert bs.verify(model, program, pixels[:60]).ok


def test_codes_that_do_not_nest_are_lowered_one_precision_at_a_time() -> None:
    model = trained(lambda: R.adabits(scheme="original"), resnet)
    pixels = digits()[2]
    x = as_floats(pixels[:1])
    with pytest.raises(LowerError, match=r"are not the upper bits of its 4-bit codes.*precisions=\(b,\)"):
        bs.lower(model, x)
    program = bs.lower(model, x, precisions=(3,))
    assert bs.verify(model, program, pixels[:60]).ok


@pytest.mark.parametrize("name", ["strata", "uniq", "vertical"])
def test_float_edges_train_and_are_refused_by_lower(name: str) -> None:
    torch.manual_seed(0)
    pixels, labels, _ = digits()
    x, model = as_floats(pixels[:64]), resnet()
    bs.quantize_(model, R.get(name, edges="float"), x[:4])
    bs.joint_backward(model, x, labels[:64])
    with pytest.raises(LowerError, match=r"is in float; quantize it"):
        bs.lower(model.eval(), x[:1])
