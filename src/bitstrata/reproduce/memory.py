"""Memory that a training step keeps for its backward pass, by batch size (MaQD, figure 3 right)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data import Dataset, Loader
from ..prepare import float_form_, quantize_, saved_memory
from .config import recipe_of

if TYPE_CHECKING:
    from .execute import Run


def kept_memory(run: Run, train: Dataset) -> dict[str, float]:
    """{"kept_mb": what autograd keeps of one forward pass in training mode at train.batch_size, in 2^20 bytes}.

    Counted, not sampled: every tensor that is saved for the backward pass, parameters left out.
    """
    config = run.config
    batch = int(config["train"]["batch_size"])
    model = run.network(train)
    example = Loader(train, 2, train=False).batch(0, 0)[0]
    if config["recipe"]["name"] != "float":
        recipe = recipe_of(config)
        float_form_(model, recipe, example)
        if config["quantize"]:
            quantize_(model, recipe, example)
    x = Loader(train, batch, train=False).batch(0, 0)[0]
    return {"kept_mb": saved_memory(model.train(), x).total / 2**20}
