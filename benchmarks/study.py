"""Time per scan and memory as a study grows.

``python benchmarks/study.py WORK SCAN … [--counts 10 100] [--figure F.png] [-- option of tlseg …]``

For every count a dataset of so many subjects is made in WORK, links to the scans in turn, and
labelled by one command into a new folder, reports included. Twice a second the resident memory of
the program and all its children is added up (shared pages count once for each) and the finished
scans are counted. Printed per count: seconds until the command had ended per scan, seconds until
the first scan was done, median seconds between scans in the first and the last third, and the
largest memory in them. The figure shows both against time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 0.5


@dataclass
class Run:
    """What was seen of a run: seconds since its start, GiB, finished scans."""

    scans: int
    ended_s: float = 0.0
    code: int = 0
    seconds: list[float] = field(default_factory=list)
    gib: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def look(self, process: int, since: float, status: Path | None) -> None:
        """Take one sample."""
        lines = status.read_bytes().count(b"\n") - 1 if status else 0
        self.seconds.append(time.monotonic() - since)
        self.gib.append(tree_gib(process))
        self.done.append(max(0, lines))

    def third(self, last: bool) -> tuple[float, float]:
        """Seconds per scan and largest memory in the first or the last third of the scans."""
        done, seconds = np.array(self.done), np.array(self.seconds)
        at = [seconds[np.argmax(done >= number)] for number in range(1, self.scans + 1)]
        part = self.scans // 3
        low, high = (self.scans - 1 - part, self.scans - 1) if last else (0, part)
        inside = (seconds >= at[low]) & (seconds <= at[high])
        return (at[high] - at[low]) / (high - low), float(np.array(self.gib)[inside].max())


def tree_gib(process: int) -> float:
    """Resident memory of a process and all below it."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1])
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return total * os.sysconf("SC_PAGE_SIZE") / 2**30


def dataset(folder: Path, scans: list[Path], count: int) -> None:
    """Subjects that link to the scans in turn."""
    folder.mkdir(parents=True)
    about = {"Name": "a study", "BIDSVersion": "1.10.0"}
    (folder / "dataset_description.json").write_text(json.dumps(about), encoding="utf-8")
    for number in range(count):
        scan = scans[number % len(scans)]
        name = f"sub-{number:04d}"
        link = folder / name / "anat" / f"{name}_{scan.name.rpartition('_')[2]}"
        link.parent.mkdir(parents=True)
        link.symlink_to(scan.absolute())


def run(work: Path, scans: list[Path], count: int, options: list[str]) -> Run:
    """Label a study of so many subjects."""
    bids, out = work / f"bids-{count}", work / f"out-{count}"
    if out.exists():
        sys.exit(f"{out} is there already: name another folder, nothing may be reused")
    dataset(bids, scans, count)
    command = [sys.executable, str(ROOT / "bids_app_entry.py"), str(bids), str(out), "participant",
               "--skip-bids-validation", *options]  # fmt: skip
    found, since = Run(count), time.monotonic()
    with (work / f"log-{count}").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            found.look(process.pid, since, next((out / "logs").glob("status_*.tsv"), None))
            time.sleep(EVERY_S)
    found.ended_s, found.code = time.monotonic() - since, process.returncode
    found.look(0, since, next((out / "logs").glob("status_*.tsv"), None))
    return found


def draw(runs: list[Run], file: Path) -> None:
    """Finished scans and memory against time."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="tight")
    for one in runs:
        above.plot(one.seconds, one.done, label=f"{one.scans} scans")
        below.plot(one.seconds[:-1], one.gib[:-1])
    above.set_ylabel("scans done")
    above.legend()
    below.set_ylabel("memory, GiB")
    below.set_xlabel("seconds since the command was given")
    below.set_ylim(0)
    figure.savefig(file, dpi=90)


def main() -> int:
    """Run, print, draw."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("scans", type=Path, nargs="+")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args(words[:cut])
    asked.work.mkdir(parents=True, exist_ok=True)
    runs, rows = [], []
    for count in asked.counts:
        one = run(asked.work, asked.scans, count, words[cut + 1 :])
        runs.append(one)
        (first_s, first_gib), (last_s, last_gib) = one.third(False), one.third(True)
        rows.append({
            "scans": count, "exit code": one.code, "s a scan, all in": one.ended_s / count,
            "first scan after s": one.seconds[int(np.argmax(np.array(one.done) > 0))],
            "s a scan, first third": first_s, "last third": last_s,
            "GiB, first third": first_gib, "GiB, last third": last_gib,
        })  # fmt: skip
        print(pd.DataFrame(rows).round(2).to_string(index=False), flush=True)
    if asked.figure:
        draw(runs, asked.figure)
    return max(one.code for one in runs)


if __name__ == "__main__":
    sys.exit(main())
