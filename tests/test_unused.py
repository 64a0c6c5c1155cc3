"""What is typed is used or refused: no setting is ignored without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smkd
from classify_data import tiny_checkpoint
from made_images import sized_splits
from smkd import api
from smkd.adaptation import planned
from smkd.classify.encoder import open_encoder
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.data.datasets import PatternImages, describe, open_split
from smkd.engine.bench import measure_steps
from smkd.errors import ConfigError, DataError
from smkd.publishing import write

QUICK = ("epochs=1", "validation.every=0", "data.limit_per_class=2", "num_workers=0", "accelerator=cpu")
EMBEDDED = [name for name in loading.recipe_names() if loading.resolve(name).data.dataset == "patterns"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sized_splits(tmp_path_factory.mktemp("unused") / "photos", images=3)


# ---- data=


@pytest.mark.parametrize("recipe", loading.recipe_names())
def test_typed_data_is_looked_at_whatever_the_recipe(recipe: str, photos: Path) -> None:
    config = loading.resolve(recipe, [f"data={photos}"])
    images = open_split(config.data, "val")
    assert images.class_names == ["val-0"]
    assert str(photos) in describe(config.data)
    nowhere = loading.resolve(recipe, ["data=/nowhere"])
    with pytest.raises(DataError, match="data folder '/nowhere' does not exist"):
        open_split(nowhere.data, "train")
    with pytest.raises(DataError, match="data folder '/nowhere' does not exist"):
        measure_steps(nowhere, 1)


@pytest.mark.parametrize("recipe", EMBEDDED)
def test_without_it_the_patterns_are_as_they_were(recipe: str) -> None:
    config = loading.resolve(recipe)
    assert isinstance(open_split(config.data, "val"), PatternImages)
    assert describe(config.data) == "patterns: embedded, drawn by formula"


def test_a_run_is_not_begun_on_other_images(tmp_path: Path) -> None:
    config = smkd.resolve("debug-pretrain", [*QUICK, "data=/nowhere", f"out={tmp_path / 'run'}"])
    with pytest.raises(DataError, match="'/nowhere' does not exist"):
        smkd.pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_run_on_patterns_is_measured_on_the_data_that_is_named(photos: Path) -> None:
    opened = api.open_features("random", recipe="debug-pretrain", changes={"data": {"root": str(photos)}})
    assert opened.features().class_names == ["test-0"]
    assert opened.about.dataset == "folder"
    pixels = api.open_features("pixels", recipe="debug-pretrain", changes={"data": {"root": str(photos)}})
    assert len(np.asarray(pixels.features().labels)) == 3


@pytest.mark.parametrize("word", ["data=x", "data.root=x", "out=x", "init=x"])
def test_adapt_is_told_everything_once(word: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{word}: `smkd adapt` is told that by DATA, --out and --backbone"):
        planned(photos, tmp_path / "run", "nowhere.pt", [word])


def test_bench_measures_one_device() -> None:
    config = loading.resolve("debug-pretrain", ["devices=2"])
    with pytest.raises(ConfigError, match="devices=2 num_nodes=1: bench measures one device"):
        measure_steps(config, 1)


# ---- phase 2 without phase 1


def distilled(out: Path, *words: str) -> RunConfig:
    return smkd.resolve("debug-distill", [*QUICK, "data.sampler=null", "batch_size=8", f"out={out}", *words])


def test_phase_two_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phase 2 starts from trained weights: init=<run .*init=random"):
        smkd.distill(distilled(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_random_weights_must_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = smkd.distill(distilled(tmp_path / "run", "init=random"))
    assert (run / "checkpoints" / "last.pt").is_file()
    assert "from random weights" in " ".join(capsys.readouterr().out.split())
    assert smkd.distill(distilled(tmp_path / "run", "init=random")) == run
    assert loading.resolve("debug-pretrain", ["init=random"]).starts_random


# ---- settings that nothing reads


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("debug-pretrain", "data.split_by=images"),
        ("debug-pretrain", "data.split_seed=3"),
        ("debug-pretrain", "data.split_file=classes.csv"),
        ("debug-pretrain", "data.label_column=kind"),
        ("debug-pretrain", "data={label_column: kind}"),
        ("debug-pretrain", "data.cache=mmap"),
        ("mini-imagenet-pretrain", "data.cache=memory"),
        ("folder-pretrain", "data.cache_dir=c data=photos"),
        ("folder-pretrain", "data.cache_dir=c data.cache=memory data=photos"),
        ("debug-pretrain", "mask.shape=random mask.ratio=[0] mask.ratio_jitter=[0]"),
        ("debug-pretrain", "objective.mim.weight=0.5 mask={ratio: [0], ratio_jitter: [0]}"),
        ("debug-pretrain", "objective.patch.matching=reference"),
        ("debug-pretrain", "objective.pairs=global"),
        ("debug-pretrain", "objective.cls.same_image=true"),
        ("debug-pretrain", "objective.mim.weight=0 objective.patch_temperature.end=0.05"),
        ("debug-distill", "objective.cls.weight=0 objective.cls_center_momentum=0.8"),
        ("debug-distill", "objective.patch.weight=1 global_views.count=1"),
        ("debug-distill", "objective.patch.matching=reference objective.patch.same_image=false"),
        ("debug-pretrain", "local_views.count=0 local_views.size=8"),
        ("debug-pretrain", "global_views.count=1 augment.blur_other_global=0.3"),
        ("debug-pretrain", "augment.jitter=0 augment.hue=0.2"),
        (
            "debug-pretrain",
            "augment.blur_first_global=0 augment.blur_other_global=0 augment.blur_local=0 augment.blur_radius=[1,2]",
        ),
        ("debug-pretrain", "validation.every=0 validation.patience=4"),
        ("debug-pretrain", "init_optimizer=true"),
        ("debug-distill", "init=random init_optimizer=true"),
        ("debug-pretrain", "wandb_project=mine"),
        ("adapt", "objective.cls_temperature.start=0.02"),
        ("adapt", "objective.patch_temperature.start=0.02"),
    ],
)
def test_a_typed_setting_without_effect_is_refused(recipe: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^[a-z_.]+ has no effect: .*; leave it out, or change that$"):
        loading.resolve(recipe, words.split(" ") if "{" not in words else _split(words))


def _split(words: str) -> list[str]:
    """Words of which one holds a group with blanks."""
    before, brace, rest = words.partition("{")
    *plain, last = before.split(" ")
    return [*plain, last + brace + rest[: rest.index("}") + 1], *rest[rest.index("}") + 1 :].split()]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("folder-pretrain", "data=photos data.split_by=images data.cache=mmap data.cache_dir=c data.cache_size=64"),
        ("debug-pretrain", "data=photos data.split_by=images"),
        ("debug-pretrain", "mask.shape=random objective.mim.weight=0"),
        ("debug-distill", "objective.pairs=global objective.cls.same_image=true objective.patch.weight=0"),
        ("debug-pretrain", "validation.every=0 validation.resize=64 validation.crop=64"),
        ("adapt", "objective.patch_temperature.start=0.02 mask.start_epoch=3"),
        ("debug-pretrain", "init=random compile=true head.num_patch_prototypes=8"),
        ("debug-pretrain", "init=run init_optimizer=true wandb=true wandb_project=mine"),
    ],
)
def test_others_are_not(recipe: str, words: str) -> None:
    loading.resolve(recipe, words.split(" "))


def test_a_recipe_may_hold_settings_of_what_a_word_turns_off(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: debug-distill\nobjective: {patch: {matching: reference}}\n", encoding="utf-8")
    assert loading.resolve(str(mine), ["objective.patch.weight=0"]).objective.patch.matching == "reference"


# ---- of sources of features


def refused(what: str | Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as found:
        api.open_features(what, **options)
    return str(found.value)


def test_an_option_without_an_effect_on_a_source(photos: Path, tmp_path: Path) -> None:
    data = {"data": {"root": str(photos)}, "evaluation": {"split": "test"}}
    recipe = {"recipe": "debug-pretrain"}
    for group, key, value in (
        ("evaluation", "resize", 40), ("evaluation", "crop", 24), ("features", "blocks", 1),
        ("features", "parts", ["cls"]),
    ):  # fmt: skip
        changes = {**data, group: {**data.get(group, {}), key: value}}
        assert f"{group}.{key}={value} has no effect: plain" in refused("pixels", **recipe, changes=changes)
        assert api.open_features("random", **recipe, changes=changes)
    assert "precision=fp32 has no effect" in refused("pixels", **recipe, changes={**data, "precision": "fp32"})
    for source in ("pixels", "random"):
        for name, value in (("network", "student"), ("heads", 2)):
            said = refused(source, **recipe, changes=data, **{name: value})
            assert f"{name}={value} has no effect: '{source}' is no" in said
    assert api.open_features("pixels", **recipe, changes=data).features()


def test_a_recipe_for_what_has_settings_of_its_own(photos: Path, tmp_path: Path) -> None:
    network = tiny_checkpoint(tmp_path / "net.pt")
    words = r"recipe=debug-distill has no effect: '.*net\.pt' has settings of its own; leave it out"
    with pytest.raises(ConfigError, match=words):
        api.open_features(network, recipe="debug-distill")
    with pytest.raises(ConfigError, match=words):
        open_encoder(network, "debug-distill")
    with pytest.raises(ConfigError, match="recipe=debug-distill has no effect: 'pixels' is no network"):
        open_encoder("pixels", "debug-distill")
    # beside a source that needs it, it has one
    changes = {"data": {"root": str(photos)}, "evaluation": {"crop": 32}}
    names = [each.name for each in api.open_all(["pixels", network], recipe="debug-distill", changes=changes)]
    assert names == ["pixels", str(network)]
    write.export(network, "safetensors", tmp_path / "a.safetensors")
    assert "has settings of its own" in refused(tmp_path / "a.safetensors", recipe="debug-distill")


def test_rotary_positions_are_of_no_image_size() -> None:
    with pytest.raises(ConfigError, match=r"model\.image_size has no effect: model\.rotary=true"):
        loading.resolve("debug-pretrain", ["model.rotary=true", "model.image_size=64"])
    assert loading.resolve("debug-pretrain", ["model.rotary=true"]).model.rotary
