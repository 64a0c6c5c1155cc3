"""Classifiers elsewhere: the program of one answers what `predict` does, and the Hub gives back what was pushed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from numpy.typing import NDArray

import foreign_files as files
import smkd
from classify_data import blobs
from command_line import refused
from command_line import smkd as typed
from export_runs import run_folder
from loopback_hub import LoopbackHub, served
from made_images import photographs
from smkd import FewShotClassifier
from smkd.classify import Encoder, ImageIndex, open_encoder
from smkd.classify.encoder import EncoderConfig
from smkd.classify.pictures import Pictures
from smkd.data.augment import resize_center_crop
from smkd.errors import ConfigError
from smkd.fewshot.heads import heads
from smkd.models.vit import VisionTransformer
from smkd.publishing.classifier_graph import classifier_program
from smkd.publishing.place import check_free

NETWORK = files.vit(register_tokens=2, layer_scale=1.0)
HEADS = (
    "prototype", "prototype:metric=euclidean", "simpleshot", "simpleshot:transform=cl2n", "knn", "knn:reference=true",
    "classifier:epochs=20", "classifier:loss=softmax,epochs=20", "logistic:c=10", "ridge",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three classes, others of four, and `clf.smkd`, which sees squares cut out of larger images."""
    folder = tmp_path_factory.mktemp("classifier")
    photographs(folder / "support", (5, 6, 7))
    photographs(folder / "rest", (3, 3, 3, 3), skip=7)
    run_folder(folder / "run", NETWORK, "evaluation.resize=40")
    fitted(folder, folder / "run", "knn", "1+2:cls+weighted_mean").save(folder / "clf.smkd")
    return folder


def fitted(place: Path, backbone: Any, head: str, reading: str = "own") -> FewShotClassifier:
    paths = sorted((place / "support").rglob("*.png"))
    made = FewShotClassifier(backbone, head, reading=reading, accelerator="cpu")
    return made.fit(paths, [path.parent.name for path in paths])


def rest(place: Path) -> list[Path]:
    return sorted((place / "rest").rglob("*.png"))


def squares(classifier: FewShotClassifier, paths: list[Path]) -> NDArray[np.uint8]:
    """What a caller of the program has to give it."""
    assert classifier.encoder_ is not None
    config, images = classifier.encoder_.config, Pictures(list(paths))
    return np.stack(
        [resize_center_crop(images.load(row), config.resize, config.crop).numpy() for row in range(len(paths))]
    )


def same(outputs: Any, classifier: FewShotClassifier, paths: list[Path], reject: float, gap: float) -> None:
    """Outputs of a program, against the classifier itself."""
    probabilities, answer, known = (np.asarray(output) for output in outputs)
    np.testing.assert_allclose(probabilities, classifier.predict_proba(paths), rtol=0, atol=gap)
    np.testing.assert_allclose(known, classifier.known_proba(paths), rtol=0, atol=gap)
    names = [None if place < 0 else classifier.classes_[place] for place in answer]
    assert names == classifier.predict(paths, reject=reject).tolist()


@pytest.fixture(scope="module")
def network(place: Path) -> Encoder:
    return open_encoder(place / "run", accelerator="cpu")


@pytest.mark.parametrize("head", HEADS)
def test_the_graph_of_every_head_is_the_classifier(place: Path, network: Encoder, head: str) -> None:
    classifier = fitted(place, network, head)
    work = classifier_program(classifier, reject=0.6, license="")
    with torch.inference_mode():
        outputs = work.graph(torch.from_numpy(squares(classifier, rest(place))))
    same(outputs, classifier, rest(place), 0.6, 1e-6)
    # both kinds of answers, or nothing was compared
    assert 0 < (outputs[1] < 0).sum() < len(outputs[1])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["knn", "simpleshot:transform=cl2n"])
def test_onnx_of_colours(place: Path, tmp_path: Path, head: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    classifier = fitted(place, "pixels", head)
    classifier.save(tmp_path / "c.smkd")
    path = smkd.export(tmp_path / "c.smkd", "onnx", tmp_path / "c.onnx", reject=0.5).path
    images = squares(classifier, rest(place))
    same(onnxruntime.InferenceSession(path).run(None, {"images": images}), classifier, rest(place), 0.5, 1e-5)


@pytest.mark.slow
def test_onnx(place: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    classifier = FewShotClassifier.load(place / "clf.smkd", "cpu")
    done = typed("export", place / "clf.smkd", "--to", "onnx", "--reject", 0.5, "--license", "mit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("checked: onnxruntime and PyTorch differ by at most ")
    assert last == "written: clf.onnx"
    session = onnxruntime.InferenceSession(tmp_path / "clf.onnx")
    images = squares(classifier, rest(place))
    for count in (1, 5, len(images)):
        outputs = session.run(["probabilities", "answer", "known"], {"images": images[:count]})
        same(outputs, classifier, rest(place)[:count], 0.5, 1e-4)
    [given] = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    about = session.get_modelmeta().custom_metadata_map
    found = {
        key: json.loads(about[key]) for key in ("classes", "images", "reject", "resize", "crop", "mean", "left_out")
    }
    assert found["classes"] == classifier.classes_.tolist()
    assert (found["images"], found["reject"], found["resize"], found["crop"]) == ([5, 6, 7], 0.5, 40, 32)
    assert found["mean"] == [0.5] * 3
    assert found["left_out"]["mean"] == pytest.approx(classifier.left_out_.mean)
    assert (about["features"], about["head"], about["license"]) == ("1+2:cls+weighted_mean", "knn", "mit")
    assert (about["backbone"], about["version"]) == ("run", smkd.__version__)
    check_free(tmp_path / "clf.onnx", is_folder=False, suffix="", overwrite=False)  # a former export


@pytest.mark.slow
def test_torch_export(place: Path, tmp_path: Path) -> None:
    classifier = FewShotClassifier.load(place / "clf.smkd", "cpu")
    written = smkd.export(place / "clf.smkd", "torch-export", tmp_path / "c.pt2", reject=0.5)
    assert written.report[0].startswith("checked: the reloaded program and PyTorch differ by at most 0")
    program = torch.export.load(written.path).module()
    with torch.inference_mode():
        outputs = program(torch.from_numpy(squares(classifier, rest(place))))
    same(outputs, classifier, rest(place), 0.5, 1e-6)


def test_without_familiarity_there_is_no_chance_to_be_known(place: Path, network: Encoder, tmp_path: Path) -> None:
    photographs(tmp_path / "support", (1, 1, 1))
    classifier = fitted(tmp_path, network, "prototype")
    classifier.save(tmp_path / "c.smkd")
    work = classifier_program(classifier, reject=None, license="")
    assert work.outputs == ("probabilities", "answer")
    with torch.inference_mode():
        probabilities, answer = work.graph(torch.from_numpy(squares(classifier, rest(place))))
    np.testing.assert_allclose(probabilities, classifier.predict_proba(rest(place)), rtol=0, atol=1e-6)
    assert classifier.classes_[answer].tolist() == classifier.predict(rest(place)).tolist()
    assert work.about["left_out"] is None
    folder = smkd.export(tmp_path / "c.smkd", "hub", tmp_path / "hub").path
    assert "Unknown: no class has two images" in (folder / "README.md").read_text()
    shutil.rmtree(folder)
    said = refused("export", "c.smkd", "--to", "torch-export", "--reject", "0.5", cwd=tmp_path)
    assert said == "smkd: --reject needs a class with two or more images, to learn what is familiar"


def test_heads_that_no_program_can_have(
    place: Path, network: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(place, network, "bd-cspn").save(tmp_path / "c.smkd")
    for form in ("onnx", "torch-export"):
        said = refused("export", "c.smkd", "--to", form, cwd=tmp_path)
        assert "head 'bd-cspn' looks at all images of a call together, and a program answers each by itself" in said
        assert "--head auto or logistic" in said
    plain = lambda support, labels, query, generator: query @ support[:, :3].mT  # noqa: E731
    monkeypatch.setitem(heads.registered, "plain-centre", lambda: plain)
    fitted(place, network, "plain-centre").save(tmp_path / "p.smkd")
    said = refused("export", "p.smkd", "--to", "onnx", cwd=tmp_path)
    assert "head 'plain-centre' is no smkd.fewshot.InductiveHead" in said
    # the Hub takes it: there smkd answers
    assert typed("export", "c.smkd", "--to", "hub", cwd=tmp_path).returncode == 0


def test_the_card(place: Path, tmp_path: Path) -> None:
    done = typed("export", place / "clf.smkd", "--to", "hub", "--license", "cc-by-4.0", cwd=tmp_path)
    assert done.stdout == "written: clf-hub\n"
    folder = tmp_path / "clf-hub"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "classifier.smkd"]
    classifier = FewShotClassifier.load(place / "clf.smkd", "cpu")
    card, left = ModelCard.load(folder / "README.md"), classifier.left_out_
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc-by-4.0", "smkd", "clf")
    assert card.data.pipeline_tag == "image-classification"
    for each, count in zip(left.by_class, (5, 6, 7), strict=True):
        assert f"| {each.name} | {count} | {each.right} of {count} |" in card.text
    low, high = (100 * bound for bound in left.interval)
    assert f"{100 * left.mean:.1f} % (95 % interval {low:.1f} to {high:.1f}), the mean over 3 classes" in card.text
    assert f"- `--reject 0.5` {left.threshold(0.5)}" in card.text
    for part in ("| backbone | run |", "| its licence | cc-by-4.0 |", "| head | knn |", "resized to 40 pixels"):
        assert part in card.text
    back = FewShotClassifier.load(folder, "cpu")
    assert np.array_equal(back.predict_proba(rest(place)), classifier.predict_proba(rest(place)))
    # it survives the way through a file, the licence too; and a former export may be replaced
    again = smkd.export(folder, "hub", tmp_path / "again").path
    assert smkd.export(folder, "hub", again).path == again
    assert "cc-by-4.0" in (again / "README.md").read_text()
    for file in (*folder.iterdir(), *again.iterdir()):
        assert str(place).encode() not in file.read_bytes()


def test_a_folder_of_a_backbone_is_no_classifier(place: Path, tmp_path: Path) -> None:
    """Also where a classifier was put into it."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copy(place / "clf.smkd", tmp_path / "run" / "classifier.smkd")
    folder = smkd.export(tmp_path / "run", "timm", tmp_path / "published").path
    shutil.copy(place / "clf.smkd", folder / "classifier.smkd")
    assert isinstance(smkd.from_pretrained(smkd.export(folder, "hub", tmp_path / "hub").path), VisionTransformer)
    assert (folder / "classifier.smkd").exists()


def test_a_card_keeps_to_its_table(network: Encoder, tmp_path: Path) -> None:
    paths = sorted(photographs(tmp_path / "support", (2, 2)).rglob("*.png"))
    names = ["a|b <script>", "[x](y)"]
    classifier = FewShotClassifier(network).fit(paths, [names[row // 2] for row in range(4)])
    classifier.save(tmp_path / "c.smkd")
    text = (smkd.export(tmp_path / "c.smkd", "hub", tmp_path / "hub").path / "README.md").read_text()
    assert r"| a\|b \<script\> | 2 |" in text
    assert r"| \[x\](y) | 2 |" in text


def test_to_the_hub_and_back(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = LoopbackHub()

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        hub.files |= {f"{repo_id}@main/{file.name}": file.read_bytes() for file in folder_path.iterdir()}

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    words = ("export", place / "clf.smkd", "--to", "hub", "--repo", "org/parts")
    assert typed(*words, cwd=tmp_path).stdout == ("pushed: https://huggingface.co/org/parts\nwritten: clf-hub\n")
    assert 'FewShotClassifier.load("hf:org/parts")' in hub.files["org/parts@main/README.md"].decode()
    hub.files["org/backbone@main/model.safetensors"] = b""
    with served(hub, tmp_path / "cache", monkeypatch):
        wanted = typed("predict", place / "clf.smkd", place / "rest")
        assert typed("predict", "hf:org/parts", place / "rest").stdout == wanted.stdout
        back = FewShotClassifier.load("hf:org/parts/classifier.smkd")
        assert back.classes_.tolist() == FewShotClassifier.load(place / "clf.smkd").classes_.tolist()
        out = tmp_path / "again"
        smkd.export("hf:org/parts/classifier.smkd", "hub", out)
        assert (out / "classifier.smkd").read_bytes() == hub.files["org/parts@main/classifier.smkd"]
        said = refused("predict", "hf:org/backbone", place / "rest")
        assert "'hf:org/backbone' holds no classifier; looked for classifier.smkd" in said
    assert "GET org/parts@main/config.json" not in hub.asked


def test_whose_weights_they_are(place: Path, tmp_path: Path) -> None:
    exported = smkd.export(place / "run", "safetensors", tmp_path / "x.safetensors", license="mit").path
    config = open_encoder(exported, accelerator="cpu").config
    assert (config.source, config.license) == ("x.safetensors", "mit")
    for where in (place / "run", place / "run" / "checkpoints" / "best.pt"):
        config = open_encoder(where, accelerator="cpu").config
        assert (config.source, config.license) == ("run", "unknown")
    folder = smkd.export(place / "run", "timm", tmp_path / "published").path
    assert open_encoder(folder, accelerator="cpu").config.source == "published"
    config = open_encoder("pixels").config
    assert (config.source, config.license) == ("", "unknown")
    shutil.copy(exported, tmp_path / "a\nb.safetensors")
    assert open_encoder(tmp_path / "a\nb.safetensors", accelerator="cpu").config.source == ""
    for text in ("a\nb", "x" * 1000):
        with pytest.raises(ValueError, match="source"):
            EncoderConfig(source=text)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "timm"], "--to timm is for backbones, and this is a classifier: give onnx, torch-export, hub"),
        (["--to", "safetensors"], "--to safetensors is for backbones"),
        (["--to", "onx"], "--to onx: unknown form; did you mean 'onnx'?"),
        (["--to", "onnx", "--image-size", "64"], "--image-size is for backbones; a classifier has settings of its own"),
        (["--to", "onnx", "--dynamic-size"], "--dynamic-size is for backbones"),
        (["--to", "onnx", "--network", "student"], "--network is for backbones"),
        (["--to", "onnx", "--recipe", "debug-pretrain"], "--recipe is for backbones"),
        (["--to", "onnx", "--repo", "a/b"], "--repo is for --to hub, not for onnx"),
        (["--to", "hub", "--reject", "0.5"], "--reject is for --to onnx and torch-export, not for hub"),
        (["--to", "onnx", "-o", "clf.smkd"], "'clf.smkd' is read by the same call and would be replaced"),
        (["--to", "onnx", "-o", "other.smkd"], "'other.smkd' exists and is no former export; choose another"),
        (["--to", "onnx", "-o", "new.jpg"], "'new.jpg' exists and is no former export; choose another"),
        (["--to", "hub", "-o", "new.jpg"], "'new.jpg' is a file; this form is a folder"),
        (["--to", "hub", "-o", "support"], "'support' is not empty and no former export"),
        (["--to", "hub", "-o", "models"], "'models' is not empty and no former export"),
        (["--to", "hub", "-o", "mine"], "'mine' is not empty and no former export"),
    ],
)
def test_wrong_words(place: Path, tmp_path: Path, words: list[str], says: str) -> None:
    shutil.copy(place / "clf.smkd", tmp_path / "clf.smkd")
    shutil.copy(place / "clf.smkd", tmp_path / "other.smkd")
    shutil.copytree(place / "support", tmp_path / "support")
    for name in ("models", "mine"):  # what `smkd fit -o models/classifier.smkd` leaves
        (tmp_path / name).mkdir()
        shutil.copy(place / "clf.smkd", tmp_path / name / "classifier.smkd")
    (tmp_path / "mine" / "README.md").write_text("my own")
    (tmp_path / "new.jpg").write_bytes(rest(place)[0].read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert says in refused("export", "clf.smkd", *words, cwd=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_sources_that_are_none(place: Path, network: Encoder, tmp_path: Path) -> None:
    values, labels = blobs((3, 3))
    FewShotClassifier().fit(values, labels).save(tmp_path / "features.smkd")
    ImageIndex(network, np.ones((1, network.dim), np.float32), ["a"]).save(tmp_path / "album.smkd")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "new.jpg").write_bytes(rest(place)[0].read_bytes())
    (tmp_path / "cut.smkd").write_bytes((place / "clf.smkd").read_bytes()[:-100])
    for source, says in (
        ("features.smkd", "was made from features and has no backbone to look at images with"),
        ("album.smkd", "'album.smkd' was made by `smkd index`; expected a run, weights, or a file of `smkd fit`"),
        ("notes.txt", "damaged, or not a file of PyTorch or safetensors"),
        ("new.jpg", "damaged, or not a file of PyTorch or safetensors"),
        ("cut.smkd", "damaged"),
        ("none.smkd", "'none.smkd' does not exist; expected a file"),
    ):
        for form in ("onnx", "hub"):
            assert says in refused("export", source, "--to", form, cwd=tmp_path), source
    said = refused("export", place / "run", "--to", "onnx", "--reject", "0.5", cwd=tmp_path)
    assert said == "smkd: --reject is for classifiers, which are files of `smkd fit`"
    for reject in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="should be between 0 and 1"):
            smkd.export(place / "clf.smkd", "onnx", tmp_path / "x.onnx", reject=reject)
    with pytest.raises(ConfigError, match="is the classifier itself; choose another"):
        smkd.export(place / "clf.smkd", "onnx", place / "clf.smkd", overwrite=True)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_packages(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused("export", place / "clf.smkd", "--to", "onnx", cwd=tmp_path)
    assert "--to onnx needs the extra: pip install 'smkd[onnx]'" in said
