"""The peers: other programs that run the same float network, or its 8-bit post-training quantization.

Each peer gets float input that is normalized already, in the layout that it likes best: what it would cost to make
that from pixels is not in its time. `CEILINGS` says how OpenVINO and torch are held to an instruction set; ONNX Runtime
has no such switch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import version_of
from numpy.typing import NDArray
from torch import Tensor, nn

PACKAGES = ("onnx", "onnxruntime", "openvino", "safetensors")

# Instruction set of ours -> environment that holds oneDNN (in OpenVINO and torch) and torch's own kernels to it. What
# avx512vnni allows is everything but matrix units, bfloat16 products included.
CEILINGS = {
    "generic": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx2vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"},
    "amx": {},
}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Peer:
    """Something to compare with. tolerance: how far logits may be from torch's, as a share of their largest."""

    name: str
    run: Callable[[], Floats]
    tolerance: float
    kernels: str  # what runs the convolutions, as the peer itself tells


@dataclass(frozen=True)
class OnnxFiles:
    """One network as ONNX, batch 1: batch norms folded in float32, and with 8-bit weights and activations (QDQ)."""

    float32: Path
    int8: Path


def missing() -> list[str]:
    """One line for each peer that cannot run here."""
    lacking = [name for name in ("onnx", "onnxruntime") if version_of(name) is None]
    lines = []
    if lacking:
        lines.append(f"onnxruntime-* and openvino-* left out: not installed: {', '.join(lacking)}")
    elif version_of("openvino") is None:
        lines.append("openvino-* left out: openvino is not installed")
    return lines


def have_onnx() -> bool:
    """Whether ONNX files can be made and run."""
    return all(version_of(name) is not None for name in ("onnx", "onnxruntime"))


def export(model: nn.Module, inputs: list[Tensor], folder: Path) -> OnnxFiles:
    """Write the network as float32 ONNX and quantize it: per-channel int8 weights, uint8 activations, min-max ranges.

    inputs: float32 batches to calibrate the activations with.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rows = iter([{"x": row[None].numpy()} for batch in inputs for row in batch])

        def get_next(self) -> dict[str, Floats] | None:
            return next(self._rows, None)

    raw, files = folder / "raw.onnx", OnnxFiles(folder / "float32.onnx", folder / "int8.onnx")
    with _quiet():
        torch.onnx.export(
            model, (inputs[0][:1],), str(raw), dynamo=False, input_names=["x"], output_names=["y"], opset_version=17
        )
        quant_pre_process(str(raw), str(files.float32), skip_symbolic_shape=True)
        quantize_static(
            str(files.float32), str(files.int8), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return files


def build(model: nn.Module, files: OnnxFiles | None, x: Tensor, threads: int) -> list[Peer]:
    """Every peer that is installed, on input `x` (N, C, H, W). files: None leaves out those that read ONNX."""
    peers = []
    if files is not None:
        if version_of("openvino") is not None:
            peers.append(_openvino("openvino-int8", files.int8, x.numpy(), threads, 0.5))
            peers.append(_openvino("openvino-f32", files.float32, x.numpy(), threads, 1e-3))
        peers.append(_onnxruntime("onnxruntime-int8", files.int8, x.numpy(), threads, 0.5))
        peers.append(_onnxruntime("onnxruntime-f32", files.float32, x.numpy(), threads, 1e-3))
    peers.append(_torch("torch-bf16", model, x.bfloat16(), threads, 0.3))
    peers.append(_torch("torch-fp32", model, x, threads, 1e-3))
    return peers


def check(peers: list[Peer], model: nn.Module, x: Tensor) -> dict[str, float]:
    """Peer -> largest distance of its logits to torch's as a share of the largest logit; SystemExit if it is too far.

    The bound of the 8-bit peers is wide: of a network with random weights it only tells that it is the same network.
    """
    with torch.inference_mode():
        expected = model(x).numpy()
    distances = {peer.name: float(np.abs(peer.run() - expected).max() / np.abs(expected).max()) for peer in peers}
    for peer in peers:
        if not distances[peer.name] <= peer.tolerance:
            raise SystemExit(
                f"{peer.name} does not compute the same network: its logits are {distances[peer.name]:.3g} of the "
                f"largest one away from torch's, {peer.tolerance} is allowed"
            )
    return distances


def onnxruntime_session(path: Path | bytes, threads: int, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session with default settings otherwise. optimized: where to write the graph that it runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its threads go on spinning for more than 0.1 s after a run by default, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    model = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnxruntime(name: str, path: Path, x: Floats, threads: int, tolerance: float) -> Peer:
    import onnx

    optimized = path.with_suffix(".optimized.onnx")
    session = onnxruntime_session(_with_batch(path, len(x)), threads, optimized)
    graph = onnx.load(str(optimized)).graph
    kernels = Counter(node.op_type for node in graph.node if "Conv" in node.op_type)
    if tolerance > 0.1 and set(kernels) != {"QLinearConv"}:
        raise SystemExit(f"{name}: expected 8-bit convolutions only, it runs {dict(kernels)}")
    return Peer(
        name, lambda: session.run(None, {"x": x})[0], tolerance, f"{_counted(kernels)}, not held to the ceiling"
    )


def _openvino(name: str, path: Path, x: Floats, threads: int, tolerance: float) -> Peer:
    import openvino

    core = openvino.Core()
    model = core.read_model(_with_batch(path, len(x)))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # of what is float; else it may be bfloat16
    }
    compiled = core.compile_model(model, "CPU", settings)
    info = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    convolutions = [i for i in info if i["layerType"].astype(str) == "Convolution"]
    kernels = Counter(i["primitiveType"].astype(str) for i in convolutions)
    wanted = ("u8", "i8") if tolerance > 0.1 else ("f32",)
    if not all(i["runtimePrecision"].astype(str) in wanted for i in convolutions):
        raise SystemExit(f"{name}: expected convolutions in {' or '.join(wanted)} only, it runs {dict(kernels)}")
    request = compiled.create_infer_request()
    return Peer(name, lambda: request.infer({0: x}, share_inputs=True)[0], tolerance, _counted(kernels))


def _torch(name: str, model: nn.Module, x: Tensor, threads: int, tolerance: float) -> Peer:
    """A copy of the model in the data type of `x`."""
    torch.set_num_threads(threads)
    model = copy.deepcopy(model).to(dtype=x.dtype, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> Floats:
        with torch.inference_mode():
            return model(x).float().numpy()

    kernels = f"eager, channels last, torch {torch.backends.cpu.get_cpu_capability()}"
    return Peer(name, run, tolerance, kernels)


def _with_batch(path: Path, batch: int) -> bytes:
    """The model with another batch size; nothing in these networks but the input and output shapes depends on it."""
    import onnx

    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    model.graph.ClearField("value_info")
    return model.SerializeToString()


def _counted(kernels: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in kernels.items())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own deprecation and give advice; neither concerns the result."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
        sys.stdout.flush()
