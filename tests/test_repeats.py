"""An image that is drawn twice in an epoch: other views each time, and never another image of its class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cached_photos import settings, train_images
from made_images import encode, noise, write_splits
from plain_losses import cosine, cross_entropy, softened
from smkd.config.loading import check
from smkd.config.run_config import RunConfig
from smkd.config.schema import HeadConfig, ObjectiveConfig, SamplerConfig
from smkd.data.cache import cached
from smkd.data.datasets import dataset_spec
from smkd.data.images import Images
from smkd.data.loader import Batch, MultiCropDataset, make_loader, make_views
from smkd.data.sampler import EpochSampler, Pick
from smkd.models.head import PatchLogits
from smkd.models.pair import Outputs
from smkd.objectives.objective import Losses, Objective
from smkd.objectives.passes import passes_of
from smkd.objectives.patch import match_reference

PER_CLASS = (2, 3, 1, 12)
"""Images of the classes; batches take four of each."""
BALANCED = SamplerConfig(classes=4, per_class=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(
        tmp_path_factory.mktemp("photos"), [PER_CLASS] * 3, lambda *seed: encode(noise((50, 40), seed)), "{:02}.png"
    )


def make_config(photos: Path) -> RunConfig:
    return check(
        {
            "phase": "distill", "epochs": 2, "batch_size": 16, "seed": 5, "data": {"root": photos},
            "model": {"size": "debug", "patch_size": 4, "image_size": 16},
            "mask": {"shape": "random", "ratio": [0.5], "ratio_jitter": [0.0]},
            "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
            "local_views": {"count": 1, "size": 8, "scale": [0.05, 0.25]},
            "validation": {"resize": 16, "crop": 16}, "evaluation": {"resize": 16, "crop": 16},
        }
    )  # fmt: skip


def load(images: Images, config: RunConfig, workers: int = 0, **share: int) -> list[Batch]:
    sampler = EpochSampler(images.labels, 16, config.seed, balanced=BALANCED, **share)
    sampler.set_epoch(1)
    return list(make_loader(MultiCropDataset(images, config), sampler, workers, pin_memory=False))


def drawn(batch: Batch, place: int) -> list[bytes]:
    """Everything that is drawn for an image of a batch, each view of it."""
    parts = (batch.global_crops, batch.local_crops, batch.masks, batch.color)
    return [view.contiguous().numpy().tobytes() for part in parts for view in part[:, place]]


def test_occurrences_count_up() -> None:
    labels = np.repeat(np.arange(4), PER_CLASS)
    sampler = EpochSampler(np.tile(labels, 3), 16, seed=0, balanced=BALANCED)
    picks = [pick for batch in sampler for pick in batch]
    assert any(pick.occurrence for pick in picks)
    for image in {pick.image for pick in picks}:
        times = [pick.occurrence for pick in picks if pick.image == image]
        assert times == list(range(len(times)))
    assert {pick.occurrence for batch in EpochSampler(labels, 6, seed=0) for pick in batch} == {0}


def test_devices_count_together() -> None:
    labels = np.repeat(np.arange(4), PER_CLASS)
    (whole,) = EpochSampler(labels, 16, seed=0, balanced=BALANCED)
    parts = [next(iter(EpochSampler(labels, 16, seed=0, balanced=BALANCED, rank=r, world=2))) for r in (0, 1)]
    assert parts[0] + parts[1] == whole


def test_each_occurrence_has_views_of_its_own(photos: Path) -> None:
    config = make_config(photos)
    images = train_images(config.data)
    (batch,) = load(images, config)
    assert batch.images is not None
    numbers = batch.images.tolist()
    assert {1, 4} <= {numbers.count(number) for number in numbers}
    for part in range(2 + 1 + 2 + 3):
        assert len({drawn(batch, place)[part] for place in range(16)}) == 16
    # an image that comes once, and the first of several, are as they always were
    dataset, seen = MultiCropDataset(images, config), set[int]()
    for place, number in enumerate(numbers):
        alone = dataset[Pick(1, number, 0)]
        assert np.array_equal(alone.draws.color, dataset[1, number].draws.color)
        assert np.array_equal(batch.color[:, place].numpy(), alone.draws.color) == (number not in seen)
        seen.add(number)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["memory", "mmap"])
def test_workers_caches_and_devices_change_nothing(photos: Path, kind: str) -> None:
    config = make_config(photos)
    images = train_images(config.data)
    (plain,) = load(images, config)
    kept = cached(images, settings(photos, kind), "train")
    (other,) = load(kept, config, workers=2)
    halves = [load(kept, config, rank=rank, world=2)[0] for rank in (0, 1)]
    expected = [drawn(plain, place) for place in range(16)]
    assert [drawn(other, place) for place in range(16)] == expected
    assert [drawn(half, place) for half in halves for place in range(8)] == expected


def test_the_network_step_is_told_which_images(photos: Path) -> None:
    config = make_config(photos)
    (batch,) = load(train_images(config.data), config)
    views = make_views(batch, dataset_spec("folder"), torch.device("cpu"))
    assert views.images is not None
    assert torch.equal(views.images, batch.images)


# ---- pairs


LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
VIEWS, PATCHES, CENTER = 2, 3, torch.zeros(5)
PAIRS = {
    "all differ": (None, [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1), (3, 4), (4, 3)]),
    "some twice": ([7, 7, 8, 9, 9, 6], [(0, 2), (2, 0), (1, 2), (2, 1)]),
    "apart": ([7, 8, 7, 9, 5, 6], [(0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3)]),
    "nothing but repeats": ([7, 7, 7, 9, 9, 6], []),
}
"""Numbers of the images, and which (i, j) are different images of one class."""


def outputs() -> Outputs:
    rows = VIEWS * len(LABELS) * PATCHES
    return Outputs(
        cls=torch.randn(VIEWS, len(LABELS), 5), patches=PatchLogits(torch.randn(rows, 8), torch.randn(5, 8)),
        tokens=torch.randn(VIEWS, len(LABELS), PATCHES, 8), attention=torch.rand(VIEWS, len(LABELS), PATCHES),
    )  # fmt: skip


def numbers(images: list[int] | None) -> torch.Tensor | None:
    return None if images is None else torch.tensor(images)


def losses(student: Outputs, teacher: Outputs, images: list[int] | None, **patch: object) -> Losses:
    config = ObjectiveConfig.model_validate({"labels": True, "patch": {"weight": 1.0, **patch}})
    masks = torch.zeros(VIEWS, len(LABELS), 1, PATCHES, dtype=torch.bool)
    objective = Objective(config, HeadConfig(num_prototypes=5))
    (this,) = objective.passes([LABELS], [numbers(images)])
    found: Losses = objective(
        student, teacher, masks, LABELS, cls_temperature=0.05, patch_temperature=0.05, this=this
    )  # fmt: skip
    return found


def plain_cls(student: Outputs, teacher: Outputs, pairs: list[tuple[int, int]]) -> float:
    terms = [
        cross_entropy(softened(teacher.cls[q, i], CENTER, 0.05), student.cls[v, j] / 0.1)
        for q in range(VIEWS) for v in range(VIEWS) for i, j in pairs
    ]  # fmt: skip
    return float(sum(terms) / max(len(terms), 1))


def plain_patch(student: Outputs, teacher: Outputs, pairs: list[tuple[int, int]]) -> float:
    assert student.patches is not None
    assert student.tokens is not None
    assert teacher.patches is not None
    assert teacher.tokens is not None
    assert teacher.attention is not None
    shape = (VIEWS, len(LABELS), PATCHES, 5)
    z, t = (x.embedded @ x.prototypes.T for x in (student.patches, teacher.patches))
    z, t = z.view(shape) / 0.1, t.view(shape)
    terms = []
    for s, other in ((0, 1), (1, 0)):
        for i, j in pairs:
            term = 0.0
            for place in range(PATCHES):
                near = [cosine(student.tokens[s, j, n], teacher.tokens[other, i, place]) for n in range(PATCHES)]
                entropy = cross_entropy(softened(t[other, i, place], CENTER, 0.05), z[s, j, near.index(max(near))])
                term += float(teacher.attention[other, i, place] * entropy)
            terms.append(term)
    return sum(terms) / max(len(terms), 1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("case", PAIRS)
def test_an_image_is_no_partner_of_itself(case: str, own: bool) -> None:
    torch.manual_seed(0)
    student, teacher = outputs(), outputs()
    images, pairs = PAIRS[case]
    found = losses(student, teacher, images, same_image=own)
    assert float(found.terms["cls"]) == pytest.approx(plain_cls(student, teacher, pairs), rel=1e-5)
    own_views = [(i, i) for i in range(len(LABELS))] if own else []
    assert float(found.terms["patch"]) == pytest.approx(plain_patch(student, teacher, pairs + own_views), rel=1e-5)
    assert found.empty == (() if pairs else ("cls",) if own else ("cls", "patch"))


@pytest.mark.parametrize("case", PAIRS)
def test_nor_in_the_published_matching(case: str) -> None:
    """Without attention, whose terms are the other images of the class: as many as have one."""
    torch.manual_seed(0)
    student, teacher = outputs(), outputs()
    images, pairs = PAIRS[case]
    assert student.tokens is not None
    assert teacher.tokens is not None
    (this,) = passes_of([LABELS], [numbers(images)], paired=True, pooled=False)
    matches = match_reference(student.tokens, teacher.tokens, this.pairs(own=True), None)
    assert matches.terms == len({i for i, _ in pairs}) * VIEWS * (VIEWS - 1)
    assert len(matches.teacher) == len(pairs) * VIEWS * (VIEWS - 1) * PATCHES
    assert ("patch" in losses(student, teacher, images, matching="reference", weighting="mean").empty) == (not pairs)


@pytest.mark.parametrize("own", [False, True])
def test_devices_find_the_same_partners(own: bool) -> None:
    """A device's columns of all pairs, where the images of a class and the repeats of an image lie on both."""
    labels, images = torch.tensor([0, 0, 1, 0, 0, 1]), torch.tensor([4, 5, 6, 4, 7, 6])
    (whole,) = passes_of([labels], [images], paired=True, pooled=False)
    halves = [whole._replace(start=start, batch=3).pairs(own=own) for start in (0, 3)]
    pairs = whole.pairs(own=own)
    assert torch.equal(torch.cat(halves, dim=1), pairs)
    assert pairs.sum() == 10 + 6 * own
    assert whole.partners[0].tolist() == [2, 3, 0, 2, 3, 0]
    assert not pairs[0, 3]
    assert pairs[1, 3]
