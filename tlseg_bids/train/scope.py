"""What of a segmenter may change while it is adapted: parameters by scope, low-rank adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ANSWERING = ("heads", "details")
REACH = {"shallow": 1, "medium": 2, "deep": 3}


class LowRank(nn.Module):
    """A convolution's weight plus a low-rank change that starts at 0.

    The weight (out, in, …) is seen as a matrix (out, in·…); the change is B·A, A has `rank` rows.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.a = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        nn.init.normal_(self.a, std=inputs**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).reshape(weight.shape)


def add_adapters(network: nn.Module, rank: int) -> None:
    """Give every 3×3×3 convolution of the body a low-rank change."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            if name.split(".")[0] in ANSWERING:
                continue
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def merge_adapters(network: nn.Module) -> None:
    """Write the low-rank changes into the weights."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def trainable(network: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """Parameters by name that a scope may change.

    Blocks are counted from the bottleneck: ``shallow`` takes it and one block either side,
    ``medium`` two, ``deep`` three; the first block and whatever answers stay.
    """
    named = dict(network.named_parameters())
    if scope == "classifier":
        return {name: p for name, p in named.items() if name.split(".")[0] in ANSWERING}
    if scope == "adapters":
        return {name: p for name, p in named.items() if ".parametrizations.weight.0." in name}
    if scope == "norm":
        return {name: p for name, p in named.items() if ".norm" in name}
    if scope == "decoder":
        parts = ("up", "edges", *ANSWERING)
        return {name: p for name, p in named.items() if name.split(".")[0] in parts}
    if scope in REACH:
        last = len(network.down) - 1
        blocks = {f"down.{i}." for i in range(max(1, last - REACH[scope]), last + 1)}
        blocks |= {f"up.{i}." for i in range(min(REACH[scope], len(network.up)))}
        return {name: p for name, p in named.items() if name.startswith(tuple(blocks))}
    return named
