"""The report: what is read from runs in any state, what the page says, and that it stands by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers_report import events, layers, options, results, write_run, write_unfinished

from bitstrata import report
from bitstrata.cli import main
from bitstrata.cli.options import FREE
from bitstrata.report import chart, look, registry
from bitstrata.report.curves import Source, curves
from bitstrata.report.markup import Markup, el, table
from bitstrata.report.panels import layers as panel_layers
from bitstrata.report.panels.time import duration
from bitstrata.report.runs import INCIDENTAL, groups, read, read_all
from bitstrata.report.weights import views

VOID = {"meta", "link", "input", "br"}
TITLES = [panel.title for panel in report.all_panels()]


class Page(HTMLParser):
    """Checks nesting and collects ids, headings, text by section, tables and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.unnamed: list[str] = []
        self.no_scope = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        facts = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in facts:
            self.ids.append(facts["id"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "section":
            self.section = facts["aria-labelledby"]
        if tag == "svg" and "aria-hidden" not in facts and not facts.get("aria-label"):
            self.unnamed.append(str(facts))
        if tag == "th" and facts.get("scope") not in ("col", "row", "rowgroup"):
            self.no_scope += 1

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.section:
            self.sections[self.section] = self.sections.get(self.section, "") + data

    def panel(self, title: str) -> str:
        """Text of a panel that is drawn."""
        return self.sections[f"panel-{TITLES.index(title)}-title"]

    @property
    def lacking(self) -> str:
        """Text of the list of panels that are not."""
        return self.sections["not-shown-title"]


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Charts by their descriptions alone, which is faster, but for tests that are marked as about the drawing."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(chart, "_svg", lambda words, draw, form: el("svg", role="img", aria_label=words))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[str, Page]:
    """The page of a complete run, with everything drawn."""
    folder = tmp_path_factory.mktemp("drawn")
    return made(folder, write_run(folder / "first"))


def made(tmp_path: Path, *runs: Path, title: str | None = None) -> tuple[str, Page]:
    text = report.write(runs, tmp_path / "page.html", title).read_text()
    return text, Page(text)


def test_page_of_a_run_is_well_formed_and_loads_nothing(drawn):
    text, page = drawn
    assert len(page.ids) == len(set(page.ids))
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.unnamed == []
    assert page.no_scope == 0
    assert '<html lang="en">' in text
    assert "<title>first – bitstrata report</title>" in text
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|\burl\((?!#)|<script src|<link (?!rel=\"icon\" href=\"data:,\")", text
    )
    assert "default-src &#x27;none&#x27;" in text
    assert all(f'href="#{key}"' not in text or key in page.ids for key in re.findall(r'href="#([^"]+)"', text))
    assert len(text) < 600_000


def test_every_panel_shows_the_run(drawn):
    text, page = drawn
    assert "Not shown" not in text
    assert "cannot be" not in text
    assert all(f">{title}</h2>" in text for title in TITLES)
    assert "88.00 %" in page.panel("Results")
    assert "4,500" in page.panel("Results")
    assert "4 bits 88.00 % at 4.4 KiB" in text
    assert "Last values: float 83.00 % (stage float); 4 bits 84.67 % (stage joint)" in text
    assert "first, 16 images: passed" in page.panel("Verification")
    assert "NestedSymmetric, 4 bits, 16 levels" in page.panel("Grids and weights")
    assert "0.1 after the first epoch, 0.12 after the last" in page.panel("Grids and weights")
    assert "forward 30 %" in page.panel("Where the time goes")
    assert "other 4 %" in page.panel("Where the time goes")
    assert "Processor" in page.panel("Environment and options")


def test_the_same_runs_give_the_same_page(drawn, tmp_path):
    assert made(tmp_path, write_run(tmp_path / "first"))[0] == drawn[0].replace(str(tmp_path), "")


def test_runs_that_differ_in_the_seed_are_one_line_with_a_spread(tmp_path):
    runs = [write_run(tmp_path / f"net-seed{seed}", seed) for seed in (0, 1, 2)]
    other = write_run(tmp_path / "other", 0, recipe="lsq")
    found = groups(read_all([*runs, other]))
    assert [group.label for group in found] == ["net, 3 seeds", "other"]
    line = next(c for c in curves(found[0], [Source("evaluation", "eval", "accuracy")]) if c.level == "4")
    assert line.x == [3.0, 4.0, 5.0]
    assert line.mean[-1] == pytest.approx(0.9 - 0.1 / 3 - 0.02 + 0.001)
    assert (line.least[-1], line.largest[-1]) == pytest.approx((line.mean[-1] - 0.001, line.mean[-1] + 0.001))
    text, page = made(tmp_path, *runs, other)
    assert page.panel("Results").count("net, 3 seeds") == 1
    assert "89.00 %88.00 to 90.00" in page.panel("Results")
    assert "Report on 4 runs" in text
    assert "All complete." in text
    assert "recipe" in page.panel("Environment and options").split("All options")[0]


def test_unfinished_runs_say_what_they_lack(tmp_path):
    unfinished = write_unfinished(tmp_path / "stopped")
    text, page = made(tmp_path, unfinished)
    assert "One run, unfinished: 1 of 3 epochs of stage joint done." in text
    assert "Resultsno results yet; they are written when a run is complete" in page.lacking
    assert "Verificationnot verified yet" in page.lacking
    assert "neither a stage's layers.json nor a readable artifact" in page.lacking
    assert '<a href="#not-shown">Not shown</a>' in text
    assert "Last values" in text
    early = write_unfinished(tmp_path / "early")
    lines = [line for line in (early / "metrics.jsonl").read_text().splitlines() if '"float"' in line][:1]
    (early / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    _, page = made(tmp_path, early)
    assert "Accuracy over timemetrics.jsonl has no finished epoch" in page.lacking
    assert "the quantized stage has not begun" in page.lacking
    _, page = made(tmp_path, unfinished, write_run(tmp_path / "whole"))
    assert "stopped: not verified yet" in page.panel("Verification")


def test_runs_that_a_trainer_alone_wrote_are_shown(tmp_path):
    run = write_unfinished(tmp_path / "own")
    (run / "config.json").unlink()
    text, page = made(tmp_path, run)
    assert "unfinished: 1 epochs of stage joint done" in text
    assert "neither config.json nor results.json" in page.lacking


def test_an_empty_directory_is_called_empty(tmp_path):
    (tmp_path / "nothing").mkdir()
    text, page = made(tmp_path, tmp_path / "nothing")
    assert "One run, empty." in text
    assert set(page.sections) == {"runs", "not-shown-title"}
    assert all(title in page.lacking for title in TITLES)


@pytest.mark.parametrize("name", ["config.json", "results.json", "metrics.jsonl", "joint.layers.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"\xff\xfe\x00",
        b"null",
        b"[" * 100_000,
        b'{"rows": [{"bits": "4"}, 3], "layers": 7}',
    ],
    ids=["empty", "torn", "list", "text", "bytes", "null", "deep", "other"],
)
def test_damaged_files_are_named_and_never_stop_the_page(tmp_path, name, content):
    run = write_run(tmp_path / "damaged")
    (run / name).write_bytes(content)
    text, page = made(tmp_path, run)
    assert "cannot be drawn" not in text
    quiet = content == b"" and name == "metrics.jsonl"  # a file without lines is no damage
    silent = content == b"null" and name in ("config.json", "results.json", "joint.layers.json")
    legal = name == "config.json" and content.startswith(b'{"rows')
    assert (name in page.sections["runs"]) != (quiet or silent or legal)


def test_damaged_events_and_entries_are_left_out(tmp_path):
    run = write_run(tmp_path / "damaged")
    bad = ['{"run": "joint", "event": "epoch", "step": 5', '{"run": 1, "event": "eval", "step": 1, "epoch": 0}']
    bad += ['{"run": "joint", "event": "eval", "step": 1, "epoch": 0, "accuracy": {"4": NaN}}', "[]"]
    bad += ['{"run": "joint", "event": "diagnosis", "step": 1, "epoch": 0, "whole": {}}']
    bad += ['{"run": "joint", "event": "diagnosis", "step": 1, "epoch": 0, "layers": {"a": {"4": 2}}, "whole": {}}']
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("\n".join(bad))
    broken = layers()
    broken["layers"][0]["precisions"]["4"]["used"] = [0.5]
    broken["layers"].append("text")
    (run / "joint.layers.json").write_text(json.dumps(broken))
    found = read(run)
    assert found.events == events()
    assert found.problems == ["metrics.jsonl: 6 of 35 lines cannot be read and are left out"]
    assert {(view.layer, view.precision) for view in views(found)} >= {("block.conv", "4"), ("block.conv", "1")}
    assert "joint.layers.json: an entry is damaged and left out" in found.problems
    _, page = made(tmp_path, run)
    assert "lines cannot be read" in page.sections["runs"]


def test_a_panel_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def fail(_: object) -> Markup:
        raise ZeroDivisionError("<b>")

    broken = registry.Panel("Broken <i>", "Always fails.", 1, lambda _: None, fail)
    monkeypatch.setattr("bitstrata.report.page.all_panels", lambda: [broken, *report.all_panels()])
    text = report.write(write_run(tmp_path / "first"), tmp_path / "page.html").read_text()
    assert "cannot be drawn from what these runs contain (ZeroDivisionError: &lt;b&gt;)" in text
    assert "Broken &lt;i&gt;" in text
    assert ">Verification</h2>" in text


def test_whatever_a_run_contains_is_text(tmp_path):
    attack = "<script>alert(1)</script>\"'&"
    run = write_run(tmp_path / "<script>alert(2)<", model=attack, data=attack)
    found = results()
    found["cpu"], found["verify"]["report"] = attack, attack
    (run / "results.json").write_text(json.dumps(found))
    content = layers()
    content["layers"][0]["name"] = content["layers"][0]["quantizer"] = attack
    (run / "joint.layers.json").write_text(json.dumps(content))
    lines = [json.dumps({**event, "run": attack}) for event in events()]
    lines.append(json.dumps({**events()[0], "event": "eval", "accuracy": {attack: 0.5}}))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text, page = made(tmp_path, run, title=attack)
    assert text.count("<script>") == 2  # the page's own
    assert "alert(1)" in page.panel("Environment and options")
    assert "cannot be drawn" not in text


def test_names_that_would_be_the_same_are_made_longer(tmp_path):
    runs = read_all([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", 1), tmp_path / "a" / "run"])
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_without_an_artifact_accuracies_of_the_training_network_are_shown(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [{"bits": 4, "float_accuracy": 0.9, "fake_accuracy": 0.85}]
    (run / "results.json").write_text(json.dumps({"rows": rows, "no_artifact": "attention has no program"}))
    text, page = made(tmp_path, run)
    assert "complete, without an artifact" in text
    assert "no artifact: attention has no program" in page.panel("Results")
    assert "its results name no bytes" in page.lacking
    assert "85.0" in page.sections["runs"]


def test_large_pages_leave_further_runs_out_of_the_layers(tmp_path, monkeypatch):
    assert panel_layers.BUDGET * 2500 < 3_100_000
    monkeypatch.setattr(panel_layers, "BUDGET", 8)
    _, page = made(tmp_path, write_run(tmp_path / "one"), write_run(tmp_path / "two", 1))
    assert "Left out for the size of the page: two." in page.panel("Grids and weights")


def test_levels_far_from_all_weights_do_not_squeeze_the_drawing(tmp_path):
    run = write_run(tmp_path / "run")
    content = layers()
    wide = content["layers"][1]["precisions"]["4"]
    wide["levels"] = [float(level) for level in range(-8, 8)]  # weights are from -1 to 1
    (run / "joint.layers.json").write_text(json.dumps(content))
    view = next(view for view in views(read(run)) if (view.layer, view.precision) == ("block.conv", "4"))
    assert [level for level, _ in panel_layers._inside(view)] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    low, high = panel_layers._extent(view)
    assert (low, high) == pytest.approx((-2.16, 2.16))
    _, page = made(tmp_path, run)
    assert "11 of 16 levels lie outside" in page.panel("Grids and weights")


def test_errors_name_the_path(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"report: .*absent does not exist"):
        report.write(tmp_path / "absent", tmp_path / "page.html")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="is not a directory; give the directory of a run"):
        report.write([file], tmp_path / "page.html")
    with pytest.raises(ValueError, match="name at least one run directory"):
        report.write([], tmp_path / "page.html")
    assert main(["report", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err == f"bitstrata: report: {tmp_path}/absent does not exist\n"
    assert main(["report"]) == 1
    assert "name at least one run directory" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    out.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(run, out)
    assert out.read_text() == "old"


def test_the_command_writes_into_the_run(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}/report.html: ")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(write_run(tmp_path / "two", 1)), "--title", "Both"]) == 0
    assert "<h1>Both</h1>" in (tmp_path / "report.html").read_text()


def test_a_report_needs_no_torch(tmp_path):
    run = write_run(tmp_path / "run")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from bitstrata.report import chart, markup; chart._svg = lambda *_: markup.Markup()\n"
        f"from bitstrata import report; report.write({str(run)!r}, {str(tmp_path / 'page.html')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert "Not shown" not in (tmp_path / "page.html").read_text()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'report: needs matplotlib; install it with: pip install "bitstrata\[train\]"'
    ):
        report.write(tmp_path, tmp_path / "page.html")


def test_panels_are_found_by_themselves(monkeypatch, tmp_path):
    assert TITLES == [
        "Results", "Accuracy against bytes", "Mixed precision", "Accuracy over time", "Loss over time",
        "Precisions over time", "Grids and weights", "Layers over time", "From layer to layer",
        "Signals and training rules", "Gradients by channel", "Norms of normalizations", "Loss around the weights",
        "Where the time goes", "Verification", "Environment and options",
    ]  # fmt: skip
    (tmp_path / "extra_without.py").write_text("")
    from bitstrata.report import panels

    monkeypatch.setattr(panels, "__path__", [*panels.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match=r"module extra_without of bitstrata\.report\.panels defines no PANEL"):
        report.all_panels()
    monkeypatch.delitem(sys.modules, "bitstrata.report.panels.extra_without")
    (tmp_path / "extra_without.py").write_text(
        "from bitstrata.report import Panel\nfrom bitstrata.report.markup import el\n"
        "PANEL = Panel('Extra', 'More.', 15, lambda run: None, lambda runs: el('p', len(runs)))\n"
    )
    assert [panel.title for panel in report.all_panels()][1] == "Extra"
    monkeypatch.delitem(sys.modules, "bitstrata.report.panels.extra_without")


def test_markup_escapes_text_and_attributes():
    assert (
        el("p", "a < b", class_="x", title='"&', hidden=True, lang=None)
        == '<p class="x" title="&quot;&amp;" hidden>a &lt; b</p>'
    )
    assert el("li", el("b", "x"), 0, data_run=0) == '<li data-run="0"><b>x</b>0</li>'
    assert '<th scope="row">&lt;</th><td>1</td>' in table("c", ["a", "b"], [["<", 1]])


def test_every_precision_has_a_look_of_its_own():
    looks = [look.of_level(level) for level in ("1", "2", "3", "4", "5", "6", "7", "8")]
    assert len({one.color for one in looks}) == len({one.marker for one in looks}) == 8
    assert look.ordered({"1", "float", "4", "2"}) == ["float", "4", "2", "1"]
    assert look.named("1") == "1 bit"


def test_durations_are_readable():
    assert [duration(s) for s in (4.24, 59.0, 185, 8040)] == ["4.2 s", "59.0 s", "3 min 5 s", "2 h 14 min"]


def test_seeds_and_places_do_not_tell_runs_apart(tmp_path):
    assert FREE < INCIDENTAL
    assert read(write_run(tmp_path / "a", 0)).same == read(write_run(tmp_path / "b", 1, threads=2, out="x")).same
    assert read(write_run(tmp_path / "c", 0, lr=0.1)).same != read(tmp_path / "a").same
    assert set(options()) >= {"seed", "lr"}
