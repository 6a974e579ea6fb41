"""Jobs that are done in processes of this machine which may be killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import local

from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.errors import ScanError, amount
from tlseg_bids.flow import Job, Outcome
from tlseg_bids.runner import ENDS_THE_RUN, LOCKED, Labour, Progress, not_tried, side_by_side

START = "spawn"
"""How processes begin; a fork would inherit the locks of PyTorch's threads."""
KILLED = "often it needs more memory: lower --nprocs, or use a larger machine"
TOO_LONG = "raise --scan-timeout, or look at the scan; the others were done"


def in_processes(
    jobs: Sequence[Job], labour: Labour, progress: Progress
) -> Iterator[tuple[Job, Outcome]]:
    """The executor of one machine where a scan must not take longer than ``--scan-timeout``.

    Each scan that is labelled at a time has a process of its own, which is killed when the time is
    over, or may be killed by the system for its memory: its scan has then failed, and the others
    go on in a new process.
    """
    slots = Slots(labour, progress)
    with closing(slots):
        yield from side_by_side(jobs, labour, slots, slots.close)


class Slots:
    """Does jobs in processes, one for each thread that asks."""

    def __init__(self, labour: Labour, progress: Progress) -> None:
        self._labour, self._progress = labour, progress
        self._here, self._every, self._stopped = local(), [], False

    def __call__(self, job: Job, wait_s: float) -> Outcome:
        """As `tlseg_bids.runner.Attempt`, in this thread's process."""
        if self._stopped:
            return not_tried(job)
        slot = getattr(self._here, "slot", None)
        if slot is None or not slot.is_alive:
            if slot is not None:
                self._every.remove(slot)  # with its files
            slot = self._here.slot = Slot(self._labour)
            self._every.append(slot)
        outcome = slot.do(job, wait_s, self._progress)
        failed = outcome.status == "failed" and not outcome.error.startswith(LOCKED)
        self._stopped |= failed and self._labour.config.stop_on_first_crash
        return outcome

    def close(self) -> None:
        """End every process."""
        self._stopped = True
        for slot in self._every:
            slot.close()


class Slot:
    """A process that does one job after another, as it is told."""

    def __init__(self, labour: Labour) -> None:
        self.labour, self._ready, self._closed = labour, False, False
        context = get_context(START)
        self._pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(labour, other), daemon=True)
        self.process.start()
        other.close()

    @property
    def is_alive(self) -> bool:
        """Whether it can be given a job."""
        return self.process.is_alive()

    def do(self, job: Job, wait_s: float, progress: Progress) -> Outcome:
        """Have a job done; kill the process if that takes too long.

        Raises
        ------
        CannotCreateError, OutputError
            As `Attempt`.
        """
        minutes = self.labour.config.scan_timeout_minutes
        try:
            if not self._ready:  # loading the program is not the scan's time
                self._ready = self._pipe.recv()
            end = time.monotonic() + wait_s + 60 * minutes
            self._pipe.send((job, wait_s))
            while self._pipe.poll(max(0.0, end - time.monotonic())):
                answer = self._pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, Outcome):
                    return answer
                progress.step(*answer)
        except (EOFError, ConnectionError):
            if self._closed:
                return not_tried(job)
            self.process.join()
            return self._lost(job, f"the process that labelled it {_end_of(self.process)}", KILLED)
        self.process.kill()
        self.process.join()
        return self._lost(job, f"it took more than {amount(float(minutes), 'minute')}", TOO_LONG)

    def close(self) -> None:
        """End the process; the job that it does was not its failure."""
        self._closed = True
        self.process.kill()

    def _lost(self, job: Job, what: str, hint: str) -> Outcome:
        RunLog(self.labour.config.out_dir, self.labour.run_id).crash(
            job.scan, ScanError(what, job.scan.path, hint)
        )
        return Outcome(job.scan, "failed", error=what, hint=hint)


def serve(labour: Labour, pipe: Connection) -> None:
    """What a `Slot`'s process does until the pipe is closed, or the process of the run is gone.

    Ctrl-C, which a terminal sends to every process, is heard by that of the run alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    attempt = labour.begin(_Sent(pipe))
    pipe.send(True)
    with suppress(EOFError, ConnectionError):
        while True:
            try:
                pipe.send(attempt(*pipe.recv()))
            except ENDS_THE_RUN as error:
                pipe.send(error)


class _Sent:
    """Progress that is told to the process that shows it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def begin(self, scans: int, models: int = 0) -> None: ...
    def finish(self, scan: str, status: str, note: str = "") -> None: ...

    def step(self, scan: str, name: str, number: int, of: int) -> None:
        try:
            self._pipe.send((scan, name, number, of))
        except ConnectionError:  # nobody waits for this scan any more
            raise SystemExit(1) from None


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"was killed (signal {-code})" if code < 0 else f"ended by itself (code {code})"
