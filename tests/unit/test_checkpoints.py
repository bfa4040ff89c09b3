"""Checkpoint files: damage is found, the last good one is never lost, and only the same run goes on, to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.train import CheckpointError, TrainConfig, Trainer, checkpoint, state
from bitstrata.train.keeper import Keeper
from bitstrata.train.metrics import read

CONFIG = TrainConfig(epochs=3, lr=0.02, batch_size=8, log_every=1, checkpoint_every=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Batches(list):
    """Batches in an order drawn anew each epoch from torch's generator, as a DataLoader does."""

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in torch.randperm(len(self)))


def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 3
    x = torch.randn(24, 6, generator=generator) + y.view(-1, 1).float() - 1
    return Batches((x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8))


def network(**recipe: Any) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    bs.quantize_(model, bs.recipes.strata(w=(1, 2), **recipe), batches()[0][0])
    torch.manual_seed(1)
    return bs.calibrate_(model, [batches()[0][0]])


def trainer(out: Path | None, config: TrainConfig = CONFIG, model: nn.Module | None = None) -> Trainer:
    return Trainer(model or network(), config, batches(), batches(), out)


class InterruptError(Exception):
    pass


def interrupted(out: Path, at: int, config: TrainConfig = CONFIG) -> None:
    """Train until `at` steps are done."""
    run = trainer(out, config)
    objective = run.objective

    def failing(*given: Any) -> Any:
        if run.position.step == at:
            raise InterruptError
        return objective(*given)

    run.objective = failing
    with pytest.raises(InterruptError):
        run.fit()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def whole() -> dict[str, Tensor]:
    """Final weights of a run without interruption."""
    run = trainer(None)
    run.fit()
    return weights(run.model)


# ---- the file


def content() -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {
        "weights": {"a.b": shared, "view": shared[2:], "empty": torch.empty(0, 3), "one": torch.tensor(True)},
        "nhwc": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "keyed": {1: 0.1, "float": float("inf"), 2: (1, [None, True, "x", {}])},
        "$dollar": {"$tensor": "no tensor"},
        "number": 2**70,
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_everything_comes_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.ckpt", content())
    expected = {**content(), "format": 2}
    torch.manual_seed(0)
    found = checkpoint.load(tmp_path / "x.ckpt")
    expected["nhwc"] = found["nhwc"]  # random; its strides:
    assert found["nhwc"].is_contiguous(memory_format=torch.channels_last)
    assert same(found, expected)


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint: a\.0\.b is a set, which a checkpoint cannot hold"):
        checkpoint.save(tmp_path / "x.ckpt", {"a": [{"b": {1}}]})
    assert list(tmp_path.iterdir()) == []


def test_any_safetensors_library_reads_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint.save(tmp_path / "x.ckpt", {"model": {"conv.weight": torch.arange(4.0)}})
    assert torch.equal(load_file(tmp_path / "x.ckpt")["model.conv.weight"], torch.arange(4.0))


def test_no_altered_bit_and_no_torn_file_is_taken_for_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    checkpoint.save(path, {"weight": torch.arange(16.0), "step": 7, "rng": [1, 2.5]})
    data, expected = path.read_bytes(), checkpoint.load(path)
    for place in range(0, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            assert same(checkpoint.load(path), expected)  # padding, names of formats
        except CheckpointError as error:
            assert "x.ckpt" in str(error)  # noqa: PT017 - both outcomes are right
    unprotected = data.find(b'"F32"')
    path.write_bytes(data.replace(b'"F32"', b'"I32"'))
    assert unprotected > 0
    with pytest.raises(CheckpointError, match="does not have the SHA-256 it states"):
        checkpoint.load(path)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.ckpt: not readable"):
            checkpoint.load(path)


def test_files_that_torch_wrote_are_read_and_not_continued(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    old = {"format": 1, "model": run.model.state_dict(), "config": CONFIG.to_dict(), "metrics": 0}
    torch.save(old, tmp_path / "train.ckpt")
    assert_same(checkpoint.load(tmp_path / "train.ckpt")["model"], weights(run.model))
    with pytest.raises(CheckpointError, match=r"train\.ckpt: format 1 does not hold all that an exact continuation"):
        run.fit()


# ---- several of them


def steps_of(folder: Path) -> dict[str, int]:
    return {file.name: checkpoint.load(file)["step"] for file in sorted(folder.iterdir())}


def test_the_last_ones_and_the_best_one_are_kept(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, "joint", 3)
    for step in range(1, 7):
        keeper.save({"step": step}, best=step == 2)
    assert steps_of(tmp_path) == {"joint.1.ckpt": 5, "joint.2.ckpt": 4, "joint.best.ckpt": 2, "joint.ckpt": 6}
    Keeper(tmp_path, "joint", 1).save({"step": 7})
    assert steps_of(tmp_path) == {"joint.best.ckpt": 2, "joint.ckpt": 7}
    (tmp_path / "joint.mine.ckpt").write_bytes((tmp_path / "joint.ckpt").read_bytes())
    keeper.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["joint.mine.ckpt"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_crash_at_any_call_leaves_the_last_or_the_new_one(
    tmp_path: Path, monkeypatch, links: bool, keep: int
) -> None:
    """Each call that changes files fails in its turn, as in a crash: nothing after it happens."""

    def crash_at(number: int) -> int:
        made = 0

        def counted(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made >= number:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return call

        def no_links(*_: Any) -> None:
            raise PermissionError("no links here")

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", counted(os.link) if links else no_links)
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                keeper.save({"step": 5}, best=True)
            except KeyboardInterrupt:
                return -1
            return made

    for number in range(1, 40):
        folder = tmp_path / str(number)
        keeper = Keeper(folder, "x", keep)
        for step in range(1, 5):
            keeper.save({"step": step}, best=step == 3)
        ended = crash_at(number)
        found = Keeper(folder, "x", keep).load()
        assert found is not None
        assert found[0]["step"] == 5 if ended > 0 else found[0]["step"] in (4, 5)
        assert checkpoint.load(keeper.best)["step"] in (3, 5)
        keeper.save({"step": 6})
        assert Keeper(folder, "x", keep).load()[0]["step"] == 6  # type: ignore[index]
        if ended > 0:
            return
    pytest.fail("a save makes fewer calls than that")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5:] = b"\xff\xfe\xfd\xfc\xfb"
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_the_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    interrupted(tmp_path, 8)
    assert checkpoint.load(tmp_path / "train.ckpt")["position"]["step"] == 8
    assert checkpoint.load(tmp_path / "train.1.ckpt")["position"]["step"] == 6
    damage(tmp_path / "train.ckpt")
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"train\.ckpt: torn or altered.* Continuing from .*train\.1\.ckpt") as caught:
        run.fit()
    assert len(caught) == 1
    assert_same(weights(run.model), whole())
    steps = [event["step"] for event in read(tmp_path / "metrics.jsonl") if event["event"] == "step"]
    assert steps == list(range(1, 10))
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "train.ckpt.damaged")


def test_without_a_whole_checkpoint_nothing_starts_over_silently(tmp_path: Path) -> None:
    interrupted(tmp_path, 8)
    damage(tmp_path / "train.ckpt")
    damage(tmp_path / "train.1.ckpt")
    damage(tmp_path / "train.best.ckpt")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint of 'train' is left: .*train\.ckpt: .*train\.1\.ckpt: "
    ):
        trainer(tmp_path).fit()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    trainer(tmp_path).fit(resume=False)
    assert not list(tmp_path.glob("*.damaged"))


def test_the_best_one_has_the_best_evaluation(tmp_path: Path) -> None:
    run = trainer(tmp_path, TrainConfig(**{**CONFIG.to_dict(), "best": 2}))
    accuracies = iter([{1: 0.9, 2: 0.5}, {1: 0.1, 2: 0.7}, {1: 0.8, 2: 0.6}])
    run._evaluation = lambda *_: next(accuracies)  # type: ignore[method-assign]
    run.fit()
    saved = checkpoint.load(tmp_path / "train.best.ckpt")
    assert (saved["position"]["step"], saved["position"]["best"]) == (6, 0.7)
    with pytest.raises(ValueError, match=r"best=5, but the evaluation has 1, 2"):
        trainer(None, TrainConfig(**{**CONFIG.to_dict(), "best": 5})).fit()


# ---- a file system that refuses

REFUSED = """
    import resource, subprocess, sys
    from pathlib import Path
    import torch
    from bitstrata.train import CheckpointError
    from bitstrata.train.keeper import Keeper

    def attempt(folder):
        try:
            Keeper(folder, "x", 2).save({"step": 3, "weight": torch.zeros(100_000)}, best=True)
        except CheckpointError as error:
            print(error)
        print([file.name for file in sorted(folder.iterdir())], Keeper(folder, "x", 2).load()[0]["step"])

    for kind, folder in zip(("size", "space", "right"), map(Path, sys.argv[1:])):
        for step in (1, 2):
            Keeper(folder, "x", 2).save({"step": step, "weight": torch.arange(500.0)})
        if kind == "right":
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if kind == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        attempt(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
"""
CAUSES = ("File too large", "No space left on device", "Read-only file system")
MOUNT = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_file_system_that_refuses_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on files, a file system of 64 KiB, one without the right to write: in one process, for its imports."""
    folders = [tmp_path / name for name in ("limited", "small", "fixed")]
    for folder in folders:
        folder.mkdir()
    mounts = " && ".join(f"mount -t tmpfs -o size=64k none {folder}" for folder in folders[1:])
    may_mount = bool(shutil.which("unshare")) and run([*MOUNT, mounts]).returncode == 0
    folders = folders if may_mount else folders[:1]
    namespace = [*MOUNT, f'{mounts} && exec "$0" "$@"'] if may_mount else []
    done = run([*namespace, sys.executable, "-c", textwrap.dedent(REFUSED), *map(str, folders)])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for folder, cause, message, left in zip(folders, CAUSES[: len(folders)], lines[::2], lines[1::2], strict=True):
        assert message.startswith(f"checkpoint {folder}/x.ckpt: cannot be written ({cause}); checkpoints that were")
        assert left == "['x.1.ckpt', 'x.ckpt'] 2"
    if not may_mount:
        pytest.skip("full and read-only disks: need the right to mount in a namespace of its own (unshare)")


# ---- the same run


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("at", [3, 5, 6, 7])
def test_a_run_continued_anywhere_ends_in_the_same_bits(tmp_path: Path, every: int, at: int) -> None:
    """Batches in a drawn order, dropout, checkpoints inside epochs and at their ends."""
    config = TrainConfig(**{**CONFIG.to_dict(), "checkpoint_every": every})
    interrupted(tmp_path, at, config)
    run = trainer(tmp_path, config)
    accuracy = run.fit()
    assert_same(weights(run.model), whole())
    assert accuracy == run.evaluate()
    events = read(tmp_path / "metrics.jsonl")
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 10))
    for kind in ("epoch", "eval"):
        assert [event["epoch"] for event in events if event["event"] == kind] == [0, 1, 2]


def test_a_finished_run_leaves_the_random_numbers_that_it_ended_with(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    expected = torch.rand(3)
    torch.manual_seed(77)
    trainer(tmp_path).fit()
    assert torch.equal(torch.rand(3), expected)


def test_buffers_that_the_state_dict_leaves_out_come_back(tmp_path: Path) -> None:
    def with_buffer(value: float) -> nn.Module:
        model = network()
        model[0].register_buffer("hidden", torch.tensor([value]), persistent=False)
        return model

    trainer(tmp_path, model=with_buffer(3.5)).fit()
    again = with_buffer(0.0)
    trainer(tmp_path, model=again).fit()
    assert again[0].hidden.item() == 3.5


def test_another_recipe_of_the_same_shapes_is_named(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    before = (tmp_path / "train.ckpt").read_bytes()
    other = network()
    other[4].weight_quant.init = "minmax"
    with pytest.raises(
        CheckpointError, match=r"recipe: 1 modules differ, the first is '4\.weight_quant': init: 'lsq' saved, 'mi"
    ):
        trainer(tmp_path, model=other).fit()
    assert (tmp_path / "train.ckpt").read_bytes() == before


def test_other_data_are_named(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"steps an epoch: 3 saved, 2 now"):
        Trainer(network(), CONFIG, Batches(batches()[:2]), batches(), tmp_path).fit()


def test_other_conditions_are_refused_unless_they_are_accepted(tmp_path: Path, monkeypatch) -> None:
    interrupted(tmp_path, 7)
    saved = checkpoint.load(tmp_path / "train.ckpt")["execution"]
    assert saved.keys() >= {"threads", "torch's instruction set", "bitstrata's instruction set", "torch", "numpy"}
    monkeypatch.setenv("BITSTRATA_ISA", "generic")
    monkeypatch.setattr(state, "execution", lambda device: {**saved, "threads": "3", "torch": "1.0"})
    with pytest.raises(
        CheckpointError, match=r"other conditions \(threads: 1 saved, 3 now; torch: .* saved, 1\.0 now\)"
    ):
        trainer(tmp_path).fit()
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"threads: 1 saved, 3 now.*will not be the same to the bit"):
        run.fit(allow_inexact=True)
    assert_same(weights(run.model), whole())  # the conditions were the same in truth


def test_the_instruction_set_and_the_threads_are_recorded(tmp_path: Path, monkeypatch) -> None:
    interrupted(tmp_path, 7)
    monkeypatch.setenv("BITSTRATA_ISA", "generic")
    torch.set_num_threads(2)
    pattern = r"\(bitstrata's instruction set: \w+ saved, generic now; threads: 1 saved, 2 now\).*--allow-inexact"
    with pytest.raises(CheckpointError, match=pattern):
        trainer(tmp_path).fit()
