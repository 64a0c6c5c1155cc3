"""Published backbones by name: where their weights are, at which revision, what they are and what they have seen.

Sources: the repositories' pages on the Hugging Face Hub, and for SMKD https://github.com/HL-hanlin/SMKD. A revision or
digest that is not known for certain is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from smkd.config.published import ARCHITECTURES
from smkd.config.schema import ModelConfig
from smkd.files import nearest

APACHE, DINOV3_LICENCE = "Apache-2.0", "DINOv3 License"
HUB = "hf:"
LVD142M = "142 M images from the web near those of ImageNet-22k and others, without labels"
LVD1689M = "1,689 M images from the web and ImageNet, without labels"
IMAGENET = "the 1.28 M images of ImageNet-1k, without labels"
ALIKE = 0.6
"""How alike a word must be to a name to be taken for a misspelt one."""


@dataclass(frozen=True)
class NamedBackbone:
    """One of them.

    Attributes:
        name: what `--backbone` and `init=` take.
        repository: of the Hugging Face Hub; None where the file must be fetched by hand.
        revision: commit of the repository.
        file: name there, and below `weights_folder()` / name.
        page: where it is described, its licence accepted, or the file to be fetched by hand.
        sha256: of the file in hex, where it is known.
        parameters: how many, in millions.
        megabytes: of the file, where they are known.
        licence: of the weights.
        gated: whether the Hub gives the file only to those who have accepted the licence there.
        trained_on: images it was pre-trained on.
        seen: whether images of the classes that miniImageNet and tieredImageNet test on were among them: few-shot
            accuracy there is then not accuracy on unseen classes.
    """

    name: str
    repository: str | None
    revision: str
    file: str
    page: str
    sha256: str | None
    parameters: float
    megabytes: int | None
    licence: str
    gated: bool
    trained_on: str
    seen: bool

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return ARCHITECTURES[self.name]

    @property
    def place(self) -> Path:
        """Where a file that was fetched by hand is looked for."""
        return weights_folder() / self.name / self.file

    @property
    def url(self) -> str:
        """Of the file, or of the page that gives it."""
        if self.repository is None:
            return self.page
        return huggingface_hub.hf_hub_url(self.repository, self.file, revision=self.revision)

    @property
    def here(self) -> bool:
        """Whether nothing needs to be fetched."""
        if self.place.is_file() or self.repository is None:
            return self.place.is_file()
        return isinstance(
            huggingface_hub.try_to_load_from_cache(self.repository, self.file, revision=self.revision), str
        )

    def __str__(self) -> str:
        size = "" if self.megabytes is None else f", {self.megabytes} MB"
        return f"{self.name} ({self.parameters:g} M parameters, licence: {self.licence}{size})"


def weights_folder() -> Path:
    """Where downloads are kept: `smkd/weights` below the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smkd" / "weights"


def find(source: str | Path | None) -> NamedBackbone | None:
    """The backbone of this name; None if it is no name."""
    return CATALOGUE.get(str(source))


def misspelt(source: str) -> str:
    """The end of a message about a source that is nothing: the nearest name, or nothing if none is alike."""
    if "/" in source:
        return nearest(f"{HUB}{source}", (f"{HUB}{each.repository}" for each in CATALOGUE.values()), ALIKE)
    return nearest(source, CATALOGUE, ALIKE)


def _all() -> Iterator[NamedBackbone]:
    yield from _dinov2()
    yield from _dino()
    yield from _smkd()
    yield from _dinov3()


def _hub(
    name: str, repository: str, revision: str, parameters: float, megabytes: int, trained_on: str, *,
    sha256: str | None = None, file: str = "model.safetensors", licence: str = APACHE, gated: bool = False,
) -> NamedBackbone:  # fmt: skip
    return NamedBackbone(
        name, repository, revision, file, f"https://huggingface.co/{repository}", sha256, parameters, megabytes,
        licence, gated, trained_on, seen=True,
    )  # fmt: skip


def _dinov2() -> Iterator[NamedBackbone]:
    rows: tuple[tuple[str, str, float, int, str, str | None], ...] = (
        ("dinov2-small", "dinov2-small", 22.1, 88, "ed25f3a31f01632728cabb09d1542f84ab7b0056",
         "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1"),
        ("dinov2-base", "dinov2-base", 86.6, 346, "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
         "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841"),
        ("dinov2-large", "dinov2-large", 304.4, 1218, "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
         "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"),
        ("dinov2-small-registers", "dinov2-with-registers-small", 22.1, 88,
         "0d9846e56b43a21fa46d7f3f5070f0506a5795a9", None),
        ("dinov2-base-registers", "dinov2-with-registers-base", 86.6, 346,
         "a1d738ccfa7ae170945f210395d99dde8adb1805",
         "7a6f7b3b9fa4b8732e707476a03cd6cdce210048582f21aafb7991c17d98e362"),
        ("dinov2-large-registers", "dinov2-with-registers-large", 304.4, 1218,
         "e4c89a4e05589de9b3e188688a303d0f3c04d0f3", None),
    )  # fmt: skip
    for name, repository, parameters, megabytes, revision, digest in rows:
        yield _hub(name, f"facebook/{repository}", revision, parameters, megabytes, LVD142M, sha256=digest)


def _dino() -> Iterator[NamedBackbone]:
    yield _hub(
        "dino-vits16", "facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd", 21.7, 87, IMAGENET,
        file="pytorch_model.bin",
    )  # fmt: skip
    yield _hub(
        "dino-vitb16", "facebook/dino-vitb16", "f205d5d8e640a89a2b8ef0369670dfc37cc07fc2", 85.8, 343, IMAGENET,
        file="pytorch_model.bin", sha256="a064e36c67289caaa5c949c0b3f7f31a0fcbcba5721f5fa12419933ec1f4fe6e",
    )  # fmt: skip


def _smkd() -> Iterator[NamedBackbone]:
    """The published phase-2 files: their host gives no address that a program can fetch, and no digest."""
    rows = (
        ("mini-imagenet", "miniImageNet", "10dGfyf0t5dyhZ3WwcSzWZS6qIhsoayUz"),
        ("tiered-imagenet", "tieredImageNet", "1Dbit0iKSXHtsdrxDTACsNbrLsp-J4XTh"),
        ("cifar-fs", "CIFAR-FS", "1CbWeO5HAGsCWpxr6xMbqTmgRdLH0NCLS"),
        ("fc100", "FC100", "1YtrWdAdL_ywKLMa67iXOdA25-k0qNakw"),
    )
    for name, title, file in rows:
        yield NamedBackbone(
            f"smkd-{name}", None, "", "checkpoint.pth", f"https://drive.google.com/file/d/{file}/view", None, 21.7,
            None, "not stated", False, f"{title}'s training classes", seen=False,
        )  # fmt: skip


def _dinov3() -> Iterator[NamedBackbone]:
    rows: tuple[tuple[str, float, int, str, str | None], ...] = (
        ("vits16", 21.6, 86, "114c1379950215c8b35dfcd4e90a5c251dde0d32",
         "4610ad75edef83e75afdebf162d148dc628045ea6cbb83d67d4708c709c4f91d"),
        ("vits16plus", 28.7, 115, "c93d816fc9e567563bc068f01475bec89cc634a6", None),
        ("vitb16", 85.7, 343, "5931719e67bbdb9737e363e781fb0c67687896bc",
         "9a21ac3df0c63839d62612dda6f454d816c25611cc7a52966ed5a5a94921dc8b"),
        ("vitl16", 303.1, 1213, "ea8dc2863c51be0a264bab82070e3e8836b02d51", None),
        ("vith16plus", 840.6, 3363, "c807c9eeea853df70aec4069e6f56b28ddc82acc", None),
    )  # fmt: skip
    for size, parameters, megabytes, revision, digest in rows:
        yield _hub(
            f"dinov3-{size}", f"facebook/dinov3-{size}-pretrain-lvd1689m", revision, parameters, megabytes, LVD1689M,
            sha256=digest, licence=DINOV3_LICENCE, gated=True,
        )  # fmt: skip


CATALOGUE = {each.name: each for each in _all()}
"""By name, in the order in which they are listed."""
