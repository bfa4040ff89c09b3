"""`bitstrata quantize` and `train` on a network and data of the user's own, from the current directory."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bitstrata_runtime as runtime
from bitstrata.cli import main

pytest.importorskip("sklearn")

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
from sklearn.datasets import load_digits


class SmallNet(nn.Module):
    def __init__(self, classes, width=8, activation="relu"):
        super().__init__()
        self.activation = {"relu": nn.ReLU, "silu": nn.SiLU}[activation]()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.activation(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        if y.shape == x.shape:
            y += x
        y = F.relu(y)
        return self.fc(self.drop(F.adaptive_avg_pool2d(y, 1).view(y.size(0), -1)))


def make():
    return SmallNet(10)


def narrow():
    return SmallNet(4)


def two():
    return nn.Sequential(SmallNet(10), Pair())


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Digits(torch.utils.data.Dataset):
    def __init__(self, split, count=120):
        bunch = load_digits()
        part = slice(0, count) if split == "train" else slice(1000, 1000 + count // 2)
        self.images = torch.tensor(bunch.images[part] / 16, dtype=torch.float32)
        self.images = (self.images * 255).round()[:, None] / 255
        self.labels = bunch.target[part]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def features(split):
    images, labels = load_digits(return_X_y=True)
    part = slice(0, 120) if split == "train" else slice(1000, 1060)
    return images[part] / 8 - 1, labels[part]


def mlp():
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 10))


constant = 7
"""

SHORT = "--bits 2,4 --epochs 1 --batch-size 40 --calibration-batches 1 --verify-images 4 --threads 1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the user's module, as the current one; the module's name is new in every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "usernet.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "usernet", raising=False)
    return tmp_path


def test_quantize_a_checkpoint_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(here))
    usernet = __import__("usernet")
    torch.manual_seed(0)
    model = usernet.make()
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 5}, "mine.pt")
    command = f"quantize mine.pt --model usernet:make --data usernet:Digits --augment crop {SHORT}"
    assert main(shlex.split(command)) == 0, capsys.readouterr().err
    results = json.loads(Path("runs/mine/results.json").read_text())
    assert results["verify"]["ok"] is True
    data = usernet.Digits("test")
    right = [int(model.eval()(image[None]).argmax()) == label for image, label in data]
    assert results["rows"][0]["float_accuracy"] == pytest.approx(np.mean(right))  # it read what the network reads
    session = runtime.load("runs/mine/model.strata", bits=4, executor="reference")
    images = (torch.stack([image for image, _ in data]) * 255).round().to(torch.uint8).numpy()
    engine = float(np.mean(session.run(images).argmax(1) == data.labels))
    assert engine == results["rows"][-1]["engine_accuracy"]
    assert main(["verify", "runs/mine", "--images", "3"]) == 0  # opens model and data again


def test_train_on_features_that_are_no_pixels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"train --model usernet:mlp --data usernet:features --float-epochs 1 --float-warmup 0 --out runs/f {SHORT}"
    )
    assert main(shlex.split(command)) == 0, capsys.readouterr().err
    results = json.loads(Path("runs/f/results.json").read_text())
    assert results["verify"]["ok"] is True
    assert results["rows"][0]["top1_agreement"] >= 0.95
    images, _ = __import__("usernet").features("test")
    session = runtime.load("runs/f/model.strata", bits=2)
    np.save("x.npy", images[:5].astype(np.float32))
    capsys.readouterr()
    assert main(["run", "runs/f/model.strata", "--bits", "2", "--input", "x.npy", "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["bench", "runs/f/model.strata", "--runs", "2", "--repeats", "1"]) == 0
    assert session.run(images[:5], floats=True).shape == (5, 10)


BASE = "quantize mine.pt --data usernet:Digits --model"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{BASE} usernet:SmallNet", "missing a required argument: 'classes'; its arguments are (classes, width=8, "),
        (f"{BASE} usernet:SmallNet", "Give others as --model-set NAME=VALUE, or name a function that needs none"),
        (f"{BASE} usernet:absent", "has no 'absent'; it defines: SmallNet, make, narrow"),
        (f"{BASE} ./usernet.py:make", "write the module as Python imports it: usernet:make"),
        (f"{BASE} othernet:make", "no module 'othernet' in "),
        (f"{BASE} usernet:constant", "is an int, expected a function or class"),
        (f"{BASE} usernet:Digits --model-set split=train", "returned a Digits, expected a torch.nn.Module"),
        (f"{BASE} usernet:SmallNet --model-set classes=10 activation=gelu", "calling it failed: KeyError: 'gelu'"),
        (f"{BASE} usernet:narrow", "the network returns 4 logits, but the data have labels 0..9, 10 classes"),
        (f"{BASE} usernet:two", "the network returns a tuple; expected one tensor of logits"),
        (f"{BASE} usernet:mlp", "the network does not run on the data's inputs torch.float32 of shape (1, 1, 8, 8)"),
        (f"{BASE} usernet:SmallNet --model-set classes=10 activation=silu", "module 'activation' of type SiLU has no"),
        ("train --model usernet:make --data usernet:Digits --data-set n=3", "got an unexpected keyword argument 'n'"),
        ("train --model usernet:make --data usernet:make", "too many positional arguments; its arguments are ()"),
        ("train --model usernet:make --data usernet:constant", "expected a function of the split ('train' or 'test')"),
        (
            "train --model usernet:make --data usernet:features --augment flip",
            "--augment flip: these data are no images",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    here: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(here))
    usernet = __import__("usernet")
    words = shlex.split(command)
    states = {"usernet:narrow": usernet.narrow, "usernet:mlp": usernet.mlp, "usernet:two": usernet.two}
    torch.save(states.get(words[words.index("--model") + 1], usernet.make)().state_dict(), "mine.pt")
    assert main(words) == 1
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_network_without_an_integer_program_trains_on_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"train --model usernet:SmallNet --model-set classes=10 activation=silu --data usernet:Digits --no-artifact \
        --float-epochs 1 --float-warmup 0 --out runs/silu {SHORT}"
    )
    assert main(shlex.split(command)) == 0
    assert (
        "trains and evaluates, without an artifact: lower: module 'activation' of type SiLU" in capsys.readouterr().out
    )
    assert "no_artifact" in json.loads(Path("runs/silu/results.json").read_text())


def test_broken_modules_and_missing_packages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, message in (
        ("brokennet", "def make(:\n", "importing brokennet failed: SyntaxError: "),
        ("needynet", "import no_such_package_at_all\n", "importing needynet failed: No module named 'no_such_package"),
    ):
        Path(f"{name}.py").write_text(text)
        assert main(["train", "--model", f"{name}:make", "--data", "digits"]) == 1
        assert message in capsys.readouterr().err


def test_statistics_are_for_pixels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(here))
    torch.save(__import__("usernet").mlp().state_dict(), "mine.pt")
    command = "quantize mine.pt --model usernet:mlp --data usernet:features --mean 0.5"
    assert main(shlex.split(command)) == 1
    assert "--mean and --std are for pixels" in capsys.readouterr().err
