"""Damaged files of every kind: read, or refused in one line of the package's own (`benchmarks/fuzz.py` has 3,000)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

fuzz = pytest.importorskip("fuzz", reason="looks at /proc") if sys.platform == "linux" else None
pytestmark = pytest.mark.skipif(fuzz is None, reason="looks at /proc")


def test_every_kind_is_read_whole(tmp_path: Path) -> None:
    assert fuzz is not None
    for kind in fuzz.fuzz_files.kinds(tmp_path):
        path = tmp_path / f"whole{kind.suffix}"
        path.write_bytes(kind.write(kind.document, None))
        kind.load(path, random.Random(0))


@pytest.mark.slow
def test_damaged_files_are_read_or_refused() -> None:
    assert fuzz is not None
    counts, findings = fuzz.fuzz(154, seed=1)
    assert not findings
    assert all(row["refused"] for row in counts.values())
