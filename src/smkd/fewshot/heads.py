"""Few-shot classifiers by their names: those of this package, and those that installed packages announce."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from smkd.errors import ConfigError
from smkd.fewshot import linear, nearest, sgd, transductive
from smkd.fewshot.head import Head

ENTRY_POINTS = "smkd.heads"
BUILTIN: dict[str, Callable[..., Head]] = {
    "prototype": nearest.Prototype,
    "simpleshot": nearest.SimpleShot,
    "knn": nearest.KNN,
    "classifier": sgd.Classifier,
    "logistic": linear.Logistic,
    "ridge": linear.Ridge,
    "bd-cspn": transductive.BDCSPN,
    "laplacian-shot": transductive.LaplacianShot,
    "pt-map": transductive.PTMAP,
    "tim": transductive.TIM,
    "transductive-finetune": transductive.TransductiveFinetune,
}
"""The heads of this package."""


def head_names() -> list[str]:
    """Built-in heads, then those that installed packages announce under the entry point group `smkd.heads`."""
    return [*BUILTIN, *sorted(point.name for point in entry_points(group=ENTRY_POINTS))]


def make_head(spec: str, base_mean: Tensor | None = None) -> Head:
    """Head from its name and options, as in 'knn:neighbours=3' or 'simpleshot:transform=cl2n'.

    Args:
        spec: name, then options after a colon, separated by commas.
        base_mean: [dim] mean feature of the training classes, for heads that have the option `base_mean`.

    Raises:
        ConfigError: unknown name or option, or a value that does not fit.
    """
    name, _, text = spec.partition(":")
    factory = _factory(name)
    options = dict(part.partition("=")[::2] for part in text.split(",")) if text else {}
    # a head's options are its dataclass fields, with their defaults
    defaults: dict[str, Any] = (
        {f.name: f.default for f in dataclasses.fields(factory)} if dataclasses.is_dataclass(factory) else {}
    )
    given = {key: _value(spec, key, value, defaults) for key, value in options.items()}
    if "base_mean" in defaults:
        given["base_mean"] = base_mean
    try:
        return factory(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"head '{spec}': {error}") from error


def _factory(name: str) -> Callable[..., Head]:
    if name in BUILTIN:
        return BUILTIN[name]
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in points:
        found: Callable[..., Head] = points[name].load()
        return found
    known = [*BUILTIN, *points]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"head '{name}' is unknown{hint} (known: {', '.join(known)})")


def _value(spec: str, key: str, text: str, defaults: Mapping[str, Any]) -> Any:
    """An option's text as the type of its default."""
    options = [name for name in defaults if name != "base_mean"]
    if key not in options:
        raise ConfigError(f"head '{spec}' has no option '{key}' (options: {', '.join(options) or 'none'})")
    kind = type(defaults[key])
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"head '{spec}': {key}={text} is not a {kind.__name__}") from None
