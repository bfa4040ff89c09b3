"""Looking on while a Trainer trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitstrata.train.objective import Objective


@dataclass(frozen=True)
class Moment:
    """A run between two steps.

    Attributes:
        model: the network as the Trainer was given it, in training mode.
        inputs, targets: the batch of the step that comes next, on the network's device; after the last step, of that.
        step: steps that are done. epoch: epochs that are done. total: steps of the whole run.
        objective: what makes gradients.
        write: appends an event to the run's metrics, `write("name", key=value)` with JSON values; the fields "run",
            "step" and "epoch" are added.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    step: int
    epoch: int
    total: int
    objective: Objective
    write: Callable[..., None]


class Callback:
    """Called by a Trainer before each step that is `due`, and after the last one. Does nothing by itself.

    What it writes is cut back like the run's other events when a run continues from a checkpoint. With several ranks it
    is called on the first alone, with this rank's share of the batch. A callback that is only to look has to leave the
    network, its modes and all random generators as they were; `bitstrata.diagnostics.kept` does so.
    """

    #: Its entry in checkpoints; the class's name if empty.
    name = ""

    def begin(self, model: nn.Module, objective: Objective) -> None:
        """Called when `fit` begins, before anything is trained: the place for errors."""

    def due(self, step: int, total: int) -> bool:
        """Whether to look when `step` of `total` steps are done."""
        return True

    def look(self, moment: Moment) -> None:
        """Look at the run."""

    def state(self) -> dict[str, Any]:
        """What a continued run has to know, as a checkpoint can hold it; {} for nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; not called where a checkpoint holds nothing."""


class Callbacks:
    """Those of a run, under the names that checkpoints know them by.

    Raises:
        TypeError: something that is no Callback. ValueError: two of one name.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.named: dict[str, Callback] = {}
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(
                    f"Trainer: callbacks must be of bitstrata.train.Callback, got {type(callback).__name__}"
                )
            name = callback.name or type(callback).__name__
            if name in self.named:
                raise ValueError(f"Trainer: two callbacks are called {name!r}; give one of them another name")
            self.named[name] = callback

    def begin(self, model: nn.Module, objective: Objective) -> None:
        """Tell all that training begins."""
        for callback in self.named.values():
            callback.begin(model, objective)

    def due(self, step: int, total: int) -> list[Callback]:
        """Those that want to look now."""
        return [callback for callback in self.named.values() if callback.due(step, total)]

    def add_to(self, checkpoint: dict[str, Any]) -> None:
        """Put what they have to know into a checkpoint, if there is anything."""
        states = {name: state for name, callback in self.named.items() if (state := callback.state())}
        if states:
            checkpoint["callbacks"] = states

    def take_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Give back what `add_to` put there, to those that are still there."""
        for name, state in checkpoint.get("callbacks", {}).items():
            if name in self.named:
                self.named[name].load_state(state)
