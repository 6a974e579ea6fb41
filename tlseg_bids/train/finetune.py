"""Adapting a segmenter to a site's labelled scans: the state of a run (`finetune_run` runs it).

The examples are drawn as in training (`tlseg_bids.train.draw`) from two sources: the site's scans,
shown or painted from their labels, and heads synthesised from the label maps that come with the
program. What is learned from which, and what may change, says an `Adaptation`.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.train.adaptation import Adaptation
from tlseg_bids.train.dataset import Sample
from tlseg_bids.train.descent import Descent, build_optimiser, set_rate
from tlseg_bids.train.draw import Draw, Example
from tlseg_bids.train.losses import Weights, segmentation_loss
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.rehearsal import NAME as REHEARSAL
from tlseg_bids.train.scope import ANSWERING, add_adapters, merge_adapters, trainable
from tlseg_bids.train.synth import Random

SITE = "site"
PATCH = 96
LARGEST_GRADIENT = 5.0
FIRST_STAGE = 1 / 3
OWN = 0.6


@dataclass(frozen=True, eq=False)
class Parent:
    """What is adapted.

    Parameters
    ----------
    network : Module
        The segmenter with the heads that the child will have, on its device; it is not changed.
    heads : tuple of str
        Protocols of the heads, the primary one first.
    priors : list of Tensor, shapes (channels, I, J, K)
        Atlases of the last heads.
    box_mm, spacing_mm
        The template region and the voxel size that the segmenter works in.
    precision : torch.dtype
        Of the forward pass.
    mirror : bool
        Whether scans may be shown in the mirror: no label is of one side alone.
    """

    network: nn.Module
    heads: tuple[str, ...]
    priors: list[Tensor]
    box_mm: list[list[float]]
    spacing_mm: float
    precision: torch.dtype
    mirror: bool = True

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device


def grown(network: nn.Module, parent: nn.Module, sources: Tensor) -> None:
    """Fill a network that has one head more, in front, from its parent.

    Parameters
    ----------
    network, parent : Module
        Segmenters with n + 1 and n heads, of one network with one decoder and one level that
        answers.
    sources : Tensor of int, shape (new channels,)
        Channel of the parent's first head that each new channel starts from; channels that share
        one share its probability.
    """
    state = parent.state_dict()
    rows = torch.bincount(sources, minlength=int(sources.max()) + 1)[sources]
    for key, value in network.state_dict().items():
        part, _, rest = key.partition(".")
        if key == "prior.weight":  # an atlas of the new head comes before the parent's
            value.zero_()[:, -state[key].shape[1] :] = state[key]
            continue
        if part not in ANSWERING:
            value.copy_(state[key])
            continue
        number, name = rest.split(".")
        if int(number) > 0:
            value.copy_(state[f"{part}.{int(number) - 1}.{name}"])
            continue
        there = state[f"{part}.0.{name}"]
        parts = 8 if part == "details" else 1
        found = there.reshape(parts, -1, *there.shape[1:])[:, sources]
        if part == "heads" and name == "bias":
            found = found - rows.log()
        value.copy_(found.reshape(value.shape))


def reset_head(network: nn.Module) -> None:
    """Random values for the first head, of every member and every level that answers."""
    for one in getattr(network, "members", [network]):
        levels = [one.heads, getattr(one, "details", []), *getattr(one, "deeper", [])]
        for head in (level[0] for level in levels if len(level)):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)


class FineTuning:
    """The state of a run.

    Parameters
    ----------
    how : Adaptation
        The recipe.
    parent : Parent
        The model that is adapted.
    samples : list of Sample
        The site's scans, aligned with the template.
    rehearsal : list of Sample
        See `tlseg_bids.train.rehearsal`; not needed without rehearsal.
    steps, seed : int
        How long, and what decides the draws.
    """

    def __init__(
        self, how: Adaptation, parent: Parent, samples: list[Sample], rehearsal: list[Sample],
        steps: int, seed: int = 0,
    ) -> None:  # fmt: skip
        self.how, self.parent, self.steps, self.seed = how, parent, steps, seed
        torch.manual_seed(seed)
        self.start = copy.deepcopy(parent.network).eval().requires_grad_(False)
        self.network = copy.deepcopy(parent.network).train()
        if how.head == "reset":
            reset_head(self.network)
        if how.scope == "adapters":
            add_adapters(self.network, how.rank)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimiser = build_optimiser(
            self.network, Descent(optimiser=how.optimiser), how.learning_rate, how.weight_decay
        )
        self.rng = Random(seed, str(parent.device))
        pools = {SITE: samples, REHEARSAL: rehearsal if how.rehearsal else []}
        pools = {name: found for name, found in pools.items() if found}
        self.draw = Draw(_recipe(how, parent, seed), pools, parent.priors, parent.network)
        self.mark = _mark(how, parent, pools, steps, seed)
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[float, ...]] = []
        self.recent: list[tuple[float, float]] = []

    def learn(self) -> None:
        """One step."""
        self._open_scope()
        rate = self.how.learning_rate * schedule(self.step, self.steps, self.how.warmup)
        set_rate(self.optimiser, rate)
        one = self.draw(self.rng)
        torch.manual_seed(self.seed + self.step)  # of dropout, alike when resumed
        self.optimiser.zero_grad(set_to_none=True)
        logits = self._answer(self.network, one)
        loss, dice = segmentation_loss(
            logits, one.target, one.known, one.group, Weights(dice=self.how.dice_weight)
        )
        weight = self.how.distillation if one.source == REHEARSAL else self.how.division
        if weight:
            loss = loss + weight * self._kept(one, logits)
        loss.backward()
        self._pull()
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.step += 1
        share = 1 - min(self.how.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), share
            )
        self.recent.append((float(loss.detach()), float(dice)))

    def finish(self) -> dict[str, Tensor]:
        """The child's parameters, adapters merged, float32 on the CPU."""
        child = copy.deepcopy(self.average)
        merge_adapters(child)
        state = child.state_dict()
        return {key: state[key].float().cpu().clone() for key in self.start.state_dict()}

    def content(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: tensors and plain values."""
        return {
            "mark": self.mark,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "recent": self.recent,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.rng.generator.get_state(),
        }

    def resume(self, saved: dict[str, Any]) -> bool:
        """Go on from a checkpoint of the same run; False if it is of another."""
        if saved.get("mark") != self.mark:
            return False
        for name in ("network", "average", "optimiser"):
            getattr(self, name).load_state_dict(saved[name])
        self.rng.generator.set_state(saved["generator"].cpu())
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.curve = [tuple(row) for row in saved["curve"]]
        self.recent = [tuple(row) for row in saved["recent"]]
        return True

    def note(self) -> None:
        """Add a point to the curve: step, seconds, mean loss and soft Dice since the last one."""
        if self.recent:
            loss, dice = torch.tensor(self.recent, dtype=torch.float64).mean(0).tolist()
            self.curve.append((self.step, round(self.seconds, 2), loss, dice))
            self.recent = []

    def _answer(self, network: nn.Module, one: Example) -> Tensor:
        low = self.parent.precision != torch.float32
        with torch.autocast(self.parent.device.type, self.parent.precision, low):
            return network(one.image, one.prior, one.head, one.parts)

    def _open_scope(self) -> None:
        """Let change what may change now; the two stages differ by the step."""
        scope = self.how.scope
        if scope == "two-stage":
            scope = "classifier" if self.step < FIRST_STAGE * self.steps else "all"
        free = {id(p) for p in trainable(self.network, scope).values()}
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in free)

    def _kept(self, one: Example, logits: Tensor) -> Tensor:
        """Cross-entropy to the parent's answer, where this example has no better one.

        On a rehearsal example everywhere; on a site's scan only to how the parent shares out what
        the labels merge into the background.
        """
        rehearsing = one.source == REHEARSAL
        merged = (one.group == 0).sum() > 1
        if not rehearsing and (not bool(merged) or self.how.head == "reset"):
            return logits.new_zeros(())
        with torch.no_grad():
            wanted = F.softmax(self._answer(self.start, one).float(), 1)
        if rehearsing:
            return -(wanted * F.log_softmax(logits.float(), 1)).sum(1).mean()
        rows = torch.nonzero(one.group == 0)[:, 0]
        voxels = one.target[:, 0] * one.known
        inside = wanted[:, rows] / wanted[:, rows].sum(1, keepdim=True).clamp_min(1e-6)
        entropy = -(inside * F.log_softmax(logits[:, rows].float(), 1)).sum(1)
        return (entropy * voxels).sum() / voxels.sum().clamp_min(1)

    def _pull(self) -> None:
        """Add the gradient of ½·pull·|w − w₀|² to every parameter that may change."""
        if not self.how.pull or self.how.scope == "adapters":
            return
        there = dict(self.start.named_parameters())
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - there[name], alpha=self.how.pull)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to 2 %."""
    warmup = min(warmup, max(steps // 5, 1))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def blended(parent: nn.Module, child: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Parameters `share` of the way from the parent's to the child's (DRIFTS: arXiv 2411.06842)."""
    state = parent.state_dict()
    return {key: torch.lerp(state[key].float().cpu(), value, share) for key, value in child.items()}


def _recipe(how: Adaptation, parent: Parent, seed: int) -> Recipe:
    """What `Draw` needs to know."""
    sides = [high - low for low, high in parent.box_mm]
    patch = min(PATCH, int(min(sides) / parent.spacing_mm))
    patch -= patch % parent.network.divisor
    recipe = Recipe(
        name=how.name, role="segmenter", protocol=parent.heads[0],
        more_heads=list(parent.heads[1:]), network={}, patch=patch,
        spacing_mm=parent.spacing_mm, box_mm=parent.box_mm, centred=0.5, seed=seed,
        mirror=parent.mirror,
        datasets={
            SITE: {"weight": 1 - how.rehearsal, "real": 1 - how.painted, "mix": {"own": OWN}},
            REHEARSAL: {"weight": how.rehearsal},
        },
    )  # fmt: skip
    return replace(recipe, mix=replace(recipe.mix, t1w=0.4, t2w=0.2, thick_slices=0.2))


def _mark(
    how: Adaptation, parent: Parent, pools: dict[str, list[Sample]], steps: int, seed: int
) -> str:
    """What a checkpoint must have been made from to be gone on with."""
    digest = hashlib.sha256(repr((asdict(how), parent.heads, parent.mirror, steps, seed)).encode())
    for name, found in pools.items():
        digest.update(repr((name, [(s.name, s.sha256) for s in found])).encode())
    priors = {f"prior {n}": prior for n, prior in enumerate(parent.priors)}
    for key, value in {**parent.network.state_dict(), **priors}.items():
        digest.update(f"{key}{tuple(value.shape)}{float(value.cpu().double().sum()):.6e}".encode())
    return digest.hexdigest()
