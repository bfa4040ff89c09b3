"""The compiled extension, made by bindings/module.cc. `engine.EngineExecutor` is what to use."""

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
Triple = tuple[int, int, int]
Sides = tuple[int, int, int, int]
PoolWindow = tuple[Pair, Pair, Pair, Pair]  # size of the input, of the window, stride, padding above and to the left

def available_isas() -> list[str]: ...
def use_openmp(library: str) -> bool:
    """Share the loops of training among the threads of an OpenMP runtime that is loaded; whether the file is one."""

def emulated_isas() -> list[str]: ...
def channels_last(x: NDArray[Any]) -> NDArray[Any]:
    """uint8 (N, C, H, W), C-contiguous -> uint8 (N, H, W, C)."""

def kernel_table() -> list[tuple[str, bool, str]]:
    """(name, whether it is emulated, what it lacks here or "") of every row, whether this build has it or not."""

def chosen_isa(isa: str) -> str: ...

class Resources:
    def __init__(self, threads: int, callers: int) -> None: ...
    def set_threads(self, threads: int) -> None: ...
    def trim(self, bytes: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def callers(self) -> int: ...
    @property
    def bytes(self) -> int: ...

def guard_memory(on: bool) -> bool:
    """For tests: graphs and results allocated from now on end at an unmapped page; whether that is possible here."""

class Graph:
    """Methods that add an operation return the index of its result; the input is 0."""

    def __init__(self, isa: str, resources: Resources) -> None: ...
    def input(self, shape: Triple, dtype: str, lo: int, hi: int, /) -> int: ...
    def conv(
        self,
        name: str,
        x: int,
        codes: NDArray[np.int8],
        mul: int,
        add: int,
        stride: Pair,
        padding: Sides,
        dilation: Pair,
        groups: int,
        pad_code: NDArray[np.int32],
        kernel: str = "",
    ) -> int: ...
    def requant(
        self,
        name: str,
        x: int,
        multiplier: NDArray[np.int32],
        bias: NDArray[np.int64],
        shift: NDArray[np.uint8],
        lo: int,
        hi: int,
        dtype: str,
    ) -> int: ...
    def thresholds(
        self,
        name: str,
        x: int,
        after: NDArray[np.int32],
        sign: NDArray[np.int8],
        base: NDArray[np.int32],
        dtype: str,
    ) -> int: ...
    def table(self, name: str, x: int, entries: NDArray[np.int32], first: int, dtype: str) -> int: ...
    def add(self, name: str, a: int, b: int, shift_a: int, shift_b: int) -> int: ...
    def clip(self, name: str, x: int, lo: int, hi: int) -> int: ...
    def max_pool(self, name: str, x: int, kernel: Pair, stride: Pair, padding: Sides) -> int: ...
    def sum_pool(self, name: str, x: int, kernel: Pair, stride: Pair, padding: Sides, shift: int) -> int: ...
    def slice(self, name: str, x: int, h: Triple, w: Triple, c: Triple) -> int: ...
    def pad(self, name: str, x: int, h: Pair, w: Pair, c: Pair) -> int: ...
    def flatten(self, name: str, x: int) -> int: ...
    def tile_bytes(self, bytes: int) -> None: ...
    def conv_kernels(self, value: int) -> list[str]: ...
    def finish(self, output: int) -> None: ...
    def run(self, x: NDArray[Any], wanted: list[int]) -> list[NDArray[Any]]: ...
    def shape(self, value: int, /) -> Triple: ...
    def dtype(self, value: int, /) -> str: ...
    def kernel(self, value: int, /) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def chunk(self) -> int: ...
    @property
    def run_bytes(self) -> int: ...
    @property
    def constant_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...

# Profiles (bindings/profile.cc); see engine/include/bitstrata/profile.h.
def profile(graph: Graph, x: NDArray[Any], repeats: int) -> list[tuple[float, list[float]]]:
    """(seconds, seconds of each operation) of every run."""

def work(graph: Graph, value: int) -> dict[str, Any]: ...
def measure_products(graph: Graph) -> dict[str, float]: ...
def measure_memory(graph: Graph) -> list[tuple[str, int, float]]: ...

# Integer products of a training step (bindings/products.cc). Arrays are C-contiguous, numpy's or torch's; results are
# written into the arrays passed for them. ValueError for shapes, dtypes and ranges that do not fit.
Array = Any

def conv_forward(
    x: Array,
    range: Pair,
    w: Array,
    stride: Pair,
    dilation: Pair,
    padding: Sides,
    groups: int,
    isa: str,
    threads: int,
    *,
    shift: Array | None = None,
    acc: Array | None = None,
    lo: Array | None = None,
    hi: Array | None = None,
    values: Array | None = None,
    factor: Array | None = None,
) -> None: ...
def conv_input_grad(
    g: Array,
    range: Pair,
    w: Array,
    stride: Pair,
    dilation: Pair,
    padding: Sides,
    groups: int,
    isa: str,
    threads: int,
    *,
    shift: Array | None = None,
    acc: Array | None = None,
    lo: Array | None = None,
    hi: Array | None = None,
    values: Array | None = None,
    factor: Array | None = None,
) -> None: ...
def conv_weight_grad(
    g: Array,
    g_range: Pair,
    x: Array,
    x_range: Pair,
    stride: Pair,
    dilation: Pair,
    padding: Sides,
    groups: int,
    isa: str,
    threads: int,
    *,
    gw: Array | None = None,
    values: Array | None = None,
    out_factor: Array | None = None,
    in_factor: Array | None = None,
) -> None: ...
def product_kernels(
    isa: str, size: Pair, channels: Pair, kernel: Pair, groups: int, range: Pair, weights: Pair
) -> tuple[str, str]:
    """Names of the kernels of a product and of its weight gradient; weights: their range, and that of gradients."""

# Quantization and normalization of a training step (bindings/training.cc, bindings/norm.h). A tensor is rows of
# channels: float32, bfloat16 as int16 where a function takes it, or int32 with `scale`, (channels,) float32. noise:
# seed and stream of stochastic rounding, None to round to nearest. What is not finite gives NaN or False, not an error.
Noise = tuple[int, int] | None

def channel_ranges(x: Array, isa: str, threads: int) -> NDArray[np.float32]:
    """The largest magnitude of each channel of a float32 or bfloat16 tensor: (channels,); NaN if not finite."""

def max_pool_gradient(gradient: Array, places: Array, window: PoolWindow, out: Array, isa: str, threads: int) -> None:
    """The gradient of what `Norm.max_pool` pooled, to `out`; all NHWC."""

def keep_maxima(
    codes: Array, places: Array, window: PoolWindow, maxima: Array, signs: Array, isa: str, threads: int
) -> None:
    """`maxima`: codes at the places of a pooling's maxima; `signs`: of all, (images, bytes), four a byte."""

def put_maxima(
    maxima: Array, signs: Array, places: Array, window: PoolWindow, codes: Array, isa: str, threads: int
) -> None:
    """`codes` that are `maxima` at the places of a pooling's maxima, and elsewhere signs."""

def code_sums(codes: Array, isa: str, threads: int) -> NDArray[np.int64]:
    """Each channel's sum of int8 codes (rows, channels)."""

def pack_codes(codes: Array, width: int, out: Array, isa: str, threads: int) -> None: ...
def unpack_codes(packed: Array, width: int, signed: bool, out: Array, isa: str, threads: int) -> None: ...
def weight_codes(
    weight: Array, groups: int, bits: int, by_output: bool, codes: Array, scale: Array, isa: str, threads: int
) -> bool:
    """Codes and scales of a weight (out, in / groups, taps); whether it is finite."""

def shift_codes(
    x: Array,
    bits: int,
    groups: int,
    signed: bool,
    absorb: bool,
    clip: float,
    noise: Noise,
    out: Array,
    ranges: Array | None,
    isa: str,
    threads: int,
    powers: bool = False,
) -> tuple[float, NDArray[np.uint8]]:
    """Codes to `out`; their scale and the channels' exponents. ranges: float32 (channels,), what `channel_ranges`
    returns, where that is known. clip: what they are multiplied by. powers: codes are 0 and powers of two."""

def join(
    x: Array, scale: Array | None, add: Array | None, bits: Array | None, out: Array, isa: str, threads: int
) -> float:
    """x, plus `add`, 0 where bits are 0, to `out`; its largest magnitude."""

def join_strided(
    x: Array,
    scale: Array | None,
    map: Pair,
    stride: Pair,
    add: Array,
    add_scale: Array,
    bits: Array | None,
    out: Array,
    isa: str,
    threads: int,
) -> float:
    """x, of maps (height, width), plus `add` * add_scale at every stride-th pixel, 0 where bits are 0, to `out`; its
    largest magnitude. add: int32 (images, height, width, channels) of these pixels.
    """

class Norm:
    """The quantized normalization of one batch: `forward`, then what reads its codes; `backward`, then gradients."""

    def __init__(
        self,
        rows: int,
        channels: int,
        bits: int,
        l2: bool,
        eps: float,
        factor: float,
        weight: Array | None,
        bias: Array | None,
        isa: str,
        threads: int,
    ) -> None: ...
    def forward(self, x: Array, scale: Array | None, least: Array | None, most: Array | None, codes: Array) -> bool: ...
    def to_codes(
        self,
        codes: Array,
        rectify: bool,
        bits: int,
        groups: int,
        signed: bool,
        absorb: bool,
        clip: float,
        noise: Noise,
        out: Array,
    ) -> tuple[float, NDArray[np.uint8]]: ...
    def track(self, mean: Array, deviation: Array, share: float) -> None:
        """Move running statistics, float32 (channels,), towards the batch's: running * (1 - share) + batch * share."""

    def max_pool(
        self, codes: Array, rectify: bool, window: PoolWindow, out: Array, places: Array
    ) -> NDArray[np.float32]:
        """The maximum pooling of the result and where in its window each maximum is, both NHWC; each channel's largest
        magnitude."""

    def to_f32(
        self, codes: Array, rectify: bool, add: Array | None, out: Array, bits: Array | None
    ) -> NDArray[np.float32]: ...
    def backward(
        self,
        gradient: Array,
        scale: Array | None,
        range: float | None,
        codes: Array,
        rectify: bool,
        noise: Noise,
        out: Array,
    ) -> bool: ...
    def gradient_f32(self, gradient: Array, codes: Array, out: Array) -> None: ...
    def gradient_codes(
        self,
        gradient: Array,
        codes: Array,
        bits: int,
        groups: int,
        absorb: bool,
        noise: Noise,
        out: Array,
        powers: bool = False,
    ) -> tuple[float, NDArray[np.uint8]]: ...
    @property
    def mean(self) -> NDArray[np.float32]: ...
    @property
    def deviation(self) -> NDArray[np.float32]: ...
    @property
    def weight_gradient(self) -> NDArray[np.float32]: ...
    @property
    def bias_gradient(self) -> NDArray[np.float32]: ...

class LayerNorm:
    """The quantized layer normalization of rows of features (bindings/layer_norm.cc): `forward`, then `backward` of the
    same codes. All arrays (rows, features), C-contiguous, float32 but for the codes, int8."""

    def __init__(
        self,
        rows: int,
        features: int,
        bits: int,
        l2: bool,
        eps: float,
        factor: float,
        weight: Array | None,
        bias: Array | None,
        isa: str,
        threads: int,
    ) -> None: ...
    def forward(self, x: Array, codes: Array, out: Array) -> bool:
        """The result to `out`; False if x, weight or bias are not finite."""

    def backward(self, gradient: Array, codes: Array, noise: Noise, out: Array) -> bool:
        """The gradient of x to `out`; False if that of the result is not finite."""

    @property
    def weight_gradient(self) -> NDArray[np.float32]: ...
    @property
    def bias_gradient(self) -> NDArray[np.float32]: ...

class ConvInput:
    """What a convolution reads, (batch, height, width, channels): codes, or the result of a normalization, of which
    codes are made wherever they are needed.
    """

    @overload
    def __init__(
        self, codes: Array, scale: float, exponents: Array, bits: int, groups: int, signed: bool, absorb: bool
    ) -> None: ...
    @overload
    def __init__(
        self,
        norm: Norm,
        normed: Array,
        rectified: bool,
        bits: int,
        groups: int,
        signed: bool,
        absorb: bool,
        clip: float,
    ) -> None: ...
    @property
    def rests(self) -> bool:
        """Whether its codes can be packed: they have at most 4 bits."""

    def rest(self, packed: Array, isa: str, threads: int) -> None:
        """The codes go to `packed`, one stream of bits, which from now on is what is read."""

class ConvNorm:
    """A convolution with its normalization as one operation (bindings/conv_norm.cc), for batches of any size."""

    def __init__(
        self,
        stride: Pair,
        dilation: Pair,
        padding: Pair,
        groups: int,
        weight_bits: int,
        one_scale: bool,
        norm_bits: int,
        l2: bool,
        eps: float,
        factor: float,
        gradient_bits: int,
        gradient_groups: int,
        absorb: bool,
        powers: bool,
    ) -> None: ...
    def scratch(self, x: ConvInput, weight: Array, result: tuple[int, int, int, int]) -> Pair:
        """Bytes of scratch memory, forward and backward. result: its shape, as codes have it."""

    def forward(
        self,
        x: ConvInput,
        weight: Array,
        gamma: Array | None,
        beta: Array | None,
        scratch: Array,
        codes: Array,
        isa: str,
        threads: int,
    ) -> tuple[Norm | None, str]:
        """The normalization, or None and what was not finite: "weight", "norm" or "product"."""

    def backward(
        self,
        norm: Norm,
        codes: Array,
        gradient: Array,
        pooled: tuple[Array, PoolWindow] | None,
        scale: Array | None,
        range: float | None,
        rectified: bool,
        noise: Noise,
        product_noise: Noise,
        x: ConvInput,
        weight: Array,
        scratch: Array,
        input: Array | None,
        input_factor: Array | None,
        of_weight: Array | None,
        of_gamma: Array | None,
        of_beta: Array | None,
        isa: str,
        threads: int,
    ) -> tuple[str, float | None]:
        """What was not finite: "weight", "norm" or "product"; "" for nothing. Then the largest magnitude of the input's
        gradient where the input's normalization passes it, if it has one. pooled: places of the maxima of a pooling of
        the result; then `gradient` is the pooling's.
        """

class LayerStep:
    """A layer's quantization and products in one call each way (bindings/layer_step.cc), for batches of any size.

    x, gradient: (samples, height, width, channels), float32, or bfloat16 as int16. known: codes and scales that
    `weight_codes` made for the product at hand.
    """

    def __init__(
        self,
        stride: Pair,
        dilation: Pair,
        padding: Pair,
        groups: int,
        weight_bits: int,
        one_scale: bool,
        bits: int,
        code_groups: int,
        clip: float,
        gradient_bits: int,
        gradient_groups: int,
        powers: bool,
    ) -> None: ...
    def weight_codes(self, weight: Array, by_output: bool, codes: Array, scale: Array, isa: str, threads: int) -> bool:
        """For the forward product, or, if not by_output, the input gradient's; False if the weight is not finite."""

    def forward(
        self,
        x: Array,
        signed: bool,
        noise: Noise,
        weight: Array,
        known: tuple[Array, Array] | None,
        bias: Array | None,
        y: Array,
        packed: Array | None,
        isa: str,
        threads: int,
    ) -> tuple[str, float, NDArray[np.uint8]]:
        """What was not finite: "weight", "real", or "" for nothing; scale and packed exponents of the codes of x."""

    def again(
        self,
        sizes: tuple[int, ...],
        kept: tuple[Array, Array, float, bool],
        weight: Array,
        known: tuple[Array, Array] | None,
        bias: Array | None,
        y: Array,
        isa: str,
        threads: int,
    ) -> str:
        """y of `forward` once more, of what was kept of x, which has these sizes."""

    def backward(
        self,
        gradient: Array,
        noise: Noise,
        sizes: tuple[int, ...],
        kept: tuple[Array, Array, float, bool] | None,
        weight_sizes: tuple[int, ...],
        weight: Array | None,
        known: tuple[Array, Array] | None,
        of_input: Array | None,
        of_weight: Array | None,
        of_bias: Array | None,
        isa: str,
        threads: int,
    ) -> str:
        """What was not finite. sizes: of x. kept: its packed codes, packed exponents and scale, and whether signed."""

# Quantization-aware training. x: rows of channels, (rows, channels), int16 or int32 sums, float32, or bfloat16 as
# uint16; it stands for u = max(x * scale + offset, 0 if rectified), with scale and offset float32 (channels,). `real`
# arrays are float32, or bfloat16 as uint16, of x's shape.
Levels = tuple[float, float]  # least and largest code
# Least and largest code; the interval of u in which gradients pass; the factor of the step's gradient inside of it.
PassRule = tuple[float, float, float, float, float] | None

def qat_integers(values: Array, channels_last: bool, unit: Array, high: Array, low: Array | None, threads: int) -> bool:
    """values / unit[o] as integers high * 2 + low, int8 (out, in, h, w); False if not finite or out of range.

    values: float32 of that shape, or with channels_last (out, h, w, in).
    """

def qat_convolution(
    x: Array,
    range: Pair,
    high: Array,
    low: Array | None,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
    groups: int,
    out: Array,
    moments: bool,
    isa: str,
    threads: int,
) -> tuple[bool, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Sums to `out`, int16 or int32: (whether all fit into 16 bits, (mean, variance) of each channel)."""

def qat_weight_gradient(
    x: Array,
    range: Pair,
    g: Array,
    factor: Array,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
    channels_last: bool,
    out: Array,
    isa: str,
    threads: int,
) -> None:
    """Gradient of a convolution's weight times factor[o], float32 (out_c, in_c, kernel_h, kernel_w), to `out`.

    channels_last: `out` is (out_c, kernel_h, kernel_w, in_c).

    x: codes (batch, in_h, in_w, in_c), int8 or uint8, which lie within `range`; g: (batch, out_h, out_w, out_c)
    bfloat16 as uint16.
    """

def qat_codes(
    x: Array, scale: Array, offset: Array, rectified: bool, levels: Levels, out: Array, isa: str, threads: int
) -> None:
    """clamp(round(u)) as bytes."""

def qat_code_values(
    x: Array, scale: Array, offset: Array, rectified: bool, levels: Levels, out: Array, isa: str, threads: int
) -> None:
    """clamp(round(u)) as real."""

def qat_values(
    x: Array, scale: Array, offset: Array, rectified: bool, add: Array | None, out: Array, isa: str, threads: int
) -> None:
    """max(x * scale + offset + add, 0 if rectified) as real."""

def qat_gradient_sums(
    x: Array,
    scale: Array,
    offset: Array,
    rectified: bool,
    rule: PassRule,
    keep: float,
    g: Array,
    add: Array | None,
    center: Array,
    isa: str,
    threads: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Of each channel, sums of what passes of g (+ add) and of that times (x - center); the step's sum."""

def qat_gradient(
    x: Array,
    scale: Array,
    offset: Array,
    rectified: bool,
    rule: PassRule,
    keep: float,
    g: Array,
    add: Array | None,
    line: Array,
    out: Array,
    isa: str,
    threads: int,
) -> None:
    """passed * line[0] + ((x - line[3]) * line[2] + line[1]); line: (4, channels)."""

def qat_pass(
    x: Array,
    scale: Array,
    offset: Array,
    rectified: bool,
    rule: PassRule,
    keep: float,
    g: Array,
    add: Array | None,
    out: Array,
    isa: str,
    threads: int,
) -> float:
    """What passes, to `out`; the step's sum."""

def float_products(isa: str) -> str:
    """Name of the products of floats that an instruction set's row takes: "generic", or faster ones."""

def qat_input_gradient(
    g: Array,
    high: Array,
    low: Array | None,
    stride: Pair,
    dilation: Pair,
    padding: Pair,
    out: Array,
    isa: str,
    threads: int,
) -> None:
    """A convolution's input gradient from g, bfloat16 as uint16 (N, H, W, C), to `out`; weights as of qat_integers."""

def qat_max_pool(
    x: Array,
    scale: Array,
    offset: Array,
    rectified: bool,
    window: PoolWindow,
    out: Array,
    places: Array,
    isa: str,
    threads: int,
) -> None:
    """The largest u of each window as real, and where it is; NHWC."""

def qat_max_pool_gradient(g: Array, places: Array, window: PoolWindow, out: Array, isa: str, threads: int) -> None:
    """The gradient of what `qat_max_pool` pooled; g: NHWC, out: rows."""
