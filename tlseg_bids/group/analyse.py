"""Stratum by stratum: ComBat, head size, robust scores, asymmetry, repeated scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, TlsegError, UsageError, amount, listed
from tlseg_bids.group.design import design_of, without_words
from tlseg_bids.group.harmonise import SiteColumn, SiteEffects, fit_combat, site_share
from tlseg_bids.group.headsize import FEW, HeadSize, fit_head_size
from tlseg_bids.group.models import notes_on_models
from tlseg_bids.group.outliers import Scores, robust_scores
from tlseg_bids.group.parameters import Fit, Parameters
from tlseg_bids.group.study import TOTALS, Row, Study, known, matrix, structures
from tlseg_bids.group.visits import Series, series_of, without_time
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.report.verdict import asymmetry_percent

NO_COVARIATES = ("none",)
LEFT_OUT = {
    "combat": "not harmonised, so that harmonised and corrected volumes are n/a, and outliers, "
    "change and agreement are of the volumes as measured",
    "head": "not corrected for head size, so that corrected volumes are n/a, and outliers are of "
    "uncorrected ones",
}
T = TypeVar("T")


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


@dataclass(frozen=True, eq=False)
class _Part:
    """A stratum before anything is computed; `fit` marks the scans that may be fitted on."""

    name: str
    rows: np.ndarray
    names: tuple[str, ...]
    raw: np.ndarray
    fit: np.ndarray


@dataclass(frozen=True)
class _Refusal:
    """A correction that a stratum cannot have; `step` is a field of `Fit`."""

    step: str
    stratum: str
    error: TlsegError


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
        If there is too little to fit in every stratum; a stratum that alone cannot be fitted goes
        without, with a sentence.
    """
    fit = fit_rows(study, config.fit_where)
    if (config.combat is None) != (not config.combat_covariates):
        raise UsageError(
            "--combat needs --combat-covariates, and the other way round", "the command line",
            "name the columns whose effect ComBat keeps, such as age_years sex, or write none",
        )  # fmt: skip
    measure = f"{given.volume if given else config.volume}_mm3"
    refused: list[_Refusal] = []
    strata = []
    for name, numbers in study.strata().items():
        members = [study.rows[n] for n in numbers]
        names = (*structures(study.protocols[members[0].protocol]), *TOTALS)
        part = _Part(name, np.array(numbers), names, matrix(members, measure), fit[numbers])
        strata.append(_stratum(study, config, part, given, refused))
    _check_refused(strata, refused)
    return strata


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
    study: Study, config: Config, part: _Part, given: Parameters | None, refused: list[_Refusal]
) -> Stratum:
    name, rows, names, raw = part.name, part.rows, part.names, part.raw
    members = [study.rows[n] for n in rows]
    done, notes = _saved(part, given)
    effects = done.combat
    if config.combat is not None:
        effects, said = _tried("combat", part, refused, lambda: _fit_combat(study, config, part))
        notes += said
    combat = site_effect = None
    if effects is not None:
        combat, site_effect, said = _apply_combat(study, effects, rows, raw)
        notes += said
    volumes = raw if combat is None else combat
    head = done.head
    if config.icv_correction != "none" and (config.combat is None) == (effects is None):
        head, said = _tried(
            "head", part, refused, lambda: _fit_head(config, part, members, volumes)
        )  # fmt: skip
        notes += said
    adjusted = head.apply(volumes, volumes[:, names.index(head.measure)]) if head else None
    if adjusted is not None and (lost := int(np.isnan(adjusted[:, 0]).sum())):
        notes.append(
            f"{amount(lost, 'scan')} without head size or harmonised volume "
            f"{'has' if lost == 1 else 'have'} no corrected volume"
        )
    series = tuple(series_of(study.rows, rows))
    notes += [*without_time(study.rows, series), *notes_on_models(study.rows, rows)]
    several = len(study.strata()) > 1
    study.notes += [f"{name}: {note}" if several else note for note in notes]
    final = _final(volumes, adjusted, _corrected(names, head))
    return Stratum(
        name, rows, names, raw, combat, adjusted, Fit(effects, head),
        robust_scores(final, _age(members)), _asymmetry(study.protocols[members[0].protocol], raw),
        series, site_effect,
    )  # fmt: skip


def _saved(part: _Part, given: Parameters | None) -> tuple[Fit, list[str]]:
    """What saved parameters hold for a stratum."""
    done = given.fit(part.name, part.names) if given else Fit()
    if done is None:
        return Fit(), [f"the parameters hold no fit of {part.name}; nothing applied"]
    if done.combat and not done.combat.published:
        return done, [
            f"the saved ComBat of {part.name} was fitted with priors of each structure over the "
            "sites, which leave part of what a scanner does to all structures; fit it again"
        ]
    return done, []


def _tried(
    step: str, part: _Part, refused: list[_Refusal], fit: Callable[[], tuple[T, list[str]]]
) -> tuple[T | None, list[str]]:
    """What `fit` gives; else nothing and a sentence on why this stratum goes without."""
    try:
        return fit()
    except (DataError, UsageError) as error:
        refused.append(_Refusal(step, part.name, error))
        return None, [f"{LEFT_OUT[step]}: {error}"]


def _check_refused(strata: Sequence[Stratum], refused: Sequence[_Refusal]) -> None:
    """Raise what was refused if no stratum got what was asked for."""
    for step in LEFT_OUT:
        own = [one for one in refused if one.step == step]
        if not own or any(getattr(stratum.fit, step) for stratum in strata):
            continue
        first = own[0].error
        if len({one.error.what for one in own}) == 1 and len(own) == len(strata):
            raise first
        what = "; ".join(f"{one.stratum}: {one.error.what}" for one in own)
        raise type(first)(what, first.where, first.hint)


def _fit_head(
    config: Config, part: _Part, members: Sequence[Row], volumes: np.ndarray
) -> tuple[HeadSize, list[str]]:
    size = volumes[:, part.names.index(config.head_size)]
    first = _first([row.participant for row in members], part.fit & np.isfinite(size))
    harmonised = config.combat is not None
    head = fit_head_size(config.icv_correction, config.head_size, volumes, size, first, harmonised)
    few = 0 < head.scans < FEW
    said = f"the correction for head size was fitted on {amount(head.scans, 'scan')} only"
    return head, [said] if few else []


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


def _fit_combat(study: Study, config: Config, part: _Part) -> tuple[SiteEffects, list[str]]:
    rows, fit = part.rows, part.fit
    every = study.column(config.combat, "--combat")
    sites = [every[n] for n in rows]
    names = () if config.combat_covariates == NO_COVARIATES else config.combat_covariates
    columns, said = without_words(_columns(study, names, rows), fit)
    told = zip(sites, *columns.values(), strict=True)
    complete = fit & np.array([all(map(known, cells)) for cells in told])
    usable = complete if complete.any() else fit  # of none, it is said what is unknown
    who = [(study.rows[n].participant, every[n]) for n in rows]
    column = SiteColumn(config.combat, sites, config.combat_reference)
    effects, notes = fit_combat(part.raw, column, columns, _first(who, usable), part.names)
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
            f"{amount(len(stems), 'scan lacks', 'scans lack')} a covariate of ComBat, or "
            f"{'has' if len(stems) == 1 else 'have'} a value that the fit has not seen: "
            f"{listed(stems, 4)}; the harmonised volumes are n/a"
        )
    combat = effects.apply(raw, sites, design)
    here = np.isfinite(combat).any(axis=1)
    names = [site for site, use in zip(sites, here, strict=True) if use]
    before, after = (
        site_share(np.where(np.isfinite(combat), v, np.nan)[here], names, design[here])
        for v in (raw, combat)
    ) if here.any() else (np.full(raw.shape[1], np.nan),) * 2  # fmt: skip
    return combat, (before, after), notes


def _age(members: Sequence[Row]) -> np.ndarray:
    """Age in years, or post-menstrual weeks where more scans have that."""
    years = np.array([row.age_years for row in members])
    weeks = np.array([row.pma_weeks for row in members])
    return weeks if np.isfinite(weeks).sum() > np.isfinite(years).sum() else years


def _asymmetry(protocol: LabelProtocol, raw: np.ndarray) -> dict[str, np.ndarray]:
    """Asymmetry index of every pair, percent of the mean of both sides."""
    place = {int(index): n for n, index in enumerate(protocol.indices[1:])}
    names, result = structures(protocol), {}
    for left, right in protocol.pairs():
        name = names[place[left]].removeprefix("left_")
        sides = zip(raw[:, place[left]], raw[:, place[right]], strict=True)
        result[name] = np.array([asymmetry_percent(*side) for side in sides])
    return result
