"""Install a wheel in an environment of its own beside numpy and safetensors, and run an artifact there.

python .ci/try_wheel.py WHEEL [ROOT]

ROOT: of another processor's system, as .ci/python-aarch64 makes one; Python is that one's, emulated.
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
sys.path[:0] = sys.argv[3:]
import numpy as np
import bitstrata_runtime as runtime

sys.path.insert(0, sys.argv[1])
from helpers_programs import plain_program
from bitstrata_runtime.artifact import write

write(plain_program(), sys.argv[2])
x = np.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).astype(np.uint8)
assert "generic" in runtime.available_isas()  # else the extension does not load
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
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 2:
            installed = _try_emulated(wheel, Path(sys.argv[2]).resolve(), Path(folder))
        else:
            installed = _try_here(wheel, Path(folder))
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {installed:,} installed")
    if installed > LIMIT:
        raise SystemExit(f"{wheel.name}: installs {installed:,} bytes, the limit is {LIMIT:,}")


def _try_here(wheel: Path, folder: Path) -> int:
    """Run the wheel with this Python; return how many bytes it installs."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "safetensors"], check=True)
    before = _size(folder)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", str(wheel)], check=True)
    installed = _size(folder) - before
    _run([python], folder)
    return installed


def _try_emulated(wheel: Path, root: Path, folder: Path) -> int:
    """The same with the Python of another processor."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    venv.create(folder / "tools", with_pip=True)
    pip = [str(folder / "tools" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    pip += ["--only-binary=:all:", "--python-version", version, "--target"]
    needs, own = folder / "needs", folder / "own"
    platform = "manylinux2014_aarch64"
    subprocess.run([*pip, str(needs), "--platform", platform, "numpy", "safetensors"], check=True)
    platform = wheel.stem.rsplit("-", 1)[1]
    subprocess.run([*pip, str(own), "--platform", platform, str(wheel)], check=True)
    python = str(root / "usr" / "bin" / f"python{version}")
    _run(["qemu-aarch64", "-L", str(root), python], folder, str(own), str(needs))
    return _size(own)


def _run(python: list[str], folder: Path, *packages: str) -> None:
    tests = Path(__file__).resolve().parents[1] / "tests"
    subprocess.run(
        [*python, "-I", "-c", RUN, str(tests), str(folder / "net.strata"), *packages], check=True, cwd=folder
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


if __name__ == "__main__":
    main()
