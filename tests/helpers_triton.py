"""Triton's kernels in its interpreter against the formulas, with TRITON_INTERPRET=1; prints how many were compared."""

from __future__ import annotations

import torch
from helpers_fake import BY_CHANNEL, CASES, DTYPES, FREE, name_of, parameters, sample
from torch import Tensor

from bitstrata.functional import triton_fake
from bitstrata.functional.companded import Companded
from bitstrata.functional.formula import Formula
from bitstrata.functional.multi_state import Sigmoids


def same(what: str, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def compare(case: Formula, x: Tensor, step: Tensor, extra: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
    what = f"{name_of(case)}, {x.dtype}, {tuple(x.shape)}"
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    same(what, triton_fake.forward(x, step, extra, case), case.value(x, step, extra))
    found = triton_fake.backward(grad, x, step, extra, case, needs=needs, factor=0.37)
    expected = case.gradients(grad, x, step, extra, needs=needs, factor=0.37)
    assert [f is not None for f in found] == list(needs), what
    if found[0] is not None and expected[0] is not None:
        same(what, found[0], expected[0])
    rough = 0.02 if x.dtype == torch.bfloat16 else 1e-4
    for a, b in zip(found[1:], expected[1:], strict=True):
        if a is not None and b is not None and not getattr(case, "everywhere", False):
            torch.testing.assert_close(
                a, b, rtol=rough, atol=rough * x.numel() ** 0.5, msg=lambda text: f"{what}: {text}"
            )


def compare_free(case: Formula, x: Tensor) -> None:
    """A formula without a step; of those with tanh, what comes after it."""
    what = f"{name_of(case)}, {x.dtype}, {tuple(x.shape)}"
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    inner, step = case.prepared(x, torch.ones(1))
    same(what, triton_fake.forward(inner, step, None, case), case.value(inner, step, None))
    needs = case.kernel_needs((True, False, False))
    found = triton_fake.backward(grad, inner, step, None, case, needs=needs, factor=1.0)
    (d_x, *_) = case.completed(found, inner, step)
    (expected, *_) = case.gradients(grad, inner, step, None, needs=(True, False, False), factor=1.0)
    if isinstance(case, Sigmoids | Companded):
        rough = 0.01 if x.dtype == torch.bfloat16 else 4e-6
        torch.testing.assert_close(
            d_x, expected.to(d_x.dtype), rtol=rough, atol=rough, msg=lambda text: f"{what}: {text}"
        )
    else:
        same(what, d_x, expected)


def main() -> None:
    count = 0
    for index, case in enumerate(FREE):
        for dtype in DTYPES[index % 2 :][:1] if index % 3 else DTYPES:
            compare_free(
                case, sample((2, 700), torch.tensor([0.4]), dtype, index).nan_to_num(0, 50, -50).clamp(-50, 50)
            )
            count += 1
    for index, case in enumerate(CASES):
        for dtype in DTYPES if index % 4 == 0 else DTYPES[index % 2 :][:1]:
            for channels in (1, 2) if case.name in BY_CHANNEL and index % 3 == 1 else (1,):
                step, extra = parameters(case, channels, 2)
                x = sample((channels, 1030), step, dtype, index)
                x = x.nan_to_num(0, 50, -50).clamp(-50, 50)
                compare(case, x, step, extra, (True, True, case.takes_extra))
                count += 1
        step, extra = parameters(case)
        x = sample((index + 1,), step, torch.float32)
        compare(case, x, step, extra, (index % 2 == 0, index % 2 == 1, False))
        count += 1
        for x, at in ((torch.tensor([float("nan"), 0.3]), step), (torch.randn(4, 6).T[:, 1:], -step)):
            same(name_of(case), triton_fake.forward(x, at, extra, case), case.value(x, at, extra))
    print(count)


if __name__ == "__main__":
    main()
