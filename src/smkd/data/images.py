"""One split as a sequence of uint8 images; the rest of the package uses every form of data set through it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smkd.data.decoding import decode, pixels, read_file
from smkd.data.formats import (
    Found,
    class_folders,
    counted,
    find_images,
    foreign_line,
    is_foreign,
    loose_pictures,
    nfc,
    warn,
)
from smkd.errors import DataError

SPLITS = ("train", "val", "test")


class Images(Protocol):
    """One split: labelled uint8 images, loaded one at a time."""

    labels: NDArray[np.int64]
    """[len] class index of each image."""
    class_names: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """RGB image as uint8 [3, height, width]; raises `DataError` naming the file if it is unreadable."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


class Store(Protocol):
    """Where encoded images lie. Picklable; a process that reads opens its own file handles."""

    def __len__(self) -> int: ...

    def read(self, item: int) -> bytes:
        """The file of an image as it is stored; raises `OSError` or `ValueError`."""

    def name(self, item: int) -> str:
        """Path of the image, or its place in an archive."""


class FileStore:
    """Image files.

    Args:
        folder: what the paths are relative to.
        paths: one an image.
    """

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        self.folder = str(folder)
        self.paths = packed(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, item: int) -> bytes:
        """See `Store.read`."""
        return read_file(self.name(item))

    def name(self, item: int) -> str:
        """Path of the image file."""
        return os.path.join(self.folder, unpacked(self.paths, item))


class StoredImages:
    """One split whose encoded images lie in a store.

    Args:
        store: files, shards or tables.
        items: int64 [images], which of the store's items are this split's.
        labels: int64 [images], the class of each.
        class_names: the name of each class.
        left_out: a line about each kind of file that lies among the images and is not one of them.
    """

    def __init__(
        self, store: Store, items: NDArray[np.int64], labels: NDArray[np.int64], class_names: list[str],
        left_out: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.store, self.items, self.labels, self.class_names = store, items, labels, class_names
        self.left_out = list(left_out)

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Tensor:
        """See `Images.load`."""
        return torch.from_numpy(pixels(self.picture(index))).permute(2, 0, 1)

    def picture(self, index: int) -> Image.Image:
        """The image as Pillow decodes it, RGB; raises `DataError` naming it if it is unreadable."""
        return self.decoded(index, self.encoded(index))

    def encoded(self, index: int) -> bytes:
        """The image as it is stored; raises `DataError` naming it if it cannot be read."""
        with self._explained(index):
            return self.store.read(int(self.items[index]))

    def decoded(self, index: int, data: bytes) -> Image.Image:
        """What `encoded` gave, as Pillow decodes it, RGB; raises `DataError` naming it if it is unreadable."""
        with self._explained(index):
            return decode(data)

    @contextmanager
    def _explained(self, index: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(f"cannot read image '{self.name(index)}': {reason}") from error

    def name(self, index: int) -> str:
        """Path of the image, or its place in an archive."""
        return self.store.name(int(self.items[index]))


class FolderImages(StoredImages):
    """Images of one folder with one sub-folder per class, in sorted order.

    Pictures that are left out are counted in a `SmkdWarning`.

    Args:
        folder: what holds the class folders.
        limit_per_class: at most this many images of each class.
        classes: names of the class folders to take, in NFC; none takes all.

    Raises:
        DataError: the folder, its class folders or their images are missing.
    """

    def __init__(self, folder: Path, limit_per_class: int | None = None, classes: Iterable[str] | None = None) -> None:
        if not folder.is_dir():
            raise DataError(
                f"folder '{folder}' does not exist; expected <root>/<train|val|test>/<class>/<image>, "
                "set with data=<root>"
            )
        folders = {nfc(name): name for name in class_folders(folder)}
        names = sorted(folders if classes is None else classes)
        found = {name: find_images(folder / folders.get(name, name)) for name in names}
        loose = loose_pictures(folder)
        _check_classes(folder, found, loose)
        files = [
            os.path.join(folders.get(name, name), path)
            for name in names
            for path in found[name].images[:limit_per_class]
        ]
        counts = [len(found[name].images[:limit_per_class]) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
        foreign, links = (
            [os.path.join(name, file) for name in names for file in getattr(found[name], kind)]
            for kind in ("foreign", "links")
        )
        left_out = Found([], foreign, links).left_out(folder)
        if loose:
            left_out.append(f"'{folder}': left out, as they lie beside the class folders: {counted(loose)}")
        warn(left_out)
        super().__init__(FileStore(folder, files), np.arange(len(files), dtype=np.int64), labels, names, left_out)


def _check_classes(folder: Path, found: dict[str, Found], loose: list[str]) -> None:
    """Raise `DataError` if a class, or the folder, has no image that can be read."""
    foreign = {name: of_class.foreign for name, of_class in found.items() if not of_class.images}
    for name, files in foreign.items():
        if files:
            raise DataError(f"class folder '{folder / name}' holds only {foreign_line(files)}")
    if len(foreign) == len(found):
        inside = f" but {counted(loose)} directly in it" if loose else ""
        raise DataError(
            f"folder '{folder}' holds no images in class folders{inside}; expected <class>/<image> inside it"
        )
    if foreign:
        raise DataError(f"class folder '{folder / next(iter(foreign))}' holds no images")


class UnlabelledImages(StoredImages):
    """Images without classes: all have the label 0."""


def readable_images(paths: Sequence[str], classes: Sequence[str], place: str) -> tuple[NDArray[np.int64], list[str]]:
    """Which of some listed images Pillow can read here, and a line about the others, which is also a warning.

    Args:
        paths: of the images.
        classes: of each.
        place: what lists them, for messages.

    Raises:
        DataError: a class has no image that can be read.
    """
    foreign = [item for item, path in enumerate(paths) if is_foreign(path)]
    if not foreign:
        return np.arange(len(paths), dtype=np.int64), []
    kept = np.setdiff1d(np.arange(len(paths), dtype=np.int64), foreign)
    lost = sorted(set(classes) - {classes[item] for item in kept})
    if lost:
        files = [paths[item] for item in foreign if classes[item] == lost[0]]
        raise DataError(f"{place}: class '{lost[0]}' holds only {foreign_line(files)}")
    lines = [f"{place}: left out: {foreign_line([paths[item] for item in foreign])}"]
    warn(lines)
    return kept, lines


def chosen_images(
    store: Store, classes: Sequence[str], items: NDArray[np.int64], limit: int | None, left_out: Sequence[str] = ()
) -> StoredImages:
    """Images of some items of a store, class after class in the order of the class names.

    Args:
        store: the images.
        classes: class of each item of the store.
        items: int64, the items that belong to the split.
        limit: at most this many images of each class, the first ones.
        left_out: see `StoredImages`.
    """
    chosen = [classes[item] for item in items.tolist()]
    names = sorted(set(chosen))
    number = {name: label for label, name in enumerate(names)}
    labels = np.fromiter((number[name] for name in chosen), dtype=np.int64, count=len(chosen))
    groups = [items[rows[:limit]] for rows in rows_by_label(labels, len(names))]
    counts = [len(group) for group in groups]
    labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
    return StoredImages(store, np.concatenate(groups), labels, names, left_out)


def rows_by_label(labels: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Ascending rows of each of the labels 0, 1, ... `count` - 1, in one pass however many these are."""
    ends = np.cumsum(np.bincount(labels, minlength=count))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def packed(texts: Iterable[str]) -> NDArray[np.bytes_]:
    """Texts in one block of memory, which forked workers share; they would copy a list of objects bit by bit."""
    return np.array([os.fsencode(text) for text in texts], dtype=np.bytes_)


def unpacked(texts: NDArray[np.bytes_], item: int) -> str:
    """One of the texts that `packed` took."""
    return os.fsdecode(bytes(texts[item]))
