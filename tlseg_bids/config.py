"""Everything a run was asked to do, as one frozen thing.

Built by `tlseg_bids.cli.run` from the command line and `--config-file`; passed by hand from
`app` to whoever needs it. There is no global copy.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

OPTIONS = {
    "participants": "participant-label", "sessions": "session-label",
    "filters": "bids-filter-file", "database_dir": "bids-database-dir",
    "threads": "omp-nthreads", "memory_gib": "mem", "model_dirs": "models", "verbosity": "verbose",
    "labels_dir": "labels", "site": "name", "budget_minutes": "budget",
    "scan_timeout_minutes": "scan-timeout",
}  # fmt: skip
"""Options whose name differs from that of the field they set."""

ARGUMENTS = ("bids_dir", "out_dir", "level")
NO_OPTIONS = (*ARGUMENTS, "validate", "command")
DEFAULTS = {"shard": (1, 1), "executor": "local"}
"""Values that are no decision although they are not empty."""
ADAPTATION = ("fine_tune", "labels_dir", "site", "base", "budget_minutes")
AT_ONCE = 8
"""Scans that share a process where nobody says how many: a tenth of a scan's time is Python's own
and holds its lock, so more would wait for each other."""
ALWAYS = ("nprocs", "device", "random_seed")
NO_ENTITY = "Query.NONE"
"""What a filter asks for instead of ``null``, which TOML does not have."""


@dataclass(frozen=True)
class Config:
    """One run of the BIDS App. Paths are absolute; memory in GiB.

    Parameters
    ----------
    nprocs, threads : int
        CPUs the run may use in all, and CPUs one scan may use: ``nprocs // threads`` scans can
        run at once (`at_once`). 0 threads means that `shared_out` decides, `nprocs` until then.
    memory_gib : float or None
        Memory the run may use in all; None is no limit.
    filters : dict
        Content of ``--bids-filter-file``, as it was read.
    shard : tuple of int
        (I, N): shard I of N, counted from 1.
    offline : bool
        Never fetch the weights of a model that are not on this machine.
    volume, icv_correction, head_size : str
        What the level ``group`` computes of, corrects by, and with (`tlseg_bids.group`).
    combat, combat_covariates, combat_reference
        Columns of its table that name the site and what ComBat keeps, and the site that stays.
    fit_where : tuple of str
        ``COLUMN=VALUE``: the scans that its corrections are fitted on.
    group_parameters, ratings
        Files that it reads: an earlier fit, and exported ratings.
    scan_timeout_minutes : float or None
        Time after which a scan has failed; None is no limit.
    output_spaces : tuple of str
        Templates as TemplateFlow writes them, that labels are wanted in too.
    executor : str
        ``local``, or ``dask`` for the cluster that `dask` names.
    dask : str or None
        Address of a scheduler, its scheduler file (.json), or a cluster specification (.toml).
    fine_tune : str or None
        Recipe of an adaptation: ``auto``, a preset's name or a TOML file; None labels scans.
    labels_dir : Path or None
        Derivative with the label images to adapt to.
    site, base : str or None
        Name of the adapted model, and of the model that is adapted.
    budget_minutes : float
        Time an adaptation may take.
    verbosity : int
        Number of ``-v``; from 2 on errors come with a traceback.
    command : str
        The command line as it was typed, for reports; no part of what is asked for.
    """

    bids_dir: Path
    out_dir: Path
    level: str
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)
    database_dir: Path | None = None
    validate: bool = True
    work_dir: Path | None = None
    nprocs: int = 1
    threads: int = 0
    memory_gib: float | None = None
    device: str = "auto"
    model: str | None = None
    model_dirs: tuple[Path, ...] = ()
    licence: str = "any"
    protocol: str | None = None
    age: str | None = None
    multi_run: str = "each"
    shard: tuple[int, int] = (1, 1)
    compat: bool = False
    output_spaces: tuple[str, ...] = ()
    probabilities: bool = False
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    stop_on_first_crash: bool = False
    random_seed: int = 0
    verbosity: int = 0
    offline: bool = False
    volume: str = "hard"
    icv_correction: str = "none"
    head_size: str = "icv"
    combat: str | None = None
    combat_covariates: tuple[str, ...] = ()
    combat_reference: str | None = None
    fit_where: tuple[str, ...] = ()
    group_parameters: Path | None = None
    ratings: tuple[Path, ...] = ()
    scan_timeout_minutes: float | None = None
    executor: str = "local"
    dask: str | None = None
    fine_tune: str | None = None
    labels_dir: Path | None = None
    site: str = "site"
    base: str | None = None
    budget_minutes: float = 60.0
    command: str = field(default="tlseg", compare=False)

    def at_once(self, memory_gib: float) -> int:
        """How many scans of `memory_gib` each may run at once under `nprocs` and `memory_gib`."""
        by_cpu = self.nprocs // (self.threads or self.nprocs)
        by_memory = by_cpu if self.memory_gib is None else int(self.memory_gib // memory_gib)
        return max(1, min(by_cpu, by_memory))

    def shared_out(self, scans: int, each_gib: float, free_gib: float | None) -> Config:
        """With CPUs for one scan, where `threads` leaves that open.

        As many scans side by side, up to `AT_ONCE`, as there are CPUs, scans and memory for:
        several scans on a CPU each are labelled sooner than one after the other on all of them.

        Parameters
        ----------
        scans : int
            Scans to label.
        each_gib : float
            Memory that the largest takes.
        free_gib : float or None
            Memory that is free, if known; a tenth of it is left alone.
        """
        if self.threads:
            return self
        free = math.inf if free_gib is None else 0.9 * free_gib
        room = min(free, self.memory_gib or math.inf) / max(each_gib, 0.1)
        at_once = max(1, int(min(AT_ONCE, self.nprocs, scans, room)))
        return replace(self, threads=max(1, self.nprocs // at_once))

    def to_toml(self) -> str:
        """This run as a file for ``--config-file``; the arguments stand in a comment.

        What is off or empty is left out, so that the file reads as a list of decisions.
        """
        import tomli_w

        table: dict[str, Any] = {} if self.validate else {"skip-bids-validation": True}
        for one in fields(self):
            value = getattr(self, one.name)
            known = one.name not in NO_OPTIONS and value is not None
            known &= self.fine_tune is not None or one.name not in ADAPTATION
            if known and (value or one.name in ALWAYS) and value != DEFAULTS.get(one.name):
                table[OPTIONS.get(one.name, one.name.replace("_", "-"))] = _plain(one.name, value)
        arguments = " ".join(repr(str(getattr(self, name))) for name in ARGUMENTS)
        text = f"# tlseg {arguments} --config-file THIS_FILE\n{tomli_w.dumps(table)}"
        return without_home(text)


def without_home(text: str) -> str:
    """`text` with the user's home folder as ``~``, so that no log or page tells a user's name."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=[/\\'\"\s]|$)", "~", text) if len(home) > 1 else text


def _plain(name: str, value: Any) -> Any:
    """A field's value as an option takes it."""
    if name == "shard":
        return f"{value[0]}/{value[1]}"
    if name == "memory_gib":
        return f"{value:.12g}G"
    if value is None:
        return NO_ENTITY
    if isinstance(value, dict):
        return {key: _plain(name, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(name, item) for item in value]
    return str(value) if isinstance(value, Path) else value
