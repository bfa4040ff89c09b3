"""The scripts under examples/ run as they stand and give an artifact that a device can run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

import bitstrata as bs  # noqa: E402
import bitstrata_runtime as runtime  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "plain_loop": (),
    "loop_with_extras": (),
    "with_accelerate": ("accelerate",),
    "with_hf_trainer": ("transformers", "accelerate"),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "digits"}


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore")  # those of other libraries
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS[name]:
        pytest.importorskip(module, reason=f"examples/{name}.py needs {module}: pip install 'bitstrata[test]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    try:
        accuracy = importlib.import_module(name).main(quick=True, artifact="made.strata")
    finally:
        for imported in ("digits", name):
            sys.modules.pop(imported, None)
    assert set(accuracy) == {1, 2, 4}
    assert accuracy[4] > 0.85
    assert accuracy[1] > 0.4  # ten classes
    session = runtime.load("made.strata", bits=4)
    images, labels = bs.data.load("digits", split="test").batch(range(450))
    share = float((session.run(images.numpy()).argmax(1) == labels.numpy()).mean())
    assert share == pytest.approx(accuracy[4], abs=0.01)
