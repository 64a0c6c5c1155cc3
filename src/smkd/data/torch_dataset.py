"""Images of a data set as PyTorch has them: an object with a length, whose items are (image, label)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smkd.data.decoding import as_rgb
from smkd.errors import DataError

WANTED = "expected a Pillow image, a uint8 array [height, width, 3] or a uint8 tensor [3, height, width]"


class LabelledImages(Protocol):
    """What is asked of a data set, as of torchvision's without a transform."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """(image, label); the label is a whole number or a text."""


class DatasetImages:
    """One split whose images a data set makes; see `smkd.data.images.Images`.

    Its labels are those of its attribute `targets` or `labels`; without these every item is made once to learn them.
    Its classes are called as its attribute `classes` says, else as their labels.

    Args:
        dataset: the data set.
        called: what messages call it.
        limit_per_class: at most this many images of each class, the first ones.

    Raises:
        DataError: it is empty, an item is no pair, its first image is none, or a label is neither number nor text.
    """

    def __init__(self, dataset: LabelledImages, called: str, limit_per_class: int | None = None) -> None:
        self.dataset, self.called = dataset, called
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, str):
            raise DataError(f"{called} is a {type(dataset).__name__}; expected a data set of (image, label)")
        if not len(dataset):
            raise DataError(f"{called} holds no images")
        given = self._labels()
        known, labels = np.unique(given, return_inverse=True)
        order = np.argsort(labels, kind="stable")
        groups = [order[labels[order] == label][:limit_per_class] for label in range(len(known))]
        self.items = np.concatenate(groups)
        self.labels: NDArray[np.int64] = labels[self.items].astype(np.int64)
        self.class_names = self._names(known)
        self.load(0)

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Tensor:
        """See `Images.load`."""
        try:
            given = self._item(int(self.items[index]))[0]
            image = np.array(as_rgb(given)) if isinstance(given, Image.Image) else given
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read image '{self.name(index)}': {error}") from error
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise DataError(f"'{self.name(index)}' is a {_kind(given)}; {WANTED}, before any transform")
        return image

    def name(self, index: int) -> str:
        """The data set and the number of the image in it."""
        return f"{self.called}[{int(self.items[index])}]"

    def _item(self, item: int) -> tuple[Any, Any]:
        pair = self.dataset[item]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(f"'{self.called}[{item}]' is a {type(pair).__name__}; expected (image, label)")
        return pair[0], pair[1]

    def _labels(self) -> NDArray[Any]:
        count = len(self.dataset)
        for attribute in ("targets", "labels"):
            told = getattr(self.dataset, attribute, None)
            if told is not None and not callable(told) and np.ndim(told) == 1 and len(told) == count:
                values = np.asarray(told)
                break
        else:
            values = np.array([np.asarray(self._item(item)[1])[()] for item in range(count)])
        if values.dtype.kind not in "iuU" or values.ndim != 1:
            raise DataError(f"{self.called}: labels are {values.dtype}; expected whole numbers or texts")
        return values

    def _names(self, known: NDArray[Any]) -> list[str]:
        names: Any = getattr(self.dataset, "classes", None)
        is_list = isinstance(names, list | tuple) and known.dtype.kind in "iu"
        if is_list and 0 <= known.min() <= known.max() < len(names):
            return [str(names[label]) for label in known]
        return [str(label) for label in known]


def _kind(item: Any) -> str:
    """Of an item that is no image, in words."""
    name = type(item).__name__
    return f"{name} of {str(item.dtype).removeprefix('torch.')} {list(item.shape)}" if hasattr(item, "dtype") else name
