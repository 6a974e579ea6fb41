"""Memory that a scan took."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


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
