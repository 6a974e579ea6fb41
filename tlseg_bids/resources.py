"""Memory: what a scan took, what is free, and what the process keeps to use again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")
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
    """Memory that a new program can have without swapping, in GiB; None if not known."""
    try:
        for line in MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except (OSError, ValueError):
        pass
    return None
