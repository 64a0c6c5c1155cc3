"""A sample depends on seed, epoch and index alone; batches depend neither on workers nor on devices."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smkd.config.loading import check
from smkd.config.run_config import RunConfig
from smkd.config.schema import MaskConfig, SamplerConfig
from smkd.data.augment import draw_mask
from smkd.data.loader import Batch, MultiCropDataset, Sample, collate, make_loader
from smkd.data.sampler import EpochSampler, Pick
from smkd.errors import ConfigError, DataError

Order = list[list[Pick]]


class NoiseImages:
    """Images of different sizes with two or three per class, made from their number."""

    def __init__(self, count: int = 24) -> None:
        self.labels = np.arange(count, dtype=np.int64) % 9
        self.class_names = [str(n) for n in range(9)]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        rng = np.random.default_rng(index)
        height, width = (int(side) for side in rng.integers(20, 60, 2))
        return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))

    def name(self, index: int) -> str:
        return f"noise/{index}"


def make_config(**changes: Any) -> RunConfig:
    return check(
        {
            "phase": "pretrain", "epochs": 2, "batch_size": 8, "seed": 5,
            "model": {"size": "debug", "patch_size": 4, "image_size": 16},
            "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
            "local_views": {"count": 3, "size": 8, "scale": [0.05, 0.25]},
            "validation": {"resize": 16, "crop": 16},
            "evaluation": {"resize": 16, "crop": 16},
            **changes,
        }
    )  # fmt: skip


def batches(
    config: RunConfig, workers: int, epoch: int, rank: int = 0, world: int = 1, accumulate: int = 1
) -> tuple[list[Batch], Order]:
    """Batches of one epoch, and which samples the sampler put into them."""
    images = NoiseImages()
    sampler = EpochSampler(images.labels, config.batch_size, config.seed, rank=rank, world=world, accumulate=accumulate)
    sampler.set_epoch(epoch)
    loader = make_loader(MultiCropDataset(images, config), sampler, workers, pin_memory=False)
    return list(loader), list(sampler)


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("global_crops", "local_crops", "masks", "color", "labels"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def assert_holds(batch: Batch, place: int, sample: Sample) -> None:
    """The batch's image at `place` is this sample, in every view."""
    crops = [*batch.global_crops[:, place], *batch.local_crops[:, place]]
    assert all(torch.equal(a, b) for a, b in zip(crops, sample.crops, strict=True))
    assert np.array_equal(batch.masks[:, place].numpy(), sample.draws.masks)
    assert np.array_equal(batch.color[:, place].numpy(), sample.draws.color)
    assert int(batch.labels[place]) == sample.label


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_matter(workers: int) -> None:
    config = make_config()
    alone, _ = batches(config, 0, epoch=1)
    shared, _ = batches(config, workers, epoch=1)
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared, strict=True):
        assert_same(a, b)


def test_shapes_of_a_batch() -> None:
    batch = batches(make_config(), 0, epoch=0)[0][0]
    assert batch.global_crops.shape == (2, 8, 3, 16, 16)
    assert batch.local_crops.shape == (3, 8, 3, 8, 8)
    assert batch.masks.shape == (2, 8, 4, 4)
    assert batch.color.shape == (5, 8, 13)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    without = batches(make_config(local_views={"count": 0, "size": 8, "scale": [0.1, 0.2]}), 0, epoch=0)[0][0]
    assert without.local_crops.shape[:2] == (0, 8)


@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_batch_order_does_not_matter(batch_size: int) -> None:
    """Whatever batch a sample is in, it is what the data set gives for it when asked alone, in any order."""
    config = make_config(batch_size=batch_size)
    dataset = MultiCropDataset(NoiseImages(), config)
    samples = {Pick(1, n): dataset[1, n] for n in reversed(range(24))}
    made, order = batches(config, 0, epoch=1)
    assert len({item for items in order for item in items}) == 24 - 24 % batch_size
    for batch, items in zip(made, order, strict=True):
        for place, item in enumerate(items):
            assert_holds(batch, place, samples[item])


def test_seed_epoch_index_and_view_matter() -> None:
    def rows(seed: int, epoch: int, index: int) -> Sample:
        return MultiCropDataset(NoiseImages(), make_config(seed=seed))[epoch, index]

    base = rows(5, 0, 3)
    for other in (rows(6, 0, 3), rows(5, 1, 3), rows(5, 0, 12)):
        assert not np.array_equal(base.draws.color, other.draws.color)
        assert not torch.equal(base.crops[0], other.crops[0])
    assert not torch.equal(base.crops[0], base.crops[1])
    assert len({row.tobytes() for row in base.draws.color}) == 5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_devices_do_not_matter(accumulate: int) -> None:
    """Two devices' passes put side by side are the batch of one device."""
    config = make_config()
    whole, _ = batches(config, 0, epoch=0)
    first, _ = batches(config, 0, epoch=0, rank=0, world=2, accumulate=accumulate)
    second, _ = batches(config, 0, epoch=0, rank=1, world=2, accumulate=accumulate)
    parts = [part for pair in zip(first, second, strict=True) for part in pair]
    share = 2 * accumulate
    assert len(parts) == len(whole) * share
    for step, batch in enumerate(whole):
        mine = parts[step * share : (step + 1) * share]
        names = ("global_crops", "local_crops", "masks", "color")
        views = (torch.cat([getattr(part, name) for part in mine], dim=1) for name in names)
        together = Batch(*views, torch.cat([part.labels for part in mine]), 0)
        assert_same(batch, together)


def test_unreadable_images_are_replaced_or_reported() -> None:
    class Broken(NoiseImages):
        def load(self, index: int) -> Tensor:
            if index in (3, 4, 23):
                raise DataError(f"cannot read image 'noise/{index}'")
            return super().load(index)

    with pytest.raises(DataError, match="noise/3"):
        MultiCropDataset(Broken(), make_config())[0, 3]
    skipping = MultiCropDataset(Broken(), make_config(data={"on_error": "skip"}))
    sample, last = skipping[0, 3], skipping[0, 23]
    assert (sample.skipped, sample.label) == (2, 5)
    assert (last.skipped, last.label) == (1, 0)
    assert skipping[0, 5].skipped == 0
    assert collate([sample, last, skipping[0, 5]]).skipped == 3


# ---- which images make up a batch


def indices(sampler: EpochSampler) -> list[list[int]]:
    return [[pick.image for pick in batch] for batch in sampler]


def test_every_image_once_an_epoch() -> None:
    labels = np.zeros(96, dtype=np.int64)
    sampler = EpochSampler(labels, 8, seed=1)
    epochs = []
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        assert {(pick.epoch, pick.occurrence) for batch in sampler for pick in batch} == {(epoch, 0)}
        epochs.append(np.concatenate(indices(sampler)).tolist())
        assert sorted(epochs[-1]) == list(range(96))
        assert epochs[-1] == np.concatenate(indices(sampler)).tolist()
    assert epochs[0] != epochs[1] != epochs[2]
    assert np.concatenate(indices(EpochSampler(labels, 8, seed=2))).tolist() != epochs[0]


def test_short_last_batch_is_dropped() -> None:
    sampler = EpochSampler(np.zeros(30, dtype=np.int64), 8, seed=0)
    given = indices(sampler)
    assert [len(batch) for batch in given] == [8, 8, 8]
    assert len(sampler) == sampler.steps == 3
    assert len(set(np.concatenate(given).tolist())) == 24


@pytest.mark.parametrize("balanced", [None, SamplerConfig(classes=8, per_class=3)])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_devices_and_passes_share_the_batch(world: int, accumulate: int, balanced: SamplerConfig | None) -> None:
    labels = np.repeat(np.arange(10), 20)
    whole = indices(EpochSampler(labels, 24, seed=3, balanced=balanced))
    ranks = [
        EpochSampler(labels, 24, seed=3, balanced=balanced, accumulate=accumulate, rank=rank, world=world)
        for rank in range(world)
    ]
    for sampler in ranks:
        assert sampler.steps == len(whole)
        assert len(sampler) == len(indices(sampler)) == len(whole) * accumulate
    passes = list(zip(*(indices(sampler) for sampler in ranks), strict=True))
    for step, batch in enumerate(whole):
        mine = passes[step * accumulate : (step + 1) * accumulate]
        assert all(len(part) == 24 // (world * accumulate) for turn in mine for part in turn)
        assert [index for turn in mine for part in turn for index in part] == batch


def test_balanced_batches() -> None:
    """Exactly P classes with K different images each; over the epoch the classes take turns."""
    rng = np.random.default_rng(4)
    labels = rng.permutation(np.repeat(np.arange(12), rng.integers(7, 30, 12)))
    sampler = EpochSampler(labels, 20, seed=4, balanced=SamplerConfig(classes=4, per_class=5))
    seen = np.zeros(12, dtype=int)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for batch in indices(sampler):
            assert len(set(batch)) == 20
            classes, counts = np.unique(labels[batch], return_counts=True)
            assert counts.tolist() == [5] * 4
            if epoch == 0:
                seen[classes] += 1
        first = indices(sampler)[0]
    assert seen.max() - seen.min() <= 1
    # the images of a class lie side by side, so that a device's part holds whole classes
    assert all(len(set(labels[first[k : k + 5]])) == 1 for k in range(0, 20, 5))


def test_images_of_a_class_take_turns() -> None:
    labels = np.repeat(np.arange(3), 9)
    sampler = EpochSampler(labels, 9, seed=0, balanced=SamplerConfig(classes=3, per_class=3))
    assert sorted(np.concatenate(indices(sampler)).tolist()) == list(range(27))


def test_small_classes_repeat_as_little_as_possible() -> None:
    labels = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    sampler = EpochSampler(labels, 12, seed=0, balanced=SamplerConfig(classes=3, per_class=4))
    (batch,) = indices(sampler)
    counts = [np.bincount(np.array(batch)[labels[batch] == c], minlength=12)[labels == c] for c in range(3)]
    assert counts[0].tolist() == [2, 2]
    assert sorted(counts[1].tolist()) == [1, 1, 2]
    assert counts[2].max() == 1


def test_too_few_images_or_classes() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(DataError, match=r"batch_size=7 is larger .*\(6 images\)"):
        EpochSampler(labels, 7, seed=0)
    with pytest.raises(DataError, match=r"data\.sampler\.classes=4, but there are only 3"):
        EpochSampler(labels, 4, seed=0, balanced=SamplerConfig(classes=4, per_class=1))
    EpochSampler(labels, 6, seed=0, balanced=SamplerConfig(classes=3, per_class=2))


@pytest.mark.parametrize(("world", "accumulate"), [(4, 1), (1, 4), (2, 2), (2, 3), (3, 1)])
def test_a_class_is_never_cut(world: int, accumulate: int) -> None:
    """Six classes of four in shares of six, four or eight images."""
    labels = np.repeat(np.arange(10), 20)
    balanced, shares = SamplerConfig(classes=6, per_class=4), world * accumulate
    if 6 % shares:
        said = rf"data\.sampler\.classes=6: devices x num_nodes x accumulate = {shares} shares would cut a class"
        with pytest.raises(ConfigError, match=said):
            EpochSampler(labels, 24, seed=0, balanced=balanced, world=world, accumulate=accumulate)
        return
    for rank in range(world):
        sampler = EpochSampler(labels, 24, seed=0, balanced=balanced, world=world, accumulate=accumulate, rank=rank)
        for part in indices(sampler):
            assert set(np.bincount(labels[part], minlength=10).tolist()) <= {0, 4}


# ---- masks


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (4, 4)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_random_masks_hide_a_fixed_number(grid: tuple[int, int], ratio: float) -> None:
    config = MaskConfig(shape="random", ratio=(ratio,), ratio_jitter=(0.0,))
    rng = np.random.default_rng(6)
    masks = [draw_mask(config, grid, 0, rng) for _ in range(200)]
    assert {mask.shape for mask in masks} == {grid}
    assert {int(mask.sum()) for mask in masks} == {int(ratio * grid[0] * grid[1])}
    if 0 < ratio < 1 and masks[0].any():
        share = np.mean(masks, axis=0)
        expected = int(ratio * grid[0] * grid[1]) / (grid[0] * grid[1])
        assert np.abs(share - expected).max() < 0.15, "every place is hidden equally often"


def test_ratio_jitter_and_choice() -> None:
    config = MaskConfig(shape="random", ratio=(0.0, 0.3), ratio_jitter=(0.0, 0.2))
    rng = np.random.default_rng(7)
    shares = np.array([draw_mask(config, (20, 20), 0, rng).mean() for _ in range(2000)])
    assert abs((shares == 0).mean() - 0.5) < 0.04
    some = shares[shares > 0]
    # a share is rounded down to whole patches
    assert 0.1 - 1 / 400 <= some.min() < 0.11
    assert 0.49 < some.max() <= 0.5
    assert abs(some.mean() - 0.3) < 0.02


def test_block_masks_do_not_hide_too_much() -> None:
    config = MaskConfig(shape="block", ratio=(0.4,), ratio_jitter=(0.0,))
    rng = np.random.default_rng(8)
    counts = [int(draw_mask(config, (14, 14), 0, rng).sum()) for _ in range(300)]
    assert max(counts) <= 0.4 * 196
    assert np.mean(counts) > 0.3 * 196


@pytest.mark.parametrize("shape", ["block", "random"])
def test_masks_start_late(shape: str) -> None:
    config = MaskConfig.model_validate({"shape": shape, "ratio": [0.5], "ratio_jitter": [0.0], "start_epoch": 3})
    for epoch in range(6):
        mask = draw_mask(config, (6, 6), epoch, np.random.default_rng(epoch))
        assert mask.shape == (6, 6)
        assert mask.dtype == np.bool_
        assert mask.any() == (epoch >= 3)


@pytest.mark.parametrize("balanced", [None, SamplerConfig(classes=100, per_class=4)])
def test_the_order_of_an_epoch_takes_numbers_and_no_objects(balanced: SamplerConfig | None) -> None:
    labels = np.arange(200_000, dtype=np.int64) % 500
    sampler = EpochSampler(labels, 400, seed=0, balanced=balanced)
    tracemalloc.start()
    try:
        epoch = iter(sampler)
        next(epoch)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 30 * len(labels)  # an object an image would be above 100 bytes
