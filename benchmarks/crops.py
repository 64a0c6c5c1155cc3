"""Twelve crops of a 480 x 480 image against Pillow, both on one thread."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from smkd.data.augment import Box, crop_resize, random_box

VIEWS = [(224, (0.25, 1.0))] * 2 + [(96, (0.05, 0.25))] * 10
REPEATS = 30


def seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (480, 480, 3), dtype=np.uint8)
    boxes: list[tuple[int, Box]] = [(size, random_box(480, 480, scale, rng)) for size, scale in VIEWS]
    image, tensor = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)

    def pillow() -> None:
        for size, box in boxes:
            area = (box.left, box.top, box.left + box.width, box.top + box.height)
            image.resize((size, size), Image.Resampling.BICUBIC, box=area)

    def ours() -> None:
        for size, box in boxes:
            crop_resize(tensor, box, size)

    baseline, fast = seconds(pillow), seconds(ours)
    print(f"12 crops: Pillow {baseline * 1e3:.2f} ms, smkd {fast * 1e3:.2f} ms: {baseline / fast:.1f} x")
    print(json.dumps({"pillow_s": baseline, "smkd_s": fast, "ratio": baseline / fast}))


if __name__ == "__main__":
    main()
