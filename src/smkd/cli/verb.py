"""What every verb does around its work: expand `~`, check outputs, handle signals and closed pipes."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ParamSpec, get_type_hints

from smkd.cli.output import STANDARD, Output, check, say, standard
from smkd.errors import ConfigError
from smkd.files import expanded
from smkd.processes import deaths_named, is_first_rank

P = ParamSpec("P")
CLOSED = 128 + 13
"""Exit code where the reader of the output went away, as of a program that SIGPIPE ends."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends what Ctrl-C ends."""


def verb(stopped: str = "stopped") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function a verb of the command line.

    Its options that are marked with an `Output` are checked against what it reads and what is there before it runs;
    a `-` among them sends its other lines to standard error.

    Args:
        stopped: what to say when it is interrupted.
    """

    def made(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **options: P.kwargs) -> None:
            given = {name: _expanded(value) for name, value in options.items()}
            with _ended(stopped), deaths_named():
                outputs = _outputs(function, given)
                _check(outputs, given)
                if any(path == STANDARD for _, _, path, _ in outputs):
                    token = standard.set(sys.stdout)
                    try:
                        with redirect_stdout(sys.stderr):
                            function(*args, **given)
                    finally:
                        standard.reset(token)
                else:
                    function(*args, **given)

        return run

    return made


def _expanded(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~")):
        return type(value)(expanded(value)) if isinstance(value, str) else expanded(value)
    return [_expanded(each) for each in value] if isinstance(value, list) else value


def _outputs(function: Callable[..., None], given: dict[str, Any]) -> list[tuple[str, str, Path, Output]]:
    """Name, option, path and kind of what is to be written."""
    found = []
    for name, hint in get_type_hints(function, include_extras=True).items():
        path = given.get(name)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Output) and path is not None:
                found.append((name, _option(name, hint), Path(path), mark))
    return found


def _option(name: str, hint: Any) -> str:
    """As it is typed; typer takes the first of an option's names for its default, where that is elsewhere."""
    for each in hint.__metadata__:
        for word in (getattr(each, "default", None), *(getattr(each, "param_decls", None) or ())):
            if isinstance(word, str) and word.startswith("-"):
                return word
    return f"--{name.replace('_', '-')}"


def _check(outputs: list[tuple[str, str, Path, Output]], given: dict[str, Any]) -> None:
    written = {name for name, _, _, _ in outputs}
    read = [path for name, value in given.items() if name not in written for path in _paths(value)]
    seen: dict[str, str] = {}
    for _, option, path, output in outputs:
        check(option, path, output, read)
        place = os.path.realpath(path) if path != STANDARD else "-"
        if place in seen:
            raise ConfigError(f"{option} and {seen[place]} are both '{path}'; give two names")
        seen[place] = option


def _paths(value: Any) -> Iterator[Path]:
    """The files and folders that a value names, also as `key=path`."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, str | Path):
        words = [str(value), *([str(value).partition("=")[2]] if isinstance(value, str) else [])]
        yield from (Path(word) for word in words if word and os.path.exists(os.path.expanduser(word)))


@contextmanager
def _ended(stopped: str) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed pipe end a verb in a line or silently, with the shell's exit codes."""
    before = None
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        if is_first_rank():
            say(stopped, err=True)
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    except BrokenPipeError as error:
        if error.filename is not None:  # no standard stream
            raise
        raise SystemExit(CLOSED) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> None:
    raise Terminated
