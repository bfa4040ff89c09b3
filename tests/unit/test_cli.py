"""The command line without training: help, usage, error texts, recipes, and the serving half without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bitstrata as bs
from bitstrata.cli import common, loading, main, pipeline, weights
from bitstrata.cli.options import provenance, resolved
from bitstrata.cli.quantize import Quantize
from bitstrata.cli.saved import read_options
from bitstrata.cli.train import Train

WORDS = {
    "demo": ["upgrade", "accuracy_vs_bytes.png"],
    "train": ["--float-epochs", "bit for bit", "--checkpoint-every", "--quiet", "--tensorboard"],
    "quantize": ["safetensors", "PACKAGE.MODULE:FACTORY", "--mean"],
    "eval": ["Top-1 accuracy", "--stage"],
    "lower": ["headroom", "RUN"],
    "pack": ["artifact"],
    "info": ["precisions, files and layers", "--json"],
    "verify": ["layer by layer", "--images"],
    "run": ["most likely classes", "--bits", "--input"],
    "bench": ["latency", "ratio = peer_ms", "--json"],
    "tune": ["kernels and tile sizes", "--file"],
    "recipes": ["recipes"],
    "report": ["self-contained HTML page", "--out", "--title"],
}


@pytest.mark.parametrize("command", WORDS)
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for word in WORDS[command]:
        assert word.lower() in text.lower()


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in WORDS)
    assert 'pip install "bitstrata[train]"' in text


@pytest.mark.parametrize("argv", [[], ["trainn"], ["train", "--epoch", "3"], ["train", "--epochs", "x"], ["run"]])
def test_wrong_usage_exits_2(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().out == ""


def test_unknown_option_suggests_the_nearest(capsys):
    assert main(["train", "--float-epoch", "3"]) == 2
    assert "--float-epochs" in capsys.readouterr().err


def error(capsys, *argv: str) -> str:
    """Text of the one-line error of a command that must fail with exit code 1."""
    assert main(argv) == 1
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 1, text
    assert lines[0].startswith("bitstrata: ")
    return lines[0].removeprefix("bitstrata: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipes", "strat"], "recipe 'strat' is unknown; did you mean 'strata'? choices: "),
        (["train", "--data", "cifar"], "--data 'cifar' is unknown; did you mean 'cifar10'?"),
        (["train", "--data", "digits", "--model", "digits_resnets"], "did you mean 'digits_resnet'?"),
        (["train", "--recipe", "lsqq"], "--recipe 'lsqq' is unknown; did you mean 'lsq'?"),
        (
            ["train", "--recipe", "lsq", "--bits", "1,2,3,4"],
            "--bits 1,2,3,4: recipe 'lsq' trains one bit-width at a time",
        ),
        (["train", "--bits", "4,2"], "--bits '4,2': expected ascending bit-widths from 1 to 8"),
        (["train", "--bits", "0,1"], "--bits '0,1': expected ascending bit-widths from 1 to 8"),
        (["train", "--bits", "two"], "--bits 'two': expected numbers separated by commas, such as 1,2,3,4"),
        (["train", "--a", "all"], "--a 'all': expected numbers separated by commas"),
        (["train", "--lr", "0"], "TrainConfig: lr=0.0 must be positive"),
        (["train", "--float-epochs", "0", "--float-warmup", "0"], "TrainConfig: epochs=0 must be at least 1"),
        (["train", "--data", "cifar10"], "cifar10: needs root="),
        (["quantize", "absent.pt", "--data", "digits", "--model", "digits_cnn"], "absent.pt: no such file"),
        (["quantize", "absent.pt", "--data", "digits", "--mean", "a,b"], "--mean 'a,b': expected numbers"),
        (["info", "absent.strata"], "absent.strata: no such directory"),
        (["run", "absent.strata", "--bits", "1", "--input", "x.npy"], "absent.strata: no such directory"),
        (["bench"], "bench: name the artifact to measure, or give --isa alone"),
        (["bench", "absent.strata"], "absent.strata: no such directory"),
        (["bench", "absent.strata", "--runs", "0"], "--batch, --runs and --repeats must be at least 1"),
        (["eval", "absent"], "eval: absent does not exist"),
        (["verify", "absent"], "absent: not a run directory"),
        (["lower", "absent"], "absent: not a run directory"),
        (["pack", "absent", "new.strata"], "absent: not a run directory"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, *argv)
    assert list(tmp_path.iterdir()) == []  # a run that cannot start leaves nothing behind


def test_debug_shows_the_traceback(capsys):
    assert main(["recipes", "strat", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_recipes_lists_and_prints(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(bs.recipes.names())
    assert all(bs.recipes.get(name).description in line for name, line in zip(bs.recipes.names(), lines, strict=True))
    assert main(["recipes", "strata"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{bs.recipes.strata()}\n\nfields (--set NAME=VALUE): w=(1, 2, 3, 4), a='same', ")
    assert "tied" in printed


BLOCKED = """
import importlib.util, sys
NAMES = ("torch", "sklearn", "matplotlib", "PIL")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in NAMES else find(name, package)
from bitstrata.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *argv], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["train"], ["recipes"], ["demo"], ["lower", "x"], ["quantize", "x.pt"]])
def test_training_commands_without_torch_say_what_to_install(argv):
    result = without_torch(*argv)
    assert result.returncode == 1
    assert 'install it with: pip install "bitstrata[train]"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_serving_commands_work_without_torch(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(64, 3),
    )  # fmt: skip
    x = torch.rand(8, 1, 8, 8) * 4 - 2
    bs.quantize_(model, bs.recipes.strata(w=(1, 2)), x, input=bs.Pixels((0.5,), (0.25,)))
    bs.calibrate_(model, [x])
    path = tmp_path / "tiny.strata"
    bs.pack(bs.lower(model.eval(), x[:1]), path)
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.uint8))
    info = without_torch("info", str(path), "--json")
    assert info.returncode == 0, info.stderr
    facts = json.loads(info.stdout)
    assert [row["name"] for row in facts["precisions"]] == ["1", "2"]
    assert facts["macs"] == 36 * 36 + 16 * 36 * 4 + 64 * 3
    shown = without_torch("info", str(path))
    assert "base.safetensors" in shown.stdout
    assert "3,792 multiply-adds" in shown.stdout
    run = without_torch("run", str(path), "--bits", "2", "--input", str(tmp_path / "x.npy"), "--executor", "reference")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("image 0: class ")
    (tmp_path / "map.json").write_text(json.dumps({row["name"]: 1 + i % 2 for i, row in enumerate(facts["layers"])}))
    for bits in ("1", str(tmp_path / "map.json")):
        made = without_torch(
            "export", str(path), "--bits", bits, "--out", str(tmp_path / "c"), "--test-vector", str(tmp_path / "x.npy")
        )
        assert made.returncode == 0, made.stderr
        files = {file.name for file in (tmp_path / "c").iterdir()}
        assert files == {"model.c", "model.h", "main.c", "bitstrata_mcu.c", "bitstrata_mcu.h"}
    np.save(tmp_path / "two.npy", np.zeros((2, 1, 8, 8), np.uint8))
    many = without_torch("export", str(path), "--bits", "1", "--out", "c", "--test-vector", str(tmp_path / "two.npy"))
    assert (many.returncode, many.stderr) == (
        1,
        f"bitstrata: --test-vector {tmp_path / 'two.npy'}: holds 2 inputs, expected one\n",
    )
    named = without_torch("export", str(path), "--bits", "1", "--out", str(tmp_path / "d"), "--name", "main")
    assert (named.returncode, (tmp_path / "d").exists()) == (1, False)
    assert "export: name 'main' must be a C identifier" in named.stderr
    bad = without_torch("run", str(path), "--bits", "2", "--input", str(tmp_path / "absent.npy"))
    assert (bad.returncode, bad.stderr) == (1, f"bitstrata: --input {tmp_path / 'absent.npy'}: no such file\n")


def digits():
    return bs.data.load("digits", None, "test")


@pytest.mark.parametrize("form", ["safetensors", "bare", "state_dict", "module."])
def test_weights_load_from_every_form(form, tmp_path):
    source = bs.zoo.create("digits_cnn", 10, 1)
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        torch.save({("module." if form == "module." else "") + k: v for k, v in state.items()}, path)
    model = bs.zoo.create("digits_cnn", 10, 1)
    weights.load_weights(model, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = bs.zoo.create("digits_cnn", 7, 1).state_dict()
    first = next(iter(state))
    del state[first]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(common.CommandError) as caught:
        weights.load_weights(bs.zoo.create("digits_cnn", 10, 1), tmp_path / "w.pt")
    text = str(caught.value)
    assert f"missing {first}; unexpected extra; 2 of another shape" in text
    features = next(value for key, value in reversed(state.items()) if value.ndim == 2).shape[1]
    assert f"(7, {features}) in the file, (10, {features}) in the network" in text


def test_files_that_hold_no_weights_are_errors(tmp_path):
    model = bs.zoo.create("digits_cnn", 10, 1)
    (tmp_path / "w.pt").write_text("hello")
    with pytest.raises(common.CommandError, match="not readable as weights only"):
        weights.load_weights(model, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(common.CommandError, match=r"w\.safetensors: "):
        weights.load_weights(model, tmp_path / "w.safetensors")
    torch.save({"state_dict": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(common.CommandError, match="holds no state dict of tensors"):
        weights.load_weights(model, tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_at_all:make", "no module 'no_such_module_at_all' in "),
        ("bitstrata.zoo:resnet2O", "has no 'resnet2O'; it defines: "),
        ("bitstrata.zoo:names", "returned a tuple, expected a torch.nn.Module"),
    ],
)
def test_factories_that_fail_are_named(name, message):
    with pytest.raises(common.CommandError, match=message):
        loading.make_model(name, digits())


def test_factory_makes_the_model():
    model = loading.make_model("bitstrata.zoo:digits_cnn", digits())
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    wide = loading.make_model("bitstrata.zoo:digits_cnn", digits(), ("classes=7", "width=4"))
    assert wide(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(
        common.CommandError, match=r"--model bitstrata.zoo:digits_cnn: .*unexpected keyword.*--model-set"
    ):
        loading.make_model("bitstrata.zoo:digits_cnn", digits(), ("depth=7",))


def test_networks_take_options():
    model = loading.make_model("maqd_vgg", digits(), ("width=4",))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(common.CommandError, match=r"--model maqd_vgg: .*unknown option 'depth'"):
        loading.make_model("maqd_vgg", digits(), ("depth=4",))
    with pytest.raises(common.CommandError, match=r"--model-set width: write NAME=VALUE"):
        loading.make_model("maqd_vgg", digits(), ("width",))


def test_stages_of_a_chain():
    stages = pipeline.chain_stages(Train(chain="4,2", bits="1", epochs=3, lr=0.5))
    assert [recipe.precisions for recipe, _ in stages] == [(4,), (2,)]
    assert [(config.epochs, config.lr) for _, config in stages] == [(3, 0.5)] * 2
    assert pipeline.chain_stages(Train()) == []
    for chain in ("", "4,x", "9"):
        with pytest.raises(common.CommandError, match=r"^--chain '.*': expected"):
            pipeline.chain_stages(Train(chain=chain))
    with pytest.raises(common.CommandError, match=r"^--chain: recipe 'shiftquant' trains in integers"):
        pipeline.chain_stages(Train(chain="4", recipe="shiftquant"))


def test_objective_and_paper_schedule_come_from_the_recipe():
    options = Train(recipe="maqd", epochs=3, lr=0.5)
    config = pipeline.joint_config(options, loading.make_recipe(options))
    assert (config.loss, config.loss_gamma, config.lr, config.decay, config.epochs) == ("maqd", 0.05, 0.5, "all", 3)
    options = dataclasses.replace(options, paper_schedule=True)
    config = pipeline.joint_config(options, loading.make_recipe(options))
    assert (config.lr, config.decay, config.schedule, config.epochs) == (0.01, "weights", "cosine_epoch", 3)
    options = Train(recipe="uniq", bits="1", epochs=9, paper_schedule=True)
    config = pipeline.joint_config(options, loading.make_recipe(options))
    assert (config.optimizer, config.lr, config.warmup, config.warmup_lr, config.weight_decay) == (
        "adam", 0.004, 5.0, 0.001, 0.0,
    )  # fmt: skip
    with pytest.raises(common.CommandError, match=r"5 epochs of warm-up do not fit --epochs 3"):
        pipeline.joint_config(dataclasses.replace(options, epochs=3), loading.make_recipe(options))
    assert pipeline.joint_config(Train(distill=False), bs.recipes.strata()).distill is None
    with pytest.raises(common.CommandError, match=r"^--teacher float: recipe 'strata' as given here does not distil$"):
        pipeline.joint_config(Train(distill=False, teacher="float"), bs.recipes.strata())
    sampled = dataclasses.replace(bs.recipes.strata(), objective=bs.recipes.Objective(sampling="sandwich"))
    assert pipeline.joint_config(Train(), sampled).sampling == "sandwich"
    assert pipeline.joint_config(Train(sampling="all"), sampled).sampling == "all"
    assert pipeline.joint_config(Train(sampling="sandwich"), bs.recipes.strata()).sampling == "sandwich"
    assert pipeline.joint_config(Train(fused=True), sampled).fused
    assert not pipeline.float_config(Train(fused=True)).fused  # which has nothing to fuse


@pytest.mark.parametrize("kind", [Train, Quantize])
def test_saved_options_come_back(kind, tmp_path):
    extra = {"checkpoint": tmp_path / "w.pt", "mean": "0.5"} if kind is Quantize else {"float_epochs": 3}
    options = kind(data="digits", root=tmp_path, bits="2,4", clip_grad=1.5, **extra)
    common.write_json(tmp_path / "config.json", resolved(options))
    assert read_options(tmp_path / "config.json") == options
    (tmp_path / "config.json").write_text(json.dumps({**resolved(options), "novel": 1}))
    with pytest.raises(common.CommandError, match="unknown options novel"):
        read_options(tmp_path / "config.json")


def test_provenance_holds_what_decides_the_weights_and_no_directory(tmp_path):
    options = Quantize(checkpoint=tmp_path / "w.pt", root=tmp_path, out=tmp_path, bits="2,4")
    kept = provenance(options)["options"]
    assert str(tmp_path) not in json.dumps(kept)
    assert (kept["checkpoint"], kept["bits"], kept["seed"]) == ("w.pt", "2,4", 0)
    elsewhere = dataclasses.replace(options, out=tmp_path / "other", threads=7)
    assert provenance(elsewhere) == provenance(options)


def test_recipe_takes_the_widths():
    recipe = loading.make_recipe(Train(bits="2,4", a="8"))
    assert (recipe.precisions, dict(recipe.activation_bits)) == ((2, 4), {2: 8, 4: 8})
    recipe = loading.make_recipe(Train(recipe="lsq", bits="3"))
    assert (recipe.name, recipe.precisions) == ("lsq", (3,))
    recipe = loading.make_recipe(Train(recipe="vertical", bits="2,3"))
    assert (recipe.name, recipe.precisions) == ("vertical", (2, 3))
    assert loading.make_recipe(Train()) == bs.recipes.strata()


def test_recipe_takes_its_fields():
    options = Train(recipe="maqd", set=("m_w=15", "m_a=4", "norm=batch", "delta_mode=M/2", "gamma=0.1"))
    assert loading.make_recipe(options) == bs.recipes.maqd(15, 4, norm="batch", delta_mode="M/2", gamma=0.1)
    assert loading.make_recipe(Train(recipe="sat", set=("rescale=None",))) == bs.recipes.sat(rescale=None)
    assert loading.make_recipe(Train(recipe="lsq", set=("a=null",))) == bs.recipes.lsq(a=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "maqd", "bits": "2"}, r"--bits 2: recipe 'maqd' fixes its widths by other fields"),
        ({"recipe": "maqd", "a": "2"}, r"--a 2: recipe 'maqd' has no such field"),
        ({"recipe": "maqd", "set": ("m_w",)}, r"--set m_w: write NAME=VALUE"),
        ({"recipe": "maqd", "set": ("w=3",)}, r"--set w: recipe 'maqd' has no field 'w'; it has: m_w, m_a, s"),
        ({"recipe": "maqd", "set": ("m_w=4",)}, r"states must be an odd integer of at least 3, got 4"),
        ({"recipe": "uniq", "set": ("init=best",)}, r"UniqWeight: init must be one of .* got 'best'"),
    ],
)
def test_recipe_fields_that_are_wrong(options, message):
    with pytest.raises(common.CommandError, match=message):
        loading.make_recipe(Train(**options))


@pytest.mark.parametrize("arguments", [["--isa"], ["--isa", "list"], ["--isa", "--batch", "2"]])
def test_bench_lists_instruction_sets(arguments, monkeypatch, capsys):
    from bitstrata_runtime.engine import kernel_table

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("BITSTRATA_ISA", raising=False)
    assert main(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    for row in kernel_table():
        (line,) = [line for line in shown.splitlines() if f" {row.isa} " in line]
        assert row.lacks in line
        assert ("no" in line.split()) == bool(row.lacks)
        assert line.count("yes") == (not row.lacks) + row.chosen
    assert "BITSTRATA_ISA is not set: the fastest is used" in shown
    monkeypatch.setenv("BITSTRATA_ISA", "abacus")
    assert main(["bench", *arguments]) == 0
    assert "BITSTRATA_ISA is 'abacus', which cannot run here: it is refused" in capsys.readouterr().out
