"""What a visitor of `smkd app` waits for: 50 photographs to drop, learning, an answer, its pictures.

Photographs are encoded when they are dropped; the baseline is a classifier that reads and encodes them to learn.
Networks have random weights, which take as long as trained ones; photographs are 171 x 128 pixels. One thread.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from smkd.app.support import Support, learn, taken
from smkd.classify import FewShotClassifier
from smkd.classify.answers import answer
from smkd.classify.choose_features import OWN, Reader
from smkd.classify.encoder import Encoder, EncoderConfig
from smkd.config.loading import resolve
from smkd.models.vit import VisionTransformer
from smkd.viz.explain import reasons

CLASSES, SHOTS = 10, 5
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What the work gives, and its seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def measure(recipe: str, folder: Path) -> dict[str, float]:
    """Seconds of each wait with the network of a recipe."""
    config = resolve(recipe, ["accelerator=cpu", f"data={folder}"])
    network = VisionTransformer.from_config(config.model).eval()
    encoder = Encoder(EncoderConfig.of_run(config, config.model), network, accelerator="cpu")
    paths = [str(path) for path in sorted(folder.iterdir())]
    taken(encoder, paths[-1:])
    (photos, _), dropped = timed(lambda: taken(encoder, paths[:-1]))
    support, labels = Support(), [f"class {row // SHOTS}" for row in range(len(photos))]
    for photo, label in zip(photos, labels, strict=True):
        support = support.with_class(label, [photo])
    lesson, learned = timed(lambda: learn(Reader(encoder, OWN), support))
    _, anew = timed(lambda: FewShotClassifier(encoder, "auto").fit(paths[:-1], labels))
    given, answered = timed(lambda: answer(lesson, taken(encoder, paths[-1:])[0][0], 0.3))
    _, drawn = timed(lambda: reasons(lesson, given))
    return {"drop": dropped, "learn": learned, "fit from files": anew, "answer": answered, "pictures": drawn}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for number in range(CLASSES * SHOTS + 1):
            coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
            coarse.resize((171, 128)).save(Path(name) / f"{number:02}.jpg")
        found = {recipe: measure(recipe, Path(name)) for recipe in ("caltech101-distill", "folder-distill")}
    for recipe, seconds in found.items():
        print(f"{recipe}: " + ", ".join(f"{wait} {value:.2f} s" for wait, value in seconds.items()))
        ratio = seconds["fit from files"] / seconds["learn"]
        print(f"  learning what was encoded when it was dropped: {ratio:.1f} x as fast as from files")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
