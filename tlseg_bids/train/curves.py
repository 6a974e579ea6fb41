"""How a run went: where its time goes, and its loss and soft Dice as a table and a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tlseg_bids.bids.atomic import atomic, write_text

COLUMNS = ("step", "seconds", "loss", "soft_dice", "drawing_seconds", "learning_seconds")
NOT_KNOWN = "n/a"
SMOOTHING = 0.8


class Laps:
    """Seconds that each part of a run takes.

    On a GPU the time is taken there, between the marks that the parts leave in its queue, so that
    measuring makes nobody wait.

    Parameters
    ----------
    device : torch.device
        Where the work is done.
    totals : dict of str to float
        Seconds so far.
    """

    def __init__(self, device: torch.device, totals: dict[str, float]) -> None:
        self._cuda = device.type == "cuda"
        self._totals = dict(totals)
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._last: Any = None

    def begin(self) -> None:
        """What follows belongs to the next `end`."""
        self._last = self._mark()

    def end(self, part: str) -> None:
        """Since `begin`, or the last `end`, the run did `part`."""
        now = self._mark()
        if self._cuda:
            self._open.append((part, self._last, now))
        else:
            self._totals[part] = self._totals.get(part, 0.0) + now - self._last
        self._last = now

    def totals(self) -> dict[str, float]:
        """Seconds of every part."""
        if self._open:
            torch.cuda.synchronize()
        for part, first, last in self._open:
            seconds = first.elapsed_time(last) / 1000
            self._totals[part] = self._totals.get(part, 0.0) + seconds
        self._open = []
        return dict(self._totals)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_left(seconds: float) -> str:
    """``3 h 05 min``, ``12 min`` or ``40 s``."""
    whole = max(round(seconds), 0)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min" if whole >= 60 else f"{whole} s"


def write_curve(curve: list[tuple], name: str, folder: Path) -> None:
    """Write ``FOLDER/<name>_curve.tsv`` and, from the first point on, ``FOLDER/<name>_curve.png``.

    Parameters
    ----------
    curve : list of tuple
        Rows of `COLUMNS`; times are totals since the run began. Rows of a run that did not
        measure its parts are shorter.

    Raises
    ------
    CannotCreateError, OutputError
        If they cannot be written.
    """
    lines = ["\t".join(COLUMNS)]
    for row in curve:
        known = [str(row[0]), *(f"{value:.6g}" for value in row[1:])]
        lines.append("\t".join([*known, *[NOT_KNOWN] * (len(COLUMNS) - len(row))]))
    write_text(folder / f"{name}_curve.tsv", "\n".join(lines) + "\n")
    if not curve:
        return
    with atomic(folder / f"{name}_curve.png") as stream:
        _picture(curve, name).savefig(stream, format="png", dpi=100)


def _picture(curve: list[tuple], name: str):
    """Loss and soft Dice against the step, and how long it took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.15, top=0.89, wspace=0.22)
    steps = [row[0] for row in curve]
    for panel, column in zip(figure.subplots(1, 2), ("loss", "soft_dice"), strict=True):
        values = [row[COLUMNS.index(column)] for row in curve]
        panel.plot(steps, values, color="0.75", linewidth=0.8)
        panel.plot(steps, _smooth(values), color="tab:blue")
        panel.set(xlabel="step", ylabel=column.replace("_", " "))
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: step {steps[-1]}, {time_left(curve[-1][1])}", fontsize=10)
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average that starts from the first value."""
    found: list[float] = []
    for value in values:
        found.append(SMOOTHING * found[-1] + (1 - SMOOTHING) * value if found else value)
    return found
