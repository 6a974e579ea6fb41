"""ComBat: the effect of the site is estimated with combatlearn and kept as plain numbers.

What ComBat does to a volume is, for every site and structure, a line:
``harmonised = scale · volume + offset + Σ coefficient · covariate``. These numbers are saved, so a
later run, or any other program, applies the same fit to new subjects without the library.

ComBat: Johnson et al. 2007, https://doi.org/10.1093/biostatistics/kxj037; with covariates for
imaging: Fortin et al. 2018, https://doi.org/10.1016/j.neuroimage.2017.11.024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tlseg_bids.errors import DataError, UsageError, amount, listed
from tlseg_bids.group.design import Covariate, covariates_of, design_of
from tlseg_bids.group.library import Asked, site_lines
from tlseg_bids.group.study import TOTALS, known

MIN_SITE = 3
FEW = 10
MOST_INFLATION = 10.0
"""Variance inflation from which site and covariate can hardly be told apart: a rule of thumb, on
which see O'Brien 2007, https://doi.org/10.1007/s11135-006-9018-6."""


@dataclass(frozen=True)
class SiteColumn:
    """The column that names the site of each scan.

    Parameters
    ----------
    name : str
        Its head.
    cells : sequence of str
        Site of each scan; ``n/a`` where unknown.
    reference : str, optional
        The site that stays as it is.
    """

    name: str
    cells: Sequence[str]
    reference: str | None = None


@dataclass(frozen=True, eq=False)
class SiteEffects:
    """A fitted ComBat.

    Parameters
    ----------
    column : str
        The column that names the site.
    reference : str or None
        The site that stays as it is.
    covariates : tuple of Covariate
        What is kept.
    sites : dict
        Site to its numbers, shape (2 + design columns, features): scale, offset in mm³, and a
        coefficient for every design column. NaN for a feature that cannot be harmonised.
    scans : dict
        Site to its scans in the fit.
    published : bool
        Whether its priors are those of the published formulas; a fit that was saved before they
        were has others.
    """

    column: str
    reference: str | None
    covariates: tuple[Covariate, ...]
    sites: dict[str, np.ndarray]
    scans: dict[str, int] = field(default_factory=dict)
    published: bool = True

    def apply(self, values: np.ndarray, sites: Sequence[str], design: np.ndarray) -> np.ndarray:
        """Harmonised volumes; NaN for a site that is not in the fit or an unknown covariate.

        Parameters
        ----------
        values : ndarray, shape (scans, features)
            Volumes, mm³.
        sites : sequence of str
            Site of each scan.
        design : ndarray, shape (scans, columns)
            Covariates, as `design_of` gives them.
        """
        result = np.full(values.shape, np.nan)
        for site, numbers in self.sites.items():
            here = np.array([name == site for name in sites], bool)
            scale, offset, *coefficients = numbers
            moved = scale * values[here] + offset
            for column, coefficient in enumerate(coefficients):
                moved = moved + design[here, column, None] * coefficient
            stays = np.where(np.isfinite(scale), values[here], np.nan)
            result[here] = stays if site == self.reference else moved
        return result


def fit_combat(
    values: np.ndarray,
    column: SiteColumn,
    columns: Mapping[str, Sequence[str]],
    fit: np.ndarray,
    names: Sequence[str] = (),
) -> tuple[SiteEffects, list[str]]:
    """Estimate the effect of the site.

    A feature that some scans of the fit lack (the intracranial volume) is fitted on those that
    have it, together with all features that these scans have.

    Parameters
    ----------
    values : ndarray, shape (scans, features)
        Volumes, mm³.
    column : SiteColumn
        Which site each scan is of.
    columns : mapping
        Covariates to keep: column to its cells.
    fit : ndarray of bool, shape (scans,)
        Scans to estimate from. Those without site or covariate are left out.
    names : sequence of str, optional
        Features, for the sentences on those that some scans lack; the priors of a site are taken
        over those that are no `TOTALS`.

    Returns
    -------
    effects : SiteEffects
    notes : list of str
        What was left out, and why.

    Raises
    ------
    DataError
        If fewer than two sites can be compared, or the sites and the covariates cannot be told
        apart.
    UsageError
        If the reference is no site of the fit.
    """
    sites = np.array(column.cells, str)
    covariates = covariates_of(columns, fit)
    design = design_of(covariates, columns, len(values))
    use = fit & ~np.isnan(design).any(axis=1) & np.array([known(site) for site in sites])
    found, scans = np.unique(sites[use], return_counts=True)
    counts = dict(zip(found.tolist(), scans.tolist(), strict=True))
    large = [site for site, count in counts.items() if count >= MIN_SITE]
    _check_sites(counts, large, column)
    use &= np.isin(sites, large)
    covariates = covariates_of(columns, use)  # a level of the small sites alone is no more
    design = design_of(covariates, columns, len(values))
    chosen = sites[use]
    _check_rank(chosen, design[use], large, column.name)
    pooled = np.array([name not in TOTALS for name in names] or [True] * values.shape[1])
    asked = Asked(column.reference, pooled)
    numbers, said = _by_gaps(values[use], chosen, design[use], large, asked)
    notes = [*_size_notes(counts, large), *_entangled_notes(chosen, covariates, design[use]), *said]
    notes += _gap_notes(np.isfinite(values), use, numbers, names)
    fitted = {site: counts[site] for site in large}
    return SiteEffects(column.name, column.reference, covariates, numbers, fitted), notes


def site_share(values: np.ndarray, sites: Sequence[str], design: np.ndarray) -> np.ndarray:
    """Share of the variance that the site explains beyond the covariates (partial η²), 0 to 1.

    Parameters
    ----------
    values : ndarray, shape (scans, features)
    sites : sequence of str
    design : ndarray, shape (scans, columns)
        Covariates. Scans with anything unknown are left out, feature by feature.

    Returns
    -------
    ndarray, shape (features,)
        NaN where nothing is left to explain. By chance alone about (sites − 1) / scans.
    """
    names = np.array(sites, str)
    dummies = np.stack([names == name for name in np.unique(names)], axis=1).astype(float)
    shares = np.full(values.shape[1], np.nan)
    for f, column in enumerate(values.T):
        use = np.isfinite(column) & ~np.isnan(design).any(axis=1)
        small = np.concatenate([np.ones((use.sum(), 1)), design[use]], axis=1)
        large = np.concatenate([dummies[use], design[use]], axis=1)
        if len(small) > large.shape[1] and (without := _residual(small, column[use])) > 0:
            shares[f] = 1 - _residual(large, column[use]) / without
    return shares


def _residual(design: np.ndarray, y: np.ndarray) -> float:
    """Sum of squares that a least-squares fit leaves."""
    scale = np.abs(design).max(axis=0)
    design = design / np.where(scale > 0, scale, 1)
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(left @ left)


def _check_sites(counts: Mapping[str, int], large: list[str], column: SiteColumn) -> None:
    """Refuse sites too few to be compared, and a reference that is none of them."""
    if len(large) < 2:
        raise DataError(
            f"{amount(len(large), 'site has', 'sites have')} the {MIN_SITE} scans that ComBat "
            "needs (of "
            f"{listed(f'{site}: {count}' for site, count in counts.items()) or 'no site'})",
            f"--combat {column.name}",
            "widen --fit-where, leave out a covariate that is often unknown, or leave ComBat out",
        )  # fmt: skip
    if column.reference is not None and column.reference not in large:
        raise UsageError(
            f"the reference site '{column.reference}' is not among the sites of the fit",
            "--combat-reference", f"choose from {listed(large)}",
        )  # fmt: skip


def _size_notes(counts: Mapping[str, int], large: list[str]) -> list[str]:
    small = [f"{s} ({amount(n, 'scan')})" for s, n in counts.items() if n < MIN_SITE]
    few = [f"{s} ({counts[s]})" for s in large if counts[s] < FEW]
    notes = []
    if small:
        notes.append(
            f"ComBat leaves out sites with fewer than {MIN_SITE} scans in the fit: {listed(small)};"
            " their harmonised volumes are n/a"
        )
    if few:
        notes.append(
            f"sites with fewer than {FEW} scans in the fit have an uncertain correction: "
            f"{listed(few)}"
        )
    return notes


def _entangled_notes(
    sites: np.ndarray, covariates: Sequence[Covariate], design: np.ndarray
) -> list[str]:
    """Sentences on covariates that vary between the sites and hardly within them."""
    notes = []
    names = [name for covariate in covariates for name in covariate.names]
    for name, column in zip(names, design.T, strict=True):
        within = sum(column[sites == site].var() * (sites == site).mean() for site in set(sites))
        if column.var() >= MOST_INFLATION * within:
            share = 100 * (1 - within / column.var())
            notes.append(
                f"{share:.0f} % of the variance of '{name}' lies between the sites of the fit: "
                "what is of the site and what of the covariate can hardly be told apart, so that "
                "harmonised volumes may keep the one or lose the other"
            )
    return notes


def _check_rank(sites: np.ndarray, design: np.ndarray, large: list[str], column: str) -> None:
    if not _separable(sites, design, large):
        raise DataError(
            "the effect of the sites cannot be told from that of the covariates: a covariate does "
            f"not vary within the sites, or there are too few scans ({len(sites)})",
            f"--combat {column}", "leave out a covariate, or widen --fit-where",
        )  # fmt: skip


def _separable(sites: np.ndarray, design: np.ndarray, large: list[str]) -> bool:
    """Whether the effects of the sites and those of the covariates can be told apart."""
    dummies = np.stack([sites == site for site in large], axis=1).astype(float)
    spread = design.std(axis=0)
    centred = (design - design.mean(axis=0)) / np.where(spread > 0, spread, 1)
    both = np.concatenate([dummies, centred], axis=1)
    return len(both) > both.shape[1] and np.linalg.matrix_rank(both) == both.shape[1]


def _by_gaps(
    values: np.ndarray, sites: np.ndarray, design: np.ndarray, large: list[str], asked: Asked
) -> tuple[dict[str, np.ndarray], list[str]]:
    """`site_lines` of every set of features that the same scans have; NaN without a fit."""
    here = np.isfinite(values)
    numbers = {site: np.full((2 + design.shape[1], values.shape[1]), np.nan) for site in large}
    said: list[str] = []
    for pattern in np.unique(here, axis=1).T:
        rows = np.flatnonzero(pattern)
        own = (here == pattern[:, None]).all(axis=0)
        there = [s for s in large if (sites[rows] == s).sum() >= MIN_SITE]
        rows = rows[np.isin(sites[rows], there)]
        lost = asked.reference is not None and asked.reference not in there
        if len(there) < 2 or lost or not _separable(sites[rows], design[rows], there):
            continue
        varies = _varies(values[rows], sites[rows], there)
        if not (own & varies).any():
            continue
        own_priors = replace(asked, pooled=asked.pooled[varies])
        lines, told = site_lines(
            values[rows][:, varies], sites[rows], design[rows], there, own_priors
        )
        said += [text for text in told if text not in said]
        for site in there:
            numbers[site][:, own & varies] = lines[site][:, own[varies]]
    return numbers, said


def _gap_notes(
    known_volumes: np.ndarray, use: np.ndarray, numbers: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> list[str]:  # fmt: skip
    """Sentences on the features that some scans of the fit lack."""
    notes = []
    scans = int(use.sum())
    for f, name in enumerate(names):
        count = int(known_volumes[use, f].sum())
        without = [site for site, lines in numbers.items() if np.isnan(lines[0, f])]
        if count == scans or not known_volumes[:, f].any():
            continue
        if len(without) == len(numbers):
            end = "too few for ComBat; its harmonised volumes are n/a"
        else:
            end = "ComBat is fitted on these"
            end += f", and not at {listed(without)}, which have too few" if without else ""
        has = "has" if count == 1 else "have"
        notes.append(f"{count} of the {scans} scans of the fit {has} a volume '{name}': {end}")
    return notes


def _varies(values: np.ndarray, sites: np.ndarray, large: list[str]) -> np.ndarray:
    """Features that are known in every scan of the fit and vary at every site."""
    spread = np.array([np.ptp(values[sites == site], axis=0) for site in large])
    return np.isfinite(values).all(axis=0) & (spread > 0).all(axis=0)
