"""From a recipe's name and `key=value` words to a checked `RunConfig`, and from a run's folder back to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from smkd.config.schema import ProtocolConfig, RunConfig
from smkd.errors import ConfigError

# What may differ when a run is resumed: places, and how or how long it computes, not what.
FREE_KEYS = frozenset((
    "out", "resume", "resume_with", "overwrite", "num_workers", "log_every", "wandb", "wandb_project", "data.cache",
    "data.cache_dir", "compile", "recompute", "keep", "save_minutes", "max_hours", "save_every", "epochs", "validation",
    "data.root", "data.on_error", "data.changed", "devices", "num_nodes", "accumulate", "precision", "guard",
))  # fmt: skip
# What `resume_with` cannot change: networks, data and what steps are counted in.
FIXED_KEYS = frozenset((
    "recipe", "phase", "init", "init_optimizer", "seed", "batch_size", "data", "model", "out", "resume", "resume_with",
    "overwrite",
))  # fmt: skip
KINDS = ("bool", "int", "float", "str")
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
        raise ConfigError(f"unknown recipe '{name}'{_nearest(name, recipe_names())}; `smkd recipes` lists them")
    return (resources.files("smkd") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """One line that says what a recipe is for."""
    return str(_parse(recipe_text(name), name).get("summary", ""))


def load_recipe(recipe: str) -> dict[str, Any]:
    """Settings of a recipe with everything it extends, outermost last.

    Args:
        recipe: name of a recipe of the package, or the path of a YAML file.
    """
    is_file = recipe.endswith((".yaml", ".yml"))
    if is_file and not Path(recipe).is_file():
        raise ConfigError(f"recipe file '{recipe}' does not exist")
    text = Path(recipe).read_text(encoding="utf-8") if is_file else recipe_text(recipe)
    values = _parse(text, recipe)
    values.pop("summary", None)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    # a file may extend its neighbour by a relative path
    beside = Path(recipe).parent / str(parent)
    return _merged(load_recipe(str(beside) if is_file and beside.is_file() else str(parent)), values)


def resolve(recipe: str, overrides: Iterable[str] = (), phase: str | None = None) -> RunConfig:
    """The checked configuration of a recipe with `key=value` overrides.

    Args:
        recipe: name of a recipe, or the path of a YAML file.
        overrides: words such as `optim.lr=1e-4` or `data=photos`.
        phase: 'pretrain' or 'distill', where the caller accepts only one of them.

    Raises:
        ConfigError: unknown recipe, key, or a value that does not fit; one line that names it.
    """
    values = load_recipe(recipe)
    values = _with_words(values, overrides)
    values["recipe"] = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    config = check(values)
    if phase is not None and config.phase != phase:
        raise ConfigError(f"recipe '{recipe}' is for `smkd {config.phase}`, not for `smkd {phase}`")
    return config


def resumed_with(config: RunConfig, words: Iterable[str]) -> RunConfig:
    """The configuration as the words of `resume_with` change it, one after the other.

    Raises:
        ConfigError: a word is no setting, or one that a run cannot change.
    """
    for word in words:
        key = word.partition("=")[0]
        if not FIXED_KEYS.isdisjoint((key, key.split(".")[0])):
            raise ConfigError(
                f"resume_with={word}: a run cannot change its {key.split('.')[0]}; start another with out="
            )
    return check(_with_words(config.model_dump(mode="json"), words))


def _with_words(values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise ConfigError(f"'{word}' is not of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: '{text}' is not a value") from error
        if key == "data" and not isinstance(value, dict):
            key = "data.root"
        values = _merged(values, _nested(key.split("."), value))
    return values


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
    """The resolved configuration as YAML, readable back with `load`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: Path) -> RunConfig:
    """Read a configuration written by `dump`."""
    try:
        return check(_parse(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from error


def differences(old: RunConfig, new: RunConfig, *, free: bool = False) -> list[str]:
    """Keys, as `key: old -> new`, in which two runs would compute different things; or, if `free`, other ones."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and FREE_KEYS.isdisjoint((key, key.split(".")[0])) != free
    ]


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"'{name}'{line} is not valid YAML") from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{name}' must hold keys and values")
    return values


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the None of a group, or of groups within."""
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


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else ""


def _explain(error: ValidationError) -> str:
    first, *others = error.errors()
    key = _key(first["loc"])
    path = key.split(".")
    if first["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        section = "".join(f"{part}." for part in path[:-1])
        hint = _nearest(key, [section + name for name in known]) or f"; known here: {', '.join(known)}"
        return f"unknown key '{key}'{hint}"
    if first["type"] == "missing":
        return f"'{key}' is missing"
    if first["type"] == "model_type":
        return f"{key}={first['input']}: should be a group of settings ({', '.join(_fields_at(path))})"
    # a value that may be one of several kinds fails once for each
    same = [first, *(other for other in others if _key(other["loc"]) == key)]
    message = " or ".join(dict.fromkeys(_lowered(entry["msg"]) for entry in same))
    if not key:
        return message
    return f"{key}: {message}" if isinstance(first["input"], dict | BaseModel) else f"{key}={first['input']}: {message}"


def _key(location: tuple[int | str, ...]) -> str:
    """Dotted key; pydantic's names for the kinds of a union are left out."""
    named = (part for part in location if isinstance(part, int) or (part.isidentifier() and part not in KINDS))
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
