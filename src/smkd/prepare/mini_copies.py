"""miniImageNet from the copies that circulate: folders of images, or the three `mini-imagenet-cache` pickles.

Most hold 84 x 84 pixels, too few for crops of 224.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from smkd.data.decoding import read_file, shape
from smkd.data.formats import class_folders, is_foreign, loose_pictures
from smkd.errors import DataError
from smkd.prepare.build import Plan
from smkd.prepare.imagenet import PUBLISHED
from smkd.prepare.pickles import PickledArray, Span, read_pickle
from smkd.prepare.registry import SPLITS, ClassEntry
from smkd.prepare.writing import FileRange, Item, Pixels, Writing

CROP = 224
"""Side of the crops of the recipes, in pixels."""


def find_copy(source: Path) -> str | None:
    """Which kind of copy a folder is: 'pickles', 'folders', or None where it is neither."""
    if not source.is_dir():
        return None
    if any((source / _cache_name(split)).exists() for split in SPLITS):
        return "pickles"
    if all((source / split).is_dir() for split in SPLITS) or _flat(source) is not None or _mixed(source):
        return "folders"
    return None


def plan_pickles(source: Path, entries: Sequence[ClassEntry], size: int | None) -> Plan:
    """Images of `mini-imagenet-cache-{train,val,test}.pkl`, as `<split>/<wnid>/<number>.png`.

    The arrays stay in their files; workers read one image at a time.

    Raises:
        DataError: a file is missing, would run code, or has other classes or counts.
    """
    items: list[Item] = []
    smallest = 0
    for split in SPLITS:
        path = source / _cache_name(split)
        images, classes = _read_cache(path)
        height, width = images.shape[1:3]
        smallest = min(smallest or height, height, width)
        for entry in _expected(path, entries, split, classes):
            rows = sorted(classes[entry.folder])
            if rows[0] < 0 or rows[-1] >= images.shape[0]:
                raise DataError(f"'{path}': class_dict of {entry.folder} names rows beyond image_data")
            _check_count(path, entry, len(set(rows)))
            for number, row in enumerate(rows):
                pixels = Pixels(_row(path, images, row), height, width)
                items.append(Item(f"{split}/{entry.folder}/{number:05}.png", pixels))
    return Plan(items, len(items), Writing(size=size), _warnings(source, smallest))


def plan_folders(source: Path, entries: Sequence[ClassEntry], size: int | None) -> Plan:
    """Images of `<split>/<wnid>/`, or of folders with the published names, as `<split>/<wnid>/<name>`.

    Published names say the class, and the class says the split: such images may lie in one folder, or in train and
    val folders that both hold every class.

    Raises:
        DataError: classes are missing, strange, or have other counts, or two images have one name.
    """
    flat = source if _mixed(source) else _flat(source)
    named = {} if flat is None else _by_name(flat, "*/*/*" if _mixed(source) else "*")
    items: list[Item] = []
    sizes = []
    for split in SPLITS:
        found = named or _by_folder(source / split)
        if flat:
            found = {e.folder: named[e.folder] for e in entries if e.split == split and e.folder in named}
        for entry in _expected(flat or source / split, entries, split, found):
            files = found[entry.folder]
            _check_count(flat or source / split / entry.folder, entry, len(files))
            sizes.append(_shorter_side(files[0]))
            items += [Item(f"{split}/{entry.folder}/{file.name}", FileRange(str(file))) for file in files]
    return Plan(items, len(items), Writing(size=size), _warnings(source, min(sizes)))


def _cache_name(split: str) -> str:
    return f"mini-imagenet-cache-{split}.pkl"


def _warnings(source: Path, shorter: int) -> tuple[str, ...]:
    if shorter >= CROP:
        return ()
    return (
        f"'{source}' holds images of {shorter} pixels, too small for crops of {CROP}: accuracy will be well below "
        "the published; prepare from ILSVRC-12 to compare with the papers",
    )


def _flat(source: Path) -> Path | None:
    for folder in (source, source / "images"):
        if folder.is_dir() and any(PUBLISHED.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder
    return None


def _mixed(source: Path) -> bool:
    """Whether train and val folders hold images of the same classes under their published names."""
    train, val = (_by_folder(source / part) if (source / part).is_dir() else {} for part in ("train", "val"))
    return any(PUBLISHED.fullmatch(files[0].name) for name in train.keys() & val.keys() if (files := train[name]))


def _by_name(folder: Path, pattern: str) -> dict[str, list[Path]]:
    """Images with published names by class; raises `DataError` if two have one name."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob(pattern), key=lambda file: file.name):
        if match := PUBLISHED.fullmatch(file.name):
            other = found.setdefault(match[1], {}).setdefault(file.name, file)
            if other != file:
                raise DataError(f"'{other}' and '{file}' have one name; each image may be there once")
    return {name: list(files.values()) for name, files in found.items()}


def _by_folder(folder: Path) -> dict[str, list[Path]]:
    return {
        name: [folder / name / file for file in loose_pictures(folder / name) if not is_foreign(file)]
        for name in class_folders(folder)
    }


def _expected(
    path: Path, entries: Sequence[ClassEntry], split: str, found: Mapping[str, object]
) -> Iterator[ClassEntry]:
    wanted = [entry for entry in entries if entry.split == split]
    missing = [entry.folder for entry in wanted if entry.folder not in found]
    if missing:
        raise DataError(
            f"'{path}' lacks {len(missing)} of the {len(wanted)} {split} classes: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    strange = sorted(set(found) - {entry.folder for entry in wanted})
    if strange:
        raise DataError(f"'{path}': class '{strange[0]}' is no {split} class of Ravi and Larochelle's split")
    return iter(wanted)


def _check_count(path: Path, entry: ClassEntry, count: int) -> None:
    if count != entry.images:
        raise DataError(f"'{path}': class {entry.folder} has {count} images, expected {entry.images}")


def _read_cache(path: Path) -> tuple[PickledArray, dict[str, list[int]]]:
    try:
        with path.open("rb") as file:
            values = read_pickle(file, str(path))
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist; the three files of the copy belong together") from error
    images, classes = values.get("image_data"), values.get("class_dict")
    if not isinstance(images, PickledArray) or images.dtype != "u1" or len(images.shape) != 4 or images.shape[3] != 3:
        raise DataError(f"'{path}': image_data is no uint8 array of shape (images, height, width, 3)")
    if not isinstance(classes, dict) or not all(
        isinstance(rows, list) and rows and all(isinstance(row, int) for row in rows) for rows in classes.values()
    ):
        raise DataError(f"'{path}': class_dict does not give each class a list of rows")
    return images, {name.decode() if isinstance(name, bytes) else str(name): rows for name, rows in classes.items()}


def _row(path: Path, images: PickledArray, row: int) -> bytes | FileRange:
    size = images.shape[1] * images.shape[2] * 3
    if isinstance(images.content, Span):
        return FileRange(str(path), images.content.offset + row * size, size)
    return images.content[row * size : (row + 1) * size]


def _shorter_side(file: Path) -> int:
    try:
        return min(shape(read_file(file)))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read image '{file}': {error}") from error
