"""Disturb runs at random moments until they end, and compare them with runs that nothing disturbed.

python benchmarks/soak.py [--kills 50] [--terms 20] [--seed 0] [--epochs 6] [--only phase1-w0-p1]
python benchmarks/soak.py --minutes 60       the memory of one run, which is stopped at the end and saves all the time

Both phases, 0 and 2 loader processes, 1 and 2 training processes. Kills (SIGKILL, of the whole job or of its first
process alone) and SIGTERMs are spread evenly over these. At the end every checkpoint and every record must be those of
the undisturbed run, and no partial file may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

OUT = Path("run")
WORDS = (
    f"out={OUT}", "accelerator=cpu", "data.limit_per_class=3", "batch_size=64", "validation.every=2",
    "validation.episodes=20", "validation.query=2", "validation.shots=[1]", "save_minutes=0.002", "log_every=2",
    "head.num_prototypes=512",
)  # fmt: skip
PHASES = {
    "phase1": ("pretrain", "debug-pretrain"),
    "phase2": ("distill", "debug-distill", "init=random", "data.sampler={classes: 16, per_class: 4}"),
}
TIMES = ("time", "seconds", "images_per_second")


def command(phase: str, workers: int, processes: int, epochs: int) -> list[str]:
    words = (*WORDS, f"num_workers={workers}", f"devices={processes}", f"epochs={epochs}")
    return [sys.executable, "-m", "smkd", *PHASES[phase], *words]


def start(line: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def result(folder: Path) -> dict[str, Any]:
    """Checkpoints but for earlier states, whose moment is the clock's, and records but for times."""
    lines = [json.loads(line) for line in (folder / OUT / "metrics.jsonl").read_text().splitlines()]
    return {
        "checkpoints": {
            file.name: file.read_bytes() for file in (folder / OUT / "checkpoints").iterdir()
            if not file.name.startswith("last-")
        },
        "records": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "hidden": [file.name for file in (folder / OUT).rglob(".*")],
    }  # fmt: skip


def disturb(line: list[str], folder: Path, numbers: list[int], seconds: float, rng: random.Random) -> Counter[str]:
    """Start again until the run ends, and take signals off `numbers` to send at random moments."""
    seen: Counter[str] = Counter()
    while True:
        process = start(line, folder)
        if numbers:
            try:
                process.wait(rng.uniform(0.2, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                number = numbers.pop()
                alone = number == signal.SIGKILL and rng.random() < 0.5
                (os.kill if alone else os.killpg)(process.pid, number)
                seen[signal.Signals(number).name] += 1
                if number == signal.SIGTERM:
                    asked = time.monotonic()
                    process.wait(60)
                    seen["slow"] += time.monotonic() - asked > 10
                    seen[f"exit {process.returncode}"] += 1
        _, said = process.communicate()
        if "is being written by" in said:  # what is left of a killed job is still there
            seen["refused"] += 1
            time.sleep(0.2)
        elif process.returncode == 2:
            raise SystemExit(said)
        elif process.returncode == 0:
            return seen


def memory(process: int) -> float:
    """Resident megabytes of a process and those that it has started (Linux)."""
    kilobytes, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            waiting += [int(child) for task in Path(f"/proc/{number}/task").iterdir()
                        for child in (task / "children").read_text().split()]  # fmt: skip
            lines = Path(f"/proc/{number}/status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return kilobytes / 1024


def endure(minutes: float) -> None:
    """Train that long, look at the memory, stop by SIGTERM, and say what came of it."""
    line = command("phase2", 2, 1, 10**6)
    with tempfile.TemporaryDirectory() as folder:
        process, seen, begun = start(line, Path(folder)), [], time.monotonic()
        time.sleep(min(60.0, 15 * minutes))  # until everything is loaded
        while time.monotonic() - begun < 60 * minutes:
            seen.append(memory(process.pid))
            time.sleep(1)
            if process.poll() is not None:
                raise SystemExit(process.communicate()[1])
        process.send_signal(signal.SIGTERM)
        process.communicate()
        found = result(Path(folder))
    tenths = [sorted(part)[len(part) // 2] for part in (seen[i * len(seen) // 10 : (i + 1) * len(seen) // 10]
                                                        for i in range(10))]  # fmt: skip
    steps = max(record["step"] for record in found["records"])
    shown, drift = ", ".join(f"{each:.0f}" for each in tenths), 100 * (tenths[-1] / tenths[0] - 1)
    print(f"{minutes:g} minutes, {steps} steps, exit {process.returncode}; median MB in each tenth: {shown}; drift "
          f"{drift:+.1f} %")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one of the settings")
    parser.add_argument("--minutes", type=float, help="of the run whose memory is looked at, instead of all that")
    options = parser.parse_args()
    if options.minutes:
        endure(options.minutes)
        return
    settings = {
        f"{phase}-w{workers}-p{processes}": (phase, workers, processes)
        for phase in PHASES for workers in (0, 2) for processes in (1, 2)
    }  # fmt: skip
    if options.only:
        settings = {options.only: settings[options.only]}
    rng = random.Random(options.seed)
    shares: dict[str, list[int]] = {name: [] for name in settings}
    everything = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    for position, number in enumerate(everything):
        shares[list(settings)[position % len(settings)]].append(number)
    failed = 0
    for name, (phase, workers, processes) in settings.items():
        line = command(phase, workers, processes, options.epochs)
        rng.shuffle(shares[name])
        with tempfile.TemporaryDirectory() as whole:
            started = time.monotonic()
            if start(line, Path(whole)).wait():
                raise SystemExit(f"{name}: the undisturbed run failed")
            seconds, expected = time.monotonic() - started, result(Path(whole))
        seen, different = Counter[str](), set[str]()
        while shares[name]:
            with tempfile.TemporaryDirectory() as cut:
                seen += disturb(line, Path(cut), shares[name], seconds, rng)
                seen["runs"] += 1
                found = result(Path(cut))
                different |= {key for key in expected if found[key] != expected[key]}
        failed += bool(different)
        print(name, dict(seen), f"DIFFERENT: {different}" if different else "equal", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
