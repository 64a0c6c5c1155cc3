"""What a user waits for beside PyTorch and the network: `smkd.load`, `fit` on 40 photographs, `predict` of one.

A ViT-S/14 with random weights, or `--backbone`. Each figure is the median of fresh processes that take turns; the
network's passes are timed within one that encodes the same photographs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smkd.models.vit import SIZES, VisionTransformer

CLASSES, PER_CLASS = 8, 5
SIDES = (480, 360)
LOADING = """
import time; start = time.perf_counter()
import torch; loaded = time.perf_counter()
from smkd import load; print(loaded - start, time.perf_counter() - loaded)
"""
PASSES = """
import sys, time
from smkd.classify.choose_features import Reader
from smkd.classify.encoder import open_encoder
from smkd.classify.pictures import support_images
from smkd.models.vit import VisionTransformer
spent, own = [], VisionTransformer.last_blocks
def timed(*given):
    start = time.perf_counter()
    try:
        return own(*given)
    finally:
        spent.append(time.perf_counter() - start)
VisionTransformer.last_blocks = timed
images = support_images(sys.argv[1])
encoder = Reader(open_encoder(sys.argv[2]), "auto").encoder
encoder([images.name(index) for index in range(len(images))])
print(sum(spent))
"""


def write(folder: Path) -> tuple[Path, Path]:
    """Photographs of coarse noise, a folder a class; weights under timm's names."""
    draws = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / "photos" / f"class{label}").mkdir(parents=True)
        for number in range(PER_CLASS):
            coarse = Image.fromarray(draws.integers(0, 256, (12, 9, 3), dtype=np.uint8))
            coarse.resize(SIDES, Image.Resampling.BICUBIC).save(folder / f"photos/class{label}/{number}.jpg")
    dim, depth, heads = SIZES["small"]
    torch.manual_seed(0)
    network = VisionTransformer(image_size=224, patch_size=14, embed_dim=dim, depth=depth, num_heads=heads)
    torch.save(network.state_dict(), folder / "small.pth")
    return folder / "photos", folder / "small.pth"


def output(*words: str) -> list[float]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def command(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "smkd", *words], capture_output=True, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", help="instead of random weights")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in ("torch", "load", "passes", "fit", "predict")}
    with tempfile.TemporaryDirectory() as name:
        photos, weights = write(Path(name))
        backbone, out = given.backbone or str(weights), str(Path(name, "clf.smkd"))
        for _ in range(given.turns):
            torch_alone, load = output("-c", LOADING)
            seconds["torch"].append(torch_alone)
            seconds["load"].append(load)
            seconds["passes"] += output("-c", PASSES, str(photos), backbone)
            seconds["fit"].append(command("fit", str(photos), "--backbone", backbone, "-o", out))
            seconds["predict"].append(command("predict", out, str(photos / "class0" / "0.jpg")))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"import torch {median['torch']:.2f} s, smkd.load after it {median['load']:.2f} s")
    ratio = median["fit"] / median["passes"]
    print(f"fit {median['fit']:.2f} s, the network's passes {median['passes']:.2f} s: {ratio:.2f} x")
    print(f"predict {median['predict']:.2f} s")
    print(json.dumps({"seconds": seconds, "fit_to_passes": ratio}))


if __name__ == "__main__":
    main()
