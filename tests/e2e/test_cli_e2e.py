"""The command line from training to serving, on scikit-learn's digits with a very small budget."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import bitstrata as bs
import bitstrata_runtime as runtime
from bitstrata.cli import loading, main
from bitstrata.cli.loading import first_images
from bitstrata.report import read as read_run
from bitstrata.report.weights import views
from bitstrata.train import Trainer, checkpoint
from bitstrata.train.metrics import read

TRAIN = shlex.split(
    "train --data digits --model digits_cnn --bits 1,2,4 --float-epochs 2 --epochs 1 --lr 0.05 --batch-size 32 "
    "--train-limit 256 --test-limit 60 --calibration-batches 1 --verify-images 4 --checkpoint-every 3 --threads 1"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run of `bitstrata train`."""
    out = tmp_path_factory.mktemp("run") / "digits"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


def digits_test(count: int = 60) -> bs.data.Dataset:
    return first_images(bs.data.load("digits", None, "test"), count)


def test_results_hold_a_row_a_precision(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    rows = results["rows"]
    assert [row["bits"] for row in rows] == [1, 2, 4]
    assert [row["bytes"] for row in rows] == sorted({row["bytes"] for row in rows})
    for row in rows:
        assert row["images"] == 60
        assert all(0 <= row[key] <= 1 for key in ("float_accuracy", "fake_accuracy", "engine_accuracy"))
        assert row["top1_agreement"] >= 0.95
    assert rows[0]["float_accuracy"] > 0.3  # ten classes: it has learnt something
    assert results["verify"]["ok"] is True
    assert sum(results["files"].values()) == rows[-1]["bytes"]
    assert set(results["seconds"]) == {"float", "joint", "lower", "measure", "verify"}
    assert json.loads((run_dir / "config.json").read_text())["bits"] == "1,2,4"
    assert {event["run"] for event in read(run_dir / "metrics.jsonl")} == {"float", "joint"}


def test_results_agree_with_the_artifact(run_dir):
    data = digits_test()
    images, labels = data.batch(range(60))
    for row in json.loads((run_dir / "results.json").read_text())["rows"]:
        session = runtime.load(run_dir / "model.strata", bits=row["bits"], executor="reference")
        accuracy = float(np.mean(session.run(images.numpy()).argmax(1) == labels.numpy()))
        assert accuracy == row["engine_accuracy"]


def test_report_of_a_run_has_everything(run_dir, tmp_path, capsys):
    assert main(["report", str(run_dir), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    lacking = text.split('id="not-shown"')[1].split("</section>")[0]
    assert lacking.count("<dt>") == 8  # no plans, not inspected (4 panels), and nothing measured on the way (3)
    assert "cannot be" not in text
    rows = json.loads((run_dir / "results.json").read_text())["rows"]
    assert all(f"{100 * row['engine_accuracy']:.2f} %" in text for row in rows)
    found = views(read_run(run_dir))
    assert all(view.counts for view in found)
    shutil.copytree(run_dir, tmp_path / "older")
    (tmp_path / "older" / "joint.layers.json").unlink()
    coded = views(read_run(tmp_path / "older"))  # from the artifact's codes
    assert [(v.layer, v.precision) for v in coded] == [(v.layer, v.precision) for v in found]
    for one, other in zip(coded, found, strict=True):
        assert one.used == pytest.approx(other.used, abs=1e-4)  # the snapshot is of the weights that were packed
    (tmp_path / "older" / "model.strata" / "base.safetensors").write_bytes(b"")
    damaged = read_run(tmp_path / "older")
    assert views(damaged) == []
    assert damaged.problems[0].startswith("model.strata cannot be read: base.safetensors")


def test_quiet_and_tensorboard(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    assert main([*TRAIN, "--out", str(tmp_path / "run"), "--quiet", "--tensorboard", str(tmp_path / "events")]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == ["float", "joint"]


def test_finished_run_is_shown_not_repeated(run_dir, capsys):
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")}
    assert main([*TRAIN, "--out", str(run_dir)]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run_dir.rglob("*")} == before


def test_other_options_in_the_same_directory_are_an_error(run_dir, capsys):
    assert main([*TRAIN, "--seed", "7", "--out", str(run_dir)]) == 1
    assert "is of another run (seed: 0 there, 7 now); use another --out, or --fresh" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["float", "joint"])
def test_interrupted_command_continues_bit_for_bit(run_dir, stage, tmp_path, monkeypatch, capsys):
    original = Trainer._step

    def interrupting(self, images, labels):
        if self.name == stage and self.position.step == 5:
            raise KeyboardInterrupt
        return original(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupting)
        assert main([*TRAIN, "--out", str(tmp_path / "cut")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert main([*TRAIN, "--out", str(tmp_path / "cut")]) == 0
    for file in (run_dir / "model.strata").iterdir():
        assert (tmp_path / "cut" / "model.strata" / file.name).read_bytes() == file.read_bytes(), file.name


def test_info_run_and_verify(run_dir, tmp_path, capsys):
    artifact = str(run_dir / "model.strata")
    assert main(["info", artifact, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in facts["precisions"]] == ["1", "2", "4"]
    assert facts["total"] == sum(file.stat().st_size for file in Path(artifact).iterdir())

    images = digits_test(3).batch(range(3))[0].numpy()
    np.save(tmp_path / "x.npy", images)
    command = ["run", artifact, "--bits", "4", "--input", str(tmp_path / "x.npy")]
    assert main([*command, "--output", str(tmp_path / "logits.npy")]) == 0
    expected = runtime.load(artifact, bits=4, executor="reference").run(images)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)
    capsys.readouterr()
    assert main([*command, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[3]) for line in lines] == expected.argmax(1).tolist()

    assert main(["verify", str(run_dir), "--images", "5"]) == 0
    assert "verified 5 inputs" in capsys.readouterr().out


def test_run_reads_image_files_and_rejects_other_shapes(run_dir, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pixels = digits_test(1).batch([0])[0].numpy()
    image.fromarray(pixels[0, 0]).save(tmp_path / "digit.png")
    np.save(tmp_path / "digit.npy", pixels)
    artifact, shown = str(run_dir / "model.strata"), []
    for name in ("digit.png", "digit.npy"):
        assert main(["run", artifact, "--bits", "2", "--input", str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    image.new("L", (9, 8)).save(tmp_path / "wide.png")
    assert main(["run", artifact, "--bits", "2", "--input", str(tmp_path / "wide.png")]) == 1
    assert "shape (1, 1, 8, 9), the program reads (N, 1, 8, 8)" in capsys.readouterr().err


def test_verify_finds_a_foreign_artifact(run_dir, tmp_path, capsys):
    out = tmp_path / "other"
    assert main([*TRAIN, "--seed", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(run_dir), "--artifact", str(out / "model.strata"), "--images", "4"]) == 1
    assert "differs from the network of" in capsys.readouterr().err


def test_pack_repeats_the_artifact_byte_for_byte(run_dir, tmp_path, capsys):
    target = tmp_path / "again.strata"
    assert main(["pack", str(run_dir), str(target)]) == 0
    for file in (run_dir / "model.strata").iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name
    assert main(["pack", str(run_dir), str(target)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_lower_and_eval(run_dir, tmp_path, capsys):
    assert main(["lower", str(run_dir)]) == 0
    assert "headroom@4" in capsys.readouterr().out
    rows = json.loads((run_dir / "results.json").read_text())["rows"]
    assert main(["eval", str(run_dir), "--json", str(tmp_path / "fake.json")]) == 0
    assert json.loads((tmp_path / "fake.json").read_text()) == {str(r["bits"]): r["fake_accuracy"] for r in rows}
    assert main(["eval", str(run_dir), "--stage", "float", "--json", str(tmp_path / "float.json")]) == 0
    assert json.loads((tmp_path / "float.json").read_text()) == {"float": rows[0]["float_accuracy"]}
    command = ["eval", str(run_dir / "model.strata"), "--data", "digits", "--limit", "60", "--executor", "oracle"]
    assert main([*command, "--json", str(tmp_path / "integer.json")]) == 0
    assert json.loads((tmp_path / "integer.json").read_text()) == {str(r["bits"]): r["engine_accuracy"] for r in rows}


def test_quantize_a_users_checkpoint(run_dir, tmp_path, capsys):
    state = checkpoint.load(run_dir / "float.ckpt")["model"]
    save_file(state, tmp_path / "mine.safetensors")
    options = "--data digits --model bitstrata.zoo:digits_cnn --bits 2,3 --epochs 1 --lr 0.02 --batch-size 32"
    limits = "--train-limit 128 --test-limit 60 --calibration-batches 1 --verify-images 2 --mean 0.3 --std 0.4"
    out = tmp_path / "mine"
    argv = ["quantize", str(tmp_path / "mine.safetensors"), *options.split(), *limits.split(), "--out", str(out)]
    assert main(argv) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [2, 3]
    assert main(["verify", str(out), "--images", "2"]) == 0
    manifest = (out / "model.strata" / "manifest.json").read_text()
    assert "mine.safetensors" in manifest
    assert str(tmp_path) not in manifest


@pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
def test_bench_writes_rows_with_an_honest_peer(run_dir, tmp_path, capsys):
    target = tmp_path / "rows.json"
    argv = ["bench", str(run_dir / "model.strata"), "--bits", "1,4", "--runs", "1", "--repeats", "2"]
    assert main([*argv, "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert {row["isa"] for row in rows} == set(runtime.available_isas())
    for row in rows:
        assert set(row) == {"case", "threads", "isa", "bits", "ours_ms", "peer", "peer_ms", "ratio"}
        assert row["ours_ms"] > 0
        assert (row["peer"] == "none") == (row["isa"] == "generic") == (row["ratio"] is None)
    assert main([*argv, "--isa", "avx9"]) == 1
    assert "--isa 'avx9' is unknown" in capsys.readouterr().err


@pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
def test_bench_profiles_every_operation(run_dir, tmp_path, capsys):
    target = tmp_path / "profile.json"
    argv = ["bench", str(run_dir / "model.strata"), "--profile", "--bits", "1,4", "--threads", "2", "--batch", "2"]
    assert main([*argv, "--runs", "1", "--repeats", "2", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [(p["bits"], p["batch"], p["machine"]["threads"]) for p in found] == [(1, 2, 2), (4, 2, 2)]
    shown = capsys.readouterr().out
    for profile in found:
        assert profile["machine"]["isa"] == runtime.available_isas()[-1]
        assert len(profile["worst"]) == 3
        assert {op["bound"] for op in profile["ops"]} <= {"compute", "memory"}
        assert all(op["seconds"] > 0 or op["kind"] == "requant" for op in profile["ops"])
        assert sum(op["seconds"] for op in profile["ops"]) > 0
        assert all(name in shown for name in profile["machine"]["peaks"])
    assert "Furthest from their limits" in shown


@pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
def test_tune_keeps_what_load_uses(run_dir, tmp_path, capsys):
    model, file, rows = run_dir / "model.strata", tmp_path / "tune.json", tmp_path / "rows.json"
    argv = ["tune", str(model), "--bits", "1,4", "--repeats", "1", "--file", str(file), "--json", str(rows)]
    assert main(argv) == 0
    assert [row["bits"] for row in json.loads(rows.read_text())] == [1, 4]
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    x = np.zeros((2, *runtime.load(model).program.input_shape), np.uint8)
    for bits in (1, 4):
        tuned, plain = runtime.load(model, bits, tune=file), runtime.load(model, bits)
        np.testing.assert_array_equal(tuned.run_raw(x), plain.run_raw(x))
    assert main([*argv, "--repeats", "0"]) == 1
    assert "--threads and --repeats must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(not runtime.available_isas(), reason="the engine is not built")
def test_demo_upgrades_one_artifact(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        loading, "load_data", lambda name, root, split: first_images(bs.data.load(name, root, split), 96)
    )
    assert main(["demo", "--out", str(tmp_path), "--float-epochs", "1", "--epochs", "1", "--threads", "1"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["bits"] for row in rows] == [1, 2, 3, 4]
    total = sum(file.stat().st_size for file in (tmp_path / "digits.strata").iterdir())
    assert rows[-1]["bytes_fetched"] == total == sum(row["bytes_added"] for row in rows)
    for row in rows:
        assert row["layers_differing_from_reference"] == 0
        assert row["top1_agreement"] >= 0.95
        assert row["latency_ms"] > 0
    assert (tmp_path / "accuracy_vs_bytes.png").read_bytes().startswith(b"\x89PNG")
    assert "one artifact, upgraded in place" in capsys.readouterr().out


def test_a_chain_with_a_float_teacher_and_sampled_precisions(tmp_path: Path) -> None:
    out = tmp_path / "chain"
    options = ["--chain", "4", "--teacher", "float", "--sampling", "pair", "--train-limit", "96", "--epochs", "2"]
    assert main([*TRAIN, *options, "--out", str(out)]) == 0
    events = read(out / "metrics.jsonl")
    assert list(dict.fromkeys(event["run"] for event in events)) == ["float", "chain-0-4", "joint"]
    evaluations = {event["run"]: set(event["accuracy"]) for event in events if event["event"] == "eval"}
    assert evaluations == {"float": {"float"}, "chain-0-4": {"4"}, "joint": {"1", "2", "4"}}
    assert json.loads((out / "results.json").read_text())["verify"]["ok"] is True
    (out / "results.json").unlink()
    weights = (out / "model.strata" / "manifest.json").read_bytes()
    assert main([*TRAIN, *options, "--out", str(out)]) == 0  # from the checkpoints of all three stages
    assert (out / "model.strata" / "manifest.json").read_bytes() == weights


def test_a_papers_recipe_on_its_network(tmp_path: Path) -> None:
    """MaQD on its VGG: float form, quantized training with the paper's objective, artifact, evaluation."""
    out = tmp_path / "maqd"
    argv = [
        *("train", "--data", "digits", "--model", "maqd_vgg", "--model-set", "width=4", "--recipe", "maqd"),
        *("--set", "m_w=15", "m_a=4", "--float-epochs", "1", "--epochs", "1", "--train-limit", "300", "--test-limit"),
        *("100", "--verify-images", "8", "--paper-schedule", "--threads", "1", "--out", str(out)),
    ]
    assert main(argv) == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["bits"] for row in results["rows"]] == [4]
    assert main(["eval", str(out), "--stage", "float"]) == 0
    assert main(["info", str(out / "model.strata")]) == 0


def test_what_cannot_be_lowered_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "float_edges"
    argv = [
        *("train", "--data", "digits", "--model", "digits_resnet", "--recipe", "uniq", "--set", "edges=float"),
        *("--float-epochs", "1", "--epochs", "1", "--train-limit", "300", "--test-limit", "100", "--threads", "1"),
        *("--out", str(out)),
    ]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "trains and evaluates, without an artifact: lower: Conv2d 'conv1' is in float" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["no_artifact"].startswith("lower: ")
    assert [set(row) for row in results["rows"]] == [{"bits", "float_accuracy", "fake_accuracy"}]
    assert not (out / "model.strata").exists()
    assert main(argv) == 0  # complete: shown, not repeated
    assert "no artifact: " in capsys.readouterr().out
    assert main(["eval", str(out)]) == 0
