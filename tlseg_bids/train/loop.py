"""The training loop: one readable function, resumable to the step, decided by its seed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.networks import build
from tlseg_bids.train.dataset import (
    Classes,
    Sample,
    align,
    build_template,
    default_protocol,
    load_classes,
    load_dataset,
)  # fmt: skip
from tlseg_bids.train.losses import segmentation_loss, soft_target
from tlseg_bids.train.recipe import Recipe, code_version, load_checkpoint
from tlseg_bids.train.synth import Random, deformed_positions, example, read_classes

PRIOR_SPACING_MM = 4.0


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


def atlas(
    samples: list[Sample], classes: Classes, channels: int, box_mm: list[list[float]]
) -> Tensor:
    """Mean labels of aligned samples and their mirror images: (channels, I, J, K) at 4 mm.

    Voxel (0, 0, 0) is centred half a voxel inside the box's low corner.
    """
    protocol = default_protocol()
    low = np.array([b[0] for b in box_mm]) + PRIOR_SPACING_MM / 2 - 1.0
    size = [round((b[1] - b[0]) / PRIOR_SPACING_MM) for b in box_mm]
    axes = [
        torch.arange(2 * n, dtype=torch.float32) * PRIOR_SPACING_MM / 2 + float(start)
        for n, start in zip(size, low, strict=True)
    ]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    target = torch.as_tensor(np.append(classes.target, np.zeros(256 - len(classes.target), int)))
    total = torch.zeros(channels, *size)
    for sample in samples:
        numbers = read_classes(sample, positions, sample.template_from_voxel)
        total += soft_target(target[numbers.long()].to(torch.uint8), channels, 2)[0][0]
    total = total / len(samples)
    mirrored = total.flip(1)[torch.as_tensor(protocol.mirror)]
    mean = (total + mirrored)[None] / 2
    smooth = torch.nn.functional.avg_pool3d(mean, 3, 1, 1, count_include_pad=False)
    return (mean + smooth)[0] / 2


def prior_patch(
    prior: Tensor, box_mm: list[list[float]], corner_mm: np.ndarray, size: int, spacing_mm: float
) -> Tensor:
    """The 4 mm atlas read at the voxel centres of a patch: (1, channels, size, size, size)."""
    theta = torch.zeros(1, 3, 4)
    for axis in range(3):
        low, high = box_mm[axis]
        middle = corner_mm[axis] + (size - 1) / 2 * spacing_mm
        theta[0, 2 - axis, 2 - axis] = (size * spacing_mm) / (high - low)
        theta[0, 2 - axis, 3] = (2 * middle - low - high) / (high - low)
    grid = torch.nn.functional.affine_grid(theta, (1, 1, size, size, size), align_corners=False)
    return torch.nn.functional.grid_sample(
        prior[None].float(), grid, padding_mode="border", align_corners=False
    )


def mirror_sample(sample: Sample, classes: Classes, mirror: np.ndarray) -> Sample:
    """The same head seen in a mirror: template x negated, left and right labels exchanged."""
    lut = torch.arange(256, dtype=torch.uint8)
    lut[: len(classes.mirror)] = torch.as_tensor(classes.mirror.astype(np.uint8))
    flip = np.diag([-1.0, 1, 1, 1])
    twin = Sample(**{k: getattr(sample, k) for k in sample.__dataclass_fields__})
    twin.classes = lut[sample.classes.long()]
    twin.group = mirror[sample.group[mirror]]
    twin.template_from_voxel = flip @ sample.template_from_voxel
    return twin


class Draw:
    """Draws training examples by the recipe."""

    def __init__(self, recipe: Recipe, samples: dict[str, list[Sample]], state: dict) -> None:
        protocol = default_protocol()
        self.recipe, self.state = recipe, state
        self.classes = load_classes(protocol)
        self.names = list(samples)
        weights = np.array([recipe.datasets[n].get("weight", 1.0) for n in self.names])
        self.edges = np.cumsum(weights / weights.sum())
        self.samples = {
            n: [t for s in found for t in (s, mirror_sample(s, self.classes, protocol.mirror))]
            for n, found in samples.items()
        }

    def __call__(self, rng: Random) -> tuple[Tensor, Tensor, Sample, np.ndarray]:
        """Image (1, 1, n, n, n), channels (n, n, n), the sample and the patch's corner in mm."""
        recipe = self.recipe
        name = self.names[int(np.searchsorted(self.edges, rng.one() * 0.999999))]
        pool = self.samples[name]
        sample = pool[rng.below(len(pool))]
        length = recipe.patch * recipe.spacing_mm
        if rng.one() < recipe.centred:
            middle = np.array([rng.one(-14, 14) for _ in range(3)])
            corner = middle - length / 2
        else:
            corner = np.array(
                [rng.one(low, max(high - length, low)) for low, high in recipe.box_mm]
            )
        corner += recipe.spacing_mm / 2
        positions = deformed_positions(rng, recipe.shape, corner, recipe.patch, recipe.spacing_mm)
        mix = replace(recipe.mix, real=recipe.datasets[name].get("real", 0.0))
        image, channels = example(rng, sample, self.classes, positions, recipe.spacing_mm, mix)
        return image[None, None], channels, sample, corner


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
    recipe: Recipe, root: Path, out: Path, threads: int = 2, log: Any = print,
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
    protocol = default_protocol()
    samples = load_samples(recipe, root)
    saved = load_checkpoint(path) if path.exists() else None
    start = load_checkpoint(Path(recipe.start)) if recipe.start else None
    state = new_state(recipe, samples, saved or start)
    network = build(**recipe.network, out_channels=len(protocol))
    average = build(**recipe.network, out_channels=len(protocol))
    if start:
        network.load_state_dict(start["average"])
    optimiser = torch.optim.AdamW(
        network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    rng = Random(recipe.seed)
    step, curve, seconds = 0, [], 0.0
    if saved:
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        rng.generator.set_state(saved["generator"])
        step, curve, seconds = saved["step"], saved["curve"], saved["seconds"]
        average.load_state_dict(saved["average"])
    else:
        average.load_state_dict(network.state_dict())
    draw = Draw(recipe, samples, state)
    data = {f"{s.dataset}/{s.name}": s.sha256 for found in samples.values() for s in found}
    losses: list[float] = []
    dices: list[float] = []
    clock = time.monotonic()
    last = recipe.steps if until is None else min(until, recipe.steps)
    while step < last:
        image, channels, sample, corner = draw(rng)
        target, known = soft_target(channels, len(protocol), network.stem)
        prior = None
        if "prior" in state and network.prior_channels:
            first = corner + (network.stem - 1) / 2 * recipe.spacing_mm
            prior = prior_patch(
                state["prior"], recipe.box_mm, first, recipe.patch // network.stem,
                recipe.spacing_mm * network.stem,
            )  # fmt: skip
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image, prior)
        loss, dice = segmentation_loss(
            logits, target, known, torch.as_tensor(sample.group), recipe.dice_weight
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        step += 1
        share = min(recipe.ema, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - share)
        losses.append(float(loss.detach()))
        dices.append(float(dice))
        if step % 50 == 0:
            now = time.monotonic()
            seconds, clock = seconds + now - clock, now
            curve.append((step, seconds, float(np.mean(losses)), float(np.mean(dices))))
            log(f"{recipe.name} {step}/{recipe.steps} {seconds:.0f} s "
                f"loss {curve[-1][2]:.3f} dice {curve[-1][3]:.3f}", flush=True)  # fmt: skip
            losses, dices = [], []
        if step % recipe.checkpoint_every == 0 or step == last:
            temporary = path.with_suffix(".tmp")
            content = {
                **state,
                "template": torch.as_tensor(state["template"]),
                "recipe": asdict(recipe),
                "code": code_version(),
                "lineage": lineage(start),
                "data": data,
                "step": step,
                "seconds": seconds,
                "curve": curve,
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimiser": optimiser.state_dict(),
                "generator": rng.generator.get_state(),
            }
            torch.save(content, temporary)
            temporary.replace(path)
    return path
