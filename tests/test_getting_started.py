"""docs/getting-started.md as a user types it: every command of the page, on a folder as a factory has it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import ExifTags, Image

import foreign_files as files
from command_line import smkd
from export_runs import run_folder
from made_images import encode, noise
from smkd.classify import FewShotClassifier
from smkd.cli import app

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "getting-started.md"
DEPLOY = PAGE.with_name("deploy.md")
COUNTS = {"camera": 12, "headphone": 9, "scissors": 20, "stapler": 31, "umbrella": 6, "wrench": 15}


def commands() -> list[list[str]]:
    """The page's commands in their order."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(smkd|python|rm) ", line)]


def factory(root: Path, *, broken: Path) -> None:
    """The folders of the page, with a photograph of each kind that makes trouble elsewhere."""

    def picture(label: int, number: int) -> Image.Image:
        # stripes of a class's own width and colour
        made = Image.fromarray(noise((2 + label, 2), (label, number)) // 4 + 30 * label)
        return made.resize((60 + number, 50), Image.Resampling.NEAREST)

    for folder, first, counts in (("parts", 1, COUNTS), ("checked", 101, dict.fromkeys(COUNTS, 4))):
        for label, (name, count) in enumerate(counts.items()):
            (root / folder / name).mkdir(parents=True)
            for number in range(first, first + count):
                path = root / folder / name / f"IMG_{number:04}.jpg"
                path.write_bytes(encode(picture(label, number), "JPEG"))
    (root / "new").mkdir()
    for number in range(201, 205):
        (root / "new" / f"IMG_{number:04}.jpg").write_bytes(encode(picture(number - 200, number), "JPEG"))
    (root / broken).write_bytes((root / broken).read_bytes()[:400])
    turned, exif = root / "parts" / "wrench" / "IMG_0003.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned.write_bytes(encode(picture(5, 3).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif))
    clear = picture(2, 2)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    (root / "parts" / "scissors" / "IMG_0002.jpg").unlink()
    (root / "parts" / "scissors" / "logo.png").write_bytes(encode(clear))
    (root / "parts" / "scissors" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "parts" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")


def test_the_page_has_six_commands() -> None:
    typed = [words for words in commands() if words[0] != "rm"]
    assert [words[1] if words[0] == "smkd" else words[0] for words in typed] == [
        "data", "fit", "predict", "score", "export", "python"
    ]  # fmt: skip


def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("SMKD_BACKBONE", str(run_folder(tmp_path / "network", files.vit())))
    [removed] = (Path(words[1]) for words in commands() if words[0] == "rm")
    factory(tmp_path, broken=removed)
    [program] = re.findall(r"^```python\n(.*?)^```", DEPLOY.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "answer.py").write_text(program)
    said: dict[str, str] = {}
    for name, *words in commands():
        if name == "rm":
            (tmp_path / words[0]).unlink()
        elif name == "python":
            command = [sys.executable, *words]
            said[name] = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        elif words[0] in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
            done = smkd(*words, cwd=tmp_path)
            assert done.returncode == int(words[0] == "data"), done.stderr
            said[words[0]] = done.stdout

    assert said["data"].startswith("parts: 6 classes, 92 images, 6 to 30 per class\n")
    assert f"  '{removed}': " in said["data"]
    assert said["data"].count("problem: ") == 1
    assert "images: 92, 6 to 30 per class" in said["fit"]
    assert "leave-one-out accuracy: " in said["fit"]
    assert len(said["predict"].splitlines()) == 4
    assert "checked: onnxruntime and PyTorch differ by at most " in said["export"]
    loaded = FewShotClassifier.load(tmp_path / "clf.smkd")
    answers = [json.loads(line) for line in said["python"].splitlines()]
    chances = loaded.predict_proba([tmp_path / each["image"] for each in answers])
    for each, wanted in zip(answers, chances, strict=True):
        assert list(each["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-4)
