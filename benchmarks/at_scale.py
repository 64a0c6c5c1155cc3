"""What a process of a large run holds and waits for before and beside the networks, by simulation.

The index of a WebDataset of ImageNet-21k's size (14 million images, 21,000 classes) is made without its images, and
goes through opening, splits, sampler and episodes. The headers of a small tar are read to say what the large one's
would take. Bytes of a step are counted from the networks' shapes. The time of grouping images by class is set against
one comparison a class. Seconds are processor time of one process; every process of a run spends them.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smkd.config.loading import resolve
from smkd.config.schema import SamplerConfig
from smkd.data import shards
from smkd.data.images import packed, rows_by_label
from smkd.data.inspect import record_of
from smkd.data.sampler import EpochSampler
from smkd.data.sources import open_dataset
from smkd.fewshot.episodes import Members, Shape, draw
from smkd.models.pair import StudentTeacher

CLASSES, IN_SHARD, HEADERS = 21_000, 10_000, 5_000
DEVICES, OF_DEVICE = 64, 64
COMPARED = 20  # classes of the slow way


class Watch:
    """Prints processor seconds and memory of each step, and keeps them."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.before = resident_gb()

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a step."""
        start = time.process_time()
        result = work()
        self.found[name] = {"cpu_seconds": time.process_time() - start, "held_gb": resident_gb() - self.before}
        print(f"{name}: {self.found[name]['cpu_seconds']:.1f} s, {self.found[name]['held_gb']:.2f} GB held", flush=True)
        return result


def resident_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def made_shard(path: str, size: int, changed: int, names_of_classes: list[str]) -> shards.Shard:
    """What reading the headers of a shard would give; its classes are mixed."""
    first = int(Path(path).stem.rpartition("-")[2]) * IN_SHARD
    images = range(first, first + IN_SHARD)
    classes = [names_of_classes[image * 7919 % len(names_of_classes)] for image in images]
    names = packed(f"{name}_{image:08}.jpg" for name, image in zip(classes, images, strict=True))
    offsets = np.arange(IN_SHARD, dtype=np.int64) * 110_592
    return shards.Shard(names, offsets, np.full(IN_SHARD, 109_000), {"cls": classes}, "", foreign=False)


def headers(folder: Path) -> float:
    """Processor microseconds an image of reading the headers of a tar of images and .cls files."""
    path = folder / "small.tar"
    with tarfile.open(path, "w") as archive:
        for image in range(HEADERS):
            for ending, data in (("cls", b"n00000001"), ("jpg", bytes(1_000))):
                member = tarfile.TarInfo(f"n{image % CLASSES:08}_{image:08}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    start = time.process_time()
    shards._index(str(path), path.stat().st_size, 0)
    return 1e6 * (time.process_time() - start) / HEADERS


def bytes_of_step(size: str) -> dict[str, float]:
    """Megabytes that a device takes from others in a step of phase 2, or sends in a ring, by what they are."""
    config = resolve("mini-imagenet-distill", [f"model.size={size}", "init=random"])
    with torch.device("meta"):
        student = StudentTeacher(config, CLASSES).student
    numbers = sum(parameter.numel() for parameter in student.parameters())
    views, patches = config.global_views.count, (config.global_views.size // config.model.patch_size) ** 2
    others = (DEVICES - 1) * OF_DEVICE * views
    dim, head = student.backbone.embed_dim, config.head
    return {
        "gradients": 2 * (DEVICES - 1) / DEVICES * 4 * numbers / 1e6,
        "centres": 2 * (DEVICES - 1) / DEVICES * 8 * head.num_prototypes / 1e6,
        "[CLS] distributions, pairs=global": others * 4 * head.num_prototypes / 1e6,
        "patch tokens, pairs=global": others * patches * 4 * dim / 1e6,
        "patch embeddings in 16 bits, pairs=global": others * patches * 2 * head.bottleneck_dim / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_400_000, help="of the index; ImageNet-21k has 14 million")
    given = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        header_us = headers(folder)
        (folder / "small.tar").unlink()
        print(f"headers: {header_us:.0f} us an image, {header_us * given.images / 6e7:.1f} minutes for all")
        for shard in range(given.images // IN_SHARD):
            (folder / f"train-{shard:05}.tar").touch()
        names = [f"n{label:08}" for label in range(CLASSES)]
        shards._index = functools.partial(made_shard, names_of_classes=names)
        source = watch.measure("opening, headers apart", lambda: open_dataset(folder))
        images = watch.measure("the training split", lambda: source.open("train"))
    watch.found["opening, headers apart"]["peak_gb"] = peak_gb()
    print(f"peak {peak_gb():.2f} GB")
    batch, labels = DEVICES * OF_DEVICE, images.labels
    for way, balanced in (("random", None), ("balanced", SamplerConfig(classes=batch // 4, per_class=4))):
        sampler = EpochSampler(labels, batch, 0, balanced=balanced, world=DEVICES)
        watch.measure(f"an epoch's order, {way}", lambda sampler=sampler: next(iter(sampler)))
    watch.measure("the record of a checkpoint", lambda: record_of(images))
    members = watch.measure("members of the classes", lambda: Members(labels, CLASSES))
    watch.measure("10,000 episodes", lambda: draw(members, Shape(5, 5, 15), episodes=10_000, seed=0))
    watch.measure("rows by label", lambda: rows_by_label(labels, CLASSES))
    slow = watch.measure(f"{COMPARED} comparisons", lambda: [np.flatnonzero(labels == one) for one in range(COMPARED)])
    compared = watch.found[f"{COMPARED} comparisons"]["cpu_seconds"] * CLASSES / len(slow)
    ratio = compared / watch.found["rows by label"]["cpu_seconds"]
    print(f"one comparison a class would take {compared:.0f} s: {ratio:.0f} x")
    step = {size: bytes_of_step(size) for size in ("small", "base", "large")}
    for size, parts in step.items():
        print(f"ViT-{size}, {DEVICES} devices of {OF_DEVICE} images, MB a step: "
              + ", ".join(f"{part} {megabytes:.1f}" for part, megabytes in parts.items()))  # fmt: skip
    print(json.dumps({"images": given.images, "header_us": header_us, **watch.found, "ratio": ratio, "step_mb": step}))


if __name__ == "__main__":
    main()
