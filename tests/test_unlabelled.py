"""Images without class folders are enough for phase 1, and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import MakeFolder
from image_forms import encoded
from smkd import adaptation, api
from smkd.classify.pictures import support_images
from smkd.config.schema import DataConfig
from smkd.data.datasets import describe, open_split, open_validation
from smkd.data.images import UnlabelledImages
from smkd.data.sources import open_dataset
from smkd.errors import ConfigError, DataError, SmkdError

SETTINGS = ["data.dataset=folder", "epochs=1", "batch_size=4", "validation.every=1", "accelerator=cpu"]
MEASURED = ["validation.way=2", "validation.shots=[1]", "validation.query=2", "validation.episodes=5"]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    root = tmp_path / "album"
    root.mkdir()
    for number in range(8):
        (root / f"{number}.png").write_bytes(encoded(number % 3, number))
    (root / "notes.txt").write_text("none of them")
    return root


def pretrained(root: Path, *settings: str) -> Path:
    out = root.parent / "run"
    return api.pretrain(api.resolve("debug-pretrain", [*SETTINGS, f"data={root}", f"out={out}", *settings], "pretrain"))


def said(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cache", ["none", "memory", "mmap"])
def test_phase_1_trains_on_an_album_and_says_that_nothing_is_validated(
    album: Path, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    run = pretrained(album, f"data.cache={cache}")
    shown = " ".join(capsys.readouterr().out.split())
    assert "album: 8 images without class folders, all for training" in shown
    assert "validation is off: no classes; validation.data=<labelled folder> measures on others" in shown
    assert "8 images without classes" in shown
    assert {line["kind"] for line in said(run)} == {"train", "epoch"}
    assert not any("nmi" in line for line in said(run))  # there are no classes to agree with
    assert (run / "checkpoints" / "last.pt").is_file()


def test_phase_1_is_validated_on_a_labelled_folder(
    album: Path, make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = make_folder(classes=3, images=4)
    pretrained(album, f"validation.data={labelled / 'train'}", *MEASURED)
    shown = " ".join(capsys.readouterr().out.split())
    assert "validation accuracy" in shown
    assert "validation is off" not in shown


def test_validation_data_are_a_val_split_or_all_there_is(album: Path, make_folder: MakeFolder) -> None:
    labelled = make_folder(classes=3, images=4)
    for root, classes in ((labelled, "val"), (labelled / "train", "train")):
        config = api.resolve("debug-pretrain", [*SETTINGS, f"data={album}", f"validation.data={root}"])
        images = open_validation(config)
        assert (images.class_names, len(images)) == ([f"{classes}-{n}" for n in range(3)], 12)
    config = api.resolve("debug-pretrain", [*SETTINGS, f"data={labelled}"])
    assert open_validation(config).class_names == [f"val-{n}" for n in range(3)]
    with pytest.raises(DataError, match="album': its images lie in it directly"):
        open_validation(api.resolve("debug-pretrain", [*SETTINGS, f"data={labelled}", f"validation.data={album}"]))


@pytest.mark.parametrize("folders", [["DCIM"], ["a", "b"], ["2024/May", "2024/June"]])
def test_phase_1_takes_all_images_of_too_few_folders_to_be_split(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, count = tmp_path / "album", 9
    for number in range(count):
        place = root / [*folders, "."][number % (len(folders) + 1)]  # some lie beside the folders
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(encoded(number % 3, number))
    run = pretrained(root)
    shown = " ".join(capsys.readouterr().out.split())
    classes = "2 classes" if "a" in folders else "1 class"
    assert f"album: {count} images of {classes}, too few to be split by class, all for training" in shown
    assert shown.count("validation is off") == 1
    assert f"{count} images without classes" in shown
    assert (run / "checkpoints" / "last.pt").is_file()
    with pytest.raises(DataError, match="splitting by class needs at least 3"):
        pretrained(root, "objective.labels=true", "overwrite=true")
    assert len(open_split(DataConfig(root=root / folders[0].split("/")[0]), "train", labelled=False)) < count


def test_too_few_classes_in_another_form(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(0, number))
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(4)))
    source = open_dataset(tmp_path / "list.csv", labelled=False)
    assert not source.labelled
    assert len(source.open("train")) == 4
    by_image = open_dataset(tmp_path / "list.csv", split_by="images", labelled=False)
    assert by_image.labelled  # what is asked for is done
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x" / "1.heic").touch()
    with pytest.raises(DataError, match=r"other' holds only 1 \.heic"):
        open_dataset(tmp_path / "other", labelled=False)


def test_an_album_is_a_data_set_of_one_split(album: Path) -> None:
    (album / "far.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out: 1 \.heic"):
        source = open_dataset(album)
    (album / "far.heic").unlink()
    assert not source.labelled
    images = open_split(DataConfig(root=album, limit_per_class=3), "train", labelled=False)
    assert isinstance(images, UnlabelledImages)
    assert [Path(images.name(n)).name for n in range(len(images))] == ["0.png", "1.png", "2.png"]
    assert describe(DataConfig(root=album)).endswith("album: 8 images without class folders, all for training")
    with pytest.raises(DataError, match="has no val split"):
        source.open("val")


WRONG: dict[str, Callable[[Path], object]] = {
    "phase 2": lambda album: api.distill(
        api.resolve("debug-distill", [f"data={album}", "data.dataset=folder", f"init={pretrained(album)}"], "distill")
    ),
    "balanced": lambda album: pretrained(album, "data.sampler={classes: 2, per_class: 2}"),
    "labels": lambda album: pretrained(album, "objective.labels=true"),
    "adapt": lambda album: adaptation.planned(album, album.parent / "x", pretrained(album)),
    "split": lambda album: open_split(DataConfig(root=album), "train"),
}


@pytest.mark.parametrize("use", WRONG)
def test_whatever_needs_classes_refuses_in_one_line(album: Path, use: str) -> None:
    with pytest.raises(
        SmkdError, match=r"album': its images lie in it directly, .* phase 1 alone; give each class a f"
    ):
        WRONG[use](album)


def test_fit_and_patience_say_what_is_missing(album: Path) -> None:
    with pytest.raises(DataError, match=r"no images in class folders but 8 \.png directly in it; expected <class>/<im"):
        support_images(album)
    with pytest.raises(ConfigError, match=r"validation\.patience=2 needs validation, .*give validation\.data="):
        pretrained(album, "validation.patience=2")
    assert not (album.parent / "run").exists()
