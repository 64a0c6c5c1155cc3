"""The page as its user meets it: `smkd app`, a real browser in front of it, and the internet out of reach."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from classify_data import support_and_rest
from contrast import FAINT
from smkd.classify import FewShotClassifier

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytest.importorskip("gradio", reason="needs the extra 'app'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium", allow_module_level=True)

PATIENCE = 20_000
WIDE, NARROW = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    support_and_rest(folder)
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """Of a running `smkd app`; that it ends cleanly and leaves nothing behind is part of every test's success."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = place / "tmp"
    temporary.mkdir()
    words = [sys.executable, "-m", "smkd", "app", "--backbone", str(place / "net.pt"), "--port", str(port)]
    with (place / "log.txt").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(temporary)})
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, process)
            with pytest.raises(urllib.error.HTTPError, match="400"):  # another page's name, made to point here
                urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example.com"}))
            yield address
        finally:
            process.terminate()
            process.wait(20)
    lines = (place / "log.txt").read_text()
    assert address in lines
    assert "Traceback" not in lines
    assert not list(temporary.glob("smkd-app-*"))


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "smkd app ended"
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("smkd app does not answer")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        # names are not resolved, so whatever is not on this machine fails
        offline = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=offline)
        yield launched
        launched.close()


@pytest.fixture(params=[WIDE], ids=["wide"])
def page(address: str, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh visit, which asks no other machine for anything and logs no error."""
    context = browser.new_context(viewport=request.param, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    elsewhere, errors = [], []
    opened.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else elsewhere.append(r.url))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(address)
    opened.locator(".card").nth(1).wait_for()
    yield opened
    assert elsewhere == []
    assert errors == []
    assert "Traceback" not in opened.content()
    context.close()


def drop(where: Locator, *paths: Path) -> None:
    where.locator("input[type=file]").first.set_input_files([str(path) for path in paths])


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def fill(page: Page, place: Path) -> list[str]:
    """Two classes by hand, named and with their photographs."""
    folders = sorted((place / "support").iterdir())
    for number, folder in enumerate(folders):
        card = page.locator(".card").nth(number)
        card.get_by_role("textbox").fill(folder.name)
        card.get_by_role("textbox").press("Enter")
        page.get_by_role("button", name=f"Remove {folder.name}", exact=True).wait_for()
        drop(card, *pictures(folder))
        card.locator("img").nth(len(pictures(folder)) - 1).wait_for()
    return [folder.name for folder in folders]


def learn(page: Page) -> str:
    """Press the button; what the page says then."""
    page.get_by_role("button", name="Learn", exact=True).click()
    page.locator("#learned p").wait_for()
    return page.locator("#learned").inner_text()


def painted(picture: Locator) -> bool:
    """Whether a picture has come in."""
    picture.wait_for(state="attached")
    picture.evaluate("image => image.scrollIntoView()")  # one far below is only asked for when it comes near
    picture.wait_for()
    return bool(picture.evaluate("async image => { await image.decode(); return image.naturalWidth > 100 }"))


def test_from_photographs_to_a_file_that_predicts(page: Page, place: Path, tmp_path: Path) -> None:
    classes = fill(page, place)
    said = learn(page)
    assert said.startswith("Learned 2 classes from 9 photographs (head: prototype). Of 9 photographs")
    assert "in the mean over classes (95 % interval" in said
    shares = page.locator("#learned li").all_inner_texts()
    assert sorted(re.sub(r"\d of", "n of", share) for share in shares) == [
        f"{classes[0]}: n of 4",
        f"{classes[1]}: n of 5",
    ]
    page.locator("#threshold").get_by_text("of the photographs that get their own class").wait_for()

    asked = pictures(place / "rest")
    drop(page.locator("#tried"), *asked)
    page.locator("#matches img").wait_for()
    assert painted(page.locator("#attention img"))
    assert painted(page.locator("#matches img"))
    assert f"Where [CLS] attends in {asked[0].name}" in page.locator("#attention img").get_attribute("alt")
    assert page.locator("#nearest .thumbnail-item").count() == 5
    assert "patch-by-patch similarity" in page.locator("#words").inner_text()

    with page.expect_download() as download:
        page.get_by_role("button", name="Download the classifier").click()
    file = tmp_path / download.value.suggested_filename
    assert file.name == "classifier.smkd"
    download.value.save_as(file)
    words = [sys.executable, "-m", "smkd", "predict", str(file), *map(str, asked)]
    lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    chances = FewShotClassifier.load(file, accelerator="cpu").predict_proba(asked)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the answers (CSV)").click()
    assert download.value.suggested_filename == "answers.csv"
    rows = list(csv.reader(download.value.path().read_text().splitlines()))
    assert rows[0] == ["image", "answer", "known", "class_1", "probability_1", "class_2", "probability_2"]
    assert [(row[0], row[3], float(row[4])) for row in rows[1:]] == [
        (path.name, classes[chance.argmax()], pytest.approx(chance.max(), abs=1e-4))
        for path, chance in zip(asked, chances, strict=True)
    ]
    thumbnails = page.locator("#tried .thumbnail-item")
    for number, (path, line, chance) in enumerate(zip(asked, lines, chances, strict=True)):
        best = classes[chance.argmax()]
        thumbnails.nth(number).click()
        page.locator("#answer", has_text=f"{path.name}: {best} {100 * chance.max():.0f} %").wait_for()
        assert line == f"{path}: {best} {chance.max():.2f}"
    # pressed faster than answered: the last one counts
    for number in (2, 0, 3, 1):
        thumbnails.nth(number).click()
    page.locator("#answer", has_text=f"{asked[1].name}: {classes[chances[1].argmax()]}").wait_for()

    slider = page.get_by_role("slider")
    slider.focus()
    slider.press("End")
    page.locator("#answer", has_text=f"{asked[-1].name}: none of these").wait_for()
    slider.press("Home")
    page.locator("#answer", has_text=" %").wait_for()


def test_what_cannot_be_used_is_one_line(page: Page, place: Path, tmp_path: Path) -> None:
    assert learn(page) == "'class 1' has no photographs: add some, or remove the class"
    first = page.locator(".card").first
    good = pictures(place / "support")
    drop(first, *good[:2], place / "broken.jpg")
    first.get_by_role("alert").wait_for()
    assert first.get_by_role("alert").inner_text() == "cannot read image 'broken.jpg': not an image of a known format"
    first.locator(".thumbnail-item").nth(2).wait_for(state="detached")
    assert first.locator(".thumbnail-item").count() == 2

    first.get_by_role("textbox").fill("class 2")
    first.get_by_role("textbox").press("Enter")
    first.get_by_text("there is a class 'class 2' already").wait_for()

    page.get_by_role("button", name="Remove class 2").click()
    page.locator(".card").nth(1).wait_for(state="detached")
    page.get_by_role("button", name="Learn", exact=True).click()
    page.get_by_text("a classifier needs at least two classes: add one").wait_for()
    assert page.get_by_role("button", name="Download the classifier").count() == 0

    drop(page.locator("#tried"), good[2])
    page.get_by_text("Press Learn first.").wait_for()
    (tmp_path / "notes.txt").write_text("no image")
    drop(page.locator("#tried"), tmp_path / "notes.txt")
    page.get_by_text("cannot read image 'notes.txt': not an image of a known format").wait_for()
    (tmp_path / "a.zip").write_text("no zip")
    page.locator("input[type=file][accept*=zip]").set_input_files(str(tmp_path / "a.zip"))
    page.get_by_text("archive 'a.zip' is damaged, cut short or of another kind").wait_for()
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(FAINT) == []
    # what was there is still there
    assert page.locator(".card .thumbnail-item").count() == 2


@pytest.mark.parametrize("page", [NARROW], indirect=True, ids=["narrow"])
def test_a_zip_on_a_telephone(page: Page, place: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in pictures(place / "support"):
            archive.write(path, f"photos/{path.parent.name}/{path.name}")
    page.locator("input[type=file][accept*=zip]").set_input_files(str(tmp_path / "photos.zip"))
    classes = sorted(folder.name for folder in (place / "support").iterdir())
    for name in classes:
        page.get_by_role("button", name=f"Remove {name}", exact=True).wait_for()
    assert page.locator(".card").count() == 2
    page.locator("#learned p").get_by_text("from 9 photographs").wait_for()  # without a press
    drop(page.locator("#tried"), *pictures(place / "rest"))
    assert painted(page.locator("#matches img"))
    answer, tried = (page.locator(each).bounding_box() for each in ("#answer", "#tried"))
    assert answer["y"] + answer["height"] <= tried["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    assert page.evaluate(FAINT) == []
    # everything that can be operated says what it is
    unnamed = page.locator("button, input, textarea").evaluate_all(
        """all => all.filter(e => e.checkVisibility() && !(e.ariaLabel || e.innerText || e.title ||
                     e.querySelector('img[alt]') || [...(e.labels || [])].some(label => label.innerText))
           ).map(e => e.outerHTML)"""
    )
    assert unnamed == []
