"""The README's code runs as it stands, and its loop is as short as it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_loop_trains_packs_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, serving = blocks()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(training, str(README), "exec"), names)
    bs = names["bs"]
    test = bs.data.load("digits", split="test")  # type: ignore[attr-defined]
    names["images"] = test.images.numpy()
    exec(compile(serving, str(README), "exec"), names)
    accuracy = np.mean(np.asarray(names["logits"]).argmax(1) == test.labels.numpy())
    assert accuracy > 0.5  # two epochs from scratch at three bits; chance is 0.1
    assert names["session"].precision_map["layer1.0.conv1"] == 3  # type: ignore[attr-defined]


def test_readme_loop_is_under_fifteen_lines() -> None:
    training = blocks()[0]
    begin = training.index("bs.quantize_")
    loop = [line for line in training[begin:].splitlines() if line.strip()]
    assert len(loop) < 15
