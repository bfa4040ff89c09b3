"""Models wrapped for distributed training, and synchronization in a run of one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata import recipes
from bitstrata.lowering.errors import LowerError
from bitstrata.nn.batch_norm import JoinedBatchNorm2d
from bitstrata.objectives.ranks import Ranks, _buckets
from bitstrata.prepare import synchronized
from bitstrata.prepare.precision import precision_map
from bitstrata.train import TrainConfig, Trainer
from bitstrata.train.distributed import Distributed, first_process, launched


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def x(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized() -> nn.Module:
    return bs.calibrate_(bs.quantize_(network(), recipes.strata((1, 2)), x()), [x()])


class FullyShardedDataParallel(nn.Sequential):
    """Known by its name."""


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("quantize_", lambda model: bs.quantize_(model, recipes.strata((1, 2)), x())),
        ("float_form_", lambda model: bs.float_form_(model, recipes.maqd(), x())),
        ("integer_", lambda model: bs.integer_(model, x())),
    ],
)
def test_preparing_comes_before_wrapping(what: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"{what}: the model is wrapped in DataParallel, .* call {what} first"):
        call(nn.DataParallel(network()))
    with pytest.raises(ValueError, match=f"{what}: '0' is wrapped in DataParallel"):
        call(nn.Sequential(nn.DataParallel(network())))
    with pytest.raises(ValueError, match=rf"{what}: the model's parameters are sharded over ranks \(FSDP\)"):
        call(FullyShardedDataParallel(network()))


def test_sharded_models_are_refused() -> None:
    model = FullyShardedDataParallel(quantized())
    for call in (lambda: bs.calibrate_(model, [x()]), lambda: bs.freeze_(model, [x()])):
        with pytest.raises(ValueError, match="sharded over ranks"):
            call()
    with pytest.raises(LowerError, match="lower: the parameters are sharded over ranks"):
        bs.lower(model, x())


def test_the_trainer_takes_the_network_itself() -> None:
    batches, config = [(x(), torch.zeros(2, dtype=torch.int64))], TrainConfig(epochs=1, lr=0.1, batch_size=2)
    with pytest.raises(ValueError, match=r"Trainer: the model is wrapped in DataParallel, .* inside, model\.module"):
        Trainer(nn.DataParallel(quantized()), config, batches)
    with pytest.raises(ValueError, match=r"Trainer: the model's parameters are sharded .* docs/distributed\.md shows"):
        Trainer(FullyShardedDataParallel(quantized()), config, batches)


def test_wrappers_are_looked_through() -> None:
    model = quantized()
    wrapped = nn.DataParallel(model)
    assert precision_map(wrapped) == precision_map(model)
    bs.set_precision(wrapped, {"0": 1})
    assert precision_map(model)["0"] == 1
    assert bs.precisions(wrapped) == (1, 2)
    assert str(bs.summary(wrapped)) == str(bs.summary(model))
    assert bs.calibrate_(wrapped, [x()]) is wrapped
    assert bs.reestimate_batchnorm_(wrapped, [x()]) is wrapped
    model.eval()
    program = bs.lower(wrapped, x())
    assert program.layers.keys() == bs.lower(model, x()).layers.keys()
    assert bs.verify(wrapped, program, x()).ok
    labels = torch.tensor([0, 1, 2])
    assert bs.train.evaluate(wrapped, [(x(), labels)]) == bs.train.evaluate(model, [(x(), labels)])


def test_one_rank_synchronized_is_as_before() -> None:
    plain, joined = quantized(), quantized()
    assert bs.synchronize_(joined) is joined
    assert sum(isinstance(m, JoinedBatchNorm2d) for m in joined.modules()) == 2
    for model in (plain, joined):
        bs.joint_backward(model, x(), torch.tensor([0, 1, 2]))
    for (name, p), (other, q) in zip(plain.named_parameters(), joined.named_parameters(), strict=True):
        assert name == other
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    assert plain.state_dict().keys() == joined.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), joined.state_dict().values(), strict=True)
    )
    assert bs.verify(joined.eval(), bs.lower(joined, x()), x()).ok
    bs.synchronize_(joined, False)
    assert [type(m) for m in joined.modules()] == [type(m) for m in plain.modules()]


def test_synchronization_ends_with_its_block() -> None:
    model = nn.Sequential(quantized(), bs.nn.LayerBatchNorm2d(3, sync=True), bs.nn.LayerBatchNorm2d(3))
    types, flags = [type(m) for m in model.modules()], [getattr(m, "sync", None) for m in model.modules()]
    inside = []

    def failing() -> None:
        with synchronized(model):
            inside.extend(m.sync for m in model.modules() if hasattr(m, "sync"))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert all(inside)
    assert len(inside) > 2
    assert [type(m) for m in model.modules()] == types
    assert [getattr(m, "sync", None) for m in model.modules()] == flags


def test_l1_normalizations_stay_alone() -> None:
    with pytest.warns(UserWarning, match="1 L1 batch normalizations, the first is '0', keep the statistics"):
        bs.synchronize_(nn.Sequential(bs.nn.L1BatchNorm2d(4)))


def test_unequal_shares_weigh_as_much_as_their_samples() -> None:
    shares = [Ranks(nn.Identity(), samples=n, joined=10, world=2) for n in (6, 4)]
    losses = torch.tensor([1.5, -2.0])
    mean = sum(s.share(loss) for s, loss in zip(shares, losses, strict=True)) / 2
    torch.testing.assert_close(mean, (6 * losses[0] + 4 * losses[1]) / 10)


def test_buckets_hold_all_and_mix_no_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitstrata.objectives.ranks.BUCKET", 100)
    tensors = [torch.zeros(n, dtype=d) for n in (3, 30, 1) for d in (torch.float32, torch.float64)]
    found = list(_buckets(tensors))
    assert sorted(id(t) for bucket in found for t in bucket) == sorted(map(id, tensors))
    assert all(len({t.dtype for t in bucket}) == 1 for bucket in found)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("environment", "size", "first"),
    [
        ({}, 1, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1, True),
        ({"WORLD_SIZE": "4", "RANK": "0"}, 4, True),
        ({"WORLD_SIZE": "4", "RANK": "3"}, 4, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 2, False),
    ],
)
def test_launched_processes(environment: dict[str, str], size: int, first: bool, monkeypatch: Any) -> None:
    for name in ("WORLD_SIZE", "RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == size
    assert first_process() is first


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'2 processes were launched.*pip install "bitstrata\[distributed\]"'):
        Distributed()


def accelerator(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "distributed_type": SimpleNamespace(value="MULTI_CPU"),
        "gradient_accumulation_steps": 1,
        "mixed_precision": "no",
        "process_index": 1,
        "num_processes": 2,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed_type": SimpleNamespace(value="FSDP")}, "accelerate runs with FSDP, and the Trainer with whole"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4 is void here"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' is not supported"),
    ],
)
def test_accelerators_that_do_something_else(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distributed(accelerator(**changes))


def test_loaders_that_cannot_be_shared_out() -> None:
    ranks = Distributed(accelerator())
    with pytest.raises(TypeError, match=r"on 2 ranks the train_loader has to be .* got list"):
        ranks.share([(x(), torch.zeros(3))], 0)
    batches = list(range(5))
    assert list(ranks.every(batches)) == [1, 3]
    assert ranks.seed(5) != 5
    assert not ranks.is_first


def test_ranks_round_by_streams_of_their_own() -> None:
    from bitstrata.prepare import noise_state

    model = bs.integer_(network(), x(), seed=3)
    before = noise_state(model)
    Distributed().own_noise_(model)
    assert noise_state(model) == before
    Distributed(accelerator()).own_noise_(model)
    after = noise_state(model)
    assert all(after[name]["seed"] != s["seed"] and after[name]["stream"] == s["stream"] for name, s in before.items())
