"""Training step on the CPU: freed memory kept by the C library against its defaults (two fresh processes)."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from smkd.config.loading import resolve
from smkd.data.datasets import dataset_spec, open_split
from smkd.data.loader import MultiCropDataset, collate, make_views
from smkd.device import keep_freed_memory
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner

STEPS = 5


def seconds_per_step() -> float:
    # large enough for arrays above 32 MB, which the C library always hands back by default
    words = ["data.limit_per_class=8", "batch_size=256", "model.embed_dim=192", "model.num_heads=3"]
    config = resolve("patterns-pretrain", words)
    images = open_split(config.data, "train")
    device = torch.device("cpu")
    learner = Learner.create(config, len(images.class_names), device, None)
    dataset = MultiCropDataset(images, config)
    batch = collate([dataset[0, index] for index in range(config.batch_size)])
    views = make_views(batch, dataset_spec("patterns"), device)
    rates = rates_at(config, 100, 100)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        learner.step(iter([views]), rates)
        times.append(time.perf_counter() - start)
    return sorted(times)[STEPS // 2]


def measured(mode: str) -> float:
    done = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] == "kept":
            keep_freed_memory()
        print(seconds_per_step())
        return
    default, kept = measured("default"), measured("kept")
    print(f"step: {default * 1e3:.0f} ms by default, {kept * 1e3:.0f} ms with memory kept: {default / kept:.2f} x")
    print(json.dumps({"default_s": default, "kept_s": kept, "ratio": default / kept}))


if __name__ == "__main__":
    main()
