"""Cross-validate a model: label every scan with the fold's model that never saw its subject.

Usage: ``python benchmarks/crossvalidate.py DATA WORK DATASET LABELS MAPPING
LOCATOR_0 SEGMENTER_0.pt [LOCATOR_1 SEGMENTER_1.pt …] [--description CARD.toml] [--known-as NAME]``

DATA is the folder of the datasets, DATASET the one that is scored, LABELS its derivative with the
reference, MAPPING the name of the mapping between the protocols, or ``none``. A locator is a
checkpoint, or the card of a model that has it. Each pair is exported as a model of its own, with
windows, mirror and domain as CARD.toml says (``tlseg_bids/train/models/any.toml``), and the program
labels the subjects that its segmenter and its locator were not trained on. Where the scans are
those of another dataset, changed (``benchmarks/ageing.py scans``), NAME is that one. Prints the
mean Dice per suffix (± standard deviation over scans and over folds) and writes WORK/dice.tsv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd

from tlseg_bids.cli.evaluate import entities
from tlseg_bids.cli.evaluate import main as evaluate
from tlseg_bids.train.export import data_seen, export
from tlseg_bids.train.recipe import load_checkpoint
from tlseg_bids.train.scans import subject_of
from tlseg_bids.zoo.card_file import read_card

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = ROOT / "tlseg_bids" / "train" / "models" / "any.toml"


def trained_on(file: Path, dataset: str) -> set[str]:
    """Subjects of `dataset` that a checkpoint, with all it started from, or a card has seen."""
    if file.suffix == ".toml":
        rows = read_card(file).training["data"]
        seen = {f"{row['dataset']}/{name}" for row in rows for name in row["subjects"]}
    else:
        seen = set(data_seen(load_checkpoint(file)))
    return {subject_of(key.split("/")[1]) for key in seen if key.startswith(f"{dataset}/")}


def held_out(folder: Path, known_as: str, pair: tuple[Path, Path]) -> list[str]:
    """Labels of a dataset's subjects that neither network was trained on in that of a name."""
    every = {path.name for path in folder.glob("sub-*") if path.is_dir()}
    every -= set().union(*(trained_on(file, known_as) for file in pair))
    return sorted(subject.removeprefix("sub-") for subject in every)


def of_subjects(scores: pd.DataFrame, subjects: list[str]) -> pd.DataFrame:
    """Rows of scans of these subjects; WORK may hold what an earlier call labelled."""
    own = [entities(Path(name))["sub"] in subjects for name in scores["predicted"]]
    return scores[own]


def label(
    asked: argparse.Namespace, fold: int, pair: tuple[Path, Path], subjects: list[str]
) -> Path:
    """Label subjects with the model of one fold; returns the derivatives."""
    data, work, dataset = asked.data, asked.work, asked.dataset
    description = tomllib.loads(asked.description.read_text(encoding="utf-8"))
    description |= {"name": f"fold-{fold}", "evidence": []}
    zoo, out = work / f"zoo-{fold}", work / f"out-{fold}"
    export(description, dict(zip(("locator", "segmenter"), pair, strict=True)), data, zoo)
    command = [
        sys.executable, str(ROOT / "bids_app_entry.py"), str(data / dataset), str(out),
        "participant", "--models", str(zoo), "--model", f"fold-{fold}",
        "--skip-bids-validation", "--participant-label", *subjects,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return out


def main(words: list[str]) -> int:
    """Label, score and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "work"):
        parser.add_argument(name, type=Path)
    for name in ("dataset", "labels", "mapping"):
        parser.add_argument(name)
    parser.add_argument("files", type=Path, nargs="+", metavar="LOCATOR SEGMENTER")
    parser.add_argument("--description", type=Path, default=DESCRIPTION)
    parser.add_argument("--known-as", metavar="NAME")
    asked = parser.parse_args(words)
    if len(asked.files) % 2:
        parser.error("every fold is a locator and a segmenter")
    tables = []
    for fold, pair in enumerate(zip(asked.files[::2], asked.files[1::2], strict=True)):
        known_as = asked.known_as or asked.dataset
        subjects = held_out(asked.data / asked.dataset, known_as, pair)
        out = label(asked, fold, pair, subjects)
        scores = asked.work / f"dice-{fold}.tsv"
        reference = str(asked.data / asked.dataset / asked.labels)
        words = [str(out), reference, "--no-distances", "-o", str(scores)]
        words += [] if asked.mapping == "none" else ["--mapping", asked.mapping]
        if evaluate(words):
            return 1
        found = of_subjects(pd.read_csv(scores, sep="\t"), subjects)
        tables.append(found.assign(fold=fold))
    table = pd.concat(tables)
    table["suffix"] = table["predicted"].str.extract(r"space-(\w+?)_")[0]
    table.to_csv(asked.work / "dice.tsv", sep="\t", index=False)
    for name, rows in (("14 sub-cortical", table[table["subcortical14"] == 1]), ("all", table)):
        for suffix, part in rows.groupby("suffix"):
            scans = part.groupby(["fold", "predicted"])["dice"].mean()
            folds = scans.groupby("fold").mean()
            print(f"{asked.dataset} {suffix}, {name}: {scans.mean():.3f} ± {scans.std():.3f} over "
                  f"{len(scans)} scans, ± {folds.std():.3f} over {len(folds)} folds")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
