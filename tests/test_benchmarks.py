"""The scripts of benchmarks/: each can be imported, and its README says how to start it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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
