"""What chance does to the statistics of the level ``group``: simulated studies of normal volumes.

Usage: ``python benchmarks/chance.py [STUDIES] [SEED]``

Three tables, each the mean over STUDIES (200) simulated studies of 30 structures, ± 2 standard
errors:

- ``shift``: share of a shift that a scanner gives to all structures that ComBat leaves, and the
  ratio of the sites' standard deviations (1.5 before) after it;
- ``tests``: how often a linear model of the harmonised volumes with age and diagnosis has p < 0.05
  for a diagnosis without effect, without the site and with it, where 80 % are patients at half of
  the sites and 20 % at the others, and where half are patients everywhere;
- ``outliers``: share of volumes that lie beyond the limit, of all scans and compared by age.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from scipy.stats import t as student

from tlseg_bids.group.harmonise import SiteColumn, fit_combat
from tlseg_bids.group.outliers import Z_LIMIT, robust_scores

STRUCTURES = 30
LEVEL, SD = 1000.0, 50.0
SHIFT, RATIO = 0.6, 1.5


def volumes(rng: np.random.Generator, site: np.ndarray, sites: int) -> np.ndarray:
    """Normal volumes (scans, structures) with a shift and a scale of each site, common and own."""
    shift = rng.normal(0, 0.5, (sites, 1)) + rng.normal(0, 0.3, (sites, STRUCTURES))
    scale = np.exp(rng.normal(0, 0.15, (sites, STRUCTURES)))
    return LEVEL + SD * (scale[site] * rng.normal(size=(len(site), STRUCTURES)) + shift[site])


def shift_left(rng: np.random.Generator, scans: int) -> np.ndarray:
    """Share of the shift between two sites and ratio of their sd, after ComBat."""
    site = np.repeat([0, 1], scans)
    values = np.where(site == 1, RATIO**0.5, RATIO**-0.5)[:, None] * rng.normal(
        size=(2 * scans, STRUCTURES)
    )
    values = LEVEL + SD * (values + SHIFT * site[:, None])
    every = np.ones(len(site), bool)
    names = [f"s{n}" for n in site]
    effects, _ = fit_combat(values, SiteColumn("site", names), {}, every)
    after = effects.apply(values, names, np.empty((len(site), 0)))
    gap = after[scans:].mean(0) - after[:scans].mean(0)
    before = values[scans:].mean(0) - values[:scans].mean(0)
    spread = after[scans:].std(0, ddof=1).mean() / after[:scans].std(0, ddof=1).mean()
    return np.array([gap.mean() / before.mean(), spread])


def p_values(values: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Two-sided p (structures,) of the last column of a linear model's design."""
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ values
    free = len(values) - design.shape[1]
    variance = ((values - design @ found) ** 2).sum(0) / free
    return 2 * student.sf(np.abs(found[-1]) / np.sqrt(variance * inverse[-1, -1]), free)


def found_by_chance(rng: np.random.Generator, sites: int, scans: int, uneven: bool) -> np.ndarray:
    """Share of p < 0.05 after ComBat without and with the site in the model."""
    site = np.repeat(np.arange(sites), scans)
    share = np.where(site % 2 == 0, 0.8, 0.2) if uneven else np.full(len(site), 0.5)
    place = np.tile((np.arange(scans) + 0.5) / scans, sites)
    patient, age = (place < share).astype(float), rng.uniform(20, 80, len(site))
    values, names = volumes(rng, site, sites), [f"s{n}" for n in site]
    columns = {"age": [f"{a!r}" for a in age.tolist()], "dx": [f"d{p:.0f}" for p in patient]}
    every = np.ones(len(site), bool)
    effects, _ = fit_combat(values, SiteColumn("site", names), columns, every)
    after = effects.apply(values, names, np.column_stack([age, patient]))
    own = np.eye(sites)[site]
    models = [np.column_stack([np.ones(len(site)), age, patient]),
              np.column_stack([own, age, patient])]  # fmt: skip
    return np.array([(p_values(after, model) < 0.05).mean() for model in models])


def beyond(rng: np.random.Generator, scans: int, aged: bool) -> np.ndarray:
    """Share of normal volumes beyond the limit."""
    age = rng.uniform(20, 80, scans) if aged else np.full(scans, np.nan)
    z = robust_scores(LEVEL + SD * rng.normal(size=(scans, STRUCTURES)), age).z
    return np.array([(np.abs(z) > Z_LIMIT).mean()])


def row(what: str, one: Callable[[], np.ndarray], studies: int) -> None:
    """Print a line: mean ± 2 standard errors of every figure."""
    found = np.array([one() for _ in range(studies)])
    error = 2 * found.std(0, ddof=1) / studies**0.5
    cells = (f"{m:.4f} ± {e:.4f}" for m, e in zip(found.mean(0), error, strict=True))
    print("\t".join([what, *cells]))


def main(words: list[str]) -> int:
    """Simulate and print."""
    if len(words) > 2 or not all(word.isdigit() for word in words):
        print(__doc__, file=sys.stderr)
        return 64
    studies, seed = (int(given) for given in (*words, *("200", "1")[len(words) :]))
    rng = np.random.default_rng(seed)
    print("shift\tshift left\tratio of sd")
    for scans in (10, 20, 50):
        row(f"2 sites of {scans}", lambda n=scans: shift_left(rng, n), studies)
    print("tests\twithout the site\twith it")
    for sites, scans in ((2, 20), (4, 25), (6, 6)):
        for uneven in (True, False):
            name = f"{sites} sites of {scans}, {'uneven' if uneven else 'even'}"
            row(name, lambda a=(sites, scans, uneven): found_by_chance(rng, *a), studies)
    print("outliers\tbeyond the limit")
    for scans in (8, 20, 50, 100, 200):
        row(f"{scans}", lambda n=scans: beyond(rng, n, False), studies)
        if scans >= 20:
            row(f"{scans} by age", lambda n=scans: beyond(rng, n, True), studies)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
