"""Validation over several processes: each extracts from its share of the images, the first one scores them all."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from made_images import photographs
from process_groups import join_group, run_processes
from smkd import api, distributed
from smkd.config.run_config import RunConfig
from smkd.data.datasets import open_validation
from smkd.engine.evaluator import measure_together
from smkd.engine.stopping import Interrupted, Watch
from smkd.fewshot.validation import FewShotValidation, HeldOutImages
from smkd.models.vit import VisionTransformer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIZES = (1, 3)
"""Processes."""
EVALUATORS = {"episodes": FewShotValidation, "held-out": HeldOutImages}
SIGNALLED = [("extract", 1), ("score", 0)]
"""In which part a signal comes, and to which of three processes."""


def made(folder: Path) -> tuple[RunConfig, VisionTransformer]:
    """Settings for images in two folders of the same classes, and a network with random weights."""
    if not (folder / "train").exists():
        for skip, split in enumerate(("train", "val")):
            photographs(folder / split, [4] * 6, split="val", skip=4 * skip)
    words = ["validation.shots=[1,2]", "validation.episodes=50", "validation.query=2", "precision=fp32"]
    config = api.resolve("debug-pretrain", ["data.dataset=folder", f"data={folder}", *words])
    torch.manual_seed(0)
    return config, VisionTransformer.from_config(config.model).eval()


def work(rank: int, ports: list[int], folder: str) -> None:
    config, backbone = made(Path(folder) / "photos")
    meeting = iter(ports)
    for size in SIZES:
        join_group(next(meeting), rank, size)
        if rank < size:
            distributed.initialise(CPU)
            for name, evaluator in EVALUATORS.items():
                found = measure_together(evaluator(), backbone, config, CPU, Watch(1, None))
                if rank == 0:
                    (Path(folder) / f"{name}-{size}.json").write_text(json.dumps(found))
                else:
                    assert found is None
            if size > 1:
                assert [cut_short(*each, backbone, config) for each in SIGNALLED] == [True, True]
            distributed.shutdown()


def cut_short(part: str, rank: int, backbone: VisionTransformer, config: RunConfig) -> bool:
    """Whether a signal to one process ends the measuring in this one."""

    def signalled(self: FewShotValidation, *given: Any) -> Any:
        if distributed.rank() == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        return real(self, *given)

    real = getattr(FewShotValidation, part)
    with pytest.MonkeyPatch.context() as patch, Watch(1, None) as watch:
        patch.setattr(FewShotValidation, part, signalled)
        try:
            measure_together(FewShotValidation(), backbone, config, CPU, watch)
        except Interrupted:
            return True
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    made(folder / "photos")
    assert run_processes(work, max(SIZES), len(SIZES), str(folder)) == [0] * max(SIZES)
    return folder


@pytest.mark.parametrize("name", EVALUATORS)
def test_the_scores_are_those_of_one_process(name: str, folder: Path) -> None:
    alone, several = (json.loads((folder / f"{name}-{size}.json").read_text()) for size in SIZES)
    assert several == pytest.approx(alone, abs=1e-4)
    assert next(iter(alone.values())) > 5


def test_each_image_is_read_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, backbone = made(tmp_path / "photos")
    whole = FewShotValidation().extract(backbone, config, CPU)
    assert len(whole.labels) == len(open_validation(config))
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    shares = []
    for rank in range(5):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(FewShotValidation().extract(backbone, config, CPU))
    assert {len(share.labels) for share in shares} <= {len(whole.labels) // 5, len(whole.labels) // 5 + 1}
    torch.testing.assert_close(torch.cat([share.values for share in shares]), whole.values, rtol=0, atol=1e-5)
    assert [label for share in shares for label in share.labels] == whole.labels.tolist()
