"""Images as users give them: paths, Pillow images and arrays, in one list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smkd.data.decoding import as_rgb, decode, pixels, read_file
from smkd.data.formats import class_folders, find_images, foreign_line, warn
from smkd.data.images import SPLITS, FolderImages
from smkd.errors import DataError
from smkd.fewshot.features import plain
from smkd.files import expanded

Picture = str | Path | Image.Image | NDArray[np.uint8]
"""Path of an image file, Pillow image, or uint8 [height, width, 3]."""


class InputError(DataError, ValueError):
    """What was given does not fit; a ValueError too, as scikit-learn's callers expect."""


def as_pictures(given: Any) -> list[Picture] | None:
    """The images in X as a list; None if X holds features.

    Args:
        given: a list, an array, a Series or a frame of one column.

    Raises:
        InputError: X is one image or path, or a generator, and not a list.
    """
    if isinstance(given, str | Path | Image.Image):
        name = f"'{given}'" if isinstance(given, str | Path) else "a Pillow image"
        raise InputError(f"X is {name}; give a list of images, also for one")
    try:
        items = plain(given, "X")
    except DataError as error:
        raise InputError(str(error)) from error
    if isinstance(items, np.ndarray):
        if items.dtype == np.uint8 and items.ndim == 4:
            return list(items)
        if items.ndim == 2 and items.shape[1] == 1:  # a frame of one column
            items = items[:, 0]
        return list(items) if items.ndim == 1 and len(items) and _is_picture(items[0]) else None
    return list(items) if isinstance(items, list | tuple) and items and _is_picture(items[0]) else None


def _is_picture(item: Any) -> bool:
    array = isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3
    return array or isinstance(item, str | Path | Image.Image)


class Pictures:
    """A list of images as `smkd.data.images.Images`; the label of each is its position.

    Args:
        items: see `Picture`; any mixture.
    """

    def __init__(self, items: Sequence[Picture]) -> None:
        self.items = items
        self.labels = np.arange(len(items), dtype=np.int64)
        self.class_names: list[str] = []

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Tensor:
        """RGB image as uint8 [3, height, width]; raises `DataError` naming it if it is unreadable."""
        item = self.items[index]
        if isinstance(item, np.ndarray):
            if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
                found = f"{item.dtype} {list(item.shape)}"
                raise InputError(f"{self.name(index)} is an array {found}; expected uint8 [height, width, 3]")
            return torch.from_numpy(np.array(item)).permute(2, 0, 1)
        try:
            picture = as_rgb(item) if isinstance(item, Image.Image) else decode(read_file(expanded(item)))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(f"cannot read image {self.name(index)}: {reason}") from error
        except TypeError as error:
            kind = type(item).__name__
            raise InputError(f"{self.name(index)} is a {kind}; expected a path, a Pillow image or an array") from error
        return torch.from_numpy(pixels(picture)).permute(2, 0, 1)

    def name(self, index: int) -> str:
        """Path of the image, or its place in the list."""
        item = self.items[index]
        return f"'{item}'" if isinstance(item, str | Path) else f"number {index} (from 0)"


def listed_images(places: Iterable[Path]) -> list[Path]:
    """Image files: those that are named, and those anywhere below the folders that are named, sorted.

    Pictures in folders that Pillow cannot read here are counted in a `SmkdWarning`.

    Raises:
        DataError: a place does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for place in map(expanded, places):
        if not place.exists():
            raise DataError(f"'{place}' does not exist; expected an image or a folder of images")
        found += _inside(place) if place.is_dir() else [place]
    return found


def _inside(folder: Path) -> list[Path]:
    found = find_images(folder)
    if not found.images:
        inside = f"only {foreign_line(found.foreign)}" if found.foreign else "no images"
        raise DataError(f"folder '{folder}' holds {inside}")
    warn(found.left_out(folder))
    return [folder / name for name in found.images]


def support_images(folder: Path) -> FolderImages:
    """Images of a folder of class folders.

    Raises:
        DataError: no folder, no class folders, a class without images, or a tree of splits.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"'{folder}' {there}; expected a folder with a folder of images per class")
    names = class_folders(folder)
    trees = [split for split in SPLITS if split in names and class_folders(folder / split)]
    if trees and set(names) <= set(SPLITS):
        # taking all of it would learn from the images that are meant for testing
        raise DataError(f"'{folder}' is a tree of {', '.join(trees)}; give one of them, such as {folder / trees[0]}")
    return FolderImages(folder)
