"""The direction rule: a package imports from itself, from packages to its left and from the support modules."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from pathlib import Path

import pytest

import smkd

SOURCE = Path(smkd.__file__).parent
PACKAGES = (
    "config", "data", "prepare", "models", "weights", "reference", "objectives", "engine", "fewshot", "classify",
    "publishing", "viz", "app",
)  # fmt: skip
# arrows to the left that are left out on purpose: a model sees tensors, not batches
FORBIDDEN = {("models", "data")}
# top-level modules that every package may use, and that use nothing but each other
SUPPORT = ("errors", "files", "machine", "processes", "progress", "distributed", "device", "extensions", "download")
# top-level modules that wire the packages together and may import everything
ENTRY = ("__init__", "__main__", "api", "cli", "demo", "adaptation", "report", "story")
UNWANTED = ("torchvision", "timm")


def imported(source: str, module: tuple[str, ...]) -> list[tuple[int, str]]:
    """Line and dotted name of everything a module imports, also inside functions.

    `module` is the file's place below the package, such as ('data', 'crops'); relative names are resolved.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = ("smkd", *module)[: -node.level]
                base = ".".join([*folder, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(source: str, module: tuple[str, ...]) -> list[str]:
    """What a module imports against the rules, one readable line each."""
    where = "/".join(module) + ".py"
    owner = module[0]
    if len(module) > 1 and owner not in PACKAGES + ENTRY:
        return [f"{where}: unknown package smkd.{owner}; give it a place in PACKAGES of {Path(__file__).name}"]
    if len(module) == 1 and owner not in SUPPORT + ENTRY:
        return [f"{where}: unknown module smkd.{owner}; name it in SUPPORT or ENTRY of {Path(__file__).name}"]
    wrong = []
    for line, name in imported(source, module):
        top, *rest = name.split(".")
        if top in UNWANTED:
            wrong.append(f"{where}:{line}: imports {top}")
        if top != "smkd" or owner in ENTRY:
            continue
        target = rest[0] if rest else ""
        if target == "__version__" or target in SUPPORT:
            continue
        if target not in PACKAGES:
            wrong.append(f"{where}:{line}: imports {name}, which is for the entry points")
        elif owner in SUPPORT:
            wrong.append(f"{where}:{line}: a support module imports {name}")
        elif PACKAGES.index(target) > PACKAGES.index(owner) or (owner, target) in FORBIDDEN:
            wrong.append(f"{where}:{line}: {owner} imports {name}; the direction is {' -> '.join(PACKAGES)}")
    return wrong


def modules() -> list[tuple[str, ...]]:
    files = sorted(SOURCE.rglob("*.py"))
    return [file.relative_to(SOURCE).with_suffix("").parts for file in files]


def test_source_is_there() -> None:
    assert {m[0] for m in modules() if len(m) > 1} >= {"config", "data", "models", "objectives", "engine"}


@pytest.mark.parametrize("module", modules(), ids="/".join)
def test_direction(module: tuple[str, ...]) -> None:
    text = SOURCE.joinpath(*module).with_suffix(".py").read_text(encoding="utf-8")
    assert violations(text, module) == []


def circles(imports: Mapping[str, Set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, by Tarjan's algorithm."""
    found: list[list[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        path.append(module)
        for target in imports.get(module, ()):
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in path:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            group = path[path.index(module) :]
            del path[path.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in imports:
        if module not in order:
            visit(module)
    return found


def test_no_circles() -> None:
    files = {".".join(("smkd", *m)): m for m in modules() if m[-1] != "__init__"}
    imports = {}
    for name, module in files.items():
        text = SOURCE.joinpath(*module).with_suffix(".py").read_text(encoding="utf-8")
        targets = {target for _, target in imported(text, module)}
        targets |= {target.rpartition(".")[0] for target in targets}
        imports[name] = targets & files.keys() - {name}
    assert circles(imports) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_each_public_name_is_found() -> None:
    assert {*smkd._PLACES, "__version__"} == set(smkd.__all__)
    assert all(getattr(smkd, name) is not None for name in smkd.__all__)


def test_a_name_stands_for_one_thing() -> None:
    """Public classes and functions; a verb of the command line may be called like the function it wires."""
    places: dict[str, list[str]] = {}
    for module in modules():
        if module[0] not in ("cli", "api"):
            tree = ast.parse(SOURCE.joinpath(*module).with_suffix(".py").read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append("/".join(module))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (("config", "x"), "import smkd.data.augment"),
        (("models", "x"), "from smkd.data.loader import Views"),
        (("models", "x"), "from smkd import data"),
        (("models", "x"), "from ..data import loader"),
        (("models", "x"), "def f():\n    from smkd.engine import step"),
        (("objectives", "x"), "from smkd.engine.step import Learner"),
        (("engine", "x"), "from smkd.fewshot import evaluate"),
        (("engine", "x"), "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from smkd.fewshot import heads"),
        (("fewshot", "x"), "from smkd.viz import attention"),
        (("viz", "x"), "from smkd import cli"),
        (("viz", "x"), "from smkd.cli import main"),
        (("data", "x"), "import smkd"),
        (("data", "x"), "import torchvision.transforms as T"),
        (("cli",), "from timm.models import create_model"),
        (("errors",), "from smkd.config import schema"),
        (("serving", "x"), ""),
        (("helpers",), ""),
    ],
)
def test_wrong_imports_are_found(module: tuple[str, ...], source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (("engine", "x"), "from smkd import __version__, distributed\nfrom smkd.errors import DataError"),
        (("engine", "__init__"), "from .step import Learner\nfrom ..data import loader\nfrom .. import errors"),
        (("fewshot", "x"), "from smkd.engine import checkpoint\nfrom smkd.data.crops import Box"),
        (("viz", "x"), "from smkd.fewshot.features import extract\nimport timmy\nimport numpy"),
        (("cli",), "from smkd.fewshot import evaluate\nfrom smkd.engine import launch\nfrom smkd.viz import maps"),
        (("distributed",), "import torch\nfrom smkd.errors import SmkdError"),
    ],
)
def test_right_imports_pass(module: tuple[str, ...], source: str) -> None:
    assert violations(source, module) == []


def test_unknown_package_is_explained() -> None:
    assert "unknown package smkd.serving" in violations("", ("serving", "x"))[0]
