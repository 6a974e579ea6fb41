"""A 3-D U-Net with a space-to-depth stem, a spatial prior, sub-voxel answers and several heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRIOR_FLOOR = 1e-3
PRIOR_FEATURES = 8
_QUARTERS = [a * b * c for a, b, c in product((0.75, 0.25), repeat=3)]
"""Shares of a voxel's neighbours at a point a quarter of a voxel off its centre, as `product`."""


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
    for axis, up in enumerate(part, 2):
        size = x.shape[axis]
        edge = x.narrow(axis, size - 1 if up else 0, 1)
        rest = x.narrow(axis, 1 if up else 0, size - 1)
        x = torch.lerp(x, torch.cat((rest, edge) if up else (edge, rest), axis), 0.25)
    return x


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


class Block(nn.Module):
    """Two 3×3×3 convolutions, each followed by instance norm and LeakyReLU, with a short cut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = Norm(outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        first = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(first)) + first, 0.01)


class UNet(nn.Module):
    """U-Net that answers at 1/`stem` of the input's resolution, or at the input's own.

    Every image channel is standardised inside the network (zero mean, unit variance over the
    window), so that the caller's intensity scale does not matter. Where a spatial prior is given,
    its probabilities enter the first block and their logarithm is added to the logits: before any
    training the answer is the prior.

    With `detail`, each of the 2³ sub-voxels of an output voxel gets its own logits: those of the
    coarse answer, read linearly, plus a correction from `detail` features that see the
    neighbouring voxels (sub-voxel convolution: Shi et al. 2016, doi:10.1109/CVPR.2016.207).

    Parameters
    ----------
    out_channels : int or sequence of int
        Number of classes of every head, background included.
    features : sequence of int
        Channels per level; every further level halves the resolution.
    stem : int
        Space-to-depth factor of the stem (1 or 2).
    prior_channels : int
        0 for none, else the sum of the `out_channels` of the heads that have a prior: the last
        ones.
    detail : int
        0 for an answer at 1/`stem`; else the features of the sub-voxel answer (stem 2 only).
    image_channels : int
        Channels of the image.
    """

    def __init__(
        self,
        out_channels: int | Sequence[int],
        features: Sequence[int] = (24, 48, 96),
        stem: int = 1,
        prior_channels: int = 0,
        *,
        detail: int = 0,
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        sizes = [out_channels] if isinstance(out_channels, int) else list(out_channels)
        if detail and stem != 2:
            raise ValueError(f"a sub-voxel answer needs a stem of 2, not {stem}")
        self.stem, self.prior_channels, self.image_channels = stem, prior_channels, image_channels
        self.coarse_only = not detail
        self.divisor = stem * 2 ** (len(features) - 1)
        first = image_channels * stem**3
        if prior_channels:
            self.prior = nn.Conv3d(prior_channels, PRIOR_FEATURES, 1)
            self.prior_weight = nn.Parameter(torch.tensor(0.7))
            first += PRIOR_FEATURES
        widths = [first, *features]
        self.down = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(
            Block(deep + skip, skip)
            for deep, skip in zip(features[:0:-1], features[-2::-1], strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv3d(features[0], n, 1) for n in sizes)
        self.places = _prior_places(sizes, prior_channels)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        if detail:
            self.edges = nn.Conv3d(features[0], detail, 3, padding=1)
            self.details = nn.ModuleList(nn.Conv3d(detail, 8 * n, 1) for n in sizes)
            for head in self.details:
                nn.init.normal_(head.weight, std=0.003)
                nn.init.zeros_(head.bias)

    @property
    def factor(self) -> int:
        """How much coarser the finest answer is than the image."""
        return self.stem if self.coarse_only else 1

    def forward(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        head: int = 0,
        parts: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Logits of an image (N, image_channels, I, J, K), sizes multiples of `divisor`.

        Parameters
        ----------
        prior : Tensor, shape (N, prior_channels, I/stem, J/stem, K/stem)
            Probabilities; None means even ones.
        head : int
            Which head answers.
        parts : sequence of (i, j, k), or None
            Sub-voxels (each 0 or 1) that are answered for, side by side along the first axis:
            (N, channels, len(parts)·I/stem, J/stem, K/stem). None: the finest answer, all of it
            (N, channels, I/factor, …). Empty: the coarse answer (N, channels, I/stem, …).
        """
        x, prior = self._features(image, prior)
        logits = self._coarse(x, prior, head)
        if self.coarse_only or parts == ():
            return logits
        edges = F.leaky_relu(self.edges(x), 0.01)
        every = list(product((0, 1), repeat=3))
        found = [
            quarter_step(logits, part) + self._correction(edges, head, every.index(tuple(part)))
            for part in (every if parts is None else parts)
        ]
        return depth_to_space(found, 2) if parts is None else torch.cat(found, 2)

    def body(self, image: Tensor, prior: Tensor | None = None, head: int = 0) -> Tensor:
        """What a sub-voxel answer is made from, as `forward` would find it.

        Returns
        -------
        Tensor, shape (N, channels + detail, I/stem, J/stem, K/stem)
            The coarse logits, then the features that correct them.
        """
        x, prior = self._features(image, prior)
        edges = F.leaky_relu(self.edges(x), 0.01)
        return torch.cat([self._coarse(x, prior, head).to(edges.dtype), edges], 1)

    def sub_voxels(self, coarse: Tensor, edges: Tensor, where: Tensor, head: int = 0) -> Tensor:
        """Fine logits of some coarse voxels alone.

        Parameters
        ----------
        coarse, edges : Tensor, float32, shapes (I, J, K, channels) and (I, J, K, detail)
            The two parts of what `body` gives for one example, contiguous.
        where : Tensor of int64, shape (n, 3)
            Coarse voxels.
        head : int
            Which head answers.

        Returns
        -------
        Tensor, float32, shape (n, 8, channels)
            Sub-voxels in the order (0, 0, 0), (0, 0, 1) … (1, 1, 1).
        """
        detail, (*shape, channels) = self.details[head], coarse.shape
        steps = where.new_tensor((shape[1] * shape[2], shape[2], 1))
        last = where.new_tensor(shape) - 1
        table = coarse.reshape(-1, channels)
        shares = table.new_tensor(_QUARTERS).expand(len(where), 8).contiguous()
        found = []
        for part in product((-1, 1), repeat=3):
            near = (where + where.new_tensor(part)).clamp_min(0).minimum(last)
            x, y, z = (torch.stack((where, near), 2) * steps[:, None]).unbind(1)
            corners = x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]
            found.append(F.embedding_bag(
                corners.reshape(-1, 8), table, mode="sum", per_sample_weights=shares
            ))  # fmt: skip
        edges = edges.reshape(len(table), -1)[(where * steps).sum(1)]
        correction = F.linear(edges, detail.weight[:, :, 0, 0, 0], detail.bias)
        return torch.stack(found, 1) + correction.reshape(len(where), 8, channels)

    def _coarse(self, x: Tensor, prior: Tensor | None, head: int) -> Tensor:
        """Logits at the stem's resolution."""
        logits = self.heads[head](x)
        if prior is not None and (place := self.places[head]) is not None:
            logits = logits + self.prior_weight * torch.log(prior[:, place] + PRIOR_FLOOR)
        return logits

    def _correction(self, edges: Tensor, head: int, part: int) -> Tensor:
        """What is added to the logits of one sub-voxel."""
        detail = self.details[head]
        rows = slice(part * detail.out_channels // 8, (part + 1) * detail.out_channels // 8)
        return F.conv3d(edges, detail.weight[rows], detail.bias[rows])

    def _features(self, image: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The last block's output, and the prior (an even one where it is missing)."""
        mean = image.mean((2, 3, 4), keepdim=True)
        scale = image.std((2, 3, 4), keepdim=True) + 1e-4
        x = space_to_depth((image - mean) / scale, self.stem)
        if self.prior_channels:
            if prior is None:
                shape = (x.shape[0], self.prior_channels, *x.shape[2:])
                prior = x.new_full(shape, 1 / self.prior_channels)
            x = torch.cat([x, self.prior(prior).to(x.dtype)], 1)
        else:
            prior = None
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1))
        return x, prior


def _prior_places(sizes: Sequence[int], prior_channels: int) -> list[slice | None]:
    """Where in the prior each head's channels lie; the last heads have one, as far as it goes."""
    places: list[slice | None] = []
    left = prior_channels
    for size in reversed(sizes):
        places.append(slice(left - size, left) if size <= left else None)
        left -= size if size <= left else left
    return places[::-1]
