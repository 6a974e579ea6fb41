"""The program's own labels, corrected by hand, come back: only what was corrected counts.

A label image whose sidecar says that this program made it is compared with the very output that it
was made from, told by the content key. Structures that gained or lost voxels are what a person
looked at, those that were deleted altogether among them; all others are merged into the background
in the loss, and the parent's answer is kept for them. A copy of every original is kept, as a later
run with the adapted model replaces the output itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from tlseg_bids.adapt.labels import Collected, LabelledScan, Refused, with_group
from tlseg_bids.adapt.reading import IGNORE, Reading
from tlseg_bids.bids.atomic import atomic
from tlseg_bids.bids.metadata import KEY, sidecar_of
from tlseg_bids.bids.names import without_extension
from tlseg_bids.bids.tables import read_json
from tlseg_bids.errors import DataError, ScanError, listed
from tlseg_bids.volume import load_labels

LEAST_VOXELS = 5
ORIGINALS = Path("models", ".originals")
"""Below the output folder: copies of outputs that corrections were compared with."""


def corrected_only(collected: Collected, out_dir: Path, keep: bool = False) -> Collected:
    """Restrict what counts in every label image that is a corrected output of this program.

    Parameters
    ----------
    collected : Collected
        The labelled scans.
    out_dir : Path
        Where the program's own outputs lie, and copies of those that were corrected before.
    keep : bool
        Whether to keep a copy of each output that a correction is compared with.

    Raises
    ------
    DataError
        If no label image is left, because none was changed or the originals are gone; if nothing
        but deleted structures counts, so that no Dice could be computed.
    CannotCreateError, OutputError
        If a copy cannot be written.
    """
    usable, refused = [], []
    for one in collected.usable:
        key = _content_key(one.file)
        if key is None:
            usable.append(one)
            continue
        try:
            original = _original(one, key, out_dir)
            usable.append(_restricted(one, original, collected.reading))
        except ScanError as error:
            refused.append(Refused(one.name, error.what, error.hint))
            continue
        if keep:
            _keep(original, _copy_of(key, out_dir))
    if not usable:
        raise DataError(
            f"no label image can be used; {refused[0].name}: {refused[0].what}", "--labels",
            refused[0].hint,
        )  # fmt: skip
    if not any(_shows_what_counts(one) for one in usable):
        raise DataError(
            f"the corrections delete structures and change no other (the first is "
            f"{usable[0].file.name}), so whether an adapted model is better cannot be judged",
            "--labels", "correct a structure that remains, too, or add labels of another scan",
        )  # fmt: skip
    refused = (*collected.refused, *refused)
    return replace(collected, usable=tuple(usable), refused=refused)


def changed_channels(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Channels of which at least `LEAST_VOXELS` voxels were added or taken away, background not.

    Parameters
    ----------
    before, after : ndarray of uint8, same shape
        Channels; voxels that are `IGNORE` in either do not count.
    """
    differ = (before != after) & (before != IGNORE) & (after != IGNORE)
    counts = np.bincount(before[differ], minlength=256) + np.bincount(after[differ], minlength=256)
    found = np.flatnonzero(counts >= LEAST_VOXELS)
    return found[found > 0]


def _content_key(file: Path) -> str | None:
    """Content key in the JSON of a label image; None if it does not come from this program.

    The JSON has the image's name, with or without its ``desc``.
    """
    stem = without_extension(file.name)
    plain = "_".join(part for part in stem.split("_") if not part.startswith("desc-"))
    for name in (stem, plain):
        sidecar, _ = read_json(sidecar_of(file.with_name(name)))
        if KEY in sidecar:
            return str(sidecar[KEY])
    return None


def _original(one: LabelledScan, key: str, out_dir: Path) -> Path:
    """The program's output with this content key, or its copy; not the image itself."""
    found = [
        path
        for path in sorted(out_dir.glob(f"sub-{one.scan.subject}/**/*_dseg.nii.gz"))
        if str(read_json(sidecar_of(path))[0].get(KEY)) == key
        and path.is_file()
        and not path.samefile(one.file)
    ]
    copy = _copy_of(key, out_dir)
    if not found and not copy.is_file():
        raise ScanError(
            f"{one.file.name} is a correction of an output of this program that is not in "
            f"{out_dir} any more, so what was corrected is unknown", one.file,
            "correct the present output, or put the original and its JSON back there; if every "
            "structure was checked by hand, remove the JSON of the correction",
        )  # fmt: skip
    return found[0] if found else copy


def _copy_of(key: str, out_dir: Path) -> Path:
    name = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]
    return out_dir / ORIGINALS / f"{name}.nii.gz"


def _keep(original: Path, copy: Path) -> None:
    if not copy.is_file():
        with atomic(copy) as stream:
            stream.write(original.read_bytes())


def _restricted(one: LabelledScan, original: Path, reading: Reading) -> LabelledScan:
    before = reading.channels(load_labels(original).data)
    if before.shape != one.channels.shape:
        raise ScanError(
            f"the corrected labels have the shape {one.channels.shape}, the original "
            f"{before.shape}", original, "save the correction on the grid of the original",
        )  # fmt: skip
    whole = reading.group if reading.unmerged is None else reading.unmerged
    table = np.append(whole, np.arange(len(whole), 256)).astype(np.uint8)
    after = table[one.channels]
    channels = changed_channels(table[before], after)
    if not len(channels):
        raise ScanError(
            f"{one.file.name} is the program's own output, unchanged: nothing was corrected",
            one.file, "correct it, or leave it out",
        )  # fmt: skip
    group = np.zeros_like(whole)
    for channel in channels:
        group[whole == channel] = channel
    names = reading.target.table["name"]
    note = f"Corrected by hand, and alone counted: {listed(names.iloc[channels])}."
    gone = np.setdiff1d(channels, after)
    if len(gone):
        note += f" Of these, deleted altogether: {listed(names.iloc[gone])}."
    return with_group(one, group, note)


def _shows_what_counts(one: LabelledScan) -> bool:
    """Whether a voxel of the labels belongs to a structure that counts in this scan."""
    return bool(one.group[one.channels[one.channels != IGNORE]].any())
