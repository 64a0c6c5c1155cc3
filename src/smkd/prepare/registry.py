"""The data sets smkd can prepare: classes, counts, where their files come from and on which terms."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from smkd.errors import DataError
from smkd.files import nearest

SPLITS = ("train", "val", "test")
IMAGES_OF_A_CLASS = 600
"""Images of every class of miniImageNet, CIFAR-FS and FC100."""
DRAWERS = 20
"""Images of every Omniglot character: each was drawn by twenty people."""


@dataclass(frozen=True)
class ClassEntry:
    """One class: its folder, its split, and the number of images it has there."""

    folder: str
    split: str
    images: int
    title: str = ""
    group: str = ""
    """Super-class, category or alphabet; no group of FC100 or tieredImageNet is in two splits."""
    label: int = -1
    """CIFAR-100 fine label; -1 elsewhere."""


@dataclass(frozen=True)
class SplitCount:
    """Size of one split."""

    classes: int
    images: int


def class_table(name: str) -> list[dict[str, str]]:
    """Rows of one of the lists in `splits/`, whose README names their sources."""
    text = resources.files("smkd.prepare").joinpath("splits", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def published_repeats(name: str) -> list[frozenset[str]]:
    """'<class>/<image>' of the images of each picture that a benchmark has more than once, as far as is known."""
    rows = class_table("mini_imagenet_repeats") if name == "mini-imagenet" else []
    return [frozenset({f"{row['class']}/{row['image']}", f"{row['same_class']}/{row['same_image']}"}) for row in rows]


@cache
def ilsvrc_counts() -> dict[str, int]:
    """Number of ILSVRC-12 training images of each of the 1,000 classes."""
    return {row["wnid"]: int(row["images"]) for row in class_table("ilsvrc12_train_counts")}


@cache
def class_list(name: str) -> tuple[ClassEntry, ...]:
    """Classes of one data set, sorted by folder within each split."""
    return tuple(_LISTS[name]())


def count(entries: Iterable[ClassEntry]) -> dict[str, SplitCount]:
    """Classes and images of each split."""
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    for entry in entries:
        sizes[entry.split].append(entry.images)
    return {split: SplitCount(len(found), sum(found)) for split, found in sizes.items()}


def _mini_imagenet() -> Iterable[ClassEntry]:
    for row in class_table("mini_imagenet"):
        yield ClassEntry(row["wnid"], row["split"], IMAGES_OF_A_CLASS, row["class_name"])


def _tiered_imagenet() -> Iterable[ClassEntry]:
    counts = ilsvrc_counts()
    for row in class_table("tiered_imagenet"):
        wnid = row["wnid"]
        yield ClassEntry(wnid, row["split"], counts[wnid], row["class_name"], row["category_wnid"])


def _cifar_fs() -> Iterable[ClassEntry]:
    for row in class_table("cifar_fs"):
        yield ClassEntry(row["class_name"], row["split"], IMAGES_OF_A_CLASS, label=int(row["fine_label_id"]))


def _fc100() -> Iterable[ClassEntry]:
    for row in class_table("fc100"):
        group, label = row["superclass"], int(row["fine_label_id"])
        yield ClassEntry(row["class_name"], row["split"], IMAGES_OF_A_CLASS, group=group, label=label)


def _caltech101() -> Iterable[ClassEntry]:
    for row in class_table("caltech101"):
        yield ClassEntry(row["class"], row["split"], int(row["count"]))


def _omniglot() -> Iterable[ClassEntry]:
    for row in class_table("omniglot"):
        for number in range(1, int(row["characters"]) + 1):
            folder = f"{row['alphabet']}-character{number:02}"
            yield ClassEntry(folder, row["split"], DRAWERS, group=row["alphabet"])


_LISTS = {
    "mini-imagenet": _mini_imagenet,
    "tiered-imagenet": _tiered_imagenet,
    "cifar-fs": _cifar_fs,
    "fc100": _fc100,
    "caltech101": _caltech101,
    "omniglot": _omniglot,
}


@dataclass(frozen=True)
class Download:
    """A file on the web.

    Attributes:
        url: where it is.
        name: what it is called on disk.
        digest: 'md5:<hex>' or 'sha256:<hex>' of the whole file.
        page: where a person can fetch it by hand.
        option: how it is given then.
    """

    url: str
    name: str
    digest: str
    page: str
    option: str = "--archive FILE"


@dataclass(frozen=True)
class Benchmark:
    """Facts about one data set."""

    name: str
    title: str
    version: str
    """Goes up when the same archive would give other files."""
    rule: str
    """How classes are split, and images chosen."""
    needs: str
    licence: str
    paper: str
    downloads: tuple[Download, ...] = ()

    @property
    def classes(self) -> tuple[ClassEntry, ...]:
        """Its classes, in the order of the published list."""
        return class_list(self.name)

    @property
    def counts(self) -> dict[str, SplitCount]:
        """Classes and images of each split."""
        return count(self.classes)


_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85", _CIFAR_PAGE,
)  # fmt: skip
_CALTECH = Download(
    "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", "caltech-101.zip",
    "md5:3138e1922a9193bfa496528edbbc45d0", "https://doi.org/10.22002/D1.20086",
)  # fmt: skip
_OMNIGLOT = tuple(
    Download(
        f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{name}", name,
        f"md5:{digest}", "https://github.com/brendenlake/omniglot",
    )
    for name, digest in (
        ("images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
        ("images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
    )
)  # fmt: skip
_MINI_LISTS = tuple(
    Download(
        f"https://raw.githubusercontent.com/twitter/meta-learning-lstm/master/data/miniImagenet/{split}.csv",
        f"{split}.csv", f"sha256:{digest}",
        "https://github.com/twitter/meta-learning-lstm/tree/master/data/miniImagenet", "--lists FOLDER",
    )
    for split, digest in (
        ("train", "498519cd8e49ce97ed26a4a3638966698ae41ab35e9c68538319fc9b46ba7d2f"),
        ("val", "5658a59921ca027ee76af92949869c5d6f41d77592ff3b18db325a9d10c893b9"),
        ("test", "2b7cfa78342995761a572a8158e539bc4e0a80f9bbd7d00c1e17a460fbbb93fa"),
    )
)  # fmt: skip

_ILSVRC_LICENCE = "ILSVRC-12: request it from https://image-net.org; non-commercial research and teaching only."
_CIFAR_LICENCE = "CIFAR-100 states no licence; its authors ask to cite A. Krizhevsky's report of 2009."

BENCHMARKS = {
    entry.name: entry
    for entry in (
        Benchmark(
            "mini-imagenet", "miniImageNet", "1",
            "the published lists of Ravi and Larochelle 2017: 600 ILSVRC-12 training images of each class",
            "--source: ILSVRC-12 train folder, ILSVRC2012_img_train.tar, or a ready-made copy of miniImageNet",
            _ILSVRC_LICENCE,
            "O. Vinyals et al., NeurIPS 2016; split of S. Ravi and H. Larochelle, ICLR 2017", _MINI_LISTS,
        ),
        Benchmark(
            "tiered-imagenet", "tieredImageNet", "1",
            "the published class lists of Ren et al. 2018: all ILSVRC-12 training images of each class",
            "--source: ILSVRC-12 train folder or ILSVRC2012_img_train.tar", _ILSVRC_LICENCE,
            "M. Ren et al., ICLR 2018",
        ),
        Benchmark(
            "cifar-fs", "CIFAR-FS", "1",
            "the published class lists of Bertinetto et al. 2019; CIFAR-100's training and test parts merged",
            "cifar-100-python.tar.gz: downloaded, or given with --archive", _CIFAR_LICENCE,
            "L. Bertinetto et al., ICLR 2019", (_CIFAR,),
        ),
        Benchmark(
            "fc100", "FC100", "1",
            "the published super-class lists of Oreshkin et al. 2018; CIFAR-100's training and test parts merged",
            "cifar-100-python.tar.gz: downloaded, or given with --archive", _CIFAR_LICENCE,
            "B. Oreshkin et al., NeurIPS 2018", (_CIFAR,),
        ),
        Benchmark(
            "caltech101", "Caltech-101, few-shot", "1",
            "100 classes shuffled with random.Random(234); repeated pictures left out, then the first 120 by name",
            "caltech-101.zip (or its 101_ObjectCategories.tar.gz): downloaded, or given with --archive",
            "Creative Commons Attribution 4.0 (CC BY 4.0).",
            "L. Fei-Fei et al., CVPR workshop 2004; https://doi.org/10.22002/D1.20086", (_CALTECH,),
        ),
        Benchmark(
            "omniglot", "Omniglot", "1",
            "by alphabet: the evaluation set is test, the five smallest background alphabets val, the others train",
            "images_background.zip and images_evaluation.zip: downloaded, or both given with --archive",
            "MIT licence of its repository.", "B. Lake et al., Science 2015; val as in Meta-Dataset, ICLR 2020",
            _OMNIGLOT,
        ),
    )
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """Facts about the data set `name`; raises `DataError` with the nearest name if there is none."""
    if name not in BENCHMARKS:
        raise DataError(f"unknown data set '{name}'{nearest(name, BENCHMARKS)} (known: {', '.join(BENCHMARKS)})")
    return BENCHMARKS[name]
