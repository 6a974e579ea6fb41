"""How the level ``group`` scales: simulated derivatives, then its time, memory and page.

    python benchmarks/group_scale.py [SCANS] [--keep FOLDER]

A study of three sites is simulated in a temporary folder (10,000 scans where nothing else is said)
and run with ComBat and the residual correction in a process of its own. Wall time is what a user
waits; processor time tells what it would be on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.studies import Effects, simulate, write_derivatives, write_raw  # noqa: E402

OPTIONS = (
    "--combat", "site", "--combat-covariates", "age_years", "sex", "--icv-correction", "residual",
)  # fmt: skip
MIB = 2**20


def main() -> int:
    """Simulate, run, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", nargs="?", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="simulate here and leave it there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return measure(given.keep or Path(temporary), given.scans)


def measure(folder: Path, scans: int) -> int:
    """Run the group level on `scans` simulated scans below `folder`; returns its exit code."""
    effects = Effects({"A": 0.0, "B": 0.1, "C": -0.08}, {"A": 1.0, "B": 1.4, "C": 0.8})
    people, rows = simulate(scans, effects)
    raw = write_raw(folder / "raw", {"participants.tsv": "\n".join(rows) + "\n"})
    out = write_derivatives(folder / "out", people)
    command = [sys.executable, str(ROOT / "bids_app_entry.py"), str(raw), str(out), "group"]
    start = time.monotonic()
    done = subprocess.run([*command, *OPTIONS], check=False)
    wall = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"scans {scans}, exit code {done.returncode}, {len(os.sched_getaffinity(0))} processors")
    print(f"wall {wall:.0f} s, processor {used.ru_utime + used.ru_stime:.0f} s")
    print(f"peak memory {used.ru_maxrss / 1024:.0f} MiB")
    for name in ("group.html", "group_volumes.tsv", "group_volumes_long.tsv"):
        print(f"{name} {(out / name).stat().st_size / MIB:.1f} MiB")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
