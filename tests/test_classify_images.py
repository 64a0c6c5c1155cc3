"""The classifier on images, its file, and the index of nearest images."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.base import clone
from torch import Tensor

from classify_data import blobs, tiny_checkpoint, tiny_network
from made_images import photographs
from smkd import api
from smkd.classify import Encoder, FewShotClassifier, ImageIndex, open_encoder
from smkd.config.loading import resolve
from smkd.errors import CheckpointError, ConfigError, DataError
from smkd.fewshot import features
from smkd.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in `support` and `rest`, and a network in `net.pt`."""
    folder = tmp_path_factory.mktemp("classify")
    photographs(folder / "support", (5, 4, 6))
    photographs(folder / "rest", (4, 4, 4), skip=6)
    tiny_checkpoint(folder / "net.pt")
    return folder


def files(folder: Path) -> tuple[list[Path], list[str]]:
    paths = sorted(folder.rglob("*.png"))
    return paths, [path.parent.name for path in paths]


def fitted(place: Path, backbone: str = "net.pt", head: str = "prototype") -> FewShotClassifier:
    name = backbone if backbone == "pixels" else place / backbone
    return FewShotClassifier(name, head, accelerator="cpu").fit(*files(place / "support"))


def test_paths_pictures_arrays_and_features_agree(place: Path) -> None:
    classifier, (paths, _) = fitted(place), files(place / "rest")
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    expected = classifier.predict_proba(paths)
    for given in ([str(path) for path in paths], np.array([str(path) for path in paths]), pictures, arrays,
                  np.stack(arrays), [paths[0], pictures[1], *arrays[2:]], classifier.features(paths)):  # fmt: skip
        np.testing.assert_array_equal(classifier.predict_proba(given), expected)


def test_features_are_those_of_eval(place: Path) -> None:
    opened = api.open_features(place / "net.pt", changes={"accelerator": "cpu"})
    assert opened.stream is not None
    images = opened.stream.images
    some = [images.load(index).permute(1, 2, 0).numpy() for index in range(40)]
    own = open_encoder(place / "net.pt", accelerator="cpu")(some)
    np.testing.assert_allclose(own, opened.features().values[:40].numpy(), atol=1e-6)


def test_large_images_go_through_the_network_a_few_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, paths = open_encoder(place / "net.pt", accelerator="cpu"), files(place / "support")[0]
    encoder.config = encoder.config.model_copy(update={"precision": "fp32"})
    assert encoder.backbone is not None
    shapes, own = [], encoder.backbone.last_blocks

    def noted(images: Tensor, blocks: Any) -> Any:
        shapes.append(len(images))
        return own(images, blocks)

    monkeypatch.setattr(encoder.backbone, "last_blocks", noted)
    together = encoder(paths)
    hidden = 4 * encoder.backbone.embed_dim * (encoder.config.crop // encoder.backbone.patch_size) ** 2
    assert shapes == [len(paths)]
    monkeypatch.setattr(features, "CPU_NUMBERS", 3 * hidden)
    torch.testing.assert_close(encoder(paths), together, rtol=1e-4, atol=1e-5)
    assert max(shapes[1:]) == 3
    monkeypatch.setattr(features, "CPU_NUMBERS", 1)
    torch.testing.assert_close(encoder(paths), together, rtol=1e-4, atol=1e-5)
    assert shapes[-1] == 1


def test_a_network_needs_a_recipe_and_is_the_same_as_its_file(place: Path) -> None:
    paths, labels = files(place / "support")
    with pytest.raises(ConfigError, match="add recipe="):
        FewShotClassifier(tiny_network()).fit(paths, labels)
    by_network = FewShotClassifier(
        tiny_network(), recipe=resolve("debug-pretrain", ["precision=fp32"]), accelerator="cpu"
    ).fit(paths, labels)
    np.testing.assert_array_equal(by_network.predict_proba(paths), fitted(place).predict_proba(paths))
    odd = tiny_network()
    odd.norm.eps = 0.5
    with pytest.raises(ConfigError, match="not one that settings describe"):
        FewShotClassifier(odd, recipe="debug-pretrain").fit(paths, labels)
    assert FewShotClassifier(tiny_network(), recipe=resolve("debug-pretrain")).fit(paths, labels).encoder_ is not None


@pytest.mark.parametrize(("backbone", "head"), [("net.pt", "logistic"), ("pixels", "auto"), ("net.pt", "tim")])
def test_a_saved_classifier_predicts_the_same(place: Path, tmp_path: Path, backbone: str, head: str) -> None:
    classifier, (paths, labels) = fitted(place, backbone, head), files(place / "rest")
    file = tmp_path / "new" / "clf.smkd"
    classifier.save(file)
    loaded = FewShotClassifier.load(file, accelerator="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(paths), classifier.predict_proba(paths))
    np.testing.assert_array_equal(loaded.predict(paths, reject=0.5), classifier.predict(paths, reject=0.5))
    assert (loaded.head_, loaded.left_out_, loaded.known_) == (
        classifier.head_,
        classifier.left_out_,
        classifier.known_,
    )
    # and goes on learning the same, also from the start
    for each in (loaded, classifier):
        each.partial_fit(paths, labels)
    np.testing.assert_array_equal(loaded.predict_proba(paths), classifier.predict_proba(paths))
    again = clone(loaded).fit(paths, labels)
    assert again.score(paths, labels) == FewShotClassifier(classifier.encoder_, head).fit(paths, labels).score(
        paths, labels
    )
    assert [path.name for path in file.parent.iterdir()] == ["clf.smkd"]


@pytest.mark.parametrize("labels", [[0, 0, 4, 4], [False, False, True, True], ["a", "a", "é", "é"]])
def test_a_classifier_of_features_is_saved_with_its_labels(tmp_path: Path, labels: list[object]) -> None:
    values, _ = blobs((2, 2))
    FewShotClassifier().fit(values, labels).save(tmp_path / "f.smkd")
    loaded = FewShotClassifier.load(tmp_path / "f.smkd")
    assert loaded.predict(values).tolist() == labels
    assert loaded.encoder_ is None
    with pytest.raises(DataError, match="no backbone"):
        loaded.predict(["a.png"])


def test_wrong_files_are_one_line(place: Path, tmp_path: Path) -> None:
    file, classifier = tmp_path / "clf.smkd", fitted(place)
    classifier.save(file)
    whole = file.read_bytes()
    wrong = {
        "cut.smkd": (whole[:-100], "cut short"),
        "head.smkd": (whole[:500], "cut short"),
        "pickle.smkd": (pickle.dumps({"a": 1}), "not a file of `smkd fit`"),
        "bent.smkd": (whole.replace(b"temperature", b"temperaturf"), "temperature is missing; make it again"),
        "format.smkd": (whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'), "format 9; this smkd reads 1"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            FewShotClassifier.load(tmp_path / name)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.smkd")
    with pytest.raises(CheckpointError, match="other tensors; expected a file of `smkd fit`"):
        FewShotClassifier.load(tmp_path / "other.smkd")
    with pytest.raises(CheckpointError, match="was made by `smkd fit`; expected a file of `smkd index`"):
        ImageIndex.load(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        FewShotClassifier.load(tmp_path / "none.smkd")
    with pytest.raises(CheckpointError, match=r"cannot write .*Is a directory"):
        classifier.save(tmp_path)


def test_unreadable_images_are_named(place: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes((place / "support").rglob("*.png").__next__().read_bytes()[:60])
    classifier, (paths, _) = fitted(place), files(place / "rest")
    for item, message in ((bad, "bad.png"), (tmp_path / "none.png", "none.png': No such file"),
                          (np.zeros((4, 4, 2), np.uint8), r"number 1 .*expected uint8 \[height, width, 3\]"),
                          (3, "number 1 .*is a int")):  # fmt: skip
        with pytest.raises(DataError, match=message) as caught:
            classifier.predict([paths[0], item, paths[1]])
        assert "\n" not in str(caught.value)
    assert classifier.encoder_ is not None
    encoded = classifier.encoder_.readable([paths[0], bad, paths[1]])
    assert encoded.rows.tolist() == [0, 2]
    assert len(encoded.unreadable) == 1
    with pytest.raises(DataError, match="5 features, but those of the backbone"):
        FewShotClassifier(classifier.encoder_).fit(np.ones((4, 5)), [0, 0, 1, 1])


def test_nearest_images(place: Path, tmp_path: Path) -> None:
    encoder, (paths, _) = open_encoder(place / "net.pt", accelerator="cpu"), files(place / "support")
    ImageIndex(encoder, encoder(paths), [str(path) for path in paths]).save(tmp_path / "index.smkd")
    index = ImageIndex.load(tmp_path / "index.smkd", accelerator="cpu")
    query = index.encoder([paths[7]])
    found = index.search(query, top=4)[0]
    values = encoder(paths).astype(np.float64)
    cosines = values @ values[7] / np.linalg.norm(values, axis=1) / np.linalg.norm(values[7])
    assert [name for name, _ in found] == [str(paths[row]) for row in np.argsort(-cosines)[:4]]
    np.testing.assert_allclose([cosine for _, cosine in found], np.sort(cosines)[::-1][:4], atol=1e-6)
    assert len(index.search(query, top=99)[0]) == len(paths)
    with pytest.raises(ConfigError, match="top=0"):
        index.search(query, top=0)


def test_the_file_is_plain_safetensors_with_the_weights(place: Path, tmp_path: Path) -> None:
    fitted(place).save(tmp_path / "clf.smkd")
    with safe_open(tmp_path / "clf.smkd", "pt") as file:
        names = set(file.keys())
    assert {"support", "labels", "backbone.cls_token"} <= names
    assert isinstance(fitted(place).encoder_, Encoder)


def small_network(**options: Any) -> VisionTransformer:
    return VisionTransformer(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, **options)


@pytest.mark.parametrize("options", [{}, {"rotary": True, "swiglu": True}, {"drop_path": 0.1, "mask_token": True}])
def test_a_network_brings_its_configuration(options: dict[str, Any]) -> None:
    network = small_network(**options).train()
    encoder = open_encoder(network, "debug-pretrain", "cpu")
    assert encoder.config.model == network.config
    assert (network.config.embed_dim, network.config.depth, network.config.rotary) == (32, 2, "rotary" in options)


@pytest.mark.parametrize("change", [
    lambda network: setattr(network.blocks[1].attn, "num_heads", 4),
    lambda network: setattr(network.blocks[0].norm2, "eps", 0.1),
    lambda network: setattr(network, "rotary_dim", 16),
    lambda network: setattr(network, "norm", torch.nn.Identity()),
    lambda network: setattr(network.blocks[0], "ls1", torch.nn.GELU()),
    lambda network: setattr(network.blocks[0], "mlp", torch.nn.Linear(32, 32)),
    lambda network: setattr(network, "pos_embed", torch.nn.Parameter(torch.zeros(1, 5, 32))),
    lambda network: network.blocks.append(torch.nn.Identity()),
])  # fmt: skip
def test_a_network_that_was_changed_is_refused(change: Callable[[VisionTransformer], Any]) -> None:
    network = small_network()
    change(network)
    with pytest.raises(ConfigError, match="not one that settings describe"):
        open_encoder(network, "debug-pretrain", "cpu")
