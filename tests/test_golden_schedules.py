"""Schedules against the reference's values, and drawn masks against its statistics."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from golden_files import cases_within, load
from smkd.config.schema import MaskConfig, TemperatureConfig
from smkd.data.augment import draw_mask
from smkd.engine.optim import cosine, line, teacher_temperature

MASKS = cases_within("masks*.npz", r"(.+)/count_hist")
DRAWS = 20_000


@pytest.mark.parametrize(("path", "case"), cases_within("schedules*.npz", r"(cosine/\d+)"))
def test_cosine(path: Path, case: str) -> None:
    golden = load(path)
    options = golden.lines()[case]
    start, end, niter = options["base_value"], options["final_value"], options["niter_per_ep"]
    steps, warmup = options["epochs"] * niter, options.get("warmup_epochs", 0) * niter
    ours = [cosine(start, end, steps, step, warmup) for step in range(steps)]
    first = options.get("start_warmup_value", 0.0)
    if first:
        # our warm-up always begins at zero; from another value it is the same kind of line
        ours[:warmup] = [line(first, start, warmup, step) for step in range(warmup)]
    assert ours == pytest.approx(golden.arrays[case].tolist(), rel=0, abs=1e-12)


@pytest.mark.parametrize(("path", "case"), cases_within("schedules*.npz", r"(temp/\d+)/cls"))
def test_temperatures(path: Path, case: str) -> None:
    golden = load(path)
    options = golden.lines()[case]
    for suffix, part, hold in (("", "cls", 0), ("2", "patch", options["mim_start_epoch"])):
        config = TemperatureConfig(
            start=options[f"warmup_teacher_temp{suffix}"], end=options[f"teacher_temp{suffix}"],
            warmup_epochs=options["warmup_teacher_temp_epochs"],
        )  # fmt: skip
        ours = [teacher_temperature(config, epoch, hold) for epoch in range(options["nepochs"])]
        assert ours == pytest.approx(golden.arrays[f"{case}/{part}"].tolist(), rel=0, abs=1e-12), part


def as_tuple(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


@cache
def drawn(path: Path, case: str) -> NDArray[np.bool_]:
    golden = load(path)
    options = golden.lines()[case]
    ratio, jitter = as_tuple(options["pred_ratio"]), as_tuple(options["pred_ratio_var"])
    config = MaskConfig(
        shape="block" if options["pred_shape"] == "block" else "random",
        ratio=ratio, ratio_jitter=jitter * len(ratio) if len(jitter) == 1 else jitter,
    )  # fmt: skip
    rows, columns = golden.arrays[f"{case}/cell_freq"].shape
    rng = np.random.default_rng(0)
    return np.stack([draw_mask(config, (rows, columns), 0, rng) for _ in range(DRAWS)])


# The tolerances are golden/README.md's for this many masks, a few standard errors each.
@pytest.mark.slow
@pytest.mark.parametrize(("path", "case"), MASKS)
def test_mask_frequencies(path: Path, case: str) -> None:
    golden, masks = load(path), drawn(path, case)
    fraction = masks.mean(axis=(1, 2))
    assert masks.mean(axis=0) == pytest.approx(golden.arrays[f"{case}/cell_freq"], rel=0, abs=0.015)
    assert (fraction == 0).mean() == pytest.approx(golden.number(f"{case}/p_empty"), rel=0, abs=0.015)
    assert fraction.mean() == pytest.approx(golden.number(f"{case}/mean_fraction"), rel=0, abs=0.005)
    assert fraction.std() == pytest.approx(golden.number(f"{case}/std_fraction"), rel=0, abs=0.005)


@pytest.mark.parametrize(("path", "case"), MASKS)
def test_mask_sizes(path: Path, case: str) -> None:
    expected, masks = load(path).arrays[f"{case}/count_hist"], drawn(path, case)
    ours = np.bincount(masks.sum(axis=(1, 2)), minlength=len(expected))
    assert len(ours) == len(expected)
    # on large grids single counts are too rare to compare
    width = 5 if masks[0].size >= 100 else 1
    edges = np.arange(0, len(expected), width)
    binned = [np.add.reduceat(counts, edges) / counts.sum() for counts in (ours, expected)]
    assert 0.5 * np.abs(binned[0] - binned[1]).sum() < 0.04
