"""Files to damage, the ways to damage them, and what reads them; `fuzz.py` puts them together.

A kind of file is a document (plain values and tensors), the way it is written, and the loader. Damage is done to the
document, which is then written as ever, or to the bytes. All of it follows from the numbers given to `random.Random`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from smkd import api
from smkd.classify import Encoder, EncoderConfig, FewShotClassifier, ImageIndex
from smkd.classify.pictures import Pictures
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.data.images import StoredImages
from smkd.data.sources import open_dataset
from smkd.engine import checkpoint
from smkd.engine.restore import backbone_of, open_checkpoint, restore
from smkd.engine.step import Learner
from smkd.fewshot.feature_file import read_features, read_source
from smkd.models.vit import VisionTransformer
from smkd.reference.translate import translate

PAGE = 4096
TRIES = 20
ODD: list[Any] = [
    None, True, False, "", "text", "a\nb", "1", -1, 0, 1, 3, 10**6, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"),
    float("inf"), [], {}, [[]], [1, 2, 3], ["a"], {"a": 1}, {"size": "huge"}, "x" * 5000, "\ud800",
]  # fmt: skip
"""Values that no part of a document should have."""


Rng = random.Random | None


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        name: for the table.
        suffix: of the file.
        document: whole.
        write: makes the bytes; with random numbers now and then of a form that is legal and odd.
        load: reads a file as far as a user's command would.
    """

    name: str
    suffix: str
    document: Any
    write: Callable[[Any, Rng], bytes]
    load: Callable[[Path, random.Random], object]


def damaged(kind: Kind, rng: random.Random) -> bytes:
    """The bytes of a damaged file."""
    for _ in range(TRIES):
        # some damage cannot be done or written
        with contextlib.suppress(Exception):
            document = copy.deepcopy(kind.document)
            structural = kind.name != "image" and rng.random() < 0.6
            for _ in range(rng.choice((1, 1, 1, 2, 4)) if structural else 0):
                document = _changed(document, rng)
            data = kind.write(document, rng)
            return data if structural else _hurt(data, rng)
    return b""


def _hurt(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes replaced, the end cut off, zero pages put in or over it, parts doubled."""
    raw, place = bytearray(data), rng.randrange(max(1, len(data)))
    # most of what can go wrong is at both ends
    if rng.random() < 0.5:
        place = rng.choice((place % 512, max(0, len(raw) - 1 - place % 2048)))
    way = rng.randrange(7)
    if way == 0:
        for _ in range(rng.choice((1, 1, 4, 16))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif way == 1:
        for at in range(place, min(len(raw), place + rng.choice((1, 2, 8, 64)))):
            raw[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif way == 2:
        del raw[place:]
    elif way == 3:
        raw[place:place] = bytes(rng.choice((1, 8, PAGE)))
    elif way == 4:
        raw[place : place + PAGE] = bytes(min(PAGE, len(raw) - place))
    elif way == 5:
        raw[place:place] = raw[place : place + rng.choice((1, 16, PAGE))]
    else:
        del raw[place : place + rng.choice((1, 4, 64, PAGE))]
    return bytes(raw)


def _changed(value: Any, rng: random.Random) -> Any:
    """A document with one part changed, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.15:
            del value[key]
        elif way < 0.25:
            value[rng.choice(("new", f"{key}x", f"{key}.0", 7, ""))] = value.pop(key)
        elif way < 0.35:
            value[key] = value[rng.choice(list(value))]
        else:
            value[key] = _changed(value[key], rng)
        return value
    if isinstance(value, list | tuple) and value and rng.random() < 0.8:
        items, place = list(value), rng.randrange(len(value))
        way = rng.random()
        if way < 0.2:
            del items[place]
        elif way < 0.4:
            items.insert(place, items[rng.randrange(len(items))])
        else:
            items[place] = _changed(items[place], rng)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Tensor) and rng.random() < 0.85:
        return _changed_tensor(value, rng)
    if isinstance(value, np.ndarray) and rng.random() < 0.85:
        return _changed_tensor(torch.from_numpy(value), rng).numpy()
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value * 10**9, -value, value + 1, value * 0, str(value), float(value), value / 3))
    return _nested(rng) if rng.random() < 0.03 else copy.deepcopy(rng.choice(ODD))


def _nested(rng: random.Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice((50, 500, 900))):
        value = [value]
    return value


def _changed_tensor(value: Tensor, rng: random.Random) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        value.long, value.half, value.double, value.bool, value.flatten, value.sum, lambda: value[..., :0],
        lambda: value[None], lambda: value.T if value.ndim == 2 else value.repeat(2), lambda: torch.cat([value, value]),
        lambda: value * float("nan"), lambda: value.float().index_fill(0, torch.tensor([0]), float("inf")),
        lambda: torch.zeros(1).expand(10**rng.choice((3, 6, 9, 12))), lambda: value.to(torch.complex64),
        lambda: value.to("meta"), value.to_sparse, lambda: torch.nn.Parameter(value.float()),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8), lambda: value.to(torch.float8_e4m3fn),
        lambda: torch.zeros(10**rng.choice((0, 3, 5))), lambda: value[:1], lambda: torch.empty(0, 10**12),
    ]  # fmt: skip
    return rng.choice(ways)()


def _pickled(document: Any, rng: Rng) -> bytes:
    file = io.BytesIO()
    protocol, way = (2, 1.0) if rng is None else (rng.choice((*[2] * 15, 3, 4, 5)), rng.random())
    torch.save(document, file, pickle_protocol=protocol, _use_new_zipfile_serialization=way > 0.2)
    return file.getvalue()


def _safetensors(document: Any, _rng: Rng) -> bytes:
    header = json.dumps(document["header"]).encode()
    return struct.pack("<Q", len(header)) + header + document["data"]


def _parted(data: bytes) -> dict[str, Any]:
    """A safetensors file as its header, with what is JSON in it, and its numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    return {"header": json.loads(data[8 : 8 + length]), "data": data[8 + length :]}


def _smkd(document: Any, rng: Rng) -> bytes:
    """A file of `smkd fit` or `smkd index`, whose header holds JSON within JSON."""
    header = {**document["header"], "__metadata__": {"smkd": json.dumps(document["smkd"])}}
    return _safetensors({"header": header, "data": document["data"]}, rng)


def _parted_smkd(data: bytes) -> dict[str, Any]:
    parts = _parted(data)
    return {"smkd": json.loads(parts["header"].pop("__metadata__")["smkd"]), **parts}


def _features(document: Any, rng: Rng) -> bytes:
    """HDF5 in one of its many storages, some of them claiming what is not there."""
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        for name, value in document["datasets"].items():
            way, axes = 1.0 if rng is None else rng.random(), np.ndim(value)
            if rng is None or way > 0.4:
                file[name] = value
            elif way < 0.05:
                file[name] = h5py.ExternalLink("/etc/hostname", "/x")
            elif way < 0.1:
                file[name] = h5py.SoftLink(rng.choice(("/count", "/nowhere", "/all_feats", f"/{name}")))
            elif way < 0.25:
                shape = (10 ** rng.choice((3, 8, 12)), *np.shape(value)[1:])
                chunks = rng.choice((None, True, tuple(min(1000, side) for side in shape)))
                fill = rng.choice((0, 1))
                file.create_dataset(name, shape, np.asarray(value).dtype, chunks=chunks, fillvalue=fill)
            elif way < 0.3 and axes:
                layout = h5py.VirtualLayout(np.shape(value), np.asarray(value).dtype)
                file.create_virtual_dataset(name, layout)
            elif axes:
                packing = rng.choice(("gzip", "lzf"))
                file.create_dataset(name, data=value, compression=packing, maxshape=(None,) * axes)
        for name, value in document["attributes"].items():
            file.attrs[name] = value
    return memory.getvalue()


def _yaml(document: Any, rng: Rng) -> bytes:
    way = 1.0 if rng is None else rng.random()
    if rng is not None and way < 0.1:
        nests = (("[", "]", 9000), ("{a: ", "}", 5000), ("- ", "", 9000), ("&a [*a, ", "]", 900))
        start, end, count = rng.choice(nests)
        return f"phase: {start * count}1{end * count}".encode()
    if way < 0.15:
        lines = ["a0: &a0 [1, 2, 3]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
        return "\n".join(lines).encode()
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _settings(document: Any, rng: Rng) -> bytes:
    way = 1.0 if rng is None else rng.random()
    if way < 0.3:
        return f"Namespace({', '.join(f'{key}={value!r}' for key, value in document.items())})".encode()
    if way < 0.6:
        words = " ".join(f"--{key} {value}" for key, value in document.items())
        return f"torchrun main_smkd.py {words}".encode()
    return json.dumps(document).encode()


def _table(document: Any, _rng: Rng) -> bytes:
    return "\n".join(",".join(map(str, row)) for row in document).encode("utf-8", "surrogatepass")


def _load_checkpoint(learner: Learner) -> Callable[[Path, random.Random], object]:
    def load(path: Path, rng: random.Random) -> object:
        if rng.random() < 0.5:
            return backbone_of(open_checkpoint(path, None)[0], str(path), rng.choice(("teacher", "student")))
        return restore(learner, checkpoint.load_checkpoint(path), optimizer=True)

    return load


def _load_foreign(base: RunConfig) -> Callable[[Path, random.Random], object]:
    def load(path: Path, rng: random.Random) -> object:
        return backbone_of(open_checkpoint(path, base)[0], str(path), "teacher")

    return load


def _load_classifier(path: Path, _rng: random.Random) -> object:
    opened = FewShotClassifier.load(path, accelerator="cpu")
    if opened.encoder_ is None:
        return opened.predict_proba(opened.support_)
    return opened.predict_proba([Image.new("RGB", (40, 50), "red")])


def _load_index(path: Path, _rng: random.Random) -> object:
    opened = ImageIndex.load(path, accelerator="cpu")
    return opened.search(opened.encoder([Image.new("RGB", (40, 50), "red")]))


def _load_features(path: Path, _rng: random.Random) -> object:
    read_source(path)
    return read_features(path).values.sum()


def _load_table(path: Path, _rng: random.Random) -> object:
    source = open_dataset(path)
    return [_first(source.open(split)) for split in source.classes]


def _load_image(path: Path, _rng: random.Random) -> object:
    return Pictures([path]).load(0)


def _encoded() -> list[bytes]:
    """The same picture in several formats and modes."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 30, 3), np.uint8))
    forms = [
        ("PNG", noise), ("PNG", noise.convert("LA")), ("PNG", noise.convert("I").convert("I;16")), ("JPEG", noise),
        ("JPEG", noise.convert("CMYK")), ("TIFF", noise.convert("F")), ("TIFF", noise), ("GIF", noise.convert("P")),
        ("WEBP", noise.convert("RGBA")), ("BMP", noise.convert("L")), ("PPM", noise),
    ]  # fmt: skip
    files = []
    for form, image in forms:
        memory = io.BytesIO()
        image.save(memory, form)
        files.append(memory.getvalue())
    return files


def _one_of(document: list[bytes], rng: Rng) -> bytes:
    return document[0] if rng is None else rng.choice(document)


def _first(images: StoredImages) -> Tensor:
    return images.load(0)


def kinds(folder: Path) -> list[Kind]:
    """Every kind of file; what the loaders need beside them is put into `folder`."""
    config = api.resolve("debug-pretrain", ["accelerator=cpu"])
    learner = Learner.create(config, 4, torch.device("cpu"), None)
    for parameter in learner.pair.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    run = {
        "format": checkpoint.FORMAT, **copy.deepcopy(learner.state()), "epoch": 1, "step": 8, "best": 40.0, "stale": 0,
        "config": config.model_dump(mode="json"), "classes": ["a", "b"], "version": "1",
    }  # fmt: skip
    vit = VisionTransformer(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    weights = dict(vit.state_dict())
    foreign = {
        "student": {f"module.backbone.{name}": value for name, value in weights.items()}, "teacher": weights,
        "args": argparse.Namespace(arch="vit_small", lr=0.1, world_size=2), "epoch": 3,
        "ibot_loss": {"center": torch.zeros(1, 8), "center2": torch.zeros(1, 1, 8)},
    }  # fmt: skip
    features, labels = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32), np.arange(12) % 3
    attributes = {"model": "x", "blocks": 1, "class_names": ["a", "b", "c"], "split": "test", "parts": ["cls"]}
    encoder = Encoder(EncoderConfig(model=config.model, resize=32, crop=32), learner.pair.teacher.backbone)
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green", "yellow", "black", "white")]
    FewShotClassifier(encoder).fit(pictures, ["a", "a", "b", "b", "c", "c"]).save(folder / "clf.smkd")
    ImageIndex(encoder, encoder(pictures), [f"{number}.png" for number in range(6)]).save(folder / "index.smkd")
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    rows = [
        ["path", "label", "split"],
        *([f"{n}.png", "ab"[n % 2], ("train", "val", "test")[n // 2]] for n in range(6)),
    ]
    tensors = folder / "model.safetensors"
    save_file(weights, tensors)
    return [
        Kind("checkpoint", ".pt", run, _pickled, _load_checkpoint(learner)),
        Kind("foreign weights", ".pth", foreign, _pickled, _load_foreign(config)),
        Kind("safetensors", ".safetensors", _parted(tensors.read_bytes()), _safetensors, _load_foreign(config)),
        Kind("classifier", ".smkd", _parted_smkd((folder / "clf.smkd").read_bytes()), _smkd, _load_classifier),
        Kind("index", ".smkd", _parted_smkd((folder / "index.smkd").read_bytes()), _smkd, _load_index),
        Kind("features", ".h5", {"datasets": {"all_feats": features, "all_labels": labels, "count": np.array([12])},
                                 "attributes": attributes}, _features, _load_features),
        Kind("recipe", ".yaml", config.model_dump(mode="json", exclude_unset=True), _yaml,
             lambda path, _: loading.resolve(str(path))),
        Kind("run settings", ".yaml", config.model_dump(mode="json"), _yaml, lambda path, _: loading.load_config(path)),
        Kind("args file", ".txt", {"arch": "vit_small", "epochs": 3, "lr": 5e-4, "data_path": "/a/train",
                                   "global_crops_scale": [0.4, 1.0], "world_size": 2, "supervised_contrastive": True},
             _settings, lambda path, _: translate(path)),
        Kind("table", ".csv", rows, _table, _load_table),
        Kind("image", ".png", _encoded(), _one_of, _load_image),
    ]  # fmt: skip
