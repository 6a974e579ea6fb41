"""The empirical Bayes step of ComBat: what all structures tell of a site steadies each of them."""

from __future__ import annotations

import numpy as np

ROUNDS = 1000
SETTLED = 1e-10
LEAST_SPREAD = 1e-12


def shrink(
    location: np.ndarray, scale: np.ndarray, scans: np.ndarray, pooled: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means of the effects of every site, with priors of each site over the structures.

    Parameters
    ----------
    location, scale : ndarray, shape (sites, features)
        Mean and variance of the standardised volumes of each site; the variances above 0.
    scans : ndarray, shape (sites,)
        Scans of each site.
    pooled : ndarray of bool, shape (features,)
        Features that the priors are taken over; the others stay as given, as what a scanner does to
        these says nothing of them.

    Returns
    -------
    location, scale : ndarray, shape (sites, features)
        The same as given where fewer than two features are pooled, which give no prior.

    References
    ----------
    Johnson et al. 2007, https://doi.org/10.1093/biostatistics/kxj037, section 3.2, and Fortin et
    al. 2018, https://doi.org/10.1016/j.neuroimage.2017.11.024: normal and inverse gamma priors by
    the method of moments.
    """
    location, scale = location.copy(), scale.copy()
    if np.count_nonzero(pooled) >= 2:
        for site, count in enumerate(scans):
            own = (site, pooled)
            location[own], scale[own] = _site(location[own], scale[own], count)
    return location, scale


def _site(location: np.ndarray, scale: np.ndarray, scans: float) -> tuple[np.ndarray, np.ndarray]:
    """`shrink` for one site, shape (features,) each: both means in turn until they settle."""
    centre, width = location.mean(), location.var(ddof=1)
    level = scale.mean()
    shape = level**2 / max(scale.var(ddof=1), LEAST_SPREAD * level**2) + 2
    rate = level * (shape - 1)
    squares = (scans - 1) * scale
    variance = scale
    for _ in range(ROUNDS):
        mean = (scans * width * location + variance * centre) / (scans * width + variance)
        before = variance
        variance = (rate + (squares + scans * (location - mean) ** 2) / 2) / (scans / 2 + shape - 1)
        if np.abs(variance / before - 1).max() < SETTLED:
            break
    return mean, variance
