from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# The networks of the tests are too small to gain from threads, which only wait for each other on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes a small image folder: train/val/test, `classes` classes of `images` noisy JPEGs each."""

    def make(classes: int = 6, images: int = 12, size: tuple[int, int] = (40, 36), name: str = "photos") -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / name
        for split in ("train", "val", "test"):
            for c in range(classes):
                folder = root / split / f"{split}-{c}"
                folder.mkdir(parents=True)
                tint = rng.integers(40, 216, 3)
                for i in range(images):
                    noise = rng.normal(0, 25, (size[1], size[0], 3))
                    pixels = np.clip(tint + noise, 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03}.jpg")
        return root

    return make
