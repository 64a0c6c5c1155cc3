"""What a process may use of the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from smkd import machine
from smkd.machine import SPINS, SPINS_BUSY, cores, settle_threads, thread_settings
from smkd.processes import busy_processes


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
    monkeypatch.setattr(machine, "_busy", lambda: False)
    assert thread_settings({}) == {"GOMP_SPINCOUNT": SPINS, "OMP_NUM_THREADS": "2"}
    assert thread_settings({"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "7"}) == {}
    assert thread_settings({"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr(machine, "_quota", lambda: None)
    assert thread_settings({}) == {"GOMP_SPINCOUNT": SPINS}  # PyTorch heeds the affinity itself


def test_threads_wait_less_where_others_use_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PAUSE", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert not machine._busy(tmp_path)  # no Linux
    (tmp_path / "proc").mkdir()
    for mine, running, expected in ((8, 1, False), (8, 2, True), (2, 7, False), (2, 8, True)):
        monkeypatch.setattr(machine, "cores", lambda mine=mine: mine)
        (tmp_path / "proc/stat").write_text(f"cpu 1 2\nprocs_running {running}\nprocs_blocked 0\n")
        assert machine._busy(tmp_path) is expected


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="what runs on the machine is not known")
def test_threads_are_settled_again_by_what_is_busy_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(machine, "_set", {"GOMP_SPINCOUNT"})
    monkeypatch.setenv("GOMP_SPINCOUNT", SPINS)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with busy_processes(os.cpu_count() or 1):
        settle_threads()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS_BUSY
    monkeypatch.setattr(machine, "_set", set[str]())
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's
    settle_threads()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
