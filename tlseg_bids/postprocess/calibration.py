"""Fitting and using a card's `Calibration`: temperature, predicted Dice, intervals of volumes.

Fitting takes what held-out scans gave; `benchmarks/calibrate.py` collects it. Nothing here reads a
file.

- Temperature: the one that makes the reference most likely. Guo et al. 2017, arXiv:1706.04599.
- Predicted Dice: the Dice that the probabilities promise, 2·Σp(inside) ÷ (voxels + Σp), moved by a
  constant per structure. Sources of doubt that the network is not aware of (the raters, its habits)
  are in the constant.
- Interval of a volume: ln(reference ÷ soft volume) of held-out scans taken as normal, prediction
  interval for one more scan with Student's t over subjects.
  Geisser 1993, doi:10.1201/9780203742310.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import special

from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.zoo.calibration import Calibration, structures

LEAST_SUBJECTS = 3
SEARCHED = (0.3, 4.0)


def predicted_dice(
    expected: np.ndarray, protocol: LabelProtocol, calibration: Calibration
) -> np.ndarray:
    """The Dice to expect against the reference of the calibration.

    Parameters
    ----------
    expected : ndarray, shape (channels,)
        Expected Dice by channel, NaN where the structure is absent.
    protocol : LabelProtocol
        What the channels are.
    calibration : Calibration
        Of the card that labelled the scan.

    Returns
    -------
    ndarray, shape (channels,)
        0 to 1; NaN where the structure is absent or was not among the calibrated ones. Without a
        calibration, `expected` as it is.
    """
    if not calibration.dice_offset:
        return expected
    offset = np.array([calibration.dice_offset.get(s, np.nan) for s in structures(protocol)])
    return np.clip(expected + offset, 0, 1)


def volume_interval(
    soft: np.ndarray, protocol: LabelProtocol, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval that holds the reference's volume with `calibration.level`.

    Parameters
    ----------
    soft : ndarray, shape (channels,)
        Soft volumes, any unit.

    Returns
    -------
    low, high : ndarray, shape (channels,)
        In the unit of `soft`; NaN for structures without an interval.
    """
    names = structures(protocol)
    ends = (calibration.volume_low, calibration.volume_high)
    low, high = (soft * np.array([end.get(s, np.nan) for s in names]) for end in ends)
    return low, high


def tempered(logits: np.ndarray, weights: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at points, as the program makes them: softmax first, then means.

    Parameters
    ----------
    logits : ndarray, shape (n, corners, passes, channels)
        Up to a constant per softmax (logarithms of probabilities will do).
    weights : ndarray, shape (n, corners)
        Of the interpolation; they sum to 1.
    temperature : float
        Divides the logits.

    Returns
    -------
    ndarray, shape (n, channels)
    """
    scaled = logits / np.float32(temperature)
    scaled -= scaled.max(axis=-1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=-1, keepdims=True)
    return np.einsum("nc,ncl->nl", weights, scaled.mean(axis=2))


def fit_temperature(scans: list[dict[str, np.ndarray]]) -> float:
    """The temperature under which the reference labels of some scans are most likely.

    Every scan counts alike.

    Parameters
    ----------
    scans : list of dict
        ``logits`` and ``weights`` as `tempered` takes them, ``fold`` (targets, channels) that
        merges channels into the labels of the reference, ``target`` (n,) its channel.
    """
    from scipy import optimize

    def loss(log_temperature: float) -> float:
        losses = [likelihood(scan, float(np.exp(log_temperature))).mean() for scan in scans]
        return float(np.mean(losses))

    found = optimize.minimize_scalar(
        loss, bounds=np.log(SEARCHED).tolist(), method="bounded", options={"xatol": 0.01}
    )
    return float(np.exp(found.x))


def likelihood(scan: dict[str, np.ndarray], temperature: float) -> np.ndarray:
    """Negative log likelihood of the reference at every sampled point, (n,)."""
    probabilities = folded(scan, temperature)
    right = probabilities[np.arange(len(probabilities)), scan["target"]]
    return -np.log(np.maximum(right, 1e-6))


def folded(scan: dict[str, np.ndarray], temperature: float) -> np.ndarray:
    """Probabilities of the reference's labels, (n, targets), rows summing to 1."""
    found = tempered(scan["logits"].astype(np.float32), scan["weights"], temperature)
    found = found @ scan["fold"].T
    return found / np.maximum(found.sum(axis=1, keepdims=True), 1e-6)


def fit_dice(table: pd.DataFrame) -> dict[str, float]:
    """By how much the true Dice of each structure is above the expected one.

    The mean of a structure is drawn towards that of all, the more the fewer subjects it rests on
    and the less structures differ beyond what subjects do (James-Stein estimate: Efron & Morris
    1975, doi:10.1080/01621459.1975.10479864; the spread between structures by moments: DerSimonian
    & Laird 1986, doi:10.1016/0197-2456(86)90046-2).

    Parameters
    ----------
    table : DataFrame
        A row per structure and held-out scan: structure, subject, expected, dice.

    Returns
    -------
    dict of str to float
    """
    rows = table.dropna(subset=["expected", "dice"])
    beyond = (rows["dice"] - rows["expected"]).groupby([rows["structure"], rows["subject"]]).mean()
    found = beyond.groupby("structure").agg(["mean", "var", "size"])
    noise = found["var"].mean() / found["size"]
    between = max(0.0, found["mean"].var() - noise.mean())
    kept = between / (between + noise) if between > 0 else 0.0 * noise
    middle = found["mean"].mean()
    offset = middle + kept.fillna(1.0) * (found["mean"] - middle)
    return {str(name): float(value) for name, value in offset.items()}


def fit_intervals(
    table: pd.DataFrame, level: float
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Ends of the prediction interval of a volume, as shares of the soft volume.

    Scans of one subject are not independent, so Student's t has the subjects' degrees of freedom.

    Parameters
    ----------
    table : DataFrame
        A row per structure and held-out scan: structure, subject, soft_mm3, reference_mm3.
    level : float
        Probability to hold the reference's volume, 0 to 1.

    Returns
    -------
    low, high : dict of str to float
        Structures of fewer than `LEAST_SUBJECTS` subjects are left out.
    """
    rows = table[(table["soft_mm3"] > 0) & (table["reference_mm3"] > 0)]
    low, high = {}, {}
    for name, part in rows.groupby("structure"):
        subjects = part["subject"].nunique()
        if subjects < LEAST_SUBJECTS:
            continue
        ratio = np.log(part["reference_mm3"] / part["soft_mm3"])
        reach = special.stdtrit(subjects - 1, (1 + level) / 2) * np.sqrt(1 + 1 / subjects)
        middle, width = float(ratio.mean()), float(reach * ratio.std(ddof=1))
        low[str(name)], high[str(name)] = np.exp(middle - width), np.exp(middle + width)
    return {k: float(v) for k, v in low.items()}, {k: float(v) for k, v in high.items()}
