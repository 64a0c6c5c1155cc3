"""From a recipe's name and `key=value` words to a checked `RunConfig`, and from a run's folder back to it."""

from __future__ import annotations

import json
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping, Set
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from smkd import extensions
from smkd.config import foreign_text
from smkd.config.checks import check_used, durations, shortened
from smkd.config.protocol import ProtocolConfig
from smkd.config.published import settings_of_start
from smkd.config.run_config import RunConfig
from smkd.errors import ConfigError
from smkd.files import expanded, nearest
from smkd.processes import is_first_rank

# What may differ when a run is resumed: places, and how or how long it computes, not what.
FREE_KEYS = frozenset((
    "out", "resume", "resume_with", "overwrite", "num_workers", "log_every", "wandb", "wandb_project", "data.cache",
    "data.cache_dir", "compile", "recompute", "keep", "save_minutes", "max_hours", "save_every", "epochs", "validation",
    "data.root", "data.on_error", "data.changed", "devices", "num_nodes", "shard", "accumulate", "precision", "guard",
))  # fmt: skip
# What `resume_with` cannot change: networks, data and what steps are counted in.
FIXED_KEYS = frozenset((
    "recipe", "phase", "init", "init_optimizer", "seed", "batch_size", "data", "model", "out", "resume", "resume_with",
    "overwrite",
))  # fmt: skip
PLACES = frozenset(("data.root", "data.split_file", "init"))
"""Paths: the same place by another path is the same."""
SHOWN = 200
"""Characters of a value that a message shows."""
VALUE_KINDS = ("bool", "int", "float", "str")
"""What pydantic calls the kinds of a union where it says which one a value does not fit."""


def recipe_names() -> list[str]:
    """Names of the recipes in the package, sorted."""
    folder = resources.files("smkd") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML text of a recipe of the package.

    Raises:
        ConfigError: there is no such recipe; names the nearest one.
    """
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe '{name}'{nearest(name, recipe_names())}; `smkd recipes` lists them")
    return (resources.files("smkd") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """One line that says what a recipe is for."""
    return str(foreign_text.mapping(recipe_text(name), name).get("summary", ""))


def load_recipe(recipe: str) -> dict[str, Any]:
    """Settings of a recipe, with those of the recipes that it extends; its own replace theirs.

    Args:
        recipe: name of a recipe of the package, or the path of a YAML file.

    Raises:
        ConfigError: there is none, it is no recipe, or it extends itself.
    """
    return _load(recipe, ())[0]


def _load(recipe: str, inner: tuple[str, ...]) -> tuple[dict[str, Any], set[str]]:
    """Settings of a recipe, and the dotted keys of those that stand in files and not in recipes of the package.

    Args:
        recipe: as above.
        inner: recipes that extend it, one the next.
    """
    is_file = recipe.endswith((".yaml", ".yml"))
    recipe = str(expanded(recipe)) if is_file else recipe
    if is_file and not Path(recipe).is_file():
        raise ConfigError(f"recipe file '{recipe}' does not exist")
    place = str(Path(recipe).resolve()) if is_file else recipe
    if place in inner:
        raise ConfigError(
            f"recipe '{recipe}' extends itself{f' by way of {Path(inner[-1]).name}' * (inner[-1] != place)}"
        )
    values = foreign_text.mapping(foreign_text.text_of(Path(recipe)) if is_file else recipe_text(recipe), recipe)
    values.pop("summary", None)
    parent = values.pop("extends", None)
    own = set(_flat(values)) if is_file else set()
    if parent is None:
        return values, own
    if not isinstance(parent, str):
        raise ConfigError(f"'{recipe}': extends={_shown(parent)}: should be the name of a recipe or file")
    # a file may extend its neighbour by a relative path
    beside = Path(recipe).parent / parent
    found = str(beside) if is_file and beside.is_file() else parent
    base, of_parent = _load(found, (*inner, place))
    return _merged(base, values), own | of_parent


def resolve(
    recipe: str, overrides: Iterable[str] = (), phase: str | None = None, typed: Iterable[str] | None = None
) -> RunConfig:
    """The checked configuration of a recipe with `key=value` overrides.

    If `epochs` is typed, durations of the recipe that do not fit into it are shortened, and a line on standard error
    says so (`smkd.config.checks`). If `init` is the name of a published backbone, the run has its architecture
    (`smkd.config.published`), except for what is given; a line says so as well.

    Args:
        recipe: name of a recipe, or the path of a YAML file.
        overrides: words such as `optim.lr=1e-4` or `data=photos`.
        phase: 'pretrain' or 'distill', where the caller accepts only one of them.
        typed: those of the words that the user typed; None means all of them.

    Raises:
        ConfigError: an unknown recipe or key, a wrong value, or a typed setting without effect; the line names it.
    """
    values, given = _load(recipe, ())
    overrides = list(overrides)
    values = _with_words(values, overrides)
    words = set().union(*(_flat(_read_word(word)) for word in (overrides if typed is None else typed)))
    values = _with_start(values, given.union(*(_flat(_read_word(word)) for word in overrides)))
    values["recipe"] = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    config = check(values)
    _check_names(config)
    if phase is not None and config.phase != phase:
        raise ConfigError(f"recipe '{recipe}' is for `smkd {config.phase}`, not for `smkd {phase}`")
    check_used(config, sorted(words))
    return _in_time(config, given | words)


def resumed_with(config: RunConfig, words: Iterable[str]) -> RunConfig:
    """The configuration as the words of `resume_with` change it, one after the other.

    Raises:
        ConfigError: a word is no setting, or one that a run cannot change.
    """
    words = list(words)
    for word in words:
        key = word.partition("=")[0]
        if not FIXED_KEYS.isdisjoint((key, key.split(".")[0])):
            raise ConfigError(
                f"resume_with={word}: a run cannot change its {key.split('.')[0]}; start another with out="
            )
    return check(_with_words(config.model_dump(mode="json"), words))


def lasting(config: RunConfig, run: RunConfig) -> RunConfig:
    """The configuration with those settings of the run that it goes on with that are counted in epochs."""
    values = config.model_dump(mode="json")
    for each in durations(run):
        values = _merged(values, _nested(each.key.split("."), each.epochs))
    return check(values)


def _with_words(values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    for word in words:
        values = _merged(values, _read_word(word))
    return values


def _read_word(word: str) -> dict[str, Any]:
    """Settings of one `key=value` word."""
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise ConfigError(f"'{word}' is not of the form key=value")
    try:
        # YAML's null, but here the home folder
        value = text if text == "~" else foreign_text.value(text)
    except ValueError as error:
        raise ConfigError(f"{key}: '{_shown(text)}' is not a value: {error}") from error
    if key == "data" and not isinstance(value, dict):
        key = "data.root"
    if key == "features.blocks" and isinstance(value, int) and not isinstance(value, bool):
        value = [value]  # in files of before, a number by itself is how many last blocks
    return _nested(key.split("."), value)


def _with_start(values: dict[str, Any], given: Set[str]) -> dict[str, Any]:
    """With the architecture of the published backbone that the run starts from, which is said."""
    changes = settings_of_start(values, given)
    if changes:
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in _flat(changes).items())
        _say(f"set for init={values['init']}: {words}")
    return _merged(values, changes)


def _in_time(config: RunConfig, typed: Set[str]) -> RunConfig:
    """With the recipe's durations shortened to the epochs that were typed, which is said."""
    changes = shortened(config, typed)
    if not changes:
        return config
    values = config.model_dump(mode="json")
    for key, (_, epochs) in changes.items():
        values = _merged(values, _nested(key.split("."), epochs))
    said = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in changes.items())
    _say(f"shortened to fit into epochs={config.epochs}: {said}")
    return check(values)


def _say(line: str) -> None:
    """A line on standard error, once under torchrun."""
    if is_first_rank():
        print(line, file=sys.stderr)


def _check_names(config: RunConfig) -> None:
    """Refuse unknown matchings and terms; not called for a run that is read, which needs none of them."""
    objective = config.objective
    named = [("objective.patch.matching", extensions.matchings, objective.patch.matching)]
    named += [("objective.terms", extensions.terms, name) for name in objective.terms]
    for key, known, name in named:
        try:
            known.check(name)
        except ConfigError as error:
            raise ConfigError(f"{key}={name}: {error}") from error


def check(values: Mapping[str, Any]) -> RunConfig:
    """Validate plain settings; the first thing that is wrong becomes one clear line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with the values that are given, checked again; None leaves a value as it is."""
    return check(_merged(config.model_dump(mode="json"), _given(changes)))


def check_protocol(**values: Any) -> ProtocolConfig:
    """Validate a way of measuring; the first thing that is wrong becomes one clear line."""
    try:
        return ProtocolConfig(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> RunConfig:
    """Read a configuration written by `dump`.

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds a key or value that does not fit; names the file.
    """
    try:
        return check(foreign_text.mapping(foreign_text.text_of(path), str(path)))
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if str(path) in told else f"'{path}': {told}") from error


def differences(old: RunConfig, new: RunConfig, *, free: bool = False) -> list[str]:
    """Keys, as `key: old -> new`, in which two runs would compute different things; or, if `free`, other ones."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if not _same(key, before.get(key), after.get(key)) and FREE_KEYS.isdisjoint((key, key.split(".")[0])) != free
    ]


def _same(key: str, before: Any, after: Any) -> bool:
    if key in PLACES and before is not None and after is not None:
        before, after = os.path.realpath(before), os.path.realpath(after)
    return bool(before == after)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the values that are None, also in nested groups."""
    inner = {key: _given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value is not None}


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _explain(error: ValidationError) -> str:
    first, *others = error.errors()
    key = _key(first["loc"])
    path = key.split(".")
    if first["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        section = "".join(f"{part}." for part in path[:-1])
        hint = nearest(key, [section + name for name in known]) or f"; known here: {', '.join(known)}"
        return f"unknown key '{key}'{hint}"
    if first["type"] == "missing":
        return f"'{key}' is missing"
    if first["type"] == "model_type":
        return f"{key}={_shown(first['input'])}: should be a group of settings ({', '.join(_fields_at(path))})"
    # a value that may be one of several kinds fails once for each
    same = [first, *(other for other in others if _key(other["loc"]) == key)]
    message = " or ".join(dict.fromkeys(_lowered(entry["msg"]) for entry in same))
    if not key:
        return message
    return (
        f"{key}: {message}"
        if isinstance(first["input"], dict | BaseModel)
        else f"{key}={_shown(first['input'])}: {message}"
    )


def _shown(value: Any) -> str:
    """A value as it was typed, on one line; one that is long or nested is cut."""
    if isinstance(value, bool | int | float | str | None):
        text = str(value)
        text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        return text if text.isprintable() else repr(text)
    return reprlib.repr(value)


def _key(location: tuple[int | str, ...]) -> str:
    """Dotted key; pydantic's names for the kinds of a union are left out."""
    named = (part for part in location if isinstance(part, int) or (part.isidentifier() and part not in VALUE_KINDS))
    return ".".join(map(str, named))


def _lowered(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _fields_at(path: list[str]) -> list[str]:
    """Field names of the section that a path of keys leads to."""
    model: type[BaseModel] = RunConfig
    for name in path:
        annotation = model.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
