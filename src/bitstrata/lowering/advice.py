"""What to put in the place of an operation that has no integer form."""

from __future__ import annotations

from torch import nn

from ..nn.layers import FORMS

SUPPORTED = (
    "convolution, linear, batch normalization, ReLU or clamp, add, max or average pooling, strided slice, zero "
    "padding, flatten"
)
_ACTIVATION = "use nn.ReLU (or ReLU6, Hardtanh) in its place and train on"
_SOFTMAX = "leave it out of the network: the largest logit is of the same class, and cross_entropy takes logits"
_NORM = "use batch normalization, whose statistics are fixed once trained"
_CONSTANT = (
    "let a layer's weights hold constant factors; normalization of the input belongs to the data: leave it out of the "
    "forward and give quantize_ input=Pixels(mean, std)"
)
_AXES = "give the data with channels first, (N, C, L) or (N, C, H, W)"
_JOIN = (
    "a layer that reads joined maps is the sum of layers that read one map each: give each its own convolution, and add"
)
_ENLARGE = "programs do not enlarge maps: end the network, or the part to be lowered, in front of it"
_SEQUENCE = "programs hold no attention and no recurrence: lower the part of the model that is free of them"

_BY_NAME = {
    **dict.fromkeys(
        ("silu", "gelu", "mish", "hardswish", "hardsigmoid", "elu", "celu", "selu", "leakyrelu", "leaky_relu", "prelu",
         "rrelu", "softplus", "sigmoid", "tanh", "logsigmoid", "softsign", "hardshrink", "softshrink", "swish"),
        _ACTIVATION,
    ),
    **dict.fromkeys(("softmax", "logsoftmax", "log_softmax", "softmax2d"), _SOFTMAX),
    **dict.fromkeys(
        ("layernorm", "layer_norm", "groupnorm", "group_norm", "instancenorm1d", "instancenorm2d", "instance_norm",
         "rmsnorm", "rms_norm", "localresponsenorm", "local_response_norm"),
        _NORM,
    ),
    **dict.fromkeys(("mul", "imul", "truediv", "itruediv", "div", "sub", "isub", "rsub", "neg"), _CONSTANT),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "movedim", "t"), _AXES),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _JOIN),
    **dict.fromkeys(
        ("convtranspose1d", "convtranspose2d", "conv_transpose2d", "upsample", "interpolate", "pixelshuffle",
         "pixel_shuffle", "upsamplingnearest2d", "upsamplingbilinear2d", "repeat_interleave"),
        _ENLARGE,
    ),
    **dict.fromkeys(
        ("lstm", "gru", "rnn", "multiheadattention", "matmul", "bmm", "einsum", "scaled_dot_product_attention",
         "embedding", "transformerencoderlayer"),
        _SEQUENCE,
    ),
    **dict.fromkeys(("split", "chunk", "unbind", "tensor_split"), "slice channels in its place: x[:, :8]"),
}  # fmt: skip
_ELSE = f"replace it by one of: {SUPPORTED}"


def for_function(name: str, tensors: int) -> str:
    """Advice for a function or method by its name, called with so many tensors of the network."""
    if name.rstrip("_") in ("mul", "imul", "truediv", "div", "matmul") and tensors > 1:
        return "products and quotients of two maps, such as gates and attention, are outside programs; leave them out"
    return _BY_NAME.get(name.rstrip("_"), _ELSE)


def for_module(module: nn.Module) -> str:
    """Advice for a module by its type."""
    kind = type(module)
    if kind.__name__.startswith("Parametrized"):
        return (
            "take the parametrization out first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )
    base = next((form for form in FORMS if isinstance(module, form)), None)
    if base is not None:
        return f"only {base.__name__} itself is quantized, not a subclass, whose forward may compute anything"
    return _BY_NAME.get(kind.__name__.lower(), f"leave it out, or {_ELSE}")
