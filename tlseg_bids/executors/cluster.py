"""Jobs that are done by the workers of a Dask cluster.

A worker is a process on any machine that sees the dataset and the output folder under the same
paths. It does what a thread does (`tlseg_bids.runner.Attempt`): locks, reuse and atomic writing are
the same, so a lost worker's scan is simply done again. Dask sends jobs between processes as
pickles: whoever can reach the scheduler can run code as its user, so it belongs into a private
network or behind TLS (https://distributed.dask.org/en/stable/tls.html).
"""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tlseg_bids import __version__
from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.flow import Job, Outcome
from tlseg_bids.plan.device import Machine, choose_device
from tlseg_bids.runner import LOCKED, Attempt, Labour, Progress, not_tried
from tlseg_bids.runner import PATIENCE_S as LOCK_PATIENCE_S

if TYPE_CHECKING:
    from distributed import Client, Future

EXTRA = "pip install 'tlseg-bids[dask]'"
CLUSTERS = {
    "slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster",
    "htcondor": "HTCondorCluster", "oar": "OARCluster",
}  # fmt: skip
QUEUE_KEYS = {"cluster", "jobs", "options"}
PATIENCE_S = 60.0
ONE_SCAN_AT_A_TIME = ["--nthreads", "1"]


def on_dask(
    jobs: Sequence[Job],
    labour: Labour,
    progress: Progress,  # noqa: ARG001 - steps happen elsewhere; outcomes are told by `run_jobs`
) -> Iterator[tuple[Job, Outcome]]:
    """The executor of a Dask cluster: a task per job.

    With ``--device cuda`` a task takes one unit of the worker resource ``GPU``. The job of a
    worker that was lost goes to another one; after as many losses as the scheduler allows
    (``distributed.scheduler.allowed-failures``, 3) it failed.

    Raises
    ------
    UsageError
        If Dask is not installed, or no worker can take a job.
    NoInputError, DataError
        If scheduler or specification cannot be used, or a worker sees other files or has
        another version of the program.
    """
    config = labour.config
    if not jobs:
        return
    with ExitStack() as stack:
        client = stack.enter_context(connect(config, stack))
        needs = {"GPU": 1} if config.device.startswith("cuda") else {}
        if not str(config.dask).endswith(".toml"):
            _check_workers(client, needs, str(config.dask))
        yield from _collect(client, jobs, labour, needs)


def _collect(
    client: Client, jobs: Sequence[Job], labour: Labour, needs: dict[str, int]
) -> Iterator[tuple[Job, Outcome]]:
    """Outcomes as they come.

    Scans that another run holds come again at the end, and are then waited for. Dask blames a
    worker's death on every job that it had been given. The blamed are tried once more after that,
    one by one, so that only the guilty fail.
    """
    from distributed import as_completed

    waiting: dict[Future, Job] = {}
    number = count()

    def submit(job: Job, wait_s: float) -> Future:
        future = client.submit(
            attempt_on_worker, job, labour, __version__, wait_s,
            key=f"tlseg-{labour.run_id}-{next(number)}", resources=needs, pure=False,
        )  # fmt: skip
        waiting[future] = job
        return future

    left = {job.scan.path: job for job in jobs}
    held: list[Job] = []
    blamed = []
    try:
        for some, wait_s in ((jobs, 0.0), (held, LOCK_PATIENCE_S)):
            for future in as_completed([submit(job, wait_s) for job in some]):
                job = waiting.pop(future)
                if _killed(future):
                    blamed.append(job)
                    continue
                outcome = _outcome(future, job)
                locked = outcome.error.startswith(LOCKED)
                if locked and not wait_s:
                    held.append(job)
                    continue
                yield left.pop(job.scan.path), outcome
                if labour.config.stop_on_first_crash and outcome.status == "failed" and not locked:
                    yield from ((job, not_tried(job)) for job in left.values())
                    return
        for job in blamed:
            yield job, _outcome(submit(job, LOCK_PATIENCE_S), job)
    finally:
        client.cancel(list(waiting))


def _killed(future: Future) -> bool:
    """Whether workers died with this task; waits for it."""
    from concurrent.futures import CancelledError

    from distributed import KilledWorker

    try:
        return isinstance(future.exception(), KilledWorker)
    except CancelledError:  # the scheduler was lost
        return False


def attempt_on_worker(job: Job, labour: Labour, version: str, wait_s: float) -> Outcome:
    """Do one job in a Dask worker; what the jobs of a run share is prepared once per worker.

    Another run's lock is waited for, for `wait_s` seconds.

    Raises
    ------
    DataError, NoInputError
        If this worker cannot take part in the run.
    CannotCreateError, OutputError
        As `Attempt`.
    """
    from distributed import get_worker

    belongings = vars(get_worker())
    with belongings.setdefault("_tlseg_lock", Lock()):
        attempts = belongings.setdefault("_tlseg_attempts", {})
        if labour.run_id not in attempts:
            attempts.clear()  # the models of an earlier run
            attempts[labour.run_id] = _begin(labour, version)
    return attempts[labour.run_id](_placed(job, labour.config), wait_s)


def _begin(labour: Labour, version: str) -> Attempt:
    here = f"worker {os.getpid()} on {socket.gethostname()}"
    if version != __version__:
        raise DataError(
            f"the worker has tlseg {__version__} and the run is of {version}", here,
            "give all workers the same installation or image",
        )  # fmt: skip
    config = labour.config
    for folder in (config.bids_dir, config.out_dir / "logs" / f"config_{labour.run_id}.toml"):
        if not folder.exists():
            raise NoInputError(
                f"the worker does not see {folder}", here,
                "workers need the dataset and the output folder under the same paths",
            )  # fmt: skip
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(config.threads or config.nprocs, cpus)
    return replace(labour, config=replace(config, nprocs=threads, threads=threads)).begin(_Silent())


def _placed(job: Job, config: Config) -> Job:
    """The job with a device of this worker; the plan was made elsewhere."""
    machine = Machine() if config.device == "cpu" else Machine.here()
    device, warnings = choose_device(config.device, job.card.memory.device_gib, machine)
    return replace(job, device=device, warnings=(*job.warnings, *warnings))


class _Silent:
    """Progress of a worker, which nobody watches."""

    def begin(self, scans: int, models: int = 0) -> None: ...
    def step(self, scan: str, name: str, number: int, of: int) -> None: ...
    def finish(self, scan: str, status: str, note: str = "") -> None: ...


def _outcome(future: Future, job: Job) -> Outcome:
    """What a task answered, or why there is no answer."""
    killed = _killed(future)
    if future.status == "cancelled":
        what, hint = "the Dask scheduler was lost", "start the same command again"
        return Outcome(job.scan, "failed", error=what, hint=hint)
    if killed:
        what = "every worker that tried it was lost"
        hint = "look into the workers' logs; often they need more memory or a longer time limit"
        return Outcome(job.scan, "failed", error=what, hint=hint)
    return future.result()  # or what it raised


def connect(config: Config, stack: ExitStack) -> Client:
    """A client of the cluster that ``--dask`` names; a cluster started here ends with `stack`.

    Raises
    ------
    UsageError
        If Dask, or dask-jobqueue where needed, is not installed, or the specification is wrong.
    NoInputError, DataError
        If a file or the scheduler cannot be reached or read.
    """
    where = str(config.dask)
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("Dask is not installed", "--executor dask", EXTRA) from error
    if where.endswith(".toml"):
        return Client(stack.enter_context(start_cluster(Path(where))))
    file = {"scheduler_file": where} if where.endswith(".json") else {}
    if file and not Path(where).is_file():
        raise NoInputError(
            "there is no such scheduler file", where,
            "start `dask scheduler --scheduler-file FILE` first, or correct the path",
        )  # fmt: skip
    try:
        return Client(**file, timeout=30) if file else Client(where, timeout=30)
    except (OSError, TimeoutError, ValueError) as error:
        raise NoInputError(
            f"no Dask scheduler answers ({error or type(error).__name__})", f"--dask {where}",
            "start one with `dask scheduler`, and name the address that it prints",
        ) from error  # fmt: skip


def start_cluster(path: Path) -> Any:
    """The `dask_jobqueue` cluster that a TOML file describes.

    Keys are ``cluster`` (one of `CLUSTERS`), ``jobs`` (how many to submit) and the table
    ``options``: arguments of the class of dask-jobqueue, such as ``cores`` and ``memory``.
    """
    spec = read_queue_file(path)
    try:
        import dask_jobqueue
    except ImportError as error:
        raise UsageError("dask-jobqueue is not installed", f"--dask {path}", EXTRA) from error
    options = {"processes": 1, **spec.get("options", {})}
    extra = list(options.pop("worker_extra_args", []))
    try:
        cluster = getattr(dask_jobqueue, CLUSTERS[spec["cluster"]])(
            worker_extra_args=[*ONE_SCAN_AT_A_TIME, *extra], **options
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"dask-jobqueue refuses the options ({str(error).splitlines()[0]})", path,
            "see https://jobqueue.dask.org for the options of the cluster",
        ) from error  # fmt: skip
    cluster.scale(jobs=spec["jobs"])
    return cluster


def read_queue_file(path: Path) -> dict[str, Any]:
    """The content of a cluster specification, checked.

    Raises
    ------
    NoInputError
        If there is no such file.
    DataError
        If it is not TOML, or a key is missing, unknown or of the wrong kind.
    """
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoInputError(
            f"the cluster file cannot be read ({error.strerror})", path, "correct the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the cluster file is not TOML ({error})", path, "correct it") from error
    known = f"it takes cluster ({', '.join(CLUSTERS)}), jobs (1 or more) and a table options"
    if unknown := sorted(set(spec) - QUEUE_KEYS):
        raise DataError(f"unknown key '{unknown[0]}'", path, known)
    if spec.get("cluster") not in list(CLUSTERS):
        raise DataError(f"cluster = {spec.get('cluster')!r} is not known", path, known)
    jobs = spec.setdefault("jobs", 1)
    if type(jobs) is not int or jobs < 1 or not isinstance(spec.get("options", {}), dict):
        raise DataError(f"jobs = {jobs!r}, or options, is of the wrong kind", path, known)
    return spec


def _check_workers(client: Client, needs: dict[str, int], where: str) -> None:
    """Refuse to wait for ever for workers that nobody started."""
    try:
        client.wait_for_workers(1, timeout=PATIENCE_S)
    except TimeoutError as error:
        raise UsageError(
            f"the Dask scheduler has no worker after {PATIENCE_S:.0f} s", f"--dask {where}",
            "start some: dask worker ADDRESS --nthreads 1",
        ) from error  # fmt: skip
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    for name in needs:
        if not any(worker.get("resources", {}).get(name) for worker in workers):
            raise UsageError(
                f"none of {len(workers)} Dask workers offers the resource {name}",
                "--device cuda",
                f"start a worker per GPU: dask worker ADDRESS --nthreads 1 --resources {name}=1",
            )
