"""Lowering of input grids with offsets of their own, of pooled codes and of weight codes with any number of states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_lowering import STRATA, Net, assert_equal, images, normalised, prepared
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.lowering import LowerError
from bitstrata.nn.layers import QuantizedLayer
from bitstrata.recipes.base import Part
from bitstrata_runtime import derive
from bitstrata_runtime.plan import SumPool

OFFSETS = replace(
    STRATA, name="offsets", activation=Part("lsq_plus", "activation"), edge_activation=Part("lsq_plus", "activation")
)


def stages() -> nn.Module:
    """Three padded convolutions, one grouped and one strided, and a linear layer; inputs of either sign."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Hardtanh(-1.0, 2.0),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=(0, 2), stride=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def ready(net: nn.Module, pixels: bool, recipe: Any = OFFSETS) -> tuple[nn.Module, Tensor, Tensor]:
    """Quantized model, what it is lowered with, and what it is verified on."""
    data = images((3, 8, 8), 6)
    x = normalised(data).float()
    net(x)  # sets the lazy layer's shape
    return prepared(net, x, recipe, pixels=pixels), x, data if pixels else x.double()


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "codes"])
def test_offsets_of_every_layer_and_precision(pixels):
    """Model and program agree where every layer's input grid has an offset, with padding by the code nearest zero."""
    model, x, data = ready(stages(), pixels)
    program = bs.lower(model, x)
    inner = [layer for layer in program.layers.values() if layer.name != "0"]
    offsets = {p: [layer.input_offset[p] for layer in inner] for p in program.precisions}
    assert all(len(z) == 1 for row in offsets.values() for z in row)
    assert any(z != (0.0,) and not z[0].is_integer() for row in offsets.values() for z in row)
    assert offsets[1][0] != offsets[4][0]
    for layer in inner:
        for p, (z,) in layer.input_offset.items():
            low, high = layer.input_range[p]
            assert layer.pad_code[p] == (min(max(round(-z), low), high),)
    assert any(layer.pad_code[4] != (0,) for layer in inner)
    assert_equal(model, program, data)


def test_a_map_and_its_plan_take_each_layers_own_offset():
    model, x, data = ready(stages(), True)
    program = bs.lower(model, x)
    chosen = {name: (1, 4)[index % 2] for index, name in enumerate(program.layers)}
    report = bs.verify(model, program, data, at=[chosen])
    assert report.ok, str(report)


def test_an_offset_moves_the_layers_constant_by_the_sum_of_its_weights():
    model, x, _ = ready(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Hardtanh(-1, 2), nn.Conv2d(5, 4, 2, bias=False)), True)
    layer = model[2]
    assert isinstance(layer, QuantizedLayer)
    bs.set_precision(model, 4)
    program = bs.lower(model, x)
    grid, weight = layer.act_quant.grid(), layer.weight_quant(layer.weight).detach().double()
    gain, constant = program.factors["4"].affine["2"]
    expected = (weight.sum(dim=(1, 2, 3)) * grid.scale * grid.offset).numpy()
    np.testing.assert_allclose(constant, expected, rtol=0, atol=1e-6)  # the model's own weights are float32
    assert np.abs(constant).max() > 0.01
    assert (gain > 0).all()


def test_input_codes_with_gaps_are_refused(monkeypatch):
    model, x, _ = ready(stages(), True)
    kind = type(model[3].act_quant)
    plain = kind.grid
    monkeypatch.setattr(kind, "grid", lambda self, x=None: replace(plain(self, x), valid=(0, 2)))
    with pytest.raises(LowerError, match=r"the input codes of layer '3' leave out some between 0 and"):
        bs.lower(model, x)


# Pooled codes


def pooled(pool: nn.Module, recipe: Any = STRATA) -> tuple[nn.Module, Tensor, Tensor]:
    """A model whose layer "b" pools the codes it reads; `ready` otherwise."""
    net = Net(
        lambda m, x: m.c(torch.flatten(m.b(torch.relu(m.a(x))), 1)),
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 5, 3, padding=1),
        c=nn.LazyLinear(3),
    )
    data = images((3, 8, 8), 6)
    x = normalised(data).float()
    net.c = nn.Linear(net.b(pool(net.a(x))).flatten(1).shape[1], 3)

    def attach(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (pool(args[0]),)

    handle = net.b.register_forward_pre_hook(attach)  # the float layer, on which shapes and steps are found
    model = prepared(net, x, recipe, pixels=True)
    handle.remove()
    model.b.input_pool = pool
    return model, x, data


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.AvgPool2d((3, 2), stride=1, padding=(1, 0)), nn.AvgPool2d(4, 3), nn.AvgPool2d(1)],
    ids=str,
)
def test_pooled_codes(pool):
    """The program adds codes up; the divisor is in the affine."""
    model, x, data = pooled(pool)
    program = bs.lower(model, x)
    ops = {node.name: node.op for node in program.nodes}
    assert [ops[name] for name in ("b.input", "b.pool", "b")] == ["requant", "avgpool", "conv"]
    for p in program.precisions:
        plan = derive(program, p)
        op = next(op for op in plan.ops if op.name == "b.pool")
        assert isinstance(op, SumPool)
        assert (op.shift, plan.values[op.output].dtype, plan.values[op.output].scale) == (0, "u8", None)
    assert_equal(model, program, data)


def test_pooled_codes_in_one_dimension():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(28, 3))
    x = torch.randn(6, 2, 9, generator=torch.Generator().manual_seed(3))
    model = prepared(net, x)
    model[2].input_pool = nn.AvgPool1d(3, stride=1, padding=1)
    program = bs.lower(model, x)
    window = next(node.attrs["kernel"] for node in program.nodes if node.name == "2.pool")
    assert list(window) == [1, 3]
    assert_equal(model, program, x.double())


def test_the_divisor_of_pooled_codes_is_in_the_affine():
    model, x, _ = pooled(nn.AvgPool2d((3, 2), stride=1, padding=(1, 0)))
    with_pool = bs.lower(model, x).factors["4"].affine["b"]
    model.b.input_pool = nn.AvgPool2d(1)
    model.c = pooled(nn.AvgPool2d(1))[0].c  # of another shape
    without = bs.lower(model, x).factors["4"].affine["b"]
    np.testing.assert_allclose(with_pool[0] * 6, without[0], rtol=1e-15)
    np.testing.assert_array_equal(with_pool[1], without[1])


def test_pooled_codes_with_an_offset_are_refused():
    model, x, _ = pooled(nn.AvgPool2d(2), OFFSETS)
    with pytest.raises(
        LowerError, match=r"layer 'b' pools its input codes, whose grid has offset \(.*\); sums of codes"
    ):
        bs.lower(model, x)


def test_pooled_codes_beyond_eight_bits_are_refused():
    model, x, _ = pooled(nn.AvgPool2d(5))  # 25 * 15 at 4 bits
    with pytest.raises(
        LowerError, match=r"node 'b.pool' \(avgpool\): sums of codes can reach \[0, 375\], beyond the range"
    ):
        bs.lower(model, x)
