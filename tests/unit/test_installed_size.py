"""What a wheel installs stays small. `make wheel` measures it; this is the same sum over what the tests run on."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

import bitstrata
import bitstrata_runtime
from bitstrata_runtime import _engine

LIMIT = 5_000_000  # bytes
RECORDS = 60_000  # of the wheel: names and hashes of its files, the README as its description


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines have fewer kernels")
def test_packages_and_engine_take_less_than_five_megabytes() -> None:
    compiled = Path(str(_engine.__file__))
    sizes = {compiled: compiled.stat().st_size}
    for package in (bitstrata, bitstrata_runtime):
        for file in Path(str(package.__file__)).parent.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
                sizes[file] = file.stat().st_size
    assert len(sizes) > 100
    total = sum(sizes.values()) + RECORDS
    assert total < LIMIT, f"{total:,} bytes, of which {compiled.name} takes {sizes[compiled]:,}"
