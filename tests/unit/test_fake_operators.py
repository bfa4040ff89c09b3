"""The operator of fake quantization: one node of compiled and exported graphs, with its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitstrata.functional import engine_fake, fake_quantize, fused_kernels, nested_fake_quantize, uniform_fake_quantize
from bitstrata.functional.affine import Affine
from bitstrata.functional.clipping import Clipping
from bitstrata.functional.formula import Formula, restore
from bitstrata.functional.nested import Nested
from bitstrata.functional.uniform import Uniform

OPERATOR = torch.ops.bitstrata.fake_quantize
BACKWARD = torch.ops.bitstrata.fake_quantize_backward


def arguments(case: Formula, x: Tensor, grad: bool) -> tuple[object, ...]:
    step = torch.full((1,), 0.3).requires_grad_(grad)
    extra = torch.full((1,), 0.9).requires_grad_(grad) if case.takes_extra else None
    return x.detach().requires_grad_(grad), step, extra, case.name, case.numbers(), 0.5


def test_opcheck():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.library.opcheck(OPERATOR, arguments(Nested(4, 2), image, True))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for case in (Uniform(0, 15, True), Affine(15)):
        torch.library.opcheck(OPERATOR, arguments(case, torch.randn(7).bfloat16(), True), test_utils=quick)
        for x in (image, torch.randn(5, dtype=torch.float64)):  # kernels, and the formula
            first = arguments(case, x, False)
            given = (torch.randn_like(x), *first, [True, True, case.takes_extra])
            torch.library.opcheck(BACKWARD, given, test_utils=quick)


class Block(nn.Module):
    """A quantized convolution by hand, whose weights and inputs have different grids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.step = nn.Parameter(torch.full((1,), 0.1))
        self.weight_step = nn.Parameter(torch.full((4, 1, 1, 1), 0.05))
        self.ratio = nn.Parameter(torch.full((4, 1, 1, 1), 0.9))

    def forward(self, x: Tensor) -> Tensor:
        x = uniform_fake_quantize(x, self.step, 0, 15, grad_scale=0.1, open_range=True)
        w = nested_fake_quantize(self.conv.weight, self.weight_step, self.ratio, 4, 2, grad_scale=0.2)
        return nn.functional.conv2d(x, w, self.conv.bias)


def gradients(module: nn.Module, function, x: Tensor, *, autocast: bool) -> list[Tensor]:
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(leaf)
    y.float().square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_equals_eager(autocast):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 3, 8, 8)
    nodes: list[list[str]] = []

    def backend(graph, _):
        nodes.append([str(n.target) for n in graph.graph.nodes if "bitstrata" in str(n.target)])
        return graph.forward

    expected = gradients(block, block, x, autocast=autocast)
    torch.compile(block, fullgraph=True, backend=backend)(x)
    assert nodes == [["bitstrata.fake_quantize"] * 2]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(expected, gradients(block, compiled, x, autocast=autocast), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_exported_program_holds_one_node_a_quantizer():
    block, x = Block().eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(block, (x,))
    nodes = [str(n.target) for n in program.graph.nodes if "bitstrata" in str(n.target)]
    assert nodes == ["bitstrata.fake_quantize.default"] * 2
    torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=0)


def test_what_is_kept_for_the_backward_pass():
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    block, x = Block(), torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        uniform_fake_quantize(x, block.step, 0, 15)
        nested_fake_quantize(block.conv.weight, block.weight_step, block.ratio, 4, 2)
    held = {t.data_ptr() for t in (x, block.step, block.conv.weight, block.weight_step, block.ratio)}
    assert {t.data_ptr() for t in kept} == held


def test_operator_equals_the_direct_call():
    x = torch.randn(3, 50)
    for case in (Uniform(0, 15), Clipping(15, False, True)):
        given = arguments(case, x, True)
        direct = fake_quantize.fake_quantize(*given[:3], case, grad_scale=0.5)
        value = OPERATOR(*given)
        torch.testing.assert_close(value, direct, rtol=0, atol=0)
        wanted = torch.autograd.grad(direct.sum(), given[:2])
        torch.testing.assert_close(torch.autograd.grad(value.sum(), given[:2]), wanted, rtol=0, atol=0)


def test_the_switch(monkeypatch):
    calls: list[str] = []
    inner = engine_fake.forward
    monkeypatch.setattr(engine_fake, "forward", lambda *a: calls.append("kernels") or inner(*a))
    x, step = torch.randn(9), torch.ones(1)
    uniform_fake_quantize(x, step, 0, 15)
    with fused_kernels(False):
        uniform_fake_quantize(x, step, 0, 15)
        with fused_kernels(True):
            uniform_fake_quantize(x, step, 0, 15)
    assert calls == ["kernels"] * 2
    for value, expected in (("0", False), ("1", True), (None, True)):
        monkeypatch.delenv("BITSTRATA_FUSED", raising=False)
        if value is not None:
            monkeypatch.setenv("BITSTRATA_FUSED", value)
        assert fake_quantize.wanted() is expected


def test_what_kernels_do_not_take_falls_to_the_formula():
    x = torch.randn(6, 4)
    for case, step in (
        (Uniform(0, 1000), torch.ones(1)),  # codes beyond 256
        (Uniform(0, 15), torch.rand(6, 4)),  # a step an element
        (Uniform(0, 15), torch.rand(1, 4)),  # a step for each last dimension
        (Uniform(0, 15), torch.rand(1, dtype=torch.float64)),
        (Affine(15), torch.rand(1)),  # without its offset
    ):
        assert engine_fake.forward(x, step, None, case) is None
    for unfit in (x.double(), x.half(), torch.empty(0, 4)):
        assert engine_fake.forward(unfit, torch.ones(1), None, Uniform(0, 15)) is None
        y = uniform_fake_quantize(unfit, torch.ones(1, requires_grad=True), 0, 15)
        assert y.dtype == unfit.dtype
        assert y.shape == unfit.shape
        y.sum().backward()


def test_second_derivatives_are_refused():
    x = torch.randn(5, requires_grad=True)
    (first,) = torch.autograd.grad(
        uniform_fake_quantize(x, torch.ones(1, requires_grad=True), -4, 3).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_unknown_formulas_are_refused():
    x, step = torch.randn(5), torch.ones(1)
    with pytest.raises(ValueError, match=r"'cubic' with 0 numbers is no formula; there are affine, "):
        OPERATOR(x, step, None, "cubic", [], 1.0)
    with pytest.raises(ValueError, match="'uniform' with 1 numbers is no formula"):
        restore("uniform", (1.0,))
