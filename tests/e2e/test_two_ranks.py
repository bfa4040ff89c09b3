"""Two ranks with shares of a batch do what one does with the joined batch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from helpers_ranks import start  # noqa: E402
from helpers_two_ranks import COMMAND, RECIPES, everything, run  # noqa: E402

from bitstrata.train.metrics import read  # noqa: E402

# Sums in float64, of shares first: they differ from those of the joined batch by rounding alone.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    start(run, 2, str(folder), 0)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return everything(0, 1, folder)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", RECIPES)
def test_steps_equal_those_on_the_joined_batch(kind: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone[kind]
    for found in ranks:
        for state, wanted in zip(found[kind]["states"], expected["states"], strict=True):
            close(state, wanted)
        assert found[kind]["alphas"] == pytest.approx(expected["alphas"], abs=TOLERANCE)
    first, *_, last = expected["states"]
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert any(name.endswith("weight") for name in moved)
    assert any("running_mean" in name for name in moved)
    assert kind == "maqd" or any(".steps." in name for name in moved)


def test_gradients_accumulate(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for found in ranks:
        close(found["accumulated"], alone["accumulated"])


def test_sharded_parameters_get_the_same_gradients(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for found in ranks:
        close(found["sharded"]["gradients"], alone["sharded"]["gradients"])
    close(ranks[0]["sharded"]["state"], alone["sharded"]["state"])
    assert ranks[1]["sharded"]["state"] == {}


def test_the_trainer_refuses_a_sharded_network_and_says_what_to_do(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["sharded"]["refusal"].startswith("Trainer: the model's parameters are sharded over ranks (FSDP), ")
        assert "in a loop of your own with joint_backward" in found["sharded"]["refusal"]


def test_the_trainer_trains_as_one(ranks: list[dict[str, Any]], alone: dict[str, Any], folder: Path) -> None:
    expected = alone["trained"]
    for found in ranks:
        close(found["trained"]["state"], expected["state"])
        assert found["trained"]["accuracy"] == expected["accuracy"]
        assert found["trained"]["types"] == expected["types"]  # nothing stays synchronized
    logs = [(folder / f"whole{world}" / "metrics.jsonl").read_text().splitlines() for world in (1, 2)]
    for one, two in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert one["event"] == two["event"]
        for name in ("loss", "accuracy"):
            assert two.get(name, {}) == pytest.approx(one.get(name, {}), rel=TOLERANCE)


def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_repeats_every_bit(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in (*ranks, alone):
        assert found["trained"]["stopped"] == 3
        whole, resumed = found["trained"]["state"], found["trained"]["resumed"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_batch_normalization_of_the_joined_batch(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone["normalized"]
    for found in ranks:
        assert found["normalized"].keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-2 if name.startswith("bfloat16") else 1e-12 if name.startswith("double") else 1e-5
            torch.testing.assert_close(found["normalized"][name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_a_number_that_is_not_finite_on_one_rank_ends_the_run_on_all(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in (*ranks, alone):
        assert "step 1: the loss at precision 4 is nan" in found["not finite"]
    for found in (ranks[1], alone):
        assert "the batch itself holds values that are not finite" in found["not finite"]


def test_calibration_needs_as_many_batches_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for found, count in zip(ranks, (1, 2), strict=True):
        assert found["refused"] == (
            f"calibrate_: the number of batches on every rank must be the same, it is {count} here and goes from 1 to 2"
        )


def test_a_data_loader_is_dealt_out(ranks: list[dict[str, Any]]) -> None:
    for first, second in zip(ranks[0]["dealt"], ranks[1]["dealt"], strict=True):
        assert sorted(first + second) == list(range(12))
    for found in ranks:
        assert found["dealt"][0] == found["dealt"][2] != found["dealt"][1]


def test_the_command_trains_and_packs(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert [found["commanded"] for found in ranks] == [0, 0]
    epochs = [event for event in read(folder / "command" / "metrics.jsonl") if event["event"] == "epoch"]
    assert [(event["run"], event["step"]) for event in epochs] == [("float", 3), ("joint", 3)]  # 96 images by 2 x 16
    assert json.loads((folder / "command" / "results.json").read_text())["verify"]["ok"] is True


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers(launcher: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--master-port", str(port)],
        # without a GPU it passes --multi_gpu on to torchrun, and the processes find that there is none
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)],
    }[launcher]
    command = [sys.executable, "-m", launcher, *options, "-m", "bitstrata", *COMMAND.split(), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["verify"]["ok"] is True
    assert done.stdout.count("verified layer by layer: ok") == 1
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is complete") == 1
