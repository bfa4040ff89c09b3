"""torch.compile and torch.export of quantized models: what eager mode computes, never a graph of another setting."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs

dynamo = pytest.importorskip("torch._dynamo")

RECIPES = {
    "lsq": bs.recipes.lsq(4),
    "lsq_plus": bs.recipes.lsq_plus(4),
    "uniq": bs.recipes.uniq(3),
    "pact": bs.recipes.pact(4),
    "strata": bs.recipes.strata((2, 4)),
}


class Net(nn.Module):
    """Two convolutions with batch normalization, and a linear layer: (N, 2, 6, 6) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.pool(x).flatten(1))


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    trace = logging.getLogger("torch.__trace")  # records of every traced operation, which pytest would collect
    propagate, trace.propagate = trace.propagate, False
    dynamo.reset()
    yield
    dynamo.reset()
    trace.propagate = propagate


def images(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def quantized(recipe: bs.Recipe, *, calibrated: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = bs.quantize_(Net(), recipe, images())
    return bs.calibrate_(model, [images(8, 2)]).train() if calibrated else model.train()


class Counting:
    """A backend that runs a graph as eager mode would, and counts the graphs that it was given."""

    def __init__(self, backend: Callable[..., Any] | None = None) -> None:
        self.graphs = 0
        self.backend = backend

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward if self.backend is None else self.backend(graph, examples)


def assert_same_step(
    eager: nn.Module, compiled: nn.Module, x: Tensor, *, amp: bool = False, tolerance: float = 0.0
) -> Tensor:
    """Outputs, gradients and states agree; to the bit with tolerance 0. The output."""
    results = []
    for model in (eager, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
            y = model(x)
        if model.training:
            y.float().square().sum().backward()
        results.append(y)
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    for (name, mine), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(other.grad, mine.grad, rtol=10 * tolerance, atol=10 * tolerance, msg=name)
    for (name, mine), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(other, mine, rtol=tolerance, atol=tolerance, msg=name)
    return results[1].detach()


@pytest.mark.parametrize("name", ["lsq", pytest.param("pact", marks=pytest.mark.soak)])
def test_a_step_is_one_graph_and_the_same_to_the_bit(name: str) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    eager, model = quantized(RECIPES[name]), quantized(RECIPES[name])
    backend = Counting(aot_eager)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_step(eager, compiled, images())
    eager.eval(), compiled.eval()
    assert_same_step(eager, compiled, images(3, 3))
    assert backend.graphs == 2  # one for training, one for evaluation


@pytest.mark.parametrize(
    "name",
    ["pact", "uniq", pytest.param("lsq_plus", marks=pytest.mark.soak), pytest.param("maqd", marks=pytest.mark.soak)],
)
def test_every_recipe_compiles_to_one_graph(name: str) -> None:
    recipe = RECIPES[name] if name in RECIPES else bs.recipes.maqd()
    eager, model = quantized(recipe), quantized(recipe)
    backend = Counting()
    # maqd has a tensor that several operations read, whose gradients the traced graph adds in another order
    tolerance = 1e-6 if name == "maqd" else 0.0
    assert_same_step(eager, torch.compile(model, backend=backend, fullgraph=True), images(), tolerance=tolerance)
    assert backend.graphs == 1


def test_switching_precisions_runs_the_graph_of_the_present_one() -> None:
    recipe = bs.recipes.strata((1, 2, 4))
    eager, model = quantized(recipe), quantized(recipe)
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    outputs = {}
    for precision in (4, 2, 1, 2, 4, {"conv2": 2}, 1, 4):
        bs.set_precision(eager, precision)
        bs.set_precision(compiled, precision)  # the layer names are those of the model
        outputs[str(precision)] = assert_same_step(eager, compiled, images())
    # one inner layer, so the map computes what precision 2 does, on batch statistics
    assert len({tuple(y.flatten().tolist()) for y in outputs.values()}) == 3
    assert backend.graphs == 4  # 4, 2, 1 and the map: coming back costs nothing


@pytest.mark.soak
def test_more_precision_maps_than_graphs_are_kept_run_eagerly() -> None:
    eager, model = quantized(bs.recipes.strata((1, 2, 4))), quantized(bs.recipes.strata((1, 2, 4)))
    backend = Counting()
    compiled = torch.compile(model, backend=backend)
    with dynamo.config.patch(recompile_limit=2):
        for precision in (1, 2, 4, {"conv2": 1}, 2):
            bs.set_precision(eager, precision)
            bs.set_precision(model, precision)
            assert_same_step(eager, compiled, images())
    assert backend.graphs == 2


def test_steps_set_after_compilation_are_used() -> None:
    """By calibration, and by a state that is loaded."""
    eager, model = quantized(RECIPES["lsq"]), quantized(RECIPES["lsq"])
    compiled = torch.compile(model, backend=Counting(), fullgraph=True)
    assert_same_step(eager, compiled, images())
    for one in (eager, compiled):
        bs.calibrate_(one, [images(8, 2) * 3])
        one.train()
    assert_same_step(eager, compiled, images())
    state = {k: v * 1.5 if ".steps." in k else v for k, v in model.state_dict().items()}
    eager.load_state_dict(state)
    model.load_state_dict(state)
    assert_same_step(eager, compiled, images())


@pytest.mark.soak
def test_a_model_that_was_compiled_before_it_was_quantized() -> None:
    torch.manual_seed(0)
    eager = Net()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=Counting())
    compiled(images())
    eager(images())
    for one in (eager, compiled):
        assert bs.quantize_(one, RECIPES["strata"], images()) is one
        bs.calibrate_(one, [images(8, 2)])
        one.train()
    assert_same_step(eager, compiled, images())


@pytest.mark.soak
@pytest.mark.parametrize("in_place", [False, True])
def test_the_first_batch_sets_the_steps_once(in_place: bool) -> None:
    eager, model = quantized(RECIPES["lsq"], calibrated=False), quantized(RECIPES["lsq"], calibrated=False)
    if in_place:
        model.compile(backend=Counting())
    compiled = model if in_place else torch.compile(model, backend=Counting())
    for scale in (1.0, 5.0):
        assert_same_step(eager, compiled, images() * scale)


def test_quantize_sees_a_model_compiled_in_place_as_it_is() -> None:
    torch.manual_seed(0)
    eager = Net()
    model = copy.deepcopy(eager)
    model.compile(backend=Counting())
    for one in (eager, model):
        bs.quantize_(one, RECIPES["strata"], images())
    owners = [
        {name: m.owner for name, m in one.named_modules() if isinstance(m, bs.PrecisionBatchNorm)}
        for one in (eager, model)
    ]
    assert owners[0] == owners[1] == {"bn1": "conv1", "bn2": "conv2"}


def test_joint_training_and_lowering_of_a_compiled_model() -> None:
    eager, model = quantized(RECIPES["strata"]), quantized(RECIPES["strata"])
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    targets = torch.arange(4) % 3
    for _ in range(2):
        for one in (eager, compiled):
            bs.joint_backward(one, images(), targets)
    for (name, mine), other in zip(eager.named_parameters(), model.named_parameters(), strict=True):
        # eager edge layers share a quantized weight between precisions, so sums come in another order
        torch.testing.assert_close(other[1].grad, mine.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert backend.graphs == 2
    with bs.precision(compiled, {"conv2": 2}):
        assert bs.precisions(compiled) == (2, 4)
        assert model.conv2.precision == 2
    programs = [bs.lower(one.eval(), images()) for one in (eager, compiled)]
    assert bs.program_summary(programs[0]) == bs.program_summary(programs[1])


@pytest.mark.soak
def test_autocast_and_other_batches() -> None:
    eager, model = quantized(RECIPES["lsq"]), quantized(RECIPES["lsq"])
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for count in (4, 3, 5):
        assert_same_step(eager, compiled, images(count), amp=True)
    assert backend.graphs == 2  # the second batch size makes a graph for any


@pytest.mark.soak
def test_layers_in_integers_break_the_graph_and_compute_the_same() -> None:
    recipe = bs.recipes.shiftquant(w=4, a=4, g=4, norm="l1")
    eager, model = quantized(recipe, calibrated=False), quantized(recipe, calibrated=False)
    backend = Counting()
    assert_same_step(eager, torch.compile(model, backend=backend), images())
    assert backend.graphs > 1


@pytest.mark.parametrize(
    "name", ["strata", pytest.param("lsq", marks=pytest.mark.soak), pytest.param("lsq_plus", marks=pytest.mark.soak)]
)
def test_export_of_the_evaluated_model_equals_it(name: str) -> None:
    model = quantized(RECIPES[name]).eval()
    for precision in bs.precisions(model):
        bs.set_precision(model, precision)
        exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        x = images(5, 7)
        assert torch.equal(exported(x), model(x))


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs g++ when it runs")
@pytest.mark.parametrize("name", [*RECIPES])
def test_inductor(name: str) -> None:
    eager, model = quantized(RECIPES[name]), quantized(RECIPES[name])
    compiled = torch.compile(model, fullgraph=True)
    for precision in bs.precisions(eager):
        bs.set_precision(eager, precision)
        bs.set_precision(model, precision)
        assert_same_step(eager, compiled, images(), tolerance=1e-5)
    eager.eval(), compiled.eval()
    assert_same_step(eager, compiled, images(3, 3), tolerance=1e-5)
