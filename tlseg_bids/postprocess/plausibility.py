"""Whether what was labelled can be: brain volume at this age, which way up, and of one piece.

Brain volume by age (both sexes, mm³, tissue and ventricles) is a chain of published figures:

- birth 341,000, and 64 % more after 90 days: Holland et al. 2014, doi:10.1001/jamaneurol.2014.1638;
- from 2–4 weeks to one year + 101 %, to two years + 15 %: Knickmeyer et al. 2008,
  doi:10.1523/JNEUROSCI.3479-08.2008;
- from 26 months to 14 years + 26 % (25 to 27), thereafter down to that of 26 months at 71 to 80
  years: Courchesne et al. 2000, doi:10.1148/radiology.216.3.r00au37672.

Between these ages its logarithm is interpolated linearly. Before term nothing is expected: no
source reaches there, and a brain is then far smaller than at birth.
"""

from __future__ import annotations

import numpy as np

from tlseg_bids.bids.scan import Age
from tlseg_bids.postprocess.image_quality import neighbours
from tlseg_bids.zoo.card import DAYS_PER_YEAR, TERM_WEEKS, age_in_years

_BIRTH_MM3 = 341_000.0
_THREE_WEEKS_MM3 = _BIRTH_MM3 * 1.215  # 1 % a day at birth, 0.4 % after 90 days
_ONE_YEAR_MM3 = _THREE_WEEKS_MM3 * 2.01
_TWO_YEARS_MM3 = _ONE_YEAR_MM3 * 1.15
BRAIN_BY_AGE = {
    0.0: _BIRTH_MM3,
    90 / 365.25: _BIRTH_MM3 * 1.64,
    1.0: _ONE_YEAR_MM3,
    26 / 12: _TWO_YEARS_MM3,
    14.0: _TWO_YEARS_MM3 * 1.26,
    75.5: _TWO_YEARS_MM3,
}
"""Age in years → mm³."""
CORRECTED_YEARS = 2.0
"""Up to this age since birth, a brain is as far as its post-menstrual age says."""


def judged_age_years(age: Age) -> float | None:
    """Age by which a brain is judged: since term in the first years, else since birth.

    Returns
    -------
    float or None
        Years since 40 post-menstrual weeks where these are known and the child is not
        `CORRECTED_YEARS` old, else years since birth; None where neither is known, or before term.
    """
    years = age_in_years(age)
    if age.pma_weeks is None or (age.days is not None and years >= CORRECTED_YEARS):
        return years
    since_term = (age.pma_weeks - TERM_WEEKS) * 7 / DAYS_PER_YEAR
    return since_term if since_term >= 0 else None


def expected_brain_mm3(age_years: float) -> float:
    """Mean brain volume at an age since birth in years; beyond the last age that of the last."""
    ages = list(BRAIN_BY_AGE)
    logs = np.log(list(BRAIN_BY_AGE.values()))
    return float(np.exp(np.interp(age_years, ages, logs)))


def turned_degrees(template_from_scan: np.ndarray) -> float:
    """Angle between the axes that the header names and those of the brain, 0 to 180 degrees.

    Parameters
    ----------
    template_from_scan : ndarray, shape (4, 4)
        World mm to template mm; its nearest rotation counts.
    """
    u, _, vt = np.linalg.svd(template_from_scan[:3, :3])
    cosine = (np.trace(u @ vt) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def euler_number(mask: np.ndarray) -> int:
    """Vertices − edges + faces − voxels of a mask (I, J, K): pieces − handles + cavities.

    Voxels are closed cubes, so those that share a corner hang together.
    """
    padded = np.pad(mask, 1)
    count = 0
    for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        touched = padded
        for axis in axes:
            touched = np.logical_or(*neighbours(touched, axis))
        count -= (-1) ** len(axes) * int(np.count_nonzero(touched))
    return count
