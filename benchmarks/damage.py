"""Damage scans on purpose and ask whether the verdict tells them from intact ones.

Usage: ``python benchmarks/damage.py DATA WORK [option of tlseg …]``

DATA is the folder of the datasets. Every T1w and T2w scan is copied to WORK/bids as it is and once
more with one damage, the kinds in turn; the program labels all of them with the models that ship. A
scan that it refuses counts as excluded. `SCANS` come first: their damaged copies were looked at
while the verdict was built, those of the others (`others`) were not. The scans of `ages` are
labelled once: their own headers turn the brain, so they are neither intact nor damaged on purpose.

Prints, for each kind of damage and for all: the verdicts, the area under the ROC curve (Hanley &
McNeil 1982, doi:10.1148/radiology.143.1.7063747) of the verdict (use < look < exclude, ties count
half) against all intact scans, its 95 % interval of the bootstrap over persons, and how harmful the
damage was: the mean Dice of the labels with those of the intact scan, where both lie on one grid;
then the area of `SCANS` and of the others alone. A second call goes on with what is in WORK.

``python benchmarks/damage.py DATA --scores`` prints, instead, the range of the image's scores with
the reference labels of `malc` and `infant`, intact, with noise and with motion, over the persons
that are not in `SCANS`: what the limits were set on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from damages import DAMAGES

from tlseg_bids.bids.tables import read_table
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.metrics import dice
from tlseg_bids.postprocess.image_quality import image_quality
from tlseg_bids.postprocess.judgement import LEVELS
from tlseg_bids.volume import Grid, Volume

ROOT = Path(__file__).resolve().parents[1]
SCANS = {
    "malc": [f"sub-{n}/anat/sub-{n}_T1w" for n in (1000, 1001, 1002, 1006, 1007, 1008)],
    "infant": [
        f"sub-inf{n}/anat/sub-inf{n}_{suffix}"
        for n, suffix in (
            ("01", "T1w"), ("02", "T2w"), ("03", "T2w"),
            ("05", "T1w"), ("06", "T1w"), ("08", "T2w"),
        )
    ],
    "ms": [
        "sub-visit01/ses-1/anat/sub-visit01_ses-1_T1w",
        "sub-gd07/ses-gd/anat/sub-gd07_ses-gd_T1w",
        "sub-visit20/ses-2/anat/sub-visit20_ses-2_T1w",
        "sub-gd07/ses-gd/anat/sub-gd07_ses-gd_T2w",
        "sub-visit01/ses-1/anat/sub-visit01_ses-1_T2w",
        "sub-visit01/ses-2/anat/sub-visit01_ses-2_T1w",
    ],
    "heads": ["sub-thick/anat/sub-thick_T2w", "sub-chris/anat/sub-chris_T1w"],
}  # fmt: skip
"""The scans whose damaged copies the verdict was built on. Lists, so that they stay the same."""
TURNED = "ages"
"""The dataset whose headers turn the brain."""
KINDS = (
    "noise", "motion", "wrap", "crop", "crop", "thick", "header", "age", "thick", "header", "age",
    "noise", "motion", "wrap", "noise", "motion", "wrap", "crop", "thick", "crop",
)  # fmt: skip
"""Damage of each of `SCANS`, in the order of `copies`; the others take `DAMAGES` in turn."""
INFANT_YEARS, ADULT_YEARS = 0.5, 35.0
LABELS = "{}/anat/*_dseg.nii.gz"
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Copy:
    """A scan in WORK/bids: `kind` is ``intact`` or the damage."""

    participant: str
    origin: str
    person: str
    dataset: str
    suffix: str
    kind: str
    age: float


def _json(scan: Path) -> Path:
    return scan.with_name(scan.name.removesuffix(".nii.gz") + ".json")


def others(data: Path) -> list[tuple[str, str]]:
    """Dataset and name of every T1w and T2w that is not in `SCANS`, `TURNED` left out."""
    listed = {(dataset, scan) for dataset, scans in SCANS.items() for scan in scans}
    found = [
        (dataset, str(file.relative_to(data / dataset)).removesuffix(".nii.gz"))
        for dataset in SCANS
        for file in sorted((data / dataset).glob("sub-*/**/*_T[12]w.nii.gz"))
    ]
    return [one for one in found if one not in listed]


def copies(data: Path) -> list[Copy]:
    """Every intact scan and its damaged copy, then the scans of `TURNED`."""
    turns = max(map(len, SCANS.values()))
    order = [
        (dataset, scans[turn]) for turn in range(turns)
        for dataset, scans in SCANS.items() if turn < len(scans)
    ]  # fmt: skip
    rest, every = others(data), list(DAMAGES)
    kinds = [*KINDS, *(every[place % len(every)] for place in range(len(rest)))]
    found: list[Copy] = []
    for place, (dataset, scan) in enumerate([*order, *rest]):
        kind, whose, years = kinds[place], _whose(dataset, scan), _age(data, dataset, scan)
        wrong = (ADULT_YEARS if dataset == "infant" else INFANT_YEARS) if kind == "age" else years
        found.append(Copy(f"{place:02d}intact", *whose, "intact", years))
        found.append(Copy(f"{place:02d}{kind}", *whose, kind, wrong))
    for place, file in enumerate(sorted((data / TURNED).glob("sub-*/**/*_T[12]w.nii.gz"))):
        scan = str(file.relative_to(data / TURNED)).removesuffix(".nii.gz")
        years = _age(data, TURNED, scan)
        found.append(Copy(f"{place:02d}turned", *_whose(TURNED, scan), "turned", years))
    return found


def _whose(dataset: str, scan: str) -> tuple[str, str, str, str]:
    person, suffix = scan.split("/", maxsplit=1)[0], scan.rpartition("_")[2]
    return f"{dataset}/{scan}.nii.gz", f"{dataset}/{person}", dataset, suffix


def _age(data: Path, dataset: str, scan: str) -> float:
    """Years; `TURNED` counts in months."""
    table = pd.read_csv(data / dataset / "participants.tsv", sep="\t", index_col=0)
    age = float(table.loc[scan.split("/", maxsplit=1)[0], "age"])
    return age / 12 if dataset == TURNED else age


def make(data: Path, bids: Path, listed: list[Copy]) -> None:
    """Write the dataset; what is there already stays."""
    bids.mkdir(parents=True, exist_ok=True)
    about = {"Name": "damaged on purpose", "BIDSVersion": "1.10.0"}
    (bids / "dataset_description.json").write_text(json.dumps(about), encoding="utf-8")
    (bids / "participants.json").write_text('{"age": {"Units": "year"}}', encoding="utf-8")
    lines = ["participant_id\tage"]
    for number, copy in enumerate(listed):
        lines.append(f"sub-{copy.participant}\t{'n/a' if np.isnan(copy.age) else copy.age}")
        file = bids / f"sub-{copy.participant}" / "anat" / f"sub-{copy.participant}_{copy.suffix}"
        file = file.with_name(file.name + ".nii.gz")
        if file.is_file():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        source = data / copy.origin
        sidecars = (data / copy.dataset / f"{copy.suffix}.json", _json(source))
        known = [json.loads(one.read_text(encoding="utf-8")) for one in sidecars if one.is_file()]
        _json(file).write_text(json.dumps({k: v for one in known for k, v in one.items()}))
        if copy.kind in ("intact", "turned"):
            file.write_bytes(source.read_bytes())
        else:
            image = nib.load(source)
            damaged = DAMAGES[copy.kind](image, np.random.default_rng(number))
            nib.save(damaged, file)
    (bids / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def level_of(copy: Copy, work: Path) -> int | None:
    """Number of its verdict in `LEVELS`; a refused scan is excluded; None if it was not met yet."""
    scan = f"sub-{copy.participant}_{copy.suffix}.nii.gz"
    found = list((work / "out" / f"sub-{copy.participant}").rglob("*_seg-*_dseg.json"))
    found = [file for file in found if "_desc-" not in file.name]
    if found:
        said = json.loads(found[0].read_text(encoding="utf-8"))["Verdict"]
        return LEVELS.index(said["Decision"])
    tables = [read_table(file) for file in (work / "out" / "logs").glob("status_*.tsv")]
    failed = any(
        row.get("scan", "").endswith(scan) and row.get("status") == "failed"
        for table in tables for row in table.rows
    )  # fmt: skip
    return len(LEVELS) - 1 if failed else None


def area(intact: np.ndarray, damaged: np.ndarray) -> float:
    """Share of the pairs in which the damaged scan has the graver verdict; ties count half."""
    gap = damaged[:, None] - intact[None]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def areas(table: pd.DataFrame, kinds: Sequence[str]) -> tuple[float, float, float]:
    """The area for damages of some kinds, and its 95 % interval over persons."""
    people, rng, drawn = table["person"].unique(), np.random.default_rng(0), []
    by_person = dict(tuple(table.groupby("person")))
    for sample in [people, *(rng.choice(people, len(people)) for _ in range(BOOTSTRAP))]:
        rows = pd.concat([by_person[person] for person in sample])
        levels = [
            rows.loc[rows["kind"].isin(some), "level"].to_numpy() for some in (["intact"], kinds)
        ]
        if all(map(len, levels)):
            drawn.append(area(*levels))
    return drawn[0], *np.percentile(drawn[1:], (2.5, 97.5))


def harm(copy: Copy, work: Path, listed: list[Copy]) -> float:
    """Mean Dice over structures with the labels of the intact copy; NaN on another grid."""
    if copy.kind == "turned":
        return np.nan
    twin = next(c for c in listed if c.kind == "intact" and c.origin == copy.origin)
    maps = []
    for one in (copy, twin):
        folder = work / "out" / f"sub-{one.participant}" / "anat"
        files = [f for f in folder.glob("*_seg-aseg_dseg.nii.gz") if "_desc-" not in f.name]
        if not files:
            return np.nan
        maps.append(np.asanyarray(nib.load(files[0]).dataobj).astype(int))
    if maps[0].shape != maps[1].shape:
        return np.nan
    names = np.unique(maps[1])[1:]
    return float(np.mean([dice(maps[0] == name, maps[1] == name) for name in names]))


def main(data: Path, work: Path, options: list[str]) -> int:
    """Damage, label, judge and print."""
    listed = copies(data)
    make(data, work / "bids", listed)
    command = [sys.executable, str(ROOT / "bids_app_entry.py"), str(work / "bids")]
    command += [str(work / "out"), "participant", "--skip-bids-validation", *options]
    subprocess.run(command, check=False)  # a refused scan makes it fail
    columns = ("person", "kind", "level", "dice", "listed")
    known = {f"{dataset}/{scan}.nii.gz" for dataset, scans in SCANS.items() for scan in scans}
    rows = [
        (c.person, c.kind, level_of(c, work), harm(c, work, listed), c.origin in known)
        for c in listed
    ]
    table = pd.DataFrame(rows, columns=columns).dropna(subset="level")
    print(f"{len(table)} of {len(rows)} scans judged")
    for kind in ("intact", "turned", *DAMAGES):
        some = table[table["kind"] == kind]
        told = ", ".join(f"{name} {(some['level'] == n).sum()}" for n, name in enumerate(LEVELS))
        line = f"{kind}: {told}"
        if kind in DAMAGES and len(some):
            line += ", area {:.3f} ({:.3f} to {:.3f})".format(*areas(table, [kind]))
            line += f", Dice with intact {some['dice'].mean():.3f}"
        print(line)
    for name, some in (
        ("all", table), ("SCANS", table[table["listed"]]), ("the others", table[~table["listed"]]),
    ):  # fmt: skip
        print(name + ": area {:.3f} ({:.3f} to {:.3f})".format(*areas(some, list(DAMAGES))))
    return 0


def ranges(data: Path) -> pd.DataFrame:
    """Least and largest score by dataset, suffix and kind of damage, with reference labels."""
    rows = []
    for dataset, labels, protocol in (
        ("malc", "derivatives/manual", load_protocol("braincolor")),
        ("infant", "derivatives/jlf", load_protocol("aseg")),
    ):
        judged = {scan.split("/")[0] for scan in SCANS[dataset]}
        for folder in sorted((data / dataset).glob("sub-*")):
            if folder.name in judged:
                continue
            names = np.asanyarray(
                nib.load(next((data / dataset / labels).glob(LABELS.format(folder.name)))).dataobj
            ).astype(int)
            for number, scan in enumerate(sorted(folder.rglob("*_T[12]w.nii.gz"))):
                image = nib.load(scan)
                for kind in ("intact", "noise", "motion"):
                    rng = np.random.default_rng(number)
                    changed = image if kind == "intact" else DAMAGES[kind](image, rng)
                    values = changed.get_fdata(dtype=np.float32)
                    volume = Volume(values, Grid(values.shape, image.affine))
                    scores = image_quality(volume, names, names > 0, protocol)
                    suffix = scan.name.removesuffix(".nii.gz").rpartition("_")[2]
                    rows.append({"dataset": dataset, "suffix": suffix, "kind": kind, **scores})
    return pd.DataFrame(rows).groupby(["dataset", "suffix", "kind"]).agg(["min", "max"])


if __name__ == "__main__":
    if sys.argv[2:] == ["--scores"]:
        print(ranges(Path(sys.argv[1]).absolute()).T.to_string(float_format="{:.3g}".format))
        sys.exit(0)
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/damage.py DATA WORK [option of tlseg …]")
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[3:]))
