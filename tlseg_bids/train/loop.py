"""The training loop: resumable to the step, decided by its seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tlseg_bids.networks import build
from tlseg_bids.train.dataset import (
    Sample,
    align,
    build_template,
    default_protocol,
    load_classes,
    load_dataset,
)
from tlseg_bids.train.draw import Draw, Example, atlas
from tlseg_bids.train.losses import segmentation_loss
from tlseg_bids.train.recipe import Recipe, code_version, load_checkpoint, load_start
from tlseg_bids.train.synth import Random

REPORT_EVERY = 50
LARGEST_GRADIENT = 5.0


def load_samples(recipe: Recipe, root: Path) -> dict[str, list[Sample]]:
    """The recipe's datasets under `root`, without the subjects of the held-out fold."""
    protocol = default_protocol()
    samples = {}
    for name, rules in recipe.datasets.items():
        found = load_dataset(root / name, name, protocol, rules)
        if recipe.fold and name in recipe.fold_datasets:
            k, n = recipe.fold
            found = [s for i, s in enumerate(found) if i % n != k]
        samples[name] = found
    return samples


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to 1 % of the base rate."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1))))


def new_state(recipe: Recipe, samples: dict[str, list[Sample]], start: dict | None) -> dict:
    """Template and prior: taken from `start`, else made from the first dataset."""
    protocol = default_protocol()
    classes = load_classes(protocol)
    if start is not None:
        state = {k: start[k] for k in ("template", "prior") if k in start}
    else:
        state = {"template": build_template(next(iter(samples.values())), protocol)}
    for found in samples.values():
        align(found, state["template"], protocol)
    if recipe.role == "segmenter" and "prior" not in state:
        state["prior"] = atlas(next(iter(samples.values())), classes, len(protocol), recipe.box_mm)
    return state


def lineage(start: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The runs that a run's starting weights went through, eldest first."""
    if start is None:
        return []
    recipe = start["recipe"]
    own = {
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "steps": start["step"],
        "seconds": round(start["seconds"]),
        "data": start["data"],
    }
    return [*start.get("lineage", []), own]


def train(
    recipe: Recipe, root: Path, out: Path, threads: int = 2, log: Callable = print,
    until: int | None = None,
) -> Path:  # fmt: skip
    """Run a recipe, or its first `until` steps; returns the checkpoint `OUT/<name>.pt`.

    A checkpoint that is there already is resumed: weights, moments, averages and the generator's
    state, so that a run that was cut off ends where an uncut one would.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{recipe.name}.pt"
    run = Training(recipe, root, load_checkpoint(path) if path.exists() else None)
    last = recipe.steps if until is None else min(until, recipe.steps)
    while run.step < last:
        run.learn(run.draw(run.rng))
        if run.step % REPORT_EVERY == 0:
            log(run.report(), flush=True)
        if run.step % recipe.checkpoint_every == 0 or run.step == last:
            temporary = path.with_suffix(".tmp")
            torch.save(run.content(), temporary)
            temporary.replace(path)
    return path


class Training:
    """The state of a run: networks, optimiser, generator and curve.

    Parameters
    ----------
    saved : dict or None
        A checkpoint of the same recipe, to go on from.
    """

    def __init__(self, recipe: Recipe, root: Path, saved: dict[str, Any] | None) -> None:
        start = load_start(Path(recipe.start), recipe.role) if recipe.start else None
        samples = load_samples(recipe, root)
        self.recipe, self.code, self.lineage = recipe, code_version(), lineage(start)
        self.data = {f"{s.dataset}/{s.name}": s.sha256 for one in samples.values() for s in one}
        self.fixed = new_state(recipe, samples, saved or start)
        self.network, self.average = self._network(), self._network()
        if start:
            self.network.load_state_dict(start["average"])
        self.average.load_state_dict(self.network.state_dict())
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.rng = Random(recipe.seed)
        self.step, self.seconds, self.curve = 0, 0.0, []
        if saved:
            self._resume(saved)
        prior = self.fixed.get("prior") if self.network.prior_channels else None
        self.draw = Draw(recipe, samples, prior, self.network.stem)
        self.losses: list[tuple[float, float]] = []
        self.clock = time.monotonic()

    def _network(self) -> nn.Module:
        return build(**self.recipe.network, out_channels=len(default_protocol()))

    def _resume(self, saved: dict[str, Any]) -> None:
        for name in ("network", "average", "optimiser"):
            getattr(self, name).load_state_dict(saved[name])
        self.rng.generator.set_state(saved["generator"])
        self.step, self.seconds, self.curve = saved["step"], saved["seconds"], saved["curve"]

    def learn(self, example: Example) -> None:
        """One step: forward in bfloat16, backward, update, average."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(example.image, example.prior)
        loss, dice = segmentation_loss(
            logits, example.target, example.known, example.group, self.recipe.dice_weight
        )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.step += 1
        share = 1 - min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), share
            )
        self.losses.append((float(loss.detach()), float(dice)))

    def report(self) -> str:
        """Add a point to the curve and say it."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        loss, dice = (float(value) for value in np.mean(self.losses, axis=0))
        self.losses = []
        self.curve.append((self.step, self.seconds, loss, dice))
        return (
            f"{self.recipe.name} {self.step}/{self.recipe.steps} {self.seconds:.0f} s "
            f"loss {loss:.3f} dice {dice:.3f}"
        )

    def content(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: tensors and plain values."""
        return {
            **self.fixed,
            "template": torch.as_tensor(self.fixed["template"]),
            "recipe": asdict(self.recipe),
            "code": self.code,
            "lineage": self.lineage,
            "data": self.data,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.rng.generator.get_state(),
        }
