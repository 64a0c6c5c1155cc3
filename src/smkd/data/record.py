"""What a run keeps of its training data, to notice at the next start that they have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from smkd.data.class_split import listed
from smkd.data.images import FileStore, Images, StoredImages, unpacked
from smkd.data.shards import ShardStore

SHOWN = 3


def record_of(images: Images) -> dict[str, Any]:
    """Classes with their numbers of images, and a digest of names and sizes; plain values, for a checkpoint.

    Names are relative, so data may be moved. Pixels are not read: another image of the same name and size in bytes is
    not noticed, and of data sets of the Hub and embedded ones names alone are compared.

    Args:
        images: the training split.
    """
    counts = np.bincount(images.labels, minlength=len(images.class_names)).tolist()
    digest = hashlib.sha256(images.labels.tobytes())
    for name, size in _named(images):
        digest.update(name + b"\0%d\0" % size)
    return {"classes": dict(zip(images.class_names, counts, strict=True)), "digest": digest.hexdigest()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two records, in a few words each; nothing if they are equal."""
    old, new = before["classes"], now["classes"]
    found = []
    for missing, what in ((old.keys() - new.keys(), "gone"), (new.keys() - old.keys(), "new")):
        if missing:
            found.append(f"{len(missing)} classes are {what} ({listed(sorted(missing))})")
    counts = [f"'{name}' {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    if counts:
        more = ", ..." if len(counts) > SHOWN else ""
        found.append(f"{len(counts)} classes have another number of images ({', '.join(counts[:SHOWN])}{more})")
    if not found and before["digest"] != now["digest"]:
        found.append("as many images as before, but with other names or sizes")
    return found


def _named(images: Images) -> Iterable[tuple[bytes, int]]:
    """Name and size in bytes of each image; 0 where only reading it would tell."""
    if not isinstance(images, StoredImages):
        return ((os.fsencode(images.name(index)), 0) for index in range(len(images)))
    store, items = images.store, images.items.tolist()
    if isinstance(store, FileStore):
        return ((os.fsencode(unpacked(store.paths, item)), _size(store.name(item))) for item in items)
    if isinstance(store, ShardStore):
        return ((os.fsencode(unpacked(store.names, item)), int(store.size[item])) for item in items)
    return ((os.fsencode(store.name(item)), 0) for item in items)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # an unreadable image, which is reported when it is loaded
        return -1
