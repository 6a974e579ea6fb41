"""What `systems.py` keeps of a run, and the table that it prints.

The papers' figures stand beside ours: mean Dice on their data with their training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon
from setups import OURS

COLUMNS = (
    "dataset", "fold", "system", "scan", "structures", "n", "dice", "weighted_dice", "hd95_mm",
    "seconds", "parameters", "steps", "minutes",
)  # fmt: skip
# The papers' own mean Dice, on their data with their training: (dataset, structures) to figure.
PAPERS = {
    "neonatal": {("infant", "all"): "0.917 (8 tissues, dHCP)"},
    "quicknat-views": {("infant", "all"): "0.90 (M-CRIB), 0.85 (iSeg)"},
    "monet": {("malc", "all"): "0.785", ("malc", "14"): "0.826 (15 structures)"},
    "unet-tuned": {("malc", "all"): "0.782"},
    "unet-scratch": {("malc", "all"): "0.623", ("malc", "14"): "0.649 (15 structures)"},
    "subcortical-25d": {("malc", "14"): "0.867 (from scratch), 0.860 (transfer, 7 scans)"},
    "slant8": {("malc", "all"): "0.768"},
    "slant27": {("malc", "all"): "0.776"},
}


def markdown(table: pd.DataFrame, order: list[str]) -> str:
    """The comparison: mean ± standard deviation over scans, and each system against ours.

    `order`: names of systems, as the rows shall come.
    """
    lines = []
    for (dataset, structures), part in table.groupby(["dataset", "structures"]):
        present = [n for n in order if n in set(part["system"])]
        first = OURS if OURS in present else present[0]
        least, most = (f"{m:.0f}" for m in (part["minutes"].min(), part["minutes"].max()))
        minutes = least if least == most else f"{least} to {most}"
        lines += [
            f"\n`{dataset}`, {'14 sub-cortical' if structures == '14' else 'all'} structures, "
            f"{minutes} minutes of training a fold\n",
            "| system | scans | Dice | weighted Dice | HD95, mm | s a scan | parameters | steps | "
            f"against {first} | the paper's |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        ours = part[part["system"] == first].set_index("scan")["dice"]
        others = [name for name in present if name != first]
        for name in present:
            rows = part[part["system"] == name]
            cells = [f"{rows[c].mean():.3f} ± {rows[c].std():.3f}" for c in
                     ("dice", "weighted_dice")]  # fmt: skip
            lines.append(" | ".join((
                f"| {name}", str(len(rows)), *cells, distance(rows["hd95_mm"]),
                f"{rows['seconds'].mean():.0f}", f"{rows['parameters'].iloc[0] / 1e6:.2f} M",
                f"{rows['steps'].mean():.0f}",
                against(rows.set_index("scan")["dice"], ours, len(others)),
                PAPERS.get(name, {}).get((dataset, structures), "–") + " |",
            )))  # fmt: skip
    return "\n".join(lines)


def distance(hd95_mm: pd.Series) -> str:
    """Mean in mm; a dash where no structure was found."""
    return "–" if hd95_mm.isna().all() else f"{hd95_mm.mean():.2f}"


def against(theirs: pd.Series, ours: pd.Series, comparisons: int) -> str:
    """Mean difference to ours and Wilcoxon's signed-rank p, times the number of comparisons."""
    both = pd.concat([theirs, ours], axis=1, keys=["a", "b"]).dropna()
    gap = both["a"] - both["b"]
    if len(gap) < 2 or not np.any(gap):
        return "–"
    p = min(1.0, wilcoxon(gap).pvalue * comparisons)
    return f"{gap.mean():+.3f}, p = {p:.3g}"


def known(results: Path, dataset: str, fold: int, system: str) -> bool:
    """Whether this was measured already."""
    if not results.is_file():
        return False
    table = pd.read_csv(results, sep="\t")
    found = (table["dataset"] == dataset) & (table["fold"] == fold) & (table["system"] == system)
    return bool(found.any())
