"""What a recipe is, and the registry of recipes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..quantizers import registry as quantizers
from .sense import check
from .sense import one_of as _one_of


@dataclass(frozen=True)
class Part:
    """A registered quantizer (of a weight, activation or gradient), weight transform or rescaling, and its options.

    Their names are checked when the part is made.
    """

    name: str
    role: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        quantizers.check_options(self.name, self.role, self.options)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.name}({options})"


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    loss: "cross_entropy" or "maqd", (1 - gamma) CE + gamma MSE (MaQD eq. 9). distill: "cosine" or "kl" against a
    teacher, or None. teacher: "next" higher precision or "widest". combine: how several precisions make one gradient,
    "scalarization" or "mgd" (multiple-gradient descent). reduction: "mean" of the precisions' gradients or their "sum".
    sampling: the precisions of a step, "all", a "sandwich" of both ends and a random one between, or a "pair" of the
    widest and a random one.
    """

    loss: str = "cross_entropy"
    gamma: float = 0.05
    distill: str | None = None
    teacher: str = "next"
    combine: str = "scalarization"
    reduction: str = "mean"
    sampling: str = "all"

    def __post_init__(self) -> None:
        _one_of("Objective", "loss", self.loss, ("cross_entropy", "maqd"))
        _one_of("Objective", "distill", self.distill, ("cosine", "kl", None))
        _one_of("Objective", "teacher", self.teacher, ("next", "widest"))
        _one_of("Objective", "combine", self.combine, ("scalarization", "mgd"))
        _one_of("Objective", "reduction", self.reduction, ("mean", "sum"))
        _one_of("Objective", "sampling", self.sampling, ("all", "sandwich", "pair"))
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Objective: gamma must lie in 0..1, got {self.gamma}")

    def __str__(self) -> str:
        text = self.loss if self.loss == "cross_entropy" else f"{self.loss}(gamma={self.gamma})"
        if self.distill is not None:
            text += f" + {self.distill} distillation from the {self.teacher} precision"
        text += f", {self.reduction} over precisions by {self.combine}"
        return text if self.sampling == "all" else text + f", {self.sampling} sampling"


@dataclass(frozen=True)
class Schedule:
    """How the recipe's source trains the quantized network. Fields are those of `TrainConfig`, which documents them."""

    epochs: int = 90
    batch_size: int = 128
    lr: float = 0.01
    optimizer: str = "sgd"
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: str = "all"
    schedule: str = "cosine"
    warmup: float = 0.0
    warmup_start: float = 0.0
    warmup_lr: float | None = None

    def __str__(self) -> str:
        warmup = f", {self.warmup:g} epochs of warm-up" if self.warmup else ""
        return (
            f"{self.epochs} epochs of {self.batch_size}, {self.optimizer} lr {self.lr:g} {self.schedule}{warmup}, "
            f"weight decay {self.weight_decay:g} on {self.decay}"
        )


@dataclass(frozen=True)
class Recipe:
    """A composition of parts. Each field can be replaced with `dataclasses.replace`.

    precisions: ascending; a precision's number is the weight width of the inner layers at it.
    weight: quantizer of inner layers' weights. transform: what is done to a weight before it is quantized, or None.
        rescale: constant rescaling of the quantized weight, or None. per_channel: one weight step an output channel.
    activation: quantizer of inner layers' inputs; None keeps activations in float (weight-only).
    activation_bits: precision -> width of inner layers' inputs.
    gradient: quantizer of the layers' output gradients, from whose codes and those of weight and input the gradients of
        both are computed in integers; None leaves the backward pass in float. With weight and activation for layers
        that train in integers (role "integer"), `quantize_` is `integer_`.
    placement: "input" quantizes what a layer reads. "activation" lets the quantizer take the ReLU's place, before an
        average pooling that follows it.
    edges: first and last layer. "int8": `edge_weight` (a step an output channel if `edge_per_channel`) and
        `edge_activation` at `edge_bits` at every precision. "inner": as the inner layers, but for the network's input.
        "float": left in float, which cannot be lowered.
    last_input: the last layer reads codes of the "edge" grid or of the "inner" one. Only with edges="int8".
    own_edges: edge layers have weights of their own at every precision.
    downsample: "inner", or "float" to leave the 1x1 convolutions of shortcuts in float.
    norm: "batch", or "layer_batch" or "l1" to put layer-batch normalization or L1 batch normalization in the place of
        batch normalization; in integers also "l1_quantized" or "l2_quantized", with every tensor of it in 8 bits.
    norm_levels: "individual" statistics and affine a precision, individual "statistics" only, or all "shared".
    """

    name: str
    description: str
    precisions: tuple[int, ...]
    weight: Part
    activation: Part | None
    activation_bits: Mapping[int, int]
    transform: Part | None = None
    rescale: Part | None = None
    gradient: Part | None = None
    per_channel: bool = False
    placement: str = "input"
    edges: str = "int8"
    edge_weight: Part = Part("lsq", "weight")
    edge_activation: Part = Part("lsq", "activation")
    edge_bits: int = 8
    edge_per_channel: bool = False
    last_input: str = "edge"
    own_edges: bool = False
    downsample: str = "inner"
    norm: str = "batch"
    norm_levels: str = "individual"
    objective: Objective = Objective()
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        check(self)

    @property
    def integers(self) -> bool:
        """Whether layers train in integers, forward and backward (`integer_`)."""
        return self.weight.role == "integer"

    @property
    def training(self) -> dict[str, Any]:
        """Objective and schedule as fields of `TrainConfig`."""
        fields = {**asdict(self.schedule), **asdict(self.objective)}
        fields["loss_gamma"] = fields.pop("gamma")
        return fields

    def __str__(self) -> str:
        widths = ", ".join(f"w{p}a{self.activation_bits.get(p, 'f')}" for p in self.precisions)
        weights = f"{self.weight}, one step {'an output channel' if self.per_channel else 'a tensor'}"
        if self.transform is not None:
            weights = f"{self.transform} -> {weights}"
        if self.rescale is not None:
            weights += f", rescaled by {self.rescale}"
        norms = {
            "individual": "statistics and affine of its own at every precision",
            "statistics": "statistics of its own at every precision, one affine",
            "shared": "one for all precisions",
        }
        in_place = " in place of the activation function" if self.placement == "activation" else ""
        return "\n".join(
            [
                f"{self.name}: {self.description}",
                f"  precisions   {widths}",
                f"  weights      {weights}",
                f"  activations  {self.activation or 'float'}{in_place}",
                *([] if self.gradient is None else [f"  gradients    {self.gradient}"]),
                f"  edges        {self._edges()}",
                f"  {self.norm.replace('_', '-') + ' norm':12} {norms[self.norm_levels]}",
                f"  objective    {self.objective}",
                f"  schedule     {self.schedule}",
            ]
        )

    def _edges(self) -> str:
        text = {
            "float": "float",
            "inner": f"as the inner layers, network input {self.edge_bits} bits {self.edge_activation}",
            "int8": f"{self.edge_bits} bits, {self.edge_weight} x {self.edge_activation}"
            + (", last input as inner layers" if self.last_input == "inner" else ""),
        }[self.edges]
        text += ", weights of their own at every precision" if self.own_edges else ""
        return text + (", downsampling layers in float" if self.downsample == "float" else "")


@dataclass(frozen=True)
class RecipeRecord:
    """A registered recipe: a function that makes it, and its fields."""

    name: str
    description: str
    make: Callable[..., Recipe]


_RECORDS: dict[str, RecipeRecord] = {}


def register(name: str, description: str) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Decorator: make a recipe function available by name."""

    def add(make: Callable[..., Recipe]) -> Callable[..., Recipe]:
        if name in _RECORDS:
            raise ValueError(f"register: a recipe named {name!r} exists")
        _RECORDS[name] = RecipeRecord(name, description, make)
        return make

    return add


def names() -> tuple[str, ...]:
    """Names of all registered recipes, sorted."""
    return tuple(sorted(_RECORDS))


def describe(name: str) -> RecipeRecord:
    """The record of a recipe. ValueError if there is none, naming the nearest."""
    if name not in _RECORDS:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no recipe named {name!r}; there are: {', '.join(names())}{hint}")
    return _RECORDS[name]


def get(name: str, **fields: Any) -> Recipe:
    """Make a recipe by name. ValueError on unknown names and fields."""
    record = describe(name)
    known = list(inspect.signature(record.make).parameters)
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"recipe {name!r} has no field {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    return record.make(**fields)
