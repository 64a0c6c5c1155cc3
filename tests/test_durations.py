"""What is counted in epochs fits into the run: shortened where only `epochs` was typed, refused otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

import smkd
from smkd.config import loading
from smkd.config.checks import durations
from smkd.engine import checkpoint
from smkd.engine.optim import rates_at
from smkd.errors import ConfigError

NOTHING = ("validation.every=0", "data.limit_per_class=2")


def values(*words: str, recipe: str = "folder-pretrain") -> dict[str, int]:
    return {duration.key: duration.epochs for duration in durations(loading.resolve(recipe, words))}


@pytest.mark.parametrize("recipe", loading.recipe_names())
def test_recipes_fit_into_themselves(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _, epochs, most, _ in durations(loading.resolve(recipe)):
        assert epochs <= most
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 11, 30])
@pytest.mark.parametrize("recipe", loading.recipe_names())
def test_short_runs_of_recipes_reach_every_end(recipe: str, epochs: int) -> None:
    config = loading.resolve(recipe, [f"epochs={epochs}"])
    first, *_ = rates = [rates_at(config, step, 10) for step in range(10 * epochs)]
    peak = max(range(len(rates)), key=lambda step: rates[step].lr)
    assert rates[peak].lr == config.optim.lr
    assert peak <= len(rates) / 2, "half of the run is left to the cosine"
    assert rates[-1].lr < 0.25 * config.optim.lr + config.optim.lr_end
    assert not rates[-1].last_layer_frozen
    for name in ("cls_temperature", "patch_temperature"):
        limits = getattr(config.objective, name)
        assert getattr(first, name) == limits.start or limits.warmup_epochs == 0
        assert getattr(rates[-1], name) == pytest.approx(limits.end) or epochs == 1


def test_what_is_shortened_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = values("epochs=5")
    assert list(found.values()) == [2, 1, 0, 5, 5]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "shortened to fit into epochs=5: optim.warmup_epochs 10 -> 2, "
        "objective.cls_temperature.warmup_epochs 30 -> 5, objective.patch_temperature.warmup_epochs 30 -> 5"
    )
    values("epochs=400", "optim.lr=1e-3")
    values("optim.warmup_epochs=20")
    assert capsys.readouterr().err == ""


def test_what_is_typed_is_not_touched() -> None:
    found = values("epochs=20", "optim.warmup_epochs=15", "mask.start_epoch=12")
    assert found["optim.warmup_epochs"] == 15
    assert found["mask.start_epoch"] == 12
    assert found["objective.patch_temperature.warmup_epochs"] == 8, "it begins with the masks"
    assert found["objective.cls_temperature.warmup_epochs"] == 20


def test_a_file_of_ones_own_counts_as_typed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: folder-pretrain\nepochs: 6\noptim: {warmup_epochs: 4}\n", encoding="utf-8")
    found = values(recipe=str(mine))
    assert found["optim.warmup_epochs"] == 4
    assert found["objective.cls_temperature.warmup_epochs"] == 6
    assert loading.load_recipe(str(mine))["optim"]["warmup_epochs"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optim.warmup_epochs=10",), "optim.warmup_epochs=10 does not fit into a run of epochs=3; at most 2"),
        (("optim.warmup_epochs=3",), "optim.warmup_epochs=3 .* at most 2"),
        (("optim.freeze_last_layer_epochs=3",), "optim.freeze_last_layer_epochs=3 .* at most 2"),
        (("mask.start_epoch=3",), "mask.start_epoch=3 .* at most 2"),
        (("objective.cls_temperature.warmup_epochs=4",), "objective.cls_temperature.warmup_epochs=4 .* at most 3"),
        (
            ("mask.start_epoch=1", "objective.patch_temperature.warmup_epochs=3"),
            "objective.patch_temperature.warmup_epochs=3 .* at most 2",
        ),
    ],
)
def test_typed_durations_that_do_not_fit_are_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    config = smkd.resolve("debug-pretrain", ["epochs=3", *NOTHING, *words, f"out={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=said):
        smkd.pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_configuration_made_in_python_is_checked_too(tmp_path: Path) -> None:
    config = loading.changed(loading.resolve("patterns-pretrain"), {"epochs": 1, "out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs=1 does not fit .* epochs=1; at most 0"):
        smkd.pretrain(config)


def test_temperatures_of_terms_that_are_off_do_not_matter() -> None:
    config = loading.resolve("debug-pretrain", ["objective.mim.weight=0"])
    assert "objective.patch_temperature.warmup_epochs" not in {duration.key for duration in durations(config)}


def test_a_run_keeps_its_warm_ups_with_other_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*NOTHING, f"out={tmp_path / 'run'}", "batch_size=64")
    recipe = "debug-pretrain"
    key = "optim.warmup_epochs"
    assert values(*words, "epochs=1", recipe=recipe)[key] == 0 < values(*words, "epochs=2", recipe=recipe)[key]
    smkd.pretrain(loading.resolve(recipe, [*words, "epochs=1"]))
    for _ in range(2):  # a restart of the changed command as well
        run = smkd.pretrain(loading.resolve(recipe, [*words, "epochs=2"]))
    assert f"{key}: 1 -> 0" in capsys.readouterr().out
    state = checkpoint.load_checkpoint(run / "checkpoints" / "last.pt")
    assert state["epoch"] == 2
    assert state["config"]["optim"]["warmup_epochs"] == 0
    with pytest.raises(ConfigError, match=r"another configuration \(optim\.warmup_epochs: 1 -> 2\)"):
        smkd.pretrain(loading.resolve(recipe, [*words, "epochs=2", f"{key}=2"]))
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs=7 does not fit into a run of epochs=2"):
        smkd.pretrain(loading.resolve(recipe, [*words, "epochs=2", f"resume_with={key}=7"]))
    with pytest.raises(ConfigError, match=r"objective\.patch\.weighting has no effect"):
        smkd.pretrain(loading.resolve(recipe, [*words, "epochs=2", "resume_with=objective.patch.weighting=mean"]))
