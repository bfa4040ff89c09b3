"""Triton's kernels in its interpreter against the formulas, with TRITON_INTERPRET=1; prints how many were compared."""

from __future__ import annotations

import torch
from helpers_fake import BY_CHANNEL, CASES, DTYPES, name_of, parameters, sample
from torch import Tensor

from bitstrata.functional import triton_fake
from bitstrata.functional.formula import Formula


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


def main() -> None:
    count = 0
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
