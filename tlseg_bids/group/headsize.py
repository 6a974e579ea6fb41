"""Correction of volumes for head size: the three ways of the literature, fitted and applied."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tlseg_bids.errors import DataError, amount

MIN_FIT = 3
FEW = 20
UNITS = {"ratio": "1", "residual": "mm^3", "power-proportion": "mm^3"}
FORMULAS = {
    "ratio": "volume / head size",
    "residual": "volume − slope · (head size − mean head size), slope of volume on head size by "
    "least squares (Jack et al. 1989, Radiology 172:549-554)",
    "power-proportion": "volume · (mean head size / head size)^exponent, exponent by least squares "
    "of log volume on log head size, the mean geometric (Liu et al. 2014, "
    "https://doi.org/10.3389/fnins.2014.00356)",
}


@dataclass(frozen=True, eq=False)
class HeadSize:
    """A fitted correction.

    Parameters
    ----------
    method : str
        ``ratio``, ``residual`` or ``power-proportion``.
    measure : str
        ``icv`` or ``brain``.
    reference_mm3 : float
        Head size that volumes are corrected to (not used by ``ratio``).
    slopes : ndarray, shape (features,)
        Slope (``residual``, mm³ per mm³) or exponent; NaN where it cannot be estimated.
    scans : int
        Scans of the fit; 0 for ``ratio``, which has none.
    """

    method: str
    measure: str
    reference_mm3: float
    slopes: np.ndarray
    scans: int

    def apply(self, values: np.ndarray, size_mm3: np.ndarray) -> np.ndarray:
        """Corrected volumes, shape (scans, features); NaN where the head size is unknown.

        Parameters
        ----------
        values : ndarray, shape (scans, features)
            Volumes, mm³.
        size_mm3 : ndarray, shape (scans,)
            Head size of each scan, mm³.
        """
        size = size_mm3[:, None]
        if self.method == "ratio":
            return values / size
        if self.method == "residual":
            return values - self.slopes * (size - self.reference_mm3)
        return values * (self.reference_mm3 / size) ** self.slopes


def fit_head_size(
    method: str, measure: str, values: np.ndarray, size_mm3: np.ndarray, fit: np.ndarray,
    harmonised: bool = False,
) -> HeadSize:  # fmt: skip
    """Estimate a correction on some of the scans.

    Parameters
    ----------
    method, measure : str
        As in `HeadSize`.
    values : ndarray, shape (scans, features)
        Volumes, mm³.
    size_mm3 : ndarray, shape (scans,)
        Head sizes, mm³; NaN where unknown.
    fit : ndarray of bool, shape (scans,)
        Scans to estimate from.
    harmonised : bool
        Whether the volumes are those after ComBat, as the error message tells.

    Raises
    ------
    DataError
        If no scan has a head size, or too few have one for a slope.

    References
    ----------
    residual: Jack et al. 1989, Radiology 172:549-554; power-proportion:
    https://doi.org/10.3389/fnins.2014.00356
    """
    where = f"--icv-correction {method}"
    name = {"icv": "intracranial volume", "brain": "brain volume"}[measure]
    if np.isnan(size_mm3).all():
        other = "brain" if measure == "icv" else "icv"
        article = "a harmonised" if harmonised else {"icv": "an", "brain": "a"}[measure]
        leave = "the correction or ComBat" if harmonised else "the correction"
        raise DataError(
            f"no scan has {article} {name}", where,
            f"correct by the other volume (--head-size {other}), or leave {leave} out",
        )  # fmt: skip
    if method == "ratio":
        return HeadSize(method, measure, 1.0, np.ones(values.shape[1]), 0)
    use = fit & np.isfinite(size_mm3)
    if use.sum() < MIN_FIT or np.ptp(size_mm3[use]) == 0:
        raise DataError(
            f"{amount(int(use.sum()), 'scan')} with a different {name} "
            f"{'is' if use.sum() == 1 else 'are'} too few for a slope", where,
            f"give at least {MIN_FIT}, choose --icv-correction ratio, or apply an earlier fit "
            "(--group-parameters)",
        )  # fmt: skip
    size, volumes = size_mm3[use], values[use]
    if method == "residual":
        slopes = np.array([_slope(size, column) for column in volumes.T])
        return HeadSize(method, measure, float(size.mean()), slopes, int(use.sum()))
    log_size = np.log(size)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.array([_slope(log_size, np.log(column)) for column in volumes.T])
    return HeadSize(method, measure, float(np.exp(log_size.mean())), slopes, int(use.sum()))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope over the finite pairs; NaN with fewer than `MIN_FIT` of them."""
    good = np.isfinite(y)
    if good.sum() < MIN_FIT:
        return np.nan
    centred = x[good] - x[good].mean()
    spread = float(centred @ centred)
    return float(centred @ (y[good] - y[good].mean())) / spread if spread > 0 else np.nan
