"""Decoded images: the same pixels and the same runs as without them, of any form and for any number of workers."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cached_photos import assert_same, make, settings, train_images
from image_forms import FORMS
from made_images import sized_splits
from smkd import api
from smkd.config import loading
from smkd.config.schema import DataConfig
from smkd.data import cache
from smkd.data.cache import CachedImages, cache_key, cached
from smkd.data.datasets import PatternImages, open_split
from smkd.data.images import Images, StoredImages
from smkd.data.loader import MultiCropDataset, batches, make_loader
from smkd.data.sampler import EpochSampler
from smkd.engine import checkpoint
from smkd.errors import ConfigError, DataError

KINDS = ("memory", "mmap")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """70 JPEGs of different sizes in the train split, so that two processes get some each."""
    return sized_splits(tmp_path / "photos")


# ---- the same pixels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["tree", "class folders", "table with splits", "shards, .cls", "Parquet images"])
def test_every_form_is_cached_as_it_is(tmp_path: Path, form: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "Parquet images":
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    config = settings(FORMS[form](tmp_path / "d"), kind)
    images = train_images(config)
    assert_same(make(config), images)
    # the cache beside the images is no part of them, and is found again
    assert_same(make(config), train_images(config))
    assert open_split(config, "test").class_names


def test_ragged_images_keep_their_aspect_and_are_never_enlarged(photos: Path) -> None:
    config = settings(photos, cache_size=40)
    images, source = make(config), train_images(config)
    shrunk = 0
    for index in range(len(source)):
        picture, pixels = source.picture(index), images.load(index)
        short = min(picture.size)
        if short > 40:
            shrunk += 1
            size = (round(picture.width * 40 / short), round(picture.height * 40 / short))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
            assert min(pixels.shape[1:]) == 40
        assert np.array_equal(np.array(picture), pixels.permute(1, 2, 0).numpy())
    assert 0 < shrunk < len(source)
    assert "shorter side 40" in images.description
    assert_same(images, make(settings(photos, "memory", cache_size=40)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
def test_crops_are_the_same_with_and_without_for_any_number_of_workers(photos: Path) -> None:
    config = loading.check(
        {
            "phase": "pretrain", "epochs": 2, "batch_size": 10, "model": {"patch_size": 4, "image_size": 16},
            "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
            "local_views": {"count": 3, "size": 8, "scale": [0.05, 0.25]},
            "validation": {"resize": 16, "crop": 16}, "evaluation": {"resize": 16, "crop": 16},
        }
    )  # fmt: skip
    images = train_images(settings(photos, "none"))

    def crops(images: Images, workers: int) -> list[Any]:
        sampler = EpochSampler(images.labels, 10, seed=0)
        return list(batches(make_loader(MultiCropDataset(images, config), sampler, workers, pin_memory=False)))

    plain = crops(images, 0)
    assert len(plain) == 7
    for kind in KINDS:
        stored = make(settings(photos, kind))
        for workers in (0, 1, 3):
            for a, b in zip(plain, crops(stored, workers), strict=True):
                for name in ("global_crops", "local_crops", "masks", "color", "labels"):
                    assert torch.equal(getattr(a, name), getattr(b, name)), (kind, workers, name)


def test_a_pickled_cache_maps_the_file_again(photos: Path) -> None:
    images = make(settings(photos))
    packed = pickle.dumps(images)
    assert len(packed) < 20_000 < len(images.pixels)
    assert_same(pickle.loads(packed), images)


def test_images_that_are_in_memory_anyway_stay_as_they_are() -> None:
    images = PatternImages("val", 2)
    assert cached(images, DataConfig(dataset="patterns", cache="mmap"), "val") is images


@pytest.mark.slow
def test_a_run_is_the_same_and_goes_on_with_another_kind(photos: Path, tmp_path: Path) -> None:
    def run(name: str, *words: str) -> tuple[list[Any], Any]:
        base = (f"data={photos}", "data.dataset=folder", "data.limit_per_class=null", "validation.every=0",
                "precision=fp32", "batch_size=10", "log_every=1", f"out={tmp_path / name}")  # fmt: skip
        out = api.pretrain(api.resolve("debug-pretrain", [*base, *words]))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
        return losses, checkpoint.load_checkpoint(out / "checkpoints" / "last.pt")["teacher"]

    losses, weights = run("none", "epochs=2")
    assert len(losses) == 14
    for kind in KINDS:
        other, others_weights = run(kind, f"data.cache={kind}", "epochs=2")
        assert other == losses
        assert all(torch.equal(weights[name], value) for name, value in others_weights.items())
    # an existing run is not another run for its cache, but is for other pixels
    assert run("none", "epochs=2", "data.cache=memory")[0] == losses
    with pytest.raises(ConfigError, match=r"data\.cache_size: None -> 20"):
        run("none", "epochs=2", "data.cache=mmap", "data.cache_size=20")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_map_one_file(photos: Path) -> None:
    images = make(settings(photos))
    assert images.path is not None
    for private, shared in DataLoader(Mapped(images), batch_size=None, num_workers=2):
        assert private == 0
        assert shared > 0


class Mapped(Dataset[tuple[int, int]]):
    """Private and shared kilobytes of the cache's pages in the process that is asked, which reads all images first."""

    def __init__(self, images: CachedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> tuple[int, int]:
        for index in range(len(self.images)):
            self.images.load(index).sum()
        _, _, rest = Path("/proc/self/smaps").read_text().partition(str(self.images.path))
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in rest.splitlines()[1:20] if " kB" in line}
        return kilobytes["Private_Dirty"], kilobytes["Rss"]


# ---- unreadable images


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_images_behave_as_without(photos: Path, kind: str) -> None:
    folder = photos / "train" / "train-0"
    (folder / "003.jpg").write_bytes((folder / "003.jpg").read_bytes()[:-200])  # its header is whole
    (folder / "005.jpg").write_bytes(b"no image")
    plain, images = train_images(settings(photos, "none")), make(settings(photos, kind))
    for index in range(len(plain)):
        if index not in (3, 5):
            assert torch.equal(images.load(index), plain.load(index))
            continue
        with pytest.raises(DataError) as expected:
            plain.load(index)
        with pytest.raises(DataError) as caught:
            images.load(index)
        assert str(caught.value) == str(expected.value)
    config = api.resolve("debug-pretrain", [f"data={photos}", "data.dataset=folder"])
    with pytest.raises(DataError, match=r"003\.jpg.*data\.on_error=skip"):
        MultiCropDataset(images, config)[0, 3]
    skip = config.model_copy(update={"data": config.data.model_copy(update={"on_error": "skip"})})
    assert MultiCropDataset(images, skip)[0, 3].skipped == 1


# ---- which cache belongs to which images


def test_another_image_split_size_or_limit_is_another_cache(photos: Path) -> None:
    def key(split: str = "train", **changes: Any) -> str:
        config = settings(photos, **changes)
        images = open_split(config, split)
        assert isinstance(images, StoredImages)
        return cache_key(images, config, split).hex()

    first = key()
    assert key() == first
    keys = {first, key("val"), key(cache_size=40), key(cache_size=41), key(limit_per_class=3)}
    image = photos / "train" / "train-1" / "004.jpg"
    times = image.stat().st_atime_ns, image.stat().st_mtime_ns
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    keys.add(key())
    os.utime(image, ns=times)
    assert key() == first
    image.write_bytes(image.read_bytes() + b"x")
    os.utime(image, ns=times)
    keys.add(key())
    image.unlink()
    keys.add(key())
    (photos / "dataset.json").write_text("{}")
    keys.add(key())
    (photos / "dataset.json").write_text('{"name": "other"}')
    keys.add(key())
    assert len(keys) == 10


def test_a_moved_folder_keeps_its_cache(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(settings(photos))
    moved = photos.rename(photos.with_name("moved"))
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("made again"))
    assert_same(make(settings(moved)), train_images(settings(moved, "none")))


@pytest.mark.slow
def test_the_cache_of_changed_images_takes_the_place_of_the_old_one(photos: Path, tmp_path: Path) -> None:
    other = sized_splits(tmp_path / "other")
    for folder in (None, tmp_path / "shared"):
        before = make(settings(photos, cache_dir=folder)).path
        kept = [make(settings(photos, cache_dir=folder, cache_size=20)).path]
        kept += [make(settings(photos, cache_dir=folder, limit_per_class=3)).path]
        kept += [make(settings(other, cache_dir=folder)).path]
        Image.new("RGB", (50, 40 if folder else 41)).save(photos / "train" / "train-1" / "010.jpg")
        after = make(settings(photos, cache_dir=folder)).path
        assert before is not None
        assert after is not None
        assert before != after
        assert not before.exists()
        assert all(path is not None and path.exists() for path in [after, *kept])


def test_a_changed_image_is_seen(photos: Path) -> None:
    make(settings(photos))
    image = photos / "train" / "train-1" / "004.jpg"
    Image.new("RGB", (50, 40), "red").save(image)
    assert_same(make(settings(photos)), train_images(settings(photos, "none")))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data: cache_size=64 needs a cache: add data\.cache=mmap"):
        api.resolve("debug-pretrain", ["data.cache_size=64"])
    with pytest.raises(ConfigError, match=r"data\.cache=disk: input should be 'none', 'memory' or 'mmap'"):
        api.resolve("debug-pretrain", ["data.cache=disk"])
