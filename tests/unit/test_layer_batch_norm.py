"""Layer-batch normalization: a worked example, gradients, running statistics, several processes, folding."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
import torch.distributed as dist
from helpers_ranks import start
from torch import Tensor, nn

from bitstrata.functional.layer_batch import _composed, layer_batch_norm
from bitstrata.nn.layer_batch_norm import (
    LayerBatchNorm,
    LayerBatchNorm1d,
    LayerBatchNorm2d,
    fold,
    layer_batch_norm_from,
)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def example() -> tuple[LayerBatchNorm1d, Tensor]:
    norm = LayerBatchNorm1d(2).double()
    with torch.no_grad():
        norm.weight.copy_(double([1, 2]))
        norm.bias.copy_(double([0, 0.5]))
    return norm, double([[[1, 3], [5, 7]], [[2, 2], [0, 4]]]).requires_grad_()


def test_worked_example():
    norm, x = example()
    y = norm(x)
    expected = double(
        [[[-0.94280799, 0], [2.38561599, 4.27123198]], [[-0.471404, -0.471404], [-2.32842398, 1.44280799]]]
    )
    torch.testing.assert_close(y.detach(), expected, rtol=0, atol=1e-8)
    y[0, 0, 0].backward()
    expected = double(
        [
            [[0.36010039, -0.0589255], [-0.00654739, 0.04583071]],
            [[-0.08511455, -0.08511455], [-0.13749266, -0.03273645]],
        ]
    )
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(norm.weight.grad, double([-0.94280799, 0]), rtol=0, atol=1e-8)
    assert norm.bias.grad.tolist() == [1, 0]
    torch.testing.assert_close(norm.running_mean, double([0.3]), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm.running_var, double([0.9 + 0.45]), rtol=1e-12, atol=0)  # the biased 4.5
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("form", "shape"),
    [(LayerBatchNorm1d, (3, 2)), (LayerBatchNorm1d, (2, 2, 3)), (LayerBatchNorm2d, (1, 2, 2, 3))],
)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients(form, shape, affine):
    norm = form(2, affine=affine).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(norm.eval(), (x,), eps=1e-6, atol=1e-6)


def test_one_mean_and_one_variance_for_everything():
    x = 3 * torch.randn(4, 5, 3, 3, dtype=torch.float64) + torch.arange(5.0).view(5, 1, 1)
    y = LayerBatchNorm2d(5).double()(x).detach()
    assert abs(float(y.mean())) < 1e-12
    assert abs(float(y.var(correction=0)) - 1) < 1e-4
    assert float(y.mean(dim=(0, 2, 3)).abs().max()) > 0.1  # channels keep their differences
    single = LayerBatchNorm2d(5).double()(x[:1])  # a batch of one has statistics of its own
    torch.testing.assert_close(single, (x[:1] - x[:1].mean()) / (x[:1].var(correction=0) + 1e-5).sqrt())


def test_evaluation_uses_the_running_statistics():
    norm = LayerBatchNorm2d(3, eps=1e-3, momentum=0.25).double()
    batches = [torch.randn(4, 3, 2, 2, dtype=torch.float64) + i for i in range(3)]
    mean, var = 0.0, 1.0
    for x in batches:
        norm(x)
        mean, var = 0.75 * mean + 0.25 * float(x.mean()), 0.75 * var + 0.25 * float(x.var(correction=0))
    norm.eval()
    torch.testing.assert_close(norm(batches[0]), (batches[0] - mean) / (var + 1e-3) ** 0.5, rtol=1e-12, atol=1e-12)
    assert int(norm.num_batches_tracked) == 3
    norm.reset_running_stats()
    assert (norm.running_mean.tolist(), norm.running_var.tolist(), int(norm.num_batches_tracked)) == ([0], [1], 0)


def test_cumulative_average():
    norm = LayerBatchNorm1d(3, momentum=None).double()
    batches = [torch.randn(7, 3, dtype=torch.float64) * (i + 1) for i in range(4)]
    for x in batches:
        norm(x)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean() for x in batches]).mean().view(1))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(correction=0) for x in batches]).mean().view(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast_module", [True, False])
def test_half_precision_computes_in_float32(dtype, cast_module):
    x = (torch.randn(8, 4, 16, 16) * 20 + 100).to(dtype)
    half, full = LayerBatchNorm2d(4), LayerBatchNorm2d(4)
    half = half.to(dtype) if cast_module else half
    y, wanted = half(x), full(x.float()).to(dtype)
    assert float((y != wanted).float().mean()) < 0.01  # sums in another order
    torch.testing.assert_close(y, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    precision = torch.finfo(half.running_var.dtype).eps if cast_module else 1e-5
    torch.testing.assert_close(half.running_var.float(), full.running_var, rtol=precision, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (4, 5, 6, 3)])
def test_the_definition(dtype, affine, shape):
    torch.manual_seed(len(shape))
    x, gradient = torch.randn(2, *shape).mul(3).add(1).to(dtype)
    weight, bias = torch.randn(2, 5) if affine else (None, None)
    found, wanted = [], []
    for own, function in ((found, layer_batch_norm), (wanted, lambda *args: _composed(*args, None))):
        wide = dtype if own is found else torch.float64
        leaves = [None if t is None else t.to(wide).requires_grad_() for t in (x, weight, bias)]
        if len(shape) == 4 and own is found:
            leaves[0] = leaves[0].detach().to(memory_format=torch.channels_last).requires_grad_()
        y, mean, var = function(*leaves, 1e-3)
        asked = [leaf for leaf in leaves if leaf is not None]
        own += [y, mean, var, *torch.autograd.grad(y, asked, gradient.to(wide))]
        assert not mean.requires_grad
        assert all(g.dtype == leaf.dtype for g, leaf in zip(own[3:], asked, strict=True))
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=error, atol=error * float(b.detach().abs().max()))


def test_second_derivatives():
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 2), (2,), (2,)))
    assert torch.autograd.gradgradcheck(lambda *args: layer_batch_norm(*args, 1e-3)[0], (x, weight, bias))


def test_large_means_do_not_cancel():
    x = torch.randn(16, 4, 8, 8, dtype=torch.float64) + 10_000
    torch.testing.assert_close(
        LayerBatchNorm2d(4)(x.float()).double(), LayerBatchNorm2d(4).double()(x), rtol=0, atol=2e-3
    )


def test_layouts_do_not_matter():
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    norm = LayerBatchNorm2d(6).double()
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        torch.testing.assert_close(norm(view), norm(view.contiguous()), rtol=1e-12, atol=1e-12)


def test_constant_input_gives_the_bias():
    norm, _ = example()
    x = torch.full((3, 2), 7.0, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, norm.bias.expand(3, 2), rtol=0, atol=1e-12)
    assert bool(x.grad.isfinite().all())
    assert bool(norm(double([[float("nan"), 1.0]])).isnan().all())


def test_state_and_repr():
    norm, x = example()
    norm(x)
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    twin = LayerBatchNorm1d(2).double()
    twin.load_state_dict(norm.state_dict())
    assert torch.equal(twin.eval()(x), norm.eval()(x))
    twin.reset_parameters()
    assert twin.weight.tolist() == [1, 1]
    assert twin.bias.tolist() == twin.running_mean.tolist() * 2 == [0, 0]
    assert repr(norm) == "LayerBatchNorm1d(2, eps=1e-05, momentum=0.1, affine=True)"
    assert LayerBatchNorm1d(2, affine=False).weight is None
    assert "sync=True" in repr(LayerBatchNorm2d(2, sync=True))
    assert torch.equal(LayerBatchNorm1d(2, sync=True).double()(x), LayerBatchNorm1d(2).double()(x))  # one process


def test_errors():
    norm = LayerBatchNorm2d(3)
    with pytest.raises(ValueError, match=r"LayerBatchNorm2d: input must be \(N, C, H, W\), got shape \(2, 3, 4\)"):
        norm(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"LayerBatchNorm1d: input must be \(N, C\) or \(N, C, L\), got shape \(3,\)"):
        LayerBatchNorm1d(3)(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"LayerBatchNorm2d: input has 4 channels \(shape .*\), expected num_features=3"
    ):
        norm(torch.zeros(2, 4, 2, 2))
    for shape in ((1, 1), (0, 1)):
        single = LayerBatchNorm1d(1)
        with pytest.raises(ValueError, match=r"training needs more than one element a batch, got shape \(., 1\)"):
            single(torch.ones(shape))
        assert int(single.num_batches_tracked) == 0
        assert single.eval()(torch.ones(shape)).shape == shape
    assert LayerBatchNorm1d(2)(torch.tensor([[1.0, 3.0]])).shape == (1, 2)
    with pytest.raises(ValueError, match=r"LayerBatchNorm1d: num_features must be at least 1, got 0"):
        LayerBatchNorm1d(0)
    with pytest.raises(ValueError, match=r"LayerBatchNorm1d: eps must be at least 0, got -1"):
        LayerBatchNorm1d(1, eps=-1)
    with pytest.raises(ValueError, match=r"LayerBatchNorm1d: momentum must be in 0\.\.1 or None, got 2"):
        LayerBatchNorm1d(1, momentum=2)
    with pytest.raises(TypeError, match=r"LayerBatchNorm: use LayerBatchNorm1d or LayerBatchNorm2d"):
        LayerBatchNorm(1)


# ---- from batch normalization, and folding


@pytest.mark.parametrize("affine", [True, False])
def test_from_batch_normalization_pools_the_statistics(affine):
    x = torch.randn(50, 3, 4, 4, dtype=torch.float64) * double([1, 2, 3]).view(3, 1, 1) + double([0, 5, -1]).view(
        3, 1, 1
    )
    bn = nn.BatchNorm2d(3, eps=1e-3, momentum=None, affine=affine).double()
    bn(x)
    if affine:
        nn.init.uniform_(bn.weight)
        nn.init.uniform_(bn.bias)
    bn.running_var.copy_(x.var(dim=(0, 2, 3), correction=0))
    made = layer_batch_norm_from(bn.eval(), sync=True)
    assert type(made) is LayerBatchNorm2d
    assert (made.eps, made.momentum, made.training, made.sync, made.affine) == (1e-3, None, False, True, affine)
    torch.testing.assert_close(made.running_mean, x.mean().view(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(made.running_var, x.var(correction=0).view(1), rtol=1e-12, atol=0)
    assert int(made.num_batches_tracked) == 1
    if affine:
        assert torch.equal(made.weight, bn.weight)
        assert torch.equal(made.bias, bn.bias)
        assert made.weight is not bn.weight
    assert type(layer_batch_norm_from(nn.BatchNorm1d(2))) is LayerBatchNorm1d


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", [nn.BatchNorm2d, LayerBatchNorm2d])
def test_folding(form, affine):
    norm = form(4, affine=affine, eps=1e-2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm(torch.randn(8, 4, 3, 3) * 3 + 1)
    gain, shift = fold(norm)
    assert gain.shape == shift.shape == (4,)
    assert gain.dtype == shift.dtype == torch.float64
    assert not gain.requires_grad
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = copy.deepcopy(norm).double().eval()(x)
    torch.testing.assert_close(x * gain.view(4, 1, 1) + shift.view(4, 1, 1), expected, rtol=1e-12, atol=1e-12)


def test_conversion_errors():
    with pytest.raises(
        TypeError, match=r"layer_batch_norm_from: norm must be BatchNorm1d or BatchNorm2d, got LayerNorm"
    ):
        layer_batch_norm_from(nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"fold: norm must be a BatchNorm, LayerBatchNorm or L1BatchNorm, got Identity"):
        fold(nn.Identity())
    without = nn.BatchNorm1d(2, track_running_stats=False)
    for function in (fold, layer_batch_norm_from):
        with pytest.raises(
            ValueError, match=rf"{function.__name__}: BatchNorm1d.* has no running statistics; use track_"
        ):
            function(without)


# ---- several processes

SPLIT = (2, 1)  # samples of each rank: batches need not be of one size


def problem() -> tuple[LayerBatchNorm2d, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    norm = LayerBatchNorm2d(3, sync=True).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(3, generator=generator))
    x = torch.randn(sum(SPLIT), 3, 2, 2, generator=generator, dtype=torch.float64) + 100
    return norm, x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SPLIT))
    norm, x, upstream = problem()
    mine = x.split(SPLIT)[rank].clone().requires_grad_()
    y = norm(mine)
    (y * upstream.split(SPLIT)[rank]).sum().backward()
    single = LayerBatchNorm1d(1, sync=True)(torch.tensor([[float(rank)]])).detach()  # one element a rank, two in all
    result = {"y": y.detach(), "dx": mine.grad, "dw": norm.weight.grad, "db": norm.bias.grad, "single": single}
    torch.save(result | dict(norm.named_buffers()), pathlib.Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_several_processes_normalize_as_one(tmp_path):
    start(rank_main, str(tmp_path), ranks=len(SPLIT))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SPLIT))]
    norm, x, upstream = problem()
    x.requires_grad_()
    y = norm(x)
    (y * upstream).sum().backward()

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    close(torch.cat([r["y"] for r in ranks]), y.detach())
    close(torch.cat([r["dx"] for r in ranks]), x.grad)
    close(sum(r["dw"] for r in ranks), norm.weight.grad)
    close(sum(r["db"] for r in ranks), norm.bias.grad)
    for r in ranks:
        close(r["running_mean"], norm.running_mean)
        close(r["running_var"], norm.running_var)
        assert int(r["num_batches_tracked"]) == 1
    torch.testing.assert_close(
        torch.cat([r["single"] for r in ranks]), torch.tensor([[-1.0], [1.0]]), rtol=0, atol=1e-4
    )
