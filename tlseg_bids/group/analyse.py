"""Stratum by stratum: ComBat, head size, robust scores, asymmetry, repeated scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlseg_bids.config import Config
from tlseg_bids.errors import UsageError
from tlseg_bids.group.design import design_of, without_words
from tlseg_bids.group.harmonise import SiteEffects, fit_combat, site_share
from tlseg_bids.group.headsize import FEW, HeadSize, fit_head_size
from tlseg_bids.group.models import notes_on_models
from tlseg_bids.group.outliers import Scores, robust_scores
from tlseg_bids.group.parameters import Fit, Parameters
from tlseg_bids.group.study import TOTALS, Study, known, listed, matrix, structures
from tlseg_bids.group.visits import Series, series_of, without_time
from tlseg_bids.report.verdict import asymmetry_percent

NO_COVARIATES = ("none",)


@dataclass(frozen=True, eq=False)
class Stratum:
    """Scans of one protocol and one suffix, and everything computed of them.

    Parameters
    ----------
    name : str
        ``aseg_T1w``.
    rows : ndarray of int, shape (scans,)
        Numbers of its rows in the study.
    names : tuple of str
        Features: the structures, then `TOTALS`.
    raw : ndarray, shape (scans, features)
        Volumes as measured, mm³.
    combat, adjusted : ndarray or None, shape (scans, features)
        Harmonised volumes, mm³; volumes corrected for head size, after ComBat if there is one.
    fit : Fit
        What was fitted or applied.
    scores : Scores
        Robust scores of `final`.
    pairs : dict
        Name of a structure without its side → asymmetry in percent, shape (scans,), of `raw`.
    series : tuple of Series
        Participants with several scans.
    site_effect : tuple of ndarray or None, shape (features,)
        Share of the variance that the site explains before and after ComBat, over all scans that
        it applies to.
    """

    name: str
    rows: np.ndarray
    names: tuple[str, ...]
    raw: np.ndarray
    combat: np.ndarray | None
    adjusted: np.ndarray | None
    fit: Fit
    scores: Scores
    pairs: dict[str, np.ndarray]
    series: tuple[Series, ...]
    site_effect: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def volumes(self) -> np.ndarray:
        """Volumes in mm³ before any correction for head size: harmonised if ComBat was asked."""
        return self.raw if self.combat is None else self.combat

    @property
    def final(self) -> np.ndarray:
        """The most processed volumes there are; the head size itself is not corrected by itself."""
        return _final(self.volumes, self.adjusted, self.corrected())

    def corrected(self) -> list[int]:
        """Features that a correction for head size applies to: not the head size itself."""
        return _corrected(self.names, self.fit.head)


def _corrected(names: Sequence[str], head: HeadSize | None) -> list[int]:
    gone = {"icv": ("icv",), "brain": TOTALS}[head.measure] if head else ()
    return [f for f, name in enumerate(names) if name not in gone]


def _final(
    volumes: np.ndarray, adjusted: np.ndarray | None, corrected: Sequence[int]
) -> np.ndarray:
    if adjusted is None:
        return volumes
    final = volumes.copy()
    final[:, corrected] = adjusted[:, corrected]
    return final


def analyse(study: Study, config: Config, given: Parameters | None) -> list[Stratum]:
    """Compute every stratum of the study; what has to be told goes to ``study.notes``.

    Raises
    ------
    UsageError
        If an option names a column, value or site that is not there.
    DataError
        If there is too little to fit.
    """
    fit = fit_rows(study, config.fit_where)
    if (config.combat is None) != (not config.combat_covariates):
        raise UsageError(
            "--combat needs --combat-covariates, and the other way round", "the command line",
            "name the columns whose effect ComBat keeps, such as age_years sex, or write none",
        )  # fmt: skip
    return [
        _stratum(study, config, name, np.array(numbers), fit[numbers], given)
        for name, numbers in study.strata().items()
    ]


def fit_rows(study: Study, conditions: Sequence[str]) -> np.ndarray:
    """Rows that meet the conditions ``COLUMN=VALUE``; of one column, any value will do.

    Raises
    ------
    UsageError
        If a column does not exist, or no row is left.
    """
    wanted: dict[str, set[str]] = {}
    for condition in conditions:
        column, _, value = condition.partition("=")
        wanted.setdefault(column, set()).add(value)
    keep = np.ones(len(study.rows), bool)
    for column, values in wanted.items():
        cells = study.column(column, "--fit-where")
        keep &= np.array([cell in values for cell in cells])
    if not keep.any():
        raise UsageError(
            f"no scan meets {' '.join(conditions)}", "--fit-where",
            "check the values in group_volumes.tsv or participants.tsv",
        )  # fmt: skip
    return keep


def _stratum(
    study: Study, config: Config, name: str, rows: np.ndarray, fit: np.ndarray,
    given: Parameters | None,
) -> Stratum:  # fmt: skip
    members = [study.rows[n] for n in rows]
    protocol = study.protocols[members[0].protocol]
    names = (*structures(protocol), *TOTALS)
    raw = matrix(members, f"{given.volume if given else config.volume}_mm3")
    told = [] if len(study.strata()) == 1 else [f"{name}: "]
    done = given.fit(name, names) if given else Fit()
    if given and done is None:
        study.notes.append(f"{''.join(told)}the parameters hold no fit of {name}; nothing applied")
    done = done or Fit()
    effects, notes = done.combat, []
    if config.combat is not None:
        effects, notes = _fit_combat(study, config, rows, (names, raw), fit)
    combat = site_effect = None
    if effects is not None:
        combat, site_effect, said = _apply_combat(study, effects, rows, raw)
        notes += said
    volumes = raw if combat is None else combat
    head = done.head
    if config.icv_correction != "none":
        size = volumes[:, names.index(config.head_size)]
        usable = fit & np.isfinite(size)
        first = _first([row.participant for row in members], usable)
        head = fit_head_size(
            config.icv_correction, config.head_size, volumes, size, first, combat is not None
        )
        if 0 < head.scans < FEW:
            notes.append(f"the correction for head size was fitted on {head.scans} scans only")
    adjusted = head.apply(volumes, volumes[:, names.index(head.measure)]) if head else None
    if adjusted is not None and (lost := int(np.isnan(adjusted[:, 0]).sum())):
        notes.append(
            f"{lost} scans without head size or harmonised volume have no corrected volume"
        )
    series = tuple(series_of(study.rows, rows))
    notes += [*without_time(study.rows, series), *notes_on_models(study.rows, rows)]
    study.notes += ["".join([*told, note]) for note in notes]
    final = _final(volumes, adjusted, _corrected(names, head))
    return Stratum(
        name, rows, names, raw, combat, adjusted, Fit(effects, head),
        robust_scores(final, _age(members)), _asymmetry(protocol, raw),
        series, site_effect,
    )  # fmt: skip


def _first(keys: Sequence[object], usable: np.ndarray) -> np.ndarray:
    """The first usable row of every key: repeated scans of a person do not count twice in a fit."""
    seen: set[object] = set()
    first = np.zeros(len(keys), bool)
    for place in np.flatnonzero(usable):
        first[place] = keys[place] not in seen
        seen.add(keys[place])
    return first


def _columns(study: Study, names: Sequence[str], rows: np.ndarray) -> dict[str, list[str]]:
    cells = {name: study.column(name, "--combat-covariates") for name in names}
    return {name: [column[n] for n in rows] for name, column in cells.items()}


def _fit_combat(
    study: Study, config: Config, rows: np.ndarray,
    volumes: tuple[Sequence[str], np.ndarray], fit: np.ndarray,
) -> tuple[SiteEffects, list[str]]:  # fmt: skip
    every = study.column(config.combat, "--combat")
    sites = [every[n] for n in rows]
    names = () if config.combat_covariates == NO_COVARIATES else config.combat_covariates
    columns, said = without_words(_columns(study, names, rows), fit)
    told = zip(sites, *columns.values(), strict=True)
    complete = fit & np.array([all(map(known, cells)) for cells in told])
    usable = complete if complete.any() else fit  # of none, it is said what is unknown
    who = [(study.rows[n].participant, every[n]) for n in rows]
    effects, notes = fit_combat(
        volumes[1], sites, columns, _first(who, usable),
        (config.combat, config.combat_reference), volumes[0],
    )  # fmt: skip
    return effects, said + notes


def _apply_combat(
    study: Study, effects: SiteEffects, rows: np.ndarray, raw: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], list[str]]:
    """Harmonised volumes, the site's effect before and after, and sentences on what is missing."""
    every = study.column(effects.column, "--combat")
    sites = [every[n] for n in rows]
    columns = _columns(study, [c.column for c in effects.covariates], rows)
    design = design_of(effects.covariates, columns, len(rows))
    notes = []
    unseen: dict[str, int] = {}
    for site in sites:
        if site not in effects.sites:
            name = site if known(site) else "n/a"
            unseen[name] = unseen.get(name, 0) + 1
    if unseen:
        shown = listed(f"{site} ({count})" for site, count in unseen.items())
        notes.append(
            f"no site effect is known for {shown}: their harmonised volumes are n/a; fit ComBat "
            "again with scans of these sites"
        )
    blank = np.isnan(design).any(axis=1) & np.array([site in effects.sites for site in sites])
    if blank.any():
        stems = [study.rows[rows[place]].stem for place in np.flatnonzero(blank)]
        notes.append(
            f"{len(stems)} scans lack a covariate of ComBat, or have a value that the fit has not "
            f"seen: {listed(stems, 4)}; their harmonised volumes are n/a"
        )
    combat = effects.apply(raw, sites, design)
    here = np.isfinite(combat).any(axis=1)
    names = [site for site, use in zip(sites, here, strict=True) if use]
    before, after = (
        site_share(np.where(np.isfinite(combat), v, np.nan)[here], names, design[here])
        for v in (raw, combat)
    ) if here.any() else (np.full(raw.shape[1], np.nan),) * 2  # fmt: skip
    return combat, (before, after), notes


def _age(members: Sequence) -> np.ndarray:
    """Age in years, or post-menstrual weeks where more scans have that."""
    years = np.array([row.age_years for row in members])
    weeks = np.array([row.pma_weeks for row in members])
    return weeks if np.isfinite(weeks).sum() > np.isfinite(years).sum() else years


def _asymmetry(protocol, raw: np.ndarray) -> dict[str, np.ndarray]:
    """Asymmetry index of every pair, percent of the mean of both sides."""
    place = {int(index): n for n, index in enumerate(protocol.indices[1:])}
    names, result = structures(protocol), {}
    for left, right in protocol.pairs():
        name = names[place[left]].removeprefix("left_")
        sides = zip(raw[:, place[left]], raw[:, place[right]], strict=True)
        result[name] = np.array([asymmetry_percent(*side) for side in sides])
    return result
