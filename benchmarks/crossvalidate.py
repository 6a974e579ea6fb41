"""Cross-validate a model: label every scan with the fold's model that never saw its subject.

Usage: ``python benchmarks/crossvalidate.py DATA WORK DATASET LABELS MAPPING
LOCATOR_0.pt SEGMENTER_0.pt [LOCATOR_1.pt SEGMENTER_1.pt …]``

DATA is the folder of the datasets, DATASET the one that is scored, LABELS its derivative with the
reference, MAPPING the name of the mapping between the protocols, or ``none``. Each pair of
checkpoints is exported as a model of its own and the program labels the subjects that its
segmenter and its locator were not trained on. Prints the mean Dice per suffix (± standard
deviation over scans and over folds) and writes WORK/dice.tsv.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd

from tlseg_bids.cli.evaluate import main as evaluate
from tlseg_bids.train.export import export
from tlseg_bids.train.recipe import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = ROOT / "tlseg_bids" / "train" / "models" / "any.toml"


def held_out(data: Path, dataset: str, checkpoints: tuple[Path, Path]) -> list[str]:
    """Labels of the subjects of `dataset` that neither checkpoint was trained on."""
    every = {path.name for path in (data / dataset).glob("sub-*") if path.is_dir()}
    for checkpoint in checkpoints:
        seen = load_checkpoint(checkpoint)["data"]
        every -= {key.split("/")[1] for key in seen if key.startswith(f"{dataset}/")}
    return sorted(subject.removeprefix("sub-") for subject in every)


def label(data: Path, work: Path, dataset: str, fold: int, pair: tuple[Path, Path]) -> Path:
    """Label the held-out subjects with the model of one fold; returns the derivatives."""
    description = tomllib.loads(DESCRIPTION.read_text(encoding="utf-8"))
    description["name"] = f"fold-{fold}"
    zoo, out = work / f"zoo-{fold}", work / f"out-{fold}"
    export(description, dict(zip(("locator", "segmenter"), pair, strict=True)), data, zoo)
    command = [
        sys.executable, str(ROOT / "bids_app_entry.py"), str(data / dataset), str(out),
        "participant", "--models", str(zoo), "--model", f"fold-{fold}",
        "--skip-bids-validation", "--participant-label", *held_out(data, dataset, pair),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return out


def main(words: list[str]) -> int:
    """Label, score and print."""
    data, work, dataset, labels, mapping = Path(words[0]), Path(words[1]), *words[2:5]
    files = [Path(word) for word in words[5:]]
    pairs = list(zip(files[::2], files[1::2], strict=True))
    tables = []
    for fold, pair in enumerate(pairs):
        out = label(data, work, dataset, fold, pair)
        scores = work / f"dice-{fold}.tsv"
        reference = str(data / dataset / labels)
        asked = [str(out), reference, "--no-distances", "-o", str(scores)]
        asked += [] if mapping == "none" else ["--mapping", mapping]
        if evaluate(asked):
            return 1
        tables.append(pd.read_csv(scores, sep="\t").assign(fold=fold))
    table = pd.concat(tables)
    table["suffix"] = table["predicted"].str.extract(r"space-(\w+?)_")[0]
    table.to_csv(work / "dice.tsv", sep="\t", index=False)
    for name, rows in (("14 sub-cortical", table[table["subcortical14"] == 1]), ("all", table)):
        for suffix, part in rows.groupby("suffix"):
            scans = part.groupby(["fold", "predicted"])["dice"].mean()
            folds = scans.groupby("fold").mean()
            print(f"{dataset} {suffix}, {name}: {scans.mean():.3f} ± {scans.std():.3f} over "
                  f"{len(scans)} scans, ± {folds.std():.3f} over {len(folds)} folds")  # fmt: skip
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 8:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
