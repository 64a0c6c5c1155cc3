"""`smkd data verify` finds every fault that was put in, and nothing else; statistics agree with plain float64."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from made_images import SPLITS, encode, noise, write_splits
from smkd.cli import data as verbs
from smkd.data.datasets import DATASETS, PatternImages
from smkd.data.inspect import SCANNED_AT_ONCE, channel_statistics, image_statistics, look, scan
from smkd.data.sources import open_dataset
from smkd.data.verify import Report, verify
from smkd.errors import DataError
from smkd.prepare.manifest import Identity, write_manifest
from smkd.prepare.registry import class_list, published_repeats
from smkd.viz.contact import MOST_CLASSES, THUMB, contact_sheet

pytestmark = pytest.mark.slow

app = typer.Typer()
app.command()(verbs.verify)
app.command()(verbs.stats)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train 3, val 2, test 2 classes of four images; shorter sides 30 to 33."""
    return write_splits(tmp_path / "photos", [[4] * count for count in (3, 2, 2)], reddish, "{}.jpg")


def reddish(*seed: int) -> bytes:
    """A noisy JPEG, brighter in red."""
    values = np.random.default_rng(seed).integers(0, 200, (30 + seed[-1], 40, 3)) + np.array([50, 20, 0])
    return encode(values.astype(np.uint8), "JPEG", quality=95)


def save(path: Path, *seed: int) -> None:
    path.write_bytes(reddish(*seed))


def check(root: Path, jobs: int = 1, crop: int = 30, expected: dict[str, dict[str, int]] | None = None) -> Report:
    return verify(open_dataset(root), "folder", DATASETS["folder"], crop=crop, jobs=jobs, expected=expected)


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_sound_data_set_has_no_problems(root: Path, tmp_path: Path) -> None:
    report = check(root)
    assert report.problems == []
    found = [(facts.classes, facts.images, facts.per_class) for facts in report.splits.values()]
    assert found == [(3, 12, (4, 4)), (2, 8, (4, 4)), (2, 8, (4, 4))]
    assert report.splits["train"].shorter_side == (30, 31, 33)
    assert report.splits["train"].sizes == {"1-31": 6, "32-63": 6}
    done = command("verify", root, "--crop", 30, "--processes", 1, "--json", tmp_path / "r.json")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "no problems found in 28 images")
    assert "folders train, val, test with class folders" in done.stdout.splitlines()[0]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert written["used_mean"] == [0.485, 0.456, 0.406]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def no_image(path: Path) -> None:
    path.write_text("<html>404</html>")


def broken_png(path: Path) -> None:
    data = bytearray(encode(noise((40, 39))))
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(cut, "truncated"), (emptied, "the file is empty"), (no_image, "not an image of a known format"),
     (broken_png, "broken|truncated|zlib|CRC|checksum")],
)  # fmt: skip
def test_unreadable_images_are_named(root: Path, damage: Callable[[Path], None], reason: str) -> None:
    path = root / "val" / "val-1" / "2.jpg"
    damage(path)
    report = check(root)
    assert report.problems == ["val: 1 images cannot be read to their end"]
    (line,) = report.splits["val"].unreadable
    assert line.startswith(f"'{path}': ")
    with pytest.raises(DataError, match=reason):
        open_dataset(root).open("val").load(6)
    done = command("verify", root, "--processes", 1)
    assert done.exit_code == 1
    assert str(path) in done.stdout
    assert "problem: val: 1 images cannot be read" in done.stdout


def test_leakage_is_found_under_other_names_and_formats(root: Path) -> None:
    source = root / "train" / "train-0" / "1.jpg"
    shutil.copy(source, root / "test" / "test-1" / "another.jpg")
    with Image.open(source) as image:
        image.save(root / "val" / "val-0" / "lossless.png")
        image.transpose(Image.Transpose.ROTATE_90).save(root / "val" / "val-0" / "turned.png")
    shutil.copy(root / "val" / "val-1" / "0.jpg", root / "val" / "val-1" / "copy.jpg")
    report = check(root)
    assert report.problems == ["1 pictures are in more than one split (leakage: training sees what is tested)"]
    names = [str(source), str(root / "val/val-0/lossless.png"), str(root / "test/test-1/another.jpg")]
    assert report.leaked == [names]
    assert report.repeated == [[str(root / "val/val-1/0.jpg"), str(root / "val/val-1/copy.jpg")]]
    assert any("occur more than once inside a split" in line for line in report.warnings)
    assert " = ".join(names) in command("verify", root, "--processes", 1).stdout


def test_what_is_known_of_a_benchmark_is_told_from_what_is_new(tmp_path: Path) -> None:
    pairs = published_repeats("mini-imagenet")
    assert len(pairs) == 8
    split_of = {entry.folder: entry.split for entry in class_list("mini-imagenet")}
    splits = [{split_of[name.split("/")[0]] for name in pair} for pair in pairs]
    assert sorted(map(sorted, splits)) == [["train"]] * 2 + [["train", "val"]] * 6
    places = [tmp_path / "mini" / split_of[name.split("/")[0]] / name for pair in pairs for name in sorted(pair)]
    for number, place in enumerate(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        save(place, 7, number // 2, 0)
    words = ("verify", tmp_path / "mini", "--processes", 1, "--json", tmp_path / "a.json", "--dataset")
    done = command(*words, "mini-imagenet")
    assert "warning: 8 pictures occur more than once, which is known of the published benchmark" in done.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert (len(report["known"]), report["leaked"], report["repeated"]) == (8, [], [])
    assert not any("leakage" in line for line in report["problems"])
    # of another data set nothing is known
    assert "problem: 6 pictures are in more than one split" in command(*words, "folder").stdout
    # a third image with the same pixels is new
    shutil.copy(places[-1], places[-1].with_name("another.jpg"))
    shutil.copy(places[0], places[0].with_name("more.jpg"))
    done = command(*words, "mini-imagenet")
    assert "warning: 6 pictures occur more than once, which is known" in done.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert sorted(map(len, report["leaked"] + report["repeated"])) == [3, 3]


def test_equal_bytes_of_other_shapes_are_no_copies(root: Path) -> None:
    for split, size in (("train", (10, 20)), ("test", (20, 10))):
        Image.new("RGB", size, (9, 9, 9)).save(root / split / f"{split}-0" / "flat.png")
    assert check(root).leaked == []


def test_a_class_in_two_splits_is_named(root: Path) -> None:
    folder = root / "test" / "train-1"
    folder.mkdir()
    save(folder / "0.jpg", 7, 7, 7)
    report = check(root)
    assert report.shared_classes == {"train-1": ["train", "test"]}
    assert report.problems == ["1 classes are in more than one split: train-1 (train, test)"]


def test_small_images_and_missing_splits_are_warnings(root: Path) -> None:
    shutil.rmtree(root / "val")
    report = check(root, crop=32)
    assert report.problems == []
    assert "there is no val split" in report.warnings
    assert any("train: 6 of 12 images have a shorter side below the crop of 32 pixels (smallest 30)" in line
               for line in report.warnings)  # fmt: skip
    assert not any("shorter side" in line for line in check(root, crop=30).warnings)
    assert command("verify", root, "--crop", 32, "--processes", 1).exit_code == 0


def test_counts_are_compared_with_the_published(root: Path) -> None:
    right = {split: {f"{split}-{n}": 4 for n in range(3 if split == "train" else 2)} for split in SPLITS}
    assert check(root, expected=right).problems == []
    (root / "train" / "train-0" / "0.jpg").unlink()
    (root / "test" / "test-1").rename(root / "test" / "other")
    assert check(root, expected=right).counts == [
        "train: 1 classes have another number of images than published: train-0 3 (not 4)",
        "test: 1 of the 2 published classes are missing: test-1",
        "test: 1 classes are not in the published list: other",
    ]
    shutil.rmtree(root / "val")
    assert "val: missing; published are 2 classes, 8 images" in check(root, expected=right).counts


def test_the_benchmarks_lists_are_compared_with(root: Path) -> None:
    done = command("verify", root, "--dataset", "cifar-fs", "--processes", 1)
    assert done.exit_code == 1
    assert "problem: counts, train: 64 of the 64 published classes are missing" in done.stdout
    assert "used for cifar-fs" in done.stdout
    wrong = command("verify", root, "--dataset", "cifar")
    assert isinstance(wrong.exception, DataError)
    assert "did you mean 'cifar-fs'" in str(wrong.exception)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_find_the_same(root: Path) -> None:
    for number in range(SCANNED_AT_ONCE):
        save(root / "train" / "train-2" / f"more-{number}.jpg", 5, 5, number % 7)
    cut(root / "train" / "train-2" / "more-9.jpg")
    assert check(root, jobs=3) == check(root)
    images = open_dataset(root).open("train")
    whole, titles = look(images, range(len(images))), []
    parts = scan(images, 1, lambda chunks, title, total: titles.append((title, total)) or chunks, "train")
    assert (parts.sizes, parts.hashes, parts.unreadable) == (whole.sizes, whole.hashes, whole.unreadable)
    assert np.array_equal(parts.histogram, whole.histogram)
    assert titles == [("train", 2)]


def test_statistics_agree_with_plain_float64(root: Path) -> None:
    images = open_dataset(root).open("train")
    found = image_statistics(images)
    every = np.concatenate([images.load(i).reshape(3, -1).numpy() for i in range(len(images))], axis=1) / 255.0
    assert np.allclose(found.mean, every.mean(axis=1), rtol=1e-12)
    assert np.allclose(found.std, every.std(axis=1), rtol=1e-12)
    assert (found.images, found.pixels, found.unreadable) == (12, every.shape[1], 0)


def test_statistics_stay_exact_for_very_many_pixels() -> None:
    histogram = np.zeros((3, 256), dtype=np.int64)
    histogram[:, 200] = 10**15
    histogram[0, 201] = histogram[1, 202] = 10**15
    mean, std = channel_statistics(histogram)
    assert mean == pytest.approx((200.5 / 255, 201 / 255, 200 / 255), rel=1e-15)
    # float64 sums of squares would give anything near zero here
    assert std == pytest.approx((0.5 / 255, 1 / 255, 0.0), rel=1e-15)


def test_stats_prints_what_to_put_where(root: Path) -> None:
    cut(root / "train" / "train-2" / "1.jpg")
    done = command("stats", root, "--processes", 1)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert "11 images" in lines[1]
    assert "1 unreadable ones left out" in lines[1]
    settings = lines[4].split(":")[1].split()
    assert [word.split("=")[0] for word in settings] == ["data.mean", "data.std"]
    values = [float(text) for text in settings[0].removeprefix("data.mean=[").strip("]").split(",")]
    assert values == pytest.approx(image_statistics(open_dataset(root).open("train")).mean, abs=5e-5)
    assert eval(lines[5].split(": ")[1], {"DatasetSpec": lambda mean, std: mean}) == pytest.approx(values)


def test_statistics_without_a_readable_image_are_refused(root: Path) -> None:
    for path in (root / "train").rglob("*.jpg"):
        emptied(path)
    with pytest.raises(DataError, match=r"not one image can be read; the first: .*train-0/0\.jpg': the file is empty"):
        image_statistics(open_dataset(root).open("train"))
    report = check(root)
    assert (report.mean, report.splits["train"].shorter_side, report.splits["train"].sizes) == (None, None, {})
    assert "train: 12 images cannot be read to their end" in report.problems


def test_contact_sheets_show_every_class(root: Path, tmp_path: Path) -> None:
    cut(root / "train" / "train-0" / "0.jpg")
    done = command("verify", root, "--processes", 1, "--sheets", tmp_path / "sheets")
    assert [line for line in done.stdout.splitlines() if line.startswith("contact sheet")] == [
        f"contact sheet: {tmp_path / 'sheets' / split}.png" for split in SPLITS
    ]
    with Image.open(tmp_path / "sheets" / "train.png") as sheet:
        colours = [colour for _, colour in sheet.getcolors(1 << 24)]
        assert sheet.height >= 3 * THUMB
    assert (200, 30, 30) in colours  # the crossed box of the unreadable image
    with Image.open(tmp_path / "sheets" / "val.png") as sheet:
        assert (200, 30, 30) not in [colour for _, colour in sheet.getcolors(1 << 24)]


def test_contact_sheets_of_many_classes_stay_handy() -> None:
    images = PatternImages("train", 2)
    images.class_names = [f"a class with quite a long name, number {number}" for number in range(320)]
    images.labels = np.arange(128, dtype=np.int64) * 5 // 2
    images.labels[-1] = 319
    sheet = contact_sheet(images, "many")
    assert max(sheet.size) < 6_000
    assert MOST_CLASSES < 320


def test_what_cannot_be_written_is_named(root: Path, tmp_path: Path) -> None:
    done = command("verify", root, "--processes", 1, "--json", tmp_path / "no" / "r.json")
    assert "--json: cannot write" in str(done.exception)


# ---- files against dataset.json


def test_files_that_are_not_as_prepared_are_named(root: Path) -> None:
    files = {}
    for path in sorted(root.rglob("*.jpg")):
        data = path.read_bytes()
        files[path.relative_to(root).as_posix()] = (len(data), hashlib.sha256(data).hexdigest())
    write_manifest(root, Identity("folder", "1", "by class", {}), files)
    sound = command("verify", root, "--crop", 30)
    assert sound.exit_code == 0, sound.output
    save(root / "train" / "train-0" / "1.jpg", 7, 7)
    (root / "val" / "val-1" / "2.jpg").unlink()
    for number in range(4, 11):
        save(root / "test" / "test-0" / f"{number}.jpg", 8, number)
    found = command("verify", root, "--crop", 30, "--json", root.parent / "found.json")
    assert found.exit_code == 1
    assert "problem: 1 files differ from dataset.json: train/train-0/1.jpg" in found.output
    assert "problem: 1 files of dataset.json are missing: val/val-1/2.jpg" in found.output
    assert "problem: 7 files are not in it: test/test-0/10.jpg, test/test-0/4.jpg" in found.output
    assert "and 2 more" in found.output
    values = json.loads((root.parent / "found.json").read_text())
    assert [len(values[name]) for name in ("changed", "missing", "extra")] == [1, 1, 7]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
def test_a_killed_verify_leaves_no_process(root: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from smkd.data import inspect\n"
        "from smkd.data.sources import open_dataset\n"
        "inspect.SCANNED_AT_ONCE = 1\n"
        # one write: both processes come here at the same time
        "def slow(*args):\n    os.write(1, b'looking\\n')\n    time.sleep(60)\n"
        "inspect.look = slow\n"
        "inspect.scan(open_dataset(sys.argv[1]).open('train'), 2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"looking\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
