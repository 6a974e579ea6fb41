"""What a training run tells while it goes: lines, or a bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tlseg_bids.train.loop import Training

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
REFRESH_S = 0.5


class Watch:
    """Lines by `say`, which takes `flush` as `print` does.

    The order of calls is ``begin``, then ``step`` after every step and ``report`` now and then,
    then ``end``.
    """

    def __init__(self, say: Callable = print) -> None:
        self._say = say

    def begin(self, run: Training) -> None:
        """The run is ready, perhaps with steps done before."""

    def step(self, run: Training) -> None:
        """A step was done."""

    def report(self, line: str) -> None:
        """A new point of the curve, in words."""
        self.say(line)

    def say(self, line: str) -> None:
        """A message."""
        self._say(line, flush=True)

    def end(self) -> None:
        """The run is over, or failed."""


class Silence(Watch):
    """Nothing: for the processes that do not report."""

    def say(self, line: str) -> None:
        pass


class Bar(Watch):
    """A bar with the time left and the loss and soft Dice of the last steps."""

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm

        super().__init__()
        self._tqdm, self._stream, self._bar = tqdm, stream, None
        self._shown = 0.0

    def begin(self, run: Training) -> None:
        self._bar = self._tqdm(
            total=run.recipe.steps, initial=run.step, desc=run.recipe.name, file=self._stream,
            bar_format=BAR, dynamic_ncols=True,
        )  # fmt: skip

    def step(self, run: Training) -> None:
        now = time.monotonic()
        if now - self._shown > REFRESH_S or run.step == run.recipe.steps:
            self._shown = now
            loss, dice = run.recent()
            self._bar.set_postfix_str(f"loss {loss:.3f}, Dice {dice:.3f}", refresh=False)
        self._bar.update()

    def report(self, line: str) -> None:
        """The bar says it already."""

    def say(self, line: str) -> None:
        self._tqdm.write(line, file=self._stream)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
