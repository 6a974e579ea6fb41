"""What the page of an adaptation shows: verdict, Dice before and after, labels side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tlseg_bids.adapt.judge import mean
from tlseg_bids.adapt.record import PAGE, Outcome, Tested, curve_picture, per_structure
from tlseg_bids.bids.nifti import write_labels
from tlseg_bids.report.adaptation import Side, write_adaptation_page
from tlseg_bids.report.display import load_display

HELD_OUT = "held-out"
MOST_PICTURES = 4


def write_page(folder: Path, outcome: Outcome) -> Path:
    """Write ``adaptation.html`` and the held-out labels it shows; returns the page."""
    pictures, shown = [], []
    for one in outcome.tested:
        if one.scan.name not in shown and len(shown) < MOST_PICTURES:
            shown.append(one.scan.name)
            pictures.append((one.part, _sides(folder, outcome, one)))
    path = folder / PAGE
    parts = [
        {"name": one.part, "before": mean(one.base), "after": mean(one.child)}
        for one in outcome.tested
    ]
    verdict = outcome.verdict
    share = f"{verdict.judged:g}" + ("" if verdict.kept else ", judged and not kept")
    facts = {
        "Base": f"{outcome.base.name} {outcome.base.version}",
        "Recipe": f"{outcome.how.name}: {outcome.how.summary}",
        "Steps of the final run": str(outcome.steps),
        "Time": f"{outcome.seconds / 60:.1f} minutes",
        "Share of the way to the adapted weights": share,
        "Seed": str(outcome.seed),
        "Content key": outcome.key,
    }
    return write_adaptation_page(path, outcome.reading.target, {
        "site": outcome.site,
        "kept": verdict.kept,
        "earlier": outcome.earlier is not None,
        "reason": verdict.reason,
        "parts": parts,
        "rows": per_structure(outcome),
        "facts": facts,
        "reasons": [*outcome.reasons, *outcome.reading.notes],
        "scans": [(one.name, one.file.name, one.notes) for one in outcome.scans],
        "refused": [(one.name, one.what, one.hint) for one in outcome.refused],
        "unlabelled": outcome.unlabelled,
        "curves": curve_picture(outcome.curves),
        "pictures": pictures,
    })  # fmt: skip


def _sides(folder: Path, outcome: Outcome, one: Tested) -> list[Side]:
    """Labels of the site, of the base and of the adapted model on one scan."""
    reading = outcome.reading
    own = np.where(one.scan.channels == 255, 0, one.scan.channels)
    sides = []
    for title, mark, channels in (
        ("Labels of the site", "site", own),
        ("Base", "base", one.base_channels),
        ("Adapted, this part not seen", "adapted", one.child_channels),
    ):
        file = folder / HELD_OUT / f"{one.scan.name}_desc-{mark}_dseg.nii.gz"
        folded = one.scan.group[channels].astype(np.uint8)
        labels = reading.indices(folded)
        write_labels(file, labels, one.scan.scan.path, int(reading.target.indices.max()))
        sides.append(Side(title, load_display(file, one.scan.scan.path, reading.target)))
    return sides
