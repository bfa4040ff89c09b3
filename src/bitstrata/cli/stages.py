"""Training configurations of the stages of `train` and `quantize`, from the command's options (torch side)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from bitstrata.cli import loading
from bitstrata.cli.common import CommandError, choose, parse_bits
from bitstrata.cli.options import RunOptions
from bitstrata.cli.train import Train
from bitstrata.diagnostics import Live
from bitstrata.diagnostics.measure import WHAT
from bitstrata.recipes import Recipe
from bitstrata.train import TrainConfig


def stage_config(options: RunOptions, **changes: Any) -> TrainConfig:
    """Training configuration of a stage: the shared options and what differs."""
    shared: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "epochs", "lr", "weight_decay", "warmup", "optimizer", "batch_size", "label_smoothing", "clip_grad", "amp",
            "channels_last", "seed", "threads", "checkpoint_every", "log_every", "eval_every", "keep", "on_nonfinite",
        )
    }  # fmt: skip
    return TrainConfig(**{**shared, "distill": None, **changes})


def joint_config(options: RunOptions, recipe: Recipe) -> TrainConfig:
    """Training configuration of the quantized stage: the recipe's objective, the options' schedule."""
    kept = {"epochs", "batch_size"} if options.paper_schedule else set(asdict(recipe.schedule))
    fields = {name: value for name, value in recipe.training.items() if name not in kept}
    if fields.get("warmup", 0) > options.epochs:
        raise CommandError(
            f"--paper-schedule: {fields['warmup']:g} epochs of warm-up do not fit --epochs {options.epochs}"
        )
    fields["distill"] = recipe.objective.distill if options.distill else None
    if options.teacher and (fields["distill"] is None or recipe.integers):
        raise CommandError(f"--teacher {options.teacher}: recipe {recipe.name!r} as given here does not distil")
    fields["sampling"] = options.sampling or recipe.objective.sampling
    fields["fused"] = options.fused
    return stage_config(options, **fields)


def float_config(options: Train) -> TrainConfig:
    """Training configuration of the float stage."""
    return stage_config(options, epochs=options.float_epochs, lr=options.float_lr, warmup=options.float_warmup)


def diagnosis(options: RunOptions, recipe: Recipe) -> list[Live]:
    """The callback of --diagnose, for a network of this recipe; none without the option."""
    if options.diagnose is None:
        return []
    if options.diagnose_every < 1:
        raise CommandError(f"--diagnose-every: must be at least 1 step, got {options.diagnose_every}")
    if recipe.integers:
        raise CommandError(f"--diagnose: recipe {recipe.name!r} trains in integers, which has no fake-quantized layers")
    names = [name.strip() for name in options.diagnose.split(",")]
    for name in names:
        choose(name, [*WHAT, "all"], "--diagnose")
    if "moo" in names and len(recipe.precisions) < 2:
        raise CommandError("--diagnose moo: is about several precisions, and --bits names one")
    return [Live(options.diagnose_every, None if "all" in names else names)]


def chain_stages(options: RunOptions) -> list[tuple[Recipe, TrainConfig]]:
    """Recipe and training of the stages of --chain, in turn."""
    stages = []
    for text in (options.chain or "").split(",") if options.chain is not None else []:
        single = replace(options, bits=str(parse_bits(text, "--chain")[0]))
        recipe = loading.make_recipe(single)
        if recipe.integers:
            raise CommandError(f"--chain: recipe {recipe.name!r} trains in integers, which has no warm start")
        stages.append((recipe, joint_config(single, recipe)))
    return stages
