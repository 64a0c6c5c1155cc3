"""Would a mistake in the core be noticed? Small mistakes are put into a copy of it, and its tests must fail.

Two kinds: named ones, found by module and text, and ones made by rule (another comparison, sign, number or argument, a
negated condition, a statement left out), of which a seeded choice is tried. A mutant is killed if a test fails, or if
the tests do not end in time. The working tree is never changed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# imported once, here, and not by the tests of every mutant; the package itself is not
import h5py  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import sklearn.linear_model  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.95
PASSED, FAILED, INTERRUPTED, ELSEWHERE = 0, 1, 2, 99
"""Exit codes: of pytest (2: a test file cannot be imported), and where the tests would not see the copy."""


@dataclass(frozen=True)
class Group:
    """Modules, the tests that answer for them (the quickest first), and how many mutants are tried."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    count: int


GROUPS = {
    "objectives": Group(
        ("objectives.cls", "objectives.patch_entropy", "objectives.patch", "objectives.objective"),
        ("matched_entropy", "supervised_term", "golden_losses", "twins", "accumulation", "two_processes"), 30,
    ),
    "step": Group(("engine.step",), ("step_promises", "step", "golden_training", "two_processes"), 14),
    "schedules": Group(
        ("engine.optim",), ("properties_training", "golden_schedules", "step_promises", "device"), 12
    ),
    "sampler": Group(("data.sampler",), ("properties_training", "sampling"), 14),
    "calibration": Group(
        ("classify.left_out", "classify.known", "fewshot.intervals"), ("calibration", "intervals", "left_out"), 16
    ),
    "checkpoint": Group(
        ("engine.checkpoint", "engine.restore"),
        ("checkpoint", "step_promises", "weights_heads", "guard", "checkpoints"), 16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A mistake that has a name: `text`, which the module holds once, becomes `instead`."""

    name: str
    module: str
    text: str
    instead: str
    tests: tuple[str, ...]


NAMED = (
    Named("sum over passes, not their mean", "objectives.objective", "mean / this.passes\n            if config.patch",
          "mean\n            if config.patch", ("accumulation",)),
    Named("a pass's share of one device", "objectives.passes", "total * self.devices / max(count, 1)",
          "total / max(count, 1)", ("two_processes",)),
    Named("dropped branches without rescaling", "models.block", "x * keep / (1 - self.rate)", "x * keep",
          ("stochastic_depth",)),
    Named("stochastic depth alike in all blocks", "models.vit", "torch.linspace(0, drop_path, depth, ",
          "torch.full((depth,), drop_path, ", ("stochastic_depth",)),
    Named("device seed without the rank", "engine.train", "[seed, step, distributed.rank()]", "[seed, step]",
          ("two_process_run",)),
    Named("device seed without the step", "engine.train", "[seed, step, distributed.rank()]",
          "[seed, distributed.rank()]", ("two_process_run",)),
    Named("log of one rank", "engine.meter", "distributed.mean(total)", "total", ("two_process_run",)),
    Named("no smoothing of the targets (Platt)", "classify.left_out",
          "(images * F.one_hot(left.truth, way).double() + 1 / way) / (images + 1)",
          "F.one_hot(left.truth, way).double()", ("calibration",)),
    Named("masks from the first epoch on", "data.augment", "epoch < config.start_epoch", "False", ("step_promises",)),
    Named("masks of another epoch", "data.augment", "draw_mask(config.mask, self.grid, epoch, rng)",
          "draw_mask(config.mask, self.grid, 10**6, rng)", ("step_promises",)),
    Named("patch temperature does not wait for masks", "engine.optim", ", epoch, config.mask.start_epoch)",
          ", epoch)", ("step_promises",)),
    Named("loss scaler not restored", "engine.restore", 'learner.scaler.load_state_dict(scale)', "pass",
          ("step_promises",)),
    Named("loss scaler not saved", "engine.step", '"scaler": self.scaler.state_dict()',
          '"scaler": torch.amp.GradScaler("cpu").state_dict()', ("step_promises",)),
)  # fmt: skip

LAST_OF_TWO = "the last of two dimensions is 1"
EQUIVALENT = {
    ("engine.step", "return StepResult(losses, empty, logits.argmax(dim=1), torch.cat(labels), skipped, told)"):
        LAST_OF_TWO,
    ("objectives.patch_entropy", "return logits.sub_(self.center).div_(self.temperature).softmax(dim=1)"): LAST_OF_TWO,
    ("objectives.patch_entropy", "largest, at = z.max(dim=1, keepdim=True)  # [some rows, 1]"): LAST_OF_TWO,
    ("objectives.patch_entropy", "softmax = z.softmax(dim=1)  # [some rows, prototypes]"): LAST_OF_TWO,
    ("objectives.patch_entropy", "scale = max(len(embedded), 2)"): "the scale cancels",
    ("objectives.patch_entropy",
     'values, source[order], size.cumsum(0) - size, mode="sum", per_sample_weights=weight[order]'):
        "PyTorch puts the two in order, with a warning",
    ("objectives.patch",
     "best = torch.where(teacher_sum[t, i] >= 0, largest[s, a][:, None], smallest[s, a][:, None])  "
     "# [pairs, patches]"):
        "the line below it decides for 0",
}  # fmt: skip
"""Mutants that cannot be noticed: (module, the changed line) and why."""


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        name: what was changed.
        tests: names of the test files that must fail.
        line: number of the first changed line.
        source: the whole changed file.
    """

    name: str
    module: str
    tests: tuple[str, ...]
    line: int
    source: bytes


# ---- mutants by rule

COMPARISONS = {
    ast.Lt: (b"<", b"<="), ast.LtE: (b"<=", b"<"), ast.Gt: (b">", b">="), ast.GtE: (b">=", b">"),
    ast.Eq: (b"==", b"!="), ast.NotEq: (b"!=", b"=="), ast.Is: (b"is", b"is not"), ast.IsNot: (b"is not", b"is"),
    ast.In: (b"in", b"not in"), ast.NotIn: (b"not in", b"in"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: (b"+", b"-"), ast.Sub: (b"-", b"+"), ast.Mult: (b"*", b"/"), ast.Div: (b"/", b"*"),
    ast.FloorDiv: (b"//", b"*"), ast.Mod: (b"%", b"*"), ast.Pow: (b"**", b"*"), ast.BitOr: (b"|", b"&"),
    ast.BitAnd: (b"&", b"|"),
}  # fmt: skip
BOOLEAN = {ast.And: (b"and", b"or"), ast.Or: (b"or", b"and")}
NAMES = {"min": "max", "max": "min", "argmin": "argmax", "argmax": "argmin", "amax": "amin", "zeros": "ones"}
SYMMETRIC = ("transpose", "min", "max", "maximum")
"""Functions whose first two arguments may change places."""
LEFT_ALONE = (ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
Edit = tuple[str, int, int, bytes]
"""What it is, first byte, end, and what comes there."""


class Rules:
    """All edits of a file's functions: bodies and default values, not annotations, messages or assertions."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def __iter__(self) -> Iterator[Edit]:
        for node in ast.parse(self.source).body:
            for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(inner, ast.FunctionDef):
                    yield from self._walk(inner)

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr) -> bytes:
        return self.source[slice(*self._span(node))]

    def _walk(self, node: ast.AST) -> Iterator[Edit]:
        if isinstance(node, LEFT_ALONE):
            return
        yield from self._edits(node)
        if isinstance(node, ast.Raise):
            return
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._walk(child)

    def _between(self, what: str, left: ast.expr, right: ast.expr, old: bytes, new: bytes) -> Iterator[Edit]:
        """The operator that stands between two expressions."""
        start, end = self._span(left)[1], self._span(right)[0]
        at = self.source.find(old, start, end)
        if at >= 0:
            yield what, at, at + len(old), new

    def _is_guard(self, node: ast.Constant) -> bool:
        """Whether it is the value of `strict`, which refuses what right code never does."""
        start = self._span(node)[0]
        return self.source[:start].endswith(b"strict=")

    def _edits(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others):
                for before, op, after in zip([left, *others], ops, others, strict=False):
                    yield from self._between("comparison", before, after, *COMPARISONS[type(op)])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                yield from self._between("arithmetic", left, right, *ARITHMETIC[type(op)])
            case ast.BoolOp(op=op, values=values):
                for before, after in pairwise(values):
                    yield from self._between("and / or", before, after, *BOOLEAN[type(op)])
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
                yield "sign left out", *self._span(node), self._text(operand)
            case ast.Constant() if self._is_guard(node):
                pass
            case ast.Constant(value=bool(value)):
                yield "constant", *self._span(node), str(not value).encode()
            case ast.Constant(value=int(value)):
                yield "constant", *self._span(node), str(value + 1).encode()
            case ast.Constant(value=float(value)):
                yield "constant", *self._span(node), str(2 * value or 1.0).encode()
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in NAMES:
                end = self._span(node)[1]
                yield "name", end - len(name), end, NAMES[name].encode()
            case ast.Call(func=called, args=[first, second, *_]) if not isinstance(first, ast.Starred):
                (start, a), (b, end) = self._span(first), self._span(second)
                ordered = ast.unparse(called).rpartition(".")[2] not in SYMMETRIC
                if ordered and not isinstance(second, ast.Starred) and self._text(first) != self._text(second):
                    yield "swapped arguments", start, end, self._text(second) + self.source[a:b] + self._text(first)
        match node:
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield "negated condition", *self._span(test), b"not (" + self._text(test) + b")"
            case (
                ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break()
                | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
            ):  # fmt: skip
                yield "statement left out", *self._span(node), b"pass"


def by_rule(module: str, tests: tuple[str, ...]) -> list[Mutant]:
    source = file_of(module, ROOT / "src").read_bytes()
    mutants = []
    for what, start, end, instead in Rules(source):
        changed = source[:start] + instead + source[end:]
        mutants.append(Mutant(what, module, tests, source.count(b"\n", 0, start) + 1, changed))
    return mutants


def named(wanted: Named) -> Mutant:
    """Raises `ValueError` where the module or the text is not there."""
    file = file_of(wanted.module, ROOT / "src")
    if not file.is_file():
        raise ValueError(f"'{wanted.name}': there is no module smkd.{wanted.module}")
    source = file.read_text(encoding="utf-8")
    if source.count(wanted.text) != 1:
        raise ValueError(f"'{wanted.name}': smkd.{wanted.module} holds {source.count(wanted.text)} x {wanted.text!r}")
    line = source[: source.index(wanted.text)].count("\n") + 1
    changed = source.replace(wanted.text, wanted.instead).encode()
    return Mutant(wanted.name, wanted.module, wanted.tests, line, changed)


def file_of(module: str, folder: Path) -> Path:
    return folder / "smkd" / f"{module.replace('.', '/')}.py"


def changed_line(mutant: Mutant) -> str:
    return mutant.source.decode().splitlines()[mutant.line - 1].strip()


# ---- trying them


def run_tests(folder: Path, tests: tuple[str, ...], limit: float) -> int | None:
    """Exit code of the tests with the package in `folder`; None if they take longer than `limit` seconds."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests))
    process.start()
    process.join(limit)
    code = process.exitcode
    if code is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code


def _pytest(folder: Path, tests: tuple[str, ...]) -> None:
    os.setsid()
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    os.chdir(ROOT)
    said = os.open(folder.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        import smkd

        if not Path(smkd.__file__).is_relative_to(folder):
            os._exit(ELSEWHERE)
    except Exception:  # a mutant may fail at import in any way, which counts as noticed
        os._exit(INTERRUPTED)
    files = [f"tests/test_{name}.py" for name in tests]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])))


def attempt(mutant: Mutant, folder: Path, limit: float) -> str:
    """'killed', 'timeout' or 'survived'."""
    file = file_of(mutant.module, folder)
    original = file.read_bytes()
    file.write_bytes(mutant.source)
    try:
        code = run_tests(folder, mutant.tests, limit)
    finally:
        file.write_bytes(original)
    if code is None:
        return "timeout"
    if code not in (PASSED, FAILED, INTERRUPTED):
        raise SystemExit(f"the tests of smkd.{mutant.module} could not be run (exit code {code})")
    return "survived" if code == PASSED else "killed"


def chosen(groups: list[str], seed: int, everything: bool) -> list[Mutant]:
    """The named mutants and the seeded choice; a mutant or an exception to the rules that is gone is an error."""
    mutants, errors, listed = [], [], set(EQUIVALENT)
    for wanted in NAMED:
        try:
            mutants.append(named(wanted))
        except ValueError as error:
            errors.append(str(error))
    for name, group in GROUPS.items():
        candidates = [mutant for module in group.modules for mutant in by_rule(module, group.tests)]
        keys = [(mutant.module, changed_line(mutant)) for mutant in candidates]
        listed -= set(keys)
        if name in groups:
            named_ones = {(mutant.module, mutant.source) for mutant in mutants}
            rest = [
                mutant for mutant, key in zip(candidates, keys, strict=True)
                if key not in EQUIVALENT and (mutant.module, mutant.source) not in named_ones
            ]  # fmt: skip
            count = len(rest) if everything else min(group.count, len(rest))
            mutants += random.Random(f"{seed} {name}").sample(rest, count)
    errors += [f"listed as equivalent, but no longer a mutant: smkd.{module}: {line}" for module, line in listed]
    if errors:
        raise SystemExit("\n".join(errors))
    for mutant in mutants:
        compile(mutant.source, mutant.module, "exec")
    return mutants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS), help="none: the named ones only")
    parser.add_argument("--all", action="store_true", help="every mutant of the groups; takes hours")
    given = parser.parse_args()
    mutants = chosen(given.groups, given.seed, given.all)
    counts = dict.fromkeys(("killed", "timeout", "survived"), 0)
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "src"
        shutil.copytree(ROOT / "src", folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        limits: dict[tuple[str, ...], float] = {}
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            start = time.perf_counter()
            code = run_tests(folder, tests, 600)
            if code != PASSED:
                raise SystemExit(f"without any change, {', '.join(tests)} should pass (exit code {code})")
            limits[tests] = 30 + 5 * (time.perf_counter() - start)
        for mutant in mutants:
            start = time.perf_counter()
            outcome = attempt(mutant, folder, limits[mutant.tests])
            counts[outcome] += 1
            place = f"src/smkd/{mutant.module.replace('.', '/')}.py:{mutant.line}"
            print(f"{outcome:8} {time.perf_counter() - start:5.1f} s  {place}  {mutant.name}", flush=True)
            if outcome == "survived":
                survivors.append(place)
                original = file_of(mutant.module, folder).read_text(encoding="utf-8").splitlines()
                changed = mutant.source.decode().splitlines()
                print("\n".join(difflib.unified_diff(original, changed, lineterm="", n=0)), flush=True)
    share = 1 - counts["survived"] / len(mutants)
    print(f"{len(mutants)} mutants, {100 * share:.1f} % noticed; {len(EQUIVALENT)} are listed as equivalent")
    print(json.dumps({"mutants": len(mutants), **counts, "share": share, "survivors": survivors, "seed": given.seed}))
    if share < GOAL:
        raise SystemExit(f"fewer than {100 * GOAL:.0f} % of the mutants were noticed")


if __name__ == "__main__":
    main()
