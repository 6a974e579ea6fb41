"""Many jobs, a few at a time: locks, failures that stop nothing else, status and progress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.config import Config
from tlseg_bids.errors import CannotCreateError, LockedError, OutputError, TlsegError, no_memory
from tlseg_bids.flow import Job, Outcome, Plan, Skip
from tlseg_bids.resources import peak_memory_gib

STEPS = ("read", "find", "label", "back", "write")
ENDS_THE_RUN = (CannotCreateError, OutputError)
LOCKED = "locked: "
PATIENCE_S = 600.0
"""How long a scan that another run is processing is waited for, once nothing else is left to do."""


class Progress(Protocol):
    """Who is told how far the run is; see `tlseg_bids.cli.progress`."""

    def begin(self, scans: int, models: int = 0) -> None: ...
    def step(self, scan: str, name: str, number: int, of: int) -> None: ...
    def finish(self, scan: str, status: str, note: str = "") -> None: ...


class Steps:
    """The steps of one job: ``with steps("read"):`` tells progress and takes the time."""

    def __init__(self, scan: str, progress: Progress) -> None:
        self.scan, self.progress = scan, progress
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, more: bool = False) -> Iterator[None]:
        """Run the block as the step `name` (one of `STEPS`), or as `more` of it."""
        self.progress.step(self.scan, name, STEPS.index(name) + 1, len(STEPS))
        start = time.monotonic()
        try:
            yield
        finally:
            before = self.seconds.get(name, 0.0) if more else 0.0
            self.seconds[name] = round(before + time.monotonic() - start, 2)


Work = Callable[[Job, Steps], Outcome]
"""Does one job; whatever it raises becomes a failed outcome, but for `ENDS_THE_RUN`."""


@dataclass(frozen=True)
class Labour:
    """What whoever does jobs of a run has to know, here or in a process on another machine.

    Parameters
    ----------
    config : Config
        The run.
    run_id : str
        Its id, for crash files.
    prepare : callable
        Makes the `Work` of a process: loads what its jobs share.
    """

    config: Config
    run_id: str
    prepare: Callable[[Config], Work]

    def begin(self, progress: Progress) -> Attempt:
        """Prepare this process and return what it does with a job."""
        return Attempt(self, self.prepare(self.config), progress)


class Attempt:
    """Do a job, or find it done, or say why it cannot be done.

    A job is locked meanwhile, so that of all processes on all machines one does it.
    """

    def __init__(self, labour: Labour, work: Work, progress: Progress) -> None:
        config = labour.config
        self.config, self.work, self.progress = config, work, progress
        self.outputs = Derivatives(config.out_dir, config.bids_dir, config.probabilities)
        self.log = RunLog(config.out_dir, labour.run_id)
        self.stopped = False

    def __call__(self, job: Job, wait_s: float = 0.0) -> Outcome:
        """The outcome of a job, waiting for another run's lock; raises only `ENDS_THE_RUN`."""
        steps = Steps(job.scan.path.name, self.progress)
        if self.stopped:
            return not_tried(job)
        try:
            with self.outputs.lock(job, wait_s):
                if self.outputs.finished(job):
                    return Outcome(job.scan, "reused", self.outputs.paths(job).files)
                return self.work(job, steps)
        except ENDS_THE_RUN:
            raise
        except LockedError as error:
            return Outcome(job.scan, "failed", error=LOCKED + error.what, hint=error.hint)
        except Exception as error:
            self.stopped |= self.config.stop_on_first_crash
            crash = self.log.crash(job.scan, error)
            what, hint = _sentence(error, crash.name)
            return Outcome(
                job.scan, "failed", (), dict(steps.seconds), peak_memory_gib(), what, hint
            )


Executor = Callable[[Sequence[Job], Labour, Progress], Iterator[tuple[Job, Outcome]]]
"""Has every job done and yields each with its outcome as soon as there is one."""


def in_threads(
    jobs: Sequence[Job], labour: Labour, progress: Progress
) -> Iterator[tuple[Job, Outcome]]:
    """The executor of one machine: as many jobs at once as CPUs and memory allow."""
    yield from side_by_side(jobs, labour, labour.begin(progress))


Try = Callable[[Job, float], Outcome]
"""Does a job as `Attempt` does: the job, and how long its lock is waited for."""


def side_by_side(
    jobs: Sequence[Job], labour: Labour, attempt: Try, give_up: Callable[[], None] = lambda: None
) -> Iterator[tuple[Job, Outcome]]:
    """Have every job done by `attempt` in threads of this process.

    Scans that another run holds come again at the end, when that run has probably done them. Who
    stops the run waits for the scans at work, unless `give_up` can end those.
    """
    need = max((job.memory_gib for job in jobs), default=1.0)
    held = []
    with ThreadPoolExecutor(labour.config.at_once(need)) as pool:
        try:
            for job, outcome in _each(pool, jobs, attempt, 0.0):
                if outcome.error.startswith(LOCKED):
                    held.append(job)
                else:
                    yield job, outcome
            yield from _each(pool, held, attempt, PATIENCE_S)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):
                give_up()
            raise


def _each(
    pool: ThreadPoolExecutor, jobs: Sequence[Job], attempt: Try, wait_s: float
) -> Iterator[tuple[Job, Outcome]]:
    waiting = {pool.submit(attempt, job, wait_s): job for job in jobs}
    for future in as_completed(waiting):
        yield waiting.pop(future), future.result()


Record = Callable[[Outcome, str], None]


def run_jobs(
    plan: Plan, labour: Labour, record: Record, progress: Progress, execute: Executor = in_threads
) -> list[Outcome]:
    """Run every job of the plan.

    Parameters
    ----------
    labour : Labour
        What a job needs.
    record : callable
        Told of every outcome as soon as there is one, with the model's name.
    execute : callable
        Who does the jobs, and where.

    Returns
    -------
    list of Outcome
        One per scan of the plan: the skipped ones first, then the jobs in the plan's order.

    Raises
    ------
    CannotCreateError, OutputError
        If the output folder is full or cannot be written.
    """
    progress.begin(len(plan.jobs) + len(plan.skips))

    def end(outcome: Outcome, model: str = "") -> Outcome:
        note = " – ".join(filter(None, (outcome.error, outcome.hint)))
        progress.finish(outcome.scan.path.name, outcome.status, note)
        record(outcome, model)
        return outcome

    outcomes = [end(_skipped(skip)) for skip in plan.skips]
    done = {}
    for job, outcome in execute(plan.jobs, labour, progress):
        done[job.scan.path] = end(outcome, job.card.name)
    return outcomes + [done[job.scan.path] for job in plan.jobs]


def not_tried(job: Job) -> Outcome:
    """The outcome of a job after another one failed under ``--stop-on-first-crash``."""
    hint = "an earlier scan failed and --stop-on-first-crash was given"
    return Outcome(job.scan, "failed", error="not tried", hint=hint)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """0 without failures, 75 if all failures are scans that another run holds, else 1."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed and all(outcome.error.startswith(LOCKED) for outcome in failed):
        return LockedError.exit_code
    return int(bool(failed))


def _skipped(skip: Skip) -> Outcome:
    """A scan that is not tried; a failure unless an option asked for it."""
    status = "skipped" if skip.wanted else "failed"
    return Outcome(skip.scan, status, error=skip.reason, hint=skip.hint)


def _sentence(error: Exception, crash: str) -> tuple[str, str]:
    """What went wrong and what to do about it."""
    if isinstance(error, TlsegError):
        return error.what, error.hint
    if no_memory(error):
        return "not enough memory", "lower --nprocs, or use --device cpu, or a larger machine"
    return (
        f"{type(error).__name__}: {error}",
        f"this is a defect of the program: please report it with logs/{crash}",
    )
