"""The way from data to a verified artifact, shared by `train` and `quantize` (torch side); its end is in outcome.py.

Stages: float -> quantize, calibrate -> joint -> lower, pack -> measure. Each stage that has finished is skipped when
the command is given again; the training stages resume from their checkpoints. Launched as several processes, all train,
and the first alone writes files and does what comes after.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitstrata as bs
from bitstrata.cli import factories, loading, outcome
from bitstrata.cli.common import (
    CommandError,
    output,
    parse_floats,
    read_json,
    write_json,
)
from bitstrata.cli.options import FREE, RunOptions, resolved
from bitstrata.cli.quantize import Quantize
from bitstrata.cli.saved import FROZEN
from bitstrata.cli.stages import chain_stages, diagnosis, float_config, joint_config
from bitstrata.cli.train import Train
from bitstrata.cli.weights import load_weights
from bitstrata.cli.work import Run
from bitstrata.data import Dataset, Loader
from bitstrata.lowering import LowerError, UnsupportedError
from bitstrata.objectives import warm_start_
from bitstrata.train import (
    Level,
    TrainConfig,
    Trainer,
    checkpoint,
    evaluate,
    fit_chain,
    keep_freed_memory,
    quiet,
    reporter,
)
from bitstrata.train.checkpoint import seed_all
from bitstrata.train.distributed import first_process
from bitstrata.train.keeper import Keeper
from bitstrata.train.lock import DirectoryLock
from bitstrata.train.signals import StopsAtOnce

STAGES = ("float", "joint")
AGAIN = "stopped; the stages that are done are saved, run the same again to continue"


@StopsAtOnce(AGAIN)
def train_from_scratch(options: Train, out: Path) -> None:
    """`bitstrata train`."""
    with DirectoryLock(out) as lock:
        run = begin(options, out, lock)
        if run is None:
            return
        seed_all(options.seed)
        model = loading.make_model(options.model, run.train, options.model_set)
        factories.check_network(model, run.example, len(run.train.classes), f"--model {options.model}")
        refuse_unsupported(run, model)  # before the float form, whose parametrizations a copy would share
        bs.float_form_(model, loading.make_recipe(options), run.example)
        claim(run, lock)
        finish(run, model, float_stage(run, model, options))


@StopsAtOnce(AGAIN)
def quantize_checkpoint(options: Quantize, out: Path) -> None:
    """`bitstrata quantize`."""
    with DirectoryLock(out) as lock:
        run = begin(options, out, lock, mean=_numbers(options.mean, "--mean"), std=_numbers(options.std, "--std"))
        if run is None:
            return
        seed_all(options.seed)
        model = loading.make_model(options.model, run.train, options.model_set)
        load_weights(model, options.checkpoint, options.entry)
        factories.check_network(model, run.example, len(run.train.classes), f"--model {options.model}")
        refuse_unsupported(run, model)
        claim(run, lock)
        accuracy = run.timed("float", lambda: evaluate(model, run.loader(False).epoch(0)))["float"]
        if first_process():
            print(f"float accuracy of {options.checkpoint}: {accuracy:.2%}", flush=True)
        finish(run, model, accuracy)


def begin(options: RunOptions, out: Path, lock: DirectoryLock, **statistics: tuple[float, ...] | None) -> Run | None:
    """Check the options and open the data; None when the run is already complete."""
    bits = check(options)
    if out.is_dir() and first_process():
        lock.take()
    if options.fresh and out.exists() and first_process():
        for name in ("config.json", "results.json", "metrics.jsonl", "joint.layers.json", FROZEN):
            (out / name).unlink(missing_ok=True)
        for stage in STAGES:
            Keeper(out, stage, options.keep).clear()
        for path in out.glob("chain-*.ckpt"):
            path.unlink()
    saved = out / "config.json"
    if saved.exists() and not options.fresh:
        check_same_options(saved, read_json(saved), resolved(options))
        if (out / "results.json").exists():
            if first_process():
                print(f"{out} is complete; --fresh starts over")
                outcome.print_results(output(), read_json(out / "results.json"))
            return None
    train, test = (
        loading.load_data(options.data, options.root, split, limit, options=options.data_set, **statistics)
        for split, limit in (("train", options.train_limit), ("test", options.test_limit))
    )
    check_splits(options.data, train, test)
    loading.augmentation(options.data, train, options.augment)
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    return Run(options, out, bits, train, test)


def check(options: RunOptions) -> tuple[int, ...]:
    """Check every option that can be checked without data; returns the bit-widths."""
    recipe = loading.make_recipe(options)
    joint_config(options, recipe)
    diagnosis(options, recipe)
    chain_stages(options)
    if isinstance(options, Train):
        float_config(options)
    return recipe.precisions


def check_splits(name: str, train: Dataset, test: Dataset) -> None:
    """Raise CommandError if the test set is not of the training set's kind."""
    if train.shape != test.shape or type(train) is not type(test):
        kinds = ", ".join(f"{type(data).__name__} of shape {data.shape}" for data in (train, test))
        raise CommandError(f"--data {name}: training and test set differ: {kinds}")
    largest = int(test.labels.max())
    if largest >= len(train.classes):
        known = f"0..{len(train.classes) - 1}"
        raise CommandError(f"--data {name}: the test set has label {largest}, the training set {known}")


def refuse_unsupported(run: Run, model: nn.Module) -> None:
    """Raise CommandError naming every operation of a network that has no integer form, unless --no-artifact is given.

    What the recipe itself leaves in float is no reason: such a run evaluates, and says that it has no artifact.
    """
    if not run.options.artifact:
        return
    recipe = loading.make_recipe(run.options)
    trial = copy.deepcopy(model)
    few = Loader(run.train, min(8, len(run.train)), train=True, seed=run.options.seed, prefetch=False).batch(0, 0)[0]
    bs.quantize_(trial, recipe, run.example, input=loading.input_grid(recipe, run.train))
    if not recipe.integers:
        bs.calibrate_(trial, [few])
    try:
        bs.lower(bs.freeze_(trial, [few]) if recipe.integers else trial, run.example)
    except UnsupportedError as error:
        raise CommandError(f"{error} (--no-artifact trains and evaluates it all the same)") from error
    except LowerError:
        return  # a matter of the recipe, or of numbers, which training changes


def claim(run: Run, lock: DirectoryLock) -> None:
    """Make the output directory this run's, once its inputs have proved good."""
    assert run.out is not None
    if first_process():
        lock.take()
        write_json(run.out / "config.json", resolved(run.options))


def check_same_options(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise CommandError if a run with other options lies in the output directory."""
    changes = [
        f"{name.replace('_', '-')}: {saved.get(name)!r} there, {current.get(name)!r} now"
        for name in sorted((saved.keys() | current.keys()) - FREE)
        if saved.get(name) != current.get(name)
    ]
    if changes:
        raise CommandError(f"{path} is of another run ({'; '.join(changes)}); use another --out, or --fresh")


def stage_trainer(
    run: Run, model: nn.Module, config: TrainConfig, name: str, teacher: nn.Module | None = None, **looking: Any
) -> Trainer:
    """The trainer of a stage, on the run's data, directory and display."""
    options = run.options
    display = quiet if options.quiet else reporter
    return Trainer(
        model, config, run.loader(True), run.loader(False), run.out,
        teacher=teacher, name=name, reporter=display, tensorboard=options.tensorboard, **looking,
    )  # fmt: skip


def float_stage(run: Run, model: nn.Module, options: Train) -> float:
    """Train a float network; returns its accuracy in float32."""
    trainer = stage_trainer(run, model, float_config(options), "float")
    run.timed("float", lambda: trainer.fit(allow_inexact=options.allow_inexact))
    model.cpu()  # accelerate may have moved it; what comes next is done here
    return float32_accuracies(run, model)["float"]


def joint_stage(run: Run, model: nn.Module) -> dict[Level, float]:
    """Quantize a float network in place and train all precisions; returns their accuracies in float32."""
    teacher = copy.deepcopy(model) if run.options.teacher else None
    quantized(run, model, start=chained(run, model, teacher))
    run.refusal = refusal(run, model)
    if run.refusal is not None and first_process():
        print(f"trains and evaluates, without an artifact: {run.refusal}", flush=True)
    recipe = loading.make_recipe(run.options)
    live = diagnosis(run.options, recipe)
    trainer = stage_trainer(run, model, joint_config(run.options, recipe), "joint", teacher, callbacks=live)
    run.timed("joint", lambda: trainer.fit(allow_inexact=run.options.allow_inexact))
    if live and first_process():
        print(f"diagnosis: {live[0].cost}", flush=True)
    model.cpu()
    if not integers(run):
        return float32_accuracies(run, model)
    bs.freeze_(model, calibration(run))
    if run.out is not None and first_process():
        checkpoint.save(run.out / FROZEN, {"model": model.state_dict()})
    return {run.bits[0]: float32_accuracies(run, model)["float"]}


def integers(run: Run) -> bool:
    """Whether the network trains in integers, with ranges that are frozen after it."""
    return loading.make_recipe(run.options).integers


def calibration(run: Run) -> list[Tensor]:
    """Training batches without augmentation, for the first step sizes or for frozen ranges."""
    plain = Loader(run.train, run.options.batch_size, train=True, seed=run.options.seed, prefetch=False)
    return [plain.batch(0, step)[0] for step in range(min(run.options.calibration_batches, len(plain)))]


def float32_accuracies(run: Run, model: nn.Module) -> dict[Level, float]:
    """Accuracies in float32, whatever number format training and its own evaluations use."""
    if run.options.channels_last:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    return evaluate(model, run.loader(False).epoch(0))


def chained(run: Run, model: nn.Module, teacher: nn.Module | None) -> dict[str, Any] | None:
    """Train the stages of --chain from the float network; returns the state of the last one, None without a chain."""
    stages = chain_stages(run.options)
    if not stages:
        return None
    last = run.timed(
        "chain",
        lambda: fit_chain(
            model, stages, run.loader(True), run.loader(False), run.out, example=run.example, batches=calibration(run),
            input=loading.input_grid(stages[0][0], run.train), teacher=teacher,
        ),
    )  # fmt: skip
    return last.state_dict()


def quantized(run: Run, model: nn.Module, start: Mapping[str, Any] | None = None) -> nn.Module:
    """Quantize in place, take over the state of another width if there is one, and set the first step sizes."""
    recipe = loading.make_recipe(run.options)
    bs.quantize_(model, recipe, run.example, input=loading.input_grid(recipe, run.train))
    if start is not None:
        warm_start_(model, start)
    if not recipe.integers:
        bs.calibrate_(model, calibration(run))
    return model


def refusal(run: Run, model: nn.Module) -> str | None:
    """Why the quantized network has no integer program, asked before it is trained; None if it has one."""
    try:
        bs.lower(bs.freeze_(copy.deepcopy(model), calibration(run)) if integers(run) else model, run.example)
    except LowerError as error:
        return str(error)
    return None


def finish(run: Run, model: nn.Module, float_accuracy: float) -> None:
    """From a float network to results.json."""
    fake = joint_stage(run, model)
    if first_process():
        outcome.write(run, model, float_accuracy, fake)


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    return None if text is None else parse_floats(text, option)
