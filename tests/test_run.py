"""Whole runs: files left behind, resuming, starting phase 2 from phase 1, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import smkd
from smkd import api
from smkd.config import loading
from smkd.engine import checkpoint
from smkd.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.slow

QUICK = ("data.limit_per_class=6", "validation.every=0", "batch_size=32", "precision=fp32")


def run(out: Path, *words: str, recipe: str = "debug-pretrain") -> Path:
    config = api.resolve(recipe, [f"out={out}", *QUICK, *words])
    return api.pretrain(config) if config.phase == "pretrain" else api.distill(config)


def metrics(out: Path, kind: str) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def weights(out: Path, part: str = "teacher") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = checkpoint.load_checkpoint(out / "checkpoints" / "last.pt")[part]
    return state


def test_a_run_leaves_what_is_promised(tmp_path: Path) -> None:
    out = run(tmp_path / "a", "validation.every=1", "validation.query=5", "data.limit_per_class=10", "log_every=10")
    assert loading.load_config(out / "config.yaml").recipe == "debug-pretrain"
    assert (out / "command.txt").read_text().strip()
    environment = json.loads((out / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"]
    for name in ("best.pt", "last.pt", "step-00000020.pt", "step-00000040.pt"):
        assert (out / "checkpoints" / name).is_file()
    assert not list((out / "checkpoints").glob(".*"))
    assert list((out / "tensorboard").iterdir())
    epochs = metrics(out, "epoch")
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert all(0 <= line[name] <= 1 for line in epochs for name in ("nmi", "fmi"))
    assert [line["step"] for line in metrics(out, "train")] == [10, 20, 30, 40]
    measured = metrics(out, "validation")
    best = checkpoint.load_checkpoint(out / "checkpoints" / "best.pt")
    assert best["best"] == max(line["accuracy"] for line in measured)
    assert measured[0]["accuracy"] == pytest.approx((measured[0]["5-way 1-shot"] + measured[0]["5-way 5-shot"]) / 2)


def test_the_same_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", "epochs=3")

    real = checkpoint.save_checkpoint
    saves = 0

    def interrupt(state: dict[str, object], path: Path) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt
        real(state, path)

    monkeypatch.setattr(checkpoint, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "epochs=3")
    monkeypatch.setattr(checkpoint, "save_checkpoint", real)
    cut = run(tmp_path / "cut", "epochs=3")

    # the interrupted epoch's records went with it
    for kind in ("train", "epoch"):
        assert [line["step"] for line in metrics(cut, kind)] == [line["step"] for line in metrics(whole, kind)]
    for part in ("student", "teacher", "objective"):
        for name, value in weights(whole, part).items():
            torch.testing.assert_close(weights(cut, part)[name], value, rtol=0, atol=0)
    # a finished run is left alone
    before = (cut / "checkpoints" / "last.pt").stat().st_mtime_ns
    run(tmp_path / "cut", "epochs=3")
    assert (cut / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_another_configuration_in_the_folder_is_refused_unless_overwritten(tmp_path: Path) -> None:
    out = run(tmp_path / "a", "epochs=1")
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.0005 -> 0\.001.*overwrite=true"):
        run(out, "epochs=1", "optim.lr=1e-3")
    with pytest.raises(ConfigError, match="resume=false"):
        run(out, "epochs=1", "resume=false")
    run(out, "epochs=1", "optim.lr=1e-3", "overwrite=true")
    assert loading.load_config(out / "config.yaml").optim.lr == 1e-3
    assert len(metrics(out, "epoch")) == 1


def test_phase_2_starts_from_phase_1(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "epochs=1", "optim.warmup_epochs=0")
    frozen = ("epochs=1", "optim.lr=1e-12", "optim.lr_end=0", "optim.warmup_epochs=0", "optim.teacher_momentum=1.0",
              "data.sampler.classes=8", f"init={first}")  # fmt: skip
    second = run(tmp_path / "second", *frozen, recipe="debug-distill")
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=0, atol=0)
    centres = checkpoint.load_checkpoint(first / "checkpoints" / "last.pt")["objective"]
    assert centres["cls_center"].abs().sum() > 0
    # the optimiser's state comes along only on request
    assert _steps_counted(second) < _steps_counted(first) + 12
    third = run(tmp_path / "third", *frozen, "init_optimizer=true", recipe="debug-distill")
    assert _steps_counted(third) == _steps_counted(first) + 12


def _steps_counted(out: Path) -> int:
    state = checkpoint.load_checkpoint(out / "checkpoints" / "last.pt")["optimizer"]["state"]
    return int(max(float(entry["step"]) for entry in state.values()))


def test_init_that_does_not_fit_names_the_weight(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "epochs=1")
    with pytest.raises(CheckpointError, match=r"needs \[32, .*\], the checkpoint has \[64"):
        run(tmp_path / "second", "epochs=1", "head.num_prototypes=32", f"init={first}")
    assert not (tmp_path / "second").exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        run(tmp_path / "second", f"init={tmp_path / 'nowhere'}")


def test_a_classifier_of_other_classes_starts_afresh(tmp_path: Path, make_folder) -> None:
    root = make_folder(classes=6, images=6)
    words = ("epochs=1", "objective.supervised.weight=1", "data.sampler=null")
    first = run(tmp_path / "first", *words, "init=random", recipe="debug-distill")
    other = ("data.dataset=folder", f"data={root}", f"init={first}")
    second = run(tmp_path / "second", *words, *other, recipe="debug-distill")
    assert weights(first, "student")["classifier.weight"].shape[0] == 64
    assert weights(second, "student")["classifier.weight"].shape[0] == 6
    # without the term it is left out
    third = run(tmp_path / "third", *words, *other, "objective.supervised.weight=0", recipe="debug-distill")
    assert "classifier.weight" not in weights(third, "student")


def test_supervised_term_and_accumulation_train(tmp_path: Path) -> None:
    out = run(
        tmp_path / "a", "epochs=1", "objective.supervised.weight=1", "accumulate=2", "data.sampler.classes=8",
        "init=random", recipe="debug-distill",
    )  # fmt: skip
    lines = metrics(out, "train")
    assert lines[-1]["supervised"] > 0
    assert lines[-1]["loss"] == pytest.approx(sum(lines[-1][t] for t in ("cls", "patch", "supervised")), rel=1e-5)


def test_terms_without_pairs_are_counted_not_nan(tmp_path: Path) -> None:
    words = ("epochs=1", "data.sampler=null", "data.limit_per_class=1", "batch_size=8", "log_every=1")
    reference = ("objective.patch.matching=reference", "objective.patch.weighting=mean")
    out = run(tmp_path / "a", *words, *reference, "init=random", recipe="debug-distill")
    lines = metrics(out, "train")
    assert all(line["empty_patch"] == 1 and line["patch"] == 0 for line in lines)
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_no_space_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save_checkpoint({"epoch": 1}, path)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the file that was there is kept"):
        checkpoint.save_checkpoint({"epoch": 2}, path)
    assert checkpoint.load_checkpoint(path)["epoch"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]


def test_torchs_own_account_of_a_full_disk_is_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 467008 vs 466900")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(CheckpointError, match="unexpected pos"):
        checkpoint.save_checkpoint({}, tmp_path / "a.pt")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save_checkpoint({}, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_refused_without_being_executed(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (marker,))

    torch.save({"format": 1, "student": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"cannot read .*evil\.pt"):
        checkpoint.load_checkpoint(path)
    assert not marker.exists()
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.pt"):
        checkpoint.load_checkpoint(tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find_checkpoint(tmp_path)


def test_python_api_measures_what_it_loads(tmp_path: Path) -> None:
    out = run(tmp_path / "a", "epochs=1")
    backbone = smkd.load(out)
    assert not backbone.training
    config = api.resolve("debug-pretrain", ["evaluation.episodes=20"])
    results = smkd.evaluate(backbone, config)
    assert [(r.shot, r.way, r.episodes) for r in results] == [(1, 5, 20), (5, 5, 20)]
    assert all(20 < r.mean < 100 and r.ci95 > 0 for r in results)
    assert smkd.evaluate(backbone, config) == results


def test_unreadable_images_stop_the_run_or_are_skipped_and_counted(tmp_path: Path, make_folder) -> None:
    root = make_folder(classes=6, images=16)
    broken = root / "train" / "train-0" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    words = (f"data={root}", "data.dataset=folder", "epochs=1", "data.limit_per_class=null")
    with pytest.raises(DataError, match=r"003\.jpg.*data\.on_error=skip"):
        run(tmp_path / "a", *words)
    out = run(tmp_path / "b", *words, "data.on_error=skip")
    assert metrics(out, "epoch")[0]["skipped_images"] == 1
    test_image = root / "test" / "test-1" / "002.jpg"
    test_image.write_bytes(b"no image")
    config = loading.load_config(out / "config.yaml")
    with pytest.raises(DataError, match=r"002\.jpg"):
        smkd.evaluate(
            smkd.load(out), config.model_copy(update={"data": config.data.model_copy(update={"on_error": "raise"})})
        )
    assert smkd.evaluate(smkd.load(out), config)[0].skipped == 1


def test_overwrite_loses_nothing_when_the_new_run_cannot_start(tmp_path: Path) -> None:
    out = run(tmp_path / "a", "epochs=1")
    with pytest.raises(CheckpointError, match="does not exist"):
        run(out, "epochs=1", "overwrite=true", f"init={tmp_path / 'nowhere'}")
    assert weights(out)


def test_two_devices_train_like_one_folder(tmp_path: Path) -> None:
    out = run(tmp_path / "two", "epochs=1", "devices=2", "accelerator=cpu")
    assert (out / "checkpoints" / "last.pt").is_file()
    assert len(metrics(out, "epoch")) == 1
