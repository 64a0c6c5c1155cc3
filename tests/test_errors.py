"""The errors that a user can meet, and docs/errors.md, which lists them."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

import smkd
from smkd import cli, errors
from smkd.engine import stopping

SOURCE = Path(smkd.__file__).parent
DOCS = Path(__file__).parents[1] / "docs" / "errors.md"


def rows(first: str) -> list[list[str]]:
    """Cells of the table whose header begins with a word."""
    tables = re.findall(r"(?:^\|.*\n)+", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = next(table for table in tables if table.startswith(f"| {first} |")).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@functools.cache
def classes() -> dict[str, type[Exception]]:
    """Every class of the package that is an error for the user, wherever it is defined."""
    found: dict[str, type[Exception]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                "Error" in ast.unparse(b) or "Exc" in ast.unparse(b) for b in node.bases
            ):
                name = ".".join(["smkd", *path.relative_to(SOURCE).with_suffix("").parts])
                found[node.name] = getattr(importlib.import_module(name), node.name)
    return {name: found[name] for name in found if issubclass(found[name], errors.SmkdError)}


def test_every_error_is_in_the_table_with_its_own_words() -> None:
    known, table = classes(), {cells[0].strip("`"): cells[1:] for cells in rows("class")}
    of_errors = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert of_errors - {"SmkdWarning"} <= known.keys()
    assert table.keys() == known.keys()
    for name, (bases, meaning, advice) in table.items():
        assert re.findall(r"`(\w+)`", bases) == [base.__name__ for base in known[name].__bases__], name
        assert meaning == str(known[name].__doc__).split("\n")[0], f"{name}: its docstring and the table differ"
        assert len(advice.split()) > 3, name


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_error_is_one_line_and_its_exit_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"Stopped": (130,)}.get(name, ())

    def fails() -> None:
        raise classes()[name]("'a.jpg' is empty; give an image", *own)

    monkeypatch.setattr("sys.argv", ["smkd", "predict"])
    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == (own[0] if own else 2)
    assert capsys.readouterr().err == "smkd: 'a.jpg' is empty; give an image\n"
    # with --debug it goes through as it is
    monkeypatch.setattr("sys.argv", ["smkd", "predict", "--debug"])
    with pytest.raises(classes()[name]):
        cli.main()


@pytest.mark.slow
def test_every_exit_code_is_in_the_table() -> None:
    table = {int(code): meaning for code, meaning in rows("exit code")}
    assert len(table) == len(rows("exit code"))
    used = {0, errors.SmkdError.exit_code, stopping.TIME_IS_UP, *(128 + number for number in stopping.SIGNALS)}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("SystemExit", "typer.Exit", "sys.exit"):
                used |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, int)}
    assert {1, 2} <= used <= table.keys()
    assert all(meaning.endswith(".") for meaning in table.values())


def test_the_readme_leads_there() -> None:
    assert "(docs/errors.md)" in (DOCS.parents[1] / "README.md").read_text(encoding="utf-8")
