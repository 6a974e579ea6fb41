"""What of a segmenter may change while it is adapted: parameters by scope, low-rank adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tlseg_bids.errors import UsageError

ANSWERING = ("heads", "details", "deeper")
REACH = {"shallow": 1, "medium": 2, "deep": 4}
CONVOLVES = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)
NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
SCOPES = (
    "none", "classifier", "norm", "shallow", "medium", "deep", "decoder", "dense",
    "frozen-convolutions", "all",
)  # fmt: skip


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
    ``medium`` two, ``deep`` four; the first block and whatever answers stay (Richter & Fetit 2022,
    doi:10.3389/fninf.2022.1006532). ``frozen-convolutions`` leaves every convolution of the body
    as it is, ``dense`` everything but dense layers and what answers (Kushibar et al. 2019,
    doi:10.1038/s41598-019-43299-z). ``norm`` takes scale and shift of every norm, those of the
    short cut of a residual block among them.

    Raises
    ------
    UsageError
        If blocks are to be counted in a network that is no encoder and decoder.
    """
    named = dict(network.named_parameters())
    modules = dict(network.named_modules())

    def owner(name: str) -> nn.Module:
        return modules[name.rpartition(".")[0]]

    def part(name: str) -> str:
        words = name.split(".")
        return words[2] if words[0] == "members" else words[0]

    def answers(name: str) -> bool:
        return part(name) in ANSWERING

    rules = {
        "none": lambda _: False,
        "classifier": answers,
        "adapters": lambda name: ".parametrizations.weight.0." in name,
        "norm": lambda name: isinstance(owner(name), NORMS),
        "decoder": lambda name: part(name) in ("up", "more_up", "edges", *ANSWERING),
        "dense": lambda name: answers(name) or isinstance(owner(name), nn.Linear),
        "frozen-convolutions": lambda name: answers(name) or not isinstance(owner(name), CONVOLVES),
        "all": lambda _: True,
    }
    if scope in REACH:
        if not hasattr(network, "down"):
            raise UsageError(
                f"the scope '{scope}' counts blocks from a bottleneck, and this network has none",
                "the recipe's table [descent]", "use classifier, norm, frozen-convolutions or all",
            )  # fmt: skip
        last = len(network.down) - 1
        deep = range(max(1, last - REACH[scope]), last + 1)
        up = range(min(REACH[scope], len(network.up)))
        blocks = tuple(
            [f"down.{i}." for i in deep] + [f"up.{i}." for i in up]
            + [f"more_up.{d}.{i}." for d in range(len(network.heads) - 1) for i in up]
        )  # fmt: skip
        return {name: p for name, p in named.items() if name.startswith(blocks)}
    return {name: p for name, p in named.items() if rules[scope](name)}
