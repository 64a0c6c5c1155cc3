"""docs/why-low.md as a user types it: its commands on a tiny run, and that the log has what the page says to read."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from classify_data import support_and_rest
from command_line import smkd
from made_images import noisy_splits

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "why-low.md"
FETCHED = "dinov2-small"
"""Needs a network, so its lines are left out; tests/test_docs.py parses them."""
QUICK = ("data=D", "batch_size=8", "data.limit_per_class=4", "epochs=2", "accelerator=cpu", "precision=fp32")


def commands() -> list[str]:
    """The lines of the page's blocks, for the smallest recipes."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if FETCHED not in line]
    return [line.replace("folder-distill", "debug-distill") for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a run of each phase, and photographs for a classifier."""
    folder = tmp_path_factory.mktemp("low")
    noisy_splits(folder / "D", images=21)
    for words in (
        ("pretrain", "debug-pretrain", *QUICK, "out=OTHER"),
        ("distill", "debug-distill", *QUICK, "out=RUN", "init=OTHER", "data.sampler.classes=2"),
    ):
        done = smkd(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    support_and_rest(folder)
    (folder / "support").rename(folder / "photos")
    (folder / "rest").rename(folder / "checked")
    (folder / "wrong.jpg").write_bytes(next((folder / "checked").rglob("*.png")).read_bytes())
    return folder


def test_every_command_of_the_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMKD_BACKBONE", str(place / "net.pt"))
    said = {}
    for line in commands():
        words = shlex.split(line, comments=True)
        if words[:1] != ["smkd"]:
            continue
        done = smkd(*words[1:], cwd=place)
        # 1: `smkd data verify` found that the images are small, which it is asked about
        assert done.returncode in ((0, 1) if words[1:3] == ["data", "verify"] else (0,)), f"{line}\n{done.stderr}"
        said[line.partition("#")[0].strip()] = done.stdout
    assert "queries a class, " in said["smkd eval RUN --protocol standard"]
    assert "resize 32, crop 32" in said["smkd eval RUN --protocol standard"]
    assert "data.mean=" in said["smkd data stats D"]
    assert "init: " in said["smkd runs diff RUN OTHER"]
    assert {path.suffix for path in (place / "sheets").iterdir()} == {".png"}
    assert all(
        (place / name).exists() for name in ("result.json", "report.json", "page.html", "score.html", "why.html")
    )


def test_the_log_has_what_the_page_says_to_read(place: Path) -> None:
    found = {}
    for line in commands():
        if line.startswith("grep "):
            found[line] = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, text=True).stdout
    assert len(found) == 6
    [train] = [text for line, text in found.items() if line == "grep '\"train\"' RUN/metrics.jsonl | tail -n 1"]
    for name in ("lr", "loss", "target_entropy", "mean_target_entropy", "target_prototypes", "feature_rank"):
        assert f'"{name}": ' in train
    assert '"accuracy": ' in found["grep '\"validation\"' RUN/metrics.jsonl"]
    assert "per_class: 4" in found["grep -A2 sampler RUN/config.yaml"]
