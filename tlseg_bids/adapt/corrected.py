"""The program's own labels, corrected by hand, come back: only what was corrected counts.

A label image whose sidecar says that this program made it is compared with the program's own output
of that name, if it is still there. Structures that gained or lost voxels are what a person looked
at; all others are merged into the background in the loss, and the parent's answer is kept for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tlseg_bids.adapt.labels import Collected, LabelledScan, Refused, with_group
from tlseg_bids.adapt.reading import IGNORE, Reading
from tlseg_bids.bids.tables import read_json
from tlseg_bids.bids.write import sidecar_of
from tlseg_bids.errors import DataError, ScanError
from tlseg_bids.volume import load_labels

LEAST_VOXELS = 5
KEY = "ContentKey"


def corrected_only(collected: Collected, out_dir: Path) -> Collected:
    """Restrict what counts in every label image that is a corrected output of this program.

    Parameters
    ----------
    collected : Collected
        The labelled scans.
    out_dir : Path
        Where the program's own outputs lie.

    Raises
    ------
    DataError
        If no label image is left, because none was changed.
    """
    usable, refused = [], list(collected.refused)
    for one in collected.usable:
        sidecar, problem = read_json(sidecar_of(one.file))
        if problem or KEY not in sidecar:
            usable.append(one)
            continue
        original = _original(one, out_dir)
        if original is None:
            note = "This is the program's own output; the original is not there to compare with, "
            note += "so every structure counts."
            usable.append(replace(one, notes=(*one.notes, note)))
            continue
        try:
            usable.append(_restricted(one, original, collected.reading))
        except ScanError as error:
            refused.append(Refused(one.name, error.what, error.hint))
    if not usable:
        raise DataError(
            f"no label image was corrected; {refused[0].name}: {refused[0].what}", "--labels",
            refused[0].hint,
        )  # fmt: skip
    return replace(collected, usable=tuple(usable), refused=tuple(refused))


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


def _original(one: LabelledScan, out_dir: Path) -> Path | None:
    """The program's output of the same name; not the image itself."""
    found = [
        path
        for path in out_dir.glob(f"sub-{one.scan.subject}/**/{one.file.name}")
        if not path.samefile(one.file)
    ]
    return found[0] if found else None


def _restricted(one: LabelledScan, original: Path, reading: Reading) -> LabelledScan:
    before = reading.channels(load_labels(original).data)
    if before.shape != one.channels.shape:
        raise ScanError(
            f"the corrected labels have the shape {one.channels.shape}, the original "
            f"{before.shape}", original, "save the correction on the grid of the original",
        )  # fmt: skip
    table = np.append(reading.group, np.arange(len(reading.group), 256)).astype(np.uint8)
    channels = changed_channels(table[before], table[one.channels])
    if not len(channels):
        raise ScanError(
            f"{one.file.name} is the program's own output, unchanged: nothing was corrected",
            one.file, "correct it, or leave it out",
        )  # fmt: skip
    group = np.zeros_like(reading.group)
    for channel in channels:
        group[reading.group == channel] = channel
    names = _listed(reading.target.table["name"].iloc[channels])
    return with_group(one, group, f"Corrected by hand, and alone counted: {names}.")


def _listed(names: Sequence[str]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
