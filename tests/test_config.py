from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.errors import ConfigError

DATASETS = ("mini-imagenet", "tiered-imagenet", "cifar-fs", "fc100", "caltech101", "patterns", "debug", "folder")


def test_every_data_set_has_a_recipe_for_each_phase() -> None:
    expected = {f"{name}-{phase}" for name in DATASETS for phase in ("pretrain", "distill")}
    assert set(loading.recipe_names()) == expected | {"adapt"}  # which starts from any backbone
    for name in expected:
        config = loading.resolve(name)
        assert config.phase == name.rsplit("-", 1)[1]
        assert config.recipe == name
        assert loading.recipe_summary(name)


@pytest.mark.parametrize("name", ["mini-imagenet", "tiered-imagenet", "cifar-fs", "fc100"])
def test_benchmarks_have_the_papers_settings(name: str) -> None:
    first, second = loading.resolve(f"{name}-pretrain"), loading.resolve(f"{name}-distill")
    for config in (first, second):
        assert (config.model.size, config.model.patch_size, config.model.drop_path) == ("small", 16, 0.1)
        assert (config.head.num_prototypes, config.head.num_patch_prototypes) == (8192, None)
        assert (config.global_views.count, config.global_views.size, config.global_views.scale) == (2, 224, (0.25, 1.0))
        assert (config.local_views.count, config.local_views.size, config.local_views.scale) == (10, 96, (0.05, 0.25))
        optim, objective = config.optim, config.objective
        assert (optim.lr, optim.lr_end, optim.warmup_epochs) == (5e-4, 1e-5, 10)
        assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.4)
        assert (optim.teacher_momentum, optim.teacher_momentum_end) == (0.996, 1.0)
        assert (optim.clip_norm, optim.freeze_last_layer_epochs) == (3.0, 1)
        assert objective.student_temperature == 0.1
        for temperature in (objective.cls_temperature, objective.patch_temperature):
            assert (temperature.start, temperature.end, temperature.warmup_epochs) == (0.04, 0.07, 30)
        assert (config.mask.shape, config.mask.ratio, config.mask.ratio_jitter) == ("block", (0.0, 0.3), (0.0, 0.2))
        assert (config.validation.resize, config.validation.crop) == (256, 224)
        final = (360, 320) if "imagenet" in name else (256, 224)
        assert (config.evaluation.resize, config.evaluation.crop) == final
    assert (first.epochs, first.validation.every, second.epochs, second.validation.every) == (1600, 50, 150, 5)
    assert (first.objective.labels, first.objective.mim.weight, first.objective.patch.weight) == (False, 1.0, 0.0)
    assert (second.objective.labels, second.objective.mim.weight, second.objective.patch.weight) == (True, 0.0, 1.0)
    assert second.objective.patch.matching == "paper"


def test_configuration_is_frozen() -> None:
    config = loading.resolve("debug-pretrain")
    with pytest.raises(ValidationError):
        config.epochs = 3  # type: ignore[misc]


def test_overrides_reach_any_depth_and_data_is_short_for_its_root() -> None:
    config = loading.resolve(
        "debug-distill",
        ["optim.lr=1e-4", "objective.cls_temperature.end=0.05", "data=photos", "data.on_error=skip", "mask.ratio=[0.5]",
         "mask.ratio_jitter=[0.1]", "data.sampler=null"],
    )  # fmt: skip
    assert config.optim.lr == 1e-4
    assert config.objective.cls_temperature.end == 0.05
    assert (config.data.root, config.data.on_error, config.data.sampler) == (Path("photos"), "skip", None)
    assert config.mask.ratio == (0.5,)


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = loading.resolve("mini-imagenet-distill", ["data=x", "init=runs/a"])
    path = tmp_path / "config.yaml"
    path.write_text(loading.dump(config))
    assert loading.load_config(path) == config
    assert loading.differences(config, config) == []


def test_differences_leave_out_what_does_not_change_the_numbers() -> None:
    old, new = (
        loading.resolve("debug-pretrain", words)
        for words in (["num_workers=0", "optim.lr=1e-3"], ["num_workers=3", "out=b", "optim.lr=2e-3"])
    )
    assert loading.differences(old, new) == ["optim.lr: 0.001 -> 0.002"]


def test_a_recipe_file_extends_a_neighbour_or_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: debug-pretrain\nepochs: 7\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nseed: 3\n")
    config = loading.resolve(str(tmp_path / "mine.yaml"))
    assert (config.epochs, config.seed, config.recipe, config.batch_size) == (7, 3, "mine", 16)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optim.lrr=1"], ["unknown key 'optim.lrr'", "did you mean 'optim.lr'"]),
        (["epoch=1"], ["unknown key 'epoch'", "'epochs'"]),
        (["objective.patch.maching=paper"], ["objective.patch.matching"]),
        (["epochs=many"], ["epochs=many", "integer"]),
        (["objective.patch.matching=papers"], ["objective.patch.matching=papers", "'paper'"]),
        (["objective.terms.koleo=1"], ["objective.terms=koleo", "term 'koleo' is unknown (known: none)"]),
        (["model.drop_path=1"], ["model.drop_path=1", "less than 1"]),
        (["model=3"], ["model"]),
        (["num_workers=-1"], ["num_workers=-1", "or input should be 'auto'"]),
        (["compile=maybe"], ["compile=maybe: input should be a valid boolean", "or input should be 'auto'"]),
        (["evaluation.query=some"], ["evaluation.query=some", "integer", "'all'"]),
        (["data.sampler=3"], ["data.sampler=3", "classes, per_class"]),
        (["optim.lr=-1"], ["optim.lr=-1", "greater than 0"]),
        (["epochs"], ["key=value"]),
        (["global_views.size=30"], ["global_views.size=30", "model.patch_size=8", "use 24"]),
        (["local_views.size=4"], ["local_views.size=4", "smaller than one patch"]),
        (["batch_size=15", "accumulate=2"], ["batch_size=15", "not divisible"]),
        (["data.sampler={classes: 3, per_class: 4}"], ["classes=3", "batch_size=16"]),
        (["global_views.scale=[0.5, 0.2]"], ["scale"]),
        (["mask.ratio_jitter=[0.1, 0.4]"], ["ratio_jitter"]),
        (["evaluation.crop=40"], ["crop 40 is larger than resize 32"]),
        (["objective.cls.weight=0", "objective.mim.weight=0"], ["every term has weight 0"]),
        (["objective.pairs=global", "objective.patch.matching=reference"], ["pairs=local"]),
    ],
)
def test_wrong_settings_are_one_line_that_names_them(words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        loading.resolve("debug-pretrain", words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'debug-pretrain'"):
        loading.resolve("debug-pretrian")
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml' does not exist"):
        loading.resolve("nowhere.yaml")


def test_a_recipe_serves_its_own_verb_only() -> None:
    with pytest.raises(ConfigError, match="is for `smkd pretrain`"):
        loading.resolve("debug-pretrain", phase="distill")


def test_recipes_hold_only_known_keys() -> None:
    known = {*RunConfig.model_fields, "summary", "extends"}
    for name in loading.recipe_names():
        assert set(yaml.safe_load(loading.recipe_text(name))) <= known


def test_one_setting_of_a_view_keeps_the_others() -> None:
    config = loading.resolve("mini-imagenet-distill", ["global_views.size=160", "local_views.count=4"])
    assert (config.global_views.count, config.global_views.size, config.global_views.scale) == (2, 160, (0.25, 1.0))
    assert (config.local_views.count, config.local_views.size, config.local_views.scale) == (4, 96, (0.05, 0.25))


LAUGHS = "\n".join(["a0: &a0 [1, 2, 3]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "is not valid YAML: its aliases stand for more than 10000 values"),
        ("[" * 60_000, "line 1 is not valid YAML: nested deeper than 32 levels"),
        ("{a: " * 10_000, "nested deeper than 32 levels"), ("- " * 30_000, "nested deeper than 32 levels"),
        ("a: &a [*a]", "an alias stands for what it is in"),
        ("x: " + "y" * 70_000, "settings have at most 65536 bytes"),
        ("seed: 1\nseed: 2", "line 2 is not valid YAML: seed is given twice"),
        ("seed: 2001-99-99", "is not valid YAML"),
        ("seed: !!timestamp x", "a value is not of the type that its tag names"),
        ("seed: !!int x", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML"), ("? [a]\n: 1", "a key should be a word"),
        ("1: 2", "the key 1 should be text"), ("model: {depth: 3, 4: 5}", "the key 4 should be text"),
        ("a: [b, {no: 1}]", "the key False should be text"), ("- a", "must hold keys and values"),
        ("extends: [a]", "extends=.*should be the name of a recipe or file"),
        (b"\xff\xff", "is not valid YAML"), (b"\0", "is not valid YAML"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_recipe_that_asks_for_too_much_is_refused_at_once(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (loading.load_recipe, lambda where: loading.load_config(Path(where))):
        with pytest.raises(ConfigError, match=says if read is loading.load_recipe else "mine") as caught:
            read(str(path))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_recipe_with_an_alias_or_in_utf_16_is_read(tmp_path: Path) -> None:
    text = "extends: debug-pretrain\nglobal_views: &views\n  size: 16\n  count: 2\nlocal_views:\n  <<: *views\n"
    for name, encoding in (("a.yaml", "utf-8"), ("b.yaml", "utf-16"), ("c.yaml", "utf-8-sig")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert loading.resolve(str(tmp_path / name)).local_views.size == 16


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    for name, parent in (("a", "a.yaml"), ("b", "c.yaml"), ("c", "b.yaml"), ("d", "./sub/../d.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}")
    (tmp_path / "sub").mkdir()
    for name in "abd":
        with pytest.raises(ConfigError, match="extends itself"):
            loading.resolve(str(tmp_path / f"{name}.yaml"))


def test_a_value_that_is_long_or_nested_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError, match=r"epochs=y{200}\.\.\.: input") as caught:
        loading.resolve("debug-pretrain", [f"epochs={'y' * 10_000}"])
    with pytest.raises(ConfigError, match="nested deeper than 32 levels"):
        loading.resolve("debug-pretrain", [f"epochs={'[' * 9000}"])
    assert len(str(caught.value)) < 400
