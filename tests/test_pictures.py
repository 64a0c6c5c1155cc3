"""Pictures of `smkd plot` and `smkd report`: what they show against plain loops, and their files."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from command_line import refused, smkd
from run_files import two_phases
from smkd import api
from smkd.classify.encoder import open_encoder
from smkd.config.protocol import ProtocolConfig
from smkd.data.datasets import open_split
from smkd.fewshot.accuracy import evaluate_features
from smkd.fewshot.features import Features
from smkd.viz import style
from smkd.viz.curves import read_metrics, run_curves, stacked_curves
from smkd.viz.embedding import project
from smkd.viz.episode import _answers, _drawn, _queries, episode_tiles, typical_episode
from smkd.viz.patch_pictures import attention_tiles
from smkd.viz.seen import holding, see
from smkd.viz.views import _views, phase_picture, view_tiles


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each phase, `one` and `two`, and images of unseen classes in `photos`."""
    folder = tmp_path_factory.mktemp("runs")
    two_phases(folder)
    images = open_split(api.resolve("patterns-pretrain").data, "test")
    for row in range(0, len(images), 20):
        place = folder / "photos" / images.class_names[images.labels[row]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.load(row).permute(1, 2, 0).numpy()).save(place / f"{row}.png")
    return folder


def test_the_patches_that_hold_most_against_a_plain_loop() -> None:
    """As the thresholded maps of DINO: the lowest weights are cut as long as their sum is at most 1 - mass."""
    weights = torch.rand(5, 3, 36, generator=torch.Generator().manual_seed(0))
    weights /= weights.sum(dim=-1, keepdim=True)
    for mass in (0.1, 0.6, 1.0):
        kept = holding(weights, mass)
        for image, head in itertools.product(range(5), range(3)):
            row, total = weights[image, head].tolist(), 0.0
            for place in sorted(range(36), key=row.__getitem__):
                total += row[place]
                assert bool(kept[image, head, place]) == (total > 1 - mass + 1e-6) or abs(total - 1 + mass) < 1e-5


@pytest.mark.slow
def test_attention_of_each_head_against_a_plain_softmax(runs: Path) -> None:
    encoder = open_encoder(runs / "two")
    images = open_split(api.resolve("patterns-pretrain").data, "test")
    loaded = [images.load(row) for row in (0, 40)]
    seen = see(encoder, loaded)
    assert seen is not None
    network = encoder.backbone
    assert network is not None
    config = encoder.config
    pixels = torch.stack(loaded).float() / 255
    side = config.crop
    assert pixels.shape[-1] == side == config.resize
    mean, std = (torch.tensor(each)[:, None, None] for each in (config.mean, config.std))
    with torch.inference_mode():
        x = network.embed((pixels - mean) / std)
        for block in network.blocks[:-1]:
            x = block(x)
        last = network.blocks[-1]
        q, k, _ = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, last.attn.num_heads, -1)).unbind(2)
    for image, head in itertools.product(range(2), range(seen.heads.shape[1])):
        scores = torch.stack([q[image, 0, head] @ k[image, token, head] for token in range(x.shape[1])])
        row = (scores / q.shape[-1] ** 0.5).softmax(dim=0)[1:]
        torch.testing.assert_close(seen.heads[image, head], row / row.sum(), atol=3e-3, rtol=0.05)
    torch.testing.assert_close(seen.attention.sum(dim=1), torch.ones(2))
    tiles = attention_tiles(encoder, loaded, ["a", "b"], heads=True)
    assert len(tiles) == 2 * (3 + seen.heads.shape[1])
    assert [tile.caption for tile in tiles[:4]] == ["a", "all heads", "60 % of it", "head 1"]


@pytest.mark.parametrize("query", ["all", 4])
@pytest.mark.parametrize("head", ["prototype", "ridge"])
def test_an_episode_is_drawn_as_it_was_measured(query: str | int, head: str) -> None:
    rng = np.random.default_rng(0)
    images = open_split(api.resolve("patterns-pretrain").data, "test")
    values = torch.tensor(rng.normal(size=(len(images), 8)) + np.eye(20)[images.labels, :8], dtype=torch.float32)
    features = Features(values, images.labels, images.class_names)
    protocol = ProtocolConfig(way=3, shots=(2,), query=query, episodes=30, seed=3, head=head)
    (result,) = evaluate_features(features, protocol)
    number = typical_episode(result)
    assert abs(float(result.accuracies[number]) - result.mean) == float((result.accuracies - result.mean).abs().min())
    episode, names, members = _drawn(features, protocol, 2, number)
    queries, truth = _queries(episode, members)
    answers = _answers(values, episode, queries, protocol, 2)
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for true, given in zip(truth.tolist(), answers.tolist(), strict=True):
        counts[true, given] += 1
    assert torch.equal(counts, result.counts[number])
    assert episode.classes[0].tolist() == result.classes[number].tolist()
    for way, row in enumerate(episode_tiles(images, features, protocol, 2, number)):
        own = names[int(episode.classes[0, way])]
        assert row[0].caption == f"{own}: support"
        for tile in row[1:]:
            assert tile.right == (tile.caption == f"answer: {own}")
        assert any(tile.right is False for tile in row) == bool(counts[way].sum() > counts[way, way])


def test_views_are_those_of_training_with_their_masks() -> None:
    config = api.resolve("patterns-pretrain")
    images = open_split(config.data, "train")
    plain, masked, local = _views(images, config, 7, config.mask.start_epoch)
    assert [len(plain), len(masked), len(local)] == [2, 2, config.local_views.count]
    changed = [(a != b).any(dim=0) for a, b in zip(plain, masked, strict=True)]
    patch = config.model.patch_size
    for where in changed:
        for part in where.unfold(0, patch, patch).unfold(1, patch, patch).flatten(0, 1):
            assert part.float().mean() in (0, 1) or part.float().mean() > 0.9
    tiles = view_tiles(images, config, [7, 8])
    assert len(tiles) == 2 * (3 + config.local_views.count)
    words = {text.get_text() for text in phase_picture(images, config, [0, 1]).axes[0].texts}
    assert "hidden patches predict the teacher's patches" in words
    second = phase_picture(images, api.resolve("patterns-distill", ["init=random"]), [0, 1])
    assert "patches predict those that match them" in {text.get_text() for text in second.axes[0].texts}


def test_maps_keep_neighbours() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    values = (rng.normal(size=(36, 16)) + 30 * np.eye(16)[labels]).astype(np.float32)
    for method in ("pca", "tsne"):
        places = project(values, method)
        assert places.shape == (36, 2)
        assert (places == project(values, method)).all()
        far = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(36)
        assert (labels[far.argmin(axis=1)] == labels).all()


def test_figures_have_the_pages_colours_and_no_other() -> None:
    figure, axes = style.panel(title="a title", xlabel="x")
    axes.plot([0, 1], [0, 1])
    text = style.svg(figure).decode()
    assert text.startswith("<svg")
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", text)
    drawn = text[text.index("</style>") :]
    assert "var(--blue)" in drawn
    assert "var(--ink)" in drawn
    assert not re.search(r"#(?!0{6}|f{6})[0-9a-f]{6}\b", drawn)
    assert "prefers-color-scheme: dark" in text
    assert style.png(figure).startswith(b"\x89PNG")
    assert isinstance(figure, Figure)


def contrast(first: str, second: str) -> float:
    """Of two hexadecimal colours, as WCAG 2 defines it."""

    def light(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_and_lines_can_be_told_from_the_page() -> None:
    for name, shade in style.SHADES.items():
        if name not in ("paper", "rule"):
            for ink, paper in zip(shade, style.SHADES["paper"], strict=True):
                assert contrast(ink, paper) >= 4.5, name


@pytest.mark.slow
def test_curves_show_what_was_recorded(runs: Path) -> None:
    curves = run_curves({"one": runs / "one", "two": runs / "two"})
    assert list(curves) == ["losses", "accuracy", "teacher", "prototypes", "clusters"]
    lines = {line.get_label(): line for line in curves["losses"].figure.axes[0].lines}
    records = read_metrics(runs / "two", "train")
    assert list(lines["two: patch"].get_ydata()) == [record["patch"] for record in records]
    assert list(lines["two: patch"].get_xdata()) == [record["step"] for record in records]
    assert "one: patch" not in lines
    assert len(curves["accuracy"].figure.axes[0].collections) == 4  # the intervals of two runs and two shots
    assert len(stacked_curves({"one": runs / "one"}).subfigs) == 5


@pytest.mark.slow
def test_plots_are_files_of_their_kind(runs: Path) -> None:
    photos = sorted((runs / "photos").rglob("*.png"))
    first, second = photos[:2]
    for words in (
        ("attention", "two", first, second, "--all-heads"), ("matches", "two", first, second),
        ("embedding", "two", "photos", "--method", "pca"), ("crops", "patterns-distill", first, "--set", "init=x"),
        ("crops", "two", first), ("curves", "one", "two"),
    ):  # fmt: skip
        for kind, beginning in (("png", b"\x89PNG"), ("svg", b"<svg")):
            done = smkd("plot", *words, "-o", f"picture.{kind}", cwd=runs)
            assert done.returncode == 0, done.stderr
            assert (runs / f"picture.{kind}").read_bytes().startswith(beginning)
    said = smkd("plot", "matches", "two", first, second, "-o", "picture.png", cwd=runs).stdout
    assert (
        len(re.findall(r"^\d: row \d, column \d and row \d, column \d: cosine -?[01]\.\d\d, weight", said, re.M)) == 6
    )


@pytest.mark.slow
def test_what_cannot_be_drawn_is_one_line(runs: Path) -> None:
    first = next((runs / "photos").rglob("*.png"))
    for words, part in (
        (("attention", "two", first, "-o", "a.jpg"), ".png or .svg"),
        (("attention", "pixels", first, "-o", "a.png"), "no network"),
        (("attention", "two", "nothing.png", "-o", "a.png"), "'nothing.png'"),
        (("attention", "two", "one/config.yaml", "-o", "a.png"), "config.yaml"),
        (("attention", "two", first, "-o", "a.png", "--features", "99"), "block 99"),
        (("embedding", "two", "one", "-o", "a.png"), "one"),
        (("crops", "two", first, "-o", "a.png", "--set", "mask.ratio=[0.5]"), "mask.ratio"),
        (("curves", "photos", "-o", "a.png"), "metrics.jsonl"),
        (("matches", "two", first, first, "-o", "two/config.yaml.png/a.png"), "a.png"),
    ):
        if part != "a.png":
            assert part in refused("plot", *words, cwd=runs)
    assert "'photos' is no run" in refused("report", "photos", "-o", "a.html", cwd=runs)
    (runs / "kept.png").write_text("not a picture")
    assert "kept.png" in refused("plot", "curves", "one", "-o", "kept.png", cwd=runs)
