"""One split as a sequence of uint8 images: what the rest of the package sees of a data set, whatever its form."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from smkd.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
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
        """The file of an image as it is stored; raises `OSError`."""

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
        with open(self.name(item), "rb") as file:
            return file.read()

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
    """

    def __init__(
        self, store: Store, items: NDArray[np.int64], labels: NDArray[np.int64], class_names: list[str]
    ) -> None:
        self.store, self.items, self.labels, self.class_names = store, items, labels, class_names

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Tensor:
        """See `Images.load`."""
        return torch.from_numpy(np.array(self.picture(index))).permute(2, 0, 1)

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

    Args:
        folder: what holds the class folders.
        limit_per_class: at most this many images of each class.
        classes: names of the class folders to take; none takes all.

    Raises:
        DataError: the folder, its class folders or their images are missing.
    """

    def __init__(self, folder: Path, limit_per_class: int | None = None, classes: Iterable[str] | None = None) -> None:
        if not folder.is_dir():
            raise DataError(
                f"folder '{folder}' does not exist; expected <root>/<train|val|test>/<class>/<image>, "
                "set with data=<root>"
            )
        names = sorted(classes) if classes is not None else class_folders(folder)
        files = {name: image_files(folder / name)[:limit_per_class] for name in names}
        if not any(files.values()):
            raise DataError(f"folder '{folder}' holds no images; expected <class>/<image> inside it")
        empty = [name for name, found in files.items() if not found]
        if empty:
            raise DataError(f"class folder '{folder / empty[0]}' holds no images")
        store = FileStore(folder, [os.path.join(name, path) for name, found in files.items() for path in found])
        counts = [len(found) for found in files.values()]
        labels = np.repeat(np.arange(len(files), dtype=np.int64), counts)
        super().__init__(store, np.arange(len(store), dtype=np.int64), labels, names)


def chosen_images(store: Store, classes: Sequence[str], items: NDArray[np.int64], limit: int | None) -> StoredImages:
    """Images of some items of a store, class after class in the order of the class names.

    Args:
        store: the images.
        classes: class of each item of the store.
        items: int64, the items that belong to the split.
        limit: at most this many images of each class, the first ones.
    """
    names = sorted({classes[item] for item in items})
    number = {name: label for label, name in enumerate(names)}
    labels = np.array([number[classes[item]] for item in items], dtype=np.int64)
    groups = [items[labels == label][:limit] for label in range(len(names))]
    counts = [len(group) for group in groups]
    return StoredImages(store, np.concatenate(groups), np.repeat(np.arange(len(names), dtype=np.int64), counts), names)


def decode(data: bytes) -> Image.Image:
    """Decode an image file to its last row, as RGB and upright.

    Raises:
        OSError, ValueError: not an image, or cut short; says which.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return upright(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a known format") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # on broken files Pillow's readers raise SyntaxError, TypeError and more
        raise ValueError(str(error)) from error


def upright(image: Image.Image) -> Image.Image:
    """As the camera was held, where the file says so."""
    if _orientation(image) == 1:
        return image
    return ImageOps.exif_transpose(image)


def shown_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width of `upright(image)`, from the header alone."""
    lies = _orientation(image) >= 5  # turned by a quarter
    return (image.width, image.height) if lies else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 where nothing is said, or nothing that can be read."""
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata of a good picture
        return 1
    return said if said in range(1, 9) else 1


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[str]:
    """Image files anywhere below a folder, relative to it, sorted; told by their suffix."""
    found = []
    for place, _, files in os.walk(folder):
        inside = os.path.relpath(place, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if is_image(name)]
    return sorted(found, key=lambda path: path.split(os.sep))


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def packed(texts: Iterable[str]) -> NDArray[np.bytes_]:
    """Texts in one block of memory, which forked workers share; a list of objects they would copy by and by."""
    return np.array([os.fsencode(text) for text in texts], dtype=np.bytes_)


def unpacked(texts: NDArray[np.bytes_], item: int) -> str:
    """One of the texts that `packed` took."""
    return os.fsdecode(bytes(texts[item]))
