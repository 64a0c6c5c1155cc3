"""Loading images against a Pillow pipeline that does all of the published code's work, in the same run.

480-pixel JPEGs of smooth noise, 2 x 224 + 10 x 96 crops, one thread, in processor time, which other processes disturb
less than the clock; freed memory is kept, as in a training on the CPU. Then the memory of workers that share a cache,
and the preparing of a CIFAR archive. Memory is read from /proc, so that part needs Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from archives_made import cifar_archive, cifar_parts
from smkd.config.loading import resolve
from smkd.config.run_config import RunConfig
from smkd.data.cache import CachedImages, cached
from smkd.data.datasets import configured_spec, open_split
from smkd.data.loader import Batch, MultiCropDataset, batches, make_loader, make_views
from smkd.data.sampler import EpochSampler
from smkd.device import keep_freed_memory
from smkd.prepare.build import Target, build_folder
from smkd.prepare.cifar import plan_cifar
from smkd.prepare.manifest import Identity
from smkd.prepare.registry import class_list

SIDE, CLASSES, PER_CLASS, TIMED_PER_CLASS, BATCH, WORKERS = 480, 4, 64, 16, 16, 4
QUALITY = 95  # what `smkd data prepare mini-imagenet` writes
EPOCHS = 5
FILLING = 6  # epochs until each worker has loaded what it needs
CIFAR = {"train": 160, "test": 40}  # images of each of the 100 classes


def write_photos(root: Path, per_class: int = PER_CLASS) -> None:
    rng = np.random.default_rng(0)
    for number in range(CLASSES * per_class):
        smooth = Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        pixels = np.array(smooth) + rng.normal(0, 5, (SIDE, SIDE, 3))
        path = root / "train" / f"class-{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


# ---- the published code's pipeline, in Pillow


def random_resized(image: Image.Image, size: int, scale: tuple[float, float]) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area, aspect = width * height * random.uniform(*scale), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def turned_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue) + np.array(int(turn * 255) % 256, dtype=np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def jittered(image: Image.Image) -> Image.Image:
    strengths = [(ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2), (None, 0.1)]
    for kind, strength in random.sample(strengths, 4):
        if kind is None:
            image = turned_hue(image, random.uniform(-strength, strength))
        else:
            image = kind(image).enhance(random.uniform(1 - strength, 1 + strength))
    return image


def pillow_view(image: Image.Image, size: int, scale: tuple[float, float], blur: float, solarize: float) -> Tensor:
    view = random_resized(image, size, scale)
    if random.random() < 0.5:
        view = ImageOps.mirror(view)
    if random.random() < 0.8:
        view = jittered(view)
    if random.random() < 0.2:
        view = ImageOps.grayscale(view).convert("RGB")
    if random.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    if random.random() < solarize:
        view = ImageOps.solarize(view)
    tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float().div(255)
    return tensor.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pillow_batches(paths: list[Path]) -> Iterator[list[Tensor]]:
    for start in range(0, len(paths), BATCH):
        samples = []
        for path in paths[start : start + BATCH]:
            with Image.open(path) as file:
                image = file.convert("RGB")
            views = [pillow_view(image, 224, (0.25, 1.0), 1.0, 0.0), pillow_view(image, 224, (0.25, 1.0), 0.1, 0.2)]
            samples.append(views + [pillow_view(image, 96, (0.05, 0.25), 0.5, 0.0) for _ in range(10)])
        yield [torch.stack(views) for views in zip(*samples, strict=True)]


# ---- what is measured


def per_image(work: Callable[[], object], images: int) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) / images


def loader(config: RunConfig, kind: str, workers: int, per_class: int) -> tuple[Any, EpochSampler]:
    data = config.data.model_copy(update={"cache": kind, "limit_per_class": per_class})
    images = cached(open_split(data, "train"), data, "train")
    sampler = EpochSampler(images.labels, BATCH, config.seed)
    return make_loader(MultiCropDataset(images, config), sampler, workers, pin_memory=False), sampler


def throughput(config: RunConfig, rounds: int) -> dict[str, float]:
    """Median milliseconds of the processor an image; the pipelines take turns, so that all see the same machine."""
    assert config.data.root is not None
    folders = sorted(config.data.root.glob("train/*"))
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))[:TIMED_PER_CLASS]]
    ours = {kind: loader(config, kind, 0, TIMED_PER_CLASS)[0] for kind in ("none", "mmap")}
    pipelines: dict[str, Callable[[], object]] = {
        "pillow": lambda: [None for _ in pillow_batches(paths)],
        "jpeg": lambda: [None for _ in ours["none"]],
        "mmap": lambda: [None for _ in ours["mmap"]],
    }
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(rounds + 1):
        for name, work in pipelines.items():
            taken = per_image(work, len(paths))
            if turn:  # the first one warms up, and checks the cache's pixels
                times[name].append(taken)
    medians = {name: sorted(values)[len(values) // 2] * 1e3 for name, values in times.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch: Batch = next(iter(batches(ours["mmap"])))
    medians["color"] = color_work(batch, config, device)
    return medians


def color_work(batch: Batch, config: RunConfig, device: torch.device) -> float:
    """Milliseconds an image that the device needs for flip, colour, blur and normalising, the copy included."""

    def work() -> float:
        start = time.perf_counter()
        make_views(batch, configured_spec(config.data), device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / BATCH

    work()
    return sorted(work() for _ in range(5))[2] * 1e3


def kilobytes(process: int, path: Path | None = None) -> dict[str, int]:
    """Memory of a process in kilobytes, or of what it maps of one file."""
    if path is None:
        rest = Path(f"/proc/{process}/smaps_rollup").read_text()
    else:
        rest = Path(f"/proc/{process}/smaps").read_text().partition(str(path))[2]
    return {line.split(":")[0]: int(line.split()[1]) for line in reversed(rest.splitlines()[1:21]) if " kB" in line}


def memory(config: RunConfig) -> dict[str, Any]:
    """Megabytes of no file before and after each epoch, this process and its workers; what they hold of the cache."""
    loads, sampler = loader(config, "mmap", WORKERS, PER_CLASS)
    images = loads.dataset.images
    assert isinstance(images, CachedImages)
    assert images.path is not None
    own = []
    workers: list[int] = []
    for epoch in range(FILLING + EPOCHS):
        sampler.set_epoch(epoch)
        for _ in loads:
            pass
        if epoch < FILLING - 1:
            continue
        workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        own.append(sum(kilobytes(pid)["Pss_Anon"] for pid in [os.getpid(), *workers]) / 1024)
    held = [kilobytes(pid, images.path) for pid in workers]
    return {
        "workers": len(workers), "anonymous_mb_by_epoch": own, "cache_mb": images.path.stat().st_size / 2**20,
        "sum_of_rss_mb": sum(k["Rss"] for k in held) / 1024, "sum_of_pss_mb": sum(k["Pss"] for k in held) / 1024,
        "private_mb": sum(k["Private_Clean"] + k["Private_Dirty"] for k in held) / 1024,
    }  # fmt: skip


def prepare(folder: Path, processes: int) -> float:
    """Seconds from an archive of 20,000 images to the prepared folder."""
    archive = cifar_archive(folder / "cifar-100-python.tar.gz", cifar_parts(CIFAR))
    entries = [replace(entry, images=sum(CIFAR.values())) for entry in class_list("cifar-fs")]
    target = Target(folder / "cifar-fs", Identity("cifar-fs", "benchmark", "by class", {}))
    start = time.perf_counter()
    build_folder(target, plan_cifar(archive, entries, CIFAR), {}, processes, lambda done, total: None)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="that prepare the archive")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores, on purpose
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos")
        config = resolve("mini-imagenet-pretrain", [f"data={folder / 'photos'}", f"batch_size={BATCH}"])
        used = memory(config) if Path("/proc/self/smaps_rollup").exists() else {}
        keep_freed_memory()
        times = throughput(config, options.rounds)
        ratios = {kind: times["pillow"] / times[kind] for kind in ("jpeg", "mmap")}
        device = "GPU" if torch.cuda.is_available() else "CPU thread"
        print(f"Pillow, all of the work:        {times['pillow']:6.2f} ms an image and core")
        print(f"smkd from JPEG, uint8 crops:    {times['jpeg']:6.2f} ms: {ratios['jpeg']:.1f} x")
        print(f"smkd from the mmap cache:       {times['mmap']:6.2f} ms: {ratios['mmap']:.1f} x")
        print(f"and the colour work on this {device}: {times['color']:.2f} ms an image")
        if used:
            own, sizes = used["anonymous_mb_by_epoch"], {name: round(used[name]) for name in used if name[-3:] == "_mb"}
            print(f"memory of all processes after each epoch: {', '.join(f'{mb:.0f}' for mb in own)} MB")
            print(
                f"{used['workers']} workers, one cache of {sizes['cache_mb']} MB: resident {sizes['sum_of_rss_mb']} MB "
                f"in sum, proportional {sizes['sum_of_pss_mb']} MB, private {sizes['private_mb']} MB"
            )
        seconds = prepare(folder, options.processes)
        images = 100 * sum(CIFAR.values())
        print(f"preparing {images} CIFAR images, {options.processes} processes: {seconds:.1f} s")
        print(
            json.dumps(
                {
                    "ms": times,
                    "ratio": ratios,
                    "memory": used,
                    "prepare_s": seconds,
                    "images": images,
                }
            )
        )


if __name__ == "__main__":
    main()
