"""Checkpoint files and what is restored from them, without training."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import foreign_files
from smkd import api
from smkd.config.run_config import RunConfig
from smkd.engine import checkpoint
from smkd.engine.restore import backbone_of, is_ours, open_checkpoint, restore
from smkd.engine.step import Learner
from smkd.errors import CheckpointError

CPU = torch.device("cpu")


def config(*words: str, recipe: str = "debug-pretrain") -> RunConfig:
    return api.resolve(recipe, ["batch_size=4", *words])


def learner(settings: RunConfig, classes: int = 4) -> Learner:
    return Learner.create(settings, classes, CPU, None)


def state_of(made: Learner, **more: Any) -> dict[str, Any]:
    place = {"epoch": 1, "step": 4, "best": 0.0}
    return {**made.state(), "config": made.config.model_dump(mode="json"), **place, **more}


# ---- files


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.pt"
    state = {"epoch": 3, "student": {"w": torch.arange(4.0)}, "classes": ["ä", "b"]}
    checkpoint.save_checkpoint(state, path)
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.keys() == {"format", *state}
    assert (loaded["format"], loaded["epoch"], loaded["classes"]) == (checkpoint.FORMAT, 3, ["ä", "b"])
    assert torch.equal(loaded["student"]["w"], torch.arange(4.0))
    checkpoint.save_checkpoint({"epoch": 4}, path)
    assert checkpoint.load_checkpoint(path)["epoch"] == 4
    assert [entry.name for entry in path.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_names_the_reason_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "a.pt"
    if there:
        checkpoint.save_checkpoint({"epoch": 1}, path)

    def fails(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fails)
    kept = "; the file that was there is kept" if there else ""
    with pytest.raises(CheckpointError, match=f"^cannot write '{re.escape(str(path))}': Disk quota exceeded{kept}$"):
        checkpoint.save_checkpoint({"epoch": 2}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"] * there
    if there:
        assert checkpoint.load_checkpoint(path)["epoch"] == 1


def test_a_disk_that_fails_between_two_states_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"whole")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_second_name", fail)
    said = pytest.raises(CheckpointError, match=re.escape(f"cannot write '{path}': Input/output error"))
    with said, checkpoint.keeping_earlier(path, 3):
        pytest.fail("there is no earlier state to go back to")
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_bytes() == b"whole"


def test_a_file_where_the_folder_belongs_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^cannot write '.*file': a file is there where a folder is needed$"):
        checkpoint.save_checkpoint({}, tmp_path / "file" / "a.pt")


@pytest.mark.parametrize(("free", "reason"), [(2**20 - 1, "No space left"), (2**20, "unexpected pos 4")])
def test_torchs_error_is_a_full_disk_only_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, reason: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("unexpected pos 4\nframe #0: somewhere")

    monkeypatch.setattr(torch, "save", fails)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(CheckpointError, match=f"{reason}[^\n]*$") as caught:
        checkpoint.save_checkpoint({}, tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_the_best_checkpoint_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match=r"run' does not exist; expected a run folder or a checkpoint file"):
        checkpoint.find_checkpoint(tmp_path / "run")
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(checkpoints/best\.pt or last\.pt\)"):
        checkpoint.find_checkpoint(tmp_path / "run")
    checkpoint.save_checkpoint({}, folder / "last.pt")
    assert checkpoint.find_checkpoint(tmp_path / "run") == folder / "last.pt"
    checkpoint.save_checkpoint({}, folder / "best.pt")
    assert checkpoint.find_checkpoint(tmp_path / "run") == folder / "best.pt"
    assert checkpoint.find_checkpoint(folder / "last.pt") == folder / "last.pt"


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"a\.pt' does not exist"):
        checkpoint.load_checkpoint(path)
    for content in ([1, 2], {"student": {}}, {"format": checkpoint.FORMAT + 1}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"a\.pt.*not a (checkpoint of smkd|dictionary of weights)"):
            checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint({"student": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"cannot read '.*a\.pt': damaged"):
        checkpoint.load_checkpoint(path)


# ---- restoring


def test_every_part_is_restored() -> None:
    settings = config()
    first, second = learner(settings), learner(settings)
    with torch.no_grad():
        for part in (first.pair.student, first.pair.teacher):
            for parameter in part.parameters():
                parameter.normal_()
        first.objective.cls_center.normal_()
        first.objective.patch_center.normal_()
    assert restore(second, state_of(first), optimizer=True) == []
    for mine, theirs in (
        (first.pair.student, second.pair.student), (first.pair.teacher, second.pair.teacher),
        (first.objective, second.objective),
    ):  # fmt: skip
        expected, found = mine.state_dict(), theirs.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(first.pair.student.state_dict()["backbone.cls_token"],
                           first.pair.teacher.state_dict()["backbone.cls_token"])  # fmt: skip


@pytest.mark.parametrize("part", ["student", "teacher", "objective"])
def test_a_part_that_does_not_fit_is_named(part: str) -> None:
    settings = config()
    key = {"objective": "cls_center"}.get(part, "backbone.norm.weight")
    for change, count, said in (
        (lambda w: w.pop(key), 1, f"{part}.{key}: this run needs"),
        (lambda w: w.update({key: torch.zeros(3, 5)}), 1, r"the checkpoint has [3, 5]"),
        (lambda w: w.update({"aaa": torch.zeros(3, 5)}), 1, f"{part}.aaa: this run has no such weight"),
        (lambda w: (w.pop(key), w.update({"aaa": torch.zeros(1)})), 2, "the checkpoint has [1]"),
    ):
        state = state_of(learner(settings))
        state[part] = dict(state[part])
        change(state[part])
        with pytest.raises(CheckpointError) as caught:
            restore(learner(settings), state, optimizer=False)
        assert f"does not fit this model ({count} weights)" in str(caught.value)
        assert said in str(caught.value)
    state = state_of(learner(settings))
    state[part] = {name: value for name, value in state[part].items() if name != key}
    with pytest.raises(CheckpointError, match="the checkpoint does not have it"):
        restore(learner(settings), state, optimizer=False)


def test_only_the_classifier_starts_afresh() -> None:
    words = ("objective.supervised.weight=1", "data.sampler=null")
    settings = config(*words, recipe="debug-distill")
    first, second = learner(settings, classes=7), learner(settings, classes=4)
    with torch.no_grad():
        for parameter in first.pair.student.parameters():
            parameter.normal_()
    own = second.pair.student.state_dict()["classifier.weight"].clone()
    assert restore(second, state_of(first), optimizer=False) == []
    restored, expected = second.pair.student.state_dict(), first.pair.student.state_dict()
    assert torch.equal(restored["classifier.weight"], own)
    assert all(torch.equal(restored[n], v) for n, v in expected.items() if not n.startswith("classifier."))
    same = learner(settings, classes=7)
    restore(same, state_of(first), optimizer=False)
    assert torch.equal(same.pair.student.state_dict()["classifier.weight"], expected["classifier.weight"])
    # the head of one of our own checkpoints is not left out in silence
    with pytest.raises(CheckpointError, match=r"head\."):
        restore(
            learner(config(*words, "head.num_prototypes=32", recipe="debug-distill")), state_of(first), optimizer=False
        )


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_a_scale_is_taken_where_there_is_one(autocast: torch.dtype | None) -> None:
    """A run in another precision has none, and leaves that of a new one."""
    made = Learner.create(config(), 4, CPU, torch.float16)
    expected = made.scaler.get_scale()
    other = Learner.create(config(), 4, CPU, autocast)
    if autocast is not None:
        expected = 128.0
        other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": expected})
    restore(made, state_of(other), optimizer=True)
    assert made.scaler.get_scale() == expected


def test_an_optimiser_that_does_not_fit_is_one_line() -> None:
    settings = config()
    state = state_of(learner(settings))
    state["optimizer"] = {**state["optimizer"], "param_groups": state["optimizer"]["param_groups"][:1]}
    with pytest.raises(CheckpointError, match="optimiser's state"):
        restore(learner(settings), state, optimizer=True)
    assert restore(learner(settings), state, optimizer=False) == []


def test_a_checkpoint_is_opened_by_its_run_folder_or_its_file(tmp_path: Path) -> None:
    made = learner(config())
    file = tmp_path / "run" / "checkpoints" / "last.pt"
    checkpoint.save_checkpoint(state_of(made, epoch=2), file)
    for where in (tmp_path / "run", str(tmp_path / "run"), file):
        state, found = open_checkpoint(where)
        assert found == file
        assert state["epoch"] == 2
        assert is_ours(state)
    # a folder that is no run is searched for a file of weights
    (tmp_path / "plain").mkdir()
    checkpoint.save_checkpoint(state_of(made, epoch=5), tmp_path / "plain" / "model.pt")
    state, found = open_checkpoint(tmp_path / "plain")
    assert (found, state["epoch"]) == (tmp_path / "plain" / "model.pt", 5)
    for other in ({}, {"format": 1}, {"config": {}}, {"config": {}, "format": 2}, {"config": 3, "format": 1}):
        assert not is_ours(other)
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt.*--recipe"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_the_backbone_of_either_network(network: Any) -> None:
    made = learner(config("model.embed_dim=64"))
    with torch.no_grad():
        for parameter in made.pair.teacher.parameters():
            parameter.normal_()
    state = state_of(made)
    backbone, settings = backbone_of(state, "a.pt", network)
    assert settings == made.config
    assert not backbone.training
    assert all(not module.training for module in backbone.modules())
    expected = {"teacher": made.pair.teacher, "student": made.pair.student}[network].backbone.state_dict()
    found = backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert ("mask_token" in found) == (network == "student")
    state[network] = {name: value for name, value in state[network].items() if name != "backbone.norm.weight"}
    with pytest.raises(CheckpointError, match=r"(?s)a\.pt.*norm\.weight"):
        backbone_of(state, "a.pt", network)


def test_weights_of_another_project_bring_no_optimiser(tmp_path: Path) -> None:
    settings = config("model.embed_dim=64", "model.depth=2", "model.num_heads=1")
    network = foreign_files.vit()
    torch.save(foreign_files.weights(network), tmp_path / "w.pt")
    state, _ = open_checkpoint(tmp_path / "w.pt", settings)
    made = learner(RunConfig.model_validate(state["config"]))
    with pytest.raises(CheckpointError, match="init_optimizer=true"):
        restore(made, state, optimizer=True)
    assert restore(made, state, optimizer=False) == [], "these fit as they are"
    assert torch.equal(made.pair.student.state_dict()["backbone.norm.weight"], network.norm.weight)
