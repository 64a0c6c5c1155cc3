"""The documentation as a web site: it is built strictly and without a network, and no page asks another machine."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from contrast import FAINT

pytestmark = pytest.mark.slow

pytest.importorskip("zensical", reason="needs the extra 'docs'")
pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra 'docs'")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NOBODY = "http://127.0.0.1:9"
"""A proxy that is not there, so that whatever asks the network fails."""
SEEN = ("index.html", "why-low.html", "reproduce.html", "api.html", "settings.html", "extending.html")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), NOBODY)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **proxies, "NO_COLOR": "1"}
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "src").symlink_to(ROOT / "src")
    done = build(folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "griffe" not in said  # a docstring that names what is not there
    return folder / "site"


class Fetched(HTMLParser):
    """What a browser fetches for a page by itself; links that a reader may follow are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag != "a":
            self.places += [place for name in ("src", "srcset", "data", "poster") if (place := given.get(name))]
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.places.append(given.get("href") or "")


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    menu = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert sorted(menu) == sorted(f"{page}.md" for page in pages)


def test_no_page_fetches_from_another_host(site: Path) -> None:
    wrong = []
    for path in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(path.read_text(encoding="utf-8"))
        wrong += [f"{path.name}: {place}" for place in parser.places if re.match(r"(\w+:)?//", place)]
    for path in site.rglob("*.css"):
        places = re.findall(r"(?:url\(|@import\s*)['\"]?((?:https?:)?//[^)'\"]*)", path.read_text(encoding="utf-8"))
        wrong += [f"{path.name}: {place}" for place in places]
    assert wrong == []


def test_everything_public_has_its_words(site: Path) -> None:
    import smkd

    page = (site / "api.html").read_text(encoding="utf-8")
    found = set(re.findall(r'<h3 id="([\w.]+)"', page))
    assert {name for name in smkd.__all__ if not name.startswith("__")} <= {name.rpartition(".")[2] for name in found}


@pytest.mark.parametrize(
    ("link", "built"), [("method.md#a-heading", True), ("no-such-page.md", False), ("method.md#no-such-heading", False)]
)
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path, link: str, built: bool) -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n[words]({link})\n")
    (tmp_path / "docs" / "method.md").write_text("# The method\n\n## A heading\n")
    assert (build(tmp_path).returncode == 0) is built


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser(address: str, scheme: str, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    wrong: list[str] = []
    with playwright.sync_playwright() as started:
        offline = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=offline)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
        for name in SEEN:
            page.goto(address + name, wait_until="load")
            assert page.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
            assert page.evaluate(FAINT) == [], name
        browser.close()
    assert wrong == []


def test_fonts_are_the_systems() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nmarkdown_extensions:")[0]
    assert yaml.safe_load(settings)["theme"]["font"] is False
