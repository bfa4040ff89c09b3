"""What a machine is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitstrata_runtime.machine import cpu_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: CPU\n\nmodel name\t: another\n", "CPU (family 26, model 2)"),
        ("model name\t: CPU\nmodel\t: 2\n", "CPU"),
    ],
)  # fmt: skip
def test_generations_of_one_brand_have_names_of_their_own(tmp_path: Path, text: str, name: str) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    assert cpu_name(info) == name


def test_a_machine_that_says_nothing_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\n")
    assert cpu_name(tmp_path / "cpuinfo") == cpu_name(tmp_path / "none") != ""
