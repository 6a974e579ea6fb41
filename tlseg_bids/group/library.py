"""The library combatlearn: what its ComBat does to a volume, as plain numbers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tlseg_bids.errors import DataError
from tlseg_bids.group.bayes import shrink


@dataclass(frozen=True, eq=False)
class Asked:
    """What the library is asked for.

    Parameters
    ----------
    reference : str or None
        The site that stays as it is.
    pooled : ndarray of bool, shape (features,)
        Features that the priors of a site are taken over.
    """

    reference: str | None
    pooled: np.ndarray


def site_lines(
    values: np.ndarray, sites: np.ndarray, design: np.ndarray, large: list[str], asked: Asked
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Scale, offset and coefficients of every site: what the fitted ComBat does to probes.

    The library is asked for 0, for the mean, and for each covariate in turn; as it is linear in
    all of them, the answers give the line exactly.

    Parameters
    ----------
    values : ndarray, shape (scans, features)
        Volumes, mm³, that are known and vary at every site.
    sites : ndarray of str, shape (scans,)
    design : ndarray, shape (scans, columns)
        Covariates to keep.
    large : list of str
        The sites among them.
    asked : Asked

    Returns
    -------
    lines : dict
        Site to its numbers, shape (2 + design columns, features), as `SiteEffects` has them.
    said : list of str
        What the library warned of.

    Raises
    ------
    DataError
        If the library is not installed, or is one that estimates otherwise.
    """
    centre, spread = design.mean(axis=0), design.std(axis=0)
    level = values.mean(axis=0)
    columns = design.shape[1]
    steps = np.concatenate([np.zeros((2, columns)), np.eye(columns)])
    ask = np.concatenate([[np.zeros_like(level), level], np.zeros((columns, len(level)))])
    probes = [np.tile(ask, (len(large), 1)), np.tile(steps, (len(large), 1))]
    table = pd.DataFrame(np.concatenate([values, probes[0]]))
    covariates = pd.DataFrame(np.concatenate([(design - centre) / spread, probes[1]]))
    batch = pd.Series(np.concatenate([sites, np.repeat(large, len(ask))]))
    combat = _published(asked)
    parts = [
        {"batch": batch[part], "continuous_covariates": covariates[part] if columns else None}
        for part in (slice(len(values)), slice(len(values), None))
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        combat.fit(table[: len(values)], **parts[0])
        answers = combat.transform(table[len(values) :], **parts[1]).to_numpy()
    _check_shrunk(combat)
    numbers = {}
    for site, answer in zip(large, np.split(answers, len(large)), strict=True):
        coefficients = (answer[2:] - answer[0]) / spread[:, None]
        offset = answer[0] - (coefficients * centre[:, None]).sum(axis=0)
        numbers[site] = np.stack([(answer[1] - answer[0]) / level, offset, *coefficients])
    said = {str(one.message).splitlines()[0] for one in caught if one.category is UserWarning}
    return numbers, [f"ComBat: {text}" for text in sorted(said)]


def _published(asked: Asked) -> Any:
    """The library's model with the priors as published.

    Version 2.3 takes the priors of each structure over the sites instead of those of each site
    over the structures, which leaves up to a third of an effect that a scanner has on all of them.
    """
    try:
        from combatlearn import core
    except ImportError as error:
        raise DataError(
            "the library combatlearn is not installed", "--combat",
            'install it: pip install "tlseg-bids[harmonise]"',
        ) from error  # fmt: skip

    class Published(core.ComBatModel):
        shrunk = False

        def _shrink_eb(self, gamma_hat, delta_hat, n_per_batch, _names):
            self.shrunk = True
            return shrink(gamma_hat, delta_hat, n_per_batch, asked.pooled)

    return Published(method="fortin", reference_batch=asked.reference)


def _check_shrunk(combat: Any) -> None:
    """Refuse a version of the library that does not ask for the priors as published."""
    if not combat.shrunk:
        raise DataError(
            "this version of the library combatlearn estimates ComBat in a way that is not known "
            "here", "--combat", 'install another: pip install "tlseg-bids[harmonise]"',
        )  # fmt: skip
