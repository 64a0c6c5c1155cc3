"""The fast losses against their plain twins: values and gradients in float64, then through `Objective`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import plain_losses as plain
from smkd.config.schema import HeadConfig, ObjectiveConfig
from smkd.models.head import PatchLogits
from smkd.models.pair import Outputs
from smkd.objectives import cls, patch, patch_entropy
from smkd.objectives.objective import Losses, Objective
from smkd.objectives.patch_entropy import Matches, Targets, matched_entropy

CASES = range(50)
PATTERNS = ("distinct", "equal", "single", "mixed", "mixed")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# weights of 1 / patches and 1 / masked are kept in float32
FLOAT32_WEIGHTS = {"rtol": 1e-6, "atol": 1e-7}


@dataclass
class Case:
    """Random inputs of one shape and label pattern; student tensors are leaves that collect gradients."""

    labels: list[int]
    targets: Tensor
    student: Tensor
    local: Tensor
    patch_targets: Tensor
    patch_student: Tensor
    student_tokens: Tensor
    teacher_tokens: Tensor
    attention: Tensor
    masks: Tensor

    @property
    def same(self) -> Tensor:
        labels = torch.tensor(self.labels)
        return labels[:, None] == labels[None, :]

    @property
    def different_images(self) -> Tensor:
        return self.same & ~torch.eye(len(self.labels), dtype=torch.bool)


def make_case(number: int) -> Case:
    rng = np.random.default_rng(number)
    pattern = PATTERNS[number % len(PATTERNS)]
    images = 1 if pattern == "single" else int(rng.integers(2, 6))
    labels = {
        "distinct": rng.permutation(images), "equal": np.full(images, 7), "single": np.array([3]),
        "mixed": rng.integers(0, 3, images),
    }[pattern].tolist()  # fmt: skip
    # one and three global views, and no local crops, come up in turn for every label pattern
    views, local = (2, 1, 3)[number // 5 % 3], (2, 0, 1, 3)[number // 5 % 4]
    patches, prototypes, dim = int(rng.integers(1, 7)), int(rng.integers(2, 9)), int(rng.integers(2, 6))

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    return Case(
        labels=labels,
        targets=(3 * normal(views, images, prototypes)).softmax(-1),
        student=(3 * normal(views, images, prototypes)).requires_grad_(),
        local=(3 * normal(local, images, prototypes)).requires_grad_(),
        patch_targets=(3 * normal(views, images, patches, prototypes)).softmax(-1),
        patch_student=(3 * normal(views, images, patches, prototypes)).requires_grad_(),
        student_tokens=normal(views, images, patches, dim).requires_grad_(),
        teacher_tokens=normal(views, images, patches, dim),
        attention=(2 * normal(views, images, patches)).softmax(-1),
        masks=torch.from_numpy(rng.random((views, images, patches)) < rng.choice([0.0, 0.3, 1.0])),
    )


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def assert_twins(fast: Tensor, slow: Tensor, leaves: list[Tensor], tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(fast, slow, **tolerance)
    for ours, theirs in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def assert_exactly_zero(value: Tensor, leaves: list[Tensor]) -> None:
    assert float(value.detach()) == 0.0
    assert all(bool((g == 0).all()) for g in gradients(value, leaves))


def unit_prototypes(logits: Tensor) -> PatchLogits:
    """Logits [rows, prototypes] in factors: with unit vectors as prototypes, logits are embeddings."""
    return PatchLogits(logits, torch.eye(logits.shape[-1], dtype=logits.dtype))


def entropy(targets: Tensor, student: Tensor, matches: Matches) -> Tensor:
    """From distributions and logits [..., prototypes]."""
    z, p = unit_prototypes(student.flatten(0, -2)), unit_prototypes(targets.log().flatten(0, -2))
    center = torch.zeros(len(z.prototypes), dtype=targets.dtype)
    return matched_entropy(*z, Targets(*p, center, 1.0), matches, 1.0)


def test_cases_cover_every_pattern() -> None:
    cases = [make_case(n) for n in CASES]
    for views in (1, 2, 3):
        for pattern in range(len(PATTERNS)):
            assert any(len(c.targets) == views and n % len(PATTERNS) == pattern for n, c in enumerate(cases))
    assert {len(c.local) for c in cases} == {0, 1, 2, 3}
    assert any(c.masks.all() for c in cases)
    assert any(not c.masks.any() for c in cases)


@pytest.mark.parametrize("number", CASES)
def test_cls_same_image(number: int) -> None:
    case = make_case(number)
    total, count = cls.same_image(case.targets, case.student, case.local)
    expected, terms = plain.cls_same_image(case.targets, case.student, case.local)
    assert count == terms
    assert_twins(total / max(count, 1), expected, [case.student, case.local], EXACT)
    if not terms:
        assert_exactly_zero(total, [case.student, case.local])


@pytest.mark.parametrize("with_own_views", [False, True])
@pytest.mark.parametrize("number", CASES)
def test_cls_same_class(number: int, with_own_views: bool) -> None:
    case = make_case(number)
    total, count = cls.same_class(
        case.targets, case.student, case.local, case.different_images, with_own_views=with_own_views
    )
    expected, terms = plain.cls_same_class(
        case.targets, case.student, case.local, case.labels, with_own_views=with_own_views
    )
    assert count == terms
    assert_twins(total / max(count, 1), expected, [case.student, case.local], EXACT)
    if not terms:
        assert_exactly_zero(total, [case.student, case.local])


@pytest.mark.parametrize("number", range(10))
def test_cls_same_class_of_one_device(number: int) -> None:
    """The shares of two devices, each with all teacher images, add up to the whole batch."""
    case = make_case(3 + 5 * number)
    pairs, half = case.different_images, len(case.labels) // 2
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in (slice(0, half), slice(half, len(case.labels))):
        share, number_of_terms = cls.same_class(
            case.targets, case.student[:, part], case.local[:, part], pairs[:, part], part.start, with_own_views=True
        )
        total, count = total + share, count + number_of_terms
    expected, terms = plain.cls_same_class(case.targets, case.student, case.local, case.labels, with_own_views=True)
    assert count == terms
    assert_twins(total / max(count, 1), expected, [case.student, case.local], EXACT)


@pytest.mark.parametrize("same_image", [True, False])
@pytest.mark.parametrize("weighting", ["attention", "mean"])
@pytest.mark.parametrize("number", CASES)
def test_matched_patches(number: int, weighting: str, same_image: bool) -> None:
    case = make_case(number)
    attention = case.attention if weighting == "attention" else None
    pairs = case.same if same_image else case.different_images
    matches = patch.match_paper(case.student_tokens, case.teacher_tokens, pairs, attention)
    value = entropy(case.patch_targets, case.patch_student, matches)
    expected, terms = plain.matched_patches_paper(
        case.patch_targets, case.patch_student, case.student_tokens, case.teacher_tokens, case.labels,
        attention=attention, same_image=same_image,
    )  # fmt: skip
    assert matches.terms == terms
    leaves = [case.patch_student, case.student_tokens]
    assert_twins(value, expected, leaves, EXACT if attention is not None else FLOAT32_WEIGHTS)
    assert bool((gradients(value, leaves)[1] == 0).all()), "a gradient flows through the match"
    if not terms:
        assert_exactly_zero(value, leaves)


def test_matching_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(16)
    whole = patch.match_paper(case.student_tokens, case.teacher_tokens, case.same, case.attention)
    monkeypatch.setattr(patch, "PAIRS_AT_ONCE", {"cpu": 3})
    pieces = patch.match_paper(case.student_tokens, case.teacher_tokens, case.same, case.attention)
    assert int(case.same.sum()) > 3
    values = [entropy(case.patch_targets, case.patch_student, m) for m in (whole, pieces)]
    torch.testing.assert_close(values[0], values[1], **EXACT)


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("number", [0, 3, 8, 11])
def test_entropy_through_prototypes(number: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, with prototypes that learn: against every match written out, in float64."""
    generator = torch.Generator().manual_seed(number)
    rows, teacher_rows, prototypes, dim, pairs = 5, 7, 11, 3, (0, 9, 40)[number % 3]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    embedded, weights = normal(rows, dim).requires_grad_(), normal(prototypes, dim).requires_grad_()
    targets = Targets(normal(teacher_rows, dim), normal(prototypes, dim), normal(prototypes), 0.4)
    matches = Matches(
        torch.randint(rows, (pairs,), generator=generator), torch.randint(teacher_rows, (pairs,), generator=generator),
        normal(pairs).abs(), 1,
    )  # fmt: skip
    monkeypatch.setitem(patch_entropy.ELEMENTS_AT_ONCE, "cpu", rows_at_once * prototypes)
    value = matched_entropy(embedded, weights, targets, matches, 0.3)
    p = plain.softened(targets.embedded @ targets.prototypes.T, targets.center, 0.4)
    z = embedded @ weights.T / 0.3
    terms = [
        w * plain.cross_entropy(p[t], z[s])
        for s, t, w in zip(matches.student, matches.teacher, matches.weight, strict=True)
    ]
    expected = torch.stack(terms).sum() if terms else 0 * z.sum()
    assert_twins(value, expected, [embedded, weights], EXACT)
    if not terms:
        assert_exactly_zero(value, [embedded, weights])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_in_low_precision(dtype: torch.dtype) -> None:
    """Within one in a hundred of float32, the gradient by its norm; thousands of rows, so weights are tiny."""
    torch.manual_seed(0)
    rows, prototypes, dim = 2000, 500, 16
    embedded, weights, of_teacher = (
        torch.nn.functional.normalize(torch.randn(n, dim), dim=1) for n in (rows, prototypes, rows)
    )
    student = torch.arange(rows)
    matches = Matches(student, student.flip(0), torch.full((rows,), 1 / rows), rows)
    found = []
    for kind in (torch.float32, dtype):
        leaves = [x.to(kind).requires_grad_() for x in (embedded, weights)]
        targets = Targets(of_teacher.to(kind), weights.to(kind), torch.zeros(prototypes), 0.07)
        value = matched_entropy(*leaves, targets, matches, 0.1)
        found.append([value, *gradients(value, leaves)])
    for exact, low in zip(*found, strict=True):
        assert float((low.detach().float() - exact.detach()).norm() / exact.detach().norm()) < 1e-2


@pytest.mark.parametrize("number", CASES)
def test_masked_patches(number: int) -> None:
    case = make_case(number)
    matches = patch.match_masked(case.masks, torch.device("cpu"))
    value = entropy(case.patch_targets, case.patch_student, matches)
    expected, terms = plain.masked_patches(case.patch_targets, case.patch_student, case.masks)
    assert matches.terms == terms
    assert_twins(value, expected, [case.patch_student], FLOAT32_WEIGHTS)
    if not terms:
        assert_exactly_zero(value, [case.patch_student])


# ---- through Objective: temperatures, centres, weights, and what is called empty

STUDENT_TEMPERATURE, CLS_TEMPERATURE, PATCH_TEMPERATURE = 0.3, 0.2, 0.4
WEIGHTS = {"cls": 0.5, "mim": 0.25, "patch": 2.0}


@dataclass
class Pass:
    """One call of `Objective` with its inputs, before the student's division by the temperature."""

    objective: Objective
    case: Case
    student: Outputs
    teacher: Outputs
    cls_center: Tensor
    patch_center: Tensor

    def losses(self) -> Losses:
        grid = self.case.masks.unsqueeze(-1)
        losses: Losses = self.objective(
            self.student, self.teacher, grid, torch.tensor(self.case.labels),
            cls_temperature=CLS_TEMPERATURE, patch_temperature=PATCH_TEMPERATURE,
        )  # fmt: skip
        return losses

    @property
    def leaves(self) -> list[Tensor]:
        assert self.student.patches is not None
        given = [self.student.cls, self.student.patches.embedded, self.student.local_cls]
        return [x for x in given if x is not None]


def make_pass(case: Case, **settings: Any) -> Pass:
    """Float32 inputs, since `Objective` computes in float32; centres that are not zero."""
    merged: dict[str, Any] = {
        "student_temperature": STUDENT_TEMPERATURE, "mim": {"weight": WEIGHTS["mim"]}, **settings
    }  # fmt: skip
    merged["cls"] = {"weight": WEIGHTS["cls"], **settings.get("cls", {})}
    merged["patch"] = {"weight": WEIGHTS["patch"], **settings.get("patch", {})}
    generator = torch.Generator().manual_seed(0)
    prototypes = case.targets.shape[-1]
    objective = Objective(ObjectiveConfig.model_validate(merged), HeadConfig(num_prototypes=prototypes))
    objective.cls_center.normal_(generator=generator)
    objective.patch_center.normal_(generator=generator)

    def leaf(x: Tensor) -> Tensor:
        return x.detach().float().requires_grad_()

    student = Outputs(
        leaf(case.student), unit_prototypes(leaf(case.patch_student.flatten(0, 2))), leaf(case.student_tokens), None,
        leaf(case.local) if len(case.local) else None,
    )  # fmt: skip
    weighting = merged["patch"].get("weighting", "mean")
    teacher = Outputs(
        torch.randn(case.targets.shape, generator=generator),
        unit_prototypes(torch.randn(case.patch_targets.shape, generator=generator).flatten(0, 2)),
        case.teacher_tokens.float(),
        case.attention.float() if weighting == "attention" else None,
    )
    return Pass(objective, case, student, teacher, objective.cls_center.clone(), objective.patch_center.clone())


def expected_terms(given: Pass) -> dict[str, tuple[Tensor, int]]:
    """All terms by the plain loops, in float64, from the same numbers."""
    config, case = given.objective.config, given.case
    student, teacher = given.student, given.teacher
    assert student.patches is not None
    assert student.tokens is not None
    assert teacher.patches is not None
    assert teacher.tokens is not None
    shape = case.patch_targets.shape
    teacher_logits, student_logits = (x.patches.embedded.double().view(shape) for x in (teacher, student))
    targets = plain.softened(teacher.cls.double(), given.cls_center.double(), CLS_TEMPERATURE)
    patch_targets = plain.softened(teacher_logits, given.patch_center.double(), PATCH_TEMPERATURE)
    z, patch_z = student.cls.double() / STUDENT_TEMPERATURE, student_logits / STUDENT_TEMPERATURE
    local = z[:0] if student.local_cls is None else student.local_cls.double() / STUDENT_TEMPERATURE
    labels = case.labels if config.labels else list(range(len(case.labels)))
    if config.labels:
        own = config.cls.same_image
        of_cls = plain.cls_same_class(targets, z, local, labels, with_own_views=own)
    else:
        of_cls = plain.cls_same_image(targets, z, local)
    of_patch = plain.matched_patches_paper(
        patch_targets, patch_z, student.tokens.double(), teacher.tokens.double(), labels,
        attention=None if teacher.attention is None else teacher.attention.double(),
        same_image=config.patch.same_image,
    )  # fmt: skip
    return {"cls": of_cls, "mim": plain.masked_patches(patch_targets, patch_z, case.masks), "patch": of_patch}


SETTINGS: list[dict[str, Any]] = [
    {"labels": False},
    {"labels": False, "patch": {"weighting": "attention"}},
    {"labels": True, "patch": {"weighting": "attention"}},
    {"labels": True, "cls": {"same_image": True}, "patch": {"same_image": False}, "pairs": "global"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8, 11, 13, 19, 24])
def test_objective(number: int, settings: dict[str, Any]) -> None:
    given = make_pass(make_case(number), **settings)
    expected = expected_terms(given)
    losses = given.losses()
    assert set(losses.terms) == set(expected)
    assert set(losses.empty) == {name for name, (_, count) in expected.items() if count == 0}
    total = torch.zeros((), dtype=torch.float64)
    for name, (value, _) in expected.items():
        torch.testing.assert_close(losses.terms[name].double(), WEIGHTS[name] * value, rtol=1e-5, atol=1e-6)
        total = total + WEIGHTS[name] * value
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-5, atol=1e-6)
    found, wanted = gradients(losses.total, given.leaves), gradients(total, given.leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_centers_move_after_the_losses() -> None:
    given = make_pass(make_case(0), cls_center_momentum=0.75, patch_center_momentum=0.5)
    given.losses()
    assert given.teacher.patches is not None
    cls_mean, patch_mean = given.teacher.cls.mean((0, 1)), given.teacher.patches.embedded.mean(0)
    torch.testing.assert_close(given.objective.cls_center, 0.75 * given.cls_center + 0.25 * cls_mean)
    torch.testing.assert_close(given.objective.patch_center, 0.5 * given.patch_center + 0.5 * patch_mean)


@pytest.mark.parametrize("matching", ["paper", "reference"])
def test_terms_without_a_pair(matching: str) -> None:
    """All labels distinct, no local crops, nothing masked: every term is exactly 0 and says so."""
    case = make_case(0)
    case.labels = list(range(len(case.labels)))
    case.local = case.local[:0]
    case.masks = torch.zeros_like(case.masks)
    given = make_pass(case, labels=True, patch={"matching": matching, "same_image": False})
    losses = given.losses()
    assert set(losses.empty) == {"cls", "mim", "patch"}
    assert_exactly_zero(losses.total, given.leaves)
    for term in losses.terms.values():
        assert_exactly_zero(term, given.leaves)


def test_a_single_view_has_nothing_to_compare() -> None:
    case = make_case(0)
    case.local = case.local[:0]
    for name in ("targets", "student", "patch_targets", "patch_student", "student_tokens", "teacher_tokens"):
        setattr(case, name, getattr(case, name)[:1])
    case.attention, case.masks = case.attention[:1], torch.zeros_like(case.masks[:1])
    given = make_pass(case, labels=False)
    losses = given.losses()
    assert set(losses.empty) == {"cls", "mim", "patch"}
    assert_exactly_zero(losses.total, given.leaves)
