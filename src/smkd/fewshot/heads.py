"""Few-shot classifiers by their names: those of this package, and those that installed packages announce."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from smkd.errors import ConfigError
from smkd.extensions import Registry
from smkd.fewshot.head import Head

heads = Registry(
    "head", "smkd.heads",
    {
        "prototype": "smkd.fewshot.nearest:Prototype",
        "simpleshot": "smkd.fewshot.nearest:SimpleShot",
        "knn": "smkd.fewshot.nearest:KNN",
        "classifier": "smkd.fewshot.sgd:Classifier",
        "logistic": "smkd.fewshot.linear:Logistic",
        "ridge": "smkd.fewshot.linear:Ridge",
        "bd-cspn": "smkd.fewshot.transductive:BDCSPN",
        "laplacian-shot": "smkd.fewshot.transductive:LaplacianShot",
        "pt-map": "smkd.fewshot.transductive:PTMAP",
        "tim": "smkd.fewshot.transductive:TIM",
        "transductive-finetune": "smkd.fewshot.transductive:TransductiveFinetune",
    },
)  # fmt: skip


def register_head(name: str, make: Callable[..., Head]) -> None:
    """Make a few-shot head known to `--head` and `evaluation.head` in this process (docs/extending.md).

    Args:
        name: for the setting.
        make: called with the options that follow the name after a colon, returns a `smkd.fewshot.Head`. Options are the
            fields of a dataclass, with their defaults; anything else has none.

    Raises:
        ConfigError: the name is one of smkd's own.
    """
    heads.register(name, make)


def head_names() -> list[str]:
    """Built-in heads, then registered ones, then those that installed packages announce (`smkd.heads`)."""
    return heads.names()


def make_head(spec: str, base_mean: Tensor | None = None) -> Head:
    """Head from its name and options, as in 'knn:neighbours=3' or 'simpleshot:transform=cl2n'.

    Args:
        spec: name, then options after a colon, separated by commas.
        base_mean: [dim] mean feature of the training classes, for heads that have the option `base_mean`.

    Raises:
        ConfigError: unknown name or option, or a value that does not fit.
    """
    name, _, text = spec.partition(":")
    factory: Callable[..., Head] = heads.load(name)
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
