"""How the weights of a training run move, and which of them: optimiser, rate, scope, stages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from tlseg_bids.errors import UsageError
from tlseg_bids.train.muon import MuonAndAdamW
from tlseg_bids.train.scope import SCOPES, trainable

OPTIMISERS = ("adamw", "adam", "sgd", "muon")
SCHEDULES = ("cosine", "poly", "constant")
HEADS = ("keep", "reset")


@dataclass(frozen=True)
class Descent:
    """The table ``[descent]`` of a recipe.

    Parameters
    ----------
    optimiser : str
        ``adamw``; ``adam``, whose weight decay is part of the gradient; ``sgd`` with Nesterov's
        momentum; ``muon`` for the kernels of convolutions beside ``adamw`` for the rest, see
        `tlseg_bids.train.muon`.
    schedule : str
        Of the learning rate after the warm-up: ``cosine`` to 1 %, ``poly``, which is
        (1 − step ÷ steps)^`power` (Chen et al. 2018, doi:10.1109/TPAMI.2017.2699184), ``constant``.
    momentum, power : float
        Of ``sgd`` and ``poly``.
    scope : str
        What may change, see `tlseg_bids.train.scope.trainable`; ``none`` changes nothing.
    first_stage : float
        Share of the steps in which only what answers changes, before the scope does: two stages.
    head : str
        ``keep`` the start's heads, or ``reset`` them to random values.
    age_rate : float
        Learning rate of the age's regression, as a multiple of the others'.
    """

    optimiser: str = "adamw"
    schedule: str = "cosine"
    momentum: float = 0.99
    power: float = 0.9
    scope: str = "all"
    first_stage: float = 0.0
    head: str = "keep"
    age_rate: float = 0.1

    def __post_init__(self) -> None:
        for key, known in (
            ("optimiser", OPTIMISERS), ("schedule", SCHEDULES), ("scope", SCOPES), ("head", HEADS),
        ):  # fmt: skip
            if getattr(self, key) not in known:
                raise UsageError(
                    f"unknown {key} '{getattr(self, key)}'", "the recipe's table [descent]",
                    f"use {', '.join(known)}",
                )  # fmt: skip
        if not 0 <= self.first_stage < 1:
            raise UsageError(
                f"first_stage is {self.first_stage:g}", "the recipe's table [descent]",
                "write the share of the steps, from 0 to below 1",
            )  # fmt: skip
        if self.optimiser == "sgd" and not 0 < self.momentum < 1:
            raise UsageError(
                f"momentum is {self.momentum:g}", "the recipe's table [descent]",
                "write a number between 0 and 1 for the optimiser sgd",
            )  # fmt: skip


def rate_at(descent: Descent, step: int, steps: int, warmup: int) -> float:
    """The learning rate as a share of the base rate: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    share = min((step - warmup) / max(steps - warmup, 1), 1)
    if descent.schedule == "poly":
        return (1 - share) ** descent.power
    if descent.schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def build_optimiser(
    network: nn.Module, descent: Descent, rate: float, weight_decay: float
) -> torch.optim.Optimizer | MuonAndAdamW:
    """The optimiser; parameters of an age head form a group with a ``factor`` for its rate."""
    age = [p for name, p in network.named_parameters() if name.startswith("age.")]
    known = {id(p) for p in age}
    groups = [{"params": [p for p in network.parameters() if id(p) not in known]}]
    if age:
        groups.append({"params": age, "factor": descent.age_rate})
    if descent.optimiser == "sgd":
        return torch.optim.SGD(
            groups, rate, descent.momentum, weight_decay=weight_decay, nesterov=True
        )
    if descent.optimiser == "muon":
        return MuonAndAdamW(groups, rate, weight_decay)
    kind = torch.optim.Adam if descent.optimiser == "adam" else torch.optim.AdamW
    return kind(groups, rate, weight_decay=weight_decay)


def set_rate(optimiser: torch.optim.Optimizer | MuonAndAdamW, rate: float) -> None:
    """Give every group its learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def open_scope(network: nn.Module, descent: Descent, step: int, steps: int) -> bool:
    """Let change what may change in this step; whether that is anything."""
    scope = "classifier" if step < descent.first_stage * steps else descent.scope
    free = {id(p) for p in trainable(network, scope).values()}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in free)
    return bool(free)
