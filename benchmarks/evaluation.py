"""Few-shot evaluation against the per-episode approach of the published code, in the same run.

20 classes x 600 features of 768 numbers, 5-way 5-shot; then tieredImageNet's size from a feature file. Each part runs
in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smkd import fewshot
from smkd.config.loading import check_protocol
from smkd.fewshot.accuracy import evaluate_features
from smkd.fewshot.feature_file import FeatureSource, FeatureWriter, read_features

CLASSES, PER_CLASS, DIM, WAY, SHOT = 20, 600, 768, 5, 5
TIERED_CLASSES, TIERED_ROWS = 160, 206_209
# head, queries, episodes, limit in seconds
PARTS = [
    ("prototype", "all", 10_000, 5.0),
    ("prototype", 15, 10_000, 0.5),
    ("classifier", "all", 1_000, 6.0),
    ("logistic", 15, 10_000, 60.0),
    ("tim", 15, 1_000, 2.0),
    ("pt-map", 15, 1_000, 2.0),
    ("bd-cspn", 15, 1_000, None),
    ("laplacian-shot", 15, 1_000, None),
    ("transductive-finetune", 15, 1_000, None),
    ("knn", 15, 10_000, None),
    ("ridge", 15, 10_000, None),
]


def clusters(classes: int, rows: int) -> tuple[Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    labels = np.sort(np.arange(rows) % classes)
    centres = 0.14 * torch.randn(classes, DIM, generator=rng)
    features = torch.randn(rows, DIM, generator=rng)
    return features.add_(centres[torch.from_numpy(labels)]), labels


def fast(head: str, query: int | str, episodes: int) -> dict[str, Any]:
    features, labels = clusters(CLASSES, CLASSES * PER_CLASS)

    def work(count: int) -> fewshot.Result:
        return fewshot.evaluate(features, labels, head=head, way=WAY, shot=SHOT, query=query, episodes=count)

    work(max(10, episodes // 50))
    runs = []
    for _ in range(3 if episodes > 1_000 else 2):
        start = time.perf_counter()
        result = work(episodes)
        runs.append(time.perf_counter() - start)
    return {"seconds": min(runs), "accuracy": result.mean, "peak_gb": peak_gb()}


def tiered(episodes: int) -> dict[str, Any]:
    """Prototype episodes with all queries, the features mapped from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiered.h5"
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory is not ours
            pool.apply(write_tiered, (path,))
        start = time.perf_counter()
        features = read_features(path)
        read = time.perf_counter() - start
        (result,) = evaluate_features(features, check_protocol(shots=(SHOT,), query="all", episodes=episodes))
        return {
            "seconds": time.perf_counter() - start, "read_s": read, "accuracy": result.mean, "peak_gb": peak_gb()
        }  # fmt: skip


def write_tiered(path: Path) -> None:
    features, labels = clusters(TIERED_CLASSES, TIERED_ROWS)
    with FeatureWriter(path, rows=len(labels), dim=DIM, source=FeatureSource()) as writer:
        writer.append(features, labels)


def slow_prototypes(bank: Tensor) -> None:
    """One episode as the published code does it: permute, stack, average, cosine, arg max."""
    classes = random.sample(range(CLASSES), WAY)
    chosen = torch.stack([bank[label][torch.from_numpy(np.random.permutation(PER_CLASS))] for label in classes])
    means = chosen[:, :SHOT].mean(dim=1)
    query = chosen[:, SHOT:].reshape(-1, DIM)
    scores = F.normalize(query, dim=1) @ F.normalize(means, dim=1).T
    truth = torch.arange(WAY).repeat_interleave(PER_CLASS - SHOT)
    (scores.argmax(dim=1) == truth).float().mean().item()


def slow_classifier(bank: Tensor) -> None:
    """One episode as the published code does it: a layer and SGD, 301 epochs of batches of four."""
    classes = random.sample(range(CLASSES), WAY)
    chosen = torch.stack([bank[label][torch.from_numpy(np.random.permutation(PER_CLASS))] for label in classes])
    support = F.normalize(chosen[:, :SHOT].reshape(-1, DIM), dim=1)
    labels = torch.arange(WAY).repeat_interleave(SHOT)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(DIM, WAY, bias=False), dim=0)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
    for _ in range(301):
        for items in torch.randperm(len(support)).split(4):
            optimiser.zero_grad()
            F.cross_entropy(2 * layer(support[items]), labels[items]).backward()
            optimiser.step()
    query = F.normalize(chosen[:, SHOT:].reshape(-1, DIM), dim=1)
    with torch.no_grad():
        layer(query).argmax(dim=1)


def slow(name: str, threads: int) -> float:
    """Seconds an episode."""
    torch.set_num_threads(threads)
    random.seed(0)
    np.random.seed(0)
    features, _ = clusters(CLASSES, CLASSES * PER_CLASS)
    bank = features.view(CLASSES, PER_CLASS, DIM)
    work, count = {"prototype": (slow_prototypes, 60), "classifier": (slow_classifier, 2)}[name]
    work(bank)
    start = time.perf_counter()
    for _ in range(count):
        work(bank)
    return (time.perf_counter() - start) / count


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """The result of a function in a process of its own, which may start others."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, work, given))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def send(sender: Any, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    sender.send(work(*given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000, help="at most so many of each part")
    most = parser.parse_args().episodes
    threads = torch.get_num_threads()
    per_episode = {}
    for name in ("prototype", "classifier"):
        tried = {count: apart(slow, name, count) for count in sorted({1, threads})}
        per_episode[name] = min(tried.values())
        print(f"one episode at a time, {name}: "
              + ", ".join(f"{1e3 * s:.1f} ms with {count} threads" for count, s in tried.items()))  # fmt: skip
    report: dict[str, Any] = {"threads": threads, "torch": torch.__version__, "slow_s_per_episode": per_episode}
    for head, query, wanted, limit in PARTS:
        episodes = min(wanted, most)
        found = apart(fast, head, query, episodes)
        text = (f"{head}, {query} queries, {episodes} episodes: {found['seconds']:.2f} s "
                f"({1e3 * found['seconds'] / episodes:.3f} ms each), peak {found['peak_gb']:.2f} GB")  # fmt: skip
        if limit is not None and episodes == wanted:
            text += f", wanted {limit:g} s"
        if query == "all":
            found["ratio"] = per_episode[head] * episodes / found["seconds"]
            text += f", {found['ratio']:.0f} x"
        print(text, flush=True)
        report[f"{head}/{query}"] = found
    report["tiered"] = found = apart(tiered, min(10_000, most))
    print(f"tieredImageNet size, prototype, all queries, {min(10_000, most)} episodes: {found['seconds']:.1f} s, "
          f"peak {found['peak_gb']:.2f} GB")  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
