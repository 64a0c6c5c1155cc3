"""Features that cannot be computed with, or come in another container: refused in one line, or right; on every road."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from classify_data import blobs, tiny_network
from made_images import photographs
from smkd import fewshot
from smkd.app import support as app_support
from smkd.classify import Encoder, EncoderConfig, FewShotClassifier, ImageIndex, open_encoder
from smkd.config.loading import resolve
from smkd.config.protocol import FeaturesConfig
from smkd.data.datasets import DatasetSpec
from smkd.data.images import FolderImages
from smkd.errors import CheckpointError, DataError, SmkdError
from smkd.fewshot.features import backbone_stream

X, Y = blobs((6, 6, 6, 6, 6, 6))
BAD = {"nan": np.nan, "infinite": np.inf, "minus infinite": -np.inf, "too large for squares": 3e25}


def refused(call: Callable[[], Any], *said: str) -> str:
    with pytest.raises(DataError) as raised:
        call()
    line = str(raised.value)
    assert "\n" not in line
    for part in said:
        assert part in line
    return line


def spoiled(value: float, row: int = 4) -> NDArray[np.float64]:
    values = X.copy()
    values[row, 1] = value
    return values


def changed(path: Path, name: str, row: int, value: float) -> Path:
    """A file of ours with one number of one tensor changed."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name][row, 0] = value
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    photographs(folder, (3, 3))
    return sorted(folder.rglob("*.png"))


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_rows_that_cannot_be_computed_with(value: float, tmp_path: Path) -> None:
    values = spoiled(value)
    refused(lambda: fewshot.evaluate(values, Y, query=3, episodes=5), "features: 1 of 36 rows", "rows 4", "'kind 0'")
    refused(
        lambda: fewshot.evaluate(X, Y, head="simpleshot:transform=cl2n", query=3, episodes=5, base_features=values),
        "base_features: 1 of 36 rows", "rows 4",
    )  # fmt: skip
    refused(lambda: FewShotClassifier().fit(values, Y), "X: 1 of 36 rows", "rows 4")
    classifier = FewShotClassifier().fit(X, Y)
    for call in (classifier.predict, classifier.predict_proba, classifier.known_proba, classifier.features):
        refused(lambda call=call: call(values), "X: 1 of 36 rows", "rows 4")  # type: ignore[misc]
    refused(lambda: FewShotClassifier().fit(X, Y).partial_fit(values, Y), "X: 1 of 36 rows")

    classifier.save(tmp_path / "clf.smkd")
    refused(lambda: FewShotClassifier.load(changed(tmp_path / "clf.smkd", "support", 5, value)), "clf.smkd", "rows 5")
    encoder = open_encoder("pixels")
    features = np.ones((3, encoder.dim), np.float32)
    ImageIndex(encoder, features, ["a.png", "b.png", "c.png"]).save(tmp_path / "index.smkd")
    refused(lambda: ImageIndex.load(changed(tmp_path / "index.smkd", "features", 1, value)), "rows 1", "'b.png'")
    bent = features.copy()
    bent[2, 3] = value
    refused(lambda: ImageIndex(encoder, features, ["a", "b", "c"]).search(bent), "query: 1 of 3 rows", "rows 2")


def test_weights_of_a_file_that_are_not_finite(pictures: list[Path], tmp_path: Path) -> None:
    encoder = open_encoder(tiny_network(), "debug-pretrain", "cpu")
    FewShotClassifier(encoder).fit(pictures, ["a"] * 3 + ["b"] * 3).save(tmp_path / "clf.smkd")
    name = "backbone.blocks.0.mlp.fc1.weight"
    with pytest.raises(CheckpointError, match=f"numbers of {name} are NaN or infinite"):
        FewShotClassifier.load(changed(tmp_path / "clf.smkd", name, 0, np.nan))


def overflowing() -> Encoder:
    """A network that gives NaN for a white image and numbers for others."""
    network = tiny_network()
    forward = network.last_blocks

    def last_blocks(x: torch.Tensor, blocks: int) -> Any:
        tokens = forward(x, blocks)
        white = (x > 0.99).flatten(1).all(dim=1)
        return [each._replace(cls=torch.where(white[:, None], torch.nan, each.cls)) for each in tokens]

    network.last_blocks = last_blocks  # type: ignore[method-assign]
    config = EncoderConfig.of_run(resolve("debug-pretrain"), resolve("debug-pretrain").model)
    return Encoder(config, network, accelerator="cpu")


def test_what_a_network_gives_for_an_image(pictures: list[Path], tmp_path: Path) -> None:
    encoder = overflowing()
    white = tmp_path / "white.png"
    Image.new("RGB", (40, 40), "white").save(white)
    assert np.isfinite(encoder(pictures)).all()
    for call in (
        lambda: encoder([*pictures, white]),
        lambda: FewShotClassifier(encoder).fit([*pictures, white], ["a"] * 3 + ["b"] * 4),
        lambda: app_support.taken(encoder, [*map(str, pictures), str(white)]),
    ):
        refused(call, str(white), "NaN or infinite", "weights")
    (tmp_path / "tree" / "white").mkdir(parents=True)
    white.rename(tmp_path / "tree" / "white" / "w.png")
    stream = backbone_stream(
        encoder.backbone, FolderImages(tmp_path / "tree"), DatasetSpec((0.5,) * 3, (0.25,) * 3), FeaturesConfig(),
        resize=32, crop=32, device=torch.device("cpu"), on_error="skip",
    )  # type: ignore[arg-type]  # fmt: skip
    refused(stream.collect, "w.png", "NaN or infinite")


def test_features_of_training_classes_are_of_the_same_kind() -> None:
    for other in (X[:, :1], X[:, :9]):
        line = refused(
            lambda other=other: fewshot.evaluate(  # type: ignore[misc]
                X, Y, head="simpleshot:transform=cl2n", query=3, episodes=5, base_features=other
            )
        )
        assert f"have {other.shape[1]} numbers, those to be measured 16" in line
    assert fewshot.evaluate(X, Y, head="simpleshot:transform=cl2n", query=3, episodes=5, base_features=X).mean > 50


# ---- containers


def test_frames_series_and_lists_are_arrays() -> None:
    pandas = pytest.importorskip("pandas")
    whole = fewshot.evaluate(X, Y, query=3, episodes=20)
    index = np.random.default_rng(0).permutation(len(X)) + 100  # what rows are called is no place
    frame, series = pandas.DataFrame(X, index=index), pandas.Series(Y, index=index)
    for labels in (series, series.astype("category"), series.to_frame(), Y.astype(object), Y.tolist(), tuple(Y)):
        for values in (frame, X.tolist(), torch.from_numpy(X)):
            assert fewshot.evaluate(values, labels, query=3, episodes=20) == whole
    numbers = pandas.Series(np.repeat(np.arange(6), 6), index=index)
    assert fewshot.evaluate(frame, numbers, query=3, episodes=20).mean == whole.mean
    expected = FewShotClassifier().fit(X, Y).predict_proba(X)
    for labels in (series, Y.tolist()):
        np.testing.assert_array_equal(FewShotClassifier().fit(frame, labels).predict_proba(frame), expected)


def test_images_in_a_series_are_taken_by_their_place(pictures: list[Path]) -> None:
    pandas = pytest.importorskip("pandas")
    names, labels = list(map(str, pictures)), ["a"] * 3 + ["b"] * 3
    classifier = FewShotClassifier("pixels").fit(names, labels)
    expected = classifier.predict_proba(names)
    for given in (
        pandas.Series(names, index=range(5, -1, -1)), pandas.Series(pictures, index=list("uvwxyz")),
        pandas.DataFrame({"path": names}, index=range(10, 16)), np.array(names), np.array(pictures), tuple(names),
    ):  # fmt: skip
        np.testing.assert_array_equal(classifier.predict_proba(given), expected)
        np.testing.assert_array_equal(open_encoder("pixels")(given), classifier.support_)
        again = FewShotClassifier("pixels").fit(given, pandas.Series(labels, index=range(3, 9)))
        np.testing.assert_array_equal(again.support_, classifier.support_)


def test_what_has_no_rows_is_refused(pictures: list[Path]) -> None:
    values = dict(zip("abcdef", X, strict=False))
    for given, kind in (
        ((row for row in X), "generator"), (map(tuple, X), "map"), (iter(X), "iterator"), (values, "dict"),
        (values.values(), "dict_values"), ({1.0, 2.0}, "set"),
    ):  # fmt: skip
        for call in (
            lambda given=given: fewshot.evaluate(given, Y),
            lambda given=given: FewShotClassifier().fit(given, Y),
            lambda given=given: FewShotClassifier().fit(X, Y).predict(given),
            lambda given=given: open_encoder("pixels")(given),
        ):
            line = refused(call, "give a list", kind)  # type: ignore[arg-type]
            assert line.startswith(("X is a", "features is a"))
    refused(lambda: FewShotClassifier().fit(X, (label for label in Y)), "y is a generator; give a list")
    refused(lambda: fewshot.evaluate(X, (label for label in Y)), "labels is a generator; give a list")
    refused(
        lambda: FewShotClassifier("pixels").fit((path for path in pictures), ["a"]), "X is a generator; give a list"
    )


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        ([[1.0, 2.0], [3.0]], ["a", "b"], "features: "),
        (X, [None, *Y[1:]], "labels are object, expected integers or text"),
        (X, np.where(np.arange(36) == 3, np.nan, 1.0), "labels are float64"),
        (X.astype(object), Y, "features are object"),
        (X.astype(int), Y, "expected floats"),
        (X, Y.reshape(18, 2), "labels"),
    ],
    ids=str,
)
def test_other_contents_are_refused(values: Any, labels: Any, said: str) -> None:
    with pytest.raises(SmkdError) as raised:
        fewshot.evaluate(values, labels)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
