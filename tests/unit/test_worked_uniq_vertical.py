"""UniQ and vertical layering on whole networks: placement, counts, schedules, planes and combined gradients."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata import zoo
from bitstrata.nn.norm import PrecisionBatchNorm
from bitstrata.objectives import joint_backward, min_norm_point
from bitstrata.prepare.precision import quantized_layers
from bitstrata.quantizers import build
from bitstrata.quantizers.initial import activation_statistic
from bitstrata.train import TrainConfig
from bitstrata.train.schedule import lr_factor_of
from bitstrata_runtime.planes import pack_plane, unpack_plane, widen

# ---- UniQ

STAGES = {"preact_resnet18": (2, 3, 4), "preact_resnet20": (2, 3), "resnet18": (2, 3, 4)}


@pytest.mark.parametrize("network", sorted(STAGES))
def test_first_last_and_downsampling_layers_of_a_binary_network_stay_in_float(network):
    """UniQ section 5: 1-bit networks quantize neither the first nor the last layer, nor shortcut convolutions."""
    model, x = zoo.create(network, 10, width=8), torch.randn(2, 3, 32, 32)
    shortcut, last = ("downsample.0", "fc") if network == "resnet18" else ("shortcut", "linear")
    expected = {"conv1", last, *(f"layer{stage}.0.{shortcut}" for stage in STAGES[network])}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    bs.quantize_(model, bs.recipes.uniq(1, edges="float", downsample="float"), x)
    quantized = quantized_layers(model)
    assert layers - set(quantized) == expected
    for name in expected:
        layer = model.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert not hasattr(layer, "weight_quant")
        assert not hasattr(layer, "act_quant")
    for layer in quantized.values():
        assert (layer.weight_quant.width, layer.act_quant.width) == (1, 1)
        assert layer.weight_quant.codes(layer.weight.detach()).unique().tolist() == [-1, 0]


def test_statistics_of_the_worked_activation_batches():
    """sqrt(2 mean x^2), of which calibration keeps the larger (UniQ eq. 10)."""
    batches = torch.tensor([[0.0, 0, 1, 2], [0, 1, 0, 1]], dtype=torch.float64)
    found = [activation_statistic("mse", batch, signed=False).item() for batch in batches]
    assert found == pytest.approx([1.58113883, 1.0], abs=1e-8)


def test_the_recipe_of_one_bit_starts_its_epochs_at_the_papers_rates():
    """Adam, five epochs at .001, then .004 and a cosine to 0 over the other 85 (UniQ section 5.1)."""
    config = TrainConfig.from_recipe(bs.recipes.uniq(1))
    assert (config.optimizer, config.epochs, config.batch_size, config.weight_decay) == ("adam", 90, 256, 0.0)
    found = [config.lr * lr_factor_of(config, 4 * epoch, 4) for epoch in range(90)]
    cosine = [0.002 * (1 + math.cos(math.pi * epoch / 85)) for epoch in range(85)]
    assert found == pytest.approx([0.001] * 5 + cosine, rel=1e-12)


@pytest.mark.parametrize(("bits", "decay"), [(2, 2.5e-5), (3, 5e-5), (4, 1e-4)])
def test_the_recipe_of_several_bits_trains_as_the_paper_does(bits, decay):
    """SGD from .01, 90 epochs of 256, decay by width (UniQ section 5.1)."""
    config = TrainConfig.from_recipe(bs.recipes.uniq(bits))
    assert (config.optimizer, config.momentum, config.nesterov) == ("sgd", 0.9, False)
    assert (config.lr, config.epochs, config.batch_size, config.warmup) == (0.01, 90, 256, 0)
    assert (config.weight_decay, config.decay) == (decay, "all")


# ---- vertical layering: planes, counts, distillation


def test_all_sixteen_codes_pass_through_planes():
    """The base code and the planes b_1, b_2 give the codes of every width again (vertical layering, eqs. 3, 4)."""
    quantizer = build("vertical", "weight", {}, bits={2: 2, 3: 3, 4: 4}).double()
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    w = 0.5 * torch.arange(-8, 8, dtype=torch.float64)
    codes = {}
    for p in (2, 3, 4):
        quantizer.precision = p
        codes[p] = quantizer.codes(w).numpy().astype(np.int8)
    assert codes[4].tolist() == list(range(-8, 8))
    assert codes[2].tolist() == [math.floor(c / 4) for c in range(-8, 8)]
    planes = [unpack_plane(pack_plane(codes[4], 4, i), codes[4].shape, "test") for i in range(1, 5)]
    held = None
    for width, plane in enumerate(planes, start=1):
        held = widen(held, plane.copy())
        if width >= 2:
            np.testing.assert_array_equal(held, codes[width])
    np.testing.assert_array_equal(planes[2], codes[3] - 2 * codes[2])
    np.testing.assert_array_equal(planes[3], codes[4] - 2 * codes[3])
    sums = codes[2] + planes[2] / 2 + planes[3] / 4
    np.testing.assert_array_equal(4 * sums, codes[4])


def held_by_norms(model: nn.Module) -> int:
    """Numbers in the normalizations: affine maps and statistics, those that are shared once."""
    norms = [m for m in model.modules() if isinstance(m, PrecisionBatchNorm)]
    found: dict[int, int] = {}
    for norm in norms:
        for level in norm.levels.values():
            for tensor in (level.weight, level.bias, level.running_mean, level.running_var):
                found[id(tensor)] = tensor.numel()
    return sum(found.values())


@pytest.mark.parametrize(("levels", "count"), [("shared", 19_200), ("statistics", 38_400), ("individual", 57_600)])
def test_normalizations_of_a_quantized_resnet18(levels, count):
    """Vertical layering, Table 4, in the model itself: 4,800 channels, three widths."""
    model = zoo.create("resnet18", 10)
    bs.quantize_(model, bs.recipes.vertical(norm_levels=levels), torch.randn(1, 3, 32, 32))
    assert held_by_norms(model) == count


def test_edge_layers_of_their_own_cost_what_the_paper_says():
    """Vertical layering, Table 8: 1.04 million more weights in ResNet-18 with a first and last layer a width."""
    sizes = []
    for own in (False, True):
        model = zoo.create("resnet18", 1000)
        bs.quantize_(model, bs.recipes.vertical(edges="float", own_edges=own), torch.randn(1, 3, 32, 32))
        layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        sizes.append(sum(p.numel() for m in layers for p in m.parameters(recurse=False)))
    assert sizes[1] - sizes[0] == 2 * (9_408 + 513_000) == 1_044_816


def test_cosine_of_the_worked_distillation():
    p, q = (torch.tensor(z, dtype=torch.float64).softmax(0) for z in ([2.0, 0, -1], [1.0, 1, 0]))
    assert float(F.cosine_similarity(p, q, dim=0)) == pytest.approx(0.78139790, abs=1e-8)
    loss = bs.objectives.cosine_distillation(
        torch.tensor([[1.0, 1, 0]]).double(), torch.tensor([[2.0, 0, -1]]).double()
    )
    assert loss.item() == pytest.approx(1 - 0.78139790, abs=1e-8)


# ---- vertical layering: combined gradients


def shortest(gram: np.ndarray) -> np.ndarray:
    """The factors of the shortest combination, by solving for every set of vectors that may have positive ones."""
    count, best, winner = len(gram), math.inf, np.zeros(len(gram))
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = gram[np.ix_(chosen, chosen)]
            system = np.block([[part, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            factors = np.linalg.lstsq(system, np.eye(size + 1)[size], rcond=None)[0][:size]
            if (factors >= 0).all() and abs(factors.sum() - 1) < 1e-9 and factors @ part @ factors < best:
                best, winner = factors @ part @ factors, np.zeros(count)
                winner[list(chosen)] = factors
    return winner


@pytest.mark.parametrize("seed", range(10))
def test_the_shortest_combination_of_three_gradients(seed):
    """Against an exact solution, at the paper's three widths: Frank-Wolfe ends within 1e-8 of the longest square."""
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + seed / 10
    gram = (rows @ rows.T).numpy()
    found, expected = min_norm_point(list(rows)).numpy(), shortest(gram)
    assert found @ gram @ found == pytest.approx(expected @ gram @ expected, abs=1e-8 * gram.max())
    assert found == pytest.approx(expected, abs=1e-4)


def small(**fields: object) -> tuple[nn.Module, Tensor, Tensor]:
    """A network between a float stem and a float head, as the paper has it, quantized to 2, 3 and 4 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
    ).double()
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    bs.quantize_(model, bs.recipes.vertical(edges="float", **fields), x)
    return bs.calibrate_(model, [x]), x, y


def alone(model: nn.Module, p: int, x: Tensor, y: Tensor, teacher: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and logits of one width by itself."""
    twin = copy.deepcopy(model)
    bs.set_precision(twin, p)
    z = twin(x)
    loss = F.cross_entropy(z, y)
    if teacher is not None:
        loss = loss + (1 - F.cosine_similarity(z.softmax(1), teacher.softmax(1), dim=1)).mean()
    loss.backward()
    return {name: q.grad for name, q in twin.named_parameters() if q.grad is not None}, z.detach()


@pytest.mark.parametrize("combine", ["scalarization", "mgd"])
@pytest.mark.parametrize("distill", [None, "cosine"])
def test_shared_gradients_combine_and_own_gradients_stay(combine, distill):
    """Vertical layering, section 4.2: w and s_w get sum alpha_i dL_i; normalizations and activation steps dL_i."""
    model, x, y = small(distill=distill, combine=combine)
    runs, teacher = {}, None
    for p in (4, 3, 2):
        runs[p], logits = alone(model, p, x, y, teacher)
        teacher = logits if distill else None
    result = joint_backward(model, x, y, distill=distill, combine=combine)
    names = dict(model.named_parameters())
    own = {
        n: p for n, q in names.items() for p, group in bs.precision_parameters(model).items() for r in group if r is q
    }
    assert {n for n in own if own[n] == 3} == {
        *(f"{n}.levels.3.{kind}" for n in (3, 6) for kind in ("weight", "bias")),
        *(f"{n}.act_quant.steps.3" for n in (2, 5)),
    }
    shared = [n for n in names if n not in own]
    assert {"0.weight", "2.weight", "5.weight_quant.step", "9.weight"} <= set(shared)
    rows = np.stack([torch.cat([runs[p][n].flatten() for n in shared]).numpy() for p in (4, 3, 2)])
    alphas = np.full(3, 1 / 3) if combine == "scalarization" else shortest(rows @ rows.T)
    assert [result[p].alpha for p in (4, 3, 2)] == pytest.approx(alphas.tolist(), abs=1e-4)
    combined = torch.from_numpy(np.array([result[p].alpha for p in (4, 3, 2)]) @ rows)
    found = torch.cat([names[n].grad.flatten() for n in shared])
    torch.testing.assert_close(found, combined, rtol=1e-9, atol=1e-13)
    for name, p in own.items():
        torch.testing.assert_close(names[name].grad, runs[p][name], rtol=1e-9, atol=1e-13)
