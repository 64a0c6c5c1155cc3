"""The scripts of benchmarks/: each can be imported, and its README says how to start it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import gpu_hours
from smkd import api

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_it_imports_is_there(name: str) -> None:
    assert runpy.run_path(str(FOLDER / name), run_name="imported")


def test_the_readme_has_a_line_for_each() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\| `python benchmarks/(\w+\.py)", text, re.MULTILINE)
    started = [name for name in SCRIPTS if '__name__ == "__main__"' in (FOLDER / name).read_text(encoding="utf-8")]
    assert commands == started
    assert all(f"`{name}`" in text for name in set(SCRIPTS) - set(started))


@pytest.mark.slow
def test_the_page_has_the_hours_that_are_worked_out(capsys: pytest.CaptureFixture[str]) -> None:
    gflop = {
        phase: gpu_hours.gflop_an_image(api.resolve(f"mini-imagenet-{phase}", ["batch_size=64"]))
        for phase in gpu_hours.PHASES
    }
    gpu_hours.print_runs(gpu_hours.runs(gflop), 0.2, 0.4)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    page = (FOLDER.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    assert len(rows) == 8
    assert [row for row in rows if row not in page] == []


def test_passes_are_the_fewest_that_fit() -> None:
    card = gpu_hours.Card(12, 1)
    assert gpu_hours.passes(card, 512, 0.125, 0.5) == 8
    assert gpu_hours.passes(card, 64, 0.125, 0.5) == 1
    assert gpu_hours.passes(gpu_hours.Card(3, 1), 512, 2.0, 0.5) is None
