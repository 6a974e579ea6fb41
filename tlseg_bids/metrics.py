"""How well two label maps agree, structure by structure.

========================  ====================================================================
Dice                      2|A∩B| ÷ (|A|+|B|). Dice 1945, doi:10.2307/1932409
Weighted Dice             mean of the Dice over structures, weighted by 1 ÷ reference volume.
                          Kushibar et al. 2019, doi:10.1038/s41598-019-43299-z
Volume similarity         1 − ||A|−|B|| ÷ (|A|+|B|). Taha & Hanbury 2015,
                          doi:10.1186/s12880-015-0068-x
HD95, mm                  larger of the two directed 95th percentiles of the distances between
                          the surfaces. Huttenlocher et al. 1993, doi:10.1109/34.232073
ASSD, mm                  mean of all distances from either surface to the other.
                          Heimann et al. 2009, doi:10.1109/TMI.2009.2013851
Limits of agreement       mean difference of volumes ± 1.96 standard deviations over scans.
                          Bland & Altman 1986, doi:10.1016/S0140-6736(86)90837-8
ECE                       mean |share that is right − mean confidence| over bins of confidence,
                          weighted by their voxels. Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602
========================  ====================================================================

The surface of a structure is the centres of those of its voxels that share a face with another
voxel, in millimetres: the grid may be oblique and anisotropic. Where a structure is in neither
map nothing is measured (NaN); where it is in one of them Dice and similarity are 0 and the
distances NaN.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree

from tlseg_bids.errors import ScanError, UsageError
from tlseg_bids.grid import Grid, difference
from tlseg_bids.labels.mapping import LEFT_OUT, LabelMapping, look_up
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.volume import Volume

MAX_UNKNOWN_SHARE = 0.01
AGREEMENT_SD = 1.96
AGREEMENT_COLUMNS = (
    "index", "name", "scans", "dice", "volume_r", "bias_mm3", "sd_mm3", "low_mm3", "high_mm3",
    "bias_percent",
)  # fmt: skip


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two boolean arrays; NaN if both are empty."""
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(predicted & reference)) / total if total else float("nan")


def volume_similarity(predicted: float, reference: float) -> float:
    """1 − |difference| ÷ sum of two volumes (any unit); NaN if both are 0."""
    total = predicted + reference
    return 1 - abs(predicted - reference) / total if total else float("nan")


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equally wide bins of confidence; NaN of nothing.

    Parameters
    ----------
    confidence : ndarray, shape (n,)
        Probability of the label that was chosen, 0 to 1.
    correct : ndarray of bool, shape (n,)
        Whether it is the reference's.
    bins : int
        Guo et al. 2017 (arXiv:1706.04599) take 15.
    """
    if not len(confidence):
        return float("nan")
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    surplus = np.bincount(place, correct.astype(float) - confidence, minlength=bins)
    return float(np.abs(surplus).sum() / len(confidence))


def weighted_dice(table: pd.DataFrame) -> float:
    """Mean Dice weighted by 1 ÷ ``reference_mm3``; structures that are absent do not count.

    Parameters
    ----------
    table : DataFrame
        As `compare` gives.
    """
    scored = table[(table["reference_mm3"] > 0) & table["dice"].notna()]
    if scored.empty:
        return float("nan")
    return float(np.average(scored["dice"], weights=1 / scored["reference_mm3"]))


def surface_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Surface voxels of a structure.

    Parameters
    ----------
    mask : ndarray of bool, shape (I, J, K)
    affine : ndarray, shape (4, 4)

    Returns
    -------
    ndarray, shape (n, 3)
        Millimetres. A voxel on the array's face counts as surface.
    """
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found or found[0] is None:
        return np.zeros((0, 3))
    box = found[0]
    part = np.pad(mask[box], 1)
    index = np.argwhere(part & ~ndimage.binary_erosion(part)) - 1 + [s.start for s in box]
    return index @ affine[:3, :3].T + affine[:3, 3]


def surface_distances(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """HD95 and ASSD between two sets of points.

    Parameters
    ----------
    predicted, reference : ndarray, shapes (n, 3) and (m, 3)
        Surface points, mm.

    Returns
    -------
    hd95, assd : float
        mm; NaN if a set is empty.
    """
    if not len(predicted) or not len(reference):
        return float("nan"), float("nan")
    there = cKDTree(reference).query(predicted)[0]
    back = cKDTree(predicted).query(reference)[0]
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hd95), float((there.sum() + back.sum()) / (len(there) + len(back)))


def compare(
    predicted: Volume, reference: Volume, protocol: LabelProtocol,
    mapping: LabelMapping | None = None, distances: bool = True, both: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Score every structure that both sides can name.

    Parameters
    ----------
    predicted, reference : Volume
        Integer labels on the same grid.
    protocol : LabelProtocol
        What the labels of `predicted` mean, and those of `reference` if there is no mapping.
    mapping : LabelMapping, optional
        To `protocol` (then the reference is mapped) or from it (then the prediction is).
    distances : bool
        Whether to measure HD95 and ASSD (seconds rather than tenths).
    both : bool
        The reference is in `protocol`, too: it goes through the mapping as the prediction does.

    Returns
    -------
    DataFrame
        index, name, group, subcortical14, dice, volume_similarity, hd95_mm, assd_mm,
        predicted_mm3, reference_mm3. `attrs["left_out_mm3"]` is the volume that could not be
        scored, `attrs["unknown"]` the labels of the reference in no table.

    Raises
    ------
    ScanError
        If the grids differ.
    UsageError
        If the mapping has nothing to do with the protocol, or the reference is in another one.
    """
    _check_same_grid(predicted.grid, reference.grid)
    unknown = _unknown(reference.data, protocol, None if both else mapping)
    truth = _folded(reference.data, protocol, mapping) if both else reference.data
    common, left, right = _common(predicted.data, truth, protocol, mapping)
    _check_predicted(predicted.data, protocol)
    ignore = (left == LEFT_OUT) | (right == LEFT_OUT)
    if mapping is not None:
        ignore |= np.isin(right, mapping.unreached)
    left, right = np.where(ignore, 0, left), np.where(ignore, 0, right)
    skip = set(mapping.unreached) if mapping is not None else set()
    rows = [
        _row(row, left, right, predicted.grid, distances)
        for row in common.table.iloc[1:].to_dict("records")
        if row["index"] not in skip
    ]
    table = pd.DataFrame(rows)
    table.attrs["left_out_mm3"] = float(ignore.sum() * predicted.grid.voxel_mm3)
    table.attrs["unknown"] = unknown
    return table


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Means over structures of every score, and of the Dice over the 14 sub-cortical ones."""
    deep = table[table["subcortical14"].astype(int) == 1]
    out = {"dice": table["dice"].mean(), "dice_subcortical14": deep["dice"].mean()}
    out["weighted_dice"] = weighted_dice(table)
    for column in ("volume_similarity", "hd95_mm", "assd_mm"):
        out[column] = table[column].mean()
    return {key: float(value) for key, value in out.items()}


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How predicted and reference volumes agree over scans, structure by structure.

    Parameters
    ----------
    table : DataFrame
        Rows of `compare` for several scans.

    Returns
    -------
    DataFrame
        index, name, scans (in which either side has the structure), dice (mean), volume_r
        (Pearson's; NaN below three scans or without spread), bias_mm3 (mean of predicted −
        reference), sd_mm3 of the difference, low_mm3 and high_mm3 (limits of agreement; NaN for
        one scan), bias_percent (of the mean of both).
    """
    rows = []
    for (index, name), part in table.groupby(["index", "name"], sort=False):
        there = part[(part["predicted_mm3"] > 0) | (part["reference_mm3"] > 0)]
        if there.empty:
            continue
        one, other = there["predicted_mm3"], there["reference_mm3"]
        gap, mean = one - other, (one + other).mean() / 2
        spread = gap.std(ddof=1)
        varied = len(there) > 2 and one.nunique() > 1 and other.nunique() > 1
        rows.append({
            "index": index, "name": name, "scans": len(there), "dice": there["dice"].mean(),
            "volume_r": float(np.corrcoef(one, other)[0, 1]) if varied else float("nan"),
            "bias_mm3": gap.mean(), "sd_mm3": spread,
            "low_mm3": gap.mean() - AGREEMENT_SD * spread,
            "high_mm3": gap.mean() + AGREEMENT_SD * spread,
            "bias_percent": 100 * gap.mean() / mean,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def _check_same_grid(predicted: Grid, reference: Grid) -> None:
    """Refuse to compare voxels that lie elsewhere."""
    apart = difference(predicted, reference, "the prediction")
    if apart:
        raise ScanError(
            f"the reference lies on another grid than the prediction: {apart}",
            "predicted and reference", "compare label images of the same scan",
        )  # fmt: skip


def _common(
    predicted: np.ndarray, reference: np.ndarray, protocol: LabelProtocol,
    mapping: LabelMapping | None,
) -> tuple[LabelProtocol, np.ndarray, np.ndarray]:  # fmt: skip
    """Both label arrays in one protocol, `LEFT_OUT` where they have no meaning in it."""
    own = {int(label): int(label) for label in protocol.indices}
    if mapping is None:
        return protocol, look_up(predicted, own), look_up(reference, own)
    if mapping.target.name == protocol.name:
        return protocol, look_up(predicted, own), mapping.apply(reference)
    if mapping.source.name == protocol.name:
        target = {int(label): int(label) for label in mapping.target.indices}
        return mapping.target, mapping.apply(predicted), look_up(reference, target)
    raise UsageError(
        f"mapping '{mapping.name}' neither starts nor ends at protocol '{protocol.name}'", "",
        "choose another mapping or protocol",
    )  # fmt: skip


def _folded(
    reference: np.ndarray, protocol: LabelProtocol, mapping: LabelMapping | None
) -> np.ndarray:
    """A reference in the prediction's protocol, mapped."""
    if mapping is None or mapping.source.name != protocol.name:
        given = "no mapping is given" if mapping is None else f"'{mapping.name}' starts elsewhere"
        raise UsageError(
            f"both label images are in '{protocol.name}', and {given}",
            "--map-both", f"give --mapping {protocol.name}_to_… with it, or leave it out",
        )  # fmt: skip
    return mapping.apply(reference)


def _unknown(
    reference: np.ndarray, protocol: LabelProtocol, mapping: LabelMapping | None
) -> tuple[int, ...]:
    """Labels of the reference that its protocol does not know; few voxels of them are tolerated."""
    if mapping is not None:
        protocol = mapping.source if mapping.target.name == protocol.name else mapping.target
    strange = ~np.isin(reference, protocol.indices)
    labels = tuple(int(label) for label in np.unique(reference[strange]))
    share = np.count_nonzero(strange) / max(1, np.count_nonzero(reference))
    if share > MAX_UNKNOWN_SHARE:
        raise UsageError(
            f"{share:.0%} of the labelled voxels of the reference have labels that protocol "
            f"'{protocol.name}' does not know, such as {labels[0]}",
            "--mapping", "name the mapping between the two protocols",
        )  # fmt: skip
    return labels


def _check_predicted(labels: np.ndarray, protocol: LabelProtocol) -> None:
    """A prediction with labels of its own would escape the scoring."""
    strange = np.setdiff1d(np.unique(labels), protocol.indices)
    if strange.size:
        raise UsageError(
            f"the prediction holds label {int(strange[0])}, which protocol '{protocol.name}' "
            "does not know",
            "--protocol", "name the protocol of the prediction",
        )  # fmt: skip


def _row(
    row: dict, predicted: np.ndarray, reference: np.ndarray, grid: Grid, distances: bool
) -> dict:
    """Scores of one structure."""
    one, other = predicted == row["index"], reference == row["index"]
    mm3 = [float(np.count_nonzero(m) * grid.voxel_mm3) for m in (one, other)]
    hd95 = assd = float("nan")
    if distances and all(mm3):
        surfaces = (surface_mm(m, grid.affine) for m in (one, other))
        hd95, assd = surface_distances(*surfaces)
    return {
        "index": int(row["index"]),
        "name": row["name"],
        "group": row["group"],
        "subcortical14": int(row["subcortical14"]),
        "dice": dice(one, other),
        "volume_similarity": volume_similarity(*mm3),
        "hd95_mm": hd95,
        "assd_mm": assd,
        "predicted_mm3": mm3[0],
        "reference_mm3": mm3[1],
    }
