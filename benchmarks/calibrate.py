"""Fit a model's ``[calibration]`` on scans that its folds never saw, and say how well it holds.

Usage: ``python benchmarks/calibrate.py DATA WORK DATASET:LABELS:MAPPING [DATASET:LABELS:MAPPING …]
--fold LOCATOR_0.pt SEGMENTER_0.pt --fold LOCATOR_1.pt SEGMENTER_1.pt [--fold …]
[--description MODEL.toml] [--subjects N] [--sampled N] [--card CARD.toml]``
or, where one model has seen none of the scans and OUT is what it made of them,
``python benchmarks/calibrate.py DATA WORK DATASET:LABELS:MAPPING --labelled OUT``

DATA is the folder of the datasets; LABELS a derivative of DATASET with the reference; MAPPING the
mapping between the protocols, or ``none``. A subject is labelled by one fold that has not seen it.

1. Temperature: at random voxels of `--sampled` subjects per fold and dataset, where something else
   than background is possible, the one that makes the reference most likely.
2. Everything is labelled by the program itself, with the temperature of the other folds.
3. Predicted Dice and the intervals of volumes, fitted on the other folds, meet the fold's scans.

With ``--labelled`` the folds are the subjects: each is met by what the others taught. There is no
temperature then, because probabilities are not on disk. With ``--temperature-only`` steps 2 and 3
are left out, which takes one look at each sampled scan; one fold suffices for it, whose subjects
then stand for folds.

Prints what was found on scans that no number was fitted on, and writes WORK/structures.tsv and
WORK/calibration.toml, fitted on all folds; `--card` puts it into a card. A second call goes on with
what is in WORK.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w
from crossvalidate import DESCRIPTION, ROOT, held_out
from held_out_voxels import Reference, sample

from tlseg_bids.cli.evaluate import entities, label_files
from tlseg_bids.cli.evaluate import main as evaluate
from tlseg_bids.errors import NoInputError, UsageError
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol
from tlseg_bids.metrics import calibration_error
from tlseg_bids.postprocess.calibration import (
    fit_dice,
    fit_intervals,
    fit_temperature,
    folded,
    likelihood,
)
from tlseg_bids.segment.model import load_model
from tlseg_bids.train.export import export
from tlseg_bids.zoo.calibration import Calibration, structures
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.weights import load_weights

LEVEL = 0.9
SMALLEST = 2.0**-24  # of float16


@dataclass(frozen=True)
class Fold:
    """A fold's model and the subjects that it labels, by dataset."""

    card: ModelCard
    zoo: Path
    subjects: dict[str, list[str]]


def deal(unseen: list[list[str]]) -> list[list[str]]:
    """Each subject to one of the folds that have not seen it, evenly."""
    dealt: list[list[str]] = [[] for _ in unseen]
    for number, subject in enumerate(sorted(set().union(*unseen))):
        able = [fold for fold, those in enumerate(unseen) if subject in those]
        dealt[able[number % len(able)]].append(subject)
    return dealt


def folds(given: argparse.Namespace, references: list[Reference]) -> list[Fold]:
    """Export the checkpoints of every fold and deal the subjects."""
    description = tomllib.loads(given.description.read_text(encoding="utf-8"))
    description.pop("calibration", None)  # what is fitted here is not fitted on top of it
    pairs = [(Path(one), Path(other)) for one, other in given.fold]
    dealt = {
        r.dataset: deal([held_out(given.data / r.dataset, r.dataset, pair) for pair in pairs])
        for r in references
    }
    out = []
    for number, (locator, segmenter) in enumerate(pairs):
        zoo, name = given.work / f"zoo-{number}", f"fold-{number}"
        checkpoints = {"locator": locator, "segmenter": segmenter}
        card = export({**description, "name": name}, checkpoints, given.data, zoo)
        card = replace(card, path=zoo / f"{name}.toml")
        mine = {dataset: those[number][: given.subjects] for dataset, those in dealt.items()}
        out.append(Fold(card, zoo, mine))
    return out


def scans_of(data: Path, dataset: str, subject: str, card: ModelCard) -> list[Path]:
    """Scans of a subject whose suffix the model is meant for."""
    suffixes = card.domain.suffixes or ("T1w", "T2w")
    found = (data / dataset / f"sub-{subject}").rglob("*.nii*")
    return sorted(path for path in found if path.name.split(".")[0].endswith(suffixes))


def reference_of(scan: Path, folder: Path) -> Path:
    """The reference whose entities the scan has.

    Raises
    ------
    NoInputError
        If there is none.
    """
    own = entities(scan).items()
    found = [path for path in label_files(folder) if entities(path).items() <= own]
    if not found:
        raise NoInputError(
            f"nothing labels {scan.name}", folder, "label it, or leave the subject out of DATA"
        )
    return found[0]


def samples(
    given: argparse.Namespace, fold: Fold, references: list[Reference]
) -> list[dict[str, np.ndarray]]:
    """The samples of a fold's scans, made where they are not in WORK yet."""
    out, model = [], None
    for reference in references:
        for subject in fold.subjects[reference.dataset][: given.sampled]:
            for scan in scans_of(given.data, reference.dataset, subject, fold.card):
                stem = scan.name.split(".")[0]
                name = f"{fold.card.weights.sha256[:12]}_{reference.dataset}_{stem}.npz"
                file = given.work / "samples" / name
                if not file.is_file():
                    model = model or load_model(fold.card, load_weights(fold.card, True))
                    folder = given.data / reference.dataset / reference.labels
                    found = sample(scan, reference_of(scan, folder), reference, model)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    np.savez(file, **found)
                with np.load(file) as saved:
                    one = dict(saved)
                one["logits"] = np.log(np.maximum(one.pop("probabilities"), np.float16(SMALLEST)))
                out.append(one)
    return out


def temperatures(sampled: list[list[dict[str, np.ndarray]]]) -> tuple[list[float], float]:
    """Temperature of each fold from the others, and of all; prints what they do to the fold."""
    own = []
    for number, scans in enumerate(sampled):
        others = [scan for k, part in enumerate(sampled) if k != number for scan in part]
        own.append(fit_temperature(others))
        row = []
        for heat in (1.0, own[-1]):
            losses = [likelihood(scan, heat).mean() for scan in scans]
            top = [folded(scan, heat) for scan in scans]
            right = [p.argmax(axis=1) == s["target"] for p, s in zip(top, scans, strict=True)]
            sure = np.concatenate([p.max(axis=1) for p in top])
            row.append((np.mean(losses), calibration_error(sure, np.concatenate(right))))
        (loss, error), (new_loss, new_error) = row
        print(
            f"fold {number}, {len(scans)} scans, temperature {own[-1]:.3f} of the other folds: "
            f"NLL {loss:.4f} → {new_loss:.4f}, ECE {error:.4f} → {new_error:.4f}",
            flush=True,
        )
    return own, fit_temperature([scan for part in sampled for scan in part])


def label_fold(given: argparse.Namespace, fold: Fold, references: list[Reference], heat: float):
    """Label a fold's subjects with the program at a temperature; a row per scored structure."""
    how = Calibration(how="temperature of the other folds", temperature={fold.card.protocol: heat})
    write_card(replace(fold.card, calibration=how), fold.zoo / f"{fold.card.name}.toml")
    tables = []
    for reference in (one for one in references if fold.subjects[one.dataset]):
        subjects = fold.subjects[reference.dataset]
        out = given.work / f"out-{reference.dataset}-{fold.card.name}"
        command = [
            sys.executable, str(ROOT / "bids_app_entry.py"), str(given.data / reference.dataset),
            str(out), "participant", "--models", str(fold.zoo), "--model", fold.card.name,
            "--skip-bids-validation", "--participant-label", *subjects,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        scores = score(given, reference, out, fold.card.name)
        rows = structure_rows(out, scores, reference, load_protocol(fold.card.protocol))
        own = [f"{reference.dataset}/{subject}" for subject in subjects]
        tables.append(rows[rows["subject"].isin(own)])  # WORK may hold an earlier call's scans
    return pd.concat(tables, ignore_index=True).assign(fold=fold.card.name)


def structure_rows(
    out: Path, scores: Path, reference: Reference, protocol: LabelProtocol
) -> pd.DataFrame:
    """What each scored structure was expected to reach, and what it reached.

    Where several structures are one in the reference, the Dice counts for the largest of them and
    the volume for none.
    """
    fold, short = reference.fold(protocol), structures(protocol)
    row_of = {int(label): row for row, label in enumerate(reference.common(protocol).indices)}
    scored = pd.read_csv(scores, sep="\t")
    rows = []
    for name, part in scored.groupby("predicted"):
        table = next(out.rglob(name.replace("_dseg.nii.gz", "_desc-volumes_dseg.tsv")))
        volumes = pd.read_csv(table, sep="\t")
        for score in part.itertuples():
            channels = np.flatnonzero(fold[row_of[score.index]])
            own = volumes.iloc[channels - 1]  # the background has no row
            largest = int(own["voxels"].to_numpy().argmax())
            alone = len(own) == 1
            rows.append({
                "dataset": reference.dataset, "scan": name,
                "subject": f"{reference.dataset}/{entities(Path(name))['sub']}",
                "suffix": entities_space(name),
                "structure": short[channels[largest]], "index": score.index,
                "expected": own["predicted_dice"].iloc[largest], "dice": score.dice,
                "confidence": own["mean_confidence"].iloc[largest],
                "soft_mm3": own["soft_mm3"].iloc[0] if alone else np.nan,
                "reference_mm3": score.reference_mm3,
            })  # fmt: skip
    return pd.DataFrame(rows)


def entities_space(name: str) -> str:
    """Suffix of the scan a derivative belongs to."""
    return next(p.removeprefix("space-") for p in name.split("_") if p.startswith("space-"))


def apply(table: pd.DataFrame, fitted: Calibration) -> pd.DataFrame:
    """Rows with predicted Dice and the interval of their volume."""
    key = table["structure"]
    predicted = table["expected"] + key.map(fitted.dice_offset)
    return table.assign(
        predicted=predicted.clip(0, 1),
        low=table["soft_mm3"] * key.map(fitted.volume_low),
        high=table["soft_mm3"] * key.map(fitted.volume_high),
    )


def fit(table: pd.DataFrame) -> Calibration:
    """Predicted Dice and intervals from the rows of some folds."""
    low, high = fit_intervals(table, LEVEL)
    return Calibration("", {}, fit_dice(table), LEVEL, low, high)


def correlation(one: pd.Series, other: pd.Series) -> float:
    """Pearson's, over the rows in which both are known."""
    known = one.notna() & other.notna()
    return float(np.corrcoef(one[known], other[known])[0, 1])


def describe(name: str, table: pd.DataFrame) -> None:
    """Print how well predicted Dice and intervals hold on rows they were not fitted on."""
    within = table[["predicted", "dice"]] - table.groupby("structure")[
        ["predicted", "dice"]
    ].transform("mean")
    scans = table.groupby("scan")[["predicted", "dice", "expected"]].mean()
    measured = table.dropna(subset=["low"])
    measured = measured[measured["reference_mm3"] > 0]
    held = measured["reference_mm3"].between(measured["low"], measured["high"])
    width = (measured["high"] - measured["low"]) / measured["soft_mm3"] / 2
    print(f"{name}: {len(scans)} scans, {len(table)} structures. Predicted and true Dice: "
          f"r {correlation(table['predicted'], table['dice']):.3f} "
          f"(uncorrected {correlation(table['expected'], table['dice']):.3f}, "
          f"structure's mean alone {correlation(table['usual'], table['dice']):.3f}, "
          f"within structures {correlation(within['predicted'], within['dice']):.3f}, "
          f"means of scans {correlation(scans['predicted'], scans['dice']):.3f}), "
          f"mean error {(table['predicted'] - table['dice']).abs().mean():.3f} "
          f"(structure's mean alone {(table['usual'] - table['dice']).abs().mean():.3f}); "
          f"{LEVEL:.0%} interval of the volume: holds {held.mean():.1%}, "
          f"median half width ±{width.median():.0%}")  # fmt: skip


def main(given: argparse.Namespace) -> int:
    """Sample, label, fit, print and write."""
    references = [Reference.parse(words) for words in given.reference]
    given.work.mkdir(parents=True, exist_ok=True)
    if given.labelled:
        hold_out(given.work, subjects_of(given, references))
        return 0
    if len(given.fold) < (1 if given.temperature_only else 2):
        raise UsageError(
            "too few folds", "", "give two or more --fold, or one with --temperature-only"
        )
    every = folds(given, references)
    parts = every if len(every) > 1 else by_subject(every[0])
    own, heat = temperatures([samples(given, part, references) for part in parts])
    if given.temperature_only:
        save(given, only_temperature(parts, heat, given.sampled))
        return 0
    tables = [label_fold(given, f, references, t) for f, t in zip(every, own, strict=True)]
    rows = hold_out(given.work, tables)
    found = rounded(fit(pd.concat(tables)), every[0].card.protocol, heat, rows)
    save(given, found)
    return 0


def by_subject(fold: Fold) -> list[Fold]:
    """A fold as one for each of its subjects."""
    every = [(dataset, subject) for dataset, those in fold.subjects.items() for subject in those]
    if len(every) < 2:
        raise UsageError("a fold of one subject", "", "give two or more --fold")
    none = dict.fromkeys(fold.subjects, ())
    return [replace(fold, subjects={**none, dataset: [one]}) for dataset, one in every]


def only_temperature(parts: list[Fold], heat: float, sampled: int | None) -> Calibration:
    """A calibration without Dice and intervals; `sampled` subjects of each part were looked at."""
    counts: dict[str, int] = {}
    for part in parts:
        for dataset, those in part.subjects.items():
            counts[dataset] = counts.get(dataset, 0) + len(those[:sampled])
    persons = " and ".join(f"{name} ({count})" for name, count in counts.items())
    how = f"temperature on persons of {persons}, not seen by the fold that labelled them"
    return Calibration(f"{how}; benchmarks/calibrate.py", {parts[0].card.protocol: round(heat, 3)})


def save(given: argparse.Namespace, found: Calibration) -> None:
    """Write what was found, and put it into the card that was named."""
    (given.work / "calibration.toml").write_text(
        tomli_w.dumps({"calibration": found.to_table()}), encoding="utf-8"
    )
    if given.card:
        write_card(replace(read_card(given.card), calibration=found), given.card)


def hold_out(work: Path, tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Each table met by what the others taught, printed and written; all rows."""
    held = []
    for number, table in enumerate(tables):
        others = pd.concat([t for k, t in enumerate(tables) if k != number])
        usual = table["structure"].map(others.groupby("structure")["dice"].mean())
        held.append(apply(table, fit(others)).assign(usual=usual))
        describe(f"fold {number}", held[-1])
    rows = pd.concat(held, ignore_index=True)
    rows.to_csv(work / "structures.tsv", sep="\t", index=False, float_format="%.5g")
    for (dataset, suffix), part in rows.groupby(["dataset", "suffix"]):
        describe(f"{dataset} {suffix}", part)
    describe("all folds", rows)
    return rows


def subjects_of(given: argparse.Namespace, references: list[Reference]) -> list[pd.DataFrame]:
    """A table per subject of what was labelled in ``--labelled``."""
    protocol, tables = load_protocol(given.protocol), []
    for reference in references:
        scores = score(given, reference, given.labelled, "labelled")
        rows = structure_rows(given.labelled, scores, reference, protocol)
        tables += [part for _, part in rows.groupby("subject")]
    return tables


def score(given: argparse.Namespace, reference: Reference, out: Path, name: str) -> Path:
    """Score what lies in `out` against a reference; the table's path."""
    scores = given.work / f"scores-{reference.dataset}-{name}.tsv"
    asked = [str(out), str(given.data / reference.dataset / reference.labels),
             "--no-distances", "-o", str(scores)]  # fmt: skip
    asked += ["--mapping", reference.mapping.name] if reference.mapping else []
    if evaluate(asked):
        raise UsageError(f"the scans in {out} cannot be scored", "", "see above")
    return scores


def rounded(found: Calibration, protocol: str, heat: float, rows: pd.DataFrame) -> Calibration:
    """With temperature and sentence, three decimals each."""
    counts = rows.groupby("dataset")["scan"].nunique()
    scans = " and ".join(f"{count} scans of {name}" for name, count in counts.items())
    return replace(
        found,
        how=f"{scans}, each labelled by a fold that had not seen it; benchmarks/calibrate.py",
        temperature={protocol: round(heat, 3)},
        **{
            key: {name: round(value, 3) + 0.0 for name, value in getattr(found, key).items()}
            for key in ("dice_offset", "volume_low", "volume_high")
        },
    )


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    it.add_argument("data", type=Path)
    it.add_argument("work", type=Path)
    it.add_argument("reference", nargs="+")
    it.add_argument("--fold", nargs=2, action="append", default=[])
    it.add_argument("--labelled", type=Path, help="output folder of a model that saw no such scan")
    it.add_argument("--protocol", default="aseg", help="of --labelled")
    it.add_argument("--description", type=Path, default=DESCRIPTION)
    it.add_argument("--subjects", type=int, help="at most so many per fold and dataset")
    it.add_argument("--sampled", type=int, default=2)
    it.add_argument("--temperature-only", action="store_true")
    it.add_argument("--card", type=Path)
    return it.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
