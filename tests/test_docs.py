"""README and docs name what exists: links, files, verbs with their options, settings, and each file of the package.

Every line of a block that begins with `smkd` is one that the command line takes, with values, recipe and settings.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel

import smkd
from smkd.cli import app
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.errors import SmkdError

ROOT, SOURCE = Path(__file__).parents[1], Path(smkd.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
QUESTIONS = ("Why is my accuracy low?", "Add a data set", "Add an objective", "Resume a run", "Train on 8 GPUs")


def code(text: str) -> Iterator[str]:
    """Lines of the code blocks without their comments, and what stands between single backticks."""
    block = r"^```.*?\n(.*?)^```"
    for found in re.findall(block, text, flags=re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", found).splitlines():
            yield re.sub(r"\s# .*", "", line)
    for found in re.findall(r"`([^`]+)`", re.sub(block, "", text, flags=re.MULTILINE | re.DOTALL)):
        yield " ".join(found.split())


def commands() -> dict[str, set[str]]:
    """Every verb, as in 'data verify', with its options."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        yield name, {option for parameter in command.params for option in parameter.opts}
        for word, below in getattr(command, "commands", {}).items():
            yield from walk(below, f"{name} {word}".strip())

    return dict(walk(typer.main.get_command(app), ""))


def anchors(path: Path) -> set[str]:
    """What `#...` may be in a link to a page: its headings, lower case, without punctuation, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page: Path, text: str) -> list[str]:
    """Links within the repository that lead to no file or no heading."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def wrong_files(text: str) -> list[str]:
    """Files of the repository, as in `engine/train.py`, that are not there."""
    named = (word for line in code(text) for word in re.findall(r"[\w./*-]+/[\w*-]+\.(?:py|md|csv|yaml)\b", line))
    ours = {path.name for path in (*ROOT.iterdir(), *SOURCE.iterdir()) if path.is_dir()} | {"src"}
    return [
        name
        for name in named
        if name.removeprefix("smkd/").split("/")[0] in ours
        and not any(any(base.glob(name)) for base in (ROOT, SOURCE, SOURCE.parent))
    ]


def wrong_commands(text: str) -> list[str]:
    """`smkd VERB` with a verb or an option that does not exist."""
    known, wrong = commands(), []
    for line in code(text):
        for words in re.findall(r"(?:^|[\s|;(])smkd ([a-z][\w-]*[^|;&]*)", line):
            first, *others = words.split()
            verb = f"{first} {others[0]}" if others and f"{first} {others[0]}" in known else first
            group = any(name.startswith(f"{first} ") for name in known)
            if verb not in known or (group and verb == first and others and not others[0].startswith("-")):
                wrong.append(f"smkd {words}")
                continue
            options = {option.split("=")[0] for option in others if re.match(r"--?[a-z]", option)}
            wrong += [f"smkd {verb} {option}" for option in sorted(options - known[verb] - {"--help", "--debug"})]
    return wrong


def sections(kind: Any) -> Iterator[type[BaseModel]]:
    """The sections of settings that an annotation allows."""
    if get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from sections(part)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind


def is_setting(section: type[BaseModel], names: list[str]) -> bool:
    """Whether dotted names lead to a field; anything may follow a table of values, such as objective.terms."""
    field = section.model_fields.get(names[0])
    if field is None:
        return False
    below = list(sections(field.annotation))
    if len(names) == 1 or not below:
        return len(names) == 1 or get_origin(field.annotation) is dict
    return any(is_setting(part, names[1:]) for part in below)


def wrong_settings(text: str) -> list[str]:
    """`section.key=value` with a key that no setting has."""
    named = (name for line in code(text) for name in re.findall(r"(?:^|[\s(])((?:[a-z_]+\.)+[a-z_]+)=", line))
    return [name for name in named if not is_setting(RunConfig, name.split("."))]


def typed(text: str) -> Iterator[str]:
    """What stands after `smkd` in the lines of a page's blocks that a shell would run."""
    for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines() if language in ("", "bash", "sh") else ():
            if found := re.match(r"\s*(?:exec |[A-Z_]+=\S+ )*smkd ([a-z].*)", line):
                yield found[1]


def refusal(words: list[str]) -> str | None:
    """What the command line or the settings say against words, without running them."""
    command: Any = typer.main.get_command(app)
    try:
        while (below := getattr(command, "commands", None)) and words and not words[0].startswith("-"):
            command, words = below[words[0]], words[1:]
        given = command.make_context(command.name, list(words)).params
        recipe, settings = given.get("recipe"), given.get("settings") or ()
        # a name in capitals and a file stand for the reader's own
        if recipe and not recipe.isupper() and not recipe.endswith(".yaml"):
            loading.resolve(recipe, settings, command.name if command.name in ("pretrain", "distill") else None)
    except Exception as error:
        if isinstance(error, (KeyError, SmkdError)) or hasattr(error, "exit_code"):
            return f"{type(error).__name__}: {error}"
        raise
    return None


def wrong_lines(text: str) -> list[str]:
    """Lines of the blocks that smkd would refuse: a value, an argument that is missing, a recipe, its settings."""
    found = {}
    for line in typed(text):
        words = shlex.split(re.split(r"\s(?:#|[|;>]|&&)(?:\s|$)", line)[0].rstrip("'"))
        if "..." not in words:
            found[line] = refusal(words)
    return [f"{line}: {why}" for line, why in found.items() if why]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert wrong_links(page, text) == []
    assert wrong_files(text) == []
    assert wrong_commands(text) == []
    assert wrong_settings(text) == []
    assert wrong_lines(text) == []


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (lambda text: wrong_links(ROOT / "README.md", text), "[a](docs/heads.md#one-of-your-own)", "[a](docs/no.md)"),
        (lambda text: wrong_links(ROOT / "README.md", text), "[a](https://x.org)", "[a](docs/heads.md#no-heading)"),
        (wrong_files, "`engine/train.py` and `recipes/*.yaml`", "`engine/loops.py`"),
        (wrong_files, "`src/smkd/files.py` reads `photos/ant.csv`", "`src/smkd/no.py`"),
        (wrong_commands, "`smkd data verify photos --crop 48`", "`smkd data check photos`"),
        (wrong_commands, "```\nsmkd eval x.h5 --shot 1  # smkd nothing\n```", "```\nsmkd eval x.h5 --shots 1\n```"),
        (wrong_settings, "`data.cache=mmap objective.terms.koleo=0.1 data.sampler=null`", "`data.caches=mmap`"),
        (wrong_settings, "`data.sampler.classes=8`", "`data.sampler.kinds=8`"),
        (wrong_lines, "```\nsmkd eval RUN --split val  # words\n```", "```\nsmkd eval RUN --split vals\n```"),
        (wrong_lines, "```\nsmkd fit photos -o clf.smkd | cat\n```", "```bash\nsmkd fit photos\n```"),
        (wrong_lines, "```\nsmkd features R --recipe folder-distill -o x.h5\n```", "```\nsmkd bench patterns\n```"),
        (wrong_lines, "```\nsmkd pretrain fc100-pretrain epochs=9\n```", "```\nsmkd distill fc100-pretrain\n```"),
        (wrong_lines, "```\nsmkd recipes show adapt\n```", "```\nsmkd pretrain fc100-pretrain epochs=no\n```"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(check: Any, right: str, wrong: str) -> None:
    assert check(right) == []
    assert len(check(wrong)) == 1


def test_architecture_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^\| package \|.*?\n\n", text, flags=re.MULTILINE | re.DOTALL)
    assert table is not None
    named, package = set(), ""
    for row in table[0].strip().splitlines()[2:]:
        first, files, _ = (cell.strip().strip("`") for cell in row.strip("|").split(" | "))
        package = first or package
        named |= {f"{package}/{name}.py" for name in re.findall(r"[\w]+", files.replace("recipes/*.yaml", ""))}
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("*/*.py") if path.stem != "__init__"}
    assert named == there
    above = {path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("__")}
    assert {name for name in above if not re.search(rf"\b{name}\b", text)} == set()


@pytest.mark.parametrize("question", QUESTIONS)
def test_readme_links_the_answers(question: str) -> None:
    found = re.search(rf"\[{re.escape(question)}\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    assert "#" in found[1] or (ROOT / found[1]).exists()


def test_source_names_pages_and_files_that_exist() -> None:
    wrong = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path in SOURCE.rglob("*.py")
        for name in re.findall(r"\b(?:docs|tests|benchmarks)/[\w-]+\.(?:md|py)\b", path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert wrong == set()
