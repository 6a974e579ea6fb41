"""One verdict per scan, from everything that was measured: use it, look at it, or leave it out.

`RULES` holds the limits. They were set on scans that `benchmarks/damage.py` does not judge; see
docs/quality.md, which also says what they miss. Nothing is left out by the program: the verdict is
advice, and a person's rating goes before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from tlseg_bids.flow import Segmentation
from tlseg_bids.labels.landmarks import BoxAtlas
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.postprocess.cleaning import bounding_box
from tlseg_bids.postprocess.image_quality import image_quality
from tlseg_bids.postprocess.plausibility import (
    euler_number,
    expected_brain_mm3,
    turned_degrees,
)
from tlseg_bids.postprocess.quality import OUTER_FLUID
from tlseg_bids.postprocess.references import compare
from tlseg_bids.volume import Grid, Volume

LEVELS = ("use", "look", "exclude")
CUT_SHARE = 0.03
"""Development scans that show the whole brain, cropped to it or not, stay below 0.01."""
NAMED = 6


@dataclass(frozen=True)
class Rule:
    """A score beyond `look` (or `exclude`, None if there is none) is a reason, said by `sentence`.

    `sign` is 1 where large scores are bad, -1 where small ones are.
    """

    score: str
    sign: int
    look: float
    exclude: float | None
    sentence: str

    def level(self, value: float) -> int:
        """0 use, 1 look, 2 exclude; an unknown score is no reason."""
        if math.isnan(value):
            return 0
        limits = (self.look, self.exclude)
        return sum(limit is not None and self.sign * (value - limit) > 0 for limit in limits)


RULES = (
    Rule(
        "snr", -1, 15.0, 4.0,
        "The image is noisy: signal to noise {value:.1f}, {look:g} expected.",
    ),
    Rule(
        "explained", -1, 0.15, 0.05,
        "The labels do not fit the image: they explain {value:.0%} of its variance.",
    ),
    Rule(
        "cut_mm2", 1, 1000.0, 4000.0,
        "The scan ends inside the brain, on an area of {value:.0f} mm².",
    ),
    Rule(
        "brain_by_age", 1, math.log(1.5), math.log(2.0),
        "The brain is {factor:.1f} times {size} than at this age: check age and voxel size.",
    ),
    Rule(
        "expected_dice", -1, 0.75, None,
        "The model expects to overlap little with a reference: Dice {value:.2f}.",
    ),
)  # fmt: skip


def assess(  # noqa: PLR0913
    segmentation: Segmentation, scan: Volume, protocol: LabelProtocol,
    template_from_scan: np.ndarray, age_years: float | None, warnings: Iterable[str] = (),
    atlas: BoxAtlas | None = None,
) -> Segmentation:  # fmt: skip
    """The segmentation with more scores in `qc`, and with its verdict.

    Parameters
    ----------
    segmentation : Segmentation
        As `tlseg_bids.postprocess.to_native` gives.
    scan : Volume
        The scan itself.
    protocol : LabelProtocol
        Of the labels.
    template_from_scan : ndarray, shape (4, 4)
        World mm to template mm.
    age_years : float or None
        Age to judge by (`tlseg_bids.postprocess.plausibility.judged_age_years`); None if it is not
        known or before term.
    warnings : iterable of str
        What was odd about the scan.
    atlas : BoxAtlas, optional
        Of the model, in its protocol: where to expect what the scan does not show.

    Returns
    -------
    Segmentation
        New in `qc`: `image_quality`; ``turned_degrees``; ``brain_euler_number`` (1 for one piece
        without handles; the mask has no holes); where the age is known, ``expected_brain_mm3``
        and ``brain_by_age`` (|ln(brain ÷ expected)|). New in `volumes`: ``volume_z`` and
        ``side_z``, and in `flags` what they find unusual (`tlseg_bids.postprocess.references`);
        ``cut_share``, see `cut_shares`, and in `flags` the structures of which more than
        `CUT_SHARE` is beyond the scan's faces.
    """
    qc = dict(segmentation.qc)
    mask = segmentation.brain_mask
    if mask.any():
        qc |= image_quality(scan, segmentation.labels.data, mask, protocol)
        qc["brain_euler_number"] = float(euler_number(mask[bounding_box(mask, margin=1)]))
    qc["turned_degrees"] = turned_degrees(template_from_scan)
    if age_years is not None and qc["brain_mm3"] > 0:
        qc["expected_brain_mm3"] = expected_brain_mm3(age_years)
        qc["brain_by_age"] = abs(math.log(qc["brain_mm3"] / qc["expected_brain_mm3"]))
    scores, unusual = compare(segmentation.volumes, qc["brain_mm3"], age_years, protocol)
    scores = scores.reindex(segmentation.volumes["index"])
    volumes = segmentation.volumes.assign(**{name: scores[name].to_numpy(float) for name in scores})
    volumes["cut_share"] = cut_shares(atlas, template_from_scan, scan.grid, len(protocol))
    found = (*segmentation.flags, *unusual, *cut_structures(volumes, protocol))
    level, reasons = judge(qc, found, warnings)
    return replace(
        segmentation, qc=qc, volumes=volumes, flags=found, verdict=level, reasons=reasons
    )


def cut_shares(
    atlas: BoxAtlas | None, template_from_scan: np.ndarray, native: Grid, channels: int
) -> np.ndarray:
    """Share of each structure, background left out, that is expected beyond the scan's faces.

    A structure need touch no face to be cut: where a scan ends in the cerebellum's cortex, white
    matter that would lie beyond is missing as well. NaN where the atlas has nothing of it, and
    without an atlas.
    """
    if atlas is None:
        return np.full(channels - 1, np.nan)
    shares, _ = atlas.shown(template_from_scan, native)
    return np.clip(1 - shares[1:], 0, 1)


def cut_structures(volumes: pd.DataFrame, protocol: LabelProtocol) -> tuple[str, ...]:
    """A sentence that names structures which the scan cuts, most first; the fluid is no such one.

    `volumes` has ``index``, ``name`` and ``cut_share``.
    """
    around = protocol.indices[protocol.channels(group=OUTER_FLUID)]
    cut = volumes[(volumes["cut_share"] > CUT_SHARE) & ~volumes["index"].isin(around)]
    if cut.empty:
        return ()
    worst = cut.sort_values("cut_share", ascending=False, kind="stable")
    named = [f"{row.name.lower()} ({row.cut_share:.0%})" for row in worst[:NAMED].itertuples(False)]
    more = f" and {len(worst) - NAMED} more" if len(worst) > NAMED else ""
    return (
        f"The scan ends before {', '.join(named)}{more} do: in brackets the share that is expected "
        "beyond its faces; their volumes are too small by about as much.",
    )


def judge(
    qc: dict[str, float], flags: Iterable[str], warnings: Iterable[str]
) -> tuple[str, tuple[str, ...]]:
    """The verdict, one of `LEVELS`, and its reasons, gravest first.

    Flags and warnings are reasons to look; the limits of `RULES` are reasons of their own level.
    """
    found = [(1, sentence) for sentence in (*flags, *warnings)]
    for rule in RULES:
        value = qc.get(rule.score, math.nan)
        if level := rule.level(value):
            found.append((level, _said(rule, value, qc)))
    found.sort(key=lambda reason: -reason[0])
    level = max((level for level, _ in found), default=0)
    return LEVELS[level], tuple(dict.fromkeys(sentence for _, sentence in found))


def _said(rule: Rule, value: float, qc: dict[str, float]) -> str:
    factor = size = None
    if rule.score == "brain_by_age":
        factor = math.exp(value)
        size = "larger" if qc["brain_mm3"] > qc["expected_brain_mm3"] else "smaller"
    return rule.sentence.format(value=value, look=rule.look, factor=factor, size=size)
