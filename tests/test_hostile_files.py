"""One hostile file of each kind, given to the command that reads it: one line, and nothing of it comes true.

What each reader refuses in detail is tested beside it; docs/security.md says what is promised.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from archives_made import cifar_archive, cifar_parts
from command_line import refused, smkd
from made_images import encode, noise, photographs
from smkd.weights import smkd_file

Words = list[object]


class _Planted:
    """Runs a command when it is unpickled by a reader that allows it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _touch(folder: Path) -> _Planted:
    return _Planted(f"touch {folder / 'executed'}")


def _pickled_weights(folder: Path) -> Words:
    torch.save({"model": _touch(folder)}, folder / "w.pth")
    return ["import", "w.pth", "-o", "taken.pt"]


def _pickle_called_safetensors(folder: Path) -> Words:
    torch.save({"model": _touch(folder)}, folder / "w.safetensors", _use_new_zipfile_serialization=False)
    return ["import", "w.safetensors", "-o", "taken.pt"]


def _checkpoint_of_a_run(folder: Path) -> Words:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"teacher": _touch(folder), "config": {}}, folder / "run" / "checkpoints" / "last.pt")
    return ["eval", "run"]


def _header_of_gigabytes(folder: Path) -> Words:
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    return ["import", "w.safetensors", "-o", "taken.pt"]


def _shards_elsewhere(folder: Path) -> Words:
    (folder / "w").mkdir()
    (folder / "w" / "model.safetensors.index.json").write_text('{"weight_map": {"cls_token": "../../secret"}}')
    return ["import", "w/model.safetensors.index.json", "-o", "taken.pt"]


def _features_from_elsewhere(folder: Path) -> Words:
    with h5py.File(folder / "a.h5", "w") as file:
        file["all_feats"] = h5py.ExternalLink("/etc/passwd", "/x")
        file["all_labels"], file["count"] = np.zeros(5, int), [5]
    return ["eval", "a.h5"]


def _settings_that_call(folder: Path) -> Words:
    (folder / "mine.yaml").write_text(
        f"extends: debug-pretrain\nname: !!python/object/apply:os.system [touch {folder}/executed]"
    )
    return ["pretrain", "mine.yaml"]


def _settings_without_end(folder: Path) -> Words:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    (folder / "mine.yaml").write_text("\n".join(lines))
    return ["pretrain", "mine.yaml"]


def _classifier(folder: Path, **changes: Any) -> Words:
    """A classifier whose settings or tensors are changed."""
    (folder / "photo.png").write_bytes(encode(noise((20, 20))))
    photos = photographs(folder / "photos", (3, 3))
    assert smkd("fit", photos, "-o", folder / "good.smkd", "--backbone", "pixels").returncode == 0
    settings, tensors = smkd_file.read(folder / "good.smkd", smkd_file.CLASSIFIER)
    (folder / "good.smkd").unlink()
    smkd_file.write(folder / "clf.smkd", smkd_file.CLASSIFIER, {**settings, **changes}, tensors)
    return ["predict", "clf.smkd", "photo.png"]


def _class_names_of_a_terminal(folder: Path) -> Words:
    return _classifier(folder, classes=["\x1b]0;owned\x07", "kind 1"])


def _image_of_terapixels(folder: Path) -> Words:
    header = struct.pack(">IIBBBBB", 1 << 20, 1 << 20, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (folder / "photo.png").write_bytes(png)
    return ["index", "photo.png", "-o", "a.idx", "--backbone", "pixels"]


def _pipe_called_image(folder: Path) -> Words:
    (folder / "photos" / "owl").mkdir(parents=True)
    (folder / "photos" / "cat").mkdir(parents=True)
    (folder / "photos" / "cat" / "a.png").write_bytes(encode(noise((20, 20))))
    os.mkfifo(folder / "photos" / "owl" / "a.png")
    return ["fit", "photos", "-o", "clf.smkd", "--backbone", "pixels"]


def _tar_that_leads_out(folder: Path) -> Words:
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-100-python")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder)
        tar.addfile(link)
        member = tarfile.TarInfo("cifar-100-python/executed")
        tar.addfile(member, io.BytesIO())
    return ["data", "prepare", "cifar-fs", "-o", "out", "--archive", "a.tar.gz"]


def _pickle_in_an_archive(folder: Path) -> Words:
    cifar_archive(folder / "good.tar.gz", cifar_parts())
    with tarfile.open(folder / "good.tar.gz") as good, tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        for info in good.getmembers():
            content = good.extractfile(info).read() if info.isreg() else b""  # type: ignore[union-attr]
            if info.name.endswith("/train"):
                content = pickle.dumps({"data": _touch(folder)}, protocol=2)
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return ["data", "prepare", "cifar-fs", "-o", "out", "--archive", "a.tar.gz"]


def _zip_that_leads_out(folder: Path) -> Words:
    for name in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/../../executed", b"")
    archives = [f"--archive={name}.zip" for name in ("images_background", "images_evaluation")]
    return ["data", "prepare", "omniglot", "-o", "out", *archives]


HOSTILE: dict[Callable[[Path], Words], str] = {
    _pickled_weights: "its pickle wants to load (posix|nt).system, which weights do not need; nothing of it was execut",
    _pickle_called_safetensors: r"its pickle wants to load (posix|nt)\.system",
    _checkpoint_of_a_run: r"its pickle wants to load (posix|nt)\.system",
    _header_of_gigabytes: "damaged",
    _shards_elsewhere: "which is no file beside it",
    _features_from_elsewhere: "all_feats is a link to another place",
    _settings_that_call: "is not valid YAML",
    _settings_without_end: "its aliases stand for more than 10000 values",
    _class_names_of_a_terminal: "a name should be one line without control characters",
    _image_of_terapixels: "too large",
    _pipe_called_image: "a pipe or device, not a file",
    _tar_that_leads_out: "leads out of the folder; refused",
    _pickle_in_an_archive: r"it names (posix|nt)\.system, which data does not need",
    _zip_that_leads_out: "leads out of the folder; refused",
}


@pytest.mark.parametrize(("make", "says"), HOSTILE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_hostile_file_is_refused_in_a_line(make: Callable[[Path], Words], says: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    words = make(folder)
    line = refused(*words, cwd=folder)
    assert re.search(says, line), line
    assert "\x1b" not in line
    assert not (folder / "executed").exists()
    assert sorted(os.listdir(tmp_path)) == ["inner"]


def test_the_name_of_a_folder_is_no_command_to_the_terminal(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos", (3, 3))
    sorted(photos.iterdir())[0].rename(photos / "\x1b]0;owned\x07")
    line = refused("fit", photos, "-o", tmp_path / "clf.smkd", "--backbone", "pixels")
    assert "control characters" in line
    assert "\x1b" not in line
