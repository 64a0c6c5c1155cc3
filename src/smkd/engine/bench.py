"""How fast training steps are here, and where their time goes."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from smkd.config.run_config import RunConfig
from smkd.data.augment import draw_mask, generator
from smkd.data.cache import cached
from smkd.data.datasets import configured_spec, is_of_others, open_split
from smkd.data.images import Images
from smkd.data.loader import Batch, Views, batches, make_views, on_device, training_loader
from smkd.data.sampler import EpochSampler
from smkd.data.sources import opened_once
from smkd.device import autocast_type, keep_freed_memory, pick_device
from smkd.engine.log import console
from smkd.engine.optim import Rates, compile_backbones, rates_at
from smkd.engine.step import Learner
from smkd.errors import ConfigError

STEP_PARTS = ("data", "color", "teacher", "student", "objective", "backward", "optimizer", "ema")
SYNTHETIC_CLASSES = 64
SYNTHETIC_IMAGES = 4
CEILING_SIDE = {"cpu": 2048, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        recipe, device, precision, torch, threads: of the run.
        data: 'synthetic on the device', or the data set that was read.
        batch_size: images a step.
        parameters: of one network.
        images_per_second, step_ms: of whole steps.
        parts_ms: of each part of a step, waiting for the device before and after it.
        gflop_per_image: counted products of forward and backward passes, teacher included.
        tflops: of those, in a second.
        ceiling_tflops: of large matrix products in the same precision.
        peak_memory_gb: resident memory of the process, or the device's allocated memory on CUDA.
    """

    recipe: str
    device: str
    precision: str
    torch: str
    threads: int
    data: str
    batch_size: int
    parameters: int
    images_per_second: float
    step_ms: float
    parts_ms: dict[str, float]
    gflop_per_image: float
    tflops: float
    ceiling_tflops: float
    peak_memory_gb: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@opened_once()
def measure_steps(config: RunConfig, steps: int) -> Bench:
    """Time training steps of a configuration.

    Args:
        config: with `data.root`, its images go through the loader; without, views of noise lie on the device.
        steps: how many are timed, after two to warm up.

    Raises:
        SmkdError: a device that is not there, several of them, wrong data or settings.
    """
    if config.devices * config.num_nodes > 1:
        raise ConfigError(
            f"devices={config.devices} num_nodes={config.num_nodes}: bench measures one device; leave these out, and "
            "give batch_size= its share"
        )
    device = pick_device(config.accelerator)
    autocast = autocast_type(config.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    real = config.data.root is not None or config.data.embedded or is_of_others(config.data)
    classes = len(_images(config).class_names) if real else SYNTHETIC_CLASSES
    learner = Learner.create(config, classes, device, autocast)
    compile_backbones(learner.pair, config.compile, device, console.print)
    rates = rates_at(config, config.epochs // 2, 1)  # past warm-up, nothing frozen
    one_step = _from_loader(config, learner, rates) if real else _from_device(config, learner, rates)

    counter = FlopCounterMode(display=False)
    with counter:
        one_step()
    one_step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        one_step()
    _wait(device)
    seconds = (time.perf_counter() - start) / steps
    peak = _peak_memory_gb(device)
    flop = counter.get_total_flops() / config.batch_size
    return Bench(
        recipe=config.recipe,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision="fp32" if autocast is None else str(autocast).removeprefix("torch."),
        torch=torch.__version__, threads=torch.get_num_threads(),
        data=config.data.name if real else "synthetic on the device", batch_size=config.batch_size,
        parameters=sum(p.numel() for p in learner.pair.student.parameters()),
        images_per_second=config.batch_size / seconds, step_ms=1e3 * seconds,
        parts_ms=_parts(learner, one_step, max(1, steps // 2), device), gflop_per_image=flop / 1e9,
        tflops=flop * config.batch_size / seconds / 1e12, ceiling_tflops=matmul_tflops(device, autocast),
        peak_memory_gb=peak,
    )  # fmt: skip


def synthetic_views(config: RunConfig, device: torch.device) -> Views:
    """Views of noise on the device, with masks as in training and the sampler's images of each class, or four."""
    batch = config.batch_size // config.accumulate
    per_class = SYNTHETIC_IMAGES if config.data.sampler is None else config.data.sampler.per_class
    grid = config.global_views.size // config.model.patch_size
    noise = torch.Generator().manual_seed(config.seed)

    def views(count: int, size: int) -> Tensor:
        return torch.randn(count, batch, 3, size, size, generator=noise).to(device)

    masks = [
        [torch.from_numpy(draw_mask(config.mask, (grid, grid), 0, generator(0, 0, i, v))) for i in range(batch)]
        for v in range(config.global_views.count)
    ]
    return Views(
        views(config.global_views.count, config.global_views.size),
        views(config.local_views.count, config.local_views.size),
        torch.stack([torch.stack(of_view) for of_view in masks]),
        torch.arange(batch) // per_class % SYNTHETIC_CLASSES,
    )


def matmul_tflops(device: torch.device, autocast: torch.dtype | None) -> float:
    """Best of five large square matrix products in the precision of the networks."""
    side = CEILING_SIDE[device.type]
    a = torch.randn(side, side, device=device, dtype=autocast or torch.float32)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def _from_device(config: RunConfig, learner: Learner, rates: Rates) -> Callable[[], object]:
    """A step on views of noise."""
    views = [synthetic_views(config, learner.device)] * config.accumulate
    return lambda: learner.step(views, rates)


def _from_loader(config: RunConfig, learner: Learner, rates: Rates) -> Callable[[], object]:
    """A step on the next images that the configuration names, epoch after epoch."""
    images = cached(_images(config), config.data, "train")
    spec, device = configured_spec(config.data), learner.device
    sampler = EpochSampler(
        images.labels, config.batch_size, config.seed, balanced=config.data.sampler, accumulate=config.accumulate
    )
    loader = training_loader(images, config, sampler, device)

    def loaded() -> Iterator[Batch]:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from on_device(batches(loader), device)

    def colored(passes: list[Batch]) -> Iterator[Views]:
        for batch in passes:
            with learner.part("color"):
                views = make_views(batch, spec, device)
            yield views

    source = loaded()

    def one_step() -> object:
        with learner.part("data"):
            passes = list(itertools.islice(source, config.accumulate))
        return learner.step(colored(passes), rates, passes)

    return one_step


def _parts(learner: Learner, one_step: Callable[[], object], steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    spent = dict.fromkeys(STEP_PARTS, 0.0)

    @contextmanager
    def stopwatch(name: str) -> Iterator[None]:
        _wait(device)
        start = time.perf_counter()
        yield
        _wait(device)
        spent[name] += time.perf_counter() - start

    learner.part = stopwatch
    for _ in range(steps):
        one_step()
    return {name: 1e3 * seconds / steps for name, seconds in spent.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _images(config: RunConfig) -> Images:
    return open_split(config.data, "train", labelled=config.needs_labels)
