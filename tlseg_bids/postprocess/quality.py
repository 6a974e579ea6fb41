"""What a segmentation says about itself: volumes, quality scores and sentences for the user."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.postprocess.calibration import predicted_dice, volume_interval
from tlseg_bids.postprocess.references import widest_side
from tlseg_bids.zoo.calibration import Calibration

BORDER_FLAG = 0.001
ASYMMETRY_FLAG, ASYMMETRY_ROOM = 0.3, 1.25
"""Left against right is told beyond the first, and beyond so many times the widest in a person of
the references."""
CONFIDENCE_FLAG = 0.7
CLEAR_DICE, SURE_DICE, HOPEFUL_DICE = 0.7, 0.6, 0.5
"""Expected Dice of a coarse answer from which no other direction is looked at, from which a brain
was found, and from which looking further is worth while: in the right direction 0.75 to 0.86, in a
wrong one 0.27 to 0.61; see docs/trust.md."""
OUTER_FLUID = "outer-csf"
CORTEX = "cortex"
BRAIN_MM3 = (2.0e5, 2.2e6)
NO_BRAIN_MM3 = (1.0e5, 3.0e6)
NO_BRAIN_DICE = 0.45
"""Bounds beyond which no scan of the development data lies, and noise, a ball and an upside-down
brain do; see docs/evidence.md."""


def expected_dice(probabilities: np.ndarray) -> float:
    """Dice to expect of an answer with the truth, if its probabilities are right.

    Parameters
    ----------
    probabilities : ndarray, shape (channels, I, J, K)
        Channel 0 is the background.

    Returns
    -------
    float
        2·Σp(inside) / (voxels + Σp), mean over the structures that win somewhere; 0 without any.
    """
    every = torch.from_numpy(probabilities)
    top = every.max(dim=0)
    voxels = torch.bincount(top.indices.ravel(), minlength=len(every)).double()
    inside = torch.bincount(top.indices.ravel(), top.values.double().ravel(), len(every))
    soft = every.flatten(1).sum(1, dtype=torch.float32).double()
    found = voxels > 0
    found[0] = False
    return float((2 * inside / (voxels + soft))[found].mean()) if found.any() else 0.0


def volume_table(
    channel: np.ndarray, confidence: np.ndarray, soft: np.ndarray, protocol: LabelProtocol,
    voxel_mm3: float, calibration: Calibration | None = None,
) -> pd.DataFrame:  # fmt: skip
    """One row per structure of the protocol, absent ones with a volume of 0.

    Parameters
    ----------
    channel, confidence : ndarray
        Final channel and probability × 255, same shape.
    soft : ndarray, shape (channels,)
        Sums of the probabilities, in voxels, before any repair.
    protocol : LabelProtocol
        Names and indices.
    voxel_mm3 : float
        Volume of a voxel.
    calibration : Calibration, optional
        Of the card that labelled the scan.

    Returns
    -------
    DataFrame
        index, name, hard_mm3, soft_mm3, soft_low_mm3 and soft_high_mm3 (NaN without a calibrated
        interval), voxels, mean_confidence (NaN where absent), predicted_dice (NaN where absent
        or not calibrated): the Dice to expect if the probabilities are right,
        2·Σp(inside) / (voxels + Σp), as the calibration corrects it.
        ``attrs["expected_dice"]`` is the mean of the uncorrected one, 0 where nothing was found.
    """
    calibration = calibration or Calibration()
    count = len(protocol)
    voxels = np.bincount(channel.ravel(), minlength=count)
    inside = np.bincount(channel.ravel(), confidence.ravel(), minlength=count) / 255
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(voxels > 0, inside / voxels, np.nan)
        dice = np.where(voxels > 0, np.minimum(1, 2 * inside / (voxels + soft)), np.nan)
    low, high = volume_interval(soft * voxel_mm3, protocol, calibration)
    table = pd.DataFrame(
        {
            "index": protocol.indices.astype(int),
            "name": protocol.table["name"].to_numpy(),
            "hard_mm3": voxels * voxel_mm3,
            "soft_mm3": soft * voxel_mm3,
            "soft_low_mm3": low,
            "soft_high_mm3": high,
            "voxels": voxels,
            "mean_confidence": mean,
            "predicted_dice": predicted_dice(dice, protocol, calibration),
        }
    )
    table = table.iloc[1:].reset_index(drop=True)
    table.attrs["expected_dice"] = float(np.nanmean(dice[1:])) if voxels[1:].any() else 0.0
    return table


def quality(
    table: pd.DataFrame, mask: np.ndarray, protocol: LabelProtocol, voxel_mm3: float,
    fluid: np.ndarray | None = None,
) -> dict[str, float]:  # fmt: skip
    """Quality scores.

    Parameters
    ----------
    table : DataFrame
        As `volume_table` gives.
    mask : ndarray of bool
        The brain, with what fluid around it is labelled.
    protocol : LabelProtocol
        Of the labels.
    voxel_mm3 : float
        Volume of a voxel.
    fluid : ndarray of bool, optional
        That fluid; none if not given.

    Returns
    -------
    dict
        ``brain_mm3`` (the mask without the fluid around the brain; NaN for a protocol without
        cortex, whose labels are no whole brain), ``mean_confidence`` (over
        labelled voxels), ``predicted_dice`` (mean over present structures, calibrated where the
        table is), ``expected_dice`` (the same, never calibrated), ``fov_border_share`` (voxels
        of the brain, without that fluid, on the scan's outer faces ÷ those of the brain),
        ``head_border_share`` (the same with the fluid), ``asymmetry_max`` (largest |L − R| ÷
        mean of L and R over the paired structures, 0 to 2; NaN if there is none),
        ``structures_missing``.
    """
    brain = int(np.count_nonzero(mask))
    around = outer_fluid_mm3(table, protocol)
    labelled = table["voxels"].to_numpy()
    confidence = table["mean_confidence"].fillna(0.0).to_numpy()
    present = table[labelled > 0]
    asymmetry = asymmetries(table, protocol)["asymmetry"]
    whole = len(protocol.channels(group=CORTEX)) > 0
    return {
        "brain_mm3": brain * voxel_mm3 - around if whole else float("nan"),
        "mean_confidence": float(confidence @ labelled / max(1, labelled.sum())),
        "predicted_dice": float(present["predicted_dice"].mean()) if len(present) else 0.0,
        "expected_dice": table.attrs["expected_dice"],
        "fov_border_share": border_share(mask if fluid is None else mask & ~fluid),
        "head_border_share": border_share(mask),
        "asymmetry_max": float(asymmetry.max()),
        "structures_missing": float((labelled == 0).sum()),
    }


def border_share(mask: np.ndarray) -> float:
    """Voxels of a mask on the outer faces of its volume ÷ all of it."""
    every = int(np.count_nonzero(mask))
    inner = int(np.count_nonzero(mask[1:-1, 1:-1, 1:-1]))
    return (every - inner) / max(1, every)


def outer_fluid_mm3(table: pd.DataFrame, protocol: LabelProtocol) -> float:
    """Volume of the fluid between brain and skull; 0 where the protocol does not label it."""
    outside = protocol.indices[protocol.channels(group=OUTER_FLUID)]
    return float(table.loc[table["index"].isin(outside), "hard_mm3"].sum())


def intracranial(
    mask: np.ndarray, qc: dict[str, float], protocol: LabelProtocol, voxel_mm3: float,
    skull_stripped: bool | None,
) -> tuple[float | None, str]:  # fmt: skip
    """The volume of everything inside the skull: brain, ventricles and the fluid around the brain.

    It is the filled mask, which then reaches to the inner face of the skull.

    Parameters
    ----------
    mask : ndarray of bool
        All labels, holes filled.
    qc : dict
        As `quality` gives.
    protocol : LabelProtocol
        Whether it labels all fluid around the brain (group ``outer-csf``).
    voxel_mm3 : float
        Volume of a voxel.
    skull_stripped : bool or None
        Whether the scan shows no skull; None if nobody knows.

    Returns
    -------
    mm3 : float or None
        None where it cannot be measured.
    why : str
        The reason for None, else empty.
    """
    if skull_stripped is None:
        return None, "it is not known whether the scan shows the whole head"
    if skull_stripped:
        return None, "the scan is skull-stripped, so the fluid around the brain is not all there"
    if not len(protocol.channels(group=OUTER_FLUID)):
        return None, f"the labels of '{protocol.name}' leave out the fluid around the brain"
    if qc["head_border_share"] > BORDER_FLAG or qc.get("model_border_share", 0) > BORDER_FLAG:
        return None, "the scan or the model's field of view ends inside the head"
    return float(np.count_nonzero(mask)) * voxel_mm3, ""


def asymmetries(table: pd.DataFrame, protocol: LabelProtocol) -> pd.DataFrame:
    """Left against right of every paired structure that is present on a side.

    Returns
    -------
    DataFrame
        left, right (indices), name (of the left one), group, asymmetry: |L − R| ÷ mean, 0 to 2.
    """
    mm3 = dict(zip(table["index"], table["hard_mm3"], strict=True))
    described = protocol.table.set_index("index")
    rows = []
    for left, right in protocol.pairs():
        both = mm3.get(left, 0.0) + mm3.get(right, 0.0)
        if both > 0:
            share = abs(mm3.get(left, 0.0) - mm3.get(right, 0.0)) / (both / 2)
            row = described.loc[left]
            rows.append((left, right, row["name"], row["group"], share))
    return pd.DataFrame(rows, columns=["left", "right", "name", "group", "asymmetry"])


def flags(table: pd.DataFrame, qc: dict[str, float], protocol: LabelProtocol) -> tuple[str, ...]:
    """Sentences about what a person should look at."""
    out = []
    missing = table.loc[table["voxels"] == 0, "name"].tolist()
    if len(missing) == len(table):
        return ("No brain was found.",)
    if missing:
        out.append(f"Not found: {', '.join(missing)}.")
    low, high = BRAIN_MM3
    if qc["brain_mm3"] < low or qc["brain_mm3"] > high:
        litres = f"{low / 1e6:g} to {high / 1e6:g} l"
        out.append(f"The brain has {qc['brain_mm3'] / 1e6:.2f} l; {litres} are plausible.")
    if qc["fov_border_share"] > BORDER_FLAG:
        out.append(
            f"The scan ends inside the brain: {qc['fov_border_share']:.1%} of its voxels lie on "
            "the scan's outer faces, so volumes are too small."
        )
    if qc.get("model_border_share", 0) > BORDER_FLAG:
        out.append("The brain reaches the edge of the model's field of view; parts may be missing.")
    if qc["mean_confidence"] < CONFIDENCE_FLAG:
        out.append(f"The model is unsure: mean confidence {qc['mean_confidence']:.2f}.")
    for row in asymmetries(table, protocol).itertuples():
        if row.asymmetry > max(ASYMMETRY_FLAG, ASYMMETRY_ROOM * widest_side(row.name)):
            both = row.name.replace("Left ", "").lower()
            out.append(f"Left and right {both} differ by {row.asymmetry:.0%} of their mean.")
    return tuple(out)


def implausible(qc: dict[str, float], skill: float = 1.0) -> str:
    """Why what was labelled cannot be a brain; empty if it can.

    Parameters
    ----------
    qc : dict
        As `quality` gives.
    skill : float
        Of the model, see `tlseg_bids.zoo.evidence.skill`. Below 1, less is asked of the expected
        Dice, in proportion: that a weak model doubts a brain is no sign against the brain.
    """
    litres = qc["brain_mm3"] / 1e6
    low, high = (bound / 1e6 for bound in NO_BRAIN_MM3)
    if litres < low or litres > high:
        return f"what was labelled has {litres:.2f} l, and a brain has {low:g} to {high:g} l"
    if qc["expected_dice"] < skill * NO_BRAIN_DICE:
        return (
            f"what was labelled does not look like a brain (expected Dice "
            f"{qc['expected_dice']:.2f}, at least {skill * NO_BRAIN_DICE:.2f} is needed)"
        )
    return ""
