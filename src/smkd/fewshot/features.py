"""Features of images from a backbone: tokens of chosen blocks, each part L2-normalised, concatenated.

`as_features` and `check_features` make checked `Features` of features from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smkd.config.protocol import FeaturesConfig
from smkd.data.augment import resize_center_crop
from smkd.data.color import normalize
from smkd.data.datasets import DatasetSpec
from smkd.data.images import Images
from smkd.data.loader import batches
from smkd.errors import DataError
from smkd.models.vit import Tokens, VisionTransformer, patch_attention
from smkd.processes import deaths_named, end_with_parent

FEATURE_NORM_EPS = 1e-12
CHECK_NUMBERS = 2**20
"""Numbers looked at together when searching for NaN: 4 MB of float32."""
SHOWN_ROWS = 5
PIXEL_SIDE = 16
BATCH, CPU_BATCH = 128, 32
"""Images at once, at most."""
CPU_NUMBERS = 2**22
"""Numbers between the layers of an MLP at once, at most, on a CPU: larger arrays leave its caches, and the C library
hands their memory back page by page."""


@dataclass(frozen=True)
class Features:
    """Features of one split.

    Attributes:
        values: float32 [images, dim].
        labels: int64 [images].
        class_names: name of each label.
        skipped: unreadable images that were left out.
    """

    values: Tensor
    labels: NDArray[np.int64]
    class_names: list[str]
    skipped: int = 0


def pool(blocks: list[Tokens], config: FeaturesConfig) -> Tensor:
    """Feature vectors from the tokens of the configured blocks.

    For each part in turn, for each block (as configured): [CLS], the patches' mean, or their mean weighted by the
    same block's [CLS] attention; L2-normalised by itself. The concatenation is not normalised again.

    Args:
        blocks: tokens with attention, as `VisionTransformer.last_blocks` gives them.
        config: which parts.

    Returns:
        [images, parts * blocks * dim].
    """
    vectors = [
        F.normalize(_part(part, tokens), dim=-1, eps=FEATURE_NORM_EPS) for part in config.parts for tokens in blocks
    ]
    return torch.cat(vectors, dim=-1)


def _part(part: str, tokens: Tokens) -> Tensor:
    if part == "cls":
        return tokens.cls
    if part == "mean":
        return tokens.patches.mean(dim=1)
    assert tokens.attention is not None
    weights = patch_attention(tokens.attention, tokens.patches.shape[1])
    return torch.einsum("bp,bpd->bd", weights.to(tokens.patches.dtype), tokens.patches)


class Stream:
    """Features of a split, batch by batch.

    Attributes:
        images: the split.
        rows: numbers of the images that are read.
        dim: numbers of a feature.
    """

    def __init__(
        self, images: Images, encode: Callable[[Tensor], Tensor], dim: int, *, resize: int, crop: int, on_error: str,
        batch_size: int = BATCH, num_workers: int = 0, rows: range | None = None,
    ) -> None:  # fmt: skip
        self.images, self.encode, self.dim = images, encode, dim
        self.rows = range(len(images)) if rows is None else rows
        self.loader: DataLoader[tuple[Tensor | None, int]] = DataLoader(
            _CenterCrops(images, resize, crop, on_error), batch_size=batch_size, num_workers=num_workers,
            sampler=self.rows, collate_fn=_collate, worker_init_fn=end_with_parent,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Float32 [n, dim] and labels [n] of the images that can be read, in order.

        Raises:
            DataError: an unreadable image, with `on_error='raise'`; an image whose feature is NaN or infinite.
        """
        with deaths_named():
            for pixels, indices in batches(self.loader):
                if len(indices):
                    with torch.inference_mode():
                        values = self.encode(pixels)
                    for row in unusable(values)[1][:1]:
                        raise DataError(
                            f"image {self.images.name(int(indices[row]))}: the network gives NaN or infinite numbers; "
                            "its weights may be damaged, or the precision too low for them"
                        )
                    yield values, self.images.labels[indices.numpy()]

    def collect(self) -> Features:
        """All of them; raises `DataError` if there is none."""
        return joined([self.collect_rows()])

    def collect_rows(self) -> Features:
        """All of them, which may be none."""
        parts = [(torch.empty(0, self.dim), np.empty(0, np.int64)), *self]
        labels = np.concatenate([part[1] for part in parts])
        values = torch.cat([part[0] for part in parts])
        return Features(values, labels, self.images.class_names, len(self.rows) - len(labels))


def joined(parts: Sequence[Features]) -> Features:
    """Features of parts of a split, one after another; raises `DataError` if not one image could be read."""
    whole = replace(
        parts[0], values=torch.cat([part.values for part in parts]),
        labels=np.concatenate([part.labels for part in parts]), skipped=sum(part.skipped for part in parts),
    )  # fmt: skip
    if not len(whole.labels):
        raise DataError("not one image of the split can be read")
    return whole


def backbone_stream(
    backbone: VisionTransformer, images: Images, spec: DatasetSpec, config: FeaturesConfig, *,
    resize: int, crop: int, device: torch.device, autocast: torch.dtype | None = None, num_workers: int = 0,
    on_error: str = "raise", rows: range | None = None,
) -> Stream:  # fmt: skip
    """Features of the images of a split, in order.

    Args:
        backbone: in evaluation mode, on `device`.
        images: the split.
        spec: its normalisation.
        config: pooling.
        resize: shorter side in pixels before the centre crop of side `crop`.
        autocast: type for autocast, or None for float32.
        on_error: 'raise', or 'skip' to leave unreadable images out.
        rows: numbers of the images that are read; None for all.
    """

    def encode(pixels: Tensor) -> Tensor:
        x = normalize(pixels.to(device).float() / 255, spec.mean, spec.std)
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            blocks = backbone.last_blocks(x, config.blocks)
        blocks = [Tokens(*(None if part is None else part.float() for part in tokens)) for tokens in blocks]  # type: ignore[arg-type]
        return pool(blocks, config).cpu()

    dim = backbone.embed_dim * len(config.blocks) * len(config.parts)
    return Stream(
        images, encode, dim, resize=resize, crop=crop, on_error=on_error, num_workers=num_workers,
        batch_size=_cpu_batch(backbone, crop) if device.type == "cpu" else BATCH, rows=rows,
    )  # fmt: skip


def _cpu_batch(backbone: VisionTransformer, crop: int) -> int:
    hidden = backbone.config.mlp_dim or 4 * backbone.embed_dim
    return min(CPU_BATCH, max(1, CPU_NUMBERS // (hidden * (crop // backbone.patch_size) ** 2)))


def pixel_stream(images: Images, *, side: int = PIXEL_SIDE, on_error: str = "raise") -> Stream:
    """Raw pixels as a baseline: colours of a small square, `side` x `side` x 3 numbers an image."""

    def encode(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / 255 - 0.5

    return Stream(images, encode, 3 * side * side, resize=side, crop=side, on_error=on_error)


def concatenated(parts: Sequence[Features]) -> Features:
    """Features of several networks side by side, of the same images in the same order.

    Raises:
        DataError: other images, labels or classes.
    """
    first = parts[0]
    for other in parts[1:]:
        check_same_images(first, other)
    return replace(first, values=torch.cat([part.values for part in parts], dim=1))


def check_same_images(first: Features, second: Features) -> None:
    """Raise `DataError` unless two sets of features have the same labels, row by row, and the same class names."""
    if len(first.labels) != len(second.labels):
        raise DataError(
            f"these are not features of the same images: {len(first.labels)} rows and {len(second.labels)} rows"
        )
    if first.class_names != second.class_names:
        wrong = next(
            (f"'{a}' and '{b}'" for a, b in zip(first.class_names, second.class_names, strict=False) if a != b),
            f"{len(first.class_names)} and {len(second.class_names)} classes",
        )
        raise DataError(f"these are not features of the same classes: {wrong}")
    different = np.flatnonzero(first.labels != second.labels)
    if len(different):
        raise DataError(f"these are not features of the same images: labels differ from row {different[0]} on")


def plain(given: Any, what: str) -> Any:
    """The values of a pandas Series or frame; anything else unchanged.

    Args:
        given: a tensor, array, list, Series or frame.
        what: its name in the message.

    Raises:
        DataError: a generator, a set or a dictionary, which have no numbered rows.
    """
    if hasattr(given, "to_numpy"):
        return given.to_numpy()
    array = hasattr(given, "__array__") or hasattr(given, "shape")
    listed = hasattr(given, "__getitem__") and not isinstance(given, Mapping)
    if isinstance(given, Iterable) and not (array or listed):
        raise DataError(f"{what} is a {type(given).__name__}; give a list or an array")
    return given


def as_features(features: Any, labels: Any, where: str = "features") -> Features:
    """Plain arrays as checked `Features`; labels that are not integers become the names of the classes.

    Args:
        features: floats [rows, dim]: a tensor, an array, a list of rows or a frame.
        labels: integers or text [rows]: a tensor, an array, a list, a Series or a frame of one column.
        where: for messages, what the features are called.

    Raises:
        DataError: as `check_features`; labels of another type.
    """
    values, given = plain(features, where), plain(labels, "labels")
    values = values if isinstance(values, Tensor) else _array(values, where)
    given = given if isinstance(given, Tensor) else _array(given, "labels")
    if given.ndim == 2 and given.shape[1] == 1:  # a frame of one column
        given = given[:, 0]
    if isinstance(given, Tensor) or given.dtype.kind in "iu":
        return check_features(values, given, where=where)
    if given.dtype.kind not in "US" and not all(isinstance(label, str) for label in given.flat):
        raise DataError(f"labels are {given.dtype}, expected integers or text")
    names, numbers = np.unique(given.astype(str), return_inverse=True)
    return check_features(values, numbers.astype(np.int64), names.tolist(), where=where)


def _array(given: Any, what: str) -> NDArray[Any]:
    try:
        return np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{what}: {error}") from error


def check_features(
    values: Tensor | NDArray[Any], labels: Tensor | NDArray[Any], class_names: Sequence[str] = (), *,
    where: str = "features",
) -> Features:  # fmt: skip
    """Features made of plain arrays, checked.

    Args:
        values: floats [rows, dim]; float32 is not copied.
        labels: integers [rows]. They become 0..C-1 in their order, unless they already count through `class_names`.
        class_names: name of each label; 'class 7' for the integer 7 without.
        where: for messages, what the features are called.

    Raises:
        DataError: no rows, other shapes or types, names that do not match the labels, or rows that are NaN, infinite or
            too large for float32 (counted and named).
    """
    integers = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    check_form(values, integers, where)
    if not len(values):
        raise DataError(f"{where}: no rows")
    names = list(class_names)
    present, ranks = np.unique(integers, return_inverse=True)
    if names and present[0] >= 0 and present[-1] < len(names):
        ranks = integers
    elif names and len(names) != len(present):
        raise DataError(f"{where}: {len(names)} class names, but {len(present)} labels from {present[0]} on")
    features = Features(_float32(values), ranks.astype(np.int64), names or [f"class {label}" for label in present])
    check_finite_rows(features.values, where, lambda row: f"of class '{features.class_names[features.labels[row]]}'")
    return features


def check_form(values: Any, labels: Any, where: str) -> None:
    """Raise `DataError` unless tensors, arrays or HDF5 datasets have the types and shapes of features and labels."""
    floats = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    # an HDF5 dataset without any extent has no shape
    if not floats or len(values.shape or ()) != 2 or not values.shape[1]:
        raise DataError(f"{where}: features are {values.dtype} {shape_in_words(values)}, expected floats [rows, dim]")
    if labels.dtype.kind not in "iu" or len(labels.shape or ()) != 1:
        raise DataError(f"{where}: labels are {labels.dtype} {shape_in_words(labels)}, expected integers [rows]")
    if len(labels) != len(values):
        raise DataError(f"{where}: labels not matching features ({len(labels)} labels, {len(values)} features)")


def shape_in_words(array: Any) -> list[int]:
    """Of a tensor, an array or an HDF5 dataset, for messages."""
    return list(array.shape or ())


def _float32(values: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().float()
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


def check_finite_rows(values: Tensor | NDArray[Any], where: str, about: Callable[[int], str] | None = None) -> None:
    """Raise `DataError`, counting and naming the rows, if some cannot be computed with.

    Args:
        values: [rows, dim].
        where: for messages, what the features are called.
        about: more to say of the first such row, given its place.
    """
    given = torch.as_tensor(values)
    count, first = unusable(given)
    if count:
        rows = ", ".join(map(str, first)) + (", ..." if count > SHOWN_ROWS else "")
        wrong = "NaN or infinite" if not given[first].isfinite().all() else "too large: their squares are infinite"
        more = f"; the first is {about(first[0])}" if about else ""
        raise DataError(f"{where}: {count} of {len(given)} rows are {wrong} (rows {rows}, counted from 0{more})")


def unusable(values: Tensor) -> tuple[int, list[int]]:
    """How many of the rows [rows, dim] have NaN, infinity or an infinite square; and the first few of them."""
    step = max(1, CHECK_NUMBERS // max(1, values.shape[1]))
    count, first = 0, list[int]()
    for start in range(0, len(values), step):
        # one NaN or infinity makes the sum one, and heads need squares
        bad = (~values[start : start + step].square().sum(dim=1).isfinite()).nonzero().flatten()
        count += len(bad)
        first += (start + bad[: SHOWN_ROWS - len(first)]).tolist()
    return count, first


class _CenterCrops(Dataset[tuple[Tensor | None, int]]):
    def __init__(self, images: Images, resize: int, crop: int, on_error: str) -> None:
        self.images, self.resize, self.crop, self.on_error = images, resize, crop, on_error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int]:
        try:
            return resize_center_crop(self.images.load(index), self.resize, self.crop), index
        except DataError as error:
            if self.on_error == "raise":
                raise DataError(f"{error} (data.on_error=skip goes on without it)") from error
            return None, index


def _collate(samples: list[tuple[Tensor | None, int]]) -> tuple[Tensor, Tensor]:
    read = [(image, index) for image, index in samples if image is not None]
    if not read:
        return torch.empty(0), torch.empty(0, dtype=torch.long)
    return torch.stack([image for image, _ in read]), torch.tensor([index for _, index in read])
