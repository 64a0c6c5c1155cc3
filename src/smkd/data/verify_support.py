"""Checking a folder of class folders before `smkd fit` learns from it: what would stop it, and what would mislead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smkd.data.images import StoredImages
from smkd.data.inspect import scan
from smkd.files import listed
from smkd.progress import Track

CHOICE = 5
"""Images that every class needs before `--head auto` compares heads."""


@dataclass(frozen=True)
class SupportReport:
    """What `verify_support` found.

    Attributes:
        source: the folder.
        classes: images of each class that can be read.
        unreadable: name of each image that cannot be read to its end, and why.
        shared: names of images with the same pixels in different classes, one group a picture.
        repeated: the same inside one class.
        problems: what stops `fit`, or teaches it something wrong, a line each.
        warnings: what to know, a line each.
    """

    source: str
    classes: dict[str, int]
    unreadable: list[str]
    shared: list[list[str]]
    repeated: list[list[str]]
    problems: list[str]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def verify_support(images: StoredImages, source: str, jobs: int = 1, track: Track | None = None) -> SupportReport:
    """Look at every image of a support folder.

    Args:
        images: of all classes.
        source: what the report calls them.
        jobs: processes.
        track: shows progress.
    """
    seen = scan(images, jobs, track, "images")
    readable = np.array([bool(content) for content in seen.hashes], dtype=bool)
    counts = np.bincount(images.labels[readable], minlength=len(images.class_names)).tolist()
    classes = dict(zip(images.class_names, counts, strict=True))
    alike: dict[bytes, list[int]] = {}
    for index, content in enumerate(seen.hashes):
        if content:
            alike.setdefault(content, []).append(index)
    shared: list[list[str]] = []
    repeated: list[list[str]] = []
    for places in (each for each in alike.values() if len(each) > 1):
        across = len({int(images.labels[index]) for index in places}) > 1
        (shared if across else repeated).append([images.name(index) for index in places])
    unreadable = [message.removeprefix("cannot read image ") for _, message in seen.unreadable]
    return SupportReport(
        source, classes, unreadable, shared, repeated, _problems(classes, unreadable, shared),
        [*images.left_out, *_warnings(classes, repeated)],
    )  # fmt: skip


def _problems(classes: Mapping[str, int], unreadable: list[str], shared: list[list[str]]) -> list[str]:
    lines = []
    if len(classes) < 2:
        lines.append(f"there is one class, {listed(classes)}; a classifier needs at least two")
    if unreadable:
        lines.append(f"{len(unreadable)} images cannot be read to their end, and fit stops at the first: remove them")
    if empty := [name for name, count in classes.items() if not count]:
        lines.append(f"no image can be read of {len(empty)} classes: {listed(empty)}")
    if shared:
        lines.append(f"{len(shared)} pictures are in more than one class: keep each in the one that it shows")
    return lines


def _warnings(classes: Mapping[str, int], repeated: list[list[str]]) -> list[str]:
    lines = []
    if single := [name for name, count in classes.items() if count == 1]:
        lines.append(f"one image of {len(single)} classes, whose accuracy can therefore not be told: {listed(single)}")
    if few := [f"{name} ({count})" for name, count in classes.items() if 1 < count < CHOICE]:
        lines.append(
            f"fewer than {CHOICE} images of {len(few)} classes, so that no head is chosen by cross-validation: "
            f"{listed(few)}"
        )
    if repeated:
        lines.append(f"{len(repeated)} pictures occur more than once in a class: its accuracy looks better than it is")
    return lines
