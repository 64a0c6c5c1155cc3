"""Few-shot heads that look at all queries of an episode together, batched over episodes.

Every head is called as head(support, labels, query, generator) -> scores:

    support    float32 [episodes, n, dim]
    labels     int64 [episodes, n], the way of each support feature, 0..way-1; every way of every episode has at
               least one, and ways may differ in how many
    query      float32 [episodes, queries, dim]
    generator  not drawn from: the heads here are deterministic
    scores     float32 [episodes, queries, way]; the largest wins, the first way on ties

An episode's scores depend on that episode alone. Inside, ways come before features ([episodes, way, n]): a CPU is far
faster with a softmax over the few ways when they are not the last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

POWER_OFFSET = 1e-6
"""Added to magnitudes before the power transform, as in the authors' code of PT-MAP."""
CENTRED_EPS = 1e-6
"""Norm below which a centred unit vector is rounding and must not be scaled up."""
PLAN_TOLERANCE = 1e-6
"""Largest error of a way's mass, in queries, at which the transport plan of PT-MAP counts as found."""
PLAN_STEPS = 100
"""Most Newton steps for one plan; a handful are needed."""
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class BDCSPN:
    """Rectified cosine prototypes, BD-CSPN (Liu et al., ECCV 2020, 'Prototype rectification for few-shot learning').

    Normalised queries move by the difference of support and query means (cross-class bias). Each query joins the
    way of its nearest prototype, and each prototype becomes the mean of its way's members, weighted by
    exp(scale cos) to the basic prototype (intra-class bias). All queries are pseudo-labelled, and the score is the
    cosine of the moved query with the rectified prototype.

    Attributes:
        scale: epsilon of the weights, 10 in the paper.
    """

    transductive: ClassVar[bool] = True
    scale: float = 10.0

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Cosines, [episodes, queries, way]."""
        prototypes, moved = _rectified(support, _members(labels), query, self.scale)
        return _cosines(prototypes, moved).mT


@dataclass(frozen=True)
class LaplacianShot:
    """Laplacian-regularised assignments (Ziko et al., ICML 2020, 'Laplacian regularized few-shot learning').

    Unary terms a are squared distances to prototypes; w(q, p) is 1 if p is among the nearest queries of q. The bound
    updates are y_q <- softmax(-a_q + weight * sum_p w(q, p) y_p), from softmax(-a_q). Prototypes and moved queries
    are those of BD-CSPN, which the paper adopts. Two choices where text and code differ: member weights are Liu et
    al.'s (the authors' code has a softmax over the ways instead), and a query is not its own neighbour (the authors'
    code counts it, so that its 3 are 2 others). Features are L2-normalised; the paper first subtracts the mean of the
    base classes, which an episode does not have.

    Attributes:
        weight: lambda. The authors tune it on validation classes, over 0.1 to 1.5; 0.7 is what their code picks for
            1-shot mini-ImageNet.
        neighbours: k, 3 as the authors have it; no more than there are other queries.
        iterations: bound updates; 20, at which the authors' code stops.
        scale: epsilon of the rectification.
    """

    transductive: ClassVar[bool] = True
    weight: float = 0.7
    neighbours: int = 3
    iterations: int = 20
    scale: float = 10.0

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Logits of the last assignments, [episodes, queries, way]."""
        prototypes, moved = _rectified(support, _members(labels), query, self.scale)
        # |q|^2 is the same for every way
        unary = 2 * prototypes @ moved.mT - prototypes.square().sum(dim=-1, keepdim=True)
        received = self.weight * self._affinity(moved).mT
        logits = unary
        for _ in range(self.iterations):
            logits = unary + logits.softmax(dim=1) @ received
        return logits.mT

    def _affinity(self, query: Tensor) -> Tensor:
        """1 where the column is among the nearest of the row, [episodes, queries, queries]."""
        closeness = 2 * query @ query.mT - query.square().sum(dim=-1)[:, None]
        closeness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = closeness.topk(min(self.neighbours, query.shape[1] - 1)).indices
        return torch.zeros_like(closeness).scatter_(2, nearest, 1.0)


@dataclass(frozen=True)
class PTMAP:
    """Balanced optimal transport to moving centres, PT-MAP (Hu et al., ICANN 2021).

    'Leveraging the feature distribution in transfer-based few-shot learning': features are power-transformed,
    normalised, centred (support and queries each by their own mean) and normalised again. In turn, queries are shared
    out to the centres by entropic optimal transport, each way receiving queries / way of them, and the centres move
    towards the means of what they hold. The paper's features are non-negative; those of a ViT are signed, so the
    transform works on magnitudes and keeps signs, which leaves it as published wherever a feature is not negative.
    Equally many queries a way is an assumption, and uneven episodes are hurt by it.

    Attributes:
        power: beta of the transform.
        regularisation: lambda of the transport: the plan is a scaling of exp(-lambda distance^2).
        step: alpha, how far the centres move towards the means.
        iterations: moves of the centres. All four values are those of the authors' code.
    """

    transductive: ClassVar[bool] = True
    power: float = 0.5
    regularisation: float = 10.0
    step: float = 0.2
    iterations: int = 20

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Share of each query that each way receives, [episodes, queries, way]."""
        members = _members(labels)
        shots = support.shape[1]
        inner = inner_products(torch.cat([self._prepared(support), self._prepared(query)], dim=1))
        centres = F.pad(_shares(members), (0, query.shape[1]))
        potentials = torch.zeros_like(centres[..., :1], dtype=torch.float64)
        for move in range(self.iterations + 1):
            products, norms = _with_centres(centres, inner)
            # |q|^2 is the same for every way
            closeness = (2 * products[..., shots:] - norms).double()
            plan, potentials = transport_plan(self.regularisation * closeness, potentials)
            if move < self.iterations:
                means = _shares(torch.cat([members, plan], dim=2))
                centres = centres + self.step * (means - centres)
        return plan.mT

    def _prepared(self, features: Tensor) -> Tensor:
        magnitudes = (features.abs() + POWER_OFFSET).pow(self.power)
        unit = F.normalize(torch.where(features < 0, -magnitudes, magnitudes), dim=-1)
        return F.normalize(unit - unit.mean(dim=1, keepdim=True), dim=-1, eps=CENTRED_EPS)


@dataclass(frozen=True)
class TIM:
    """Transductive information maximisation, TIM-ADM (Boudiaf et al., NeurIPS 2020).

    Minimises support_weight * cross-entropy of the support - entropy of the queries' mean prediction + alpha * mean
    entropy of the queries' predictions, over class weights w, with p_ik ~ exp(-temperature / 2 |w_k - z_i|^2) on
    normalised features z. Proposition 1 alternates two closed forms: auxiliary q_ik ~ p_ik^(1 + alpha) /
    sqrt(sum_i p_ik^(1 + alpha)), then w, starting from the class means.

    Attributes:
        iterations: alternations, 150 in the paper.
        temperature: tau, 15 in the paper.
        support_weight: lambda of the cross-entropy, 0.1 in the paper.
        alpha: weight of the conditional entropy, 0.1 in the paper.
    """

    transductive: ClassVar[bool] = True
    iterations: int = 150
    temperature: float = 15.0
    support_weight: float = 0.1
    alpha: float = 0.1

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Logits of the queries, [episodes, queries, way]."""
        members = _members(labels)
        shots, queries = support.shape[1], query.shape[1]
        inner = inner_products(F.normalize(torch.cat([support, query], dim=1), dim=-1))
        importance = members.new_ones(shots + queries)
        importance[:shots] = self.support_weight / (1 + self.alpha)
        importance[shots:] = shots / queries
        weights = F.pad(_shares(members), (0, queries))
        for _ in range(self.iterations):
            log_p = self._logits(weights, inner).log_softmax(dim=1)
            sharp = (1 + self.alpha) * log_p[..., shots:]
            q = (sharp - sharp.logsumexp(dim=2, keepdim=True) / 2).softmax(dim=1)
            wanted = importance * torch.cat([members, q], dim=2)
            given = importance * log_p.exp()
            weights = (wanted - given + given.sum(dim=2, keepdim=True) * weights) / wanted.sum(dim=2, keepdim=True)
        return self._logits(weights, inner)[..., shots:].mT

    def _logits(self, weights: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        products, norms = _with_centres(weights, inner)
        return self.temperature * (products - norms / 2)  # |z|^2 is the same for every way


@dataclass(frozen=True)
class TransductiveFinetune:
    """Fine-tuning on support and queries (Dhillon et al., ICLR 2020, 'A baseline for few-shot image classification').

    The classifier w z / |z| + b starts from normalised class means and b = 0 (equations 6 and 7), and Adam makes two
    updates an epoch: one for the mean cross-entropy of the support, one for the mean entropy of the queries'
    predictions (equation 8). The paper fine-tunes the backbone too and feeds the classifier its rectified logits;
    here the features are frozen and taken as they are, and only w and b move.

    Attributes:
        epochs: 25 in the paper.
        learning_rate: ours. The paper's 5e-5, made for a whole backbone, hardly moves a classifier alone; from 1e-3
            the entropy draws queries into few ways where features share a large mean.
    """

    transductive: ClassVar[bool] = True
    epochs: int = 25
    learning_rate: float = 3e-4

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Logits, [episodes, queries, way]."""
        members = _members(labels)
        weights = F.pad(F.normalize(_shares(members) @ support, dim=-1), (0, 1))
        # a last feature of one carries the bias
        support, query = (F.pad(F.normalize(part, dim=-1), (0, 1), value=1.0) for part in (support, query))
        first, second = torch.zeros_like(weights), torch.zeros_like(weights)
        for update in range(1, 2 * self.epochs + 1):
            features = support if update % 2 else query
            log_p = (weights @ features.mT).log_softmax(dim=1)
            p = log_p.exp()
            # the losses' gradients by the logits, each feature for itself: episodes do not mix
            slopes = p - members if update % 2 else p * ((p * log_p).sum(dim=1, keepdim=True) - log_p)
            gradient = slopes @ features / features.shape[1]
            first = first.lerp(gradient, 1 - ADAM_BETAS[0])
            second = second.lerp(gradient.square(), 1 - ADAM_BETAS[1])
            spread = (second / (1 - ADAM_BETAS[1] ** update)).sqrt() + ADAM_EPS
            weights = weights - self.learning_rate / (1 - ADAM_BETAS[0] ** update) * first / spread
        return (weights @ query.mT).mT


def inner_products(points: Tensor) -> Callable[[Tensor], Tensor]:
    """Inner products of points with combinations of the same points, the shorter way round.

    With fewer points than dimensions, the Gram matrix is worked out once and no later product touches the features:
    cost and memory are those of n-dimensional features with the same distances, exactly.

    Args:
        points: [episodes, n, dim].

    Returns:
        Function from the combinations' coefficients [episodes, way, n] to products [episodes, way, n].
    """
    if points.shape[1] < points.shape[2]:
        gram = points @ points.mT
        return lambda coefficients: coefficients @ gram
    return lambda coefficients: (coefficients @ points) @ points.mT


def transport_plan(log_kernel: Tensor, potentials: Tensor) -> tuple[Tensor, Tensor]:
    """Scaling of a kernel that hands out every query whole, equally much to each way.

    Sinkhorn's algorithm converges to this plan, slowly where clusters are tight. Its potentials g, one a way, minimise
    the convex sum_q logsumexp_k(log_kernel_kq + g_k) - (queries / way) sum_k g_k, so a few Newton steps find them. A
    step of range d is scaled by log(1 + d) / d, with which they converge from anywhere (Sun and Tran-Dinh,
    Mathematical Programming 2019, on generalised self-concordance). An episode that has its plan stays as it is.

    Args:
        log_kernel: float64 [episodes, way, queries].
        potentials: where to start, [episodes, way, 1].

    Returns:
        float32 plan [episodes, way, queries] and its potentials.
    """
    _, way, queries = log_kernel.shape
    for _ in range(PLAN_STEPS):
        plan = (log_kernel + potentials).softmax(dim=1)
        excess = plan.sum(dim=2, keepdim=True) - queries / way
        moving = excess.abs().amax(dim=1, keepdim=True) > PLAN_TOLERANCE
        if not moving.any():
            break
        shared = plan @ plan.mT
        shared.diagonal(dim1=1, dim2=2).zero_()
        # ways that share nothing with others would make the Hessian singular
        hessian = torch.diag_embed((1 + 1e-12) * shared.sum(dim=2) + 1e-30) - shared
        # a constant on all potentials changes nothing: the first one stays
        step = F.pad(-torch.linalg.solve_ex(hessian[:, 1:, 1:], excess[:, 1:])[0], (0, 0, 1, 0))
        reach = step.amax(dim=1, keepdim=True) - step.amin(dim=1, keepdim=True)
        potentials = torch.where(moving, potentials + step * reach.log1p() / reach, potentials)
    return (log_kernel + potentials).softmax(dim=1).float(), potentials


def _members(labels: Tensor) -> Tensor:
    """1 where a support feature is of the way, float32 [episodes, way, n]."""
    return F.one_hot(labels).mT.float().contiguous()


def _shares(members: Tensor) -> Tensor:
    """Rows scaled to sum 1: the coefficients of the members' means."""
    return members / members.sum(dim=2, keepdim=True)


def _with_centres(centres: Tensor, inner: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Products of centres with all points [episodes, way, n], and the centres' squared norms [episodes, way, 1]."""
    products = inner(centres)
    return products, (centres * products).sum(dim=2, keepdim=True)


def _cosines(prototypes: Tensor, features: Tensor) -> Tensor:
    return F.normalize(prototypes, dim=-1) @ F.normalize(features, dim=-1).mT


def _rectified(support: Tensor, members: Tensor, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Prototypes of BD-CSPN [episodes, way, dim], and the moved queries."""
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    query = query + support.mean(dim=1, keepdim=True) - query.mean(dim=1, keepdim=True)
    features = torch.cat([support, query], dim=1)
    cosines = _cosines(_shares(members) @ support, features)
    guessed = F.one_hot(cosines[..., support.shape[1] :].argmax(dim=1), members.shape[1]).mT
    joined = torch.cat([members, guessed], dim=2).bool()
    shares = (scale * cosines).masked_fill(~joined, -torch.inf).softmax(dim=2)
    return shares @ features, query
