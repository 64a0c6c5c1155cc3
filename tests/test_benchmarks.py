"""The scripts of benchmarks/: each can be imported, and its README says how to start it."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
import gpu_hours
import peers
from smkd import api
from smkd.config.loading import resolve

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


def test_settings_for_a_gpu_are_settings() -> None:
    for part in gpu.parts(tiny=False):
        given = getattr(part.measure, "keywords", {})
        if given:
            resolve(given["recipe"], list(given["settings"]))
    for phase in gpu.PHASES:
        config = resolve(f"patterns-{phase}", list(gpu.SMALL_IMAGES))
        assert config.model.image_size % config.model.patch_size == 0


@pytest.mark.slow
def test_every_part_for_a_gpu_runs_on_a_cpu_and_is_kept(tmp_path: Path) -> None:
    words = [sys.executable, str(FOLDER / "gpu.py"), "--cpu", "--tiny", "--out", "found", "--docs", "page.md"]
    first = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    assert [name for name, part in found.items() if "error" in part] == []
    assert list(found) == ["about", *(part.name for part in gpu.parts(tiny=True))]
    assert len(found["costs"]["costs"]) == gpu.LARGEST_COSTS
    page = (tmp_path / "page.md").read_text()
    assert page.count("smkd bench") == sum(part.name.startswith("bench-") for part in gpu.parts(tiny=True))
    (tmp_path / "found" / "costs.json").unlink()
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.findall(r"^([\w-]+): \d", again.stdout, re.MULTILINE) == ["costs"]
    assert again.stdout.count(": is there") == len(found) - 2


def test_heads_answer_as_their_peers() -> None:
    rows = list(peers.measured(peers.SKLEARN, *peers.gaussians(), episodes=20))
    assert len(rows) == len(peers.SKLEARN) * len(peers.SHOTS)
    assert all(row["accuracy"] > 55 for row in rows)
    assert [row for row in rows if abs(row["difference"]) > row["ci95"]] == []
    assert all(row["difference"] == 0 for row in rows if row["shot"] == 5)


@pytest.mark.slow
def test_heads_answer_as_those_of_easyfsl() -> None:
    pytest.importorskip("easyfsl")
    assert peers.easyfsl_is_here()
    pairs = [pair for pair in peers.EASYFSL if pair.same]
    assert all(row["difference"] == 0 for row in peers.measured(pairs, *peers.gaussians(), episodes=20))
