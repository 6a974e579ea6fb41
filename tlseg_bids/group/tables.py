"""The tables of a study: every column with its description, written row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import atomic, clean_cell, write_json
from tlseg_bids.group import describe
from tlseg_bids.group.analyse import Stratum
from tlseg_bids.group.collect import cell
from tlseg_bids.group.exclusion import Proposal
from tlseg_bids.group.outliers import Z_LIMIT
from tlseg_bids.group.study import MEASURES, Row, Study, number
from tlseg_bids.group.visits import (
    Series,
    annual_change,
    intraclass,
    retest_pairs,
    within_subject_cv,
)

FORMULA = "=+-@"
"""A spreadsheet takes a cell that begins with one of these for a formula."""
MIN_RETEST = 3


@dataclass(frozen=True)
class Table:
    """A table to write: columns with their descriptions, and rows of cells."""

    name: str
    columns: dict[str, dict[str, Any]]
    rows: Iterable[Sequence[str]]


def text_cell(value: object) -> str:
    """Text as a cell that neither breaks the table nor runs in a spreadsheet.

    Tabs and line breaks become blanks; what a spreadsheet would take for a formula gets an
    apostrophe in front. Numbers stay as they are.
    """
    text = clean_cell(value)
    harmless = text[0] not in FORMULA or len(text) == 1 or not np.isnan(number(text))
    return text if harmless else f"'{text}"


def write_table(folder: Path, table: Table) -> tuple[Path, Path]:
    """Write ``NAME.tsv`` and its dictionary ``NAME.json`` (errors as in `atomic`)."""
    path = folder / f"{table.name}.tsv"
    with atomic(path) as stream:
        stream.write(("\t".join(table.columns) + "\n").encode())
        for row in table.rows:
            stream.write(("\t".join(row) + "\n").encode("utf-8", errors="replace"))
    made = {"GeneratedBy": [{"Name": "tlseg", "Version": __version__}]}
    return path, write_json(path.with_suffix(".json"), {**table.columns, **made})


def identity(row: Row) -> list[str]:
    """The cells of `describe.IDENTITY`."""
    session = f"ses-{row.session}" if row.session else "n/a"
    return [f"sub-{row.participant}", session, row.stem, row.protocol, row.suffix]


def volume_columns(strata: Sequence[Stratum]) -> dict[str, tuple[str, str]]:
    """Columns of the wide table that hold volumes: name → (kind, feature); raw ones come first."""
    raw = {f"{name}_mm3": ("raw", name) for stratum in strata for name in stratum.names}
    combat, adjusted, asymmetry = {}, {}, {}
    for stratum in strata:
        if stratum.combat is not None:
            combat |= {f"{name}_combat_mm3": ("combat", name) for name in stratum.names}
        if stratum.adjusted is not None:
            names = [stratum.names[f] for f in stratum.corrected()]
            adjusted |= {f"{name}_adjusted": ("adjusted", name) for name in names}
        asymmetry |= {f"{name}_asymmetry_percent": ("asymmetry", name) for name in stratum.pairs}
    return {**raw, **combat, **adjusted, **asymmetry}


def wide(study: Study, strata: Sequence[Stratum], volume: str) -> Table:
    """``group_volumes``: a row per labelled scan, in the order of the study."""
    columns = volume_columns(strata)
    described = {name: describe.fact(study, key) for key, name in study.names.items()}
    for name, (kind, feature) in columns.items():
        described[name] = describe.volume(kind, feature, volume, strata)
    return Table("group_volumes", described, _wide_rows(study, strata, columns))


def _wide_rows(
    study: Study, strata: Sequence[Stratum], columns: dict[str, tuple[str, str]]
) -> Iterator[list[str]]:
    where = {int(n): (s, place) for s in strata for place, n in enumerate(s.rows)}
    for n, row in enumerate(study.rows):
        stratum, place = where[n]
        values = dict(zip((("raw", f) for f in stratum.names), stratum.raw[place], strict=True))
        for kind in ("combat", "adjusted"):
            more = getattr(stratum, kind)
            if more is not None:
                values |= zip(((kind, f) for f in stratum.names), more[place], strict=True)
        values |= {("asymmetry", name): index[place] for name, index in stratum.pairs.items()}
        facts = [text_cell(row.facts.get(key, "n/a")) for key in study.names]
        yield facts + [cell(values.get(entry, np.nan)) for entry in columns.values()]


def long(study: Study, strata: Sequence[Stratum], volume: str) -> Table:
    """``group_volumes_long``: a row per scan and structure."""
    extra = []
    if any(s.combat is not None for s in strata):
        extra.append("combat_mm3")
    if any(s.adjusted is not None for s in strata):
        extra.append("adjusted")
    columns = {
        **describe.IDENTITY, **describe.STRUCTURE, **describe.MEASURED,
        **{name: describe.extra(name, volume, strata) for name in extra},
        "robust_z": describe.ROBUST_Z,
    }  # fmt: skip
    return Table("group_volumes_long", columns, _long_rows(study, strata, extra))


def _long_rows(study: Study, strata: Sequence[Stratum], extra: list[str]) -> Iterator[list[str]]:
    nothing = dict.fromkeys(extra, "n/a")
    for stratum in strata:
        protocol = study.protocols[study.rows[stratum.rows[0]].protocol]
        table = protocol.table.iloc[1:]
        heads = [
            [str(index), text_cell(name), text_cell(side)]
            for index, name, side in zip(
                table["index"], stratum.names[: len(table)], table["hemisphere"], strict=True
            )
        ]
        corrected = set(stratum.corrected())
        for place, n in enumerate(stratum.rows):
            row = study.rows[n]
            who = identity(row)
            for f, head in enumerate(heads):
                more = dict(nothing)
                if stratum.combat is not None:
                    more["combat_mm3"] = cell(stratum.combat[place, f])
                if stratum.adjusted is not None and f in corrected:
                    more["adjusted"] = cell(stratum.adjusted[place, f])
                measured = [cell(row.measures[m, f]) for m in range(len(MEASURES))]
                z = cell(stratum.scores.z[place, f])
                yield [*who, *head, *measured, *more.values(), z]


def outliers(study: Study, strata: Sequence[Stratum]) -> Table:
    """``group_outliers``: a row per volume beyond the limit, the farthest of a scan first."""
    return Table("group_outliers", describe.OUTLIERS, _outlier_rows(study, strata))


def _outlier_rows(study: Study, strata: Sequence[Stratum]) -> Iterator[list[str]]:
    for stratum in strata:
        scores, final = stratum.scores, stratum.final
        for place, n in enumerate(stratum.rows):
            size = np.nan_to_num(np.abs(scores.z[place]))
            for f in np.argsort(-size, kind="stable"):
                if size[f] <= Z_LIMIT:
                    break
                values = (final[place, f], scores.median[place, f], scores.sd[place, f])
                basis = "age" if scores.by_age[place] else "all"
                yield [
                    *identity(study.rows[n]), stratum.names[f], *map(cell, values),
                    cell(scores.z[place, f]), basis,
                ]  # fmt: skip


def change(study: Study, strata: Sequence[Stratum]) -> Table:
    """``group_change``: a row per participant with visits at known times, and structure."""
    return Table("group_change", describe.CHANGE, _change_rows(study, strata))


def _change_rows(study: Study, strata: Sequence[Stratum]) -> Iterator[list[str]]:
    for stratum in strata:
        place = {int(n): p for p, n in enumerate(stratum.rows)}
        for series in stratum.series:
            if len(series.years) < 2:
                continue
            means = np.array([
                stratum.volumes[[place[n] for n in visit]].mean(axis=0) for visit in series.visits
            ])  # fmt: skip
            rate, percent = annual_change(means, series.years)
            first = study.rows[series.visits[0][0]]
            head = [f"sub-{series.participant}", first.stem, first.protocol, first.suffix]
            head += _model(first)
            tail = [str(len(series.years)), cell(series.years[-1]), series.basis]
            for f, name in enumerate(stratum.names):
                if np.isfinite(rate[f]):
                    numbers = (means[0, f], means[-1, f], rate[f], percent[f])
                    yield [*head, name, *tail, *map(cell, numbers)]


def reliability(study: Study, strata: Sequence[Stratum]) -> Table:
    """``group_reliability``: a row per model and structure of which scans were repeated."""
    return Table("group_reliability", describe.RELIABILITY, _reliability_rows(study, strata))


def _model(row: Row) -> list[str]:
    """Name and version of the model that labelled a scan."""
    return [text_cell(part) for part in row.model[:2]]


def _retests(
    study: Study, strata: Sequence[Stratum]
) -> Iterator[tuple[Stratum, list[tuple[int, int]]]]:
    """The pairs of repeated scans of each stratum and model, where there are enough."""
    for stratum in strata:
        models: dict[tuple[str, str, str], list[Series]] = {}
        for series in stratum.series:
            models.setdefault(study.rows[series.visits[0][0]].model, []).append(series)
        for _, every in sorted(models.items()):
            if len(pairs := retest_pairs(every)) >= MIN_RETEST:
                yield stratum, pairs


def _reliability_rows(study: Study, strata: Sequence[Stratum]) -> Iterator[list[str]]:
    for stratum, pairs in _retests(study, strata):
        place = {int(n): p for p, n in enumerate(stratum.rows)}
        scans = stratum.volumes[[[place[a], place[b]] for a, b in pairs]]
        for f, name in enumerate(stratum.names):
            scores = scans[np.isfinite(scans[:, :, f]).all(axis=1), :, f]
            if len(scores) < MIN_RETEST:
                continue
            mean = scores.mean(axis=1)
            apart = np.abs(scores[:, 0] - scores[:, 1])
            percent = (
                100 * np.mean(apart[mean > 0] / mean[mean > 0]) if (mean > 0).any() else np.nan
            )
            numbers = [v for icc in intraclass(scores) for v in (icc.value, icc.low, icc.high)]
            protocol, _, suffix = stratum.name.rpartition("_")
            yield [
                protocol, suffix, *_model(study.rows[pairs[0][0]]), name, str(len(scores)),
                *map(cell, numbers),
                cell(within_subject_cv(scores)), cell(percent),
            ]  # fmt: skip


def site_effect(strata: Sequence[Stratum]) -> Table:
    """``group_combat``: a row per structure with the effect of the site before and after ComBat."""
    rows = (
        [*stratum.name.rpartition("_")[::2], name, *map(cell, shares)]
        for stratum in strata
        if stratum.site_effect is not None
        for name, *shares in zip(stratum.names, *stratum.site_effect, strict=True)
        if np.isfinite(shares).any()
    )
    return Table("group_combat", describe.SITE_EFFECT, rows)


def exclusion(study: Study, proposals: Sequence[Proposal]) -> Table:
    """``group_exclusion``: a row per scan with what is proposed."""
    rows = (
        [
            *identity(row), one.proposal, text_cell("; ".join(one.reasons)),
            text_cell("; ".join(sorted({r.rating for r in one.ratings if not r.stale}))),
            str(one.outliers), cell(one.largest_z),
        ]
        for row, one in zip(study.rows, proposals, strict=True)
    )  # fmt: skip
    return Table("group_exclusion", describe.EXCLUSION, rows)
