"""Does a measured change of volume follow the true one?

Usage: ``python benchmarks/changes.py BEFORE.tsv AFTER.tsv …``

The tables are those of ``tlseg-evaluate`` for the same persons, before and after a change that is
known because the reference labels went through it (``benchmarks/ageing.py scans``). For each AFTER
prints every structure, left and right added: the ratio of its reference volumes (after ÷ before)
and of the measured ones, geometric means over persons, and by how many per cent the measured ratio
is above the true one, mean ± standard deviation over persons. The last line is the mean absolute
error, and what it would be if nothing had been seen to change.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

VOLUMES = ["predicted_mm3", "reference_mm3"]


def volumes(table: Path) -> pd.DataFrame:
    """Volumes of each person's structures, both sides together; rows by subject and name."""
    rows = pd.read_csv(table, sep="\t")
    subject = rows["predicted"].str.extract(r"(sub-[a-zA-Z0-9]+)", expand=False).rename("subject")
    name = rows["name"].str.replace(r"^(Left|Right) ", "", regex=True).str.lower()
    return rows.groupby([subject, name])[VOLUMES].sum()


def changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Log ratios ``true`` and ``measured`` of what both tables have, and their ``error``.

    A structure that is not there before or after, or is not found, has no ratio and is left out.
    """
    ratio = np.log((after / before).where((after > 0) & (before > 0))).dropna()
    found = ratio.rename(columns=dict(zip(VOLUMES, ("measured", "true"), strict=True)))
    return found.assign(error=found["measured"] - found["true"])


def describe(found: pd.DataFrame) -> list[str]:
    """A line for each structure, and one for all."""
    lines = []
    for name, rows in found.groupby(level="name"):
        true, measured = np.exp(rows[["true", "measured"]].mean())
        error = 100 * np.expm1(rows["error"])
        lines.append(f"  {name}: {true:.3f}, measured {measured:.3f} "
                     f"({error.mean():+.1f} ± {error.std():.1f} %)")  # fmt: skip
    means = found.abs().groupby(level="name").mean().mean()
    lines.append(f"  mean absolute error of the log ratio {means['error']:.3f}, of no change "
                 f"{means['true']:.3f}")  # fmt: skip
    return lines


def main(words: list[str]) -> int:
    """Compare and print."""
    before = volumes(Path(words[0]))
    for table in map(Path, words[1:]):
        found = changes(before, volumes(table))
        persons = found.index.get_level_values("subject").nunique()
        print(f"{table}, {persons} persons:", *describe(found), sep="\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
