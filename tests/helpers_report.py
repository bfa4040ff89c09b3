"""Run directories for the report, written without training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

BITS = (1, 2, 4)
PARTS = {"data": 0.1, "forward": 0.3, "backward": 0.4, "optimizer": 0.05, "evaluation": 0.1, "checkpoint": 0.01}


def options(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """config.json of a run."""
    fixed = {"model": "digits_cnn", "data": "digits", "recipe": "strata", "bits": "1,2,4", "out": f"runs/{seed}"}
    return {**fixed, "float_epochs": 2, "epochs": 3, "lr": 0.05, "batch_size": 32, "set": [], "seed": seed, **changes}


def events(seed: int = 0, joint_epochs: int = 3) -> list[dict[str, Any]]:
    """metrics.jsonl of a run: two float epochs, then `joint_epochs` of three."""
    found = []
    for stage, epochs, levels in (("float", 2, ["float"]), ("joint", joint_epochs, [str(b) for b in reversed(BITS)])):
        for epoch in range(epochs):
            place = {"run": stage, "step": 10 * (epoch + 1), "epoch": epoch}
            share = {level: 0.9 - 0.1 / (epoch + 1) - 0.01 * i + 0.001 * seed for i, level in enumerate(levels)}
            loss = {level: 1.5 / (epoch + 1) + 0.1 * i for i, level in enumerate(levels)}
            found.append({**place, "event": "step", "lr": 0.05, "loss": loss})
            found.append({**place, "event": "epoch", "images_per_s": 900.0, "loss": loss, "accuracy": share})
            found.append({**place, "event": "eval", "accuracy": {k: v - 0.02 for k, v in share.items()}})
            if stage == "joint":
                steps = {str(b): {"weight": [0.1 / b + 0.01 * epoch], "input": [0.2]} for b in BITS}
                found.append({**place, "event": "grids", "layers": {"stem": steps, "block.conv": steps}})
                found += [diagnosis({**place, "step": 10 * epoch + step}, seed) for step in (0, 5)]
            found.append({**place, "event": "time", "steps": 10, "wall": 1.0, "seconds": PARTS})
    return found


def diagnosis(place: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """A measurement while training; the stem is the same at every precision."""
    t = 1 + place["step"] / 10 + 0.1 * seed

    def table(base: float) -> dict[str, Any]:
        return {str(b): {"stem": base * t, "block.conv": base * t / b} for b in BITS}

    names = ("weight_sqnr", "input_sqnr", "weight_step", "input_step", "weight_deviation", "input_deviation")
    shares = ("weight_clipped", "input_clipped", "weight_nonzero", "input_nonzero", "variance_ratio")
    by_layer = {name: table(5.0) for name in names} | {name: table(0.1) for name in shares}
    by_layer |= {"gradient_variance": table(1e-4), "kappa1": table(2.0)}
    flips = {str(plane): {"stem": 0.01 * plane / t, "block.conv": 0.02 * plane / t} for plane in (1, 2, 3, 4)}
    whole = {name: {str(b): t / b for b in BITS} for name in ("moo_norm", "kappa0")}
    whole |= {name: {str(b): 0.2 * b for b in BITS} for name in ("moo_factor", "R_w", "R_a")}
    whole["moo_cosine"] = {"2-1": 0.5, "4-1": 0.25 * t, "4-2": -0.125}
    ms = {"signals": 30.0, "rules": 20.0, "moo": 9.0, "flips": 1.0}
    layers = {**by_layer, **({"flips": flips} if place["step"] else {})}
    return {**place, "event": "diagnosis", "layers": layers, "whole": whole, "ms": ms}


def layers() -> dict[str, Any]:
    """joint.layers.json of a run."""
    views = {}
    for bits in BITS:
        levels = [0.1 * (c + 0.5) for c in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        views[str(bits)] = {
            "bits": bits,
            "unit": "value",
            "range": [-1.0, 1.0],
            "counts": [1, 5, 9, 5, 1],
            "levels": levels,
            "used": [1 / len(levels)] * len(levels),
            "step": [0.1],
            "input": {"quantizer": "UniqActivation", "step": [0.2], "codes": [0, 2**bits - 1]},
        }
    shared = {"kind": "Conv2d", "shape": [4, 3, 3, 3], "quantizer": "NestedSymmetric", "precisions": views}
    return {
        "step": 30,
        "epoch": 2,
        "layers": [
            {"name": "stem", "edge": True, **copy.deepcopy(shared)},
            {"name": "block.conv", "edge": False, **copy.deepcopy(shared)},
        ],
    }


def results(seed: int = 0) -> dict[str, Any]:
    """results.json of a run."""
    rows = [
        {
            "bits": bits,
            "float_accuracy": 0.95,
            "fake_accuracy": 0.8 + 0.02 * bits + 0.01 * seed,
            "engine_accuracy": 0.8 + 0.02 * bits + 0.01 * seed,
            "top1_agreement": 1.0,
            "bytes": 1000 * bits + 500,
            "images": 60,
        }
        for bits in BITS
    ]
    return {
        "rows": rows,
        "verify": {"ok": True, "images": 16, "report": "verified 16 inputs\nfirst difference: none"},
        "seconds": {"float": 2.0, "joint": 3.0, "verify": 0.5},
        "seed": seed,
        "executor": "engine",
        "isa": "avx2",
        "cpu": "Processor",
        "cores": 2,
        "versions": {"python": "3.11", "torch": "2"},
        "commit": "abc",
    }


SIGNAL = {"sqnr": 12.34, "step": 0.1, "deviation": 1.0, "clipped": 0.25, "nonzero": 0.5, "lo": 0, "counts": [1, 0, 3]}
LAYERS = {"conv<1>": {"weight": SIGNAL, "input": None}, "fc": {"weight": {**SIGNAL, "sqnr": None}, "input": SIGNAL}}
RULE = {"kappa1": 3.456, "ratio": 0.875, "gradient": 2e-5}
RULES = {"text": "Rule I holds\nRule II is broken", "layers": {"fc": RULE, "conv<1>": {"kappa1": None}}}
GEOMETRY = {"precisions": [1, 4], "losses": [2.0, 1.0], "norms": [0.5, 0.25], "factors": [0.75, 0.25]}
ZEROS = {"R_w": 0.625, "R_a": 0.375}
RANGES = {"largest": 0.5, "counts": [1, 6, 1], "ranges": [1.0, 0.4, 0.0], "groups": [0, 1, 3]}
GRADIENTS = {"conv<1>": {**RANGES, "diversity": 1.75, "grouped": 1.13}, "fc": {**RANGES, "diversity": 9, "grouped": 3}}
READING = {"norm": 12.0, "gap": 0.001, "relative": 0.0123}
NORMS = {"bn<1>": {"channels": 3, "count": 64, "l1": READING, "l2": {**READING, "norm": 2.0, "relative": 0.25}}}
LANDSCAPE = {"axis": [-1.0, 0.0, 1.0], "loss": [[3.0, 2.0, 3.5], [2.5, 1.25, None], [3.0, 2.0, 4.0]]}
INSPECTED = {
    "precisions": {"4": {"signals": LAYERS, "rules": RULES, "nonzero": ZEROS}},
    "objectives": GEOMETRY,
    "gradients": GRADIENTS,
    "normalizations": NORMS,
    "landscape": LANDSCAPE,
}
PLANNED = {"rows": [{"name": "plan-2bits", "bits": 2.0, "bytes": 2048, "accuracy": 0.875}, {"name": "broken"}]}


def write_run(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A complete run of the given seed; `changes` are options."""
    directory.mkdir(parents=True)
    write_unfinished(directory, seed, 3, **changes)
    (directory / "results.json").write_text(json.dumps(results(seed)))
    (directory / "inspect.json").write_text(json.dumps(INSPECTED))
    (directory / "plans.json").write_text(json.dumps(PLANNED))
    (directory / "joint.layers.json").write_text(json.dumps(layers()))
    return directory


def write_unfinished(directory: Path, seed: int = 0, joint_epochs: int = 1, **changes: Any) -> Path:
    """A run that has come as far as `joint_epochs` of three, without results."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(options(seed, **changes)))
    lines = [json.dumps(event) for event in events(seed, joint_epochs)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory
