"""`smkd adapt`: small runs on made pictures, from weights without a head and from a run of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import foreign_files
import smkd
from classify_data import tiny_network
from conftest import MakeFolder
from made_images import photographs
from smkd.adaptation import Adapted, adapt, planned
from smkd.classify import FewShotClassifier
from smkd.cli import app
from smkd.cli.training import report
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.data.datasets import open_split
from smkd.engine import checkpoint
from smkd.errors import CheckpointError, ConfigError, DataError
from smkd.fewshot.accuracy import Result, evaluate_features
from smkd.fewshot.features import Features

pytestmark = pytest.mark.slow

QUICK = (
    "epochs=3", "validation.every=1", "num_workers=0", "accelerator=cpu", "precision=fp32", "optim.lr=1e-3",
)  # fmt: skip
STILL = ("optim.lr=1e-12", "optim.lr_end=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in `few`, thirty in `many`, and a backbone without a head, as other projects publish them."""
    folder = tmp_path_factory.mktemp("adapt")
    photographs(folder / "few", (14, 12, 13))
    photographs(folder / "many", (8,) * 30, split="train")
    (folder / "net").mkdir()
    torch.save(tiny_network().state_dict(), folder / "net" / "model.pt")
    (folder / "net" / "config.json").write_text('{"num_attention_heads": 2}')
    return folder


def run(place: Path, out: Path, *words: str, data: str = "few") -> Adapted:
    return adapt(place / data, out, place / "net", [*QUICK, *words])


def validations(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["epoch"], line["accuracy"]) for line in lines if line["kind"] == "validation"]


def settled(config: RunConfig) -> dict[str, object]:
    sampler = config.data.sampler
    assert sampler is not None
    return {
        "batch": (sampler.classes, sampler.per_class, config.batch_size), "epochs": config.epochs,
        "warm-up": config.optim.warmup_epochs, "every": config.validation.every, "split by": config.data.split_by,
        "views": (config.global_views.size, config.local_views.size), "crop": config.evaluation.crop,
    }  # fmt: skip


def test_the_best_of_all_epochs_is_kept_and_measured(place: Path, tmp_path: Path) -> None:
    adapted = run(place, tmp_path / "a")
    scores = validations(tmp_path / "a")
    assert [epoch for epoch, _ in scores] == [0, 1, 2, 3]
    accuracies = [accuracy for _, accuracy in scores]
    assert adapted.epoch == int(np.argmax(accuracies))
    assert (adapted.held_out, adapted.split) == ("images", "test")
    best = checkpoint.load_checkpoint(tmp_path / "a" / "checkpoints" / "best.pt")
    assert (best["epoch"], best["best"]) == (adapted.epoch, max(accuracies))

    # what is reported is what the classifier gets right, learning from the training images
    config = loading.load_config(tmp_path / "a" / "config.yaml")
    train, test = (open_split(config.data, split) for split in ("train", "test"))
    for backbone, right in ((place / "net", adapted.before), (tmp_path / "a", adapted.after)):
        own = backbone == tmp_path / "a"
        made = FewShotClassifier(backbone) if own else FewShotClassifier(smkd.load(backbone), recipe=config)
        classifier = made.set_params(accelerator="cpu")
        classifier.fit([train.name(i) for i in range(len(train))], train.labels)
        answers = classifier.predict([test.name(i) for i in range(len(test))])
        np.testing.assert_array_equal(np.asarray(right), answers == test.labels)


def test_a_backbone_that_gains_nothing_is_kept_as_it_was(place: Path, tmp_path: Path) -> None:
    adapted = run(place, tmp_path / "a", *STILL, "epochs=9", "validation.patience=2")
    assert adapted.epoch == 0
    assert [epoch for epoch, _ in validations(tmp_path / "a")] == [0, 1, 2]
    np.testing.assert_array_equal(np.asarray(adapted.before), np.asarray(adapted.after))
    kept = smkd.load(tmp_path / "a").state_dict()
    for name, value in tiny_network().state_dict().items():
        if name != "mask_token":
            torch.testing.assert_close(kept[name], value, rtol=0, atol=0)


def test_an_interrupted_run_ends_like_a_whole_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("epochs=6", "validation.patience=2", *STILL)
    real = checkpoint.save_checkpoint
    for number, at in enumerate((1, 2)):
        saves = 0

        def interrupt(state: dict[str, object], path: Path, at: int = at) -> None:
            nonlocal saves
            saves += 1
            real(state, path)
            if saves == at:
                raise KeyboardInterrupt

        out = tmp_path / str(number)
        monkeypatch.setattr(checkpoint, "save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(place, out, *words)
        monkeypatch.setattr(checkpoint, "save_checkpoint", real)
        run(place, out, *words)
    whole = run(place, tmp_path / "whole", *words)
    for number in (0, 1):
        cut = tmp_path / str(number)
        assert validations(cut) == validations(whole.run)
        for key in ("student", "teacher"):
            mine, other = (checkpoint.load_checkpoint(each / "checkpoints" / "last.pt") for each in (cut, whole.run))
            assert (mine["epoch"], mine["stale"]) == (other["epoch"], other["stale"]) == (2, 2)
            for name, value in other[key].items():
                torch.testing.assert_close(mine[key][name], value, rtol=0, atol=0)
    # what stopped is over, and measured again
    before = (whole.run / "checkpoints" / "last.pt").stat().st_mtime_ns
    again = run(place, tmp_path / "whole", *words)
    np.testing.assert_array_equal(np.asarray(again.after), np.asarray(whole.after))
    assert (whole.run / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_many_classes_hold_out_whole_ones(place: Path, tmp_path: Path) -> None:
    adapted = run(place, tmp_path / "a", "epochs=1", "evaluation.episodes=50", "validation.episodes=50", data="many")
    assert adapted.held_out == "classes"
    for before, after in zip(adapted.before, adapted.after, strict=True):
        assert isinstance(before, Result)
        assert isinstance(after, Result)
        assert (before.way, before.shot, before.query, len(before.class_names)) == (5, 1, 7, 6)
        assert torch.equal(before.classes, after.classes)
    config = loading.load_config(tmp_path / "a" / "config.yaml")
    names = [set(open_split(config.data, split).class_names) for split in ("train", "val", "test")]
    assert [len(each) for each in names] == [19, 5, 6]
    assert len(set.union(*names)) == 30


def test_everything_follows_from_the_data_and_the_backbone(place: Path, tmp_path: Path) -> None:
    def plan(data: str, *words: str) -> dict[str, object]:
        return settled(planned(place / data, tmp_path, place / "net", words)[0])

    # 26 images to train on, five steps an epoch
    few = {"batch": (3, 5, 15), "epochs": 300, "warm-up": 30, "every": 30, "split by": "images", "views": (32, 8),
           "crop": 32}  # fmt: skip
    assert plan("few") == few
    assert plan("few", "epochs=7", "batch_size=10") == few | {
        "batch": (2, 5, 10), "epochs": 7, "warm-up": 0, "every": 1
    }  # fmt: skip
    chosen = ("data.sampler.classes=2", "data.sampler.per_class=3", "batch_size=6", "epochs=20")
    assert plan("few", *chosen)["batch"] == (2, 3, 6)
    assert plan("few", "global_views.size=64", "evaluation.crop=24")["views"] == (64, 8)
    many = plan("many")
    assert (many["batch"], many["epochs"], many["split by"]) == ((16, 4, 64), 150, "classes")
    assert plan("many", "data.split_by=images")["split by"] == "images"
    assert plan("many", "accumulate=3", "batch_size=63")["batch"] == (15, 4, 60)
    assert planned(place / "few", tmp_path, place / "net", ["data.sampler=null", "batch_size=8"])[0].batch_size == 8


def test_a_run_of_ours_gives_its_normalisation_head_and_views(place: Path, tmp_path: Path) -> None:
    first = smkd.pretrain(
        smkd.resolve("debug-pretrain", [f"out={tmp_path / 'first'}", "epochs=1", "data.limit_per_class=4",
                                        "validation.every=0", "accelerator=cpu"])
    )  # fmt: skip
    config = planned(place / "few", tmp_path / "a", first, QUICK)[0]
    before = loading.load_config(first / "config.yaml")
    assert (config.model, config.head, config.augment) == (before.model, before.head, before.augment)
    assert (config.data.mean, config.data.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (config.global_views.size, config.local_views.size) == (32, 16)
    adapted = adapt(place / "few", tmp_path / "a", first, [*QUICK, "epochs=1"])
    start = checkpoint.load_checkpoint(adapted.run / "checkpoints" / "best.pt")["teacher"]
    if adapted.epoch == 0:
        torch.testing.assert_close(start, checkpoint.load_checkpoint(first / "checkpoints" / "last.pt")["teacher"])


def test_splits_of_its_own_say_what_is_held_out(place: Path, tmp_path: Path, make_folder: MakeFolder) -> None:
    def held_out(root: Path) -> tuple[str, str]:
        config, kind = planned(root, tmp_path / "out", place / "net", QUICK)
        return kind, config.evaluation.split

    tree = make_folder(classes=3, images=4)
    assert held_out(tree) == ("classes", "test")
    shutil.rmtree(tree / "test")
    assert held_out(tree) == ("classes", "val")
    shutil.rmtree(tree / "val")
    with pytest.raises(DataError, match="has no val split"):
        held_out(tree)
    shutil.copytree(tree / "train" / "train-0", tree / "val" / "other")
    with pytest.raises(DataError, match="the val split has 1 classes, the smallest with 4 images"):
        held_out(tree)
    shutil.copytree(tree / "train", tree / "val", dirs_exist_ok=True)
    shutil.rmtree(tree / "val" / "other")
    assert held_out(tree) == ("images", "val")
    shutil.copytree(tree / "train" / "train-0", tree / "val" / "other")
    with pytest.raises(DataError, match=r"in train too \(train-0, train-1, train-2\) and others \(other\)"):
        held_out(tree)


def test_held_out_classes_of_one_image_fall_out_and_are_named(
    place: Path, tmp_path: Path, make_folder: MakeFolder
) -> None:
    tree = make_folder(classes=4, images=6)
    for split in ("val", "test"):
        for file in sorted((tree / split / f"{split}-1").iterdir())[1:]:
            file.unlink()
    config, kind = planned(tree, tmp_path / "out", place / "net", QUICK)
    assert kind == "classes"
    for protocol in (config.validation, config.evaluation):
        assert (protocol.way, protocol.shots, protocol.query) == (3, (1,), 5)
    labels = np.repeat(np.arange(4), [6, 1, 6, 6])
    features = Features(torch.randn(19, 4), labels, [f"test-{label}" for label in range(4)])
    measured = evaluate_features(features, config.evaluation)
    lines = report(Adapted(tmp_path, "classes", "test", 0, "12:cls", measured, measured))
    assert lines[1] == "features: 12:cls"
    assert lines[2].startswith("3 held-out classes, 3-way 1-shot")
    assert lines[3] == "1 of 4 classes fall out, as shot=1 and query=5 need 6 images of a class: 'test-1' (1)"


def test_the_command_says_whether_it_helped(place: Path, tmp_path: Path) -> None:
    def lines(*words: str, data: str = "few") -> list[str]:
        command = ["adapt", place / data, "-o", tmp_path / "a", "--backbone", place / "net", *QUICK, *words]
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout.splitlines()

    still = lines(*STILL, "epochs=1")
    assert any("adapting did not help: the backbone as it was is the best" in line for line in still)
    assert still[-3].startswith("8 held-out images: ")
    assert still[-2] == f"next: smkd fit {place / 'few'} -o clf.smkd --backbone {tmp_path / 'a'}"
    many = lines("overwrite=true", "evaluation.episodes=50", "validation.episodes=50", "optim.lr=3e-3", data="many")
    assert many[-3].startswith("6 held-out classes, 5-way 1-shot: ")
    assert ("on the same episodes" in many[-3]) == (not any("did not help" in line for line in many))
    assert many[-2].startswith("next: smkd fit SUPPORT_DIR -o clf.smkd")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("optim.lrr=1",), ConfigError, "did you mean 'optim.lr'"),
        (("batch_size=2", "accumulate=2"), DataError, "cannot be shared by 2 devices or passes"),
        (("data.sampler.classes=2", "data.sampler.per_class=3"), ConfigError, "must be batch_size=64"),
        (("model.embed_dim=64",), CheckpointError, "set model.embed_dim=32"),
        (("data.split_by=classes",), DataError, "there is one class to train on"),
    ],
)
def test_wrong_settings_are_one_line(
    place: Path, tmp_path: Path, words: tuple[str, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run(place, tmp_path / "a", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_blocks_behind_those_that_are_read_are_left_out(place: Path, tmp_path: Path) -> None:
    """Training reads the block that is measured; the run has no other behind it, and goes on as it began."""
    words = ("features.blocks=1", "epochs=1")
    adapted = run(place, tmp_path / "a", *words)
    assert adapted.features == "1:cls+weighted_mean"
    state = checkpoint.load_checkpoint(tmp_path / "a" / "checkpoints" / "last.pt")
    assert not [name for name in state["teacher"] if name.startswith("backbone.blocks.1.")]
    assert len(smkd.load(tmp_path / "a").blocks) == 1
    whole, cut = tiny_network(), smkd.load(tmp_path / "a" / "checkpoints" / "last.pt")
    assert cut.config.depth == 1
    assert whole.config.embed_dim in (None, cut.embed_dim)
    again = run(place, tmp_path / "a", *words)
    np.testing.assert_array_equal(np.asarray(again.after), np.asarray(adapted.after))
    # from a run of ours, too, whose head stays
    second = adapt(place / "few", tmp_path / "b", place_of_run(tmp_path), [*QUICK, *words])
    assert len(smkd.load(second.run).blocks) == 1


def place_of_run(folder: Path) -> Path:
    return smkd.pretrain(
        smkd.resolve("debug-pretrain", [f"out={folder / 'first'}", "epochs=1", "data.limit_per_class=4",
                                        "validation.every=0", "accelerator=cpu"])
    )  # fmt: skip


def test_the_best_block_is_read_and_no_other_without_a_reason(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is spoiled, so block 1 does better; a network whose blocks are alike keeps its own features."""
    network = tiny_network()
    with torch.no_grad():
        network.blocks[1].mlp.fc2.weight.normal_(std=30.0)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    words = ["validation.episodes=200", "evaluation.episodes=50"]
    config, _ = planned(place / "many", tmp_path / "a", tmp_path / "model.pt", words)
    assert set(config.features.blocks) == {1}
    assert config.model.depth == 1
    monkeypatch.setattr("smkd.adaptation.best_features", lambda *_, **__: pytest.fail("it measures again"))
    assert (
        planned(place / "many", tmp_path / "a", tmp_path / "model.pt", [*words, "features.blocks=2"])[0].model.depth
        is None
    )


def test_large_networks_take_small_steps_and_their_new_heads_large_ones(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = planned(place / "few", tmp_path, place / "net", ["features.blocks=2"])[0]
    small = config.optim
    assert (small.lr, small.head_lr, small.weight_decay_end) == (3e-3, None, 0.4)
    assert config.mask.ratio == (0.0, 0.3)
    monkeypatch.setattr("smkd.adaptation.SMALL", 32)
    config = planned(place / "few", tmp_path, place / "net", ["features.blocks=2"])[0]
    large = config.optim
    assert (large.lr, large.lr_end, large.head_lr, large.weight_decay_end) == (2.4e-4, 1.2e-4, 1e-3, 0.04)
    # large networks see whole views, unless masks are asked for
    assert config.mask.ratio == (0.0,)
    typed = ["features.blocks=2", "mask.ratio=[0.2,0.4]"]
    assert planned(place / "few", tmp_path, place / "net", typed)[0].mask.ratio == (0.2, 0.4)


@pytest.mark.parametrize("rotary", [False, True], ids=["dinov2", "dinov3"])
def test_networks_with_layer_scale_registers_and_rotary_positions(rotary: bool, place: Path, tmp_path: Path) -> None:
    """They train, all of their kinds of weights among them, and stay what they are."""
    network = foreign_files.vit(register_tokens=4, layer_scale=1.0, rotary=rotary)
    file = foreign_files.saved(
        (foreign_files.dinov3 if rotary else foreign_files.dinov2)(network), tmp_path / "net.pth"
    )
    words = ["features.blocks=2", "validation.patience=0", "optim.lr=1e-2", "local_views.count=2"]
    adapted = adapt(place / "few", tmp_path / "a", file, [*QUICK[:-1], *words], heads=1)
    last = checkpoint.load_checkpoint(adapted.run / "checkpoints" / "last.pt")["student"]
    start, after = network.state_dict(), {name.removeprefix("backbone."): value for name, value in last.items()}
    assert bool(loading.load_config(adapted.run / "config.yaml").model.rotary) == rotary
    moved = {name for name, value in start.items() if name in after and not torch.equal(after[name].cpu(), value)}
    assert {"reg_token", "cls_token", "blocks.0.ls1.gamma", "blocks.1.attn.qkv.weight"} <= moved
    assert all(bool(value.isfinite().all()) for value in after.values())
    backbone = smkd.load(adapted.run)
    assert (backbone.config.register_tokens, bool(backbone.config.rotary)) == (4, rotary)


def test_too_little_is_one_line(place: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "one", (9,))
    photographs(tmp_path / "three", (9, 3))
    for data, message in (("one", "there is one class to train on"), ("three", "has 3 images; .* needs at least 4"),
                          ("none", "does not exist")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            adapt(tmp_path / data, tmp_path / "a", place / "net", QUICK)
    with pytest.raises(CheckpointError, match=r"'.*nowhere' does not exist"):
        adapt(place / "few", tmp_path / "a", place / "nowhere", QUICK)
    assert not (tmp_path / "a").exists()
