"""A 3-D U-Net with instance norm, an optional space-to-depth stem and an optional spatial prior."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRIOR_FLOOR = 1e-3


def space_to_depth(image: Tensor, factor: int) -> Tensor:
    """Fold `factor`³ neighbours into channels: (N, C, fI, fJ, fK) to (N, C·f³, I, J, K)."""
    if factor == 1:
        return image
    n, c, i, j, k = image.shape
    folded = image.reshape(
        n, c, i // factor, factor, j // factor, factor, k // factor, factor
    ).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return folded.reshape(n, c * factor**3, i // factor, j // factor, k // factor)


class Block(nn.Module):
    """Two 3×3×3 convolutions, each followed by instance norm and LeakyReLU, with a short cut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        first = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(first)) + first, 0.01)


class UNet(nn.Module):
    """U-Net on a single image channel, with logits at 1/`stem` of the input's resolution.

    The image is standardised inside the network (zero mean, unit variance over the window), so
    that the caller's intensity scale does not matter. Where a spatial prior is given, its
    probabilities enter the first block and their logarithm is added to the logits: before any
    training the answer is the prior.

    Parameters
    ----------
    out_channels : int
        Number of classes, background included.
    features : sequence of int
        Channels per level; every further level halves the resolution.
    stem : int
        Space-to-depth factor of the stem (1 or 2).
    prior_channels : int
        0 for none, else `out_channels`.
    prior_features : int
        Channels to which the prior is reduced before the first block.
    """

    def __init__(
        self,
        out_channels: int,
        features: Sequence[int] = (24, 48, 96),
        stem: int = 1,
        prior_channels: int = 0,
        prior_features: int = 8,
    ) -> None:
        super().__init__()
        self.stem, self.prior_channels = stem, prior_channels
        self.divisor = stem * 2 ** (len(features) - 1)
        first = stem**3
        if prior_channels:
            self.prior = nn.Conv3d(prior_channels, prior_features, 1)
            self.prior_weight = nn.Parameter(torch.tensor(0.7))
            first += prior_features
        widths = [first, *features]
        self.down = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(
            Block(deep + skip, skip)
            for deep, skip in zip(features[:0:-1], features[-2::-1], strict=True)
        )
        self.head = nn.Conv3d(features[0], out_channels, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor, prior: Tensor | None = None) -> Tensor:
        """Logits (N, out_channels, I/stem, J/stem, K/stem) of an image (N, 1, I, J, K).

        `prior` holds probabilities (N, prior_channels, I/stem, J/stem, K/stem); None means an
        even one. Sizes must be multiples of `divisor`.
        """
        mean = image.mean((1, 2, 3, 4), keepdim=True)
        scale = image.std((1, 2, 3, 4), keepdim=True) + 1e-4
        x = space_to_depth((image - mean) / scale, self.stem)
        if self.prior_channels:
            if prior is None:
                shape = (x.shape[0], self.prior_channels, *x.shape[2:])
                prior = x.new_full(shape, 1 / self.prior_channels)
            x = torch.cat([x, self.prior(prior).to(x.dtype)], 1)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1))
        logits = self.head(x)
        if self.prior_channels:
            logits = logits + self.prior_weight * torch.log(prior + PRIOR_FLOOR)
        return logits
