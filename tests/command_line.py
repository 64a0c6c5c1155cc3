"""`smkd` as it is typed, in the process of the tests, which need not import everything again for each command."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

from smkd.cli import main

SMKD = [sys.executable, "-m", "smkd"]


def smkd(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a process would give: its exit code and what it writes, all from `main` on, in the folder `cwd`."""
    command, code, output, errors = ["smkd", *map(str, words)], 0, io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or "."), warnings.catch_warnings(), mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
    ):  # fmt: skip
        warnings.resetwarnings()
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())


def smkd_process(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own, for what depends on one: start, other processes, the interpreter's end."""
    return subprocess.run([*SMKD, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120)


def refused(*words: object, cwd: Path | None = None) -> str:
    """The one line of an error; checks exit code 2, no traceback, and that nothing was written."""
    before = sorted(cwd.rglob("*")) if cwd else []
    done = smkd(*words, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert (sorted(cwd.rglob("*")) if cwd else []) == before
    return lines[0]
