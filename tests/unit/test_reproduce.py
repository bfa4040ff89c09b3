"""Tables of the papers: files to runs, runs to results."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitstrata import data, zoo
from bitstrata.data import ArrayDataset, Dataset
from bitstrata.reproduce import (
    ConfigError,
    MissingDataError,
    Queue,
    Record,
    RecordError,
    Table,
    collect,
    estimate,
    execute,
    load_table,
    tables,
    write_page,
    write_results,
)
from bitstrata.reproduce.config import SCALES, digest
from bitstrata.reproduce.execute import FolderLock, Run, trained
from bitstrata.reproduce.record import read_result
from bitstrata.train import checkpoint

COMMITTED = Path(__file__).parents[2] / "recipes"
BASE = """
title = "a table"
source = "nobody, table 1"
order = 1
seeds = [0, 1]
metrics = ["accuracy", "nonzero_weights", "nonzero_activations", "loss"]

[data]
name = "digits"
augment = true

[model]
name = "digits_cnn"

[float]
epochs = 2
lr = 0.05
batch_size = 64
threads = 1

[train]
epochs = 1
batch_size = 64
threads = 1

[scale.smoke]
data = { train_limit = 128, test_limit = 64 }
float = { epochs = 1 }

[scale.cpu]
data = { train_limit = 128, test_limit = 64 }
"""
ROWS = {
    "float": 'row = "float"\nrecipe = { name = "float" }\n',
    "lsq": 'row = "LSQ; 4 bits"\nrecipe = { name = "lsq", options = { bits = 4 } }\n',
    "strata": 'row = "strata"\nrecipe = { name = "strata", options = { w = [1, 2] } }\nseeds = [0]\n',
}
ENVIRONMENT = {"cpu": "a processor", "cores": 2, "commit": "0123456789abcdef"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of recipes with one table."""
    folder = tmp_path / "recipes" / "paper" / "table1"
    folder.mkdir(parents=True)
    (folder / "base.toml").write_text(BASE)
    for name, text in ROWS.items():
        (folder / f"{name}.toml").write_text(text)
    (folder / "paper.csv").write_text("row,metric,value,note\nLSQ; 4 bits,accuracy@4,90.5,elsewhere\n")
    return tmp_path / "recipes"


def test_every_committed_table_can_be_read_at_every_scale() -> None:
    known = tables(COMMITTED)
    assert {paper for paper, _ in known} == {"maqd", "sat", "uniq", "shiftquant", "vertical", "strata"}
    for paper, name in known:
        for scale in SCALES:
            table = load_table(COMMITTED, paper, name, scale)
            assert all(row.seeds for row in table.rows)
            theirs = {row for row, _ in _paper(table.folder)}
            assert theirs <= {row.name for row in table.rows}, f"{paper} {name}: paper.csv names other rows"


def test_committed_runs_are_those_that_their_names_say() -> None:
    """A recipe that has changed since is another run: remove the record, and run it again."""
    for file in sorted((COMMITTED / "record").glob("*.json")):
        found = read_result(file)
        assert found is not None
        assert digest(found["config"]) == file.stem, f"{file.name}: its recipe has changed"
        assert found["environment"]["cpu"]


def _paper(folder: Path) -> list[tuple[str, str]]:
    with (folder / "paper.csv").open(newline="") as file:
        return [(line["row"], line["metric"]) for line in csv.DictReader(file)]


def test_runs_are_made_once_and_results_say_which_seeds(root: Path, tmp_path: Path) -> None:
    table = load_table(root, "paper", "table1", "cpu")
    queue = Queue([table], None, tmp_path / "runs", environment=ENVIRONMENT)
    assert [job.seed for job in Queue([table], None, tmp_path / "runs", seeds=(1,)).jobs] == [1, 1]
    assert [(job.row.name, job.seed) for job in queue.jobs] == [
        ("float", 0), ("LSQ; 4 bits", 0), ("strata", 0), ("float", 1), ("LSQ; 4 bits", 1),
    ]  # fmt: skip
    made: list[str] = []
    queue.work(made.append)
    assert len(made) == 5
    assert queue.missing() == []
    Queue([table], None, tmp_path / "runs").work(made.append)
    assert len(made) == 5
    results = collect(table, tmp_path / "runs")
    by_key = {(r.row, r.metric): r for r in results}
    assert by_key["LSQ; 4 bits", "accuracy@4"].seeds == (0, 1)
    assert by_key["LSQ; 4 bits", "accuracy@4"].spread is not None
    assert by_key["strata", "accuracy@1"].spread is None
    assert by_key["strata", "nonzero_weights@1"].mean > 99  # the nested grid has no zero, those of the edges have
    assert 0 < by_key["LSQ; 4 bits", "nonzero_weights@4"].mean < 100
    assert 0 < by_key["float", "nonzero_activations"].mean < 100
    assert by_key["float", "accuracy"].epochs == 2
    write_results(table.folder / "results.csv", results)
    page = write_page(root, "paper").read_text()
    assert "| LSQ; 4 bits | accuracy@4 | 90.5 |" in page
    assert "0123456789ab" in (table.folder / "results.csv").read_text()
    assert (root / "paper" / "tables" / "table1.png").stat().st_size > 1000


def test_a_run_that_diverges_is_a_result_and_the_queue_goes_on(root: Path, tmp_path: Path) -> None:
    wild = 'row = "wild"\nrecipe = { name = "lsq", options = { bits = 4 } }\ntrain = { lr = 1e30 }\n'
    (root / "paper" / "table1" / "a-wild.toml").write_text(wild)
    table = load_table(root, "paper", "table1", "cpu")
    assert table.rows[0].name == "wild"
    made: list[str] = []
    Queue([table], None, tmp_path / "runs", seeds=(0,), environment=ENVIRONMENT).work(made.append)
    assert len(made) == 4
    assert "wild, seed 0: diverged: Trainer: " in made[0]
    results = collect(table, tmp_path / "runs")
    assert [(r.metric, r.mean, r.seeds) for r in results if r.row == "wild"] == [("diverged", 1.0, (0,))]
    assert not any(r.metric == "diverged" for r in results if r.row != "wild")
    write_results(table.folder / "results.csv", results)
    assert "| wild | diverged |  | 1.00 |" in write_page(root, "paper").read_text()
    Queue([table], None, tmp_path / "runs", seeds=(0,)).work(made.append)
    assert len(made) == 4


def test_recorded_runs_and_float_networks_are_not_made_again(root: Path, tmp_path: Path) -> None:
    table = load_table(root, "paper", "table1", "cpu")
    record = Record(root / "record")
    made: list[str] = []
    Queue([table], None, tmp_path / "here", record=record, seeds=(0,), environment=ENVIRONMENT).work(made.append)
    assert len(made) == 3
    assert len(list((root / "record").glob("*.json"))) == 3
    assert len(list((root / "record").glob("float-*.safetensors"))) == 1
    there = tmp_path / "there"  # as on another machine: nothing but the record
    assert Queue([table], None, there, record=record, seeds=(0,)).missing() == []
    assert collect(table, there, record) == collect(table, tmp_path / "here")
    job = next(job for job in Queue([table], None, there, seeds=(0,)).jobs if job.row.name == "LSQ; 4 bits")
    again = execute(job.config, None, there, record=Record(_without(record, digest(job.config), tmp_path)))
    assert not list(there.glob("float-*/*.ckpt"))  # the float network is the recorded one
    assert again == execute(job.config, None, tmp_path / "here")


def _without(record: Record, name: str, tmp_path: Path) -> Path:
    """A copy of a record without one result."""
    assert record.folder is not None
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in record.folder.iterdir():
        if file.stem != name:
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "not the result of a run"), ('{"config": {}, "metrics": {}}', "measured missing")],
)
def test_a_recorded_result_that_is_none_is_an_error(root: Path, tmp_path: Path, text: str, message: str) -> None:
    config = load_table(root, "paper", "table1", "smoke").rows[0].run(0)
    record = tmp_path / "record"
    record.mkdir()
    (record / f"{digest(config)}.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        execute(config, None, tmp_path / "runs", record=Record(record))


def test_a_recorded_float_network_of_another_kind_is_an_error(root: Path, tmp_path: Path) -> None:
    config = load_table(root, "paper", "table1", "smoke").rows[0].run(0)
    record = Record(tmp_path / "record")
    execute(config, None, tmp_path / "runs", record=record)
    for file in (tmp_path / "record").glob("*.json"):
        file.unlink()
    (network,) = (tmp_path / "record").glob("float-*.safetensors")
    network.write_bytes(network.read_bytes()[:-10])
    with pytest.raises(RecordError, match="not this run's float network"):
        execute(config, None, tmp_path / "elsewhere", record=record)


def test_rows_that_share_a_float_network_train_it_once(root: Path, tmp_path: Path) -> None:
    table = load_table(root, "paper", "table1", "smoke")
    for row in table.rows:
        execute(row.run(0), None, tmp_path / "runs")
    assert len(list((tmp_path / "runs").glob("float-*"))) == 1


def test_the_same_configuration_gives_the_same_weights(root: Path, tmp_path: Path) -> None:
    config = next(r for r in load_table(root, "paper", "table1", "smoke").rows if r.name == "strata").run(0)
    torch.set_num_threads(1)
    found = []
    for name in ("one", "two"):
        execute(config, None, tmp_path / name)
        state = checkpoint.load(tmp_path / name / digest(config) / "train.ckpt")["model"]
        found.append({key: value.numpy().tobytes() for key, value in state.items()})
    assert found[0] == found[1]


def test_a_run_that_another_has_in_hand_is_left_alone(root: Path, tmp_path: Path) -> None:
    queue = Queue([load_table(root, "paper", "table1", "smoke")], None, tmp_path / "runs")
    job = queue.jobs[0]
    folder = tmp_path / "runs" / digest(job.config)
    folder.mkdir(parents=True)
    made: list[str] = []
    with FolderLock(folder) as lock:
        assert lock.held
        assert not queue._try(job, made.append)
    assert made == []
    assert queue._try(job, made.append)
    assert len(made) == 1


@pytest.mark.soak
def test_two_processes_share_a_queue(root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "bitstrata.cli", "reproduce", "paper", "--scale", "smoke", "--recipes", str(root),
        "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    made = [line for text in texts for line in text.splitlines() if ", seed " in line]
    assert len(made) == 5
    assert len({line.partition(":")[2].partition(":")[0] for line in made}) == 5


def checkpoint_table(root: Path, state: dict[str, torch.Tensor], tmp_path: Path, row: str = ROWS["lsq"]) -> Table:
    """The table with one row that starts from a file."""
    folder = root / "paper" / "table2"
    folder.mkdir()
    save_file(state, tmp_path / "net.safetensors")
    digest_of_file = hashlib.sha256((tmp_path / "net.safetensors").read_bytes()).hexdigest()
    named = f'start = "checkpoint"\ncheckpoint = {{ file = "net.safetensors", sha256 = "{digest_of_file}" }}\n'
    (folder / "base.toml").write_text(named + BASE)
    (folder / "row.toml").write_text(row)
    return load_table(root, "paper", "table2", "smoke")


def few_digits(run: Run, split: str) -> Dataset:
    """In the place of Run.dataset: digits have no files, and refuse a root that is for the checkpoint alone."""
    found = data.load("digits", None, split)
    images, labels = found.batch(range(64))
    return ArrayDataset(
        images=images, labels=labels, classes=found.classes, mean=found.mean, std=found.std, split=split
    )


def test_a_run_starts_from_a_checkpoint(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "dataset", few_digits)
    state = zoo.create("digits_cnn", classes=10, in_channels=1).state_dict()
    row = 'row = "float"\nquantize = false\nrecipe = { name = "float" }\n'
    table = checkpoint_table(root, state, tmp_path, row)
    run = Run(table.rows[0].run(0), tmp_path, tmp_path / "runs")
    found = trained(run, run.dataset("train")).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert not list((tmp_path / "runs").glob("float-*"))
    (root / "paper" / "table2" / "row.toml").write_text(ROWS["lsq"])
    quantized = load_table(root, "paper", "table2", "smoke").rows[0]
    assert "accuracy@4" in execute(quantized.run(0), tmp_path, tmp_path / "runs")
    assert estimate(load_table(root, "paper", "table2", "smoke"), tmp_path)[0].float_seconds == 0


def test_checkpoints_that_are_not_what_the_table_names(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "dataset", few_digits)
    state = zoo.create("digits_cnn", classes=10, in_channels=1).state_dict()
    first = next(iter(state))
    less = {key: value for key, value in state.items() if key != first}
    config = checkpoint_table(root, less, tmp_path).rows[0].run(0)
    with pytest.raises(MissingDataError, match=f"does not fit the network: no {first}"):
        execute(config, tmp_path, tmp_path / "runs")
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(MissingDataError, match="its SHA-256 is"):
        execute(config, tmp_path, tmp_path / "runs")
    with pytest.raises(MissingDataError, match=r"net\.safetensors: no such file"):
        execute(config, tmp_path / "elsewhere", tmp_path / "runs")
    own_form = {**config, "recipe": {"name": "maqd", "options": {"m_w": 3, "m_a": 4}, "norm": ""}}
    with pytest.raises(MissingDataError, match="a float network of its own form"):
        execute(own_form, tmp_path, tmp_path / "runs")


def test_an_interrupted_run_goes_on(root: Path, tmp_path: Path) -> None:
    config = next(r for r in load_table(root, "paper", "table1", "smoke").rows if r.name == "LSQ; 4 bits").run(0)
    whole = execute(config, None, tmp_path / "whole")
    execute(config, None, tmp_path / "parts")
    result = tmp_path / "parts" / digest(config) / "result.json"
    assert json.loads(result.read_text())["config"]["seed"] == 0
    result.unlink()  # as if killed between training and measuring
    assert execute(config, None, tmp_path / "parts") == whole


def test_the_digest_forgets_what_decides_nothing(root: Path) -> None:
    config = load_table(root, "paper", "table1", "smoke").rows[0].run(0)
    quiet = {**config, "train": {**config["train"], "log_every": 7}, "metrics": ["loss"]}
    assert digest(quiet) == digest(config)
    assert digest({**config, "seed": 1}) != digest(config)


def test_an_option_at_its_default_is_the_same_run(root: Path) -> None:
    row = next(row for row in load_table(root, "paper", "table1", "smoke").rows if row.name == "LSQ; 4 bits")
    config = row.run(0)

    def changed(options: dict[str, Any], **train: object) -> str:
        recipe = {**config["recipe"], "options": {**config["recipe"]["options"], **options}}
        return digest({**config, "recipe": recipe, "train": {**config["train"], **train}})

    assert changed({"edges": "int8", "a": "same"}, label_smoothing=0.0) == digest(config)
    assert changed({"edges": "inner"}) != digest(config)
    assert changed({}, label_smoothing=0.1) != digest(config)
    warm = {**config, "warm_start": {"recipe": {"options": {"bits": 5}}}}
    spelled = {**config, "warm_start": {"recipe": {"options": {"bits": 5, "edges": "int8"}}}}
    assert digest(warm) == digest(spelled) != digest(config)


def test_costs_are_measured(root: Path) -> None:
    costs = estimate(load_table(root, "paper", "table1", "smoke"), None)
    by_row = {cost.row: cost for cost in costs}
    assert by_row["float"].seconds == 0
    assert by_row["LSQ; 4 bits"].seconds > 0
    assert by_row["LSQ; 4 bits"].seeds == 2
    assert len({cost.float_key for cost in costs}) == 1


def test_float_networks_cost_what_their_form_does(root: Path) -> None:
    rows = {
        "layer batch": 'quantize = false\nrecipe = { name = "lsq", norm = "layer_batch" }',
        "unquantized": 'quantize = false\nrecipe = { name = "lsq" }',
        "scratch": 'start = "scratch"\nrecipe = { name = "lsq" }',
        "checkpoint": f'start = "checkpoint"\ncheckpoint = {{ file = "x", sha256 = "{"0" * 64}" }}',
    }
    for name, text in rows.items():  # a row's recipe is the float one by default
        (root / "paper" / "table1" / f"{name}.toml").write_text(f'row = "{name}"\n{text}\n')
    costs = {cost.row: cost for cost in estimate(load_table(root, "paper", "table1", "smoke"), None)}
    assert costs["layer batch"].float_key != costs["unquantized"].float_key == costs["LSQ; 4 bits"].float_key
    assert costs["layer batch"].seconds == costs["unquantized"].seconds == costs["scratch"].float_seconds == 0
    assert costs["checkpoint"].float_seconds == 0
    assert min(costs[row].float_seconds for row in ("layer batch", "unquantized", "LSQ; 4 bits")) > 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("lsq", 'colour = "red"', "lsq.toml: colour is unknown; there are:"),
        ("lsq", "train = { speed = 1 }", "train.speed is unknown"),
        ("lsq", 'recipe = { name = "lsq", options = { width = 4 } }', "recipe 'lsq' has no field 'width'"),
        ("lsq", "float = { lr = -1.0 }", "lr=-1.0 must be positive"),
        ("lsq", "[scale.huge]\nseeds = [0]", "scale 'huge' is unknown"),
        ("lsq", 'row = "strata"', "two rows are named 'strata'"),
        ("lsq", "row = ", "not TOML"),
        ("lsq", 'start = "checkpoint"', "needs checkpoint.file, under --root, and checkpoint.sha256"),
        ("lsq", 'start = "checkpoint"\ncheckpoint = { path = "x" }', "checkpoint.path is unknown"),
        ("lsq", "seeds = [0, 0]", "seeds must be different whole numbers"),
        ("lsq", 'scheme = "sideways"', "scheme='sideways' must be one of joint, ascending, top_then_finetune"),
    ],
)
def test_files_that_make_no_table(root: Path, file: str, text: str, message: str) -> None:
    (root / "paper" / "table1" / f"{file}.toml").write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        load_table(root, "paper", "table1", "smoke")
    assert message in str(error.value)


def test_unknown_tables_and_absent_data(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no table paper table9; there are: paper table1"):
        load_table(root, "paper", "table9", "smoke")
    with pytest.raises(ConfigError, match="scale must be one of smoke, cpu, paper, got 'tiny'"):
        load_table(root, "paper", "table1", "tiny")
    config = load_table(root, "paper", "table1", "smoke").rows[0].run(0)
    with pytest.raises(MissingDataError, match="data set cifar10"):
        execute({**config, "data": {**config["data"], "name": "cifar10"}}, tmp_path / "nowhere", tmp_path / "runs")


@pytest.mark.parametrize("scheme", ["ascending", "top_then_finetune"])
def test_schemes_and_warm_starts(root: Path, tmp_path: Path, scheme: str) -> None:
    name = "ascending" if scheme == "ascending" else "strata"
    widths = "bits = [2, 3]" if name == "ascending" else "w = [2, 3]"
    text = f'row = "staged"\nscheme = "{scheme}"\nrecipe = {{ name = "{name}", options = {{ {widths} }} }}\n'
    (root / "paper" / "table1" / "staged.toml").write_text(text)
    row = next(r for r in load_table(root, "paper", "table1", "smoke").rows if r.name == "staged")
    assert {"accuracy@2", "accuracy@3"} <= set(execute(row.run(0), None, tmp_path / "runs"))


def test_a_warm_start_runs_the_wider_network_first(root: Path, tmp_path: Path) -> None:
    text = 'row = "warm"\nrecipe = { name = "uniq", options = { bits = 1, warmup = false } }\n[warm_start]\n'
    (root / "paper" / "table1" / "warm.toml").write_text(text + "recipe = { options = { bits = 2 } }\n")
    row = next(r for r in load_table(root, "paper", "table1", "smoke").rows if r.name == "warm")
    assert "accuracy@1" in execute(row.run(0), None, tmp_path / "runs")
    trained = [file.parent.name for file in (tmp_path / "runs").glob("*/train.ckpt")]
    assert len(trained) == 2
