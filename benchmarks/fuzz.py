"""Damaged files of every kind that the package reads: each is read, or refused with an error of the package.

Each file is read in a process of its own fork, which may ask for 1 GB beyond what it starts with and has 5 seconds.
Exits with 1 where a file ends in another exception, takes longer, or takes more memory. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

import fuzz_files
from fuzz_files import Kind
from smkd.errors import SmkdError

OUTCOMES = ("loaded", "refused", "foreign", "hang", "memory")
SECONDS = 5.0
BYTES = 2**30


class Finding(NamedTuple):
    """A file that ended badly.

    Attributes:
        kind: of file.
        seed: makes it again.
        outcome: one of `OUTCOMES`.
        message: the exception, and where it came from.
    """

    kind: str
    seed: int
    outcome: str
    message: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only kinds whose name begins so")
    given = parser.parse_args()
    counts, findings = fuzz(given.cases, given.seed, given.kind or "")
    print(f"{'':16} " + " ".join(f"{outcome:>8}" for outcome in OUTCOMES))
    for kind, row in counts.items():
        print(f"{kind:16} " + " ".join(f"{row[outcome]:8}" for outcome in OUTCOMES))
    for finding in findings:
        print(f"{finding.kind} {finding.seed}: {finding.outcome}: {finding.message}", file=sys.stderr)
    total = sum(counts.values(), Counter[str]())
    print(json.dumps({"cases": total.total(), **{outcome: total[outcome] for outcome in OUTCOMES}}))
    raise SystemExit(1 if findings else 0)


def fuzz(cases: int, seed: int = 0, only: str = "") -> tuple[dict[str, Counter[str]], list[Finding]]:
    """Read damaged files.

    Args:
        cases: how many, shared by all kinds.
        seed: other files for another.
        only: what names of kinds begin with.

    Returns:
        How many files of each kind came to each outcome, and those that should not have.
    """
    with tempfile.TemporaryDirectory() as place:
        kinds = [kind for kind in fuzz_files.kinds(Path(place)) if kind.name.startswith(only)]
        waiting = [(kinds[number % len(kinds)], seed * 1_000_000 + number // len(kinds)) for number in range(cases)]
        counts = {kind.name: Counter[str]() for kind in kinds}
        findings = []
        while waiting:
            done = _read_until_one_hangs(waiting, Path(place))
            for (kind, number), (outcome, message) in zip(waiting, done, strict=False):
                counts[kind.name][outcome] += 1
                if outcome not in ("loaded", "refused"):
                    findings.append(Finding(kind.name, number, outcome, message))
            waiting = waiting[len(done) :]
    return counts, findings


def _read_until_one_hangs(waiting: list[tuple[Kind, int]], place: Path) -> list[tuple[str, str]]:
    """Outcomes of the first files: all of them, or up to one that a process did not come back from."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_read_all, args=(waiting, place, theirs), daemon=True)
    process.start()
    theirs.close()
    done: list[tuple[str, str]] = []
    try:
        while len(done) < len(waiting):
            if not ours.poll(SECONDS):
                return [*done, ("hang", f"over {SECONDS:.0f} seconds")]
            done.append(ours.recv())
    except EOFError:
        process.join()
        done.append(("foreign", f"the process ended with {process.exitcode}"))
    finally:
        process.kill()
        process.join()
        ours.close()
    return done


def _read_all(waiting: list[tuple[Kind, int]], place: Path, answers: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, resource.RLIM_INFINITY))
    for kind, seed in waiting:
        rng = random.Random(f"{kind.name} {seed}")
        path = place / f"case{kind.suffix}"
        path.write_bytes(fuzz_files.damaged(kind, rng))
        answers.send(_outcome(kind, path, rng))


def _outcome(kind: Kind, path: Path, rng: random.Random) -> tuple[str, str]:
    start = time.perf_counter()
    before = _most_memory(reset=True)
    try:
        kind.load(path, rng)
        outcome, message = "loaded", ""
    except SmkdError as error:
        outcome, message = "refused", str(error)
        if "\n" in message or not message:
            outcome = "foreign"
        if _out_of_memory(error):
            outcome = "memory"
    except Exception as error:
        outcome = "memory" if _out_of_memory(error) else "foreign"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {str(error)[:200]} ({frame.filename}:{frame.lineno})"
    if _most_memory() - before > BYTES:
        outcome = "memory"
    if time.perf_counter() - start > SECONDS:
        outcome = "hang"
    return outcome, message


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was asked for that there is not, however that was put in the end."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _most_memory(reset: bool = False) -> int:
    """Bytes that this process held at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
