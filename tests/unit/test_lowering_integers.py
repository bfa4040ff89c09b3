"""Lowering of networks that train in integers: what freeze_ fixed, as plain 8-bit codes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_integer import batches, spread, trained
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.integer import IntegerRule
from bitstrata.integer.frozen import FrozenRange
from bitstrata.lowering import LowerError
from bitstrata.lowering.frozen import ShiftedLayer, SummedLayers, deployed
from bitstrata.nn import to_integer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.first(x))[0]


class Shapes(nn.Module):
    """Channels of very different ranges into grouped, depthwise, strided, clipped and pooled layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding="valid", groups=2, bias=False)
        self.short = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.after = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)
        with torch.no_grad():
            for layer in (self.stem, self.depthwise, self.grouped):
                layer.weight.mul_(torch.exp2(-(torch.arange(len(layer.weight)) % 5).float())[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(x))
        x = torch.relu(self.norm(self.depthwise(x)))
        x = torch.relu(self.after(self.grouped(x) + self.short(x[:, :, :6, :6])))
        return self.head(x.mean((2, 3)))


def checked(model: nn.Module, x: Tensor) -> Any:
    """Lower and verify; the program's float64 logits are the frozen model's."""
    program = bs.lower(model, x[:1])
    report = bs.verify(model, program, x.double())
    assert report.ok, str(report)
    assert report.first_difference == "none"
    with torch.no_grad():
        twin = bs.lowering.double_copy(model)
        torch.testing.assert_close(twin(x.double()), copy.deepcopy(model).double()(x.double()), rtol=1e-9, atol=1e-9)
    return program


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"w": 8, "a": 8, "g": 8},
        {"w": 6, "a": 5, "edge_bits": 4, "unsigned_nonneg": True},
        {"w": 3, "a": 2, "norm": "l2_quantized", "groups": 8},
        {"norm": "batch"},
        {"norm": "l1", "groups": 2},
        {"method": "int8_sr"},
    ],
    ids=str,
)
def test_programs_are_exact(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = Shapes()
    x = torch.randn(12, 2, 8, 8)
    bs.integer_(model, x[:2], **options)
    model(x)
    model.eval()
    bs.freeze_(model, [x])
    program = checked(model, x)
    assert program.precisions == (options.get("w", 8 if "method" in options else 4),)


def test_sequences_lower_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    x = torch.randn(16, 3, 8)
    bs.integer_(model, x[:2], w=5, a=5, g=5)
    model(x)
    checked(bs.freeze_(model.eval(), [x]), x)


def test_exponents_go_where_there_is_room() -> None:
    """4-bit weights take all shifts, 6-bit ones two places, 8-bit ones none: layers then become sums."""
    x = spread(6, 8)
    x[:, :4] = x[:, :4].sign() * torch.tensor([1.0, 0.5, 0.25, 0.125])
    parts = {}
    for bits in (4, 6, 8):
        layer = to_integer(nn.Linear(8, 3), IntegerRule(w=bits, a=bits), name="head").eval()
        layer.freeze_(FrozenRange.of(x.abs().amax(0), 4))
        model = nn.Sequential(nn.Identity(), layer)
        twin = deployed(model)[1]
        parts[bits] = len(twin.parts) if isinstance(twin, SummedLayers) else 1
        assert bits != 4 or isinstance(twin, ShiftedLayer)
        with torch.no_grad():
            twin, layer = twin.double(), layer.double()
            torch.testing.assert_close(twin(x.double()), layer(x.double()), rtol=1e-5, atol=1e-5)
    assert parts == {4: 1, 6: 2, 8: 4}


def test_deployed_leaves_other_models_and_the_model_itself_alone() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    assert deployed(plain) is plain
    model = bs.freeze_(trained(), batches())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bs.lower(model, batches()[0])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert set(model.state_dict()) == set(before)


def frozen(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    bs.integer_(model, x, **options)
    return bs.freeze_(model.eval(), [x])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


def errors() -> list[tuple[Callable[[], nn.Module], Tensor, str]]:
    x, image = spread(6, 4), torch.randn(2, 1, 8, 8)
    return [
        (trained, image, r"IntegerConv2d 'conv1' trains in integers whose ranges follow each batch; .*freeze_\(model"),
        (
            lambda: frozen(Attention(), x[:, None]),
            x,
            r"IntegerLSTM 'lstm' .* recurrent layers and embeddings come later",
        ),
        (
            lambda: frozen(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")), image),
            image,
            r"IntegerConv2d '0' pads by padding_mode 'circular'; programs pad with zeros",
        ),
        (lambda: frozen(Two(), x), x, r"layer 'b' reads the network's input with finer steps in some channels"),
        (
            lambda: bs.freeze_(bs.integer_(nn.Sequential(nn.Linear(4, 2)), x).eval(), [0 * x]),
            x,
            r"IntegerLinear '0': its input was zero in every batch that freeze_ saw",
        ),
        (lambda: frozen(nn.Sequential(nn.Linear(4, 2), nn.GELU()), x), x, r"type GELU has no integer form"),
        (lambda: frozen(nn.Sequential(nn.Linear(4, 2)), x)[0], x, r"the model is a bare IntegerLinear; wrap it in nn"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_what_has_no_program_is_named(case: int) -> None:
    make, x, message = errors()[case]
    model = make()
    with pytest.raises(LowerError, match=f"lower: .*{message}"):
        bs.lower(model, x[:1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.conv1.weight.data.fill_(torch.nan), r"lower: IntegerConv2d 'conv1': .*NaN or infinity"),
        (lambda m: m.linear.bias.data.fill_(torch.inf), r"lower: module 'linear.parts.0': .*bias are not finite"),
        (lambda m: m.bn1.running_deviation.fill_(torch.nan), r"lower: module 'bn1': .*not finite"),
    ],
)
def test_numbers_that_are_not_finite_are_named(spoil: Callable[[nn.Module], Any], message: str) -> None:
    model = bs.freeze_(trained(), batches())
    spoil(model)
    with pytest.raises(LowerError, match=message):
        bs.lower(model, batches()[0])


def test_both_kinds_of_layers_in_one_model_are_refused() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 4), frozen(nn.Sequential(nn.Linear(4, 2)), x))
    bs.quantize_(model, bs.recipes.lsq(4), x, filter=lambda name, _: name == "0")
    with pytest.raises(LowerError, match="trained in integers beside fake-quantized ones; use one kind"):
        bs.lower(model, x)


def test_a_normalization_that_is_not_frozen_is_named() -> None:
    model = bs.freeze_(trained(), batches())
    model.bn1.freeze_(False)
    with pytest.raises(LowerError, match=r"a QuantizedL1BatchNorm2d follows each batch; fix it first: .*freeze_"):
        bs.lower(model, batches()[0])
