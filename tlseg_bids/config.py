"""Everything a run was asked to do, as one frozen thing.

Built by `tlseg_bids.cli.run` from the command line and `--config-file`; passed by hand from
`app` to whoever needs it. There is no global copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Config:
    """One run of the BIDS App. Paths are absolute; times in seconds; memory in GiB."""

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
    age: str | None = None
    multi_run: str = "each"
    shard: tuple[int, int] = (1, 1)
    compat: bool = False
    probabilities: bool = False
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    stop_on_first_crash: bool = False
    random_seed: int = 0
    verbosity: int = 0
