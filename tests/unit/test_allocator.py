"""Freed memory is kept for what comes next."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource

import numpy as np

from bitstrata.train import keep_freed_memory


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.empty(48 << 20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


plain = faults()
kept = keep_freed_memory()
faults()
print(int(kept), plain, faults())
"""


def test_pages_of_freed_arrays_are_not_asked_for_again():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    kept, plain, again = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert plain >= 20
    assert again < plain / 10


def test_without_glibc_nothing_is_changed(monkeypatch):
    from bitstrata.train import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert allocator.keep_freed_memory() is False
