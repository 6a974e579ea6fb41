"""Many jobs, a few at a time: locks, failures that stop nothing else, status and progress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.config import Config
from tlseg_bids.errors import CannotCreateError, LockedError, OutputError, TlsegError
from tlseg_bids.flow import Job, Outcome, Plan, Skip
from tlseg_bids.resources import peak_memory_gib

STEPS = ("read", "find", "label", "back", "write")
ENDS_THE_RUN = (CannotCreateError, OutputError)
LOCKED = "locked: "


class Progress(Protocol):
    """Who is told how far the run is; see `tlseg_bids.cli.progress`."""

    def begin(self, scans: int) -> None: ...
    def step(self, scan: str, name: str, number: int, of: int) -> None: ...
    def finish(self, scan: str, status: str, note: str = "") -> None: ...


class Steps:
    """The steps of one job: ``with steps("read"):`` tells progress and takes the time."""

    def __init__(self, scan: str, progress: Progress) -> None:
        self.scan, self.progress = scan, progress
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the block as the step `name` (one of `STEPS`)."""
        self.progress.step(self.scan, name, STEPS.index(name) + 1, len(STEPS))
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - start, 2)


Work = Callable[[Job, Steps], Outcome]


def run_jobs(
    plan: Plan, config: Config, outputs: Derivatives, log: RunLog, progress: Progress, work: Work
) -> list[Outcome]:
    """Run every job of the plan.

    Parameters
    ----------
    work : callable
        Does one job; whatever it raises becomes a failed outcome with a crash file, but
        `ENDS_THE_RUN`, after which no further job could be written either.

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
    runner = _Runner(config, outputs, log, progress, work)
    outcomes = [runner.skipped(skip) for skip in plan.skips]
    need = max((job.memory_gib for job in plan.jobs), default=1.0)
    with ThreadPoolExecutor(config.at_once(need)) as pool:
        waiting = [pool.submit(runner.outcome, job) for job in plan.jobs]
        try:
            outcomes += [future.result() for future in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """0 without failures, 75 if all failures are scans that another run holds, else 1."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed and all(outcome.error.startswith(LOCKED) for outcome in failed):
        return LockedError.exit_code
    return int(bool(failed))


class _Runner:
    """What every job of a run shares."""

    def __init__(
        self, config: Config, outputs: Derivatives, log: RunLog, progress: Progress, work: Work
    ) -> None:
        self.config, self.outputs, self.log = config, outputs, log
        self.progress, self.work = progress, work
        self.stopped = False

    def skipped(self, skip: Skip) -> Outcome:
        """A scan that is not tried; a failure unless an option asked for it."""
        status = "skipped" if skip.wanted else "failed"
        return self._end(Outcome(skip.scan, status, error=skip.reason, hint=skip.hint), "")

    def outcome(self, job: Job) -> Outcome:
        """Do a job, or find it done, or say why it cannot be done."""
        steps = Steps(job.scan.path.name, self.progress)
        if self.stopped:
            hint = "an earlier scan failed and --stop-on-first-crash was given"
            return self._end(Outcome(job.scan, "failed", error="not tried", hint=hint), "")
        try:
            with self.outputs.lock(job):
                if self.outputs.finished(job):
                    done = Outcome(job.scan, "reused", self.outputs.paths(job).files)
                else:
                    done = self.work(job, steps)
        except ENDS_THE_RUN:
            raise
        except Exception as error:
            self.stopped |= self.config.stop_on_first_crash
            crash = self.log.crash(job.scan, error)
            what, hint = _sentence(error, crash.name)
            done = Outcome(
                job.scan, "failed", (), dict(steps.seconds), peak_memory_gib(), what, hint
            )
        return self._end(done, job.card.name)

    def _end(self, outcome: Outcome, model: str) -> Outcome:
        self.log.record(outcome, model)
        note = " – ".join(filter(None, (outcome.error, outcome.hint)))
        self.progress.finish(outcome.scan.path.name, outcome.status, note)
        return outcome


def _sentence(error: Exception, crash: str) -> tuple[str, str]:
    """What went wrong and what to do about it."""
    if isinstance(error, LockedError):
        return LOCKED + error.what, error.hint
    if isinstance(error, TlsegError):
        return error.what, error.hint
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "not enough memory", "lower --nprocs, or use --device cpu, or a larger machine"
    return (
        f"{type(error).__name__}: {error}",
        f"this is a defect of the program: please report it with logs/{crash}",
    )
