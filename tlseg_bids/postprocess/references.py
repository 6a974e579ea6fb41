"""Volumes and sides against what is usual at an age.

`references.tsv` holds, per age group and structure, mean and standard deviation of ln(volume ÷
brain) and of the side score (R − L) ÷ mean of both. Its source are the reference labels of 15
adults of 19 to 34 years (MICCAI 2012 multi-atlas challenge) and of 12 infants under one year;
`benchmarks/references.py` wrote it. The groups are small, so what is unusual is
asked of the prediction interval of a further person, labelled by another rater.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

import numpy as np
import pandas as pd
from scipy import special

from tlseg_bids.labels.protocol import LabelProtocol, load_protocol

PROTOCOL = "aseg"
CHANCE = 0.001
"""How often a usual person may have an unusual structure."""
RATERS_VOLUME, RATERS_SIDE = 0.15, 0.1
"""Standard deviation between two ways of labelling one brain, added to that between persons."""


def sides(volumes: pd.DataFrame, protocol: LabelProtocol) -> pd.DataFrame:
    """(R − L) ÷ mean of both, by the index of the left one; −2 to 2.

    Parameters
    ----------
    volumes : DataFrame
        mm³, a row per index, a column per person.
    protocol : LabelProtocol
        Which structures are pairs.
    """
    found = {}
    for left, right in protocol.pairs():
        if left in volumes.index and right in volumes.index:
            both = volumes.loc[left] + volumes.loc[right]
            found[left] = (volumes.loc[right] - volumes.loc[left]) / (both / 2)
    return pd.DataFrame(found).T


@lru_cache
def load_references() -> pd.DataFrame:
    """The table: group, youngest and oldest (years), index, n, log_share, sd, side, side_sd,
    widest_side."""
    file = resources.files("tlseg_bids.postprocess") / "references.tsv"
    with file.open(encoding="utf-8") as stream:
        return pd.read_csv(stream, sep="\t", na_values="n/a")


@lru_cache
def widest_side(name: str) -> float:
    """The widest |R − L| ÷ mean of both in a person of the references, by the name of the left
    structure in any protocol; 0 if there is none."""
    known, names = load_references(), load_protocol(PROTOCOL).table.set_index("index")["name"]
    widest = known.loc[known["index"].map(names) == name, "widest_side"].max()
    return 0.0 if np.isnan(widest) else float(widest)


def compare(
    table: pd.DataFrame, brain_mm3: float, age_years: float | None, protocol: LabelProtocol
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Standard scores of a scan's volumes, and sentences about the unusual ones.

    Parameters
    ----------
    table : DataFrame
        A row per structure: index, name, hard_mm3.
    brain_mm3 : float
        Volume of the brain without the fluid around it.
    age_years : float or None
        None if it is not known.
    protocol : LabelProtocol
        Of the labels; there are references for ``aseg`` alone.

    Returns
    -------
    scores : DataFrame
        Index: that of the structure; ``volume_z`` and ``side_z`` (at the left structure of a pair),
        the distance from the mean over the spread that one more person of the group would have; no
        rows where there is no reference.
    sentences : tuple of str
        What lies outside the interval that all but `CHANCE` of the persons keep in everything.
    """
    known = load_references()
    nothing = pd.DataFrame(columns=["volume_z", "side_z"])
    if age_years is None or protocol.name != PROTOCOL or not brain_mm3 > 0:
        return nothing, ()
    group = known[(known["youngest"] <= age_years) & (age_years < known["oldest"])]
    group = group.set_index("index")
    volumes = table.set_index("index")["hard_mm3"]
    group = group[group.index.isin(volumes.index[volumes > 0])]
    if group.empty:
        return nothing, ()
    one_more = np.sqrt(1 + 1 / group["n"])
    share = np.log(volumes[group.index] / brain_mm3)
    volume = (share - group["log_share"]) / np.hypot(group["sd"] * one_more, RATERS_VOLUME)
    side = sides(volumes.to_frame(), protocol)[volumes.name].reindex(group.index)
    side = (side - group["side"]) / np.hypot(group["side_sd"] * one_more, RATERS_SIDE)
    scores = pd.DataFrame({"volume_z": volume, "side_z": side})
    limit = -special.stdtrit(group["n"] - 1, CHANCE / 2 / scores.count().sum())
    names = table.set_index("index")["name"]
    who = group["group"].iloc[0]
    said = []
    for index in group.index[scores["volume_z"].abs() > limit]:
        times = np.exp(share[index] - group.loc[index, "log_share"])
        said.append(
            f"{names[index]}: {times:.2g} times the share of the brain that is usual in {who}."
        )
    for index in group.index[scores["side_z"].abs() > limit]:
        both = names[index].replace("Left ", "").lower()
        said.append(f"Left and right {both} differ as is unusual in {who}.")
    return scores, tuple(said)
