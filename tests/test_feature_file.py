"""Feature files: what comes back, what is refused, and what a failed write leaves behind."""

from __future__ import annotations

import os
import re
import resource
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from smkd import __version__
from smkd.errors import DataError
from smkd.fewshot.feature_file import FeatureSource, FeatureWriter, _mapped, read_features, read_source
from smkd.fewshot.features import check_features
from smkd.prepare.run import PrepareRequest

NAMES = ("cat", "dog", "hübsch")
SOURCE = FeatureSource(
    model="vit_small/16", checkpoint_sha256="ab" * 32, dataset="folder", split="test",
    transform="resize 360, crop 320", parts=("cls", "weighted_mean"), blocks=(11, 12), class_names=NAMES,
)  # fmt: skip
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


def rows_of(count: int, dim: int = 7) -> tuple[torch.Tensor, NDArray[np.int64]]:
    values = torch.randn(count, dim, generator=torch.Generator().manual_seed(count))
    return values, np.arange(count) % 3


def write(
    path: Path, values: torch.Tensor, labels: NDArray[np.int64], *, rows: int | None = None, batch: int = 4
) -> None:
    with FeatureWriter(path, rows=rows or len(values), dim=values.shape[1], source=SOURCE) as writer:
        for start in range(0, len(values), batch):
            writer.append(values[start : start + batch], labels[start : start + batch])


def published(path: Path, values: Any, labels: Any, count: Any = None, **storage: Any) -> Path:
    """A file as the published code writes it."""
    with h5py.File(path, "w") as file:
        file.create_dataset("all_labels", data=labels)
        file.create_dataset("all_feats", data=values, **storage)
        file.create_dataset("count", data=np.array([len(values)] if count is None else count))
    return path


def refused(path: Path, *said: str) -> str:
    """The one line `path` is refused with."""
    with pytest.raises(DataError) as raised:
        read_features(path)
    message = str(raised.value)
    assert "\n" not in message
    for text in (str(path), *said):
        assert text in message
    return message


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


# what comes back


@pytest.mark.parametrize("count", [1, 3, 50])
def test_round_trip(tmp_path: Path, count: int) -> None:
    values, labels = rows_of(count)
    path = tmp_path / "new" / "folder" / "test.h5"
    write(path, values, labels)
    features = read_features(path)
    assert torch.equal(features.values, values)
    assert features.values.dtype == torch.float32
    assert np.array_equal(features.labels, labels)
    assert features.labels.dtype == np.int64
    assert features.class_names == list(NAMES)
    assert features.skipped == 0
    assert read_source(path) == replace(SOURCE, smkd_version=__version__)
    assert not partials(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
        published(tmp_path / "b.h5", values, labels).stat().st_mode
    )


def test_the_published_layout_is_written(tmp_path: Path) -> None:
    values, labels = rows_of(10)
    write(tmp_path / "a.h5", values, labels, rows=12)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["all_feats"].shape == (12, 7)
        assert file["all_feats"].dtype == np.float32
        assert file["all_feats"].chunks is None
        assert file["all_feats"].id.get_offset() % 64 == 0
        assert file["all_labels"].shape == (12,)
        assert file["count"][:].tolist() == [10]
        assert np.array_equal(file["all_feats"][:10], values.numpy())
        assert not file["all_feats"][10:].any()
        assert not file["all_labels"][10:].any()
        assert file.attrs["transform"] == "resize 360, crop 320"
        assert list(file.attrs["class_names"]) == list(NAMES)
        assert file.attrs["skipped"] == 2


def test_rows_that_never_came_are_skipped_images(tmp_path: Path) -> None:
    values, labels = rows_of(10)
    write(tmp_path / "a.h5", values, labels, rows=1000)
    features = read_features(tmp_path / "a.h5")
    assert torch.equal(features.values, values)
    assert len(features.labels) == 10
    assert features.skipped == 990
    assert read_source(tmp_path / "a.h5").skipped == 990


def test_streaming_equals_at_once(tmp_path: Path) -> None:
    values, labels = rows_of(23)
    for name, batch in (("once", 23), ("stream", 3)):
        write(tmp_path / name, values, labels, batch=batch)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "stream").read_bytes()


def test_strided_and_empty_batches(tmp_path: Path) -> None:
    values, labels = rows_of(9)
    with FeatureWriter(tmp_path / "a.h5", rows=9, dim=7, source=FeatureSource()) as writer:
        writer.append(values.t().contiguous().t(), labels)
        writer.append(values[:0], labels[:0])
    assert torch.equal(read_features(tmp_path / "a.h5").values, values)


def test_many_and_odd_class_names(tmp_path: Path) -> None:
    names = (*(f"class of {i}" for i in range(9000)), "not utf-8: \udcff")
    with FeatureWriter(tmp_path / "a.h5", rows=2, dim=3, source=FeatureSource(class_names=names)) as writer:
        writer.append(torch.ones(2, 3), np.array([5, 9000]))
    features = read_features(tmp_path / "a.h5")
    assert len(features.class_names) == 9001
    assert features.class_names[-1] == "not utf-8: \\udcff"
    # a class of which nothing could be read keeps its place
    assert features.labels.tolist() == [5, 9000]


# files of others


@pytest.mark.parametrize(
    "storage",
    [
        {}, {"dtype": "f2"}, {"dtype": "f8"}, {"dtype": ">f4"}, {"chunks": (4, 7)},
        {"chunks": (3, 2), "compression": "gzip", "shuffle": True}, {"compression": "lzf", "dtype": "f2"},
    ],
    ids=str,
)  # fmt: skip
def test_every_storage_gives_the_same(tmp_path: Path, storage: dict[str, Any]) -> None:
    values = rows_of(20)[0].half().float()
    values[15:] = 0
    labels = np.r_[np.tile([-7, 64, 12], 5), np.zeros(5, int)].astype(np.int32)
    features = read_features(published(tmp_path / "a.h5", values, labels, [15], **storage))
    assert features.values.dtype == torch.float32
    assert torch.equal(features.values, values[:15])
    assert features.labels.tolist() == [0, 2, 1] * 5
    assert features.class_names == ["class -7", "class 12", "class 64"]
    assert features.skipped == 0
    assert read_source(tmp_path / "a.h5") == FeatureSource()


def test_numbers_in_other_files_are_refused(tmp_path: Path) -> None:
    values, labels = rows_of(5)
    published(tmp_path / "other.h5", values, labels)
    values.numpy().tofile(tmp_path / "raw")
    ways: dict[str, Any] = {
        "external": lambda file: file.create_dataset("all_feats", (5, 7), "f4", external=[(tmp_path / "raw", 0, 140)]),
        "endless": lambda file: file.create_dataset(
            "all_feats", data=values, external=[(tmp_path / "raw", 0, h5py.h5f.UNLIMITED)]
        ),
        "link": lambda file: file.update({"all_feats": h5py.ExternalLink(tmp_path / "other.h5", "/all_feats")}),
        "link by a link": lambda file: file.update({
            "x": h5py.ExternalLink(tmp_path / "other.h5", "/all_feats"), "all_feats": h5py.SoftLink("/x")
        }),
        "link in a linked folder": lambda file: file.update({
            "x": h5py.ExternalLink(tmp_path / "other.h5", "/"), "all_feats": h5py.SoftLink("/x/all_feats")
        }),
        "virtual": lambda file: file.create_virtual_dataset(
            "all_feats", h5py.VirtualLayout((5, 7), "f4")
        ),
    }  # fmt: skip
    for name, make in ways.items():
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["all_labels"], file["count"] = labels, [5]
            make(file)
        message = refused(tmp_path / "a.h5", "numbers should be in the file itself")
        assert "all_feats is" in message, name
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["all_feats"], file["x"], file["count"] = values, labels, [5]
        file["all_labels"] = h5py.SoftLink("/x")
    assert len(read_features(tmp_path / "a.h5").labels) == 5


@pytest.mark.parametrize(
    ("name", "shape", "storage", "said"),
    [
        ("all_feats", (10**9, 1000), {"chunks": (1, 1000)}, "no number of it was ever written"),
        (
            "all_feats",
            (10**9, 1000),
            {"chunks": (1, 1000), "write": 1},
            "all_feats claims 4,000,000,000,000 bytes, of w",
        ),
        ("all_feats", (10**9, 1000), {"chunks": (100, 1000), "write": 1, "compression": "gzip"}, "all_feats claims"),
        ("all_feats", (10**9, 1000), {}, "no number of it was ever written"),
        (
            "all_labels",
            (12,),
            {"chunks": (10**8,), "maxshape": (None,), "compression": "gzip"},
            "all_labels claims 800,000,000 b",
        ),
        (
            "count",
            (1,),
            {"chunks": (10**8,), "maxshape": (None,), "compression": "gzip"},
            "count claims 800,000,000 bytes, of which",
        ),
    ],
)
def test_sizes_that_the_file_cannot_hold(
    tmp_path: Path, name: str, shape: tuple[int, ...], storage: dict[str, Any], said: str
) -> None:
    """They are refused before memory is asked for."""
    path, storage = tmp_path / "a.h5", dict(storage)
    written, rows = storage.pop("write", 0), 12 if shape[0] < 12 else shape[0]
    with h5py.File(path, "w") as file:
        for other, form in (("all_feats", (rows, 7)), ("all_labels", (rows,)), ("count", (1,))):
            if other != name:
                chunks = None if other == "count" else (1, *form[1:])
                made = file.create_dataset(other, form, "f4" if other == "all_feats" else "i8", chunks=chunks)
                made[: min(len(made), 12)] = rows if other == "count" else 0
        made = file.create_dataset(name, shape, "f4" if name == "all_feats" else "i8", **storage)
        if written:
            made[0] = 1
        if "maxshape" in storage:
            made.id.write_direct_chunk((0,), b"x\x9c\x03\x00\x00\x00\x00\x01")
    refused(path, said)


def test_a_named_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5")
    refused(tmp_path / "a.h5", "it is not a regular file")


def test_other_places_in_the_file(tmp_path: Path) -> None:
    values, _ = rows_of(5)
    labels = np.arange(5, dtype=np.uint8)
    published(tmp_path / "odd.h5", values, labels)
    with h5py.File(tmp_path / "odd.h5") as file:
        assert file["all_feats"].id.get_offset() % 4
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=1024) as file:
        file["all_feats"], file["all_labels"], file["count"] = values, labels, 5
    for name in ("odd", "block"):
        assert torch.equal(read_features(tmp_path / f"{name}.h5").values, values)


def test_names_of_others(tmp_path: Path) -> None:
    values, _ = rows_of(4)
    path = published(tmp_path / "a.h5", values, [80, 64, 80, 71])
    with h5py.File(path, "r+") as file:
        file.attrs["class_names"] = np.array([b"ant", b"bee", b"cow"])
        file.attrs["model"] = np.bytes_("vit")
    features = read_features(path)
    assert features.labels.tolist() == [2, 0, 2, 1]
    assert features.class_names == ["ant", "bee", "cow"]
    assert read_source(path).model == "vit"
    with h5py.File(path, "r+") as file:
        file.attrs["class_names"] = ["ant", "bee"]
    refused(path, "2 class names, but 3 labels from 64 on")


# mapping


def mapping(path: Path) -> tuple[range, int] | None:
    """Addresses at which a file is mapped, and the kB of them that are copies in memory of their own."""
    found = re.search(
        rf"^(\w+)-(\w+) .*{path}\n(?:.*\n)*?Anonymous: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.M
    )
    return found and (range(int(found[1], 16), int(found[2], 16)), int(found[3]))


@linux
def test_mapped_rows_take_no_memory_of_their_own(tmp_path: Path) -> None:
    values = torch.ones(8000, 384)  # several chunks of the check
    path = tmp_path / "a.h5"
    write(path, values, np.zeros(len(values), np.int64), batch=1000)
    features = read_features(path)
    assert torch.equal(features.values, values)
    found = mapping(path)
    assert found is not None
    addresses, copied = found
    assert features.values.data_ptr() in addresses
    assert features.values.data_ptr() + values.nbytes - 1 in addresses
    assert copied == 0
    features.values[:1024] = 2  # 1536 kB
    found = mapping(path)
    assert found is not None
    assert 1536 <= found[1] <= 1536 + 8
    del features
    assert mapping(path) is None


def test_the_file_is_safe_from_writes(tmp_path: Path) -> None:
    values, labels = rows_of(10)
    write(tmp_path / "a.h5", values, labels)
    before = (tmp_path / "a.h5").read_bytes()
    features = read_features(tmp_path / "a.h5")
    features.values.zero_()
    assert (tmp_path / "a.h5").read_bytes() == before
    # a file written in its place is another one
    kept = read_features(tmp_path / "a.h5").values
    write(tmp_path / "a.h5", values + 1, labels)
    assert torch.equal(kept, values)
    assert torch.equal(read_features(tmp_path / "a.h5").values, values + 1)


# failed writes


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError, RuntimeError, SystemExit])
def test_an_interrupted_write_leaves_things_as_they_were(
    tmp_path: Path, before: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "a.h5"
    values, labels = rows_of(10)
    if before:
        write(path, values, labels)

    def interrupted() -> None:
        with FeatureWriter(path, rows=10, dim=7, source=SOURCE) as writer:
            writer.append(values[:5] + 1, labels[:5])
            assert len(partials(tmp_path)) == 1
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == ([path] if before else [])
    if before:
        assert torch.equal(read_features(path).values, values)


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file may grow past these bytes, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("limit_at", ["rows", "padding"])
def test_no_space_while_writing(tmp_path: Path, small_files: int, limit_at: str) -> None:
    path = tmp_path / "a.h5"
    values, labels = rows_of(10)
    write(path, values, labels)
    large = torch.zeros(small_files // 100, 100)
    rows, kept = (len(large), len(large)) if limit_at == "rows" else (len(large), 10)
    with pytest.raises(DataError, match=rf"^cannot write '{path}': File too large; the file that was there is kept$"):
        write(path, large[:kept], np.zeros(kept, np.int64), rows=rows, batch=20)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_features(path).values, values)


def test_no_space_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"a\.h5': needs [\d,]+ bytes, 1,000 are free"):
        FeatureWriter(tmp_path / "a.h5", rows=10, dim=7, source=FeatureSource()).__enter__()
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.h5", tmp_path / "folder"):
        with pytest.raises(DataError, match=f"^cannot write '{path}': "):
            FeatureWriter(path, rows=1, dim=1, source=FeatureSource()).__enter__()

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may write anywhere
    with pytest.raises(DataError, match=r"a\.h5': Permission denied$"):
        FeatureWriter(tmp_path / "a.h5", rows=1, dim=1, source=FeatureSource()).__enter__()
    with pytest.raises(DataError, match=r"cannot read '.*file': Permission denied$"):
        read_features(tmp_path / "file")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]


def test_a_file_without_rows_is_not_written(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="not one image of the split can be read"),
        FeatureWriter(tmp_path / "a.h5", rows=3, dim=2, source=FeatureSource()),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (2,)])
def test_batches_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def attempt() -> None:
        with FeatureWriter(tmp_path / "a.h5", rows=3, dim=2, source=FeatureSource()) as writer:
            writer.append(torch.zeros(shape), np.zeros(shape[0], np.int64))

    with pytest.raises(ValueError, match=r"do not fit a file of \[3, 2\]"):
        attempt()


# files that are refused


def test_missing_or_not_hdf5(tmp_path: Path) -> None:
    refused(tmp_path / "none.h5", "does not exist")
    refused(tmp_path, "Is a directory")
    for content in (b"", b"\x89HDF", b"some text " * 1000):
        (tmp_path / "a.h5").write_bytes(content)
        refused(tmp_path / "a.h5", "is not an HDF5 file")


@pytest.mark.parametrize("ours", [True, False])
def test_cut_at_any_byte(tmp_path: Path, ours: bool) -> None:
    values, labels = rows_of(40, dim=64)
    if ours:
        write(tmp_path / "whole.h5", values, labels)
    else:
        published(tmp_path / "whole.h5", values, labels)
    whole = (tmp_path / "whole.h5").read_bytes()
    cut = tmp_path / "cut.h5"
    for length in sorted({*range(0, len(whole), 97), *range(0, 200, 7), len(whole) - 1}):
        cut.write_bytes(whole[:length])
        refused(cut, "not an HDF5 file" if length < 8 else "cut short or damaged")
        with pytest.raises(DataError):
            read_source(cut)


def test_cut_within_the_rows_unknown_to_hdf5(tmp_path: Path) -> None:
    """The superblock says where the file ends; one that agrees with the cut lets HDF5 open it."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["count"], file["all_labels"] = [100], np.zeros(100, int)
        file["all_feats"] = np.ones((100, 64), np.float32)
    whole = path.read_bytes()
    assert int.from_bytes(whole[40:48], "little") == len(whole)
    for lost in (1, 1000, 100 * 64 * 4 - 1):
        length = len(whole) - lost
        path.write_bytes(whole[:40] + length.to_bytes(8, "little") + whole[48:length])
        refused(path, "cut short")


def test_cut_while_it_is_read(tmp_path: Path) -> None:
    path = published(tmp_path / "a.h5", np.ones((1000, 64), np.float32), np.zeros(1000, int))
    with h5py.File(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DataError, match="cut short within all_feats"):
            _mapped(path, file["all_feats"], 10)


def test_damaged_structure(tmp_path: Path) -> None:
    values, labels = rows_of(4)
    write(tmp_path / "a.h5", values, labels)
    whole = (tmp_path / "a.h5").read_bytes()
    for place in (8, 21, 34, 47, 73, 112, 200):
        (tmp_path / "a.h5").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        refused(tmp_path / "a.h5", "cut short or damaged")


def edited(path: Path, **datasets: Any) -> Path:
    """A good file with other datasets; None leaves one out."""
    values, labels = rows_of(12)
    plain = {"all_feats": values.numpy(), "all_labels": labels, "count": [12], **datasets}
    with h5py.File(path, "w") as file:
        for name, data in plain.items():
            if data is not None:
                file[name] = data
    return path


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        ({"count": None}, "it holds all_feats, all_labels; expected all_feats, all_labels, count"),
        ({"count": None, "all_feats": None, "all_labels": None, "x": 1}, "it holds x; expected all_feats, all_labels"),
        ({"count": None, "all_feats": None, "all_labels": None}, "it holds nothing; expected"),
        ({"all_feats": None, "all_feats/group": 1}, "expected all_feats, all_labels, count"),
        ({"all_feats": h5py.SoftLink("/nowhere")}, "component not found"),
        ({"all_feats": h5py.Empty("f")}, "features are float32 [], expected floats [rows, dim]"),
        ({"all_feats": np.zeros((12, 7), int)}, "features are int64 [12, 7], expected floats [rows, dim]"),
        ({"all_feats": np.zeros(12)}, "features are float64 [12], expected floats [rows, dim]"),
        ({"all_feats": np.zeros((12, 7, 2))}, "features are float64 [12, 7, 2], expected floats [rows, dim]"),
        ({"all_feats": np.zeros((12, 0))}, "features are float64 [12, 0], expected floats [rows, dim]"),
        ({"all_labels": np.zeros(12)}, "labels are float64 [12], expected integers [rows]"),
        ({"all_labels": np.zeros((12, 1), int)}, "labels are int64 [12, 1], expected integers [rows]"),
        ({"all_labels": 3}, "labels are int64 [], expected integers [rows]"),
        ({"all_labels": np.zeros(12, [("a", int)])}, "expected integers [rows]"),
        ({"all_labels": np.zeros(9, int)}, "labels not matching features (9 labels, 12 features)"),
        ({"count": [12, 12]}, "count is int64 [2], expected one integer"),
        ({"count": [1.5]}, "count is float64 [1], expected one integer"),
        ({"count": h5py.Empty("i")}, "expected one integer"),
        ({"count": [13]}, "count is 13, but there are 12 rows"),
        ({"count": [-1]}, "count is -1, but there are 12 rows"),
        ({"count": [0]}, "no rows"),
    ],
    ids=str,
)
def test_other_layouts(tmp_path: Path, datasets: dict[str, Any], said: str) -> None:
    refused(edited(tmp_path / "a.h5", **datasets), said)


def test_rows_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = rows_of(30)
    values[25:] = torch.nan  # padding is not looked at
    good = read_features(published(tmp_path / "padded.h5", values, labels, [25])).values
    for step in (2**22, 7 * 4, 1):  # rows checked together
        monkeypatch.setattr("smkd.fewshot.features.CHECK_NUMBERS", step)
        bad = good.clone()
        bad[4, 6] = torch.nan
        said = "1 of 25 rows are NaN or infinite (rows 4, counted from 0; the first is of class 'class 1')"
        refused(published(tmp_path / "a.h5", bad, labels[:25]), said)
        bad[[7, 9, 11, 20, 24], 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf, torch.nan])
        said = "6 of 25 rows are NaN or infinite (rows 4, 7, 9, 11, 20, ..., counted from 0; the first is of class "
        refused(published(tmp_path / "a.h5", bad, labels[:25], compression="gzip"), said)
    wide = good.double()
    wide[3] = 1e300
    refused(published(tmp_path / "a.h5", wide, labels[:25]), "rows 3, counted")


# plain arrays


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_plain_arrays(kind: str) -> None:
    values, labels = rows_of(6)
    given: tuple[Any, Any] = (values, torch.from_numpy(labels)) if kind == "tensor" else (values.numpy(), labels)
    features = check_features(given[0], given[1] * 10)
    assert features.values.data_ptr() == values.data_ptr()
    assert features.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert features.class_names == ["class 0", "class 10", "class 20"]
    assert check_features(*given, NAMES).class_names == list(NAMES)
    with pytest.raises(DataError, match=r"^features: labels not matching features \(5 labels, 6 features\)$"):
        check_features(given[0], given[1][:5])
    with pytest.raises(DataError, match=r"^mine: labels are .*float32 .*, expected integers"):
        check_features(given[0], given[0][:, 0], where="mine")
    with pytest.raises(DataError, match=r"features are .*int64 \[6\], expected floats"):
        check_features(given[1], given[1])
    with pytest.raises(DataError, match="no rows"):
        check_features(given[0][:0], given[1][:0])


def test_arrays_that_torch_does_not_take() -> None:
    values, labels = rows_of(6)
    frozen = values.numpy().copy()
    frozen.flags.writeable = False
    for array in (frozen, values.numpy()[:, ::-1][:, ::-1], values.numpy().astype(">f8"), values.numpy()[::-1][::-1]):
        assert torch.equal(check_features(array, labels).values, values)
    assert torch.equal(check_features(values.double().requires_grad_(), labels).values, values)


def chunked(path: Path, rows: int, written: slice, chunks: tuple[int, int], **labels: Any) -> Path:
    """Features and labels in chunks, of which some rows are written."""
    values = np.random.default_rng(0).normal(size=(rows, 4)).astype("f4")
    with h5py.File(path, "w") as file:
        features = file.create_dataset("all_feats", (64, 4), "f4", chunks=chunks, maxshape=(None, 4))
        features[written] = values[written]
        file.create_dataset("all_labels", (64,), "i8", chunks=(8,))[labels.get("labels", slice(None))] = 1
        file["count"] = [rows]
    return path


@pytest.mark.parametrize(
    ("written", "chunks", "message"),
    [
        (slice(0, 16), (8, 4), "rows 16 to 23 of all_feats were never written in whole"),
        (slice(8, 20), (8, 4), "rows 0 to 7 of all_feats"),
        (slice(0, 16), (8, 2), "rows 16 to 19 of all_feats"),
        (slice(0, 16), (16, 3), "rows 16 to 19 of all_feats"),
    ],
)
def test_rows_that_were_never_written_are_refused(
    tmp_path: Path, written: slice, chunks: tuple[int, int], message: str
) -> None:
    rows = 40 if "23" in message else 20
    with pytest.raises(DataError, match=message):
        read_features(chunked(tmp_path / "a.h5", rows, written, chunks))


def test_chunks_that_are_written_are_read(tmp_path: Path) -> None:
    for chunks in ((8, 4), (8, 3), (64, 4), (1, 1)):
        features = read_features(chunked(tmp_path / "a.h5", 20, slice(0, 20), chunks))  # no padding is written
        assert features.values.shape == (20, 4)
    with pytest.raises(DataError, match="rows 8 to 15 of all_labels"):
        read_features(chunked(tmp_path / "b.h5", 20, slice(0, 20), (8, 4), labels=slice(0, 8)))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    chunked(tmp_path / "a.h5", 20, slice(0, 20), (8, 4))
    for path in ("~/a.h5", Path("~/a.h5")):
        assert len(read_features(path).labels) == 20
        assert read_source(path).model == ""
    request = PrepareRequest("x", Path("~/out"), (Path("~/a.tar"),), Path("~/in"), Path("~/lists"))
    places = (request.out, *request.archives, request.source, request.lists)
    assert places == (tmp_path / "out", tmp_path / "a.tar", tmp_path / "in", tmp_path / "lists")
    assert PrepareRequest("x", Path("out")).source is None
