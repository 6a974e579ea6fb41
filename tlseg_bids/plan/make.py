"""The plan of a run: every scan with its model, device and memory, or why it is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tlseg_bids.bids.compat import first_of_visit
from tlseg_bids.bids.scan import Scan, Unusable
from tlseg_bids.bids.spaces import find_template_file, parse_space
from tlseg_bids.config import Config
from tlseg_bids.errors import ScanError, UsageError
from tlseg_bids.flow import Job, Plan, Refusal, Skip
from tlseg_bids.plan.choice import choose, usable_cards
from tlseg_bids.plan.device import Machine, choose_device
from tlseg_bids.plan.key import content_key
from tlseg_bids.plan.pairs import by_visit, companions
from tlseg_bids.volume import Grid, load_grid
from tlseg_bids.zoo.card import ModelCard, age_in_years

FETCH = "copy it again, or fetch it with `datalad get`"


@dataclass(frozen=True, eq=False)
class _Header:
    """A scan whose header was read: its grid and what is odd about it."""

    scan: Scan
    grid: Grid
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Run:
    """What every job of this run shares."""

    cards: tuple[ModelCard, ...]
    excluded: tuple[Refusal, ...]
    config: Config
    version: str
    machine: Machine


def make_plan(
    scans: Iterable[Scan],
    unusable: Iterable[Unusable],
    cards: Sequence[ModelCard],
    config: Config,
    version: str,
    machine: Machine | None = None,
) -> Plan:
    """Decide for every scan which model labels it, where and why.

    Headers are read, voxels are not; the bytes of each file are hashed for the content key,
    except with ``--dry-run``, whose keys are empty.

    Parameters
    ----------
    scans, unusable : iterable
        What `tlseg_bids.bids.discover` found.
    cards : sequence of ModelCard
        Every model there is.
    config : Config
        The run.
    version : str
        The program's version; part of the content key.
    machine : Machine, optional
        The devices; this machine's where not given.

    Returns
    -------
    Plan
        Jobs in the order of `scans`; skips with a reason and a hint.

    Raises
    ------
    UsageError, DataError
        As `usable_cards` and `choose_device`: what no scan could change; also if templates are
        wanted of a model that sees several images together.
    NoInputError
        If a template of ``--output-spaces`` is not at hand; with ``--dry-run``, also could not be.
    """
    run = _Run(*usable_cards(cards, config), config, version, machine or _machine(config))
    if config.device != "auto" and config.executor == "local":
        choose_device(config.device, 0.0, run.machine)
    skips = [Skip(found.scan, found.reason, found.hint) for found in unusable]
    headers, damaged = _headers(scans)
    visits = by_visit(header.scan for header in headers)
    later: list[Skip] = []
    if config.multi_run == "first":
        headers, later = first_runs(headers)
    jobs = []
    for header in headers:
        try:
            jobs.append(_job(header, run, companions(header.scan, visits)))
        except ScanError as error:
            damaged.append(Skip(header.scan, error.what, error.hint))
        except OSError as error:
            reason = f"the file cannot be read to its end ({error.strerror or error})"
            damaged.append(Skip(header.scan, reason, FETCH))
    asked = (space for text in config.output_spaces for space in parse_space(text))
    spaces = tuple(
        replace(space, file=find_template_file(space, config.offline, not config.dry_run))
        for space in dict.fromkeys(asked)  # res-2 and res-02 are one
    )
    if spaces:
        _check_single_images(jobs)
        jobs = [replace(job, spaces=spaces) if _names_space(job, jobs) else job for job in jobs]
    if config.compat:
        first = first_of_visit(job.scan for job in jobs)
        jobs = [replace(job, precomputed=n in first) for n, job in enumerate(jobs)]
    return Plan(tuple(jobs), (*skips, *damaged, *later))


def _check_single_images(jobs: Sequence[Job]) -> None:
    """Refuse models that a template, which is one image, cannot be shown to.

    One that is placed by another model need not see it.
    """
    for card in (job.card for job in jobs):
        if card.channels and card.placed_by is None:
            raise UsageError(
                f"model '{card.name}' wants {' and '.join(card.channels)} together, and a template "
                "is one image", "--output-spaces", "choose a model of one image with --model",
            )  # fmt: skip


def first_runs(headers: Sequence[_Header]) -> tuple[list[_Header], list[Skip]]:
    """Of scans that differ in nothing but ``run``, the first whose header can be read.

    Returns
    -------
    kept : list
        In the order given.
    skipped : list of Skip
        The others, marked as wanted.
    """
    first: dict[tuple, _Header] = {}
    for header in sorted(headers, key=lambda header: _run_number(header.scan)):
        first.setdefault(_all_but_run(header.scan), header)
    kept = [header for header in headers if first[_all_but_run(header.scan)] is header]
    skipped = [
        Skip(
            header.scan,
            f"--multi-run first: {first[_all_but_run(header.scan)].scan.path.name} was taken",
            "use --multi-run each for every run",
            wanted=True,
        )
        for header in headers
        if header not in kept
    ]
    return kept, skipped


def _machine(config: Config) -> Machine:
    """This machine; PyTorch is not even loaded where no device of it is wanted."""
    elsewhere = config.executor != "local"
    return Machine() if elsewhere or config.device == "cpu" else Machine.here()


def _headers(scans: Iterable[Scan]) -> tuple[list[_Header], list[Skip]]:
    headers, damaged = [], []
    for scan in scans:
        try:
            headers.append(_Header(scan, *load_grid(scan.path)))
        except ScanError as error:
            damaged.append(Skip(scan, error.what, error.hint))
    return headers, damaged


def _all_but_run(scan: Scan) -> tuple:
    return scan.suffix, *((k, v) for k, v in scan.entities.items() if k != "run")


def _run_number(scan: Scan) -> tuple[int, str]:
    run = scan.entities.get("run", "0")
    return (int(run) if run.isdecimal() else 0), run


def _job(header: _Header, run: _Run, beside: dict[str, Scan]) -> Job:
    scan, config = header.scan, run.config
    choice = choose(run.cards, scan, header.grid.spacing_mm, config.model, beside)
    channels = tuple(beside[s] for s in choice.card.channels if s != scan.suffix)
    memory_gib = choice.card.memory.host(int(np.prod(header.grid.shape)))
    device, device_warnings = config.device, ()  # a worker elsewhere decides
    if config.executor == "local":
        needed_gib = choice.card.memory.device_gib
        device, device_warnings = choose_device(config.device, needed_gib, run.machine)
    warnings = (
        *header.warnings,
        *_age_warning(scan),
        *choice.warnings,
        *device_warnings,
        *_memory_warning(memory_gib, config),
    )
    key = "" if config.dry_run else content_key(
        scan, choice.card, config, run.version, channels
    )  # fmt: skip
    return Job(
        scan, choice.card, choice.reason, (*choice.refused, *run.excluded), warnings, key,
        device, memory_gib, channels,
    )  # fmt: skip


def _names_space(job: Job, jobs: Sequence[Job]) -> bool:
    """Whether a scan may name files in a standard space: a T1w goes before its T2w."""
    beside = (other.scan for other in jobs if other.scan.suffix == "T1w")
    return job.scan.suffix == "T1w" or all(scan.entities != job.scan.entities for scan in beside)


def _age_warning(scan: Scan) -> tuple[str, ...]:
    if age_in_years(scan.age) is not None:
        return ()
    return (f"the age at the scan is not known ({scan.age.source})",)


def _memory_warning(memory_gib: float, config: Config) -> tuple[str, ...]:
    if config.memory_gib is None or memory_gib <= config.memory_gib:
        return ()
    return (
        f"about {memory_gib:.1f} GiB of memory are expected and --mem allows "
        f"{config.memory_gib:.1f} GiB; the scan is tried alone",
    )
