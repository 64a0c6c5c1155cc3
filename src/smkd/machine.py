"""What this process may use of the machine: cores, memory, and the threads of PyTorch on a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

SPINS = "2000"
"""Looks that a waiting thread of OpenMP takes before it sleeps. GNU's default of some 100,000 halves the speed of a
small network beside one other busy process, and more beside several (docs/performance.md)."""


def cores() -> int:
    """Number of cores that this process may use, by its affinity and the quota of its control group."""
    quota = _quota()
    return _bound() if quota is None else max(1, min(_bound(), int(quota)))


def thread_settings(given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for PyTorch's threads, which it reads when it is loaded.

    PyTorch starts a thread for each core that it sees, also where a control group's quota allows fewer (`docker run
    --cpus`): they would then stand still together for most of the time.

    Args:
        given: the environment; what it says of threads stays.
    """
    found = {}
    if not given.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        found["GOMP_SPINCOUNT"] = SPINS
    if "OMP_NUM_THREADS" not in given and cores() < _bound():
        found["OMP_NUM_THREADS"] = str(cores())
    return found


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still use; None where that is not known (Linux tells)."""
    try:
        table = (root / "proc/meminfo").read_text(encoding="utf-8")
        free = 1024 * int(table.split("MemAvailable:")[1].split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return min([free, *(left for group in _groups("memory", root) if (left := _memory_left(group)) is not None)])


def _bound() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups of this process allow; None without a quota (Linux only)."""
    found = [_quota_of(group) for group in _groups("cpu", root)]
    return min((each for each in found if each is not None), default=None)


def _quota_of(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        old = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        return None if old <= 0 else old / int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    return None


def _groups(controller: str, root: Path) -> list[Path]:
    """Folders of the control groups that limit this process, and of those above; none elsewhere than on Linux."""
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, place = line.split(":", 2)
            if number != "0" and controller not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / ("" if number == "0" else controllers)
            group = base / place.lstrip("/")
            # a limit of a group above counts as well; in a container the groups above may be all that is seen
            for each in [group, *group.parents]:
                if each != base and base not in each.parents:
                    break
                found.append(each)
    return found


def _memory_left(group: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        most = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        # files that were read are forgotten first
        cached = int((group / "memory.stat").read_text(encoding="utf-8").split("inactive_file ")[1].split()[0])
        return None if most == "max" else int(most) - used + cached
    return None
