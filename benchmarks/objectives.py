"""Patch term of phase 2 with its gradients, from the head's embeddings on: against two loops over pairs of images.

The plain loop indexes the logits for each pair, as the definition reads; its backward pass then fills a gradient as
large as all logits for every pair. The careful loop takes the logits apart once. Each side runs in a fresh process, so
that it has its own peak of memory. Both loops write the logits out, which are the yardstick for memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.objectives.patch import match_paper
from smkd.objectives.patch_entropy import Targets, matched_entropy

VIEWS, PER_CLASS, PATCHES, DIM, BOTTLENECK, PROTOTYPES = 2, 4, 196, 384, 256, 8192
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.07


class Inputs:
    """Backbone tokens, embeddings and prototypes of student and teacher."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.batch = batch
        self.tokens_s, self.tokens_t = (torch.randn(VIEWS, batch, PATCHES, DIM) for _ in range(2))
        rows = VIEWS * batch * PATCHES
        self.embedded_s, self.embedded_t = (F.normalize(torch.randn(rows, BOTTLENECK), dim=1) for _ in range(2))
        self.prototypes_s, self.prototypes_t = (
            F.normalize(torch.randn(PROTOTYPES, BOTTLENECK), dim=1) for _ in range(2)
        )
        self.attention = torch.randn(VIEWS, batch, PATCHES).softmax(dim=-1)
        labels = torch.arange(batch) // PER_CLASS
        self.pairs = labels[:, None] == labels[None, :]
        for leaf in (self.embedded_s, self.prototypes_s):
            leaf.requires_grad_()

    def fast(self) -> Tensor:
        """As in training."""
        matches = match_paper(self.tokens_s, self.tokens_t, self.pairs, self.attention)
        targets = Targets(self.embedded_t, self.prototypes_t, torch.zeros(PROTOTYPES), TEACHER_TEMPERATURE)
        return matched_entropy(self.embedded_s, self.prototypes_s, targets, matches, STUDENT_TEMPERATURE)

    def loop(self) -> Tensor:
        """By the definition, one pair of images after another."""
        return self._over_pairs(careful=False)

    def careful(self) -> Tensor:
        """The same with the logits taken apart once."""
        return self._over_pairs(careful=True)

    def _over_pairs(self, careful: bool) -> Tensor:
        shape = (VIEWS, self.batch, PATCHES, PROTOTYPES)
        logits = (self.embedded_s @ self.prototypes_s.T / STUDENT_TEMPERATURE).view(shape)
        apart = [view.unbind() for view in logits.unbind()] if careful else None
        p = (self.embedded_t @ self.prototypes_t.T / TEACHER_TEMPERATURE).softmax(dim=-1).view(shape)
        total, count = logits.new_zeros(()), 0
        for s in range(VIEWS):
            for t in range(VIEWS):
                if s == t:
                    continue
                for i, j in self.pairs.nonzero().tolist():
                    similarity = F.normalize(self.tokens_t[t, i], dim=-1) @ F.normalize(self.tokens_s[s, j], dim=-1).T
                    z = logits[s, j] if apart is None else apart[s][j]
                    matched = z[similarity.argmax(dim=1)].log_softmax(dim=-1)
                    total = total - (self.attention[t, i] * (p[t, i] * matched).sum(dim=-1)).sum()
                    count += 1
        return total / count


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(side: str, batch: int, repeats: int) -> dict[str, float]:
    """One side: the best time, the memory that it needed beside its inputs, the loss and the gradients' norms."""
    inputs = Inputs(batch)
    before, best = peak_gb(), float("inf")
    for _ in range(repeats):
        inputs.embedded_s.grad = inputs.prototypes_s.grad = None
        start = time.perf_counter()
        loss = getattr(inputs, side)()
        loss.backward()
        best = min(best, time.perf_counter() - start)
    assert inputs.embedded_s.grad is not None
    assert inputs.prototypes_s.grad is not None
    return {
        "seconds": best, "extra_gb": peak_gb() - before, "loss": float(loss.detach()),
        "grad_embedded": float(inputs.embedded_s.grad.norm()),
        "grad_prototypes": float(inputs.prototypes_s.grad.norm()),
    }  # fmt: skip


def in_process(side: str, batch: int, repeats: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--batch", str(batch), "--side", side, "--repeats", str(repeats)]
    found: dict[str, float] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16, help="images; of 64 the plain loop takes many minutes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["fast", "careful", "loop"])
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.batch, given.repeats)))
        return
    fast = in_process("fast", given.batch, given.repeats)
    loops = {name: in_process(name, given.batch, 1) for name in ("careful", "loop")}
    logits_gb = 2 * VIEWS * given.batch * PATCHES * PROTOTYPES * 4 / 2**30
    print(
        f"patch term, batch {given.batch}, {PER_CLASS} a class, {PATCHES} patches, {PROTOTYPES} prototypes: "
        f"smkd {fast['seconds']:.2f} s and {fast['extra_gb']:.2f} GB beside its inputs; "
        f"the logits of student and teacher alone are {logits_gb:.2f} GB"
    )
    for name, loop in loops.items():
        for value in ("loss", "grad_embedded", "grad_prototypes"):
            assert abs(fast[value] / loop[value] - 1) < 1e-4, (value, fast, loop)
        loop["ratio"] = loop["seconds"] / fast["seconds"]
        title = "plain loop" if name == "loop" else "careful loop"
        print(f"{title}: {loop['seconds']:.1f} s, {loop['ratio']:.1f} x, and {loop['extra_gb']:.2f} GB")
    print(json.dumps({"batch": given.batch, "smkd": fast, **loops, "logits_gb": logits_gb}))


if __name__ == "__main__":
    main()
