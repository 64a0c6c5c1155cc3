"""Which blocks and parts a feature is made of: how they are named, read from files of before, and chosen."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from classify_data import tiny_checkpoint, tiny_network
from made_images import photographs
from smkd.classify import Encoder, EncoderConfig, FewShotClassifier, open_encoder
from smkd.classify.choose_features import choose_features, soft_right
from smkd.classify.left_out import LeftOut, left_out
from smkd.cli import fewshot as verbs
from smkd.config.loading import dump, load_config, resolve
from smkd.config.protocol import FeaturesConfig
from smkd.config.schema import ModelConfig
from smkd.errors import CheckpointError, ConfigError
from smkd.fewshot.candidates import candidates, features_from, narrowed, together, written
from smkd.fewshot.feature_file import FeatureSource, FeatureWriter, read_source
from smkd.fewshot.features import pool
from smkd.fewshot.heads import make_head
from smkd.fewshot.validation import FewShotValidation, HeldOutImages
from smkd.models.vit import VisionTransformer, block_numbers
from smkd.reference.option_table import last_blocks


def network(depth: int = 6) -> VisionTransformer:
    torch.manual_seed(0)
    config = ModelConfig(size="debug", depth=depth, image_size=32, patch_size=8)
    return VisionTransformer.from_config(config).eval()


def encoder(depth: int = 6) -> Encoder:
    vit = network(depth)
    return Encoder(EncoderConfig(model=vit.config, resize=32, crop=32), vit, accelerator="cpu")


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_number_typed_is_that_block_and_in_a_file_it_is_how_many_last_ones(tmp_path: Path) -> None:
    assert resolve("debug-pretrain", ["features.blocks=2"]).features.blocks == (2,)
    assert resolve("debug-pretrain", ["features.blocks=[1,-1]"]).features.blocks == (1, -1)
    assert resolve("debug-pretrain").features.blocks == (-1,)
    file = tmp_path / "config.yaml"
    file.write_text(dump(resolve("debug-pretrain")).replace("blocks:\n  - -1", "blocks: 3"))
    assert load_config(file).features.blocks == (-3, -2, -1)
    assert last_blocks("4") == [-4, -3, -2, -1]
    assert FeaturesConfig.model_validate({"blocks": 2}) == FeaturesConfig(blocks=(-2, -1))


@pytest.mark.parametrize("value", ["0", "[0]", "[]", "true", "[1,x]", "1.5"])
def test_blocks_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"features\.blocks"):
        resolve("debug-pretrain", [f"features.blocks={value}"])


@pytest.mark.parametrize("evaluator", [FewShotValidation(), HeldOutImages()], ids=["classes", "images"])
def test_a_block_that_the_backbone_lacks_is_named_before_the_training(
    evaluator: FewShotValidation | HeldOutImages,
) -> None:
    with pytest.raises(ConfigError, match="there is no block 11, the backbone has 2"):
        evaluator.check(resolve("debug-pretrain", ["features.blocks=11"]))


def test_last_blocks_of_the_reference_are_a_number_of_blocks() -> None:
    for value in ("0", "1.5", "-1", "many"):
        with pytest.raises(ConfigError, match=value):
            last_blocks(value)


def test_block_numbers() -> None:
    assert block_numbers((-1, 2, -6), 6) == [6, 2, 1]
    with pytest.raises(ConfigError, match="there is no block 7, the backbone has 6"):
        block_numbers((7,), 6)
    with pytest.raises(ConfigError, match="there is no block -7"):
        block_numbers((-7,), 6)
    with pytest.raises(ConfigError, match="block 6 is named twice"):
        block_numbers((-1, 6), 6)


def test_chosen_blocks_have_the_tokens_of_the_whole_pass_and_no_later_block_is_run() -> None:
    vit, x = network(), images(3)
    every = vit.last_blocks(x, 6)
    vit.blocks[4].forward = None  # type: ignore[assignment, method-assign]
    for number, tokens in zip((4, 2), vit.last_blocks(x, (4, 2)), strict=True):
        for mine, theirs in zip(tokens, every[number - 1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_word_names_blocks_and_parts() -> None:
    for word in ("11:cls", "10+11:cls+weighted_mean", "-2:mean", "-2+-1:cls"):
        assert written(features_from(word)) == word
    assert features_from("11") == FeaturesConfig(blocks=(11,))
    for word in ("", "11:", ":cls", "11:clss", "0", "1,2", "last", "11:cls:mean"):
        with pytest.raises(ConfigError, match="--features"):
            features_from(word)


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_candidates_are_what_the_blocks_give_by_themselves(depth: int) -> None:
    vit, x = network(depth), images(2)
    own = FeaturesConfig(blocks=(-1,), parts=("mean", "cls"))
    tried = candidates(own, depth)
    wide = together(tried)
    assert written(tried[0]) == f"{depth}:mean+cls"
    assert len(set(map(written, tried))) == len(tried)
    values = pool(vit.last_blocks(x, wide.blocks), wide)
    for each in tried:
        alone = pool(vit.last_blocks(x, each.blocks), each)
        torch.testing.assert_close(narrowed(values, wide, each), alone, rtol=0, atol=0)


def wide_features(noise: tuple[float, ...], shot: int, seed: int) -> tuple[Tensor, Tensor, FeaturesConfig]:
    """[CLS] and mean of blocks that tell ten classes apart the worse the more noise there is."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(shot)
    centres = torch.randn(10, 16, generator=draw)
    pieces = [
        torch.nn.functional.normalize(centres[labels] + level * torch.randn(len(labels), 16, generator=draw), dim=1)
        for _ in range(2)
        for level in noise
    ]
    blocks = tuple(range(3, 3 + len(noise)))
    return torch.cat(pieces, dim=1), labels, FeaturesConfig(blocks=blocks, parts=("cls", "weighted_mean"))


def test_a_block_that_has_forgotten_is_left_and_one_that_has_not_is_kept() -> None:
    tried = candidates(FeaturesConfig(), 6)
    for seed in range(5):
        values, labels, wide = wide_features((3.0, 1.0, 0.5, 4.0), 5, seed)
        assert 5 in choose_features(values, labels, wide, tried).blocks
        assert 6 not in choose_features(values, labels, wide, tried).blocks
        values, labels, wide = wide_features((2.0, 1.5, 1.2, 0.5), 5, seed)
        assert choose_features(values, labels, wide, tried).blocks[-1] == 6


@pytest.mark.parametrize("counts", [(5, 5, 5), (1, 2, 7, 30)])
def test_what_is_left_out_is_scored_as_the_head_does(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    wide = FeaturesConfig(blocks=(3, 4, 5, 6))
    values = torch.randn(len(labels), 8 * 16, generator=torch.Generator().manual_seed(0))
    seen: list[LeftOut] = []
    monkeypatch.setattr(
        "smkd.classify.choose_features.soft_right", lambda left: (seen.append(left), soft_right(left))[1]
    )
    tried = candidates(FeaturesConfig(), 6)
    choose_features(values, labels, wide, tried)
    for each, found in zip(tried, seen, strict=True):
        expected = left_out(make_head("prototype"), narrowed(values, wide, each), labels, 0)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-6)
        assert torch.equal(found.truth, expected.truth)


def test_without_a_reason_the_first_stays() -> None:
    tried = candidates(FeaturesConfig(), 6)
    values, labels, wide = wide_features((3.0, 1.0, 0.5, 4.0), 1, 0)
    assert choose_features(values, labels, wide, tried) == tried[0]  # nothing can be left out
    values, labels, wide = wide_features((1.0, 1.0, 1.0, 1.0), 5, 0)
    same = torch.ones_like(values)
    assert choose_features(same, labels, wide, tried) == tried[0]


def test_a_class_of_one_image_does_not_stop_the_choice() -> None:
    values, labels, wide = wide_features((3.0, 1.0, 0.5, 4.0), 5, 0)
    kept = torch.cat([torch.tensor([0]), torch.arange(5, 50)])
    tried = candidates(FeaturesConfig(), 6)
    assert 5 in choose_features(values[kept], labels[kept], wide, tried).blocks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chosen")
    photographs(folder / "support", (5, 4, 6))
    tiny_checkpoint(folder / "net.pt")
    return folder


def files(folder: Path) -> tuple[list[Path], list[str]]:
    paths = sorted(folder.rglob("*.png"))
    return paths, [path.parent.name for path in paths]


def test_what_was_chosen_is_what_is_read_from_then_on(place: Path, tmp_path: Path) -> None:
    paths, labels = files(place / "support")
    classifier = FewShotClassifier(encoder(), reading="auto").fit(paths, labels)
    assert classifier.encoder_ is not None
    chosen = classifier.encoder_.config.features
    assert chosen in candidates(FeaturesConfig(), 6)
    np.testing.assert_array_equal(classifier.support_, encoder().reading(chosen)(paths))
    again = FewShotClassifier(encoder(), reading=written(chosen)).fit(paths, labels)
    np.testing.assert_array_equal(again.predict_proba(paths), classifier.predict_proba(paths))
    classifier.save(tmp_path / "a.smkd")
    loaded = FewShotClassifier.load(tmp_path / "a.smkd", "cpu")
    assert loaded.reading == "auto"
    assert loaded.encoder_.config.features == chosen
    np.testing.assert_array_equal(loaded.predict_proba(paths), classifier.predict_proba(paths))
    more = loaded.partial_fit(paths[:2], ["owl", "owl"])
    assert more.encoder_.config.features == chosen


def test_by_itself_the_estimator_reads_what_the_run_says(place: Path) -> None:
    paths, labels = files(place / "support")
    classifier = FewShotClassifier(encoder()).fit(paths, labels)
    np.testing.assert_array_equal(classifier.support_, encoder()(paths))


def test_words_that_cannot_be_read_are_refused(place: Path) -> None:
    paths, labels = files(place / "support")
    for backbone, word, says in (
        (encoder(), "best", "--features best"), (encoder(), "7:cls", "there is no block 7"),
        ("pixels", "1:cls", "plain colours have no blocks"), (None, "1:cls", "add backbone="),
    ):  # fmt: skip
        given = np.ones((len(paths), 4)) if backbone is None else paths
        with pytest.raises(ConfigError, match=says):
            FewShotClassifier(backbone, reading=word).fit(given, labels)
    assert FewShotClassifier("pixels", reading="auto").fit(paths, labels).support_.shape[1] == 768


def test_a_classifier_of_before_says_how_many_last_blocks(place: Path, tmp_path: Path) -> None:
    paths, labels = files(place / "support")
    old = FewShotClassifier(open_encoder(tiny_network(), "debug-pretrain", "cpu"), reading="-2+-1").fit(paths, labels)
    old.save(tmp_path / "new.smkd")
    tensors = load_file(tmp_path / "new.smkd")
    with (tmp_path / "new.smkd").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]["smkd"]
    content = json.loads(header)
    del content["settings"]["reading"]
    content["settings"]["encoder"]["features"]["blocks"] = 2
    save_file(tensors, tmp_path / "old.smkd", {"smkd": json.dumps(content)})
    loaded = FewShotClassifier.load(tmp_path / "old.smkd", "cpu")
    np.testing.assert_array_equal(loaded.predict_proba(paths), old.predict_proba(paths))
    content["settings"]["reading"] = "best"
    save_file(tensors, tmp_path / "bad.smkd", {"smkd": json.dumps(content)})
    with pytest.raises(CheckpointError, match=r"bad\.smkd.*best"):
        FewShotClassifier.load(tmp_path / "bad.smkd")


def test_a_feature_file_says_its_blocks_and_one_of_before_how_many(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with FeatureWriter(path, rows=1, dim=2, source=FeatureSource(parts=("cls",), blocks=(10, 11))) as writer:
        writer.append(torch.ones(1, 2), np.zeros(1, np.int64))
    assert read_source(path).blocks == (10, 11)
    with h5py.File(path, "a") as file:
        del file.attrs["blocks"]
        file.attrs["blocks"] = 2
    assert read_source(path).blocks == (-2, -1)


app = typer.Typer()
for verb in (verbs.evaluate, verbs.features):
    app.command(verb.__name__)(verb)


@pytest.mark.slow
def test_every_candidate_is_measured_as_by_itself(place: Path, tmp_path: Path) -> None:
    def results(*words: str) -> dict[str, float]:
        given = ["evaluate", str(place / "net.pt"), *words, "--shot", "1", "--query", "15", "--episodes", "20"]
        result = CliRunner().invoke(app, [*given, "--json", str(tmp_path / "a.json")])
        assert result.exit_code == 0, (result.output, result.exception)
        found = json.loads((tmp_path / "a.json").read_text())["results"]
        return {each["source"].removeprefix(str(place / "net.pt")): each["mean"] for each in found}

    every = results("--features", "all")
    words = ("2:cls+weighted_mean", "1:cls+weighted_mean", "1+2:cls+weighted_mean", "2:cls", "1:cls", "1+2:cls")
    assert set(every) == {f" {word}" for word in words}
    assert len(set(every.values())) > 1
    assert results("--features", "1:cls") == {"": every[" 1:cls"]}
    assert results() == {"": every[" 2:cls+weighted_mean"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "net.pt", "--features", "x"), "--features x: should be blocks"),
        (("evaluate", "net.pt", "--features", "3"), "there is no block 3"),
        (("evaluate", "net.pt", "--features", "all", "--concat"), "--concat"),
        (("evaluate", "pixels", "--recipe", "debug-pretrain", "--features", "all"), "plain colours have no blocks"),
        (("evaluate", "x.h5", "--features", "all"), "'x.h5' is a feature file"),
        (("features", "net.pt", "--features", "1", "--part", "cls", "-o", "x.h5"), "leave --blocks and --part out"),
    ],
    ids=str,
)
def test_features_that_cannot_be_measured(
    place: Path, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)
