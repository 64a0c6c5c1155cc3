"""`smkd report`: the page of finished runs, of one that was killed, and of one whose images are gone."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from command_line import smkd
from run_files import two_phases
from smkd import api
from smkd.data.datasets import open_split

pytestmark = pytest.mark.slow
STORY = [
    "Result", "How it learns", "One episode", "Patches that correspond", "Where [CLS] looks", "A map of unseen classes",
    "Training", "Hardest classes", "Settings that differ from the recipe", "Environment and commands",
    "What to do next",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each phase, `one` and `two`, and the page of both."""
    folder = tmp_path_factory.mktemp("report")
    two_phases(folder)
    done = smkd("report", "one", "two", "-o", "both.html", "--episodes", "50", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def headings(page: str) -> list[str]:
    return [unescape(each) for each in re.findall(r"<h2>(.*?)</h2>", page)]


def test_the_story_of_two_phases(runs: Path) -> None:
    page = (runs / "both.html").read_text()
    assert headings(page) == STORY
    assert len(page) < 3_000_000
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]{0,40})', page))
    rows = re.findall(r"<tr><td>(.*?)</td><td>(\d\d\.\d\d ± \d+\.\d\d)</td>", page)
    assert [name for name, _ in rows] == ["raw pixels", "random weights", "one", "two"]
    config = api.resolve("patterns-distill", ["init=one"])
    protocol = config.evaluation.model_copy(update={"episodes": 50})
    assert rows[-1][1] == str(api.evaluate(api.load(runs / "two"), config, protocol)[0])
    assert rows[0][1] == str(api.evaluate("pixels", config, protocol)[0])
    for word in (
        "data.limit_per_class",
        "256 images of 64 classes",
        "smkd eval two",
        "raw pixels",
        "guessing gives 20 %",
    ):
        assert word in unescape(page), word


def test_one_run_is_told_from_what_it_started_from(runs: Path) -> None:
    assert smkd("report", "two", "-o", "two.html", "--episodes", "50", cwd=runs).returncode == 0
    rows = re.findall(r"<tr><td>(.*?)</td><td>(\d\d\.\d\d ± \d+\.\d\d)</td>", (runs / "two.html").read_text())
    both = re.findall(r"<tr><td>(.*?)</td><td>(\d\d\.\d\d ± \d+\.\d\d)</td>", (runs / "both.html").read_text())
    assert [row for row in both if row[0] != "random weights"] == rows


def test_a_run_that_was_killed_before_its_first_checkpoint(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed" / "metrics.jsonl").write_text(lines[0] + '{"kind": "tra')
    (tmp_path / "killed" / "env.json").write_text("{")
    done = smkd("report", "killed", "-o", "page.html", "--episodes", "50", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "holds no checkpoint" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert "What could not be shown" in headings(page)
    assert "Training" in headings(page)
    assert re.findall(r"<tr><td>(.*?)</td><td>\d\d\.\d\d ± ", page) == ["raw pixels", "random weights"]


def test_a_run_whose_images_are_gone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "moved")
    text = (tmp_path / "moved" / "config.yaml").read_text()
    (tmp_path / "moved" / "config.yaml").write_text(
        text.replace("dataset: patterns", "dataset: folder").replace("root: null", "root: gone", 1)
    )
    done = smkd("report", "moved", "-o", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'gone' does not exist" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert headings(page)[:3] == ["Result", "What could not be shown", "Training"]
    assert "Best validation accuracy" in page


def test_images_that_were_held_out_are_not_called_unseen_classes(tmp_path: Path) -> None:
    images = open_split(api.resolve("patterns-pretrain").data, "test")
    for row in range(0, len(images), 4):
        if images.labels[row] < 6:
            place = tmp_path / "photos" / images.class_names[images.labels[row]]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.load(row).permute(1, 2, 0).numpy()).save(place / f"{row}.png")
    words = ("data=photos", "data.split_by=images", "out=run", "epochs=1", "batch_size=16", "validation.every=0",
             "evaluation.query=2", "evaluation.shots=[1]")  # fmt: skip
    assert smkd("pretrain", "patterns-pretrain", *words, cwd=tmp_path).returncode == 0
    done = smkd("report", "run", "-o", "page.html", "--episodes", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "on images it has not seen" in page
    assert "A map of classes" in page
    assert "unseen class" not in page


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    images = open_split(api.resolve("patterns-pretrain").data, "test")
    for row in range(0, len(images), 4):
        split = "train" if images.labels[row] < 6 else "test"
        place = tmp_path / "photos" / split / images.class_names[images.labels[row]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.load(row).permute(1, 2, 0).numpy()).save(place / f"{row:04}.png")
    for place in (tmp_path / "photos" / "test").iterdir():
        min(place.iterdir()).write_bytes(b"no image")
    words = ("data=photos", "data.on_error=skip", "out=run", "epochs=1", "batch_size=16", "validation.every=0",
             "evaluation.query=2", "evaluation.shots=[1]")  # fmt: skip
    assert smkd("pretrain", "patterns-pretrain", *words, cwd=tmp_path).returncode == 0
    done = smkd("report", "run", "-o", "page.html", "--episodes", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert headings(page)[:3] == ["Result", "What could not be shown", "How it learns"]
    assert "cannot read image" in page
    assert "Hardest classes" in headings(page)


def test_two_runs_of_one_name(runs: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(runs / "one", tmp_path / place / "run")
    done = smkd("report", "a/run", "b/run", "-o", "page.html", "--episodes", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"<tr><td>(.*?)</td><td>\d\d\.\d\d ± ", (tmp_path / "page.html").read_text())
    assert rows == ["raw pixels", "random weights", "a/run", "b/run"]


def test_in_a_browser(runs: Path) -> None:
    """No error, no request, nothing that makes a narrow page scroll sideways; light and dark differ."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser")
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path)
        colors = []
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((runs / "both.html").as_uri())
            assert said == []
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
            colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        browser.close()
    assert colors[0] == colors[2] != colors[1] == colors[3]
