"""Install a wheel in an environment of its own beside numpy and safetensors, and run an artifact there.

python .ci/try_wheel.py WHEEL
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

LIMIT = 5_000_000  # bytes, of what the wheel installs

RUN = """
import sys
import numpy as np
import bitstrata_runtime as runtime

sys.path.insert(0, sys.argv[1])
from helpers_programs import plain_program
from bitstrata_runtime.artifact import write

write(plain_program(), sys.argv[2])
x = np.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).astype(np.uint8)
for bits in (1, 2, 3, 4):
    expected = runtime.load(sys.argv[2], bits, executor="reference").run_raw(x)
    assert expected.any()
    for isa in runtime.available_isas():
        session = runtime.load(sys.argv[2], bits, executor="engine", isa=isa, threads=2)
        assert np.array_equal(session.run_raw(x), expected), (bits, isa)
loaded = {"torch", "tyro", "rich", "scipy"} & set(sys.modules)
assert not loaded, loaded
print("runs on", ", ".join(runtime.available_isas()))
"""


def main() -> None:
    """Exit with an error unless the wheel is small and runs."""
    wheel = Path(sys.argv[1]).resolve()
    tests = Path(__file__).resolve().parents[1] / "tests"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "safetensors"], check=True)
        before = _size(Path(folder))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", str(wheel)], check=True)
        installed = _size(Path(folder)) - before
        artifact = str(Path(folder) / "net.strata")
        subprocess.run([python, "-I", "-c", RUN, str(tests), artifact], check=True, cwd=folder)
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {installed:,} installed")
    if installed > LIMIT:
        raise SystemExit(f"{wheel.name}: installs {installed:,} bytes, the limit is {LIMIT:,}")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


if __name__ == "__main__":
    main()
