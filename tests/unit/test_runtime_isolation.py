"""The runtime runs where nothing but numpy and safetensors is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_programs import plain_program

import bitstrata_runtime
from bitstrata_runtime import Session
from bitstrata_runtime.artifact import write

# Everything outside the standard library is refused, but for what is allowed below.
PROGRAM = """
import importlib.abc
import sys

ALLOWED = set(sys.stdlib_module_names) | {"numpy", "safetensors", "bitstrata_runtime"}
refused = []


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in ALLOWED:
            refused.append(name)
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None


loaded = [name for name in ("torch", "bitstrata", "sklearn", "tyro", "rich", "scipy") if name in sys.modules]
assert not loaded, f"loaded before the test began: {loaded}"
sys.meta_path.insert(0, Finder())
try:
    import torch
except ModuleNotFoundError:
    refused.clear()
else:
    raise SystemExit("the finder does not block")

import numpy as np

known = set(sys.modules)
import bitstrata_runtime

# None of these is needed to run an artifact, and each takes as long to import as a part of this package.
slow = {"importlib.metadata", "numpy.typing", "shutil", "secrets"} & (set(sys.modules) - known)
assert not slow, f"imported for nothing: {slow}"
path, executor, wide = sys.argv[1:]
session = bitstrata_runtime.load(path, executor=executor)
x = np.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).astype(np.uint8)
session.run(x)
session.upgrade(int(wide))
print(bitstrata_runtime.__version__, session.run_raw(x).tolist(), sep="|")
print(sorted(set(refused) - {"org"}))  # the standard library's pickle looks for Jython's org
"""


@pytest.mark.parametrize("executor", ["reference", "engine"])
def test_only_numpy_and_safetensors_are_needed(tmp_path, executor):
    if executor == "engine" and not bitstrata_runtime.available_isas():
        pytest.skip("the engine is not built")
    program, path = plain_program(), tmp_path / "net.strata"
    write(program, path)
    root = str(Path(bitstrata_runtime.__file__).parents[1])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), executor, "3"],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.strip().splitlines()
    x = np.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).astype(np.uint8)
    expected = Session.from_program(program, 3, executor="reference").run_raw(x).tolist()
    assert first == f"{bitstrata_runtime.__version__}|{expected}"
    assert second == "[]"


def test_importing_the_runtime_loads_no_engine():
    """`available_isas` and sessions look for the extension; the import alone does not."""
    code = "import bitstrata_runtime, sys; print('bitstrata_runtime._engine' in sys.modules)"
    root = str(Path(bitstrata_runtime.__file__).parents[1])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
