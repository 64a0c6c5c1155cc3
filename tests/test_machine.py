"""What a process may use of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smkd import machine
from smkd.machine import SPINS, cores, thread_settings


def group(root: Path, place: str, files_of: dict[str, str], line: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line)
    folder = root / "sys/fs/cgroup" / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files_of.items():
        (folder / name).write_text(text)


def test_cores_are_those_of_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_quota", lambda: None)
    assert cores() == 8
    monkeypatch.setattr(machine, "_quota", lambda: 2.5)
    assert cores() == 2
    monkeypatch.setattr(machine, "_quota", lambda: 0.5)
    assert cores() == 1
    monkeypatch.undo()
    assert machine._quota(tmp_path) is None
    group(tmp_path, "user/job", {"cpu.max": "max 100000"}, "0::/user/job\n")
    assert machine._quota(tmp_path) is None
    group(tmp_path, "user", {"cpu.max": "300000 100000"}, "0::/user/job\n")
    assert machine._quota(tmp_path) == 3
    old = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}
    group(tmp_path, "cpu,cpuacct", old, "4:cpu,cpuacct:/docker/1\n1:name=systemd:/\n")  # seen from inside
    assert machine._quota(tmp_path) == 1.5


def test_free_memory_is_that_of_the_machine_and_the_control_groups(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) is None
    group(tmp_path, "job", {}, "0::/job\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert machine.free_memory(tmp_path) == 50 * 1024
    used = {"memory.current": "9000", "memory.stat": "anon 5\ninactive_file 2000\nactive_file 7\n"}
    group(tmp_path, "job", {"memory.max": "max", **used}, "0::/job\n")
    assert machine.free_memory(tmp_path) == 50 * 1024
    group(tmp_path, "job", {"memory.max": "10000", **used}, "0::/job\n")
    assert machine.free_memory(tmp_path) == 3000


def test_threads_are_as_many_as_a_quota_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_quota", lambda: 2.0)
    assert thread_settings({}) == {"GOMP_SPINCOUNT": SPINS, "OMP_NUM_THREADS": "2"}
    assert thread_settings({"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "7"}) == {}
    assert thread_settings({"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr(machine, "_quota", lambda: None)
    assert thread_settings({}) == {"GOMP_SPINCOUNT": SPINS}  # PyTorch heeds the affinity itself
