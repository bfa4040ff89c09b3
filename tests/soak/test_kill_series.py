"""`kill -9` at random moments: every continued run ends in the bits of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def killed(table: Path, *options: str) -> dict[str, Any]:
    """The table of a series, run in a process that has no threads to fork."""
    argv = [sys.executable, str(ROOT / "tests" / "helpers_kill.py"), "--json", str(table), *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert table.exists(), done.stderr
    return json.loads(table.read_text())


def assert_equal(table: dict[str, Any], kills: int) -> None:
    assert table["kills"] == len(table["rows"]) == kills
    for row in table["rows"]:
        assert (row["weights_equal"], row["artifact_equal"], row["record_equal"]) == (True, True, True), row
    assert any("exit code" not in row["died"] for row in table["rows"])  # the kills did kill


def test_four_kills(tmp_path: Path) -> None:
    options = ("--kills", "4", "--seed", "2", "--epochs", "1", "--recipes", "strata")
    assert_equal(killed(tmp_path / "kills.json", *options), 4)


@pytest.mark.soak
def test_fifty_kills() -> None:
    """Writes build/kill_series.json."""
    assert_equal(killed(ROOT / "build" / "kill_series.json", "--kills", "50"), 50)
