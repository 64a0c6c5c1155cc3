"""What this process may use of the machine: cores, memory, and the threads of PyTorch on a CPU."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

SPINS, SPINS_BUSY = "5000", "200"
"""Looks that a waiting thread of OpenMP takes before it sleeps, on a quiet machine and on a busy one. With GNU's
default of some 300,000 a small network trains at a third of its speed beside a busy process (docs/performance.md)."""
LOOKS, PAUSE = 5, 0.002
"""At what else runs on the machine, and seconds between two of them."""
_set: set[str] = set()
"""Variables of the environment that were set here, not by the user."""


def cores() -> int:
    """Number of cores that this process may use, by its affinity and the quota of its control group."""
    quota = _quota()
    return _bound() if quota is None else max(1, min(_bound(), int(quota)))


def settle_threads() -> None:
    """Set the variables of `thread_settings`, unless PyTorch is loaded; again, if what else runs has changed."""
    if "torch" not in sys.modules:
        given = {name: value for name, value in os.environ.items() if name not in _set}
        found = thread_settings(given)
        _set.update(found)
        os.environ.update(found)


def thread_settings(given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for PyTorch's threads, which it reads when it is loaded.

    PyTorch starts a thread for each core that it sees, also where a control group's quota allows fewer (`docker run
    --cpus`): they would then stand still together for most of the time.

    Args:
        given: the environment; what it says of threads stays.
    """
    found = {}
    if not given.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        found["GOMP_SPINCOUNT"] = SPINS_BUSY if _busy() else SPINS
    if "OMP_NUM_THREADS" not in given and cores() < _bound():
        found["OMP_NUM_THREADS"] = str(cores())
    return found


def _busy(root: Path = Path("/")) -> bool:
    """Whether others use the machine, so that not each of this process's threads has a core (Linux tells)."""
    others = []
    for look in range(LOOKS):
        time.sleep(PAUSE * (look > 0))
        try:
            table = (root / "proc/stat").read_text(encoding="utf-8")
            others.append(int(table.split("procs_running")[1].split()[0]) - 1)
        except (OSError, ValueError, IndexError):
            return False
    return min(others) + cores() > (os.cpu_count() or 1)


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
