"""Published backbones by name: listed, fetched once from a hub on this machine, refused in one line."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

import foreign_files
from loopback_hub import LoopbackHub, served, use
from smkd import FewShotClassifier, api
from smkd.cli import app
from smkd.config import published
from smkd.config.run_config import ModelConfig
from smkd.config.user import default_backbone
from smkd.engine import checkpoint
from smkd.errors import CheckpointError, ConfigError, SmkdError
from smkd.models.vit import VisionTransformer
from smkd.weights import fetch
from smkd.weights.catalogue import CATALOGUE

pytestmark = pytest.mark.slow

GAZE = Path(__file__).parents[2] / "shared" / "weights" / "vit-small-14-gaze" / "model.safetensors"
TINY = ModelConfig(embed_dim=64, depth=2, num_heads=1, patch_size=14, image_size=70, layer_scale=1.0)
KNOWN = CATALOGUE["dinov2-small"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user who runs the tests, and a folder of one's own."""
    monkeypatch.delenv("SMKD_BACKBONE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer.from_config(TINY).requires_grad_(False).eval()


@pytest.fixture
def hub(tmp_path: Path, network: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub that has a small network in the place of dinov2-small."""
    weights = foreign_files.transformers(network, kind="dinov2")
    content = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
    monkeypatch.setitem(CATALOGUE, KNOWN.name, replace(KNOWN, sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.setitem(published.ARCHITECTURES, KNOWN.name, TINY)
    made = LoopbackHub({f"{KNOWN.repository}@{KNOWN.revision}/{KNOWN.file}": content})
    with served(made, tmp_path / "cache", monkeypatch):
        yield made


def photographs(root: Path, classes: int = 2, images: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            pixels = rng.normal(60 + 120 * label, 20, (40, 44, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def done(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if code == 2:
        assert isinstance(result.exception, SmkdError), result.output
        assert "\n" not in str(result.exception)
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_catalogue_is_of_these_architectures() -> None:
    """What is stated of each agrees with the network that its architecture makes."""
    assert CATALOGUE.keys() == published.ARCHITECTURES.keys()
    for known in CATALOGUE.values():
        with torch.device("meta"):
            count = sum(weight.numel() for weight in VisionTransformer.from_config(known.model).parameters()) / 1e6
        assert known.parameters == pytest.approx(count, abs=0.06)
        assert known.megabytes is None or known.megabytes == pytest.approx(4 * count, abs=1)
        assert known.repository is None or re.fullmatch(r"[0-9a-f]{40}", known.revision)
        assert known.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", known.sha256)


def test_they_are_listed_and_found_where_they_are(hub: LoopbackHub) -> None:
    def row(name: str) -> str:
        return next(line for line in done("backbones").splitlines() if line.startswith(f"{name} "))

    assert re.search(
        r"22\.1 M +14 +Apache-2\.0 +88 MB +no +https://huggingface\.co/facebook/dinov2-small$", row(KNOWN.name)
    )
    assert "DINOv3 License (gated)" in row("dinov3-vits16")
    assert re.search(r" no +https://drive\.google\.com/", row("smkd-mini-imagenet"))
    fetch.locate_weights(KNOWN.name)
    assert " yes " in row(KNOWN.name)
    by_hand = CATALOGUE["smkd-mini-imagenet"].place
    by_hand.parent.mkdir(parents=True)
    by_hand.touch()
    assert " yes " in row("smkd-mini-imagenet")


def test_a_classifier_says_whose_backbone_it_holds(hub: LoopbackHub, tmp_path: Path) -> None:
    done("fit", photographs(tmp_path / "photos"), "-o", "clf.smkd", "--backbone", KNOWN.name)
    config = FewShotClassifier.load("clf.smkd").encoder_.config
    assert (config.source, config.license) == (KNOWN.name, "Apache-2.0")
    done("export", "clf.smkd", "--to", "hub")
    card = ModelCard.load(tmp_path / "clf-hub" / "README.md")
    assert card.data.license == "apache-2.0"
    for row in (KNOWN.name, KNOWN.licence, KNOWN.page, KNOWN.trained_on):
        assert f" | {row} |" in card.text
    done("export", "clf.smkd", "--to", "hub", "--license", "DINOv3 License")
    assert ModelCard.load(tmp_path / "clf-hub" / "README.md").data.license == "other"


def test_a_name_is_fetched_once_at_its_revision(hub: LoopbackHub, network: VisionTransformer) -> None:
    images = torch.randn(1, 3, 70, 70)
    for _ in range(2):
        torch.testing.assert_close(api.load(KNOWN.name)(images).cls, network(images).cls)
    place = f"{KNOWN.repository}@{KNOWN.revision}/{KNOWN.file}"
    assert hub.asked.count(f"GET {place}") == 1
    assert all(place in asked for asked in hub.asked)
    before = len(hub.asked)
    api.load(KNOWN.name)
    assert len(hub.asked) == before  # the hub need not be there any more


@pytest.mark.parametrize("verb", ["fit", "index"])
def test_verbs_take_it_unasked_and_say_so(hub: LoopbackHub, tmp_path: Path, verb: str) -> None:
    photos = photographs(tmp_path / "photos")
    first = done(verb, photos, "-o", "a.smkd").splitlines()[0]
    size = "dinov2-small (22.1 M parameters, licence: Apache-2.0, 88 MB)"
    assert first == f"backbone: {size}, as no --backbone is given; to be fetched once"
    assert done(verb, photos, "-o", "a.smkd").splitlines()[0].endswith("as no --backbone is given; already here")
    assert "backbone: " not in done(verb, photos, "-o", "b.smkd", "--backbone", "pixels").splitlines()[0]


def test_another_default(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = photographs(tmp_path / "photos")
    file = tmp_path / "config" / "smkd" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("backbone: pixels\n")
    assert done("fit", photos, "-o", "a.smkd").startswith(f"backbone: pixels, as {file} says\n")
    monkeypatch.setenv("SMKD_BACKBONE", "nowhere.pt")
    assert done("fit", photos, "-o", "a.smkd", code=2).startswith("'nowhere.pt' does not exist; expected")
    monkeypatch.setenv("SMKD_BACKBONE", "")
    assert default_backbone() == ("pixels", str(file))
    for text, says in {
        "backbones: pixels": r"config\.yaml': unknown key 'backbones'; did you mean 'backbone'\?$",
        "backbone: [a]": r"config\.yaml': backbone should be a name of",
        "backbone: ''": r"backbone should be a name of",
        "- a": r"config\.yaml' must hold keys and values$",
        "a: b: c": r"config\.yaml', line 1 is not valid YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            default_backbone()
    for text in ("", "# nothing\n", "{}"):
        file.write_text(text)
        assert default_backbone() == ("dinov2-small", "")


def test_runs_start_from_a_name(hub: LoopbackHub, network: VisionTransformer, tmp_path: Path) -> None:
    """The run takes the architecture and whole patches; on a folder without classes."""
    album = photographs(tmp_path / "album", classes=1, images=6) / "class-0"
    words = [f"data={album}", f"init={KNOWN.name}", "epochs=1", "batch_size=4", "accelerator=cpu", "optim.lr=1e-12",
             "optim.lr_end=0", "optim.teacher_momentum=1.0", "head.num_prototypes=8", "head.hidden_dim=8",
             "global_views.size=70", "local_views.size=28", "out=run"]  # fmt: skip
    said = done("pretrain", "folder-pretrain", *words)
    assert "set for init=dinov2-small: model.patch_size=14 model.image_size=70 model.embed_dim=64 model.depth=2" in said
    assert "evaluation.crop=308" in said
    state = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    name = "blocks.1.mlp.fc1.weight"
    torch.testing.assert_close(state["teacher"][f"backbone.{name}"], network.state_dict()[name])
    done("pretrain", "folder-pretrain", *words)  # goes on with the same settings
    with pytest.raises(ConfigError, match=r"local_views\.size=27 is not divisible by model\.patch_size=14; use 14"):
        api.resolve("folder-pretrain", [f"init={KNOWN.name}", "local_views.size=27"])
    typed = api.resolve("folder-pretrain", [f"init={KNOWN.name}", "model.image_size=140", "model.drop_path=0.3"]).model
    assert (typed.image_size, typed.patch_size, typed.drop_path) == (140, 14, 0.3)


def test_adapt_takes_a_name(hub: LoopbackHub, tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos", images=8)
    said = done(
        "adapt", photos, "-o", "run", "epochs=1", "batch_size=4", "accelerator=cpu", "head.num_prototypes=8",
        "head.hidden_dim=8", "num_workers=0",
    )  # fmt: skip
    assert said.startswith("backbone: dinov2-small (")
    assert "held-out images" in said


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("dinov2-smal", "did you mean 'dinov2-small'?"),
        ("DINOv2-Small", "did you mean 'dinov2-small'?"),
        ("dinov3-vit-s16", "did you mean 'dinov3-vits16'?"),
        ("facebook/dinov2-small", "did you mean 'hf:facebook/dinov2-small'?"),
        ("smkd-miniimagenet", "did you mean 'smkd-mini-imagenet'?"),
        ("clf.pt", "or a name of `smkd backbones`"),
    ],
)  # fmt: skip
def test_a_misspelt_name(source: str, says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        fetch.locate_weights(source)
    assert str(error.value).endswith(says)


def test_a_machine_without_network_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub
) -> None:
    """The Hub's own library would ask a name that nobody knows five times more, and write ten lines about it."""
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits"))
    use("http://hub.invalid", tmp_path / "away", monkeypatch)
    line = done("fit", photographs(tmp_path / "photos"), "-o", "a.smkd", code=2)
    assert line.startswith("cannot reach the Hub for 'dinov2-small'; put http://hub.invalid/facebook/")


def test_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    """One line that says what to put where; a file that is put there is taken."""
    content = next(iter(hub.files.values()))
    monkeypatch.setattr("time.sleep", lambda _: None)
    use("http://127.0.0.1:9", tmp_path / "away", monkeypatch)
    place = tmp_path / "away" / "smkd" / "weights" / "dinov2-small" / "model.safetensors"
    line = done("fit", photographs(tmp_path / "photos"), "-o", "a.smkd", code=2)
    url = f"http://127.0.0.1:9/facebook/dinov2-small/resolve/{KNOWN.revision}/model.safetensors"
    assert line == (
        f"cannot reach the Hub for 'dinov2-small'; put {url} at '{place}', or take 'pixels', which needs no network"
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert fetch.locate_weights("dinov2-small") == place
    place.write_bytes(b"another file")
    found = hashlib.sha256(b"another file").hexdigest()
    with pytest.raises(CheckpointError, match=rf"'{place}' is not dinov2-small: it has SHA-256 {found}, expected"):
        fetch.locate_weights("dinov2-small")


def test_another_file_on_the_hub(hub: LoopbackHub) -> None:
    place, content = hub.files.popitem()
    hub.files[place] = b"another file"
    with pytest.raises(CheckpointError, match=r"is not dinov2-small: .*; remove it, and the same command fetches") as e:
        fetch.locate_weights("dinov2-small")
    Path(str(e.value).split("'")[1]).unlink()  # what it says
    hub.files[place] = content
    assert fetch.locate_weights("dinov2-small").read_bytes() == content
    hub.files.clear()
    with pytest.raises(CheckpointError, match=r"'dino-vits16' is no longer at http.*pytorch_model\.bin; a copy of it"):
        fetch.locate_weights("dino-vits16")


def test_a_download_that_breaks_off(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut.add("facebook/dinov2-small")
    with pytest.raises(CheckpointError, match=r"'dinov2-small'.*; put http.* at '.*', or take 'pixels'"):
        fetch.locate_weights("dinov2-small")
    hub.cut.clear()
    assert fetch.locate_weights("dinov2-small").is_file()


def test_a_gated_one(hub: LoopbackHub) -> None:
    hub.gated.add("facebook/dinov3-vits16-pretrain-lvd1689m")
    page = "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m"
    for source in ("dinov3-vits16", "hf:facebook/dinov3-vits16-pretrain-lvd1689m"):
        with pytest.raises(CheckpointError) as error:
            fetch.locate_weights(source)
        licence = "the DINOv3 License" if source == "dinov3-vits16" else "a licence"
        assert str(error.value) == (
            f"'{source}' is for those who have accepted {licence}: do so at {page}, then say who you are "
            "(`hf auth login`, or HF_TOKEN) and give the same command"
        )


def test_one_that_is_fetched_by_hand(hub: LoopbackHub) -> None:
    place = CATALOGUE["smkd-fc100"].place
    with pytest.raises(
        CheckpointError, match=rf"^'smkd-fc100' cannot be fetched by a program: put .* at '{place}', or"
    ):
        fetch.locate_weights("smkd-fc100")


def test_a_full_disk(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    for source in ("dinov2-small", "hf:org/name"):
        with pytest.raises(CheckpointError) as error:
            fetch.locate_weights(source)
        assert str(error.value) == (
            f"cannot write '{tmp_path / 'cache' / 'hub'}': No space left on device; '{source}' is not fetched; "
            "HF_HOME may name another place"
        )


def test_a_folder_of_the_same_name(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "dinov2-small").mkdir()
    with pytest.warns(match=f"is the published backbone, not '{tmp_path}/dinov2-small': give that in full"):
        assert fetch.locate_weights("dinov2-small").is_file()


@pytest.mark.skipif(not GAZE.is_file(), reason="the weights are not here")
def test_a_real_network_by_name(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = GAZE.read_bytes()
    hub.files = dict.fromkeys(hub.files, content)
    monkeypatch.setitem(CATALOGUE, KNOWN.name, replace(KNOWN, sha256=hashlib.sha256(content).hexdigest()))
    said = done("fit", photographs(tmp_path / "photos", images=2), "-o", "a.smkd")
    assert "ViT: 384 channels, 12 blocks, 6 heads, patches of 14, LayerScale" in said
    assert done("predict", "a.smkd", tmp_path / "photos" / "class-1" / "0.png").split(": ")[1].startswith("class-1")


def test_the_app_takes_it_unasked(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from smkd.app import serve

    about = []
    monkeypatch.setattr(serve, "check_gradio", lambda: None)
    monkeypatch.setattr(serve, "check_port", lambda host, port: None)
    monkeypatch.setattr(serve, "serve", lambda encoder, text, *_: about.append(text))
    assert done("app").startswith("backbone: dinov2-small (")
    assert about[0].startswith("Backbone: dinov2-small, ")
