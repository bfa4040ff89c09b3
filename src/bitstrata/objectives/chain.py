"""Warm start chains: float, then one quantized network after the other, each from the weights of the one before."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..prepare.calibrate import calibrate_
from ..prepare.precision import precisions
from ..prepare.quantize import Pixels, quantize_
from ..recipes.base import Recipe
from .schemes import warm_start_


@dataclass(frozen=True)
class ChainStage:
    """One network of a chain, to be trained before the next is asked for.

    model: quantized by `recipe`, in training mode if the float network was. number: from 0.
    """

    model: nn.Module
    recipe: Recipe
    number: int

    @property
    def name(self) -> str:
        """'0-4' for the first stage at 4 bits, '2-1-2' for the third at 1 and 2 bits."""
        return "-".join(map(str, (self.number, *self.recipe.precisions)))


def warm_start_chain(
    model: nn.Module,
    recipes: Sequence[Recipe],
    example: Tensor,
    batches: Iterable[Tensor],
    *,
    input: Pixels | None = None,
) -> Iterator[ChainStage]:
    """Stages of float -> recipes[0] -> recipes[1] -> ..., such as 4, 2 and then 1 bit; the last one is the result.

    Each stage is a copy of the float network, quantized; from the second on, weights, biases and normalizations are
    those that the stage before was left with (`warm_start_`; of several precisions, the narrowest one's
    normalizations). Steps are never taken over: those of weights are set by the quantizer's rule for the weights as
    they are, those of activations by calibration. A network teaching every stage is given to whatever trains it.

        widths = [bs.recipes.strata(w=(b,)) for b in (4, 2, 1)]
        for stage in warm_start_chain(model, widths, example, [example]):
            Trainer(stage.model, TrainConfig(lr=0.01), loader, teacher=model, name=stage.name).fit()

    Source: UniQ (Pham et al., section 5.1), 1 bit from 2 bits.

    Args:
        model: a float network in the form that the recipes quantize (`float_form_`); it stays as it is.
        recipes: one a stage.
        example, input: as of `quantize_`.
        batches: inputs that set the activation steps, as of `calibrate_`.

    Yields:
        `ChainStage`, one a recipe.

    Raises:
        ValueError: a quantized model, no recipes, or a recipe that trains in integers, which has no steps.
    """
    if precisions(model):
        raise ValueError("warm_start_chain: the model is quantized already; a chain starts from a float network")
    if not recipes:
        raise ValueError("warm_start_chain: recipes must name at least one stage")
    for recipe in recipes:
        if recipe.integers:
            raise ValueError(f"warm_start_chain: recipe {recipe.name!r} trains in integers, which has no warm start")
    return _stages(model, recipes, example, list(batches), input)


def _stages(
    model: nn.Module, recipes: Sequence[Recipe], example: Tensor, batches: list[Tensor], input: Pixels | None
) -> Iterator[ChainStage]:
    before: nn.Module | None = None
    for number, recipe in enumerate(recipes):
        present = copy.deepcopy(model)
        quantize_(present, recipe, example, input=input)
        if before is not None:
            warm_start_(present, before.state_dict())
        calibrate_(present, batches)
        yield ChainStage(present, recipe, number)
        before = present
