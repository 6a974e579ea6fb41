"""Progress on stderr: bars on a terminal, one plain line at a time elsewhere.

The program reports to an object with the methods of `Progress`; it knows nothing of terminals.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from threading import Lock
from types import TracebackType
from typing import TextIO

from tlseg_bids.errors import amount, one_line

BAR = "{desc:<40.40} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
STEP_BAR = "  {desc:<38.38} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"


class Progress:
    """What the program tells while it runs; this one keeps silent.

    The order of calls is ``begin``, then for each scan ``step`` (once before each of its steps)
    and ``finish``, then ``close``. Scans may overlap, and calls may come from several threads.
    """

    def begin(self, scans: int, models: int = 0) -> None:
        """The run has so many scans, those that are skipped or reused included, and so many
        models to adapt, each of which has steps and an end as a scan has."""

    def step(self, scan: str, name: str, number: int, of: int) -> None:
        """`scan` begins the step `name`, the `number`-th (from 1) of `of`."""

    def finish(self, scan: str, status: str, note: str = "") -> None:
        """`scan` ended as `status` (done, reused, failed, skipped), with a remark."""

    def close(self) -> None:
        """The run is over."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Lines(Progress):
    """A line per finished scan; with `steps` also one per step. Every line is flushed."""

    def __init__(self, stream: TextIO, steps: bool = False) -> None:
        self._stream, self._steps = stream, steps
        self._scans = self._finished = 0
        self._started: dict[str, float] = {}
        self._lock = Lock()

    def begin(self, scans: int, models: int = 0) -> None:
        self._scans = scans + models
        also = f" and {amount(models, 'model')} to adapt" if models else ""
        self._print(f"{amount(scans, 'scan')}{also}")

    def step(self, scan: str, name: str, number: int, of: int) -> None:
        self._started.setdefault(scan, time.monotonic())
        if self._steps:
            self._print(f"{scan}: {name} ({number}/{of})")

    def finish(self, scan: str, status: str, note: str = "") -> None:
        started = self._started.pop(scan, None)
        took = "" if started is None else f" in {time.monotonic() - started:.0f} s"
        remark = f": {note}" if note else ""
        with self._lock:
            self._finished += 1
            self._print(f"[{self._finished}/{self._scans}] {scan} {status}{took}{remark}")

    def _print(self, line: str) -> None:
        print(one_line(line), file=self._stream, flush=True)


class Bars(Progress):
    """A bar for the run and one for each scan at work; finished scans leave a line above.

    Messages of `logging` are written above the bars while they stand.
    """

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm

        self._tqdm, self._stream = tqdm, stream
        self._run = None
        self._bars: dict[str, object] = {}
        self._places: dict[str, int] = {}
        self._lock = Lock()
        self._messages = ExitStack()

    def begin(self, scans: int, models: int = 0) -> None:
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._messages.enter_context(logging_redirect_tqdm())
        self._run = self._tqdm(
            total=scans + models, desc="scans", file=self._stream, position=0, bar_format=BAR
        )

    def step(self, scan: str, name: str, number: int, of: int) -> None:
        with self._lock:
            bar = self._bars[scan] if scan in self._bars else self._new_bar(scan, of)
            bar.total, bar.n = of, number - 1
            bar.set_description_str(one_line(f"{name:<8} {scan}"), refresh=True)

    def finish(self, scan: str, status: str, note: str = "") -> None:
        with self._lock:
            bar = self._bars.pop(scan, None)
            self._places.pop(scan, None)
            if bar is not None:
                bar.close()
            remark = f": {note}" if note else ""
            self._tqdm.write(one_line(f"{scan} {status}{remark}"), file=self._stream)
            if self._run is not None:
                self._run.update()

    def close(self) -> None:
        with self._lock:
            for bar in self._bars.values():
                bar.close()
            self._bars.clear()
            if self._run is not None:
                self._run.close()
            self._messages.close()

    def _new_bar(self, scan: str, of: int):
        """A bar on the uppermost free line below that of the run."""
        taken = set(self._places.values())
        place = min(set(range(1, len(taken) + 2)) - taken)
        self._places[scan] = place
        self._bars[scan] = self._tqdm(
            total=of, file=self._stream, position=place, leave=False, bar_format=STEP_BAR
        )
        return self._bars[scan]


def progress_on(stream: TextIO, verbosity: int = 0) -> Progress:
    """Bars if `stream` is a terminal that can draw them, else lines; steps as lines from -v on."""
    if verbosity == 0 and draws(stream):
        return Bars(stream)
    return Lines(stream, steps=verbosity > 0)


def draws(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that moves its cursor and knows its width."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False
