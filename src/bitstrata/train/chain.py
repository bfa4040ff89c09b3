"""Training of warm start chains, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from bitstrata.objectives import warm_start_chain
from bitstrata.prepare import Pixels
from bitstrata.recipes import Recipe
from bitstrata.train.config import TrainConfig
from bitstrata.train.source import Batch, BatchSource
from bitstrata.train.trainer import Trainer


def fit_chain(
    model: nn.Module,
    stages: Sequence[tuple[Recipe, TrainConfig]],
    train_loader: BatchSource | Iterable[Batch],
    eval_loader: BatchSource | Iterable[Batch] | None = None,
    out_dir: str | Path | None = None,
    *,
    example: Tensor,
    batches: Iterable[Tensor],
    input: Pixels | None = None,
    teacher: nn.Module | None = None,
    name: str = "chain",
) -> nn.Module:
    """Train a `warm_start_chain` and return its last network; the float `model` stays as it is.

    Each stage has a checkpoint of its own in `out_dir`, NAME-NUMBER-WIDTHS.ckpt, so that the same call continues after
    an interruption, bit for bit.

    Args:
        model, example, batches, input: as of `warm_start_chain`.
        stages: recipe and training of each stage, in turn.
        train_loader, eval_loader, out_dir: as of `Trainer`.
        teacher: a network that every precision of every stage learns from, such as the float model; None for none but
            wider precisions of the same stage.

    Raises:
        ValueError: as of `warm_start_chain`; a teacher, and a stage without distillation.
    """
    if teacher is not None and any(config.distill is None for _, config in stages):
        raise ValueError("fit_chain: a teacher is given, but a stage has distill=None")
    result = model
    chain = warm_start_chain(model, [recipe for recipe, _ in stages], example, batches, input=input)
    for stage, (_, config) in zip(chain, stages, strict=True):
        device = next(stage.model.parameters()).device
        Trainer(
            stage.model,
            config,
            train_loader,
            eval_loader,
            out_dir,
            teacher=teacher,
            name=f"{name}-{stage.name}",
        ).fit()
        result = stage.model.to(device)  # accelerate may have moved it, and the next stage starts from the example
    return result
