"""The program of docs/deploy.md, as a user saves it: without smkd and PyTorch it answers what `smkd predict` does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

import foreign_files as files
import smkd
from export_runs import run_folder
from made_images import encode, noise, photographs
from smkd import FewShotClassifier

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
MOST_LINES = 30


def program() -> str:
    """The page's only program."""
    [found] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(found.splitlines()) <= MOST_LINES
    return str(found)


def alone(folder: Path) -> dict[str, str]:
    """An environment in which smkd and PyTorch cannot be imported."""
    for name in ("torch", "smkd"):
        (folder / f"{name}.py").write_text("raise ImportError('not here')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def pictures(folder: Path) -> list[Path]:
    """A file of each kind that the page speaks of, which differ in size and shape."""
    folder.mkdir()
    colours = Image.fromarray(noise((9, 7))).resize((90, 70), Image.Resampling.BICUBIC)
    clear = colours.copy()
    clear.putalpha(Image.fromarray(noise((90, 70), 1)[..., 0]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    levels = noise((61, 50), 2)[..., 0].astype(np.uint16) * 257
    contents = {
        "upright.jpg": encode(colours, "JPEG"),
        "turned.jpg": encode(colours, "JPEG", exif=exif),
        "cmyk.jpg": encode(colours.convert("CMYK"), "JPEG"),
        "clear.png": encode(clear),
        "grey.png": encode(colours.convert("L")),
        "grey-clear.png": encode(clear.convert("LA")),
        "grey-deep.png": encode(levels),
        "palette.png": encode(colours.convert("P")),
        "palette-clear.gif": encode(colours.convert("P"), "GIF", transparency=3),
        "small.webp": encode(colours.resize((20, 31)), "WEBP"),
        "wide.png": encode(colours.resize((400, 40))),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def test_the_program_of_the_page_answers_what_predict_does(tmp_path: Path) -> None:
    paths = sorted(photographs(tmp_path / "support", (5, 5, 5)).rglob("*.png"))
    run = run_folder(tmp_path / "run", files.vit(), "evaluation.resize=37")
    classifier = FewShotClassifier(run, "logistic:c=10", accelerator="cpu")
    classifier.fit(paths, [path.parent.name for path in paths]).save(tmp_path / "clf.smkd")
    smkd.export(tmp_path / "clf.smkd", "onnx", tmp_path / "clf.onnx", reject=0.5)
    (tmp_path / "answer.py").write_text(program())
    environment = alone(tmp_path)
    for name in ("torch", "smkd"):
        blocked = [sys.executable, "-c", f"import {name}"]
        assert subprocess.run(blocked, env=environment, capture_output=True, cwd=tmp_path).returncode == 1

    asked = [*paths[:2], *pictures(tmp_path / "new")]
    command = [sys.executable, "answer.py", "clf.onnx", *map(str, asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["image"] for each in answers] == list(map(str, asked))
    wanted = classifier.predict_proba(asked)
    assert [list(each["probabilities"]) for each in answers] == [classifier.classes_.tolist()] * len(asked)
    for each, path, chances in zip(answers, asked, wanted, strict=True):
        np.testing.assert_allclose(list(each["probabilities"].values()), chances, rtol=0, atol=1e-4, err_msg=path.name)
    np.testing.assert_allclose([each["known"] for each in answers], classifier.known_proba(asked), rtol=0, atol=1e-4)
    names = classifier.predict(asked, reject=0.5)
    assert [each["answer"] for each in answers] == ["none of these" if name is None else name for name in names]
    assert "none of these" in {each["answer"] for each in answers}


def test_the_pixels_of_the_page_are_those_of_predict(tmp_path: Path) -> None:
    """To the bit, also with squares of an odd rest."""
    from smkd.classify.pictures import Pictures
    from smkd.data.augment import resize_center_crop

    head = program().partition("for path in")[0]
    start = head.index("session =")
    code = head[:start] + head[head.index("def pixels") :]
    found = pictures(tmp_path / "new")
    for resize, crop in ((37, 32), (32, 32), (51, 48)):
        names: dict[str, Any] = {"resize": resize, "crop": crop}
        exec(code, names)
        for row, path in enumerate(found):
            mine = resize_center_crop(Pictures(list(found)).load(row), resize, crop).numpy()
            assert np.array_equal(names["pixels"](path), mine), path.name
