"""`smkd explain`: the page of one photograph's answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from classify_data import blobs, support_and_rest
from command_line import refused, smkd
from smkd.classify import FewShotClassifier


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    support_and_rest(folder)
    for name, backbone in (("net", folder / "net.pt"), ("pixels", "pixels")):
        smkd("fit", folder / "support", "-o", folder / f"{name}.smkd", "--backbone", backbone)
    return folder


def test_the_page_shows_what_the_app_shows(place: Path, tmp_path: Path) -> None:
    image = min((place / "rest").rglob("*.png"))
    done = smkd(
        "explain", place / "net.smkd", image, "-o", tmp_path / "a.html", "--support", place / "support"
    ).stdout  # fmt: skip
    page = (tmp_path / "a.html").read_text()
    loaded = FewShotClassifier.load(place / "net.smkd")
    chances = dict(zip(loaded.classes_, loaded.predict_proba([image])[0], strict=True))
    best = max(chances, key=chances.__getitem__)
    assert done.splitlines()[0] == f"{image}: {best} {100 * chances[best]:.0f}\u00a0%"
    for name, chance in chances.items():
        assert f"<tr><td>{name}</td><td>{100 * chance:.1f} %</td></tr>" in page
    assert page.count("data:image/jpeg") == 6  # the photograph and five of the support
    assert page.count("data:image/webp") == 2  # attention and matches
    assert "The 6 matches that add most" in page
    assert "http" not in page.replace("http-equiv", "")


def test_without_the_photographs_or_a_network(place: Path, tmp_path: Path) -> None:
    image = min((place / "rest").rglob("*.png"))
    smkd("explain", place / "net.smkd", image, "-o", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/jpeg") == page.count("data:image/webp") == 1
    assert "--support FOLDER shows them" in page
    smkd("explain", place / "pixels.smkd", image, "-o", tmp_path / "a.html", "--reject", "1")
    page = (tmp_path / "a.html").read_text()
    assert "data:image/webp" not in page
    assert "Plain colours have no attention" in page
    assert "<h1>none of these</h1>" in page


def test_wrong_input(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "new.png"
    image.write_bytes(min((place / "rest").rglob("*.png")).read_bytes())
    out = tmp_path / "a.html"
    line = refused("explain", place / "net.smkd", image, "-o", out, "--support", place / "rest")
    assert "the classifier has learned from none of its 4 images" in line
    assert "would be replaced" in refused("explain", place / "net.smkd", image, "-o", image)
    assert "is not a page of smkd" in refused("explain", place / "net.smkd", image, "-o", place / "net.pt")
    assert "does not exist" in refused("explain", tmp_path / "none.smkd", image, "-o", out)
    assert "none.jpg" in refused("explain", place / "net.smkd", tmp_path / "none.jpg", "-o", out)
    (tmp_path / "bad.jpg").write_text("no image")
    assert "bad.jpg" in refused("explain", place / "net.smkd", tmp_path / "bad.jpg", "-o", out)
    values, labels = blobs((2, 2))
    FewShotClassifier().fit(values, labels).save(tmp_path / "plain.smkd")
    assert "has no backbone" in refused("explain", tmp_path / "plain.smkd", image, "-o", out)
    assert not out.exists()
