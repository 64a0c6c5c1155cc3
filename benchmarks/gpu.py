"""What smkd does on one CUDA GPU: its CUDA tests, training steps, loading, a short training, and a profile.

Needs one GPU, PyTorch and pytest, and no network. Each part's result is a JSON file in the folder of results; the same
command skips the parts that are there, and leaves a part that may not fit into the minutes for another start. A part
that failed keeps its error: remove its file to repeat it. The results also become a page of Markdown. `--cpu
--tiny` tries every part without a GPU, on small networks.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from data import loader, write_photos
from smkd import __version__
from smkd.config.loading import resolve
from smkd.data.datasets import PatternImages
from smkd.data.loader import batches
from smkd.device import autocast_type, pick_device
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner
from smkd.engine.stopping import TIME_IS_UP
from smkd.files import written_aside
from smkd.machine import cores

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
WORKERS = (1, 2, 4, 8, 16)
CACHES = ("none", "mmap", "memory")
SMALL_IMAGES = (
    "model.size=tiny", "model.embed_dim=192", "model.depth=12", "model.num_heads=3", "model.patch_size=12",
    "model.image_size=84", "global_views.size=84", "local_views.size=48", "validation.resize=84", "validation.crop=84",
    "evaluation.resize=84", "evaluation.crop=84",
)  # fmt: skip
"""The patterns' recipes with images of 84 pixels and a ViT-Ti/12."""
LARGEST_COSTS = 5
PHASES = ("pretrain", "distill")


@dataclass(frozen=True)
class Setup:
    """How the parts run.

    Attributes:
        out: folder of results.
        device: 'cuda' or 'cpu'.
        tiny: small networks and few steps, to try the script.
    """

    out: Path
    device: str
    tiny: bool


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: of its file.
        minutes: that it may take.
        measure: gives the result within these minutes.
    """

    name: str
    minutes: float
    measure: Callable[[Setup, float], dict[str, Any]]


class TooLongError(Exception):
    """A command took longer than its part may."""


def command(words: list[str], minutes: float) -> subprocess.CompletedProcess[str]:
    """Run this Python with some words, in the folder of the repository."""
    try:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TooLongError(f"stopped after {minutes:g} minutes: {' '.join(words)}") from error


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return next(iter(reversed((done.stderr.strip() or done.stdout.strip()).splitlines())), f"exit {done.returncode}")


# ---- the parts


def cuda_tests(setup: Setup, minutes: float) -> dict[str, Any]:
    where = "tests/test_device.py" if setup.tiny else "tests"
    words = ["-m", "pytest", where, "-k", "cuda", "-o", "addopts=", "-p", "no:cacheprovider", "-q"]
    done = command(words, minutes)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    found = {"command": shlex.join(["python", *words]), **counts, "failing": failed}
    return found if counts else {**found, "error": last_line(done)}


def bench(setup: Setup, minutes: float, *, recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """`smkd bench`, which also says how many images a second went through."""
    words = ["bench", recipe, *settings, f"accelerator={setup.device}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        steps = "1" if setup.tiny else "10"
        done = command(["-m", "smkd", *words, "--steps", steps, "--json", str(file)], minutes)
        found: dict[str, Any] = {"command": shlex.join(["smkd", *words, "--steps", steps])}
        said = [line for line in done.stdout.splitlines() if line.startswith("torch.compile")]
        found |= {"said": said[0]} if said else {}
        return found | (json.loads(file.read_text()) if done.returncode == 0 else {"error": last_line(done)})


def loading(setup: Setup, minutes: float) -> dict[str, Any]:
    """Images a second from 480-pixel JPEGs, for each cache and number of workers, a core each."""
    seconds = 0.2 if setup.tiny else 60 * minutes / 4 / len(CACHES) / len(WORKERS)
    found: dict[str, Any] = {"command": "python benchmarks/gpu.py", "cores": cores()}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), per_class=16 if setup.tiny else 256)
        config = resolve("mini-imagenet-pretrain", [f"data={folder}", "batch_size=16"])
        for cache in CACHES:
            rates = {}
            for workers in [1] if setup.tiny else [each for each in WORKERS if each <= cores()]:
                loads, sampler = loader(config, cache, workers, 256)
                rates[str(workers)] = images_per_second(loads, sampler, seconds, skip=1 if setup.tiny else 4 * workers)
            found[cache] = rates
    return found


def images_per_second(loads: Any, sampler: Any, seconds: float, skip: int) -> float:
    """Images of so many seconds, after the first batches, which were made while nobody took them."""

    def endless() -> Iterator[int]:
        for epoch in range(1 << 20):
            sampler.set_epoch(epoch)
            yield from (batch.global_crops.shape[1] for batch in batches(loads))

    taken = endless()
    for _ in range(skip):
        next(taken)
    start, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds or not images:
        images += next(taken)
    return images / passed


def training(setup: Setup, minutes: float) -> dict[str, Any]:
    """Both phases on patterns of 84 pixels, half the minutes each, with their validations over time."""
    runs, half = Path(tempfile.mkdtemp(dir=setup.out, prefix="runs-")), minutes / 2
    found: dict[str, Any] = {"command": "python benchmarks/gpu.py"}
    for phase in PHASES:
        recipe = f"debug-{phase}" if setup.tiny else f"patterns-{phase}"
        settings = (
            ["epochs=1", "data.limit_per_class=4"]
            if setup.tiny
            else [*SMALL_IMAGES, *epochs_within(setup, half, recipe)]
        )
        words = [phase, recipe, *settings, f"accelerator={setup.device}"]
        init = [f"init={runs / PHASES[0]}"] if phase != PHASES[0] else []
        done = command(["-m", "smkd", *words, *init, f"out={runs / phase}"], 0.8 * half)
        found[phase] = entry = {"command": shlex.join(["smkd", *words]), "exit": done.returncode}
        if done.returncode not in (0, TIME_IS_UP):
            return found | {"error": last_line(done)}
        records = [json.loads(line) for line in (runs / phase / "metrics.jsonl").read_text().splitlines()]
        begun = min(record["time"] for record in records)
        entry["validations"] = [
            {"minutes": (record["time"] - begun) / 60, "step": record["step"], "accuracy": record["accuracy"]}
            for record in records if record["kind"] == "validation"
        ]  # fmt: skip
    return found


def epochs_within(setup: Setup, minutes: float, recipe: str) -> list[str]:
    """Settings with which a run ends within 0.7 of these minutes, by the speed of a few steps, measured in 0.2."""
    speed = bench(setup, 0.2 * minutes, recipe=recipe, settings=SMALL_IMAGES)
    if "error" in speed:
        raise RuntimeError(speed["error"])
    images = len(PatternImages("train"))
    epochs = max(5, int(0.6 * 60 * minutes * speed["images_per_second"] / images))
    every = f"validation.every={max(1, epochs // 20)}"
    return [f"epochs={epochs}", every, f"max_hours={0.7 * minutes / 60:.3f}"]


def costs(setup: Setup, minutes: float) -> dict[str, Any]:
    """The operations of a step of phase 2 that take longest by themselves."""
    words = ["debug-distill"] if setup.tiny else ["mini-imagenet-distill", "batch_size=64", "init=random"]
    config = resolve(words[0], words[1:])
    device = pick_device(setup.device)
    learner = Learner.create(config, 64, device, autocast_type(config.precision, device))
    views = [synthetic_views(config, device)] * config.accumulate
    rates = rates_at(config, config.epochs // 2, 1)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    for _ in range(3):
        learner.step(views, rates)
    with profile(activities=kinds) as seen:
        learner.step(views, rates)
        if device.type == "cuda":
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {
        event.key: getattr(event, attribute) / 1e3
        for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CPU
    }  # fmt: skip
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:LARGEST_COSTS]
    total = sum(spent.values())
    return {
        "command": f"python benchmarks/gpu.py: one step of {' '.join(words)}",
        "costs": [{"name": name, "ms": spent[name], "share": spent[name] / total} for name in largest],
    }


def parts(tiny: bool) -> list[Part]:
    sizes = (16,) if tiny else (64, 128, 256, 512)
    plain = ("compile=false",)
    cases: list[tuple[str, str, tuple[str, ...]]] = []
    for phase in PHASES:
        cases += [(phase, f"{sizes[0]}-compiled", (f"batch_size={sizes[0]}", "compile=true"))]
        cases += [(phase, f"{size}", (f"batch_size={size}", *plain)) for size in sizes]
        cases += [(phase, f"{sizes[-1]}-recompute", (f"batch_size={sizes[-1]}", *plain, "recompute=true"))]
    sampler = f"data.sampler={{classes: {sizes[0] // 4}, per_class: 4}}"
    for name, pairs in (("pairs", "local"), ("pairs-global", "global")):
        settings = (f"batch_size={sizes[0]}", *plain, f"objective.pairs={pairs}", sampler)
        cases += [(PHASES[1], f"{sizes[0]}-{name}", settings)]
    if tiny:  # one of each kind
        cases = [cases[1], *cases[3:4], cases[5], cases[-1]]
    kind = "debug" if tiny else "mini-imagenet"
    return [
        Part("tests", 3.0, cuda_tests),
        *(Part(f"bench-{phase}-{name}", 1.5, partial(bench, recipe=f"{kind}-{phase}", settings=settings))
          for phase, name, settings in cases),
        Part("loading", 2.0, loading),
        Part("training", 13.0, training),
        Part("costs", 1.0, costs),
    ]  # fmt: skip


# ---- their files, and the page


def about(setup: Setup) -> dict[str, Any]:
    """Card and versions."""
    found = {
        "smkd": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "cores": cores(), "device": platform.machine(),
    }  # fmt: skip
    if setup.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        memory = f"{card.total_memory / 2**30:.0f} GB"
        found |= {"device": card.name, "memory": memory, "cuda": torch.version.cuda}
    return {**found, "tiny": setup.tiny}


def write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def results(setup: Setup, minutes: float) -> dict[str, Any]:
    """Results by part: those that are in the folder, and those that fit into the minutes."""
    setup.out.mkdir(parents=True, exist_ok=True)
    here, file = about(setup), setup.out / "about.json"
    if file.exists() and json.loads(file.read_text()) != here:
        raise SystemExit(f"'{setup.out}' holds results of another machine or version; give another --out")
    write(file, json.dumps(here, indent=2))
    found: dict[str, Any] = {}
    start = time.perf_counter()
    for part in parts(setup.tiny):
        path = setup.out / f"{part.name}.json"
        if path.exists():
            print(f"{part.name}: is there")
        elif (time.perf_counter() - start) / 60 + part.minutes > minutes:
            print(f"{part.name}: left for another start of the same command")
            continue
        else:
            began = time.perf_counter()
            try:
                result = part.measure(setup, part.minutes)
            except (TooLongError, RuntimeError) as error:  # the other parts may do
                result = {"error": str(error).strip().splitlines()[0]}
            result["took_s"] = round(time.perf_counter() - began, 1)
            write(path, json.dumps(result, indent=2))
            print(f"{part.name}: {result['took_s']} s {result.get('error', '')}".rstrip(), flush=True)
        found[part.name] = json.loads(path.read_text())
    return {"about": here, **found}


def page(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in found["about"].items() if name != "tiny")
    lines = ["# Benchmarks on a GPU", "", "Written by `python benchmarks/gpu.py`. The machine: " + facts + "."]
    if found["about"]["tiny"]:
        lines += ["", "These are tiny networks, which say nothing of speed."]
    if tests := found.get("tests"):
        counts = ", ".join(f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped") if kind in tests)
        lines += ["", "## Tests", "", f"`{tests['command']}`: {tests.get('error', counts)}."]
    lines += ["", "## Training steps", ""]
    lines += ["| command | images/s | TFLOP/s | of the ceiling | memory, GB |", "|---|---|---|---|---|"]
    for name, row in found.items():
        if name.startswith("bench-") and "error" in row:
            lines.append(f"| `{row.get('command', name)}` | {row['error'].replace('|', '/')} | | | |")
        elif name.startswith("bench-"):
            numbers = (f"{row['images_per_second']:.1f}", f"{row['tflops']:.2f}",
                       f"{row['tflops'] / row['ceiling_tflops']:.0%}", f"{row['peak_memory_gb']:.2f}")  # fmt: skip
            said = f" ({row['said']})" if "said" in row else ""
            lines.append(f"| `{row['command']}`{said} | {' | '.join(numbers)} |")
    if "error" not in (rates := found.get("loading", {"error": ""})):
        known = list(rates[CACHES[0]])
        lines += ["", "## Loading", "", "Images a second, 480-pixel JPEGs to 2 x 224 + 10 x 96 crops, by workers.", ""]
        lines += [f"| data.cache | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
        lines += [f"| {each} | {' | '.join(f'{rates[each][count]:.0f}' for count in known)} |" for each in CACHES]
    for phase in PHASES:
        if "validations" in (run := found.get("training", {}).get(phase, {})):
            lines += ["", f"## Training, {phase}", "", f"`{run['command']}`", "", "| minutes | step | accuracy, % |",
                      "|---|---|---|"]  # fmt: skip
            lines += [f"| {v['minutes']:.2f} | {v['step']} | {v['accuracy']:.2f} |" for v in run["validations"]]
    if "error" not in (seen := found.get("costs", {"error": ""})):
        lines += ["", "## The largest costs", "", f"`{seen['command']}`", ""]
        lines += ["| operation | ms | share |", "|---|---|---|"]
        lines += [f"| `{cost['name']}` | {cost['ms']:.2f} | {cost['share']:.0%} |" for cost in seen["costs"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--docs", type=Path, help=f"the page; none: {PAGE.relative_to(ROOT)} where a GPU was measured")
    parser.add_argument("--minutes", type=float, default=25, help="no part begins that may not end within these")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        print("no CUDA GPU is here; to try the script without one: python benchmarks/gpu.py --cpu --tiny")
        return
    setup = Setup(given.out.absolute(), "cpu" if given.cpu else "cuda", given.tiny)
    found = results(setup, given.minutes)
    docs = given.docs or (PAGE if setup.device == "cuda" and not setup.tiny else None)
    if docs is not None:
        write(docs, page(found))
        print(f"written: {docs}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
