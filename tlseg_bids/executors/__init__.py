"""Who does the jobs of a run: threads, processes that may be killed, workers of a Dask cluster."""

from __future__ import annotations

from tlseg_bids.config import Config
from tlseg_bids.executors.cluster import on_dask
from tlseg_bids.executors.processes import in_processes
from tlseg_bids.runner import Executor, in_threads


def choose_executor(config: Config) -> Executor:
    """The executor that ``--executor`` asks for."""
    if config.executor != "local":
        return on_dask
    return in_threads if config.scan_timeout_minutes is None else in_processes
