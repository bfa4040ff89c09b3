"""The pages under docs/ run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from bitstrata import report  # noqa: E402
from bitstrata.cli import main  # noqa: E402
from bitstrata.quantizers import registry  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(source: str, page: str, names: dict[str, object]) -> dict[str, object]:
    exec(compile(source, str(DOCS / page), "exec"), names)
    return names


def test_add_a_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RECORDS", dict(registry._RECORDS))
    torch.manual_seed(0)
    quantizer, tests, use = blocks("add-a-quantizer.md")
    module = ModuleType("ternary")
    run(quantizer, "add-a-quantizer.md", module.__dict__)
    found = run(tests, "add-a-quantizer.md", {})
    called = [value() for name, value in found.items() if name.startswith("test_")]
    assert len(called) == 2
    result = run(use, "add-a-quantizer.md", {})
    assert result["report"].ok  # type: ignore[attr-defined]
    assert "engine values unequal to the reference's: 0" in capsys.readouterr().out
    assert (tmp_path / "ternary.strata" / "manifest.json").is_file()


def test_mix_two_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in blocks("mix-two-papers.md"):
        run(source, "mix-two-papers.md", names)
    printed = capsys.readouterr().out
    assert "needs transform='standardize'" in printed
    assert "mixed: UniQ" in printed


def test_integer_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in blocks("integer-training.md"):
        run(source, "integer-training.md", names)
    printed = capsys.readouterr().out
    assert "gradients    shiftquant(g=4, groups=4" in printed
    assert "engine values unequal to the reference's: 0" in printed
    assert (tmp_path / "integers.strata" / "manifest.json").is_file()


def test_add_a_panel(tmp_path: Path) -> None:
    (source,) = blocks("report.md")
    panel = run(source, "report.md", {})["PANEL"]
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "results.json").write_text('{"rows": [{"bits": 4}], "seconds": {"float": 2.0, "joint": 3.0}}')
    first, second = (report.read(tmp_path / name) for name in ("first", "second"))
    assert (panel.needs(first), panel.needs(second)) == (None, "no times in results.json")  # type: ignore[attr-defined]
    assert '<th scope="row">first</th><td>5</td>' in panel.render([first])  # type: ignore[attr-defined]


def test_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in blocks("distributed.md"):
        run(source, "distributed.md", names)
    assert (tmp_path / "runs" / "digits" / "train.ckpt").is_file()


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    source, watched = blocks("training.md")
    threads = torch.get_num_threads()
    try:
        first = run(source, "training.md", {})
        again = run(source, "training.md", {})  # complete: it is opened, not repeated
        run(watched, "training.md", dict(again))
    finally:
        torch.set_num_threads(threads)
    states = [names["model"].state_dict() for names in (first, again)]  # type: ignore[attr-defined]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == printed[1]
    assert re.match(r"\d+ measurements of \S+ ms \(signals \S+, moo \S+, flips \S+\)$", printed[-1])
    assert {file.name for file in (tmp_path / "runs" / "digits").iterdir()} == {
        "train.ckpt", "train.1.ckpt", "train.best.ckpt", "train.layers.json", "metrics.jsonl"
    }  # fmt: skip


def test_first_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    text = (DOCS / "first-model.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for kind, source in re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL):
        if kind == "bash":
            for line in source.splitlines():
                program, *arguments = shlex.split(line)
                assert (program, main(arguments)) == ("bitstrata", 0), capsys.readouterr().err
        elif source.startswith("# mynet.py\n"):
            (tmp_path / "mynet.py").write_text(source, encoding="utf-8")
        else:
            run(source, "first-model.md", names)
    monkeypatch.delitem(sys.modules, "mynet")
    printed = capsys.readouterr().out
    accuracy = float(re.findall(r"^2 bits: (.*)$", printed, flags=re.MULTILINE)[-1])
    assert accuracy > 0.7  # ten classes
    assert "verified layer by layer: ok" in printed
    assert (tmp_path / "mine.strata" / "manifest.json").is_file()


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{page.name}: {target}"
