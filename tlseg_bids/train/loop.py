"""The training loop: resumable to the step, decided by its seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlseg_bids.networks import build
from tlseg_bids.train.dataset import (
    Sample,
    align,
    build_template,
    default_protocol,
    load_dataset,
)
from tlseg_bids.train.draw import Draw, Example, atlas
from tlseg_bids.train.losses import segmentation_loss
from tlseg_bids.train.recipe import Recipe, code_version, load_checkpoint
from tlseg_bids.train.start import adopt, load_start
from tlseg_bids.train.synth import Random

REPORT_EVERY = 50
LARGEST_GRADIENT = 5.0
PRIOR_SPACING_MM = 4.0


def load_samples(recipe: Recipe, root: Path) -> dict[str, list[Sample]]:
    """The recipe's datasets under `root`, without the subjects of the held-out fold."""
    samples = {}
    for name, rules in recipe.datasets.items():
        found = load_dataset(root / name, name, rules)
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
    """Template and atlases: taken from `start`, else made from the first dataset that has them."""
    first = next(iter(samples.values()))
    template = start["template"] if start else build_template(first, default_protocol())
    state = {"template": template, "priors": {}}
    for found in samples.values():
        align(found, template)
    known = start["priors"] if start else {}
    for name in recipe.prior_heads:
        of_protocol = [s for found in samples.values() for s in found if s.protocol.name == name]
        alike = [s for s in of_protocol if s.dataset == of_protocol[0].dataset]
        spacing_mm = recipe.prior_mm.get(name, PRIOR_SPACING_MM)
        state["priors"][name] = (
            known[name] if name in known else atlas(alike, recipe.box_mm, spacing_mm)
        )
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
    recipe: Recipe, root: Path, out: Path, log: Callable = print, until: int | None = None,
    device: str = "cpu",
) -> Path:  # fmt: skip
    """Run a recipe, or its first `until` steps; returns the checkpoint `OUT/<name>.pt`.

    A checkpoint that is there already is resumed: weights, moments, averages and the generator's
    state, so that a run that was cut off ends where an uncut one would.
    """
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{recipe.name}.pt"
    run = Training(recipe, root, load_checkpoint(path) if path.exists() else None, device)
    last = recipe.steps if until is None else min(until, recipe.steps)
    while run.step < last:
        run.learn([run.draw(run.rng) for _ in range(recipe.accumulate)])
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
    device : str
        A torch device; examples are made on it, too.
    """

    def __init__(
        self, recipe: Recipe, root: Path, saved: dict[str, Any] | None, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        start = load_start(Path(recipe.start), recipe.role) if recipe.start else None
        samples = load_samples(recipe, root)
        self.recipe, self.code, self.lineage = recipe, code_version(), lineage(start)
        self.data = {f"{s.dataset}/{s.name}": s.sha256 for one in samples.values() for s in one}
        self.fixed = new_state(recipe, samples, saved or start)
        self.network, self.average = self._network(), self._network()
        if start:
            adopt(self.network, recipe, start)
        self.average.load_state_dict(self.network.state_dict())
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.rng = Random(recipe.seed, device)
        self.step, self.seconds, self.curve = 0, 0.0, []
        if saved:
            self._resume(saved)
        priors = [prior.to(self.device) for prior in self.fixed["priors"].values()]
        self.draw = Draw(recipe, samples, priors, self.network)
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.clock = time.monotonic()

    def _network(self) -> nn.Module:
        network = build(**self.recipe.network, out_channels=self.recipe.head_sizes)
        return network.to(self.device)

    def _resume(self, saved: dict[str, Any]) -> None:
        for name in ("network", "average", "optimiser"):
            getattr(self, name).load_state_dict(saved[name])
        self.rng.generator.set_state(saved["generator"])
        self.step, self.seconds, self.curve = saved["step"], saved["seconds"], saved["curve"]

    def learn(self, examples: list[Example]) -> None:
        """One step: forward in bfloat16, backward, update, average."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        for one in examples:
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.network(one.image, one.prior, one.head, one.parts)
            loss, dice = segmentation_loss(
                logits, one.target, one.known, one.group, self.recipe.dice_weight
            )
            (loss / len(examples)).backward()
            self.losses.append((loss.detach(), dice))
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.step += 1
        share = 1 - min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), share
            )

    def report(self) -> str:
        """Add a point to the curve and say it."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        loss, dice = torch.tensor(self.losses).mean(0).tolist()
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
