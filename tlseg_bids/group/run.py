"""The level ``group`` from beginning to end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tlseg_bids.bids.atomic import write_json
from tlseg_bids.bids.lock import hold
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.config import Config
from tlseg_bids.errors import NoInputError, OutputError, UsageError
from tlseg_bids.group import tables
from tlseg_bids.group.analyse import Stratum, analyse
from tlseg_bids.group.collect import collect
from tlseg_bids.group.exclusion import Proposal, Rating, propose, read_ratings
from tlseg_bids.group.page import write_page
from tlseg_bids.group.parameters import Parameters, as_json, read_parameters
from tlseg_bids.group.runs import one_of_each
from tlseg_bids.group.study import TOTALS, Study, structures

LOG = logging.getLogger(__name__)
PARAMETERS = "group_parameters.json"
FITTING = ("combat", "combat_covariates", "combat_reference", "fit_where")


def run_group(config: Config) -> int:
    """Write the tables and the page of every labelled scan in the output folder.

    Returns
    -------
    int
        Exit code: 0 all scans are in the tables, 1 some could not be read.

    Raises
    ------
    NoInputError, NothingSelectedError
        If there is nothing to tell of.
    UsageError, DataError
        If an option makes no sense for this study.
    CannotCreateError, OutputError, LockedError
        If a file cannot be written, or another run writes it.
    """
    if not config.bids_dir.is_dir():
        raise NoInputError(
            "there is no such folder", config.bids_dir, "check the path (and its mount)"
        )
    given = _given(config)
    study = collect(config)
    own = [name for names in _volume_names(study) for name in names]
    study.name_columns(own)
    strata = analyse(study, config, given)
    ratings, said = read_ratings(config.ratings, study.rows)
    study.notes += said
    proposals, said = one_of_each(study.rows, _proposals(study, strata, ratings), config.multi_run)
    study.notes += said
    for failure in study.failures:
        LOG.warning("%s: %s – %s", failure.name, failure.error, failure.hint)
    for note in study.notes:
        LOG.warning("%s", note)
    volume = given.volume if given else config.volume
    with hold(config.out_dir / "logs" / "locks" / "group.lock", "the group level is being run"):
        Derivatives(config.out_dir, config.bids_dir).write_root((), {})
        RunLog(config.out_dir).write_config(config)
        _write(config, study, strata, proposals, volume)
    return 1 if study.failures else 0


def _given(config: Config) -> Parameters | None:
    """Saved parameters, if they are to be applied."""
    if config.group_parameters is None:
        return None
    if config.icv_correction != "none" or any(getattr(config, name) for name in FITTING):
        raise UsageError(
            "--group-parameters brings its own ComBat and head-size correction",
            "the command line", "leave out --combat…, --fit-where and --icv-correction",
        )  # fmt: skip
    return read_parameters(config.group_parameters)


def _volume_names(study: Study) -> list[list[str]]:
    """Every name that a volume column can have, so that no covariate takes one."""
    endings = ("_mm3", "_combat_mm3", "_adjusted", "_asymmetry_percent")
    return [
        [name + ending for name in (*structures(protocol), *TOTALS) for ending in endings]
        for protocol in study.protocols.values()
    ]


def _proposals(
    study: Study, strata: Sequence[Stratum], ratings: Mapping[str, tuple[Rating, ...]]
) -> list[Proposal]:
    found: dict[int, Proposal] = {}
    for stratum in strata:
        for place, number in enumerate(stratum.rows):
            row = study.rows[number]
            z = stratum.scores.z[place]
            found[int(number)] = propose(row, z, stratum.names, ratings.get(row.stem, ()))
    return [found[number] for number in range(len(study.rows))]


def _write(
    config: Config, study: Study, strata: list[Stratum], proposals: list[Proposal], volume: str
) -> None:
    out = config.out_dir
    made = [
        tables.wide(study, strata, volume), tables.long(study, strata, volume),
        tables.outliers(study, strata), tables.change(study, strata),
        tables.reliability(study, strata), tables.site_effect(strata),
        tables.exclusion(study, proposals),
    ]  # fmt: skip
    for table in made:
        LOG.info("table: %s", tables.write_table(out, table)[0])
    parameters = out / PARAMETERS
    fits = [(s.name, s.names, s.fit) for s in strata if s.fit.combat or s.fit.head]
    if fits and config.group_parameters is None:
        write_json(parameters, as_json(volume, config.fit_where, fits))
    elif config.group_parameters is None and parameters.is_file():
        study.notes.append(_set_aside(parameters))
        LOG.warning("%s", study.notes[-1])
    LOG.info("page: %s", write_page(out, study, strata, proposals, (volume, config.command)))


def _set_aside(parameters: Path) -> str:
    """Rename the fit of an earlier run after the time it was made; returns the sentence on it."""
    try:
        made = datetime.fromtimestamp(parameters.stat().st_mtime, UTC)
        kept = parameters.with_stem(f"{parameters.stem}_{made:%Y%m%dT%H%M%SZ}")
        parameters.rename(kept)
    except OSError as error:
        raise OutputError(
            f"the fit of an earlier run cannot be renamed ({error.strerror})", parameters,
            "move it yourself: this run fits nothing, so that it would not belong to the tables",
        ) from error  # fmt: skip
    return (
        f"this run fits nothing, so {PARAMETERS} of an earlier run, which does not belong to these "
        f"tables, is kept as {kept.name}; --group-parameters {kept} applies it"
    )
