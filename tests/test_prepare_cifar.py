"""CIFAR-FS and FC100 from small archives in the format of CIFAR-100."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from archives_made import IDENTITY, PARTS, build, cifar_archive, cifar_parts, few, python2_pickle, write_tar
from smkd.errors import DataError
from smkd.prepare.build import Plan
from smkd.prepare.cifar import plan_cifar
from smkd.prepare.manifest import read_manifest


def plan(archive: Path, name: str = "cifar-fs") -> Plan:
    return plan_cifar(archive, few(name, 6), PARTS)


def test_pickles_are_as_python_2_wrote_them() -> None:
    parts = cifar_parts()
    loaded = pickle.loads(python2_pickle(parts["train"]), encoding="bytes")
    assert loaded[b"fine_labels"] == parts["train"][b"fine_labels"]
    np.testing.assert_array_equal(loaded[b"data"], parts["train"][b"data"])


@pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
def test_images_are_the_archive_s(tmp_path: Path, name: str) -> None:
    parts = cifar_parts()
    build(plan(cifar_archive(tmp_path / "c.tar.gz"), name), tmp_path / "out")
    entries = {entry.label: entry for entry in few(name, 6)}
    for part in PARTS:
        for row in range(0, 100 * PARTS[part], 37):
            entry = entries[parts[part][b"fine_labels"][row]]
            with Image.open(tmp_path / "out" / entry.split / entry.folder / f"{part}-{row:05}.png") as image:
                expected = parts[part][b"data"][row].reshape(3, 32, 32).transpose(1, 2, 0)
                np.testing.assert_array_equal(np.array(image), expected)


def test_manifest_names_every_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(plan(cifar_archive(tmp_path / "c.tar.gz")), out)
    manifest = read_manifest(out)
    assert manifest.identity == IDENTITY
    assert {split: (c.classes, c.images) for split, c in manifest.counts.items()} == {
        "train": (64, 384), "val": (16, 96), "test": (20, 120),
    }  # fmt: skip
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*.png")}
    assert files.keys() == manifest.files.keys()
    assert all(path.stat().st_size == manifest.files[name][0] for name, path in files.items())
    assert sorted(entry.name for entry in out.iterdir()) == ["dataset.json", "test", "train", "val"]
    assert json.loads((out / "dataset.json").read_text())["split_rule"] == "a rule"


def test_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    archive = cifar_archive(tmp_path / "c.tar.gz")
    assert build(plan(archive), tmp_path / "one") == build(plan(archive), tmp_path / "two", processes=2)


def test_a_finished_folder_is_repaired(tmp_path: Path) -> None:
    archive, out = cifar_archive(tmp_path / "c.tar.gz"), tmp_path / "out"
    digest = build(plan(archive), out)
    kept, lost = sorted(out.rglob("*.png"))[:2]
    lost.unlink()
    before = os.stat(kept).st_mtime_ns
    assert build(plan(archive), out) == digest
    assert lost.exists()
    assert os.stat(kept).st_mtime_ns == before


class Runs:
    """A pickle of this would run a command when loaded as usual."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    files: dict[str, Any] = dict(cifar_parts())
    for protocol in range(5):
        files["train"] = pickle.dumps({"data": Runs(tmp_path / "ran")}, protocol=protocol)
        with pytest.raises(DataError, match=r"pickle '.*train' is refused: it names \w+\.mkdir, which data"):
            plan(cifar_archive(tmp_path / "c.tar.gz", files))
    assert not (tmp_path / "ran").exists()


HOSTILE_PICKLES = {
    "builtin": b"cbuiltins\neval\n(U\x041+1 tR.",
    "numpy function": b"cnumpy\nload\n(U\x01xtR.",
    "array called": b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
    "array of objects": b"cnumpy\ndtype\n(U\x01OK\x00K\x01tR.",
    "attribute set": b"cnumpy.core.multiarray\n_reconstruct\n}U\x01xK\x01sb.",
    "persistent": b"Pname\n.",
    "extension": b"\x82\x01.",
    "cut short": python2_pickle({b"data": b"x" * 300})[:-100],
    "huge claim": b"T\xff\xff\xff\x7f.",
    "too long for its shape": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x09t"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89U\x01xtb."
    ),
    "a list": b"].",
    "empty": b"",
}


@pytest.mark.parametrize("hostile", HOSTILE_PICKLES.values(), ids=list(HOSTILE_PICKLES))
def test_hostile_pickles_are_refused(tmp_path: Path, hostile: bytes) -> None:
    with pytest.raises(DataError, match=r"^pickle '.*meta' (is refused: .+|holds a list)"):
        plan(cifar_archive(tmp_path / "c.tar.gz", {**cifar_parts(), "meta": hostile}))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def device(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.CHRTYPE
    return info


def claims(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


HOSTILE_MEMBERS = {
    "climbs": ("cifar-100-python/../../x", r"member '.*/x' leads out of the folder"),
    "absolute": ("/tmp/x", "leads out of the folder"),
    "windows": ("C:\\x", "leads out of the folder"),
    "link out": (link("cifar-100-python/x", "../../etc/passwd"), "link '.*' -> '.*passwd' leads out of the folder"),
    "link absolute": (link("x", "/etc/passwd"), "leads out of the folder"),
    "hard link out": (link("a/x", "../x", tarfile.LNKTYPE), "leads out of the folder"),
    "device": (device("cifar-100-python/train"), "is a device or pipe"),
    "bomb": (claims("cifar-100-python/train", 300 << 20), "would take 300 MiB, the bound is 256 MiB"),
}


@pytest.mark.parametrize(("member", "message"), HOSTILE_MEMBERS.values(), ids=list(HOSTILE_MEMBERS))
def test_hostile_members_are_refused(tmp_path: Path, member: str | tarfile.TarInfo, message: str) -> None:
    archive = tmp_path / "c.tar.gz"
    write_tar(archive, [(member, b"")] if isinstance(member, tarfile.TarInfo) else [(member, b"x")])
    with pytest.raises(DataError, match=message):
        plan(archive)
    assert sorted(os.listdir(tmp_path)) == ["c.tar.gz"]


def test_a_link_inside_is_not_followed(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "c.tar", [(link("cifar-100-python/train", "meta"), b"")])
    with pytest.raises(DataError, match="holds no file 'meta'"):
        plan(archive)


def changed(change: Callable[[dict[str, dict[bytes, Any]]], object]) -> dict[str, dict[bytes, Any]]:
    files = cifar_parts()
    change(files)
    return files


WRONG = {
    "class missing": (lambda f: f["meta"][b"fine_label_names"].__setitem__(3, b"wolpertinger"), "lacks class 'bear'"),
    "classes in another order": (lambda f: f["meta"][b"fine_label_names"].reverse(), "has label 99, expected 0"),
    "images missing": (lambda f: f["train"][b"fine_labels"].__setitem__(0, 99), "images of class '.*', expected 4"),
    "no super-classes": (lambda f: f["meta"].pop(b"coarse_label_names"), "meta has no list 'coarse_label_names'"),
    "no test part": (lambda f: f.pop("test"), "holds no file 'test'; cifar-100-python.tar.gz"),
    "label out of range": (lambda f: f["train"][b"fine_labels"].__setitem__(0, 100), "needs 400 'fine_labels'"),
    "CIFAR-10": (lambda f: f.update({"data_batch_1": {b"labels": [1]}}), "is CIFAR-10; cifar-100-python.tar.gz"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_archives_are_named(tmp_path: Path, change: Callable[..., object], message: str) -> None:
    archive = cifar_archive(tmp_path / "c.tar.gz", changed(change))
    with pytest.raises(DataError, match=message):
        plan(archive)


def test_super_classes_are_compared(tmp_path: Path) -> None:
    files = cifar_parts()
    files["meta"][b"coarse_label_names"].reverse()
    with pytest.raises(DataError, match=r"is in super-class '.*', expected '.*'"):
        plan(cifar_archive(tmp_path / "c.tar.gz", files), "fc100")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    archive = cifar_archive(tmp_path / "c.tar.gz")
    whole = archive.read_bytes()
    for content in (whole[:-1000], whole[: len(whole) // 2], b"\x1f\x8bnot gzip at all", b"text", b""):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=r"c\.tar\.gz' (is damaged, cut short or of another kind|holds no file)"):
            plan(archive)
    with pytest.raises(DataError, match="does not exist"):
        plan(tmp_path / "none.tar.gz")
    with pytest.raises(DataError, match="is a folder"):
        plan(tmp_path)


def test_a_lying_header_cannot_exceed_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pax header is read whole before its size can be compared; the stream itself is bounded."""
    from smkd.prepare import cifar
    from smkd.prepare.archives import Bounds

    monkeypatch.setattr(cifar, "CIFAR_BOUNDS", Bounds(member=1 << 20, total=1 << 20))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"comment": "0" * (4 << 20)}
        tar.addfile(info)
    (tmp_path / "c.tar").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="holds more than 1 MiB; refused"):
        plan(tmp_path / "c.tar")
