"""Memory of a fused step: blocks out of segments, and sums that are computed again instead of kept."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.fused.qat_units import QatConvNorm
from bitstrata.integer import pool as pools
from bitstrata.integer.pool import ALIGNMENT, Pool

ALL = 10**9  # products of a sum: every convolution is repeated


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_what_was_given_back_is_taken_again():
    pool = Pool()
    a, b = pool.take((3, 5), np.float32), pool.take((70,), np.int8)
    assert address(b) == address(a) + ALIGNMENT
    assert pool.lent == 3 * ALIGNMENT
    first = address(a)
    pool.share(a, 2)
    assert not pool.sole(a)
    pool.give(a)
    assert pool.sole(a)
    assert pool.lent == 3 * ALIGNMENT
    pool.give(a.reshape(15))
    assert pool.lent == 2 * ALIGNMENT
    assert address(pool.take((16,), np.uint16)) == first


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_free_neighbours_become_one(order):
    pool = Pool()
    small = [pool.take((1000,), np.uint8) for _ in range(3)]
    rest, first = pool.take((1,), np.uint8), address(small[0])
    for i in order:
        pool.give(small[i])
    large = pool.take((3000,), np.uint8)
    assert address(large) == first < address(rest)


def test_blocks_do_not_overlap(monkeypatch):
    monkeypatch.setattr(pools, "SMALLEST", 1 << 12)
    rng, pool, held = np.random.default_rng(0), Pool(), []
    array = None
    for i in range(600):
        if held and rng.random() < 0.4:
            array, number = held.pop(int(rng.integers(len(held))))
            assert (array == number).all()
            if rng.random() < 0.8:
                pool.give(array)
            array = None  # what is not given back returns too
        else:
            array = pool.take((int(rng.integers(0, 900)), 2), np.int32)
            array[:] = i
            assert address(array) % ALIGNMENT == 0
            held.append((array, i))
    assert len(pool._segments) > 1
    assert all((array == number).all() for array, number in held)
    held.clear()
    array = None
    before = pool.nbytes
    pool.take((before,), np.uint8)
    assert len(pool._segments) == 1  # of all segments, once nobody held any
    assert pool.nbytes == before


def test_a_block_outlives_its_pool_and_may_be_dropped_elsewhere():
    pool = Pool()
    kept = torch.from_numpy(pool.take((1000,), np.float32)).fill_(3)
    twin = copy.deepcopy(pool)
    assert (twin.lent, twin.nbytes) == (0, 0)
    dropped = [pool.take((1000,), np.float32)]
    thread = threading.Thread(target=dropped.clear)
    thread.start()
    thread.join()
    assert pool.lent == 4032
    del pool
    gc.collect()
    assert bool((kept == 3).all())


class Chain(nn.Module):
    """Convolutions one after the other: nothing between them is kept but by choice."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 6, 5, 8, 4, 6)
        self.body = nn.Sequential(
            *(
                part
                for i, o in pairwise(sizes)
                for part in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            )
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def networks(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet20":
        return bs.zoo.create(name, classes=5, width=4, shortcut="B")
    net = Chain()
    if name == "pooled chain":
        net.body.insert(3, nn.MaxPool2d(3, 2, padding=1))
    return net


def quantized(name: str, recipe: bs.Recipe) -> tuple[nn.Module, Tensor, Tensor]:
    model = networks(name)
    x, y = torch.randn(3, 3, 16, 16), torch.arange(3)
    return bs.calibrate_(bs.quantize_(model, recipe, x), [x]).train(), x, y


@pytest.mark.parametrize("name", ["chain", "pooled chain", "resnet20"])
@pytest.mark.parametrize("casts", [False, True])
def test_repeated_sums_change_no_bit(name, casts):
    model, x, y = quantized(name, bs.recipes.strata((2, 4)))
    x.requires_grad_()
    models = [copy.deepcopy(model) for _ in range(3)]
    results, gradients, kept = [], [], []
    for one, recompute in zip(models, (0, 40, ALL), strict=True):
        fused = bs.fuse(one, recompute=recompute)
        x.grad = None
        for precision in (4, 2):
            bs.set_precision(fused, precision)
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                loss = F.cross_entropy(fused(x), y)
            kept.append(fused._pool.lent)
            loss.backward()
            assert fused._pool.lent == 0
            results.append(loss.detach())
        gradients.append(x.grad)
    assert results[:2] == results[2:4] == results[4:]
    assert all(torch.equal(gradients[0], g) for g in gradients)
    for other in models[1:]:
        for (where, p), q in zip(models[0].named_parameters(), other.parameters(), strict=True):
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), where
        for p, q in zip(models[0].buffers(), other.buffers(), strict=True):
            assert torch.equal(p, q)
    assert kept[0] > kept[-1]


def test_sums_of_32_bits_are_repeated_too():
    model, x, y = quantized("chain", bs.recipes.lsq(4))
    found = []
    for recompute, wide in ((0, False), (0, True), (ALL, True)):
        twin = copy.deepcopy(model)
        fused = bs.fuse(twin, recompute=recompute)
        for unit in fused._units if wide else ():
            if isinstance(unit, QatConvNorm):
                unit.wide.add(unit.conv.precision)
        F.cross_entropy(fused(x), y).backward()
        found.append([p.grad for p in twin.parameters()])
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(*found, strict=True))


def test_what_is_kept_of_a_chain_is_every_third():
    model, x, _ = quantized("chain", bs.recipes.lsq(4))
    fused = bs.fuse(model, recompute=ALL)
    result = fused(x)
    # two of five are repeated, then one is kept (8 channels), then two; the last goes to torch as floats
    assert fused._pool.lent == 3 * 16 * 16 * (8 * 2 + 6 * 4)
    del result


@pytest.mark.parametrize(
    ("recompute", "error", "text"),
    [
        (-1, ValueError, "recompute must be at least 0, got -1"),
        (1.5, TypeError, "recompute must be a number of products, got 1.5"),
        (True, TypeError, "recompute must be a number of products, got True"),
    ],
)
def test_a_wrong_number_of_products_is_refused(recompute, error, text):
    model, _, _ = quantized("chain", bs.recipes.lsq(4))
    with pytest.raises(error, match=text):
        bs.fuse(model, recompute=recompute)


def test_training_in_integers_repeats_nothing():
    model = bs.integer_(networks("chain"), torch.randn(2, 3, 8, 8)).train()
    with pytest.raises(ValueError, match="recompute=160 is for models after quantize_"):
        bs.fuse(model, recompute=160)


def test_a_fused_network_is_copied_and_pickled_between_steps():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)
    fused = bs.fuse(bs.integer_(bs.zoo.create("resnet20", width=4), x).train())
    fused(x).square().sum().backward()
    twins = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    for network in (fused, *twins):
        network.zero_grad()
        network(x).square().sum().backward()
    for twin in twins:
        for own, other in zip(fused.parameters(), twin.parameters(), strict=True):
            assert own is not other
            assert torch.equal(own.grad, other.grad)
