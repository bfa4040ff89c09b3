"""The study of SAT's first rule on a head of 1,024 classes: does its script do what it says?"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "recipes" / "sat" / "etr1" / "run.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("etr1_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words of which the first 1,024 occur more often than the others, and the first of all most often."""
    letters = "abcdefghij"
    words = [f"x{letters[i // 100]}{letters[i // 10 % 10]}{letters[i % 10]}" for i in range(1000)]
    words += [f"y{letters[i // 10]}{letters[i % 10]}" for i in range(60)]
    lines = [" ".join(["The", *words[:1023], *words[:1]]), " ".join(words[1023:]), " ".join(["the", *words[:1023]])]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return path


def test_classes_are_the_most_frequent_words(study: ModuleType, text: Path) -> None:
    train, held = study.read_words(text, 1024, 2)
    assert train.context.shape == (len(train), 2)
    assert len(train) + len(held) < 1025 + 1024 + 37  # places whose next word is rare are left out
    assert int(train.word.max()) < 1024
    assert int(train.context.max()) == 1024  # rare words are one number in contexts
    assert (train.context[1:1000, -1] == train.word[:999]).all()  # up to the rare words
    few, _ = study.read_words(text, 32, 2)
    assert set(few.word.tolist()) <= set(range(32))
    text.write_text("too few words")
    with pytest.raises(ValueError, match="3 different words, but the head has 1024 classes"):
        study.read_words(text, 1024, 2)


def test_rows_are_kept_and_not_repeated(study: ModuleType, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    out = text.with_name("results.json")
    names = ["float", "clamped, 4 bits", "constant, 2 bits"]
    command = ["--data", str(text), "--json", str(out), "--quick", "--batch", "32", "--only"]
    study.main([*command, *names[:2]])
    first = json.loads(out.read_text())
    assert [row["setting"] for row in first["rows"]] == names[:2]
    study.main([*command, *names])
    found = json.loads(out.read_text())
    assert found["rows"][:2] == first["rows"]
    assert [row["setting"] for row in found["rows"]] == names
    start = {row["setting"]: row["start"] for row in found["rows"]}
    assert start["constant, 2 bits"]["kappa0"] == pytest.approx(96 / 1024, rel=1e-3)
    assert start["float"]["head_scale"] == pytest.approx(1, rel=0.05)
    clamped = start["clamped, 4 bits"]
    assert clamped["kappa0"] == pytest.approx(clamped["head_scale"] * 96 / 1024)
    assert clamped["kappa0"] > 2
    growth = clamped["gradient_ratio"] / start["float"]["gradient_ratio"]
    assert growth == pytest.approx(clamped["head_scale"], rel=0.3)  # the gradient flowing law
    assert capsys.readouterr().out.count("| clamped, 4 bits |") == 2
    with pytest.raises(SystemExit, match="rows of other arguments"):
        study.main([*command, "float", "--lr", "2"])
    torch.set_num_threads(threads)
