"""Attention, matched patches, answers and their pictures, against slow twins."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from classify_data import tiny_checkpoint
from made_images import photographs
from smkd.app.support import START, Support, learn, taken
from smkd.classify import Encoder, FewShotClassifier, choose_features, open_encoder
from smkd.classify.answers import NONE, Lesson, answer
from smkd.classify.choose_features import OWN, Reader
from smkd.classify.pictures import Pictures
from smkd.errors import DataError
from smkd.fewshot.candidates import features_from
from smkd.fewshot.features import pool
from smkd.models.vit import Tokens
from smkd.objectives.patch import match_paper
from smkd.viz.explain import MATCHES, reasons
from smkd.viz.patch_pictures import COLORS, GAP, SIDE, attention_picture, central_square, matches_picture
from smkd.viz.seen import Match, match_patches, see


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    photographs(folder / "support", (3, 2, 4))
    photographs(folder / "rest", (3, 3, 3), skip=4)
    tiny_checkpoint(folder / "net.pt")
    return folder


@pytest.fixture(scope="module")
def encoder(place: Path) -> Encoder:
    return open_encoder(place / "net.pt", accelerator="cpu")


def support_of(encoder: Encoder, folder: Path) -> Support:
    support = Support()
    for place in sorted(folder.iterdir()):
        photos, refused = taken(encoder, [str(path) for path in sorted(place.iterdir())])
        assert not refused
        support = support.with_class(place.name, photos)
    return support


@pytest.fixture(scope="module")
def lesson(place: Path, encoder: Encoder) -> Lesson:
    return learn(Reader(encoder, OWN), support_of(encoder, place / "support"))


def loaded(folder: Path, count: int) -> list[torch.Tensor]:
    pictures = Pictures(sorted(folder.rglob("*.png"))[:count])
    return [pictures.load(number) for number in range(count)]


@pytest.mark.parametrize("word", ["2", "1"])
def test_what_is_seen_is_what_the_features_come_from(word: str, place: Path, encoder: Encoder) -> None:
    """Also of a block before the last, which a classifier may read."""
    encoder, images = encoder.reading(features_from(word)), loaded(place / "rest", 4)
    seen = see(encoder, images)
    assert seen is not None
    assert seen.grid**2 == seen.patches.shape[1] == seen.attention.shape[1]
    torch.testing.assert_close(seen.attention.sum(dim=1), torch.ones(4))
    # the attention-weighted mean of these patches is the second half of the feature
    row = torch.cat([torch.zeros(4, 1), seen.attention], dim=1)[:, None]
    tokens = Tokens(torch.zeros(4, seen.patches.shape[2]), seen.patches, row)
    assert encoder.config.features.parts == ("cls", "weighted_mean")
    own = pool([tokens], encoder.config.features)[:, seen.patches.shape[2] :]
    features = torch.from_numpy(encoder([image.permute(1, 2, 0).numpy() for image in images]))
    torch.testing.assert_close(own, features[:, seen.patches.shape[2] :], atol=1e-5, rtol=0)


def test_plain_colours_see_nothing(place: Path) -> None:
    assert see(open_encoder("pixels"), loaded(place / "rest", 1)) is None


def slow_matches(query: torch.Tensor, support: torch.Tensor, attention: torch.Tensor) -> list[Match]:
    found = []
    for n, q in enumerate(query.double().tolist()):
        best, place = -2.0, -1
        for m, s in enumerate(support.double().tolist()):
            dot = sum(a * b for a, b in zip(q, s, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in q)) / math.sqrt(sum(b * b for b in s))
            if cosine > best:
                best, place = cosine, m
        found.append(Match(n, place, best, float(attention[n])))
    return sorted(found, key=lambda match: -match.weight * match.cosine)


@pytest.mark.parametrize("sizes", [(1, 1), (9, 9), (16, 4)])
def test_matches_are_those_of_plain_loops(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sizes[0])
    query, support = (torch.randn(size, 12, generator=generator) for size in sizes)
    attention = torch.rand(sizes[0], generator=generator).softmax(dim=0)
    found, slow = match_patches(query, support, attention), slow_matches(query, support, attention)
    assert [(match.query, match.support) for match in found] == [(match.query, match.support) for match in slow]
    np.testing.assert_allclose([match[2:] for match in found], [match[2:] for match in slow], atol=1e-6)


def test_matches_are_those_of_training() -> None:
    generator = torch.Generator().manual_seed(0)
    query, support, unused = torch.randn(3, 9, 12, generator=generator)
    attention = torch.rand(9, generator=generator).softmax(dim=0)
    # the teacher's image is the query, seen in view 1; the student's is the support image, seen in view 0
    teacher, student = torch.stack([unused, query])[:, None], torch.stack([support, unused])[:, None]
    trained = match_paper(student, teacher, torch.ones(1, 1, dtype=torch.bool), torch.stack([attention] * 2)[:, None])
    of_view = (trained.teacher >= 9) & (trained.student < 9)
    pairs = {int(t) - 9: int(s) for t, s in zip(trained.teacher[of_view], trained.student[of_view], strict=True)}
    assert pairs == {match.query: match.support for match in match_patches(query, support, attention)}


def test_an_answer_is_the_classifiers(place: Path, encoder: Encoder, lesson: Lesson) -> None:
    paths = [str(path) for path in sorted((place / "rest").rglob("*.png"))]
    photos, _ = taken(encoder, paths)
    chances, known = lesson.classifier.predict_proba(paths), lesson.classifier.known_proba(paths)
    support = np.stack([photo.feature for photo in lesson.photos]).astype(np.float64)
    for photo, chance, familiar in zip(photos, chances, known, strict=True):
        given = answer(lesson, photo, 0.0)
        assert list(given.chances) == [str(lesson.classifier.classes_[row]) for row in np.argsort(-chance)]
        assert given.text == next(iter(given.chances))
        assert given.known == pytest.approx(familiar)
        assert sum(given.chances.values()) == pytest.approx(1)
        cosines = support @ photo.feature / np.linalg.norm(support, axis=1) / np.linalg.norm(photo.feature)
        nearest = np.argsort(-cosines)[:5]
        assert [each.photo for each in given.neighbours] == [lesson.photos[row] for row in nearest]
        assert [each.label for each in given.neighbours] == [
            Path(lesson.photos[row].path).parent.name for row in nearest
        ]
        np.testing.assert_allclose([each.cosine for each in given.neighbours], cosines[nearest], atol=1e-6)
        assert answer(lesson, photo, 1.0).text == NONE
        assert answer(lesson, photo, familiar + 1e-6).rejected
        assert not answer(lesson, photo, familiar - 1e-6).rejected


def test_a_support_photograph_is_nearest_to_itself(encoder: Encoder, lesson: Lesson) -> None:
    given = answer(lesson, lesson.photos[3], 0.5)
    assert given.neighbours[0].photo == lesson.photos[3]
    why = reasons(lesson, given)
    assert why is not None
    # every patch matches itself, so the similarity is the sum of the weights
    assert why.similarity == pytest.approx(1, abs=1e-5)
    assert all(match.query == match.support for match in why.drawn)
    assert len(why.drawn) == MATCHES
    assert why.attention.size == (SIDE, SIDE)
    assert why.matches.size == (2 * SIDE + GAP, SIDE)


def test_without_two_photographs_of_a_class_nothing_is_unknown(place: Path, encoder: Encoder, tmp_path: Path) -> None:
    lesson = learn(Reader(encoder, OWN), support_of(encoder, photographs(tmp_path / "few", (1, 1))))
    given = answer(lesson, lesson.photos[0], 1.0)
    assert given.known is None
    assert given.text != NONE


def test_classes_that_are_too_few_or_empty(encoder: Encoder, lesson: Lesson) -> None:
    one = Support().with_class("owl", lesson.photos[:2])
    for support, line in ((Support(), "at least two classes"), (one, "at least two classes"),
                          (one.with_class("cat"), "'cat' has no photographs")):  # fmt: skip
        with pytest.raises(DataError, match=line) as caught:
            learn(Reader(encoder, OWN), support)
        assert "\n" not in str(caught.value)


def test_a_photograph_that_is_gone_is_named(lesson: Lesson, encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    path.write_bytes(Path(lesson.photos[0].path).read_bytes())
    (photo,), _ = taken(encoder, [str(path)])
    given = answer(lesson, photo, 0.0)
    path.unlink()
    with pytest.raises(DataError, match=r"gone\.png"):
        reasons(lesson, given)


def test_the_brightest_square_is_where_attention_is() -> None:
    attention = torch.full((9,), 0.01)
    attention[5] = 0.92
    picture = attention_picture(Image.new("RGB", (SIDE, SIDE), (90, 90, 90)), attention, 3)
    pixels = np.asarray(picture).astype(float).sum(axis=2)
    patch = SIDE // 3
    means = pixels.reshape(3, patch, 3, patch).mean(axis=(1, 3))
    assert means.argmax() == 5
    assert means[1, 2] > 2 * np.delete(means.ravel(), 5).max()


def test_lines_run_from_patch_to_patch() -> None:
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    picture = matches_picture(grey, grey, [Match(0, 5, 0.9, 0.5), Match(15, 5, 0.8, 0.1)], 4)
    pixels, patch = np.asarray(picture).astype(int), SIDE / 4

    def near(x: float, y: float, color: str) -> bool:
        window = pixels[max(0, int(y) - 4) : int(y) + 5, max(0, int(x) - 4) : int(x) + 5].reshape(-1, 3)
        return bool((abs(window - np.array(ImageColor.getrgb(color))).sum(axis=1) < 60).any())

    start, end = (patch, patch / 2), (SIDE + GAP + patch, 1.5 * patch)
    second = (4 * patch, 3.5 * patch)
    for share in (0.2, 0.5, 0.8):
        assert near(start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]), COLORS[0])
        assert near(second[0] + share * (end[0] - second[0]), second[1] + share * (end[1] - second[1]), COLORS[1])
    untouched = pixels[int(2 * patch) : int(3 * patch), int(patch / 4) : int(patch * 0.9)]
    assert (untouched == 128).all()


def test_the_square_is_the_centre_of_the_photograph() -> None:
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[0, :, 20:60] = 255
    square = np.asarray(central_square(image, 48, 48))
    assert square.shape == (SIDE, SIDE, 3)
    assert square[..., 0].mean() > 250
    # a crop smaller than the resized side shows less of it
    assert np.asarray(central_square(image, 60, 48))[..., 0].min() == 255


@pytest.mark.parametrize("word", ["auto", OWN, "1:cls"])
def test_the_page_learns_what_fit_learns(
    word: str, place: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where other features are chosen than those that photographs were encoded with before."""
    if word == "auto":  # the tiny network's choice would hang on rounding
        monkeypatch.setattr(
            choose_features,
            "choose_features",
            lambda _, __, ___, tried: next(each for each in tried if each.blocks == (1,)),
        )
    reader = Reader(encoder, word)
    lesson = learn(reader, support_of(reader.encoder, place / "support"))
    files = sorted((place / "support").rglob("*.png"))
    fitted = FewShotClassifier(encoder, "auto", reading=word).fit(files, [path.parent.name for path in files])
    assert fitted.encoder_ is not None
    assert lesson.encoder.config == fitted.encoder_.config
    if word != OWN:
        assert lesson.encoder.config.features.blocks == (1,)
    np.testing.assert_allclose(lesson.classifier.support_, fitted.support_, atol=1e-5)
    asked = sorted((place / "rest").rglob("*.png"))
    photos, _ = taken(reader.encoder, list(map(str, asked)))
    for photo, expected in zip(photos, fitted.predict_proba(asked), strict=True):
        chances = answer(lesson, lesson.as_read(photo), 0.3).chances
        assert [chances[str(name)] for name in fitted.classes_] == pytest.approx(expected, abs=1e-4)


def test_complete_classes_are_learned_without_a_press(place: Path, encoder: Encoder, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra 'app'")
    from smkd.app.events import press_learn

    reader, support = Reader(encoder, OWN), support_of(encoder, place / "support")
    lesson, said, _ = press_learn(reader, tmp_path, support, None, None, ready=True)
    assert isinstance(lesson, Lesson)
    assert "Learned 3 classes from 9 photographs" in said
    for incomplete in (START, support.with_class(), Support(support.groups[:1])):
        before = press_learn(reader, tmp_path, incomplete, lesson, None, ready=True)
        assert not any(isinstance(each, Lesson) or "alert" in str(each) for each in before)
