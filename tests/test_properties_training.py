"""Properties of batches and rates that hold whatever the sizes: hypothesis looks for a counterexample."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smkd.config.loading import check
from smkd.config.run_config import RunConfig
from smkd.config.schema import SamplerConfig, TemperatureConfig
from smkd.data.sampler import EpochSampler
from smkd.engine.optim import cosine, line, rates_at, teacher_temperature

few = settings(max_examples=60, derandomize=True, deadline=None)
sizes = st.integers(1, 4)
rates = st.floats(0, 1)


def parts(
    labels: NDArray[np.int64], batch_size: int, seed: int, epoch: int, *, world: int, accumulate: int,
    balanced: SamplerConfig | None = None,
) -> tuple[int, list[list[list[int]]]]:  # fmt: skip
    """Steps of an epoch, and for each device the image indices of each of its passes."""
    of_devices, steps = [], set()
    for rank in range(world):
        sampler = EpochSampler(
            labels, batch_size, seed, balanced=balanced, accumulate=accumulate, rank=rank, world=world
        )
        sampler.set_epoch(epoch)
        passes = [[item[1] for item in batch] for batch in sampler]
        assert len(passes) == len(sampler) == sampler.steps * accumulate
        of_devices.append(passes)
        steps.add(sampler.steps)
    (count,) = steps
    return count, of_devices


# ---- which images make up a batch


@few
@given(
    world=sizes, accumulate=sizes, share=st.integers(1, 5), steps=st.integers(1, 6), rest=st.integers(0, 59),
    seed=st.integers(0, 2**31), epoch=st.integers(0, 1000),
)  # fmt: skip
def test_each_image_once_an_epoch_over_all_devices(
    world: int, accumulate: int, share: int, steps: int, rest: int, seed: int, epoch: int
) -> None:
    """Fewer than a batch are left over, and dropped; who is left over changes with the epoch."""
    batch = world * accumulate * share
    rest %= batch
    labels = np.zeros(steps * batch + rest, dtype=np.int64)
    counted, of_devices = parts(labels, batch, seed, epoch, world=world, accumulate=accumulate)
    assert counted == steps
    assert all(len(one_pass) == share for passes in of_devices for one_pass in passes)
    seen = [index for passes in of_devices for one_pass in passes for index in one_pass]
    assert len(seen) == len(set(seen)) == len(labels) - rest
    assert set(seen) <= set(range(len(labels)))
    # devices and passes side by side are the batches of one device
    (alone,) = parts(labels, batch, seed, epoch, world=1, accumulate=1)[1]
    for step, whole in enumerate(alone):
        mine = [of_devices[rank][step * accumulate + turn] for turn in range(accumulate) for rank in range(world)]
        assert [index for one_pass in mine for index in one_pass] == whole


@few
@given(
    data=st.data(), per_class=st.integers(1, 5), groups=st.integers(1, 3), world=sizes, accumulate=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_balanced_groups_are_whole_on_every_device(
    data: st.DataObject, per_class: int, groups: int, world: int, accumulate: int, seed: int
) -> None:
    """Every pass of every device holds `groups` classes with `per_class` images each, side by side."""
    classes = groups * world * accumulate
    batch = classes * per_class
    counts = data.draw(st.lists(st.integers(1, 12), min_size=classes, max_size=classes + 6), "images of each class")
    counts[0] += max(0, batch - sum(counts))
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    balanced = SamplerConfig(classes=classes, per_class=per_class)
    steps, of_devices = parts(labels, batch, seed, 3, world=world, accumulate=accumulate, balanced=balanced)
    assert steps == len(labels) // batch
    taken = np.zeros(len(counts), dtype=int)
    for step in range(steps):
        of_step: list[int] = []
        for passes in of_devices:
            for one_pass in passes[step * accumulate : (step + 1) * accumulate]:
                hands = np.array(one_pass).reshape(groups, per_class)
                for hand in hands:
                    (label,) = set(labels[hand].tolist())
                    of_step.append(label)
                    # an image comes twice only when its class has too few
                    times = np.unique(hand, return_counts=True)[1]
                    assert times.max() <= math.ceil(per_class / counts[label])
                    assert len(times) == min(per_class, counts[label])
        assert len(set(of_step)) == classes, "a class is in one group of a step only"
        taken[of_step] += 1
    assert taken.max() - taken.min() <= 1, "classes take turns"


# ---- rates


def is_monotone(values: list[float], *, rising: bool) -> bool:
    return all(a <= b + 1e-12 if rising else b <= a + 1e-12 for a, b in pairwise(values))


@few
@given(start=rates, end=rates, points=st.integers(1, 50))
def test_a_line_begins_and_ends_where_it_says(start: float, end: float, points: int) -> None:
    values = [line(start, end, points, index) for index in range(points)]
    assert values[0] == start
    assert values[-1] == pytest.approx(end if points > 1 else start, abs=1e-12)
    assert is_monotone(values, rising=end >= start)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx(steps[:1] * len(steps), abs=1e-12)


@few
@given(start=rates, end=rates, steps=st.integers(1, 80), warmup=st.integers(0, 80))
def test_a_cosine_stays_between_its_ends(start: float, end: float, steps: int, warmup: int) -> None:
    warmup = min(warmup, steps - 1)
    values = [cosine(start, end, steps, step, warmup) for step in range(steps)]
    rising, falling = values[:warmup], values[warmup:]
    if rising:
        assert rising[0] == (0.0 if warmup > 1 else pytest.approx(0.0))
        assert is_monotone(rising, rising=True)
        if warmup > 1:
            assert rising[-1] == pytest.approx(start, abs=1e-12)
    assert falling[0] == pytest.approx(start, abs=1e-12)
    assert is_monotone(falling, rising=end >= start)
    low, high = min(start, end) - 1e-12, max(start, end) + 1e-12
    assert all(low <= value <= high for value in falling)
    # symmetric about its middle, and one step further it would be there
    assert [a + b for a, b in zip(falling[1:], reversed(falling[1:]), strict=True)] == pytest.approx(
        [start + end] * (len(falling) - 1), abs=1e-9
    )
    assert cosine(start, end, steps, steps, warmup) == pytest.approx(end, abs=1e-12)


@few
@given(
    start=st.floats(0.01, 1), end=st.floats(0.01, 1), warmup=st.integers(0, 20), hold=st.integers(0, 20),
    epochs=st.integers(1, 60),
)  # fmt: skip
def test_a_temperature_holds_warms_up_and_stays(start: float, end: float, warmup: int, hold: int, epochs: int) -> None:
    config = TemperatureConfig(start=start, end=end, warmup_epochs=warmup)
    values = [teacher_temperature(config, epoch, hold) for epoch in range(epochs)]
    assert values[:hold] == [start] * min(hold, epochs)
    assert values[hold + warmup :] == [end] * max(0, epochs - hold - warmup)
    warming = values[hold : hold + warmup]
    assert is_monotone(warming, rising=end >= start)
    assert warming[:1] == [start] * bool(warming)
    # holding only shifts the rest
    assert values[hold:] == [teacher_temperature(config, epoch) for epoch in range(max(0, epochs - hold))]


def run_config(epochs: int, warmup: int, frozen: int) -> RunConfig:
    sides = {"resize": 16, "crop": 16}
    return check({
        "phase": "pretrain", "epochs": epochs, "batch_size": 8,
        "model": {"size": "debug", "patch_size": 4, "image_size": 16},
        "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
        "local_views": {"count": 0, "size": 8, "scale": [0.05, 0.25]},
        "optim": {"lr": 0.01, "lr_end": 1e-4, "warmup_epochs": warmup, "freeze_last_layer_epochs": frozen},
        "validation": sides, "evaluation": sides,
    })  # fmt: skip


@few
@given(epochs=st.integers(2, 12), warmup=st.integers(0, 11), frozen=st.integers(0, 12), steps=st.integers(1, 7))
def test_rates_of_a_run(epochs: int, warmup: int, frozen: int, steps: int) -> None:
    """The peak is reached and not passed, momentum and decay never turn back, the last layer thaws once."""
    warmup = min(warmup, epochs - 1)
    config = run_config(epochs, warmup, frozen)
    of_steps = [rates_at(config, step, steps) for step in range(epochs * steps)]
    lr = [rates.lr for rates in of_steps]
    assert max(lr) == pytest.approx(0.01)
    assert lr[warmup * steps] == pytest.approx(0.01)
    assert min(lr) >= 0
    assert is_monotone(lr[: warmup * steps], rising=True)
    assert is_monotone(lr[warmup * steps :], rising=False)
    assert lr[-1] >= 1e-4
    for name, first, last in (
        ("weight_decay", config.optim.weight_decay, config.optim.weight_decay_end),
        ("teacher_momentum", config.optim.teacher_momentum, config.optim.teacher_momentum_end),
    ):
        values = [getattr(rates, name) for rates in of_steps]
        assert values[0] == pytest.approx(first)
        assert is_monotone(values, rising=True)
        assert values[-1] <= last
    assert [rates.last_layer_frozen for rates in of_steps] == [step < frozen * steps for step in range(len(of_steps))]
