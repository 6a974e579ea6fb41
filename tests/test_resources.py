"""Memory that the process keeps, and memory that is free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tlseg_bids import resources

FAULTS = """
import resource, sys, threading
import numpy as np
from tlseg_bids.resources import reuse_freed_memory
if sys.argv[1] == "kept":
    assert reuse_freed_memory()
def work():
    for _ in range(20):
        bytearray(40_000_000)
thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_freed_memory_is_used_again_by_every_thread():
    faults = {}
    for name in ("kept", "given back"):
        command = [sys.executable, "-c", FAULTS, name]
        done = subprocess.run(command, env=CLEAN, capture_output=True, text=True, check=True)
        faults[name] = int(done.stdout)
    assert faults["kept"] < faults["given back"] / 5, faults


def test_the_environment_has_the_last_word_on_memory(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not resources.reuse_freed_memory()


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A machine with 64 GiB free, no control groups and no queue; `write` gives it files."""
    monkeypatch.setattr(resources, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "GROUPS", tmp_path / "groups")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("meminfo", f"MemTotal: 999999999 kB\nMemAvailable: {64 * 2**20} kB\n")
    return write


def group(write, folder: str, limit_gib: float | str, used_gib: float, cache_gib: float = 0):
    """A control group of version 2."""
    limit = limit_gib if isinstance(limit_gib, str) else int(limit_gib * 2**30)
    write(f"groups/{folder}/memory.max", f"{limit}\n")
    write(f"groups/{folder}/memory.current", f"{int(used_gib * 2**30)}\n")
    write(f"groups/{folder}/memory.stat", f"anon 1\ninactive_file {int(cache_gib * 2**30)}\n")


def test_a_system_without_the_file_has_unknown_memory(system, monkeypatch, tmp_path):
    assert resources.available_memory_gib() == 64
    monkeypatch.setattr(resources, "MEMORY", tmp_path / "none")
    assert resources.available_memory_gib() is None
    system("none", "MemAvailable: 2097152 kB\n")
    assert resources.available_memory_gib() == 2.0


def test_the_limit_of_a_job_leaves_less_than_the_machine_has(system):
    system("cgroup", "0::/system.slice/job_7/step_0\n")
    group(system, "system.slice/job_7/step_0", "max", 1)
    assert resources.available_memory_gib() == 64
    group(system, "system.slice/job_7", 8, 3, cache_gib=2)
    assert resources.available_memory_gib() == 7, "cached files are given back"
    group(system, "system.slice", 6, 5)
    assert resources.available_memory_gib() == 1, "the group around it has less left"
    group(system, "system.slice/job_7/step_0", 2, 3)
    assert resources.available_memory_gib() == 0


@pytest.mark.parametrize("line", ["0::/", "0::/docker/4f2a", "0::/../step_0"])
def test_a_container_that_sees_its_own_group_as_the_outermost_has_its_limit(system, line):
    system("cgroup", f"{line}\n")
    group(system, "step_0", 1, 0)
    group(system, ".", 4, 1)
    assert resources.available_memory_gib() == 3


def test_the_limit_of_a_group_of_version_1(system):
    system("cgroup", "9:name=systemd:/\n4:cpu,memory:/job:7/a\n0::/\n")
    for folder, limit in (("job:7/a", 2**63 - 4096), ("job:7", 8 * 2**30), ("", 2**63 - 4096)):
        system(f"groups/memory/{folder}/memory.limit_in_bytes", f"{limit}\n")
        system(f"groups/memory/{folder}/memory.usage_in_bytes", f"{6 * 2**30}\n")
        system(f"groups/memory/{folder}/memory.stat", f"cache 1\ntotal_inactive_file {2**30}\n")
    assert resources.available_memory_gib() == 3


@pytest.mark.parametrize(
    ("granted", "gib"),
    [
        ({"MEM_PER_NODE": "6144"}, 6),
        ({"MEM_PER_CPU": "2048", "CPUS_ON_NODE": "4"}, 8),
        ({"MEM_PER_CPU": "2048"}, 64),
        ({"MEM_PER_NODE": "0"}, 64),
        ({"MEM_PER_NODE": "all"}, 64),
    ],
)
def test_what_slurm_granted_is_all_there_is(system, monkeypatch, granted, gib):  # noqa: ARG001
    for name, value in granted.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert resources.available_memory_gib() == gib
