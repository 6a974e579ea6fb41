"""What a U-Net is built of: blocks, norms, levels that are folded into channels and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.networks.convolution import Convolution, convolve_raised, join
from tlseg_bids.networks.finish import finish


def space_to_depth(image: Tensor, factor: int) -> Tensor:
    """Fold `factor`³ neighbours into channels: (N, C, fI, fJ, fK) to (N, C·f³, I, J, K)."""
    if factor == 1:
        return image
    n, c, i, j, k = image.shape
    folded = image.reshape(
        n, c, i // factor, factor, j // factor, factor, k // factor, factor
    ).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return folded.reshape(n, c * factor**3, i // factor, j // factor, k // factor)


def depth_to_space(parts: Sequence[Tensor], factor: int) -> Tensor:
    """Put `factor`³ interleaved volumes (N, C, I, J, K) together: (N, C, fI, fJ, fK)."""
    n, c, i, j, k = parts[0].shape
    stacked = torch.stack(tuple(parts), 2).reshape(n, c, factor, factor, factor, i, j, k)
    ordered = stacked.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return ordered.reshape(n, c, i * factor, j * factor, k * factor)


def quarter_step(x: Tensor, part: Sequence[int]) -> Tensor:
    """`x` (N, C, I, J, K) read a quarter of a voxel off its centres, linearly.

    `part` holds 0 (towards the lower end) or 1 (towards the upper one) for each axis; beyond the
    faces the outermost voxels are repeated.
    """
    return _QuarterStep.apply(x, tuple(part))


class _QuarterStep(torch.autograd.Function):
    """Along each axis three quarters of a voxel and a quarter of its neighbour.

    Its own gradient, because what autograd would keep and add up of slices takes four times as
    many passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: tuple[int, ...]) -> Tensor:
        ctx.part = part
        for axis, up in enumerate(part, 2):
            size = x.shape[axis]
            edge = size - 1 if up else 0
            read = x * 0.75
            read.narrow(axis, 1 - up, size - 1).add_(x.narrow(axis, up, size - 1), alpha=0.25)
            read.narrow(axis, edge, 1).add_(x.narrow(axis, edge, 1), alpha=0.25)
            x = read
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for axis, up in enumerate(ctx.part, 2):
            size = grad.shape[axis]
            edge = size - 1 if up else 0
            given = grad * 0.75
            given.narrow(axis, up, size - 1).add_(grad.narrow(axis, 1 - up, size - 1), alpha=0.25)
            given.narrow(axis, edge, 1).add_(grad.narrow(axis, edge, 1), alpha=0.25)
            grad = given
        return grad, None


class Norm(nn.InstanceNorm3d):
    """Instance norm with scale and shift that keeps channels last where they are.

    The statistics of one example over its voxels are those of a batch of one, so batch norm, which
    does not copy to another memory format, computes the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


@dataclass(frozen=True)
class Design:
    """What of a U-Net differs from one paper to the next.

    Parameters
    ----------
    shortcut : str
        Of a block: ``first`` adds the first convolution's output to the second's, ``input`` the
        block's own input (residual unit: He et al. 2016, doi:10.1109/CVPR.2016.90), ``none``.
    down, up : str
        ``pool`` or ``stride`` (the block's first convolution); ``nearest`` or ``transposed``.
    slope : float
        Of the LeakyReLU below 0; 0 is a ReLU.
    supervised : int
        How many of the decoder's coarser levels answer, too (deep supervision: Lee et al. 2015,
        arXiv 1409.5185).
    decoders : str
        ``shared``, or ``own``: each head has a decoder of its own.
    age : int
        Features of a regression of the age from the bottleneck, pooled over the window; 0 for none.
    gain : float
        Factor of the logits (SLANT's published code has 100): probabilities are near 0 or 1 early,
        so that a soft Dice alone tells background from structures that are not there. Not with
        sub-voxel answers.
    """

    shortcut: str = "first"
    down: str = "pool"
    up: str = "nearest"
    slope: float = 0.01
    supervised: int = 0
    decoders: str = "shared"
    age: int = 0
    gain: float = 1.0

    def __post_init__(self) -> None:
        known = {
            "shortcut": ("first", "input", "none"), "down": ("pool", "stride"),
            "up": ("nearest", "transposed"), "decoders": ("shared", "own"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is '{getattr(self, name)}', not {' or '.join(values)}")
        if not self.gain > 0:
            raise ValueError(f"gain is {self.gain}, not above 0")


class Answers(NamedTuple):
    """Everything that a loss can look at.

    `logits`: for each head a list, the answer that was asked for first, then the coarser levels'
    (N, channels, I/f, J/f, K/f), each half as fine as the one before, from the coarse answer's
    resolution on. `age` (N,) in years, or None.
    """

    logits: list[list[Tensor]]
    age: Tensor | None


class Block(nn.Module):
    """Two 3×3×3 convolutions, each followed by instance norm and LeakyReLU, with a short cut.

    `between` and `given` are what is rounded to between the convolutions and at the end, where a
    CPU computes in bfloat16 and nothing is learned.
    """

    between = given = torch.bfloat16

    def __init__(self, inputs: int, outputs: int, design: Design, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Convolution(inputs, outputs, stride)
        self.norm1 = Norm(outputs)
        self.conv2 = Convolution(outputs, outputs)
        self.norm2 = Norm(outputs)
        self.design, self.match = design, None
        if design.shortcut == "input" and (inputs != outputs or stride > 1):
            self.match = nn.Sequential(
                nn.Conv3d(inputs, outputs, 1, stride, bias=False),
                Norm(outputs),
            )

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """The block of `x` (N, C, I, J, K) and of further channels, behind its own."""
        whole = join([x, *more]) if self.design.shortcut == "input" else None
        return self._after(self.conv1(x, *more), whole)

    def _after(self, convolved: Tensor, x: Tensor | None) -> Tensor:
        """Everything but the first convolution; `x` is the block's input, for its short cut."""
        slope, shortcut = self.design.slope, self.design.shortcut
        first = finish(convolved, self.norm1, slope, dtype=self.between)
        second, added = self.conv2(first), None
        if shortcut != "none":
            added = first if shortcut == "first" else self.match(x) if self.match else x
        return finish(second, self.norm2, slope, added, self.given)


class Up(Block):
    """A block of a decoder: the coarser level is brought up and joined with the skip."""

    def __init__(self, deep: int, skip: int, design: Design) -> None:
        transposed = design.up == "transposed"
        super().__init__(2 * skip if transposed else deep + skip, skip, design)
        self.rise = nn.ConvTranspose3d(deep, skip, 2, 2, bias=False) if transposed else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        learns = torch.is_grad_enabled() or x.device.type != "cpu"
        if not learns and self.rise is None and self.design.shortcut != "input":
            return self._after(convolve_raised(x, skip, self.conv1.weight), None)
        x = self.rise(x) if self.rise else F.interpolate(x, scale_factor=2, mode="nearest")
        return super().forward(join([x, skip]))


class AgeHead(nn.Module):
    """Age in years, (N,), from the bottleneck's features: their mean and maximum over the window.

    `centre` and `scale` (years) are those of the training ages: an untrained head answers about
    `centre`.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(2 * inputs, hidden), nn.Linear(hidden, 1)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, bottleneck: Tensor) -> Tensor:
        # bfloat16 has steps of months in childhood and of half a year after 64
        with torch.autocast(bottleneck.device.type, enabled=False):
            x = bottleneck.float()
            pooled = torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], 1)
            found = self.last(F.leaky_relu(self.hidden(pooled), 0.01))[:, 0]
            return self.centre + self.scale * found


def decoder(features: Sequence[int], design: Design) -> nn.ModuleList:
    """The `Up` blocks of the levels of `features`, the coarsest first."""
    return nn.ModuleList(
        Up(deep, skip, design) for deep, skip in zip(features[:0:-1], features[-2::-1], strict=True)
    )


def normal_head(head: nn.Conv3d, sd: float) -> None:
    """Start a head with normally distributed weights and without bias."""
    nn.init.normal_(head.weight, std=sd)
    nn.init.zeros_(head.bias)
