"""Diagnostics while a network trains: a callback of the Trainer that measures now and then, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..objectives import losses_of_a_step
from ..train import Callback, Moment
from ..train.objective import JointObjective, Objective
from .measure import Measurement, check_images, check_what, measure, network_of, not_finite, rounded
from .signal import CodeFlips

PASSED_ON = ("loss", "distill", "distill_weight", "teacher", "amp")


class Live(Callback):
    """Measures a run before its first step, after every `every` steps and after the last one.

        live = bs.diagnostics.Live(every=100, what=("sqnr", "steps", "flips", "moo"))
        bs.Trainer(model, config, batches, out_dir="runs/x", callbacks=[live]).fit()
        live.milliseconds  # {"signals": 41.0, "flips": 1.2, "moo": 160.3}, the mean of a measurement

    Each measurement is an event `diagnosis` of metrics.jsonl, which `bitstrata report` draws: "layers" and "whole" as
    in `Measurement`, of five digits; "since", the step of the measurement before, which "flips" compares with; and
    "ms", milliseconds of each group. It is made on the batch of the step that comes next, at every precision. The
    network, its gradients, the optimizer and all random streams are as before afterwards: a run ends in the same bits
    with and without it. Flips go on across a resume, for a checkpoint holds the codes of the last look (one byte a
    weight). Where weights are not finite there is a "reason" and no number.

    Factors and norms of "moo" are those of the losses that the trainer's joint objective has, distillation included;
    with an objective of one's own, of `loss`.

    Args:
        every: steps between measurements, at least 1.
        what: among sqnr, steps, deviation, clipping, nonzero, flips, kappa, ratio, gradient, moo (`measure` says what
            they are); None for all that the network has.
        images: of the batch that signals are taken on; None for all. Gradients take the whole batch.
        loss: called with (logits, targets), gives one number; None for the objective's, or cross entropy if that is
            one's own.

    Raises:
        ValueError: every or images below 1; when training begins, what the network does not have.
    """

    name = "diagnostics"

    def __init__(
        self,
        every: int = 100,
        what: Iterable[str] | None = None,
        *,
        images: int | None = 32,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Live: every must be at least 1 step, got {every!r}")
        check_images("Live", images)
        self.every = every
        self.what = what if what is None or isinstance(what, str) else tuple(what)
        self.images = images
        self.loss = loss
        self.measurements = 0
        self._seconds: dict[str, float] = {}
        self._flips: CodeFlips | None = None
        self._since: int | None = None
        self._saved: Mapping[str, Any] = {}

    @property
    def milliseconds(self) -> dict[str, float]:
        """Mean wall time of a measurement in this process, by group; {} before the first one."""
        return {group: 1000 * seconds / self.measurements for group, seconds in self._seconds.items()}

    @property
    def cost(self) -> str:
        """What it took in this process, in words."""
        parts = ", ".join(f"{group} {ms:.1f}" for group, ms in self.milliseconds.items())
        whole = sum(self.milliseconds.values())
        return f"{self.measurements} measurements of {whole:.1f} ms ({parts})" if self.measurements else "none made"

    def begin(self, model: nn.Module, objective: Objective) -> None:
        self.wanted = check_what("Live", model, self.what)
        self._flips, self._since, self._saved = None, None, {}

    def due(self, step: int, total: int) -> bool:
        return step % self.every == 0 or step == total

    def look(self, moment: Moment) -> None:
        network = network_of(moment.model)
        bad = not_finite(network)
        if bad is not None:
            moment.write("diagnosis", layers={}, whole={}, ms={}, reason=f"{bad!r} is not finite")
            return
        found = self._measured(moment)
        if "flips" in self.wanted:
            begun = time.perf_counter()
            self._count_flips(network, found)
            found.seconds["flips"] = time.perf_counter() - begun
        self.measurements += 1
        for group, seconds in found.seconds.items():
            self._seconds[group] = self._seconds.get(group, 0.0) + seconds
        ms = {group: round(1000 * seconds, 2) for group, seconds in found.seconds.items()}
        since = {} if self._since is None else {"since": self._since}
        moment.write("diagnosis", layers=rounded(found.layers), whole=rounded(found.whole), **since, ms=ms)
        self._since = moment.step

    def _measured(self, moment: Moment) -> Measurement:
        others = [name for name in self.wanted if name != "flips"]
        if not others:
            return Measurement()
        batch, loss, losses = (moment.inputs, moment.targets), self.loss or F.cross_entropy, None
        if isinstance(moment.objective, JointObjective) and self.loss is None:
            options = {name: moment.objective.options[name] for name in PASSED_ON if name in moment.objective.options}
            loss = options.get("loss", loss)
            if "moo" in others:
                losses = losses_of_a_step(network_of(moment.model), *batch, **options)
        return measure(moment.model, batch, others, loss=loss, losses=losses, images=self.images)

    def _count_flips(self, network: nn.Module, found: Measurement) -> None:
        if self._flips is None:
            self._flips = CodeFlips(network)
            if "codes" not in self._saved:
                return
            self._flips.load_state(self._saved["codes"])
        planes: dict[int, dict[str, float | None]] = {}
        for layer, shares in self._flips.update().items():
            for plane, share in enumerate(shares, 1):
                planes.setdefault(plane, {})[layer] = share
        for plane, of_layers in planes.items():
            found.add("flips", plane, of_layers)

    def state(self) -> dict[str, Any]:
        """The step and the codes of the last look."""
        if self._since is None:
            return {}
        codes = {} if self._flips is None else {"codes": self._flips.state()}
        return {"since": self._since, **codes}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._since, self._saved, self._flips = state["since"], state, None
