"""Loss surfaces around a point, and the variance that quantization adds to gradients."""

from __future__ import annotations

import itertools
import math
import struct
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata
from bitstrata import integer_, zoo
from bitstrata.diagnostics import Landscape, gradient_variance, loss_landscape, plot_landscape
from bitstrata.diagnostics.landscape import filter_direction
from bitstrata.fused import fuse
from bitstrata.integer import CounterGenerator, channel_quantize, shift_quantize, tensor_quantize
from bitstrata.prepare.integer_training import noise_state

INF = float("inf")


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.Dropout(0.25),
        nn.Conv2d(7, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 3),
    )  # fmt: skip


def batch(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 8, 8, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def entropy(model: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(example[0]), example[1])


def everything(model: nn.Module) -> tuple:
    """All that a diagnosis must leave alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.detach().numpy().tobytes()) for name, t in tensors.items()},
        {name: m.training for name, m in model.named_modules()},
        {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        {name: [len(m._forward_hooks), "_product" in m.__dict__] for name, m in model.named_modules()},
        noise_state(model),
        torch.get_rng_state().tolist(),
    )


class Bowl(nn.Module):
    """Half the squared distance of all parameters from what they were at first, times `steep`."""

    def __init__(self, steep: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64))
        self.kernel = nn.Parameter(torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        self.steep = steep
        self.start = [p.detach().clone() for p in self.parameters()]

    def forward(self) -> Tensor:
        parts = [(p - s).square().sum() for p, s in zip(self.parameters(), self.start, strict=True)]
        return self.steep / 2 * sum(parts)


def test_surface_of_a_quadratic():
    """|a d1 + b d2|^2 / 2 = (a^2 |d1|^2 + b^2 |d2|^2) / 2 + a b d1.d2, and |d1| = |d2| = |w| for all that moves."""
    model = Bowl()
    moving = [model.weight, model.kernel]
    generator = torch.Generator().manual_seed(11)
    d1, d2 = (torch.cat([d.reshape(-1) for d in filter_direction(moving, generator)]) for _ in range(2))
    length = sum(float(p.detach().square().sum()) for p in moving)
    assert float(d1 @ d1) == pytest.approx(length)
    assert float(d2 @ d2) == pytest.approx(length)
    found = loss_landscape(model, lambda m, scale: scale * m(), [1.0, 3.0], points=5, radius=0.5, seed=11)
    assert found.x.tolist() == found.y.tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    b, a = np.meshgrid(found.y, found.x, indexing="ij")
    expected = 2 * (0.5 * length * (a**2 + b**2) + a * b * float(d1 @ d2))  # the mean of the batches' 1 and 3
    np.testing.assert_allclose(found.loss, expected, rtol=1e-9, atol=1e-12)
    assert found.loss.dtype == np.float64
    assert found.center == 0
    assert abs(float(d1 @ d2)) > 1e-3 * length  # so that a transposed surface would differ


def test_axes_are_not_swapped():
    """loss[i, j] is at y[i] along the second direction and x[j] along the first, which is the line's."""
    line = loss_landscape(Bowl(), lambda m, _: m().sqrt() + m.weight.sum(), [0], points=7, dimensions=1, seed=5)
    surface = loss_landscape(Bowl(), lambda m, _: m().sqrt() + m.weight.sum(), [0], points=7, seed=5)
    assert line.y is None
    assert line.loss.shape == (7,)
    assert line.loss.tolist() == surface.loss[3].tolist()
    assert line.loss.tolist() != surface.loss[:, 3].tolist()
    assert line.center == surface.center


def test_directions_have_the_lengths_of_filters():
    parameters = [torch.randn(6, 3, 3, 3) * torch.logspace(-3, 3, 6).reshape(-1, 1, 1, 1), torch.randn(4, 7)]
    parameters[1][2] = 0
    directions = filter_direction(parameters, torch.Generator().manual_seed(0))
    for parameter, direction in zip(parameters, directions, strict=True):
        assert direction.shape == parameter.shape
        torch.testing.assert_close(direction.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1))
    assert directions[1][2].tolist() == [0] * 7
    again = filter_direction(parameters, torch.Generator().manual_seed(0))
    other = filter_direction(parameters, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, d) for a, d in zip(again, directions, strict=True))
    assert not torch.equal(other[0], directions[0])


def test_only_weights_move_unless_told():
    model, moved = small(), set()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def watching(m: nn.Module, _: int) -> Tensor:
        moved.update(name for name, p in m.named_parameters() if not torch.equal(p, start[name]))
        return torch.zeros(())

    loss_landscape(model, watching, [0], points=3)
    assert moved == {"0.weight", "4.weight", "8.weight"}
    moved.clear()
    loss_landscape(model, watching, [0], points=3, moves=lambda name, p: name in ("1.bias", "8.weight"))
    assert moved == {"8.weight"}  # the bias is 0 at first, and so is each of its filters' lengths
    moved.clear()
    loss_landscape(model, watching, [0], points=3, moves=lambda name, p: name == "1.weight")
    assert moved == {"1.weight"}
    moved.clear()
    layer_norm = nn.Sequential(nn.LayerNorm((2, 3)), nn.Linear(3, 3))
    start = {name: p.detach().clone() for name, p in layer_norm.named_parameters()}
    loss_landscape(layer_norm, watching, [0], points=3)
    assert moved == {"1.weight"}


@pytest.mark.parametrize("training", [False, True, None])
@pytest.mark.parametrize("integer", [False, True])
def test_everything_is_put_back(integer, training):
    model = small()
    if integer:
        integer_(model, batch()[0], act_rounding="stochastic", norm="l1_quantized", seed=3)
    model.train()
    model[1].eval()
    entropy(model, batch()).backward()
    before = everything(model)
    found = loss_landscape(model, entropy, [batch(), batch(1)], points=3, radius=0.3, training=training)
    assert everything(model) == before
    assert np.isfinite(found.loss).all()
    variance = gradient_variance(model, entropy, batch(), groups=(1, 4), training=training)
    assert everything(model) == before
    assert list(variance.layers) == ["0", "4", "8"]


@pytest.mark.parametrize("call", [loss_landscape, gradient_variance])
def test_everything_is_put_back_behind_an_error(call):
    model = integer_(small(), batch()[0])
    model.train()
    calls = []

    def failing(m: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        value = entropy(m, example)
        calls.append(value)
        if len(calls) == 2 or call is gradient_variance:
            raise RuntimeError("out of order")
        return value

    before = everything(model)
    with pytest.raises(RuntimeError, match="out of order"):
        call(model, failing, [batch()] if call is loss_landscape else batch(), training=True)
    assert everything(model) == before


def test_the_center_is_the_model_and_the_mode_is_the_callers():
    model = small()
    for seed in range(3):
        entropy(model.train(), batch(seed))  # running statistics unlike those of the batch
    model[3].p = 0.0
    with torch.no_grad():
        expected = {mode: float(entropy(deepcopy(model).train(mode), batch())) for mode in (False, True)}
    assert expected[False] != expected[True]
    for mode, value in expected.items():
        found = loss_landscape(model, entropy, [batch()], points=3, training=mode)
        assert found.center == value
    assert loss_landscape(model.eval(), entropy, [batch()], points=3, training=None).center == expected[False]


def test_every_point_sees_the_same_dropout():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    found = loss_landscape(
        model, lambda m, x: m(x).sum() * 0 + (m[1](x) * torch.arange(6)).sum(), [torch.ones(3, 6)], points=3,
        training=True,
    )  # fmt: skip
    assert len(set(found.loss.reshape(-1).tolist())) == 1
    assert found.center > 0


def test_a_float_network_and_its_integer_form_share_directions():
    plain, batches = small(), [batch()]
    integer = integer_(deepcopy(plain), batch()[0], norm="l1_quantized")
    steps: dict[str, list[Tensor]] = {"plain": [], "integer": []}
    for name, model in (("plain", plain), ("integer", integer)):
        loss_landscape(
            model,
            lambda m, _, name=name: (steps[name].append(m[4].weight.detach().clone()), torch.zeros(()))[1],
            batches,
            points=3,
        )
    assert all(torch.equal(p, q) for p, q in zip(steps["plain"], steps["integer"], strict=True))


def test_a_fused_network_has_the_surface_of_its_model():
    torch.manual_seed(0)
    model = zoo.create("digits_resnet")
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    integer_(model, x)
    options = {"points": 3, "radius": 0.2, "training": True}
    plain = loss_landscape(model, entropy, [(x, y)], **options)
    fused = loss_landscape(fuse(model), entropy, [(x, y)], **options)
    assert plain.loss.tobytes() == fused.loss.tobytes()
    with pytest.raises(ValueError, match="gradient_variance: the layers of a fused network do not run one by one"):
        gradient_variance(fuse(model), entropy, (x, y), training=True)


def test_nan_and_infinity_are_kept():
    values = iter([math.nan, INF, -INF, 1, 2, 3, 4, 5, 6])
    found = loss_landscape(nn.Linear(2, 2), lambda m, _: torch.tensor(float(next(values))), [0], points=3)
    assert struct.pack("9d", *found.loss.reshape(-1)) == struct.pack("9d", math.nan, INF, -INF, 1, 2, 3, 4, 5, 6)
    assert found.center == 2
    assert found.share_within(2) == 5 / 9  # -inf, 1, 2, 3 and 4
    assert found.local_minima() == 0


def test_measures_of_a_surface():
    axis = np.linspace(-1, 1, 5)
    bowl = axis[:, None] ** 2 + axis[None, :] ** 2
    found = Landscape(axis, axis, bowl)
    assert found.local_minima() == 1
    assert found.share_within(0) == 1 / 25
    assert found.share_within(0.25) == 5 / 25
    assert found.share_within(0.5) == 9 / 25
    assert Landscape(axis, axis, -bowl).local_minima() == 0
    pits = bowl.copy()
    pits[1, 3] = -1
    assert Landscape(axis, axis, pits).local_minima() == 1  # the centre is its neighbour
    pits[3, 1] = -1
    assert Landscape(axis, axis, pits).local_minima() == 2
    assert Landscape(axis, None, np.array([2.0, 1, 2, 0, 5])).local_minima() == 2
    assert Landscape(axis, None, np.array([2.0, 1, math.nan, 0, 5])).local_minima() == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"points": 4}, "points must be an odd integer of at least 3, got 4"),
        ({"points": 1}, "points must be an odd integer of at least 3, got 1"),
        ({"points": 5.0}, "points must be an odd integer of at least 3, got 5.0"),
        ({"radius": 0.0}, r"radius must be positive and finite, got 0\.0"),
        ({"radius": INF}, "radius must be positive and finite, got inf"),
        ({"dimensions": 3}, "dimensions must be 1 or 2, got 3"),
        ({"batches": []}, "batches is empty"),
        ({"moves": lambda name, p: False}, "no parameter of Sequential moves"),
        ({"loss": lambda m, b: torch.zeros(2)}, r"loss must give one number as a tensor, got \(2,\)"),
        ({"loss": lambda m, b: 1.0}, "loss must give one number as a tensor, got float"),
    ],
)
def test_bad_options_of_a_surface(options, text):
    call = {"loss": entropy, "batches": [batch()], **options}
    with pytest.raises(ValueError, match=f"loss_landscape: {text}"):
        loss_landscape(small(), **call)


def test_weights_that_have_no_length():
    model = small()
    model[4].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"parameter '4\.weight' contains NaN or infinity"):
        loss_landscape(model, entropy, [batch()])
    scalar = nn.Module()
    scalar.scale = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(ValueError, match="parameter 'scale' has no dimensions"):
        loss_landscape(scalar, entropy, [batch()], moves=lambda name, p: True)


@pytest.mark.parametrize("form", ["contour", "surface"])
def test_pictures(tmp_path, form):
    axis = np.linspace(-1, 1, 7)
    bowl = axis[:, None] ** 2 + axis[None, :] ** 2
    rough = 3 * bowl + 1
    rough[0, 0], rough[6, 6] = math.nan, INF
    file = tmp_path / "surfaces.png"
    plot_landscape({"one": Landscape(axis, axis, bowl), "other": Landscape(axis, axis, rough)}, file, form=form)
    wide = _pixels(file)
    plot_landscape({"one": Landscape(axis, axis, bowl)}, file, form=form, dpi=50)
    narrow = _pixels(file)
    assert wide[0] > 2.8 * narrow[0]
    assert wide[1] == 2 * narrow[1]


def _pixels(file) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def test_picture_of_lines_names_each(tmp_path):
    axis = np.linspace(-1, 1, 7)
    file = tmp_path / "lines.svg"
    plot_landscape({"low": Landscape(axis, None, axis**2), "high": Landscape(axis, None, 2 * axis**2)}, file)
    drawn = file.read_text()
    assert "<!-- low -->" in drawn
    assert "<!-- high -->" in drawn
    flat = Landscape(axis, None, np.ones(7))
    plot_landscape({"flat": flat}, file)  # no range of losses at all
    assert "<!-- flat -->" in file.read_text()


def test_pictures_that_cannot_be(tmp_path):
    axis = np.linspace(-1, 1, 3)
    line, surface = Landscape(axis, None, axis**2), Landscape(axis, axis, np.full((3, 3), math.nan))
    file = tmp_path / "x.png"
    with pytest.raises(ValueError, match="plot_landscape: results is empty"):
        plot_landscape({}, file)
    with pytest.raises(ValueError, match=r"surfaces and lines do not go together, got .*\(3, 3\)"):
        plot_landscape({"a": line, "b": surface}, file)
    with pytest.raises(ValueError, match="no loss is finite"):
        plot_landscape({"b": surface}, file)
    with pytest.raises(ValueError, match="form must be one of contour, surface, got 'bars'"):
        plot_landscape({"a": line}, file, form="bars")
    with pytest.raises(ValueError, match=r"highest must be finite and above the lowest loss 0, got -1\.0"):
        plot_landscape({"a": line}, file, highest=-1.0)
    assert not file.exists()


class Ending(nn.Module):
    """A linear layer without a bias, whose output's gradient under `chosen` is the batch's second tensor."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)


def chosen(model: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    return (model.layer(example[0]) * example[1]).sum()


def gradient_of_ranges(rows: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(-8 * torch.rand(channels, generator=generator))
    return torch.randn(rows, channels, generator=generator) * scales


def test_variances_are_those_of_sampled_rounding():
    gradient, draws, rounds = gradient_of_ranges(48, 20, 1), 160, CounterGenerator(4)
    model = Ending(3, 20)
    found = gradient_variance(model, chosen, (torch.randn(48, 3), gradient), groups=(1, 3)).layers["layer"]
    options = {"rounding": "stochastic", "generator": rounds}
    quantize = {
        ("tensor", 1): lambda: tensor_quantize(gradient, 4, **options),
        ("channel", 20): lambda: channel_quantize(gradient, 4, 1, **options),
        ("shift", 1): lambda: shift_quantize(gradient, 4, 1, **options),
        ("shift", 3): lambda: shift_quantize(gradient, 4, 3, **options),
    }
    for key, draw in quantize.items():
        errors = torch.stack([(draw().dequantize() - gradient).double().square().sum() for _ in range(draws)])
        error = float(errors.std()) / math.sqrt(draws)
        assert abs(float(errors.mean()) - found.variance[key]) < 4 * error
        assert error < 0.02 * found.variance[key]
    assert (found.channels, found.elements) == (20, 960)
    ranges = gradient.abs().amax(0)
    assert found.spread == pytest.approx(float(ranges.max() / ranges.median()))


def test_a_worked_gradient():
    """Ranges 7 and 1 at 4 bits: steps 1 and 1 per tensor, 1 and 1/4 in three groups, 1 and 1/7 by channel."""
    gradient = torch.tensor([[7.0, 1.0], [2.5, 0.25], [0.0, 0.125]])
    layer = gradient_variance(Ending(2, 2), chosen, (torch.randn(3, 2), gradient), groups=(1, 2, 3, 8)).layers["layer"]
    fine = [(1 / 4) ** 2 * 0.25, (1 / 7) ** 2 * (0.75 * 0.25 + 0.875 * 0.125)]
    assert layer.variance["tensor", 1] == pytest.approx(0.25 + 0.25 * 0.75 + 0.125 * 0.875)
    assert layer.variance["shift", 1] == layer.variance["tensor", 1]
    assert layer.variance["shift", 3] == layer.variance["shift", 8] == pytest.approx(0.25 + fine[0])
    assert layer.variance["channel", 2] == pytest.approx(0.25 + fine[1], rel=1e-6)
    assert layer.variance["optimal", 2] == pytest.approx(layer.variance["channel", 2])
    assert layer.bound["tensor", 1] == pytest.approx(3 / 4 * 2)
    assert layer.bound["shift", 2] == pytest.approx(3 / 4 * (1 + 1 / 4))
    assert layer.bound["channel", 2] == pytest.approx(3 / 4 * (1 + 1 / 49))
    assert layer.relative()["tensor", 1] == 1
    assert layer.relative(bound=True)["shift", 2] == pytest.approx(5 / 8)
    assert layer.variance["channel", 2] < layer.variance["shift", 3]


def test_a_finer_step_is_not_always_the_smaller_variance():
    """Values on ShiftQuant's grid of quarters are exact there, and not on the channel's own grid of sevenths."""
    gradient = torch.tensor([[7.0, 1.0], [3.0, 0.25], [0.0, 0.5]])
    layer = gradient_variance(Ending(2, 2), chosen, (torch.randn(3, 2), gradient), groups=(3,)).layers["layer"]
    assert layer.variance["shift", 3] == 0
    assert layer.variance["channel", 2] > 0
    assert layer.bound["channel", 2] < layer.bound["shift", 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_orders_that_always_hold(bits):
    groups = (1, 2, 3, 4, 6, 8)
    model = integer_(small(), batch()[0])
    layers = list(gradient_variance(model, entropy, batch(), bits=bits, training=True).layers.values())
    for seed in range(6):
        example = (torch.randn(16, 3), gradient_of_ranges(16, 30, seed))
        layers += gradient_variance(Ending(3, 30), chosen, example, bits=bits).layers.values()
    assert len(layers) == 9
    less = 1 + 1e-9
    for layer in layers:
        bound, variance = layer.bound, layer.variance
        assert variance["shift", 1] == pytest.approx(variance["tensor", 1])
        for few, more in itertools.pairwise(groups):
            assert variance["shift", more] <= variance["shift", few] * less
            assert bound["shift", more] <= bound["shift", few] * less
            assert bound["optimal", more] <= bound["optimal", few] * less
        for number in groups:
            assert bound["channel", layer.channels] <= bound["optimal", number] * less
            assert bound["optimal", number] <= bound["shift", number] * less
            assert bound["shift", number] <= bound["tensor", 1] * less
            limit = 4 * bound["channel", layer.channels] + 4.0 ** (1 - number) * bound["tensor", 1]
            assert bound["shift", number] <= limit * less
        assert set(variance) - set(bound) == ({("powers", 1)} if bits <= 4 else set())
        assert all(variance[key] <= value * less for key, value in bound.items())
    assert all(layer.bound["shift", 8] < layer.bound["tensor", 1] for layer in layers[3:])


def test_gradients_are_those_that_arrive_at_layers():
    model = small().eval()
    found = gradient_variance(model, entropy, batch(), groups=(1,))
    model[2].inplace = False
    outputs = {}
    for name in ("0", "4", "8"):
        model[int(name)].register_forward_hook(lambda m, a, y, name=name: outputs.update({name: y}))
    loss = entropy(model, batch())
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    for (name, layer), gradient in zip(found.layers.items(), gradients, strict=True):
        z = gradient.double() / (float(gradient.abs().max()) / 7)
        fraction = z - z.floor()
        expected = float((fraction * (1 - fraction)).sum()) * (float(gradient.abs().max()) / 7) ** 2
        assert layer.variance["tensor", 1] == pytest.approx(expected, rel=1e-4), name
        assert (layer.channels, layer.elements) == (gradient.shape[1], gradient.numel())
        assert layer.bound["channel", layer.channels] == pytest.approx(fine_bound(gradient.transpose(0, 1)), rel=1e-4)


def fine_bound(channels: Tensor) -> float:
    """N / 4 sum_j (r_j / 7)^2 for a gradient with its channels first."""
    rows = channels.double().flatten(1)
    return rows.shape[1] / 4 * float((rows.abs().amax(1) / 7).square().sum())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv1d(2, 5, 3), (4, 2, 9), 1),
        (nn.Conv2d(2, 5, 3), (4, 2, 9, 6), 1),
        (nn.Linear(6, 5), (4, 3, 6), 2),
    ],
)
def test_channels_of_a_layer(layer, shape, axis, batched):
    x = torch.randn(shape if batched else shape[1:])
    gradient = torch.randn_like(layer(x))
    model = nn.Sequential(layer)
    found = gradient_variance(model, lambda m, b: (m(b) * gradient).sum(), x, groups=(2,)).layers["0"]
    first = gradient.movedim(axis if batched else axis - 1, 0)
    assert (found.channels, found.elements) == (5, gradient.numel())
    assert found.bound["channel", 5] == pytest.approx(fine_bound(first), rel=1e-5)


def test_layers_of_several_products_and_of_several_calls():
    torch.manual_seed(0)
    model = zoo.TransformerLM(11, context=6, width=8, depth=1, heads=2)
    tokens = torch.randint(11, (3, 6))

    def loss(m: nn.Module, t: Tensor) -> Tensor:
        return F.cross_entropy(m(t).flatten(0, 1), t.flatten())

    plain = gradient_variance(model, loss, tokens, groups=(1, 4))
    assert list(plain.layers) == ["blocks.0.feed.fc1", "blocks.0.feed.fc2", "head"]
    integer_(model, tokens)
    found = gradient_variance(model, loss, tokens, groups=(1, 4))
    inside = ["blocks.0.attention.q_proj", "blocks.0.attention.out_proj"]
    assert list(found.layers) == [*inside, *plain.layers]
    assert [layer.channels for layer in found.layers.values()] == [24, 8, 32, 8, 11]
    assert {layer.elements // layer.channels for layer in found.layers.values()} == {18}
    twice = Ending(4, 4)
    x, g = torch.randn(5, 4), gradient_of_ranges(5, 4, 0)
    once = gradient_variance(twice, chosen, (x, g)).layers["layer"]
    both = gradient_variance(twice, lambda m, b: chosen(m, b) + 3 * chosen(m, b), (x, g)).layers["layer"]
    assert both.elements == 2 * once.elements
    for key, value in once.variance.items():
        assert both.variance[key] == pytest.approx(10 * value)


def test_layers_without_a_gradient():
    model = nn.ModuleDict({"layer": nn.Linear(3, 2), "idle": nn.Linear(3, 2), "cut": nn.Linear(3, 2)})

    def loss(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return m["layer"](x).sum() + m["cut"](x).detach().sum()

    found = gradient_variance(model, loss, torch.ones(4, 3), groups=(2,))
    assert list(found.layers) == ["layer"]
    assert sorted(found.missed) == ["cut", "idle"]
    zero = gradient_variance(model, lambda m, x: 0 * m["layer"](x).sum(), torch.ones(4, 3), groups=(2,))
    assert zero.layers["layer"].variance["tensor", 1] == 0
    assert zero.layers["layer"].spread == 1
    assert all(math.isnan(v) for v in zero.layers["layer"].relative().values())
    assert zero.mean_relative() == {}


def test_mean_over_layers():
    found = gradient_variance(small(), entropy, batch(), groups=(1, 4), training=True)
    mean = found.mean_relative()
    groups = {(kind, n) for kind in ("shift", "optimal") for n in (1, 4)}
    assert set(mean) == {("tensor", 1), ("channel", 0), ("powers", 1)} | groups
    shares = [layer.relative()["shift", 4] for layer in found.layers.values()]
    assert mean["shift", 4] == pytest.approx(sum(shares) / 3)
    assert mean["tensor", 1] == 1
    fine = [layer.relative(bound=True)["channel", layer.channels] for layer in found.layers.values()]
    assert found.mean_relative(bound=True)["channel", 0] == pytest.approx(sum(fine) / 3)


def test_bad_options_of_a_variance():
    model = small()
    for options, text in (
        ({"bits": 9}, r"bits must be an integer in 2\.\.8, got 9"),
        ({"groups": (4, 0)}, r"groups must be an integer in 1\.\.8, got 0"),
    ):
        with pytest.raises(ValueError, match=f"gradient_variance: {text}"):
            gradient_variance(model, entropy, batch(), **options)
    with pytest.raises(ValueError, match="the gradient at layer '8' contains NaN or infinity"):
        gradient_variance(model, lambda m, b: entropy(m, b) * INF, batch())
    with pytest.raises(ValueError, match="no gradient reached a layer of Bowl"):
        gradient_variance(Bowl(), lambda m, b: m(), None)
    with pytest.raises(ValueError, match="no parameter of Sequential needs a gradient"):
        gradient_variance(model.requires_grad_(False), entropy, batch())


def test_the_package_offers_it():
    assert bitstrata.diagnostics.loss_landscape is loss_landscape
