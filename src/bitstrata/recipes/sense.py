"""Whether a composition of parts makes sense: what a recipe refuses, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..quantizers import registry as quantizers

if TYPE_CHECKING:
    from .base import Recipe


INTEGER_FIELDS = ("weight", "edge_weight", "activation", "edge_activation")
NORMS = ("batch", "layer_batch", "l1")
INTEGER_NORMS = ("l1_quantized", "l2_quantized")  # every tensor of them in 8 bits


def one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check(recipe: Recipe) -> None:
    """Raise ValueError, naming the recipe, the field and the cause, if parts do not fit together."""
    owner = f"Recipe {recipe.name!r}"
    one_of(owner, "placement", recipe.placement, ("input", "activation"))
    one_of(owner, "edges", recipe.edges, ("int8", "inner", "float"))
    one_of(owner, "last_input", recipe.last_input, ("edge", "inner"))
    one_of(owner, "downsample", recipe.downsample, ("inner", "float"))
    one_of(owner, "norm", recipe.norm, (*NORMS, *INTEGER_NORMS))
    one_of(owner, "norm_levels", recipe.norm_levels, ("individual", "statistics", "shared"))
    _check_roles(owner, recipe)
    _check_widths(owner, recipe)
    _check_gradient(owner, recipe)
    if recipe.weight.role == "integer":
        _check_integers(owner, recipe)
        return
    if recipe.norm in INTEGER_NORMS:
        raise ValueError(
            f"{owner}: norm={recipe.norm!r} follows the batch in evaluation; it is for recipes that train in integers"
        )
    for name in INTEGER_FIELDS:
        part = getattr(recipe, name)
        if part is not None and part.role == "integer":
            raise ValueError(
                f"{owner}: {name}={part} quantizes inside layers that train in integers, but weight={recipe.weight} is "
                "not of them"
            )
    _check_weights(owner, recipe)
    _check_activations(owner, recipe)


def _check_roles(owner: str, recipe: Recipe) -> None:
    wanted = {
        "weight": "weight",
        "edge_weight": "weight",
        "activation": "activation",
        "edge_activation": "activation",
        "transform": "transform",
        "rescale": "rescale",
        "gradient": "gradient",
    }
    for name, role in wanted.items():
        part = getattr(recipe, name)
        if part is not None and part.role != role and not (part.role == "integer" and name in INTEGER_FIELDS):
            raise ValueError(f"{owner}: {name} must be a part for {role}s, got {part} for {part.role}s")


def _check_widths(owner: str, recipe: Recipe) -> None:
    p = recipe.precisions
    whole = all(isinstance(b, int) and not isinstance(b, bool) for b in p)
    if not p or not whole or list(p) != sorted(set(p)) or p[0] < 1 or p[-1] > 8:
        raise ValueError(f"{owner}: precisions must be ascending whole numbers within 1..8, got {p}")
    if recipe.activation is not None and set(recipe.activation_bits) != set(p):
        raise ValueError(f"{owner}: activation_bits must have the keys {p}, got {sorted(recipe.activation_bits)}")
    for precision, width in recipe.activation_bits.items():
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= 8:
            raise ValueError(f"{owner}: activation width must be 1..8, got {width!r} at {precision}")
    if not isinstance(recipe.edge_bits, int) or not 2 <= recipe.edge_bits <= 8:
        raise ValueError(f"{owner}: edge_bits must be 2..8, got {recipe.edge_bits}")


def _check_gradient(owner: str, recipe: Recipe) -> None:
    if recipe.gradient is None:
        return
    if recipe.activation is None:
        raise ValueError(
            f"{owner}: gradient={recipe.gradient} multiplies codes of gradients by codes of activations; activation is "
            "None"
        )
    for edge in (False, True):
        quantizers.build_gradient(recipe.gradient.name, recipe.gradient.options, edge=edge)


def _check_integers(owner: str, recipe: Recipe) -> None:
    """What `integer_` has to hold of a recipe; nothing of it is left out silently."""
    roles = {name: getattr(recipe, name) for name in INTEGER_FIELDS}
    odd = [f"{name}={part}" for name, part in roles.items() if part is None or part.role != "integer"]
    if odd:
        raise ValueError(
            f"{owner}: layers that train in integers quantize weights and activations themselves; all of "
            f"{', '.join(INTEGER_FIELDS)} must be parts for integers, got {', '.join(odd)}"
        )
    if recipe.activation != recipe.edge_activation:
        raise ValueError(
            f"{owner}: activation and edge_activation must have the same options in integers, got {recipe.activation} "
            f"and {recipe.edge_activation}"
        )
    if recipe.gradient is None:
        raise ValueError(f"{owner}: layers that train in integers need a gradient quantizer, and gradient is None")
    needed: dict[str, object] = {
        "transform": None,
        "rescale": None,
        "placement": "input",
        "edges": "int8",
        "last_input": "edge",
        "own_edges": False,
        "downsample": "inner",
    }
    for name, value in needed.items():
        if getattr(recipe, name) != value:
            raise ValueError(f"{owner}: training in integers needs {name}={value!r}, got {getattr(recipe, name)}")
    if recipe.norm == "layer_batch":
        raise ValueError(f"{owner}: norm='layer_batch' has no form for training in integers")
    if len(recipe.precisions) != 1:
        raise ValueError(f"{owner}: training in integers has one precision, got {recipe.precisions}")
    groups = {part.options.get("groups", 4) for part in (recipe.activation, recipe.gradient) if part is not None}
    if len(groups) != 1:
        raise ValueError(f"{owner}: groups must be the same for activations and gradients, got {sorted(groups)}")
    edge = recipe.gradient.options.get("edge_bits", 8)
    if edge != recipe.edge_bits:
        raise ValueError(f"{owner}: edge_bits must be one width, got {recipe.edge_bits} and the gradient's {edge}")
    quantizers.describe(recipe.activation.name, "integer").cls(**recipe.activation.options)  # checks the options
    if recipe.precisions[0] < 2 or min(recipe.activation_bits.values()) < 2:
        raise ValueError(f"{owner}: widths in integers are 2..8, got w={recipe.precisions} a={recipe.activation_bits}")


def _check_weights(owner: str, recipe: Recipe) -> None:
    inner = None if recipe.transform is None else recipe.transform.name
    parts = [(recipe.weight, inner)] + ([(recipe.edge_weight, None)] if recipe.edges == "int8" else [])
    for part, transform in parts:
        needed = getattr(quantizers.describe(part.name, "weight").cls, "needs_transform", None)
        if needed is not None and transform != needed:
            raise ValueError(
                f"{owner}: the {part.name!r} weight quantizer rounds [-1, 1] of weights of unit deviation: it needs "
                f"transform={needed!r}, got {transform!r}"
            )
        if part.name == "dorefa" and transform == "tanh":
            raise ValueError(
                f"{owner}: the 'dorefa' weight quantizer clamps by tanh itself; leave transform='tanh' out"
            )
    if recipe.own_edges and len(recipe.precisions) == 1:
        raise ValueError(f"{owner}: own_edges gives every precision its edge layers, but there is one precision only")
    quantizers.build(  # impossible widths are refused before any layer is touched
        recipe.weight.name, "weight", recipe.weight.options, bits={p: p for p in recipe.precisions}, channels=None
    )


def _check_activations(owner: str, recipe: Recipe) -> None:
    if recipe.placement == "activation":
        if recipe.activation is None:
            raise ValueError(f"{owner}: placement='activation' needs an activation quantizer, and activation is None")
        if not getattr(quantizers.describe(recipe.activation.name, "activation").cls, "stands_for_relu", False):
            raise ValueError(
                f"{owner}: placement='activation' puts the quantizer in the ReLU's place, but "
                f"{recipe.activation.name!r} is no quantizer of [0, 1]; choose maqd or dorefa"
            )
    if recipe.activation is not None:
        quantizers.build(
            recipe.activation.name, "activation", recipe.activation.options, bits=recipe.activation_bits, signed=False
        )
