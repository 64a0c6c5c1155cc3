"""`open_dataset` finds out which form a data set has, describes it in a line, and opens its splits.

The forms are train/val/test folders of class folders; class folders; a table of paths and labels; tar shards; and
Parquet files or Hugging Face data sets with the images inside. Data without splits of their own are split by class.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from smkd.data.formats import (
    class_folders,
    find_images,
    foreign_line,
    holds_pictures,
    is_foreign,
    is_hidden,
    loose_pictures,
    nfc,
    warn,
)
from smkd.data.hub import PREFIX, open_hub
from smkd.data.images import SPLITS, FileStore, FolderImages, Store, StoredImages, UnlabelledImages, chosen_images
from smkd.data.shards import ShardStore, open_shards
from smkd.data.splits import part_of_each_class, split_by_file, split_by_seed
from smkd.data.tables import TABLE_SUFFIXES, Listing, is_image_table, open_tables, parquet_columns
from smkd.errors import DataError
from smkd.files import expanded, listed

KNOWN_FORMS = (
    "known are train/val/test folders of class folders, class folders, a CSV or Parquet table with the columns "
    "path,label, .tar shards, Parquet files with images, and hf:<name>"
)
PACKED = (".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz", ".7z", ".rar")
OTHER_TABLES = (".tsv", ".txt", ".xls", ".xlsx", ".ods", ".json", ".jsonl")
Found = TypeVar("Found")
_remembered: ContextVar[dict[Hashable, Any] | None] = ContextVar("remembered", default=None)


@contextmanager
def opened_once() -> Iterator[None]:
    """Within this, also as a decorator, each data set is looked at once; one inside another adds nothing.

    Training, validation and measuring see the same images so, whatever is added to the folder meanwhile.
    """
    if _remembered.get() is not None:
        yield
        return
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def once(key: Hashable, look: Callable[[], Found]) -> Found:
    """What `look` finds; within `opened_once`, what it found at the first call with this key."""
    known = _remembered.get()
    if known is None:
        return look()
    if key not in known:
        known[key] = look()
    found: Found = known[key]
    return found


@dataclass(frozen=True)
class DatasetSource:
    """A data set whose form is known.

    Attributes:
        root: folder, file or `hf:<name>`.
        form: what it is, in a few words.
        rule: where the splits come from, in a few words.
        classes: names of each split's classes; splits that are not there are left out.
        own_splits: the splits are the data's own.
        listing: the images, unless they are found by looking into class folders.
        image_seed: splits the images of every class; none where splits differ by class or are the data's own.
        left_out: a line about each kind of folder that is no class.
    """

    root: str
    form: str
    rule: str
    classes: Mapping[str, list[str]]
    own_splits: bool = False
    listing: Listing | None = field(default=None, repr=False)
    image_seed: int | None = None
    left_out: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether the images have classes; without, phase 1 alone can use them."""
        return self.listing is None or self.listing.labelled

    @property
    def description(self) -> str:
        """One line for the user: what was found and how it is split."""
        if self.listing is not None and not self.listing.labelled:
            return f"{self.root}: {len(self.listing.store)} {self.form}, {self.rule}"
        if self.image_seed is not None:
            return f"{self.root}: {self.form}, {self.rule}; classes: {len(self.classes[SPLITS[0]])}"
        counts = ", ".join(f"{split} {len(names)}" for split, names in self.classes.items())
        line = f"{self.root}: {self.form}, {self.rule}; classes: {counts}"
        shared = self.shared_classes()
        return line + (f"; in more than one split: {listed(shared)}" if shared else "")

    def shared_classes(self) -> dict[str, list[str]]:
        """Splits of each class that is in more than one, which few-shot accuracy on unseen classes forbids."""
        times = Counter(itertools.chain.from_iterable(self.classes.values()))
        return {
            name: [split for split, names in self.classes.items() if name in names]
            for name, count in sorted(times.items())
            if count > 1
        }

    def open(self, split: str, limit_per_class: int | None = None) -> StoredImages:
        """Images of a split, class after class.

        Args:
            split: 'train', 'val' or 'test'.
            limit_per_class: at most this many images of each class, the first ones.

        Raises:
            DataError: there is no such split, or a class folder is empty.
        """
        if self.image_seed is not None:
            return part_of_each_class(self.whole(), split, self.image_seed, limit_per_class)
        if split not in self.classes:
            in_folders = self.own_splits and self.listing is None
            expected = f" (expected '{self.root}/{split}/<class>/<image>')" if in_folders else ""
            raise DataError(f"'{self.root}' has no {split} split{expected}; it has {', '.join(self.classes)}")
        return self._of_classes(split, limit_per_class)

    def whole(self) -> StoredImages:
        """All images of data without splits of their own that are split by image."""
        return self._of_classes(SPLITS[0], None)

    def _of_classes(self, split: str, limit_per_class: int | None) -> StoredImages:
        if self.listing is None:
            folder = Path(self.root) / split if self.own_splits else Path(self.root)
            names = None if self.own_splits else self.classes[split]
            key = ("images", folder, limit_per_class, names and tuple(names))
            return once(key, lambda: FolderImages(folder, limit_per_class, names))
        chosen = set(self.classes[split])
        own = self.listing.splits
        inside = [(own[item] == split if own else name in chosen) for item, name in enumerate(self.listing.classes)]
        listing, items = self.listing, np.flatnonzero(inside)
        images = chosen_images(listing.store, listing.classes, items, limit_per_class, listing.left_out)
        if listing.labelled:
            return images
        return UnlabelledImages(images.store, images.items, images.labels, images.class_names, images.left_out)


def open_dataset(
    root: Path | str, *, split_by: Literal["classes", "images"] = "classes", split_seed: int = 0,
    split_file: Path | None = None, label_column: str | None = None, labelled: bool = True,
) -> DatasetSource:  # fmt: skip
    """Find out which form of data set a root holds.

    Args:
        root: folder, table, tar file, or `hf:<name>`.
        split_by: what splits data without splits of their own: their classes, or the images of every class.
        split_seed: of that split.
        split_file: CSV (class,split) to use instead of the seed, for classes.
        label_column: column of a table that holds the class, if it is not called label or class.
        labelled: whether classes are needed; if not, images of too few classes to be split are all for training.

    Raises:
        DataError: the root is missing, or has none of the forms or several; names what was found.
    """
    place = root.as_posix() if isinstance(root, Path) else root
    if not place.startswith(PREFIX):
        place = str(expanded(place))
    split_file = split_file and expanded(split_file)
    found = once(("root", place, label_column), lambda: _found(place, label_column))
    by_image = split_by == "images" and found.splits is None
    few = found.splits is None and len(set(found.classes)) < len(SPLITS)
    if few and not (labelled or by_image or split_file):
        found = _unsplit(place, found)
    listing = found if isinstance(found, Listing) else None
    pairs: Iterable[tuple[str, str]]
    if found.splits is not None:
        pairs, rule = zip(found.splits, found.classes, strict=True), "splits of its own"
        if listing is not None and not listing.labelled:
            rule = "all for training"
    elif by_image:
        pairs, rule = itertools.product(SPLITS, found.classes), f"images of each class split with seed {split_seed}"
    else:
        if split_file is not None:
            chosen, rule = split_by_file(found.classes, split_file), f"split by class as {split_file} says"
        else:
            chosen, rule = split_by_seed(found.classes, split_seed), f"split by class with seed {split_seed}"
        pairs = zip(chosen.values(), chosen, strict=True)
    # said and not refused: `smkd eval --data` takes a run's settings to data that may be of another form
    unused = {
        "split_by": split_by == "images" and found.splits is not None,
        "split_seed": split_seed and (found.splits is not None or (split_file is not None and not by_image)),
        "split_file": split_file is not None and (found.splits is not None or by_image),
        "label_column": label_column and (listing is None or isinstance(listing.store, ShardStore)),
    }
    rule += "".join(f" (data.{name} is not used)" for name, given in unused.items() if given)
    seed = split_seed if by_image else None
    left_out = () if isinstance(found, Listing) else found.left_out
    warn(left_out)
    return DatasetSource(place, found.form, rule, _grouped(pairs), found.splits is not None, listing, seed, left_out)


def _found(place: str, label_column: str | None) -> Listing | _Folders:
    return open_hub(place, label_column) if place.startswith(PREFIX) else _look(Path(place), label_column)


@dataclass(frozen=True)
class _Folders:
    """Class folders; `splits` is the split of each, or none; `left_out` as `Source` has it."""

    classes: list[str]
    splits: list[str] | None
    form: str
    left_out: tuple[str, ...] = ()


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Sorted class names of each split, in the splits' order."""
    groups: dict[str, set[str]] = {}
    for split, name in pairs:
        groups.setdefault(split, set()).add(name)
    return {split: sorted(groups[split]) for split in SPLITS if split in groups}


def _look(root: Path, label_column: str | None) -> Listing | _Folders:
    if root.is_file():
        return _look_at_file(root, label_column)
    if not root.is_dir():
        hint = f"; a data set of the Hugging Face Hub is data={PREFIX}{root}" if _is_hub_name(str(root)) else ""
        raise DataError(f"data folder '{root}' does not exist{hint}")
    folders = class_folders(root)
    inside = {name: class_folders(root / name) for name in folders if name in SPLITS}
    trees = [split for split in SPLITS if inside.get(split)]
    if trees and len(inside) == len(SPLITS):
        return _tree(trees, inside)  # whatever lies beside the three is not part of the data set
    shards = _files(root, "*.tar", *(f"{split}/*.tar" for split in SPLITS))
    tables, parquets = _tables(root)
    holding = [name for name in folders if name not in trees and holds_pictures(root / name)]
    if set(holding) <= set(SPLITS) and holding and not trees:
        raise DataError(f"'{root / holding[0]}' holds images without class folders; expected <split>/<class>/<image>")
    found: dict[str, str] = {}
    if trees:
        found["tree"] = f"{_folders(trees)} with class folders"
    if shards:
        found["shards"] = f"{len(shards)} .tar files"
    if parquets:
        found["parquet"] = f"{len(parquets)} Parquet files with images"
    if tables:
        found["table"] = f"{'a table' if len(tables) == 1 else 'tables'} of images ({listed(t.name for t in tables)})"
    # one folder of images beside a table is where the table's paths lead
    if len(holding) > 1 or (holding and not tables):
        found["classes"] = f"{_folders(holding)} with images"
    if len(found) > 1:
        ways = "; ".join(found.values())
        raise DataError(f"'{root}' may be read in more than one way: {ways}; give data=<the one>, or move the others")
    loose = loose_pictures(root)
    images = [name for name in loose if not is_foreign(name)]
    if not found and images:
        return _unlabelled(root)
    if not found and loose:
        raise DataError(f"data folder '{root}' holds only {foreign_line(loose)}")
    if not found:
        raise DataError(f"data folder '{root}' holds no images in a known form ({_content(root)}); {KNOWN_FORMS}")
    if trees:
        return _tree(trees, inside)
    if shards:
        return open_shards(shards)
    if parquets:
        return open_hub(str(root), label_column)
    if tables:
        if len(tables) > 1 and any(table.stem.lower() not in SPLITS for table in tables):
            raise DataError(
                f"'{root}' holds {len(tables)} tables of images ({listed(t.name for t in tables)}); give one"
            )
        return open_tables(tables, label_column)
    others = [name for name in folders if name not in holding]
    left_out = (f"'{root}': folders without images are no classes: {listed(others)}",) if others else ()
    return _Folders([nfc(name) for name in holding], None, "class folders", left_out)


def _unlabelled(root: Path) -> Listing:
    """The images of a folder without class folders."""
    found = find_images(root)
    if not found.images:
        raise DataError(f"data folder '{root}' holds only {foreign_line(found.foreign)}")
    left_out = found.left_out(root)
    warn(left_out)
    return _for_training(FileStore(root, found.images), "images without class folders", left_out)


def _unsplit(root: str, found: Listing | _Folders) -> Listing:
    """All images of what has too few classes to be split, those beside the class folders as well."""
    count = len(set(found.classes))
    form = f"images of {count} class{'es' * (count > 1)}, too few to be split by class"
    if isinstance(found, Listing):
        return _for_training(found.store, form, found.left_out)
    return replace(_unlabelled(Path(root)), form=form)


def _for_training(store: Store, form: str, left_out: list[str]) -> Listing:
    """Images as the one class, which nobody named, of a training split."""
    return Listing(store, ["unlabelled"] * len(store), [SPLITS[0]] * len(store), form, left_out, labelled=False)


def _files(root: Path, *patterns: str) -> list[Path]:
    """Files of some names in a folder, sorted, hidden ones left out."""
    found = sorted(path for pattern in patterns for path in root.glob(pattern))
    return [path for path in found if path.is_file() and not any(map(is_hidden, path.relative_to(root).parts))]


def _look_at_file(path: Path, label_column: str | None) -> Listing:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return open_shards([path])
    if suffix == ".parquet" and "image" in parquet_columns(path).values():
        raise DataError(f"'{path}' holds the images themselves; give its folder, data={path.parent}")
    if suffix in TABLE_SUFFIXES:
        return open_tables([path], label_column)
    hint = "unpack it first; " if path.name.lower().endswith(PACKED) else ""
    hint = "save it as a CSV, with commas; " if suffix in OTHER_TABLES else hint
    raise DataError(f"'{path}' is a file of no known form; {hint}{KNOWN_FORMS}")


def _tree(trees: list[str], inside: Mapping[str, list[str]]) -> _Folders:
    classes = [nfc(name) for split in trees for name in inside[split]]
    return _Folders(classes, [split for split in trees for _ in inside[split]], f"{_folders(trees)} with class folders")


def _tables(root: Path) -> tuple[list[Path], list[Path]]:
    """Tables of paths directly in the root, and Parquet files with images up to one folder below."""
    tables = [path for path in _files(root, "*.csv") if is_image_table(path)]
    images = []
    for path in _files(root, "*.parquet", "*/*.parquet"):
        if "image" in parquet_columns(path).values():
            images.append(path)
        elif path.parent == root and is_image_table(path):
            tables.append(path)
    by_split = [table for table in tables if table.stem.lower() in SPLITS]
    return by_split or tables, images


def _folders(names: list[str]) -> str:
    return f"folder{'s' * (len(names) > 1)} {listed(names)}"


def _content(root: Path) -> str:
    """What lies in a folder, in a few words."""
    names = sorted(entry.name for entry in root.iterdir() if not is_hidden(entry.name))
    packed = [name for name in names if name.lower().endswith(PACKED)]
    if packed:
        return f"'{packed[0]}' must be unpacked first"
    return f"it holds {listed(names)}" if names else "it is empty"


def _is_hub_name(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")
