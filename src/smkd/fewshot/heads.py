"""What a few-shot classifier is, and finding one by its name.

A head takes (support, labels, query, generator) and gives scores:

    support    float [episodes, n, dim]
    labels     int64 [episodes, n], 0 .. way - 1
    query      float [episodes, queries, dim]
    generator  on the CPU, for heads that draw
    scores     float [episodes, queries, way]; the largest wins, the first way on ties

Any callable like that will do; `docs/heads.md` shows one. Those that look at one query at a time through inner
products (`InductiveHead`) are evaluated much faster.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.errors import ConfigError
from smkd.files import nearest

ENTRY_POINTS = "smkd.heads"


class Head(Protocol):
    """A few-shot classifier; `transductive = True` marks those that look at all queries of an episode together."""

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Scores of the queries, see the module."""


class Rule(NamedTuple):
    """What an inductive head has learned from the support of each episode.

    Attributes:
        weight: [episodes, rows, dim]; a query x gives the products weight @ x + bias.
        bias: [episodes, rows], or None.
    """

    weight: Tensor
    bias: Tensor | None = None


class InductiveHead(ABC):
    """A head that sees each query by itself, through its inner products with a few rows.

    So a query that is shared by many episodes is read once: all episodes' rows meet it in one matrix product.
    """

    transductive: ClassVar[bool] = False
    fit_at_once: ClassVar[int] = 32
    """Episodes fitted together. Fixed, because a head that draws does so for all of them from one generator."""

    def prepare(self, features: Tensor) -> Tensor:
        """Features [..., dim] as the head wants them, support and queries alike."""
        return features

    @abstractmethod
    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """Learn from prepared support features [episodes, n, dim]."""

    def scores(self, products: Tensor, labels: Tensor) -> Tensor:
        """Scores [episodes, way, queries] from the products [episodes, rows, queries]."""
        return products

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Scores of the queries, see the module."""
        rule = self.fit(self.prepare(support), labels, generator)
        return self.scores(rule_products(rule, self.prepare(query)), labels).transpose(1, 2)


def rule_products(rule: Rule, query: Tensor) -> Tensor:
    """Products [episodes, rows, queries] of each episode's rows with its own queries [episodes, queries, dim]."""
    products = rule.weight @ query.transpose(1, 2)
    return products if rule.bias is None else products + rule.bias[..., None]


def one_hot(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """[episodes, n] -> [episodes, way, n]."""
    return F.one_hot(labels).transpose(1, 2).to(dtype)


def class_means(support: Tensor, labels: Tensor) -> Tensor:
    """Mean of each way's support: [episodes, way, dim]."""
    members = one_hot(labels, support.dtype)
    return (members / members.sum(dim=2, keepdim=True)) @ support


def builtin() -> dict[str, Callable[..., Head]]:
    """The heads of this package by name."""
    from smkd.fewshot import linear, nearest, sgd, transductive

    return {
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


def head_names() -> list[str]:
    """Built-in heads, then those that installed packages announce under the entry point group `smkd.heads`."""
    return [*builtin(), *sorted(point.name for point in entry_points(group=ENTRY_POINTS))]


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
    heads: dict[str, Callable[..., Head]] = builtin()
    if name in heads:
        return heads[name]
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in points:
        found: Callable[..., Head] = points[name].load()
        return found
    known = [*heads, *points]
    raise ConfigError(f"head '{name}' is unknown{nearest(name, known)} (known: {', '.join(known)})")


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
