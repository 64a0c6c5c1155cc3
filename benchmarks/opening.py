"""Opening a large table of images: its time, and how often the system is asked about a file.

A CSV of tieredImageNet's size (450,000 rows, 608 classes) and empty files that it names, most of them links to a few.
Against the plain way: a row at a time, with `is_file` for each image. Seconds are processor time of this process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smkd.config.schema import DataConfig
from smkd.data.datasets import describe, open_split
from smkd.data.inspect import record_of
from smkd.data.sources import opened_once

LINKS = 50_000  # to one file; ext4 allows 65,000
TRAIN, VAL = 351, 448  # of the 608 classes, as in tieredImageNet


def write(folder: Path, rows: int, classes: int) -> Path:
    """A table and its images in a folder a class."""
    table, source = folder / "table.csv", Path()
    with table.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "split"])
        for row in range(rows):
            label = row * classes // rows
            split = "train" if label * 608 < TRAIN * classes else "val" if label * 608 < VAL * classes else "test"
            path = f"images/n{label:08}/n{label:08}_{row:08}.jpg"
            if row == 0 or row * classes // rows != (row - 1) * classes // rows:
                (folder / path).parent.mkdir(parents=True)
            if row % LINKS:
                os.link(source, folder / path)
            else:
                source = folder / path
                source.touch()
            lines.writerow([path, f"n{label:08}", split])
    return table


def plain(table: Path) -> int:
    """The number of training images, the plain way."""
    paths: dict[Path, str] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            path = table.parent / row["path"]
            if path in paths or not path.is_file():
                raise ValueError(path)
            paths[path] = row["split"]
    return sum(split == "train" for split in paths.values())


def once(table: Path) -> int:
    return len(open_split(DataConfig(root=table), "train"))


@opened_once()
def a_run(table: Path) -> int:
    """What a training run with validation opens; it also keeps the sizes of its training images with a checkpoint."""
    config = DataConfig(root=table)
    describe(config)
    open_split(config, "val")
    return sum(record_of(open_split(config, "train"))["classes"].values())


@contextmanager
def counted() -> Iterator[list[int]]:
    """Calls of `os.stat` within."""
    calls, stat = [0], os.stat

    def counting(*args: Any, **options: Any) -> os.stat_result:
        calls[0] += 1
        return stat(*args, **options)

    os.stat = counting
    try:
        yield calls
    finally:
        os.stat = stat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=450_000)
    parser.add_argument("--classes", type=int, default=608)
    given = parser.parse_args()
    report: dict[str, Any] = {"rows": given.rows, "classes": given.classes}
    ways: dict[str, Callable[[Path], int]] = {
        "plain, one opening": plain, "smkd, one opening": once, "smkd, a run with validation": a_run,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        table = write(Path(folder), given.rows, given.classes)
        found = set()
        for name, work in ways.items():
            with counted() as calls:
                start = time.process_time()
                found.add(work(table))
                seconds = time.process_time() - start
            report[name] = {"cpu_seconds": seconds, "stats_per_file": calls[0] / given.rows}
            print(f"{name}: {seconds:.2f} s of processor time, {calls[0] / given.rows:.5f} stats a file", flush=True)
        if len(found) > 1:
            raise SystemExit(f"the ways disagree about the training images: {found}")
    report["ratio"] = report["plain, one opening"]["cpu_seconds"] / report["smkd, one opening"]["cpu_seconds"]
    print(f"{report['ratio']:.1f} x")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
