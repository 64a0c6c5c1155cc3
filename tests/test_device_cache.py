"""Crops cut on the device from images that lie there whole, on the CPU against Pillow and against the loader's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cached_photos import make, settings, write_photos
from smkd import api
from smkd.config.loading import check
from smkd.config.schema import RunConfig
from smkd.data import device_cache
from smkd.data.crops import Box, random_box, vertical_first
from smkd.data.datasets import Images, PatternImages
from smkd.data.device_cache import DeviceImages
from smkd.data.device_loader import DeviceLoader, training_loader
from smkd.data.loader import Batch, MultiCropDataset, batches, make_loader
from smkd.data.sampler import EpochSampler
from smkd.engine import checkpoint
from smkd.errors import DataError

CPU = torch.device("cpu")


class MadeImages:
    """Noise and slow waves of different sizes."""

    def __init__(self, count: int = 24) -> None:
        rng = np.random.default_rng(0)
        self.labels = np.arange(count, dtype=np.int64) % 5
        self.class_names = list("abcde")
        self.pixels = [self._picture(number, *rng.integers(20, 300, 2).tolist(), rng) for number in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"made/{index}"

    @staticmethod
    def _picture(number: int, height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        if number % 2:
            return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        y, x = np.mgrid[0:height, 0:width, 0:3][:2] / max(height, width)
        return (127.5 + 127.5 * np.sin(9 * x * rng.random(3) + 7 * y * rng.random(3))).astype(np.uint8)


def with_pillow(pixels: NDArray[np.uint8], box: Box, size: int) -> NDArray[np.int64]:
    part = Image.fromarray(pixels).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int64)


def test_cutting_waits_for_nothing(nothing_waits: AbstractContextManager[object]) -> None:
    images = DeviceImages(MadeImages(), torch.device("meta"))
    chosen, boxes = torch.tensor([0, 1, 2]), torch.tensor([[0, 0, 9, 30], [2, 1, 30, 9], [0, 0, 20, 20]])
    with nothing_waits:
        crops = images.cut(chosen, boxes, 16)
    assert (crops.shape, crops.device.type) == ((3, 3, 16, 16), "meta")


@pytest.mark.parametrize("size", [7, 48, 96, 224])
def test_crops_are_pillows(size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cache, "WORKING_BYTES", 2**24)  # several boxes at a time, in several turns
    monkeypatch.setattr(device_cache, "CHUNK", 7)
    images, rng = MadeImages(), np.random.default_rng(1)
    chosen = rng.integers(0, len(images), 150)
    boxes = [random_box(*images.pixels[number].shape[:2], (0.02, 1.0), rng) for number in chosen]
    boxes[0] = Box(0, 0, *images.pixels[chosen[0]].shape[:2])
    crops = DeviceImages(images, device).cut(torch.from_numpy(chosen), torch.tensor(boxes), size)
    assert (crops.shape, crops.dtype, crops.device.type) == ((150, 3, size, size), torch.uint8, device.type)
    for number, box, crop in zip(chosen, boxes, crops.cpu(), strict=True):
        expected = with_pillow(images.pixels[number], box, size)
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)
    if size == 96:
        turned = [vertical_first(box.height, box.width, size) for box in boxes]
        assert 0 < sum(turned) < 150 or not device_cache.vertical_first(1000, 10, size)


def test_lower_precision_of_the_training_is_not_used(device: torch.device) -> None:
    images = MadeImages(4)
    resident = DeviceImages(images, device)
    boxes = torch.tensor([[0, 0, *pixels.shape[:2]] for pixels in images.pixels])
    expected = resident.cut(torch.arange(4), boxes, 64)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(resident.cut(torch.arange(4), boxes, 64), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- batches


def make_config(**changes: Any) -> RunConfig:
    return check(
        {
            "phase": "pretrain", "epochs": 2, "batch_size": 8, "seed": 5,
            "model": {"size": "debug", "patch_size": 4, "image_size": 32},
            "global_views": {"count": 2, "size": 32, "scale": [0.25, 1.0]},
            "local_views": {"count": 3, "size": 16, "scale": [0.05, 0.25]},
            "validation": {"resize": 16, "crop": 16}, "evaluation": {"resize": 16, "crop": 16},
            **changes,
        }
    )  # fmt: skip


def sampler(images: Images, epoch: int = 1, **split: int) -> EpochSampler:
    chosen = EpochSampler(images.labels, 8, 5, **split)
    chosen.set_epoch(epoch)
    return chosen


def assert_alike(on_device: list[Batch], expected: list[Batch]) -> None:
    """All the same but for how the loader's kernel rounds."""
    assert len(on_device) == len(expected) > 0
    for a, b in zip(on_device, expected, strict=True):
        for name in ("masks", "color", "labels", "skipped"):
            assert torch.equal(torch.as_tensor(getattr(a, name)), torch.as_tensor(getattr(b, name))), name
        for name in ("global_crops", "local_crops"):
            ours, theirs = getattr(a, name).cpu().int(), getattr(b, name).int()
            assert ours.shape[:3] == theirs.shape[:3]
            if len(ours):
                assert ((ours - theirs).abs() > 1).double().mean() < 1e-4
                assert ((ours - theirs).abs() > 0).double().mean() < 0.1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_loaders(workers: int, device: torch.device) -> None:
    images, config = MadeImages(), make_config()
    usual = list(make_loader(MultiCropDataset(images, config), sampler(images), 0, pin_memory=False))
    assert_alike(list(DeviceLoader(images, config, sampler(images), device, workers)), usual)


@pytest.mark.parametrize(
    "split", [{"accumulate": 2}, {"rank": 1, "world": 2}, {"rank": 1, "world": 2, "accumulate": 2}]
)
def test_passes_and_devices_get_their_share(split: dict[str, int]) -> None:
    images, config = MadeImages(), make_config(local_views={"count": 0, "size": 8, "scale": [0.1, 0.2]})
    usual = make_loader(MultiCropDataset(images, config), sampler(images, **split), 0, pin_memory=False)
    assert_alike(list(DeviceLoader(images, config, sampler(images, **split), CPU, 0)), list(usual))


def test_patterns_need_no_file() -> None:
    images, config = PatternImages("train", 3), make_config(data={"dataset": "patterns", "cache": "device"})
    loader = training_loader(images, config, sampler(images), CPU)
    assert isinstance(loader, DeviceLoader)
    usual = make_loader(MultiCropDataset(images, config), sampler(images), 0, pin_memory=False)
    assert_alike(list(loader), list(usual))


def test_unreadable_images_behave_as_without(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    folder = photos / "train" / "train-0"
    (folder / "003.jpg").write_bytes((folder / "003.jpg").read_bytes()[:-200])
    (folder / "004.jpg").write_bytes(b"no image")
    images = make(settings(photos, "device"))
    config = make_config(data={"root": photos, "cache": "device"})
    with pytest.raises(DataError, match=r"00[34]\.jpg.*data\.on_error=skip"):
        list(batches(training_loader(images, config, sampler(images), CPU)))
    skip = make_config(data={"root": photos, "cache": "device", "on_error": "skip"})
    usual = list(make_loader(MultiCropDataset(images, skip), sampler(images), 0, pin_memory=False))
    found = list(training_loader(images, skip, sampler(images), CPU))
    assert_alike(found, usual)
    assert sum(batch.skipped for batch in found) > 0


def test_too_large_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cache, "free_memory", lambda: 1_500_000)
    with pytest.raises(
        DataError, match=r"data\.cache=device needs .* MB, 1\.5 MB are free on cpu; use data\.cache=mmap"
    ):
        DeviceImages(MadeImages(), CPU)


def test_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos")

    def run(name: str) -> Any:
        out = api.pretrain(api.resolve("debug-pretrain", [
            f"data={photos}", "data.dataset=folder", "data.cache=device", "data.cache_size=40", "epochs=2",
            "data.limit_per_class=12", "validation.every=0", "batch_size=10", "accumulate=2", f"out={tmp_path / name}",
        ]))  # fmt: skip
        return checkpoint.load(out / "checkpoints" / "last.pt")["teacher"]

    whole, real = run("whole"), checkpoint.save

    def interrupt(state: dict[str, Any], path: Path) -> None:
        if state["epoch"] == 2:
            raise KeyboardInterrupt
        real(state, path)

    monkeypatch.setattr(checkpoint, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(checkpoint, "save", real)
    assert all(torch.equal(whole[name], value) for name, value in run("cut").items())
