"""Memory: what a scan took, what is free, and what the process keeps to use again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")
GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group, and the entry of its ``memory.stat``
(https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
UNLIMITED_BYTES = 2**60
"""No limit is less: version 1 writes the largest number of pages."""
KEPT_BYTES = 2**30
_MALLOPT = {-1: KEPT_BYTES, -3: KEPT_BYTES, -8: 1}
"""glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX (malloc.h; man mallopt)."""


def reuse_freed_memory() -> bool:
    """Have the C library keep up to `KEPT_BYTES` of freed memory, for all threads together.

    A scan's arrays are tens of megabytes, which glibc would fetch from the system and give back
    one by one; every page of them would be cleared again by the kernel each time. Has an effect
    on memory and threads that come after it. Variables of the environment (``MALLOC_…``,
    ``GLIBC_TUNABLES``) that say otherwise are left their way.

    Returns
    -------
    bool
        Whether it was done; other C libraries (musl, macOS) do without.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(ctypes.c_int(key), ctypes.c_int(value)) for key, value in _MALLOPT.items())


def restart_peak() -> None:
    """Forget the process's peak memory so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_memory_gib() -> float:
    """Peak resident memory of the process in GiB, since `restart_peak` on Linux."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def available_memory_gib() -> float | None:
    """Memory that a new program can have, in GiB; None if not known.

    The least of what the machine has without swapping, of what the limits of the process's control
    groups (those of its container or job, and those around them) leave, and of what Slurm granted.
    """
    known = [free for free in (_free_here(), *_free_in_groups(), _granted()) if free is not None]
    return min(known) / 2**30 if known else None


def _free_here() -> int | None:
    """Bytes that the machine has for a new program without swapping."""
    for line in _lines(MEMORY):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 2**10
    return None


def _free_in_groups() -> Iterator[int | None]:
    """Bytes that each control group has left, from the process's own to the outermost seen."""
    for line in _lines(GROUP):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, files = GROUPS / "memory", _VERSION_1
        elif not controllers:
            root, files = GROUPS, _VERSION_2
        else:
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # it was moved out of the groups that are seen here
            parts = []
        for depth in range(len(parts) + 1):
            yield _left(root.joinpath(*parts[:depth]), *files)


def _left(group: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes between a group's limit and its use, without file cache that it gives back at once."""
    try:
        most = int((group / limit).read_text())  # "max" is no number
        taken = int((group / used).read_text())
        stat = dict(line.split() for line in _lines(group / "memory.stat"))
        free = max(0, most - taken + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return None
    return free if most < UNLIMITED_BYTES else None


def _granted() -> int | None:
    """Bytes that a job of Slurm asked for on this node; 0 there means all of the node's."""
    try:
        if "SLURM_MEM_PER_NODE" in os.environ:
            mib = int(os.environ["SLURM_MEM_PER_NODE"])
        else:
            mib = int(os.environ["SLURM_MEM_PER_CPU"]) * int(os.environ["SLURM_CPUS_ON_NODE"])
    except (KeyError, ValueError):
        return None
    return mib * 2**20 or None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
