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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

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


def noise(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """Rician noise of 20 % of the mean of what is not background.

    Gudbjartsson & Patz 1995, doi:10.1002/mrm.1910340618.
    """
    data, inside = _data(image)
    sd = 0.2 * data[inside].mean()
    real, other = (sd * rng.standard_normal(data.shape, np.float32) for _ in range(2))
    return _like(image, _kept(np.hypot(data + real, other), data))


def motion(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """The head takes six poses while k-space is filled, turns of sd 4° and shifts of sd 3 mm.

    Shaw et al. 2019, https://proceedings.mlr.press/v102/shaw19a.html.
    """
    data, _ = _data(image)
    axis = int(rng.integers(3))
    spectrum = np.zeros(data.shape, np.complex64)
    edges = np.linspace(0, data.shape[axis], 7).astype(int)
    spacing = np.array(image.header.get_zooms()[:3], float)
    for first, last in pairwise(edges):
        x, y, z = np.radians(rng.normal(0, 4, 3))
        turn = np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turn = np.diag(1 / spacing) @ turn @ np.diag(spacing)
        middle = (np.array(data.shape) - 1) / 2
        shift = middle - turn @ middle + rng.normal(0, 3, 3) / spacing
        pose = ndimage.affine_transform(data, turn, shift, order=1, mode="nearest")
        lines = (slice(None),) * axis + (slice(first, last),)
        spectrum[lines] = np.fft.fftshift(np.fft.fft(pose, axis=axis), axes=axis)[lines]
    moved = np.abs(np.fft.ifft(np.fft.ifftshift(spectrum, axes=axis), axis=axis))
    return _like(image, _kept(moved.astype(np.float32), data))


def wrap(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """A field of view of 80 % of the object along one axis: what is outside folds over."""
    data, inside = _data(image)
    axis = int(rng.integers(3))
    low, high = _extent(inside, axis)
    size = round(0.8 * (high - low))
    start = low + (high - low - size) // 2
    folded = np.zeros((*data.shape[:axis], size, *data.shape[axis + 1 :]), np.float32)
    for first in range(start - size, data.shape[axis], size):
        begin, end = max(first, 0), min(first + size, data.shape[axis])
        if begin < end:
            into = (slice(None),) * axis + (slice(begin - first, end - first),)
            folded[into] += np.take(data, range(begin, end), axis)
    return _moved(image, folded, axis, start)


def crop(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """The slab ends 25 % of the object's length before the object does, at one of its ends."""
    data, inside = _data(image)
    axis = int(rng.integers(3))
    low, high = _extent(inside, axis)
    cut = round(0.25 * (high - low))
    first, last = (low + cut, data.shape[axis]) if rng.random() < 0.5 else (0, high - cut)
    return _moved(image, np.take(data, range(first, last), axis), axis, first)


def thick(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """Slices of 6 to 7 mm along one axis: means of the thin ones."""
    data, _ = _data(image)
    axis = int(rng.integers(3))
    factor = int(np.ceil(6 / image.header.get_zooms()[axis]))
    count = data.shape[axis] // factor
    some = np.moveaxis(np.take(data, range(count * factor), axis), axis, 0)
    mean = some.reshape(count, factor, *some.shape[1:]).mean(axis=1)
    step = np.eye(4)
    step[axis, axis], step[axis, 3] = factor, (factor - 1) / 2
    return _with_affine(np.moveaxis(mean, 0, axis), image.affine @ step)


def header(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """Two axes of the header swapped, or front and back, or head and feet."""
    swap = np.eye(4)
    change = int(rng.integers(4))
    if change < 2:
        swap = swap[:, [0, 2, 1, 3] if change else [1, 0, 2, 3]]
    else:
        swap[change - 1, change - 1] = -1
    return _with_affine(np.asanyarray(image.dataobj), swap @ image.affine)


def age(image: nib.Nifti1Image, _: np.random.Generator) -> nib.Nifti1Image:
    """The image stays; `copies` writes a wrong age."""
    return image


DAMAGES: dict[str, Callable[[nib.Nifti1Image, np.random.Generator], nib.Nifti1Image]] = {
    "noise": noise, "motion": motion, "wrap": wrap, "crop": crop, "thick": thick,
    "header": header, "age": age,
}  # fmt: skip


def _json(scan: Path) -> Path:
    return scan.with_name(scan.name.removesuffix(".nii.gz") + ".json")


def _data(image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Intensities, and where they are no background (above 10 % of the 99th percentile)."""
    data = image.get_fdata(dtype=np.float32).reshape(image.shape[:3])
    return data, data > 0.1 * np.percentile(data[data > data.min()], 99)


def _kept(damaged: np.ndarray, data: np.ndarray) -> np.ndarray:
    """A constant background stays: such scans were stripped after they were made."""
    corner = data[0, 0, 0]
    return np.where(data == corner, corner, damaged) if (data == corner).mean() > 0.3 else damaged


def _extent(inside: np.ndarray, axis: int) -> tuple[int, int]:
    there = np.flatnonzero(inside.sum(axis=tuple(a for a in range(3) if a != axis)) > 20)
    return int(there[0]), int(there[-1]) + 1


def _like(image: nib.Nifti1Image, data: np.ndarray) -> nib.Nifti1Image:
    return _with_affine(data, image.affine)


def _moved(image: nib.Nifti1Image, data: np.ndarray, axis: int, start: int) -> nib.Nifti1Image:
    step = np.eye(4)
    step[axis, 3] = start
    return _with_affine(data, image.affine @ step)


def _with_affine(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    return image


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
