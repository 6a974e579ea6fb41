"""What each paper found about its strategy, tried with its own system.

Usage: ``python benchmarks/findings.py DATA WORK [--only NAME …] [--minutes M]
[--source-minutes M] [--spacing MM] [--threads N]`` runs what is missing;
``python benchmarks/findings.py DATA WORK --table`` prints what is there.

``slant``: does mixed training forget less than new scans only? ``patches``: is one scan of transfer
better than none? ``budget``: are slices of all scans better than whole scans? ``depth``: which
scope of transfer is best? ``stages``: are two stages worse than all at once? (Whether partial
annotations help MO-Net stands in the table of `systems.py`: ``monet``, ``unet-tuned`` and
``unet-scratch`` on `malc`.)

Adults (`malc`) are the source, infants (`infant`) the target; fold 0 of 4 of both is held out. The
systems are narrowed as in `setups.py`. The runs of a finding take as many steps as the first of
them takes in ``--minutes`` of the processor, their source trains for ``--source-minutes``. A row
per run, scan and set of structures is appended to WORK/findings.tsv; what was cut off goes on where
it was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from setups import FASTER, NEONATAL, PATCHES_MM, QUICKNAT, SLANT8, TRAIN, Setup
from systems import coarser, exported, label, minutes_of, scored, subjects, trained

from tlseg_bids.train.places import Places
from tlseg_bids.train.recipe import Recipe, load_checkpoint, load_recipe

FOLD = [0, 4]


@dataclass(frozen=True)
class Finding:
    """Runs that are compared, and what they have in common.

    `card` describes the system; `source` is the recipe that the runs start from (none if empty)
    and `adults` whether it learns the adults' labels folded to aseg; `runs` maps a name to a
    recipe, or to nothing for the source as it is; `from_scratch` names those without the start;
    `asked` are the datasets and images that are labelled.
    """

    card: str
    runs: dict[str, str]
    asked: tuple[tuple[str, str], ...]
    source: str = ""
    adults: bool = False
    from_scratch: tuple[str, ...] = ()
    features: tuple[int, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    source_changes: dict[str, Any] = field(default_factory=dict)
    coarsest_mm: float = 4.0


VOXELS = {"places": Places("voxels", voxels=128)}
FINDINGS = {
    "slant": Finding(
        "slant8", {"source": "", "new": "slant8-new", "mixed": "slant8-mixed"},
        (("infant", "T1w"), ("malc", "T1w")), "slant8", True, features=tuple(SLANT8),
        changes=FASTER, source_changes=FASTER,
    ),
    "patches": Finding(
        "subcortical-25d",
        {"none": "", **{str(n): f"subcortical-25d-transfer-{n}" for n in (1, 3, 7)}},
        (("infant", "T1w"),), "subcortical-25d", changes=VOXELS,
        source_changes={**FASTER, **VOXELS}, coarsest_mm=PATCHES_MM,
    ),
    "budget": Finding(
        "neonatal",
        {name: f"neonatal-budget-{name}" for name in
         ("whole", "random", "coronal", "axial", "sagittal")},
        (("infant", "T2w"),), features=tuple(NEONATAL),
    ),
    "depth": Finding(
        "neonatal",
        {"none": "", **{name: f"neonatal-transfer-{name}" for name in
                        ("shallow", "medium", "deep", "all", "scratch")}},
        (("infant", "T1w"),), "neonatal-source", from_scratch=("scratch",),
        features=tuple(NEONATAL),
    ),
    "stages": Finding(
        "quicknat",
        {"none": "", "two-stage": "quicknat-two-stage", "all-at-once": "quicknat-all-at-once",
         "scratch": "quicknat"},
        (("infant", "T2w"),), "quicknat-source", from_scratch=("scratch",),
        features=tuple(QUICKNAT), changes=FASTER, source_changes=FASTER,
    ),
}  # fmt: skip
COLUMNS = ("finding", "run", "dataset", "suffix", "scan", "structures", "n", "dice",
           "hd95_mm", "steps", "minutes")  # fmt: skip


def prepared(finding: Finding, name: str, spacing_mm: float) -> Recipe:
    """A recipe of a finding, narrowed, without the fold, on larger voxels."""
    recipe = load_recipe(TRAIN / "recipes" / "systems" / f"{name}.toml")
    source = name == finding.source
    network = dict(recipe.network)
    if finding.features:
        inner = dict(network["of"]) if "of" in network else network
        inner["features"] = list(finding.features)
        network = {**network, "of": inner} if "of" in network else inner
    changes = {"network": network, "checkpoint_minutes": 2.0,
               "fold": FOLD if recipe.fold_datasets else [],
               **(finding.source_changes if source else finding.changes)}  # fmt: skip
    if source and finding.adults:
        datasets = {name: {**rules, "head": "aseg"} for name, rules in recipe.datasets.items()}
        changes |= {"protocol": "aseg", "datasets": datasets}
    setup = Setup(f"systems/{name}", "", coarsest_mm=finding.coarsest_mm)
    return coarser(replace(recipe, **changes), setup, spacing_mm)


def run(options: argparse.Namespace, name: str) -> pd.DataFrame:
    """Train, label and score the runs of a finding."""
    finding, out = FINDINGS[name], options.work / "runs"
    out.mkdir(parents=True, exist_ok=True)
    first, source = None, ""
    if finding.source:
        first = replace(prepared(finding, finding.source, options.spacing), name=f"{name}-source")
        source = str(trained(first, options.data, out, options.source_minutes))
    tables, steps = [], None
    for title, of in finding.runs.items():
        recipe, checkpoint = first, Path(source)
        if of:
            start = "" if title in finding.from_scratch else source
            recipe = prepared(finding, of, options.spacing)
            recipe = replace(recipe, name=f"{name}-{title}", start=start)
            checkpoint = trained(recipe, options.data, out, options.minutes, steps)
            steps = load_checkpoint(checkpoint)["step"]
        saved = load_checkpoint(checkpoint)
        for table in measured(options, finding, recipe, checkpoint, f"{name}-{title}"):
            took = {"steps": saved["step"], "minutes": minutes_of([checkpoint])}
            tables.append(table.assign(finding=name, run=title, **took)[list(COLUMNS)])
        print(f"{name} {title}: done", flush=True)
    return pd.concat(tables)


def measured(
    options: argparse.Namespace, finding: Finding, recipe: Recipe, checkpoint: Path, name: str
) -> list[pd.DataFrame]:  # fmt: skip
    """Scores of a checkpoint on the held-out scans of every dataset that is asked for."""
    zoo, tables = options.work / "zoo" / name, []
    told = {"summary": name, "domain": {"suffixes": recipe.channels or ["T1w", "T2w"]}}
    exported(f"systems/{finding.card}", told, recipe, {"segmenter": checkpoint}, options.data, zoo)
    for dataset, suffix in finding.asked:
        folder, labelled = options.data / dataset, options.work / "out" / name / dataset
        label(folder, zoo, labelled, subjects(folder, *FOLD), suffix)
        table = scored(folder, labelled, recipe.protocol, suffix)
        tables.append(table.assign(dataset=dataset, suffix=suffix))
    return tables


def markdown(table: pd.DataFrame) -> str:
    """A table per finding: mean Dice ± standard deviation over scans."""
    lines = []
    for (name, dataset, suffix), part in table.groupby(["finding", "dataset", "suffix"]):
        kinds = [kind for kind in ("14", "all") if kind in set(part["structures"])]
        heads = ["14 sub-cortical" if kind == "14" else "all structures" for kind in kinds]
        lines += [f"\n`{name}`: `{dataset}`, {suffix}\n", f"| run | {' | '.join(heads)} | steps |",
                  "|---|" + "---|" * (len(kinds) + 1)]  # fmt: skip
        for run_name in FINDINGS[name].runs:
            rows = part[part["run"] == run_name]
            cells = []
            for kind in kinds:
                dice = rows[rows["structures"] == kind]["dice"]
                cells.append(f"{dice.mean():.3f} ± {dice.std():.3f}")
            lines.append(f"| {run_name} | {' | '.join(cells)} | {rows['steps'].iloc[0]} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=FINDINGS, default=list(FINDINGS))
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--source-minutes", type=float, default=6.0)
    parser.add_argument("--spacing", type=float, default=4.0, choices=(1.0, 2.0, 4.0), metavar="MM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what was measured")
    options = parser.parse_args(words)
    results = options.work / "findings.tsv"
    if options.table:
        print(markdown(pd.read_csv(results, sep="\t", dtype={"structures": str})))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for name in options.only:
        if results.is_file() and name in set(pd.read_csv(results, sep="\t")["finding"]):
            continue
        table = run(options, name)
        table.to_csv(results, sep="\t", index=False, mode="a", header=not results.is_file(),
                     float_format="%.5g")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
