"""quantize_, set_precision and summary on models that were not written for them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.nn import PrecisionBatchNorm, QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear
from bitstrata.prepare.precision import quantized_layers
from bitstrata.prepare.quantize import is_quantized
from bitstrata.quantizers.lsq import LSQActivation, LSQWeight
from bitstrata.quantizers.nested import NestedSymmetric
from bitstrata.quantizers.pixels import PixelInput
from bitstrata.quantizers.uniq import UniqActivation

STRATA = bs.recipes.strata(w=(1, 2, 4))


class Scaled(nn.Linear):
    """A linear layer with behaviour of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Menagerie(nn.Module):
    """Two inputs, shared and unused layers, containers, functional calls, and types without a quantized form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.branches = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.ModuleList([nn.Conv2d(4, 4, 1)])})
        self.unused = nn.Linear(5, 5)
        self.borrowed = nn.Linear(4, 4)  # only its weight is used
        self.words = nn.Embedding(7, 4)
        self.position = nn.Conv1d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scaled = Scaled(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.stem(image))))
        x = torch.relu(self.shared(input=torch.relu(self.shared(x))))
        x = self.reflect(self.branches["a"](x) + self.branches["b"][0](x)).mean((2, 3))
        words = self.position(self.words(tokens).transpose(1, 2)).transpose(1, 2)
        words = self.norm(self.attention(words, words, words)[0]).mean(1)
        x = F.linear(self.normed(self.scaled(x)) + words, self.borrowed.weight)
        return self.head(x)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 4), torch.tensor([[0, 3, 6], [1, 1, 2]])


def calibrated(model: nn.Module, x: Tensor, recipe=STRATA, **options) -> nn.Module:
    return bs.calibrate_(bs.quantize_(model, recipe, x, **options), [x])


def rows(model: nn.Module) -> dict[str, object]:
    return {row.name: row for row in bs.summary(model).rows}


def follows(model: nn.Module) -> dict[str, str]:
    return {name: m.owner for name, m in model.named_modules() if isinstance(m, PrecisionBatchNorm)}


# ---- which layers become what


def test_a_model_that_nobody_has_seen(inputs):
    model = Menagerie()
    parameters = dict(model.named_parameters())
    before = copy.deepcopy(model).eval()
    assert bs.quantize_(model, STRATA, inputs) is model
    kinds = {name: type(layer) for name, layer in quantized_layers(model).items()}
    assert kinds == {
        "stem": QuantConv2d,
        "shared": QuantConv2d,
        "branches.a": QuantConv2d,
        "branches.b.0": QuantConv2d,
        "position": QuantConv1d,
        "head": QuantLinear,
    }
    for name, parameter in parameters.items():
        assert dict(model.named_parameters())[name] is parameter
    for _ in range(2):  # a training batch at each precision sets the steps
        for p in bs.precisions(model):
            with bs.precision(model, p):
                out = model(*inputs)
                assert out.shape == (2, 2)
                out.sum().backward()
    model.eval()
    assert not torch.equal(model(*inputs), before(*inputs))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_the_summary_says_what_was_left_in_float_and_why(inputs):
    model = bs.quantize_(Menagerie(), STRATA, inputs, filter=lambda name, layer: name != "branches.a")
    notes = {name: row.note for name, row in rows(model).items()}
    assert notes["stem"] == notes["head"] == "first or last layer"
    assert notes["shared"] == ""
    assert notes["unused"] == notes["borrowed"] == "float: did not run on the example"
    assert notes["branches.a"] == "float: kept in float by the filter"
    assert notes["reflect"] == "float: padding_mode 'reflect' has no quantized form"
    assert notes["up"] == "float: no quantized form of ConvTranspose2d"
    assert notes["norm"] == "float: no quantized form of LayerNorm"
    assert notes["words"] == "float: no quantized form of Embedding"
    assert notes["attention"] == "float: no quantized form of MultiheadAttention"
    assert notes["scaled"] == "float: a subclass of Linear with behaviour of its own"
    assert notes["normed"] == "float: a subclass of Linear with behaviour of its own"
    text = str(bs.summary(model))
    assert "branches.b.0" in text
    total = sum(p.numel() for m in quantized_layers(model).values() for p in (m.weight, m.bias))
    assert f"{total:,} of " in text.splitlines()[-1]


def test_summary_rows():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert {(r.weight, r.input, r.note) for r in bs.summary(model).rows} == {("-", "-", "float")}
    assert "0 of 87 parameters are in quantized layers" in str(bs.summary(model))
    bs.quantize_(model, bs.recipes.strata(w=(1, 4), per_channel=True), torch.randn(3, 4))
    table = rows(model)
    assert list(table) == ["0", "2", "3", "4"]
    assert (table["0"].kind, table["0"].weight, table["0"].parameters) == ("Linear", "LSQWeight 8", 25)
    assert table["0"].input == "LSQActivation 8 signed"
    assert table["0"].note == "first or last layer; a step an output channel"
    assert (table["2"].weight, table["2"].input) == ("NestedSymmetric 1,4", "UniqActivation 1,4")
    assert (table["3"].kind, table["3"].note, table["3"].parameters) == (
        "BatchNorm1d",
        "one a precision, follows 2",
        24,
    )
    lines = str(bs.summary(model)).splitlines()
    assert lines[0].split() == ["layer", "type", "weight", "input", "params", "note"]
    assert lines[-1] == "75 of 99 parameters are in quantized layers"


def test_edges_and_inner_layers_get_their_grids():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    bs.quantize_(model, bs.recipes.strata(w=(1, 3), a=5), torch.randn(2, 3, 4, 4))
    first, inner, last = quantized_layers(model).values()
    assert [layer.edge for layer in (first, inner, last)] == [True, False, True]
    for layer in (first, last):
        assert isinstance(layer.weight_quant, LSQWeight)
        assert isinstance(layer.act_quant, LSQActivation)
        assert layer.weight_quant.bits == layer.act_quant.bits == {1: 8, 3: 8}
        assert layer.act_quant.shared
    assert isinstance(inner.weight_quant, NestedSymmetric)
    assert isinstance(inner.act_quant, UniqActivation)
    assert (inner.weight_quant.bits, inner.act_quant.bits) == ({1: 1, 3: 3}, {1: 5, 3: 5})
    assert [layer.act_quant.signed for layer in (first, inner, last)] == [True, False, True]


def test_float_edges():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    bs.quantize_(model, bs.recipes.strata(edges="float"), torch.randn(2, 4))
    assert list(quantized_layers(model)) == ["1"]
    assert rows(model)["0"].note == rows(model)["2"].note == "float: edge layer, kept in float by the recipe"


def test_float_activations():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    bs.quantize_(model, bs.recipes.strata(a=None), torch.randn(2, 4))
    assert [layer.act_quant for layer in quantized_layers(model).values()] == [None] * 3
    assert rows(model)["1"].input == "float"
    assert model.eval()(torch.randn(2, 4)).shape == (2, 4)  # nothing to calibrate


def test_edges_are_found_by_the_order_of_running():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    model = bs.quantize_(Backwards(), STRATA, torch.randn(2, 4))
    assert (model.first.edge, model.middle.edge, model.last.edge) == (True, False, True)


def test_a_layer_that_runs_again_counts_where_it_ran_first():
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    model = bs.quantize_(nn.Sequential(a, b, c, a), STRATA, torch.randn(2, 4), input=bs.Pixels((0.5,), (0.5,)))
    assert (a.edge, b.edge, c.edge) == (True, False, True)
    assert isinstance(model[0].act_quant, PixelInput)


def test_a_layer_on_the_fused_path_of_torchs_transformer_is_quantized():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model, x = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 3)), torch.randn(2, 5, 8)
    calibrated(model, x).eval()
    assert is_quantized(model[1].layers[0].linear1)
    expected = model(x)  # gradients enabled: torch runs the layers one by one
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_weight_norm_of_the_old_kind_keeps_working():
    """It recomputes `weight` in a pre-hook, so there is no parameter of that name."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        middle = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    model, x = nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 2)), torch.randn(3, 4)
    calibrated(model, x)(x).sum().backward()
    assert float(middle.weight_g.grad.abs().sum()) > 0


def test_pixels_become_the_first_layers_grid():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    pixels = bs.Pixels(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    bs.quantize_(model, STRATA, torch.randn(1, 3, 4, 4), input=pixels)
    assert isinstance(model[0].act_quant, PixelInput)
    assert model[0].act_quant.mean == (0.5, 0.4, 0.3)
    assert model[0].act_quant.bits == {1: 8, 2: 8, 4: 8}
    torch.testing.assert_close(model[0].effective_weight(), model[0].weight / 0.2)
    # the steps fit the weight that is quantized, W/std
    expected = 2 * (model[0].weight.abs().mean() / 0.2) / 127**0.5
    torch.testing.assert_close(model[0].weight_quant.step, expected.reshape(1))
    assert isinstance(model[3].act_quant, LSQActivation)


def test_pixels_repeat_behind_a_flatten():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    bs.quantize_(model, STRATA, torch.randn(1, 3, 2, 2), input=bs.Pixels((0.1, 0.2, 0.3), (1, 2, 4)))
    assert model[1].act_quant.std == (1.0,) * 4 + (2.0,) * 4 + (4.0,) * 4
    assert model[1].act_quant.pad_codes == (26,) * 4 + (51,) * 4 + (76,) * 4


# ---- what quantize_ leaves alone


@pytest.mark.parametrize("training", [False, True])
def test_modes_hooks_and_statistics_survive(training):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model.train(training)
    model[2].eval()
    hooks = [module.register_forward_hook(lambda *_: None) for module in (model[0], model[3])]
    bs.quantize_(model, STRATA, torch.randn(3, 4))
    assert (model.training, model[0].training, model[0].act_quant.training) == (training, training, training)
    assert (model[1].levels["1"].training, model[2].training) == (training, False)
    assert model[1].levels["1"].num_batches_tracked == 0
    assert [len(module._forward_hooks) for module in (model[0], model[3])] == [1, 1]
    assert all(h.id in m._forward_hooks for h, m in zip(hooks, (model[0], model[3]), strict=True))


def test_a_failing_example_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bs.quantize_(model, STRATA, torch.randn(3, 5))
    assert all(type(m) in (nn.Sequential, nn.Linear, nn.Dropout) and m.training for m in model.modules())
    assert not model[0]._forward_hooks


def test_refusal_of_a_recipe_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"LSQWeight: undefined at 1 bit"):
        bs.quantize_(model, bs.recipes.lsq(1), torch.randn(3, 4))
    assert [type(m) for m in model] == [nn.Linear] * 3
    assert list(model.state_dict()) == keys


def test_float_state_dict_keys_keep_working():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    state = copy.deepcopy(model.state_dict())
    bs.quantize_(model, STRATA, torch.randn(3, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    model.load_state_dict(state, strict=True)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_double_precision_models_stay_double():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    calibrated(model, x)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(x).dtype == torch.float64


# ---- refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, x: bs.quantize_([m], STRATA, x),
            TypeError,
            r"^quantize_: model must be a torch.nn.Module, got list$",
        ),
        (
            lambda m, x: bs.quantize_(m, "strata", x),
            TypeError,
            r"^quantize_: recipe must be a Recipe such as recipes.strata\(\), got str$",
        ),
        (
            lambda m, x: bs.quantize_(bs.quantize_(m, STRATA, x), STRATA, x),
            ValueError,
            r"^quantize_: the model is quantized already; start from a float model$",
        ),
        (
            lambda m, x: bs.quantize_(m[0], STRATA, x),
            ValueError,
            r"^quantize_: the model is a bare Linear; wrap it in nn.Sequential$",
        ),
        (
            lambda m, x: bs.quantize_(m, STRATA, x, filter=lambda *_: False),
            ValueError,
            r"^quantize_: no layer to quantize among 2 candidates: \{'0': 'kept in float by the filter', '1': ",
        ),
        (
            lambda m, x: bs.quantize_(nn.Sequential(nn.ReLU()), STRATA, x),
            ValueError,
            r"^quantize_: no layer to quantize among 0 candidates: none ran$",
        ),
        (
            lambda m, x: bs.quantize_(m, STRATA, x, input=bs.Pixels((0.5,) * 3, (0.5,) * 3)),
            ValueError,
            r"^quantize_: input=Pixels has 3 channels, but the first layer '0' reads 4$",
        ),
        (
            lambda m, x: bs.quantize_(m, STRATA, x, filter=lambda n, _: n != "0", input=bs.Pixels((0.5,), (0.5,))),
            ValueError,
            r"^quantize_: input=Pixels is for a quantized first layer, but '0' reads floats: kept in float by the f",
        ),
        (
            lambda m, x: bs.recipes.strata(w=(2.7, 4)),
            ValueError,
            r"^strata: weight widths must be whole numbers of bits, got \(2\.7, 4\)$",
        ),
        (
            lambda m, x: bs.Pixels((0.5,), (0.5, 0.5)),
            ValueError,
            r"^Pixels: mean and std must have one entry a channel, got \(0.5,\) and \(0.5, 0.5\)$",
        ),
        (lambda m, x: bs.Pixels((), ()), ValueError, r"^Pixels: mean and std must have one entry a channel, got \(\)"),
        (lambda m, x: bs.Pixels((125.0,), (1.0,)), ValueError, r"^Pixels: mean must lie in 0\.\.1 and std be positive"),
        (lambda m, x: bs.Pixels((0.5,), (0.0,)), ValueError, r"^Pixels: mean must lie in 0\.\.1 and std be positive"),
    ],
)
def test_refusals(call, error, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(error, match=message):
        call(model, torch.randn(2, 4))


def test_public_quantized_layers_are_marked():
    model = bs.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), STRATA, torch.randn(2, 4))
    assert is_quantized(model[0])
    assert not is_quantized(model[1])
    assert isinstance(model[0], QuantizedLayer)
