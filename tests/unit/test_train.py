"""The training loop: exact resume, its files, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.data import ArrayDataset, Loader, RandomCrop
from bitstrata.train import CheckpointError, TrainConfig, Trainer, evaluate
from bitstrata.train.metrics import read, reproducible

CONFIG = TrainConfig(
    epochs=3, lr=0.05, batch_size=8, warmup=0.5, checkpoint_every=2, log_every=2, clip_grad=5.0, label_smoothing=0.1
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dataset(count: int = 40, seed: int = 0) -> ArrayDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 90, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images += (labels * 80).to(torch.uint8).view(-1, 1, 1, 1)
    return ArrayDataset(images=images, labels=labels, classes=("a", "b", "c"), mean=(0.5,), std=(0.25,), split="train")


def loader(train: bool = True) -> Loader:
    return Loader(dataset(), 8, train=train, transform=RandomCrop(6, 1) if train else None, seed=3)


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def quantized(seed: int = 1) -> nn.Module:
    model = network(seed)
    batch = loader().batch(0, 0)[0]
    bs.quantize_(model, bs.recipes.strata(w=(1, 3)), batch, input=bs.Pixels((0.5,), (0.25,)))
    bs.calibrate_(model, [batch])
    return model


class InterruptError(Exception):
    pass


def interrupted(model: nn.Module, config: TrainConfig, out: Path, at: int) -> None:
    """Train until `at` steps are done, then fail in the middle of the next one."""
    trainer = Trainer(model, config, loader(), loader(False), out)
    objective = trainer.objective

    def failing(model: nn.Module, inputs: Tensor, targets: Tensor):
        if trainer.position.step == at:
            raise InterruptError
        return objective(model, inputs, targets)

    trainer.objective = failing
    with pytest.raises(InterruptError):
        trainer.fit()


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def untimed(path: Path) -> list[dict]:
    return reproducible(read(path))


@pytest.mark.parametrize("make", [network, quantized])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("at", [7, 10, 1])
def test_interrupted_run_ends_in_the_same_bits(make, optimizer, at, tmp_path):
    config = TrainConfig(**{**CONFIG.to_dict(), "optimizer": optimizer, "lr": 0.01})
    whole = make()
    expected = Trainer(whole, config, loader(), loader(False), tmp_path / "whole").fit()
    interrupted(make(), config, tmp_path / "cut", at)
    resumed = make(seed=9)  # other initial weights: everything must come from the checkpoint
    if at == 1:
        resumed = make()  # no checkpoint yet, the run starts over
    assert Trainer(resumed, config, loader(), loader(False), tmp_path / "cut").fit() == expected
    assert_same_weights(whole, resumed)
    assert untimed(tmp_path / "cut" / "metrics.jsonl") == untimed(tmp_path / "whole" / "metrics.jsonl")


def test_plain_iterables_of_batches_resume_too(tmp_path):
    def plain() -> torch.utils.data.DataLoader:
        data = dataset()
        inputs = (data.images.float() / 255 - 0.5) / 0.25
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(inputs, data.labels), batch_size=8, shuffle=True
        )

    whole, resumed = network(), network()
    Trainer(whole, CONFIG, plain()).fit()
    trainer = Trainer(network(), CONFIG, plain(), out_dir=tmp_path)
    objective = trainer.objective

    def failing(model: nn.Module, inputs: Tensor, targets: Tensor):
        if trainer.position.step == 7:
            raise InterruptError
        return objective(model, inputs, targets)

    trainer.objective = failing
    with pytest.raises(InterruptError):
        trainer.fit()
    Trainer(resumed, CONFIG, plain(), out_dir=tmp_path).fit()
    assert_same_weights(whole, resumed)


def test_finished_run_is_not_repeated(tmp_path):
    first = network()
    expected = Trainer(first, CONFIG, loader(), loader(False), tmp_path).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = network(5)
    assert Trainer(again, CONFIG, loader(), loader(False), tmp_path).fit() == expected
    assert_same_weights(first, again)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_false_starts_over(tmp_path):
    Trainer(network(5), CONFIG, loader(), out_dir=tmp_path).fit()
    again, fresh = network(), network()
    Trainer(again, CONFIG, loader(), out_dir=tmp_path).fit(resume=False)
    Trainer(fresh, CONFIG, loader()).fit()
    assert_same_weights(again, fresh)
    steps = [event["step"] for event in read(tmp_path / "metrics.jsonl") if event["event"] == "step"]
    assert steps == [2, 4, 6, 8, 10, 12, 14]


def test_resume_with_another_configuration_is_an_error(tmp_path):
    Trainer(network(), CONFIG, loader(), out_dir=tmp_path).fit()
    other = TrainConfig(**{**CONFIG.to_dict(), "lr": 0.1, "log_every": 7})
    with pytest.raises(CheckpointError, match=r"another run \(lr: 0\.05 saved, 0\.1 now\)"):
        Trainer(network(), other, loader(), out_dir=tmp_path).fit()


def test_resume_with_another_network_is_an_error(tmp_path):
    Trainer(network(), CONFIG, loader(), out_dir=tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"precisions: \[\] saved, \[1, 3\] now; recipe: .*; network: \d+ en"):
        Trainer(quantized(), CONFIG, loader(), out_dir=tmp_path).fit()


def test_files_may_be_written_more_or_less_often_on_resume(tmp_path):
    interrupted(network(), CONFIG, tmp_path, 7)
    other = TrainConfig(**{**CONFIG.to_dict(), "checkpoint_every": 0, "log_every": 1})
    whole, resumed = network(), network()
    Trainer(whole, CONFIG, loader()).fit()
    Trainer(resumed, other, loader(), out_dir=tmp_path).fit()
    assert_same_weights(whole, resumed)


def test_training_learns_and_evaluates_every_precision():
    model = quantized()
    config = TrainConfig(epochs=12, lr=0.05, batch_size=8, eval_every=0)
    accuracy = Trainer(model, config, loader(), loader(False)).fit()
    assert accuracy.keys() == {1, 3}
    assert min(accuracy.values()) > 0.8


def test_evaluate_counts_by_hand_and_restores_mode_and_precision():
    model = quantized().train()
    bs.set_precision(model, 3)
    found = evaluate(model, loader(False).epoch(0))
    assert model.training
    assert all(layer.precision == 3 for layer in model.modules() if hasattr(layer, "weight_quant"))
    model.eval()
    for bits in (1, 3):
        with bs.precision(model, bits), torch.no_grad():
            correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader(False).epoch(0))
        assert found[bits] == correct / 40
    with pytest.raises(ValueError, match="no batches"):
        evaluate(model, [])


def test_float_objective_is_plain_cross_entropy_with_smoothing():
    model, config = network().eval(), CONFIG
    images, labels = loader(False).batch(0, 0)
    result = Trainer(model, config, loader()).objective(model, images, labels)["float"]
    log = torch.log_softmax(model(images), 1)
    smooth = torch.full((8, 3), 0.1 / 3)
    smooth[torch.arange(8), labels] += 0.9
    torch.testing.assert_close(result.loss, -(smooth * log).sum(1).mean().detach())


def test_own_objective_replaces_the_default():
    calls = []

    def objective(model: nn.Module, inputs: Tensor, targets: Tensor):
        calls.append(len(targets))
        logits = model(inputs)
        loss = logits.square().mean()
        loss.backward()
        return {"float": type("Loss", (), {"loss": loss.detach(), "logits": logits})}

    Trainer(network(), TrainConfig(epochs=1, batch_size=8), loader(), objective=objective).fit()
    assert calls == [8] * 5


def test_loss_that_is_not_finite_stops_before_the_step():
    model = network()
    with torch.no_grad():
        model[-1].bias.fill_(float("nan"))
    before = model[0].weight.clone()
    with pytest.raises(FloatingPointError, match=r"step 0: .*: the bias of layer '8' is not finite; lower lr=0\.05"):
        Trainer(model, CONFIG, loader()).fit()
    assert torch.equal(model[0].weight, before)


def test_loader_that_breaks_its_promise_is_named():
    class Short(Loader):
        def __len__(self) -> int:
            return 6

    short = Short(dataset(), 8, train=False, prefetch=False)
    batches = [short.batch(0, step) for step in range(5)]
    short.epoch = lambda epoch, start_step=0: iter(batches[start_step:])  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"epoch 0 gave 5 batches, len\(loader\) says 6"):
        Trainer(network(), CONFIG, short).fit()


def test_missing_pieces_are_errors():
    with pytest.raises(ValueError, match="without an eval_loader"):
        Trainer(network(), CONFIG, loader()).evaluate()
    with pytest.raises(TypeError, match="needs a length, generator has none"):
        Trainer(network(), CONFIG, (b for b in ()))
    with pytest.raises(ValueError, match="no batches"):
        Trainer(network(), CONFIG, [])


def test_metrics_are_json_lines_with_every_precision(tmp_path):
    Trainer(quantized(), CONFIG, loader(), loader(False), tmp_path, name="joint").fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"joint"}
    kinds = [line["event"] for line in lines]
    assert (kinds.count("step"), kinds.count("epoch"), kinds.count("eval")) == (7, 3, 3)
    assert all(set(line["loss"]) == {"1", "3"} for line in lines if line["event"] == "step")
    assert all(set(line["accuracy"]) == {"1", "3"} for line in lines if line["event"] == "eval")


def test_bf16_and_channels_last_train():
    config = TrainConfig(epochs=1, batch_size=8, amp="bf16", channels_last=True)
    for model in (network(), quantized()):
        assert all(0 <= value <= 1 for value in Trainer(model, config, loader(), loader(False)).fit().values())


def fusable(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    batch = loader().batch(0, 0)[0]
    bs.quantize_(model, bs.recipes.strata(w=(1, 3)), batch, input=bs.Pixels((0.5,), (0.25,)))
    bs.calibrate_(model, [batch])
    return model


def test_fused_steps_are_those_of_the_fused_network_and_resume_in_the_same_bits(tmp_path):
    config = TrainConfig(**{**CONFIG.to_dict(), "fused": True})
    whole, plain, by_hand, resumed = fusable(), fusable(), fusable(), fusable(9)
    trainer = Trainer(whole, config, loader(), loader(False), tmp_path / "whole")
    assert isinstance(trainer.wrapped, bs.FusedNetwork)
    accuracy = trainer.fit()
    Trainer(plain, CONFIG, loader(), loader(False)).fit()
    Trainer(bs.fuse(by_hand), CONFIG, loader(), loader(False)).fit()
    assert_same_weights(whole, by_hand)
    for key, value in plain.state_dict().items():  # sums in another order, nothing else
        if isinstance(value, Tensor):
            assert torch.allclose(whole.state_dict()[key].double(), value.double(), atol=1e-3), key
    interrupted(fusable(), config, tmp_path / "cut", 7)
    assert Trainer(resumed, config, loader(), loader(False), tmp_path / "cut").fit() == accuracy
    assert_same_weights(whole, resumed)


def test_fused_training_without_anything_to_fuse_is_an_error():
    config = TrainConfig(**{**CONFIG.to_dict(), "fused": True})
    for model in (network(), quantized()):  # one is float, the other's convolutions have biases
        with pytest.raises(bs.FuseError):
            Trainer(model, config, loader())
