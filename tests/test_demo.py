"""The demo end to end with less of everything: its files, and the page it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from smkd import api, demo
from smkd.config.run_config import RunConfig
from smkd.data import patterns

LESS = ["epochs=1", "data.limit_per_class=6", "validation.every=0", "evaluation.episodes=20", "log_every=2"]


@pytest.mark.slow
def test_demo_writes_numbers_and_a_page_that_needs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve = api.resolve

    def quick(recipe: str, words: Sequence[str] = ()) -> RunConfig:
        return resolve(recipe, [*words, *LESS] if words else ())

    monkeypatch.setattr(api, "resolve", quick)
    results = demo.run_demo(tmp_path / "demo")

    numbers = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(numbers) == ["raw_pixels", "random", "phase1", "phase2"]
    for name, row in numbers.items():
        assert set(row) == {"1", "5"}
        assert row["1"] == {"mean": results[name][0].mean, "ci95": results[name][0].ci95}
    printed = capsys.readouterr().out
    assert f"{numbers['phase2']['5']['mean']:.2f} ± {numbers['phase2']['5']['ci95']:.2f}" in printed

    page = (tmp_path / "demo" / "report.html").read_text()
    assert f"{numbers['phase1']['1']['mean']:.2f} ± " in page
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) > 40
    assert all(source.startswith("data:") for source in sources)
    assert "smkd app" in printed

    # the second phase started from the first, and the same call repeats nothing
    assert api.load(tmp_path / "demo" / "phase2")
    before = (tmp_path / "demo" / "phase2" / "checkpoints" / "last.pt").stat().st_mtime_ns
    assert demo.run_demo(tmp_path / "demo") == results
    assert (tmp_path / "demo" / "phase2" / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_patterns_are_a_pure_function_of_their_seed_with_disjoint_classes() -> None:
    names = {split: patterns.class_names(split) for split in ("train", "val", "test")}
    assert [len(found) for found in names.values()] == [64, 16, 20]
    assert len({name for found in names.values() for name in found}) == 100
    images = patterns.generate("val", 3)
    assert (images.shape, images.dtype) == ((48, 3, 32, 32), "uint8")
    assert (images == patterns.generate("val", 3)).all()
    # the first images of a class do not depend on how many are drawn
    assert (images[3:6] == patterns.generate("val", 5)[5:10][:3]).all()
    assert (images != patterns.generate("val", 3, seed=1)).any()
