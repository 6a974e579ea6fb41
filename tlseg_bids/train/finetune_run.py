"""A run of fine-tuning: to its end, resumable to the step; how long a step of it takes."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlseg_bids.errors import OutputError
from tlseg_bids.train.finetune import FIRST_STAGE, FineTuning

CHECKPOINT_SECONDS = 30.0
REPORT_POINTS = 50
TRIAL_STEPS = 5
Report = Callable[[int, int], None]


def run(
    tuning: FineTuning,
    checkpoint: Path,
    report: Report,
    limit_s: float = math.inf,
    least_steps: int = 0,
) -> dict[str, Tensor]:
    """Run to the end, from the checkpoint if there is one of this very run.

    Parameters
    ----------
    tuning : FineTuning
        A new run.
    checkpoint : Path
        Written every `CHECKPOINT_SECONDS` and at the end, whole or not at all.
    report : callable
        Told the steps done and in all.
    limit_s : float
        Seconds of training after which the run ends early, where the machine became slower.
    least_steps : int
        Steps that it takes however long they last.

    Returns
    -------
    dict of str to Tensor
        The child's parameters (`FineTuning.finish`).

    Raises
    ------
    OutputError
        If the checkpoint cannot be written.
    """
    if checkpoint.is_file():
        saved = load_checkpoint(checkpoint)
        if saved is not None:
            tuning.resume(saved)
    every = max(tuning.steps // REPORT_POINTS, 1)
    written = time.monotonic()
    least_steps = min(least_steps, tuning.steps)
    while tuning.step < least_steps or (tuning.step < tuning.steps and tuning.seconds < limit_s):
        begun = time.monotonic()
        tuning.learn()
        tuning.seconds += time.monotonic() - begun
        if tuning.step % every == 0 or tuning.step == tuning.steps:
            tuning.note()
        report(tuning.step, tuning.steps)
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            save_checkpoint(tuning.content(), checkpoint)
            written = time.monotonic()
    tuning.note()
    save_checkpoint(tuning.content(), checkpoint)
    return tuning.finish()


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, tensors and plain values only; None if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return None


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OutputError(
            f"the checkpoint cannot be written ({error})",
            path,
            "free some space, or give another folder with -w, then start again",
        ) from error


def measure_step(tuning: FineTuning) -> float:
    """Seconds that a step takes in the mean over the run's stages; uses the run up."""
    first = _measure_stage(tuning)
    if tuning.how.scope != "two-stage":
        return first
    tuning.step = math.ceil(FIRST_STAGE * tuning.steps)
    return FIRST_STAGE * first + (1 - FIRST_STAGE) * _measure_stage(tuning)


def _measure_stage(tuning: FineTuning) -> float:
    """Seconds that a step takes now: the median of `TRIAL_STEPS` after a first one."""
    seconds = []
    for _ in range(TRIAL_STEPS + 1):
        begun = time.monotonic()
        tuning.learn()
        if tuning.parent.device.type == "cuda":
            torch.cuda.synchronize(tuning.parent.device)
        seconds.append(time.monotonic() - begun)
    return statistics.median(seconds[1:])
