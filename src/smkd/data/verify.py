"""Check a data set before training: counts, unreadable images, leakage between splits, sizes, statistics.

A problem makes results wrong. A warning may be harmless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smkd.data.color import Channels
from smkd.data.datasets import DatasetSpec
from smkd.data.images import SPLITS, StoredImages
from smkd.data.inspect import ImageFacts, channel_statistics, scan
from smkd.data.sources import DatasetSource, opened_once
from smkd.files import listed
from smkd.progress import Track

SIZE_EDGES = (32, 64, 84, 128, 224, 256, 320, 480)
"""Bounds of the histogram of shorter sides in pixels; 84 is the side of the few-shot copies that circulate."""
CLOSE = 0.1
"""Statistics this near the normalisation constants (0-1 scale) need no words; ImageNet's fit most photographs."""

Expected = Mapping[str, Mapping[str, int]]
"""Images of each class of each split, as published."""
Files = Mapping[str, str]
"""SHA-256 in hex of each '<split>/<class>/<image>', as prepared."""


@dataclass(frozen=True)
class SplitFacts:
    """What one split holds.

    Attributes:
        classes, images: how many.
        per_class: fewest and most images of a class.
        unreadable: name of each image that cannot be read to its end, and why.
        shorter_side: smallest, median and largest shorter side in pixels; none if nothing can be read.
        sizes: number of images by range of the shorter side, such as '128-223'.
        below_crop: how many have a shorter side below the crop.
    """

    classes: int
    images: int
    per_class: tuple[int, int]
    unreadable: list[str]
    shorter_side: tuple[int, int, int] | None
    sizes: dict[str, int]
    below_crop: int


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        source: the data set in one line.
        dataset: row of the data-set table.
        crop: side in pixels that shorter sides are compared with.
        splits: facts by split.
        shared_classes: splits of each class that is in more than one.
        leaked: names of images with the same pixels in different splits, one group a picture.
        repeated: the same inside one split.
        known: such groups, of both kinds, that the published benchmark is known to have.
        counts: where the counts are not the published ones.
        changed, missing, extra: '<split>/<class>/<image>' of files that are not as they were prepared.
        mean, std: of the training images on the 0-1 scale; none without a readable one.
        used_mean, used_std: the normalisation constants.
        problems: what is wrong, a line each.
        warnings: what to know, a line each.
    """

    source: str
    dataset: str
    crop: int
    splits: dict[str, SplitFacts]
    shared_classes: dict[str, list[str]]
    leaked: list[list[str]]
    repeated: list[list[str]]
    known: list[list[str]]
    counts: list[str]
    changed: list[str]
    missing: list[str]
    extra: list[str]
    mean: Channels | None
    std: Channels | None
    used_mean: Channels
    used_std: Channels
    problems: list[str]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@opened_once()
def verify(
    source: DatasetSource, dataset: str, spec: DatasetSpec, *, crop: int = 224, expected: Expected | None = None,
    published_repeats: Collection[Set[str]] = (), prepared: Files | None = None, jobs: int = 1,
    track: Track | None = None,
) -> Report:  # fmt: skip
    """Look at every image of every split.

    Args:
        source: the opened data set.
        dataset: its name in the data-set table, whose row is `spec`.
        crop: side in pixels of the views that are cut from the images.
        expected: the published counts, where they are known.
        published_repeats: '<class>/<image>' of the images of each picture that the benchmark has more than once.
        prepared: the files that `dataset.json` names, where there is one.
        jobs: processes.
        track: shows progress.

    Raises:
        DataError: a class folder is empty.
    """
    images = {split: source.open(split) for split in source.classes}
    seen = {split: scan(of_split, jobs, track, split) for split, of_split in images.items()}
    facts = {split: _facts(images[split], seen[split], crop) for split in images}
    leaked, repeated, known = _repeats(images, seen, published_repeats)
    counts = [] if expected is None else _counts(images, expected)
    shared = source.shared_classes()
    found = {} if prepared is None else _files(source, images, seen)
    changed = [name for name in found if prepared and name in prepared and found[name] != prepared[name]]
    missing, extra = sorted((prepared or {}).keys() - found.keys()), sorted(found.keys() - (prepared or {}).keys())
    mean, std = _statistics(seen.get("train"))
    return Report(
        source.description, dataset, crop, facts, shared, leaked, repeated, known, counts, changed, missing, extra,
        mean, std, spec.mean, spec.std,
        problems=_problems(facts, shared, leaked, counts) + _file_problems(changed, missing, extra),
        warnings=_left_out(source, images)
        + _warnings(facts, repeated, known, crop, (mean or ()) + (std or ()), spec),
    )  # fmt: skip


def _left_out(source: DatasetSource, images: Mapping[str, StoredImages]) -> list[str]:
    """Lines about what lies among the images and is not one of them, each once."""
    return list(dict.fromkeys([*source.left_out, *(line for part in images.values() for line in part.left_out)]))


def _files(source: DatasetSource, images: Mapping[str, StoredImages], seen: Mapping[str, ImageFacts]) -> Files:
    """SHA-256 of each image file by its place in the folder."""
    return {
        Path(of_split.name(index)).relative_to(source.root).as_posix(): digest
        for split, of_split in images.items()
        for index, digest in enumerate(seen[split].files)
    }


def _facts(images: StoredImages, seen: ImageFacts, crop: int) -> SplitFacts:
    per_class = np.bincount(images.labels)
    shorter = np.array([min(size) for size in seen.sizes if size != (0, 0)], dtype=np.int64)
    ranges: dict[str, int] = {}
    for low, high in zip((1, *SIZE_EDGES), (*SIZE_EDGES, None), strict=True):
        count = int(((shorter >= low) & (shorter < (high or np.inf))).sum())
        if count:
            ranges[f"{low} and more" if high is None else f"{low}-{high - 1}"] = count
    return SplitFacts(
        classes=len(images.class_names),
        images=len(images),
        per_class=(int(per_class.min()), int(per_class.max())),
        unreadable=[message.removeprefix("cannot read image ") for _, message in seen.unreadable],
        shorter_side=(int(shorter.min()), int(np.median(shorter)), int(shorter.max())) if len(shorter) else None,
        sizes=ranges,
        below_crop=int((shorter < crop).sum()),
    )


def _repeats(
    images: Mapping[str, StoredImages], seen: Mapping[str, ImageFacts], published: Collection[Set[str]]
) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Names of images with equal pixels: across splits, inside one, and those that are known of the benchmark."""
    times = Counter(content for part in seen.values() for content in part.hashes if content)
    groups: dict[bytes, list[tuple[str, int]]] = {}
    for split, part in seen.items():
        for index, content in enumerate(part.hashes):
            if times[content] > 1:
                groups.setdefault(content, []).append((split, index))
    leaked: list[list[str]] = []
    repeated: list[list[str]] = []
    known: list[list[str]] = []
    for places in groups.values():
        names = [images[split].name(index) for split, index in places]
        if any({"/".join(Path(name).parts[-2:]) for name in names} <= pair for pair in published):
            known.append(names)
        else:
            (leaked if len({split for split, _ in places}) > 1 else repeated).append(names)
    return leaked, repeated, known


def _counts(images: Mapping[str, StoredImages], expected: Expected) -> list[str]:
    """A line for each split that lacks classes, has others, or whose classes have other counts."""
    lines = []
    for split, wanted in expected.items():
        if split not in images:
            lines.append(f"{split}: missing; published are {len(wanted)} classes, {sum(wanted.values())} images")
            continue
        of_split = images[split]
        found = dict(zip(of_split.class_names, np.bincount(of_split.labels).tolist(), strict=True))
        absent, further = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        other = [
            f"{n} {found[n]} (not {wanted[n]})" for n in sorted(wanted.keys() & found.keys()) if found[n] != wanted[n]
        ]
        if absent:
            lines.append(f"{split}: {len(absent)} of the {len(wanted)} published classes are missing: {listed(absent)}")
        if further:
            lines.append(f"{split}: {len(further)} classes are not in the published list: {listed(further)}")
        if other:
            lines.append(f"{split}: {len(other)} classes have another number of images than published: {listed(other)}")
    return lines


def _statistics(train: ImageFacts | None) -> tuple[Channels, Channels] | tuple[None, None]:
    return channel_statistics(train.histogram) if train is not None and train.histogram.any() else (None, None)


def _problems(
    facts: Mapping[str, SplitFacts], shared: Mapping[str, list[str]], leaked: list[list[str]], counts: list[str]
) -> list[str]:
    lines = [f"counts, {line}" for line in counts]
    for split, fact in facts.items():
        if fact.unreadable:
            lines.append(f"{split}: {len(fact.unreadable)} images cannot be read to their end")
    if shared:
        places = [f"{name} ({', '.join(splits)})" for name, splits in shared.items()]
        lines.append(f"{len(shared)} classes are in more than one split: {listed(places)}")
    if leaked:
        lines.append(f"{len(leaked)} pictures are in more than one split (leakage: training sees what is tested)")
    return lines


def _file_problems(changed: list[str], missing: list[str], extra: list[str]) -> list[str]:
    kinds = {"differ from dataset.json": changed, "of dataset.json are missing": missing, "are not in it": extra}
    return [f"{len(names)} files {kind}: {listed(names)}" for kind, names in kinds.items() if names]


def _warnings(
    facts: Mapping[str, SplitFacts], repeated: list[list[str]], known: list[list[str]], crop: int,
    found: tuple[float, ...], spec: DatasetSpec,
) -> list[str]:  # fmt: skip
    lines = [f"there is no {split} split" for split in SPLITS if split not in facts]
    for split, fact in facts.items():
        if fact.below_crop and fact.shorter_side is not None:
            lines.append(
                f"{split}: {fact.below_crop} of {fact.images} images have a shorter side below the crop of {crop} "
                f"pixels (smallest {fact.shorter_side[0]}): they are enlarged, which costs accuracy"
            )
    if repeated:
        lines.append(f"{len(repeated)} pictures occur more than once inside a split: support and query may share them")
    if known:
        lines.append(f"{len(known)} pictures occur more than once, which is known of the published benchmark")
    if found and max(abs(a - b) for a, b in zip(found, spec.mean + spec.std, strict=True)) > CLOSE:
        lines.append("mean or deviation is far from the constants used; `smkd data stats` prints better ones")
    return lines
