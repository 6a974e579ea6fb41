"""Where the seconds of a scan go, in this version and in others.

``python benchmarks/steps.py BIDS WORK NAME=CHECKOUT … [--repeats 5] [--figure F.png] [-- option of
tlseg …]``

Every checkout (of another commit: ``git worktree add``) labels the dataset by one command, from
its start to the last report, in turns. The steps are those that the label map's JSON tells; what
is left of the command's time is start, validation, writing and report. Printed are the medians
over the repeats of seconds per scan, and the least and the most of the whole; the figure shows the
medians, one bar a version.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = ("read", "find", "label", "back")
REST = "start, write, report"
WHOLE = "all"


def run(checkout: Path, bids: Path, out: Path, options: list[str]) -> dict[str, float]:
    """Seconds per scan of one command: each step, the rest and the whole."""
    if out.exists():
        sys.exit(f"{out} is there already: name another folder, nothing may be reused")
    command = [sys.executable, str(checkout / "bids_app_entry.py"), str(bids), str(out),
               "participant", *options]  # fmt: skip
    here = {**os.environ, "PYTHONPATH": str(checkout)}
    since = time.monotonic()
    found = subprocess.run(command, capture_output=True, text=True, env=here, check=False)
    seconds = time.monotonic() - since
    if found.returncode:
        sys.exit(f"{checkout} ended with {found.returncode}:\n{found.stderr}")
    return shares(out, seconds)


def shares(out: Path, seconds: float) -> dict[str, float]:
    """What the sidecars in a folder tell of a command that took so many seconds."""
    scans = [json.loads(path.read_text()) for path in out.glob("sub-*/**/*_dseg.json")]
    scans = [scan["Seconds"] for scan in scans if "Seconds" in scan]
    if not scans:
        sys.exit(f"no label map in {out} tells how long it took")
    told = {step: sum(scan.get(step, 0.0) for scan in scans) / len(scans) for step in STEPS}
    whole = seconds / len(scans)
    return {**told, REST: whole - sum(told.values()), WHOLE: whole}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians by version, in the order in which they were named, and the spread of the whole."""
    groups = rows.groupby("version", sort=False)
    table = groups[[*STEPS, REST, WHOLE]].median()
    return table.assign(least=groups[WHOLE].min(), most=groups[WHOLE].max(), n=groups.size())


def draw(table: pd.DataFrame, file: Path) -> None:
    """A bar for each version, its steps side by side."""
    figure, axes = plt.subplots(figsize=(7.5, 0.7 + 0.55 * len(table)), layout="tight")
    left = pd.Series(0.0, index=table.index)
    for step in (*STEPS, REST):
        axes.barh(table.index, table[step].clip(lower=0), left=left, label=step)
        left += table[step].clip(lower=0)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a scan (medians)")
    axes.legend(ncols=len(STEPS) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run in turns, print, draw."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bids", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("versions", nargs="+", metavar="NAME=CHECKOUT")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args(words[:cut])
    versions = [one.partition("=")[::2] for one in asked.versions]
    rows = []
    for turn in range(asked.repeats):
        for name, checkout in versions:
            out = asked.work / f"{name}-{turn}"
            found = run(Path(checkout).resolve(), asked.bids, out, words[cut + 1 :])
            rows.append({"version": name, **found})
        print(f"turn {turn + 1} of {asked.repeats}", flush=True)
    table = summary(pd.DataFrame(rows))
    print(table.round(2).to_string())
    if asked.figure:
        draw(table, asked.figure)


if __name__ == "__main__":
    main()
