"""The classes and photographs that a user has dropped, each encoded once, and the classifier that they make."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smkd.classify.answers import Lesson, Photo
from smkd.classify.choose_features import Reader
from smkd.classify.encoder import Encoder
from smkd.classify.estimator import FewShotClassifier
from smkd.classify.pictures import support_images
from smkd.data.decoding import TooLargeError, read_file, shape
from smkd.data.formats import class_folders, is_hidden_path, is_picture
from smkd.errors import DataError
from smkd.prepare.archives import MIB, Bounds, reading, zip_members
from smkd.progress import Track

MOST_PIXELS = 64_000_000
"""A photograph of so many takes 0.7 GB for a moment."""
MOST_PHOTOS = 1000
ZIP_BOUNDS = Bounds(member=128 * MIB, total=1024 * MIB)


@dataclass(frozen=True)
class Group:
    """A class: its number, which never changes, its name and its photographs."""

    number: int
    name: str
    photos: tuple[Photo, ...] = ()


@dataclass(frozen=True)
class Support:
    """Classes in the order in which they were added; every change returns a new `Support`."""

    groups: tuple[Group, ...] = ()

    def with_class(self, name: str | None = None, photos: Sequence[Photo] = ()) -> Support:
        """One class more; photographs of a class that is there already are added to it.

        Args:
            name: 'class 3' and the like if none is given.
            photos: of the class.
        """
        for group in self.groups:
            if group.name == name:
                return self.with_photos(group.number, list(dict.fromkeys([*group.photos, *photos])))
        number = max((group.number for group in self.groups), default=0) + 1
        return Support((*self.groups, Group(number, name or f"class {number}", tuple(photos))))

    def without_class(self, number: int) -> Support:
        """Without a class and its photographs."""
        return Support(tuple(group for group in self.groups if group.number != number))

    def without_empty(self) -> Support:
        """Without classes that have no photographs."""
        return Support(tuple(group for group in self.groups if group.photos))

    def renamed(self, number: int, name: str) -> Support:
        """With another name for a class; raises `DataError` if it is blank or another class's."""
        name = " ".join(name.split())
        if not name:
            raise DataError("a class needs a name")
        if any(group.name == name and group.number != number for group in self.groups):
            raise DataError(f"there is a class '{name}' already")
        return self._changed(number, lambda group: replace(group, name=name))

    def with_photos(self, number: int, photos: Sequence[Photo]) -> Support:
        """With these photographs of a class in place of those that it had; raises `DataError` if they are too many."""
        changed = self._changed(number, lambda group: replace(group, photos=tuple(photos)))
        if sum(len(group.photos) for group in changed.groups) > MOST_PHOTOS:
            raise DataError(f"these would be more than {MOST_PHOTOS} photographs; `smkd fit` takes any number")
        return changed

    def photos(self, number: int) -> tuple[Photo, ...]:
        """Photographs of a class; none if there is no such class."""
        return next((group.photos for group in self.groups if group.number == number), ())

    def _changed(self, number: int, change: Callable[[Group], Group]) -> Support:
        return Support(tuple(change(group) if group.number == number else group for group in self.groups))


START = Support().with_class().with_class()
"""Two classes without photographs."""


def taken(
    encoder: Encoder, paths: Sequence[str], known: Iterable[Photo] = (), track: Track | None = None
) -> tuple[list[Photo], list[str]]:
    """Photographs of the files that can be read, in order, and a line about each of the others.

    Args:
        encoder: makes their features.
        paths: image files.
        known: photographs that have been read before and are not read again.
        track: shows progress.
    """
    found = {photo.path: photo for photo in known}
    new = [path for path in dict.fromkeys(map(str, paths)) if path not in found]
    too_large = {path: line for path in new if (line := _too_large(path))}
    read = [path for path in new if path not in too_large]
    encoded = encoder.readable(read, track)
    for row, feature in zip(encoded.rows, encoded.values, strict=True):
        found[read[row]] = Photo(read[row], feature)
    # what a file is called matters to its owner, where it has been put does not
    refused = [line.replace(str(path), Path(path).name) for line, path in zip(
        encoded.unreadable, [path for path in read if path not in found], strict=True)]  # fmt: skip
    photos = [found[path] for path in dict.fromkeys(map(str, paths)) if path in found]
    return photos, [*too_large.values(), *refused]


class Classes(NamedTuple):
    """What a folder of class folders holds.

    Attributes:
        files: image files of each class.
        left_out: a line about each kind of picture that is left out.
    """

    files: dict[str, list[str]]
    left_out: list[str]


def folder_classes(folder: Path) -> Classes:
    """Image files of each class of a folder of class folders.

    Raises:
        DataError: see `support_images`.
    """
    images = support_images(folder)
    rows = {name: np.flatnonzero(images.labels == label) for label, name in enumerate(images.class_names)}
    files = {name: [images.name(int(row)) for row in of_class] for name, of_class in rows.items()}
    return Classes(files, images.left_out)


def zip_classes(archive: Path, place: Path) -> Classes:
    """Image files of each class of a zip of class folders, which may lie in a folder of their own.

    Args:
        archive: the zip.
        place: folder for the images; no other member is unpacked.

    Raises:
        DataError: no zip, damaged, hostile, or not as `folder_classes` wants it.
    """
    label = archive.name
    folder = Path(tempfile.mkdtemp(dir=place))
    with reading(label), zipfile.ZipFile(archive) as opened:
        # some Windows programs write names with backslashes
        names = {info: info.filename.replace("\\", "/") for info in zip_members(opened, label, ZIP_BOUNDS)}
        members = {info: name for info, name in names.items() if is_picture(name) and not is_hidden_path(name)}
        if not members:
            raise DataError(f"'{label}' holds no images; expected a folder of images per class")
        if len(members) > MOST_PHOTOS:
            raise DataError(f"'{label}' holds {len(members)} images; at most {MOST_PHOTOS} are taken")
        for info, name in members.items():
            file = folder / name
            if file.exists():
                raise DataError(f"'{label}' holds '{name}' twice")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(opened.read(info))
    inside = folder
    while len(found := class_folders(inside)) == 1 and class_folders(inside / found[0]):
        inside /= found[0]
    try:
        classes = folder_classes(inside)
    except DataError as error:
        raise DataError(str(error).replace(str(folder), label)) from error
    return Classes(classes.files, [line.replace(str(folder), label) for line in classes.left_out])


def learn(reader: Reader, support: Support) -> Lesson:
    """A classifier of the photographs; features and head are chosen by cross-validation where there are enough.

    Args:
        reader: its encoder has seen the photographs.
        support: the classes.

    Raises:
        DataError: fewer than two classes, or one without photographs.
    """
    if len(support.groups) < 2:
        raise DataError("a classifier needs at least two classes: add one")
    for group in support.groups:
        if not group.photos:
            raise DataError(f"'{group.name}' has no photographs: add some, or remove the class")
    photos = tuple(photo for group in support.groups for photo in group.photos)
    names = [group.name for group in support.groups for _ in group.photos]
    labels = np.repeat(np.arange(len(support.groups)), [len(group.photos) for group in support.groups])
    encoder, features = reader.decided(np.stack([photo.feature for photo in photos]), labels)
    read = tuple(replace(photo, feature=feature) for photo, feature in zip(photos, features, strict=True))
    wide = None if encoder is reader.encoder else reader.encoder.config.features
    return Lesson(FewShotClassifier(encoder, "auto").fit(features, names), read, wide)


def _too_large(path: str) -> str | None:
    """A line about an image with too many pixels, told from its header alone."""
    try:
        shape(read_file(path), MOST_PIXELS)
    except TooLargeError as error:
        return f"cannot read image '{Path(path).name}': {error}"
    except (OSError, ValueError):  # reading it will say what is wrong with it
        return None
    return None
