"""Triton's kernels of fake quantization: their values in the interpreter, their instructions for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitstrata.functional import fake_quantize

triton = pytest.importorskip("triton", reason="the package triton is not installed: it is in the extra 'gpu'")
TESTS = Path(__file__).parents[1]


def test_values_and_gradients_in_the_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "helpers_triton.py")],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 55


@pytest.mark.parametrize(("grid", "bf16"), [(g, g % 2 == 0) for g in range(11)])
def test_instructions_for_a_gpu_round_as_the_formulas_do(grid, bf16, tmp_path, monkeypatch):
    """Compiled without a GPU: no fused multiply-add, no approximate division."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = fake_quantize._triton()
    fixed = {"GRID": grid, "BF16": bf16, "NARROW": bf16, "SIZE": kernels.BLOCK}
    ptx = compiled(kernels._forward, fixed)
    ptx += compiled(
        kernels._backward,
        {**fixed, "OPEN": grid % 2 == 0, "EVERYWHERE": False, "CALIBRATED": True, "DX": True, "SUMS": True},
    )
    assert "div.rn.f32" in ptx
    for inexact in ("fma.", "div.full", "div.approx", "rcp.", ".ftz"):
        assert inexact not in ptx


def compiled(function, fixed: dict[str, object]) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    tensor = "*i16" if fixed["BF16"] else "*fp32"
    types = {"x_at": tensor, "out_at": tensor, "g_at": tensor, "channels": "i32", "inner": "i32", "count": "i32"}
    types |= dict.fromkeys(("sums_at", "step_at", "extra_at"), "*fp32")
    signature = {n: "constexpr" if n in fixed else types.get(n, "fp32") for n in names}
    constants = {(names.index(n),): value for n, value in fixed.items()}
    source = ASTSource(function, signature, constexprs=constants)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_on_a_gpu():
    from helpers_fake import CASES, DTYPES, FREE, parameters, sample

    for case in CASES + FREE:
        for dtype in DTYPES:
            step, extra = parameters(case)
            x = sample((70, 1001), step, dtype)
            grad = torch.randn(x.shape).to(dtype)
            found = []
            for device in ("cpu", "cuda"):
                leaves = [None if t is None else t.detach().to(device).requires_grad_() for t in (x, step, extra)]
                value = fake_quantize.fake_quantize(*leaves, case, grad_scale=0.5)
                value.backward(grad.to(device))
                found.append([value.detach().cpu(), *(None if t is None else t.grad.cpu() for t in leaves)])
            for i, (a, b) in enumerate(zip(*found, strict=True)):
                if a is not None and not (i == 2 and getattr(case, "everywhere", False)):
                    torch.testing.assert_close(
                        a, b, rtol=0 if i < 2 else 1e-4, atol=0 if i < 2 else 0.1, equal_nan=True
                    )
