"""Every setting of a run in words: its type, its default, its meaning, and the published code's name for it.

`python -m smkd.reference.settings_page` prints docs/settings.md.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from smkd.config import protocol, run_config, schema
from smkd.config.run_config import RunConfig
from smkd.config.schema import Section
from smkd.reference.option_table import EVALUATION_OPTIONS, TRAINING_OPTIONS

HEADING = """# Settings

A recipe (`smkd recipes`) is a YAML file of these settings. `key=value` on the command line changes one:
`smkd pretrain mini-imagenet-pretrain data=D optim.lr=2e-4 'validation.shots=[1]'`. `smkd recipes show NAME --explain`
prints a recipe with every setting and this page's words as comments; the output is a recipe itself.

The defaults are those of the package; a recipe may have others. The last column is the option of the published code.
This page is made by `python -m smkd.reference.settings_page`.
"""
WIDTH = 110


class Setting(NamedTuple):
    """A setting in words.

    Attributes:
        key: dotted name.
        type: which values there may be.
        default: as YAML; empty if a recipe must give it.
        meaning: what its docstring says.
        reference: options of the published code that it stands for.
    """

    key: str
    type: str
    default: str
    meaning: str
    reference: tuple[str, ...] = ()


@functools.cache
def settings() -> dict[str, Setting]:
    """All settings of `RunConfig` by their dotted names, in its order."""
    theirs: dict[str, list[str]] = {}
    for name, option in (TRAINING_OPTIONS | EVALUATION_OPTIONS).items():
        for key in option.keys:
            theirs.setdefault(key, []).append(name)
    found = (each._replace(reference=tuple(theirs.get(each.key, ()))) for each in _settings(RunConfig, ""))
    return {each.key: each for each in found}


def _settings(section: type[Section], prefix: str) -> Iterator[Setting]:
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is None or NoneType in kinds:
            words = "settings below, or none" if inner else type_in_words(field.annotation, tuple(field.metadata))
            yield Setting(prefix + name, words, _default(field), _meaning(section, name))
        if inner is not None:
            yield from _settings(inner, f"{prefix}{name}.")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _meaning(section: type[Section], name: str) -> str:
    """The docstring below a setting, or below that of the same name that it replaces."""
    return next(
        _docstrings()[each.__name__, name] for each in section.__mro__ if (each.__name__, name) in _docstrings()
    )


@functools.cache
def _docstrings() -> dict[tuple[str, str], str]:
    found = {}
    for module in (schema, protocol, run_config):
        sections = [each for each in ast.parse(inspect.getsource(module)).body if isinstance(each, ast.ClassDef)]
        for section in sections:
            for field, below in itertools.pairwise(section.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[section.name, name] = " ".join(text.split())
    return found


def type_in_words(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """Which values a type allows.

    Args:
        annotation: a type of `RunConfig`.
        limits: pydantic's metadata of it.
    """
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        inner = [limit for each in more for limit in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return type_in_words(annotation, (*limits, *inner))
    given = get_args(annotation)
    match get_origin(annotation):
        case origin if origin in (Union, UnionType):
            return " or ".join(type_in_words(each, () if each is NoneType else limits) for each in given)
        case origin if origin is Literal:
            return ", ".join(map(str, given[:-1])) + (" or " if given[1:] else "") + str(given[-1])
        case origin if origin is tuple and given[-1] is not ...:
            return f"list of {len(given)}: {type_in_words(given[0])}"
        case origin if origin is tuple:
            return f"list: {type_in_words(given[0])}"
        case origin if origin is dict:
            return f"by name: {type_in_words(given[1])}"
    words = {bool: "true or false", str: "text", Path: "path", NoneType: "none", int: "whole number", float: "number"}
    return words[annotation] + "".join(f" {limit}" for limit in _limits(limits) if annotation in (int, float))


def _limits(limits: tuple[Any, ...]) -> Iterator[str]:
    for limit in limits:
        match limit:
            case annotated_types.Ge(ge=value):
                yield f"from {value:g}"
            case annotated_types.Gt(gt=value):
                yield f"above {value:g}"
            case annotated_types.Le(le=value):
                yield f"to {value:g}"
            case annotated_types.Lt(lt=value):
                yield f"below {value:g}"


def explained_yaml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Settings as YAML that `smkd` reads, with the words on each as a comment above it.

    Args:
        values: plain values of a `RunConfig`, nested.
        prefix: of their dotted names.
    """
    indent, lines = "  " * prefix.count("."), list[str]()
    for name, value in values.items():
        known = settings().get(prefix + name)
        if known is not None:
            note = f"{known.meaning} ({known.type})"
            lines += textwrap.wrap(note, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", explained_yaml(value, f"{prefix}{name}.").rstrip("\n")]
        else:
            lines.append(f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/settings.md."""
    sections: dict[str, list[Setting]] = {}
    for each in settings().values():
        sections.setdefault(each.key.split(".")[0] if "." in each.key else "The run", []).append(each)
    parts = [HEADING]
    for title, rows in sections.items():
        lines = [f"## {title}" if title == "The run" else f"## `{title}`", "",
                 "| setting | values | default | meaning | published code |", "|---|---|---|---|---|"]  # fmt: skip
        for each in rows:
            default = f"`{each.default}`" if each.default else ""
            reference = ", ".join(f"`--{name}`" for name in each.reference)
            meaning = re.sub(r"docs/([a-z-]+\.md)", r"[\1](\1)", each.meaning)
            lines.append(f"| `{each.key}` | {each.type} | {default} | {meaning} | {reference} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
