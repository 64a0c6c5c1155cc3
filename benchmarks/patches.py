"""Matched-patch loss and its gradient: one mixed target per student patch against a loop over pairs of images."""

from __future__ import annotations

import json
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from smkd.objectives.patch import match_paper, matched_patches

VIEWS, BATCH, PER_CLASS, PATCHES, DIM, PROTOTYPES = 2, 16, 4, 49, 96, 1024


def loop(student: Tensor, teacher: Tensor, z: Tensor, p: Tensor, pairs: Tensor) -> Tensor:
    """The definition, one pair of images at a time."""
    total, count = z.new_zeros(()), 0
    for s in range(VIEWS):
        for t in range(VIEWS):
            if s == t:
                continue
            for i, j in pairs.nonzero().tolist():
                similarity = F.normalize(teacher[t, i], dim=-1) @ F.normalize(student[s, j], dim=-1).T
                chosen = z[s, j][similarity.argmax(dim=1)]
                total = total - (p[t, i] * chosen.log_softmax(dim=-1)).sum(dim=-1).mean()
                count += 1
    return total / count


def main() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(VIEWS, BATCH, PATCHES, DIM) for _ in range(2))
    z = torch.randn(VIEWS, BATCH, PATCHES, PROTOTYPES, requires_grad=True)
    p = torch.randn(VIEWS, BATCH, PATCHES, PROTOTYPES).softmax(dim=-1)
    labels = torch.arange(BATCH) // PER_CLASS
    pairs = labels[:, None] == labels[None, :]
    seconds, values = {}, {}
    for name in ("loop", "smkd", "loop", "smkd"):  # the first round warms up
        z.grad = None
        start = time.perf_counter()
        if name == "loop":
            loss = loop(student, teacher, z, p, pairs)
        else:
            loss = matched_patches(p, z, match_paper(student, teacher, pairs, None))
        loss.backward()
        seconds[name], values[name] = time.perf_counter() - start, loss.item()
    assert abs(values["loop"] - values["smkd"]) < 1e-4, values
    ratio = seconds["loop"] / seconds["smkd"]
    print(f"patch loss: loop {seconds['loop'] * 1e3:.0f} ms, smkd {seconds['smkd'] * 1e3:.0f} ms: {ratio:.1f} x")
    print(json.dumps({"loop_s": seconds["loop"], "smkd_s": seconds["smkd"], "ratio": ratio}))


if __name__ == "__main__":
    main()
