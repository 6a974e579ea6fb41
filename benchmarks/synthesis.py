"""How a training step's time divides between making an example and learning from it.

Usage: ``python benchmarks/synthesis.py RECIPE.toml DATA [--device cuda] [--steps N] [--threads N]``

Runs the recipe's own loop from random weights; nothing is saved. Every stage waits for the device
before and after it is timed, so that its share is its own. Prints a table: mean and median
milliseconds a step and share of the step; a stage that a step did not need counts as 0.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tlseg_bids.train import draw
from tlseg_bids.train.loop import Training
from tlseg_bids.train.recipe import load_recipe
from tlseg_bids.train.synth import compose

# Where a stage is called from, its name there, and what it is. None overlaps another.
STAGES: tuple[tuple[ModuleType | type, str, str], ...] = (
    (draw, "deformed_positions", "deformation"),
    (draw, "aged", "older or younger"),
    (compose, "read_classes", "labels read"),
    (compose, "read_image", "real image read"),
    (compose, "paint", "contrast, texture, gadolinium"),
    (compose, "strip_skull", "skull stripped"),
    (compose, "deface", "face removed"),
    (compose, "acquire", "scanner"),
    (draw.Draw, "_target", "target"),
    (draw.Draw, "_prior", "prior"),
)
MAKING, LEARNING = "example, in all", "network: forward, backward, update"


class Clock:
    """Seconds per stage and step, the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the block takes to a stage."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.step[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def watching(self, function: Callable, name: str) -> Callable:
        """The function, timed."""

        def watched(*arguments: Any, **options: Any) -> Any:
            with self.timed(name):
                return function(*arguments, **options)

        return watched


def measure(run: Training, steps: int, warm_up: int = 3) -> list[dict[str, float]]:
    """Seconds per stage of every step after the first `warm_up`."""
    clock, rows = Clock(run.device), []
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in STAGES]
    try:
        for owner, name, label in STAGES:
            setattr(owner, name, clock.watching(getattr(owner, name), label))
        for _ in range(warm_up + steps):
            clock.step = defaultdict(float)
            with clock.timed(MAKING):
                examples = [run.draw(run.rng) for _ in range(run.recipe.accumulate)]
            with clock.timed(LEARNING):
                run.learn(examples)
            rows.append(dict(clock.step))
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
    return rows[warm_up:]


def table(rows: list[dict[str, float]]) -> str:
    """The measurement as Markdown."""
    whole = float(np.mean([row[MAKING] + row[LEARNING] for row in rows]))
    lines = ["| stage | mean ms | median ms | share |", "|---|---|---|---|"]
    for label in (*(label for *_, label in STAGES), MAKING, LEARNING):
        values = np.array([row.get(label, 0.0) for row in rows])
        lines.append(
            f"| {label} | {1e3 * values.mean():.1f} | {1e3 * np.median(values):.1f} "
            f"| {100 * values.mean() / whole:.1f} % |"
        )
    return "\n".join([*lines, f"| step | {1e3 * whole:.1f} | | 100 % |"])


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    recipe = replace(load_recipe(options.recipe), start="")
    rows = measure(Training(recipe, options.data, None, options.device), options.steps)
    print(f"{recipe.name}, patch {recipe.patch}, {options.device}, {options.threads} threads, "
          f"{len(rows)} steps\n\n{table(rows)}")  # fmt: skip


if __name__ == "__main__":
    main()
