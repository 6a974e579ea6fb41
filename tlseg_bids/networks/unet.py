"""A 3-D U-Net with a space-to-depth stem, a spatial prior, sub-voxel answers and several heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.networks.blocks import (
    AgeHead,
    Answers,
    Block,
    Design,
    decoder,
    depth_to_space,
    normal_head,
    quarter_step,
    space_to_depth,
)
from tlseg_bids.networks.convolution import Pointwise

PRIOR_FLOOR = 1e-3
PRIOR_FEATURES = 8


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
    design : dict
        Values of `Design`.
    """

    def __init__(  # noqa: PLR0913
        self,
        out_channels: int | Sequence[int],
        features: Sequence[int] = (24, 48, 96),
        stem: int = 1,
        prior_channels: int = 0,
        *,
        detail: int = 0,
        image_channels: int = 1,
        design: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.design = design = Design(**(design or {}))
        sizes = [out_channels] if isinstance(out_channels, int) else list(out_channels)
        if detail and stem != 2:
            raise ValueError(f"a sub-voxel answer needs a stem of 2, not {stem}")
        if detail and design.gain != 1:
            raise ValueError(f"a sub-voxel answer takes no gain of {design.gain:g}")
        self.stem, self.prior_channels, self.image_channels = stem, prior_channels, image_channels
        self.coarse_only = not detail
        self.divisor = stem * 2 ** (len(features) - 1)
        first = image_channels * stem**3
        if prior_channels:
            self.prior = Pointwise(prior_channels, PRIOR_FEATURES)
            self.prior_weight = nn.Parameter(torch.tensor(0.7))
            first += PRIOR_FEATURES
        widths = [first, *features]
        stride = 2 if design.down == "stride" else 1
        self.down = nn.ModuleList(
            Block(a, b, design, stride if level else 1)
            for level, (a, b) in enumerate(pairwise(widths))
        )
        self.up = decoder(features, design)
        if stem > 1:  # what all else is made of, and what the answer is read from
            self.down[0].between = self.up[-1].given = torch.float32
        self.heads = nn.ModuleList(Pointwise(features[0], n) for n in sizes)
        self.places = _prior_places(sizes, prior_channels)
        for head in self.heads:
            normal_head(head, 0.01)
        if detail:
            self.edges = nn.Conv3d(features[0], detail, 3, padding=1)
            self.details = nn.ModuleList(Pointwise(detail, 8 * n) for n in sizes)
            for head in self.details:
                normal_head(head, 0.003)
        self._extras(sizes, list(features))

    def _extras(self, sizes: list[int], features: list[int]) -> None:
        """Further decoders, answers of coarser levels, the age: made last, so that what every
        network has starts from the same random numbers with and without them."""
        design = self.design
        if design.supervised >= len(features):
            raise ValueError(
                f"{design.supervised} coarser answers need more than {len(features)} levels"
            )
        if design.decoders == "own":
            self.more_up = nn.ModuleList(decoder(features, design) for _ in sizes[1:])
        if design.supervised:
            self.deeper = nn.ModuleList(
                nn.ModuleList(Pointwise(width, n) for n in sizes)
                for width in features[1 : design.supervised + 1]
            )
            for head in (one for level in self.deeper for one in level):
                normal_head(head, 0.01)
        if design.age:
            self.age = AgeHead(features[-1], design.age)

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
        skips, prior = self._encode(image, prior)
        return self._answer(self._decode(skips, head)[-1], prior, head, parts)

    def every(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        heads: Sequence[int] | None = None,
        parts: Sequence[Sequence[int]] | None = None,
    ) -> Answers:
        """The answers of several heads (all if not named) and of all that answers beside them.

        Arguments as for `forward`; the encoder is passed once.
        """
        skips, prior = self._encode(image, prior)
        heads = range(len(self.heads)) if heads is None else heads
        levels = {head: self._decode(skips, head) for head in heads}
        logits = [
            [self._answer(found[-1], prior, head, parts), *self._coarser(found, head)]
            for head, found in levels.items()
        ]
        return Answers(logits, self.age(skips[-1].float()) if self.design.age else None)

    def predicted_age(self, image: Tensor) -> Tensor:
        """Years, (N,), of a window (N, image_channels, I, J, K); only with `Design.age`."""
        return self.age(self._encode(image, None)[0][-1].float())

    def _coarser(self, levels: list[Tensor], head: int) -> list[Tensor]:
        count = self.design.supervised
        return [self._raised(self.deeper[i][head], levels[-2 - i]) for i in range(count)]

    def _raised(self, head: nn.Module, x: Tensor) -> Tensor:
        """A head's logits times the gain; in float32, as rounding would be raised, too."""
        if self.design.gain == 1:
            return head(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.design.gain * head(x.float())

    def _answer(
        self, x: Tensor, prior: Tensor | None, head: int, parts: Sequence[Sequence[int]] | None
    ) -> Tensor:
        added = self._prior_logs(prior, head)
        if self.coarse_only or parts == ():
            return self._plus_prior(self._raised(self.heads[head], x), added)
        edges = F.leaky_relu(self.edges(x), 0.01, inplace=not torch.is_grad_enabled())
        every = list(product((0, 1), repeat=3))
        found = [
            self._sub_voxel(x, edges, added, head, every.index(tuple(part)))
            for part in (every if parts is None else parts)
        ]
        if len(found) == 1:
            return found[0]
        return depth_to_space(found, 2) if parts is None else torch.cat(found, 2)

    def _sub_voxel(
        self, x: Tensor, edges: Tensor, added: Tensor | None, head: int, number: int
    ) -> Tensor:
        """The logits of one of the eight sub-voxels of every voxel.

        The features are read off the centres instead of the logits made from them, which is the
        same and moves less memory; the correction is part of the same convolution.
        """
        part = tuple(number >> bit & 1 for bit in (2, 1, 0))
        linear, detail = self.heads[head], self.details[head]
        rows = slice(number * linear.out_channels, (number + 1) * linear.out_channels)
        logits = F.conv3d(
            torch.cat([quarter_step(x, part).to(edges.dtype), edges], 1),
            torch.cat([linear.weight, detail.weight[rows]], 1),
            linear.bias + detail.bias[rows],
        )
        return self._plus_prior(logits, None if added is None else quarter_step(added, part))

    def body(
        self, image: Tensor, seen: Tensor | None = None, head: int = 0, detail: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """What a sub-voxel answer is made from, as `forward` would find it.

        Parameters
        ----------
        seen : Tensor, shape (N, features, I/stem, J/stem, K/stem)
            What the first block sees of the prior: `prior_features`. None means an even prior.
        detail : bool
            Whether the features are wanted beside the logits.

        Returns
        -------
        Tensor, float32, shape (N, channels, I/stem, J/stem, K/stem)
            The coarse logits without what `prior_logits` adds.
        Tensor, shape (N, detail, I/stem, J/stem, K/stem), or None
            The features that correct them.
        """
        x = self._decode(self._encode(image, None, seen)[0], head)[-1]
        with torch.autocast(x.device.type, enabled=False):  # a product less to be rounded
            logits = self._raised(self.heads[head], x.float())
        if not detail:
            return logits, None
        return logits, F.leaky_relu(self.edges(x), 0.01, inplace=not torch.is_grad_enabled())

    def prior_features(self, prior: Tensor) -> Tensor:
        """What the first block sees of a prior (N, prior_channels, i, j, k): (N, 8, i, j, k)."""
        return self.prior(prior)

    def prior_logits(self, prior: Tensor, head: int = 0) -> Tensor | None:
        """What a prior (N, prior_channels, i, j, k) adds to a head's logits; None for nothing."""
        added = self._prior_logs(prior, head)
        return None if added is None else self.prior_weight * added

    def corrections(self, head: int = 0) -> tuple[Tensor, Tensor]:
        """How the features of a voxel become what its sub-voxels add to its coarse logits.

        Parameters
        ----------
        head : int
            Which head answers.

        Returns
        -------
        weight : Tensor, float32, shape (8, channels, detail)
        bias : Tensor, float32, shape (8, channels)
            A linear layer on the features that `body` gives; sub-voxels in the order (0, 0, 0),
            (0, 0, 1) … (1, 1, 1).
        """
        detail = self.details[head]
        return detail.weight.reshape(8, -1, detail.in_channels), detail.bias.reshape(8, -1)

    def _prior_logs(self, prior: Tensor | None, head: int) -> Tensor | None:
        """The logarithm of a head's part of the prior; None where it has none."""
        place = None if prior is None else self.places[head]
        return None if place is None else torch.log(prior[:, place] + PRIOR_FLOOR)

    def _plus_prior(self, logits: Tensor, added: Tensor | None) -> Tensor:
        """The logits with as much of the prior's logarithm as the network has learned to add."""
        if added is None:
            return logits
        wide = torch.promote_types(logits.dtype, added.dtype)
        logits = logits.to(wide, memory_format=torch.contiguous_format)
        return torch.addcmul(logits, added.to(wide), self.prior_weight.to(wide))

    def _encode(
        self, image: Tensor, prior: Tensor | None, seen: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The encoder's levels, coarsest last, and the prior (an even one where it is missing).

        `seen` are the prior's features where they are known already.
        """
        mean = image.mean((2, 3, 4), keepdim=True)
        scale = image.std((2, 3, 4), keepdim=True) + 1e-4
        x, more = space_to_depth((image - mean) / scale, self.stem), []
        if self.prior_channels:
            if prior is None and seen is None:
                shape = (x.shape[0], self.prior_channels, *x.shape[2:])
                prior = x.new_full(shape, 1 / self.prior_channels)
            seen = self.prior_features(prior) if seen is None else seen
            more = [seen]
        else:
            prior = None
        levels = [self.down[0](x, *more)]
        for block in self.down[1:]:
            x = levels[-1]
            if self.design.down == "pool":
                x = F.max_pool3d(x, 2).to(x.dtype)  # autocast leaves float32
            levels.append(block(x))
        return levels, prior

    def _decode(self, levels: list[Tensor], head: int) -> list[Tensor]:
        """The decoder's levels for a head, the bottleneck first, the finest last."""
        own = head and self.design.decoders == "own"
        found = [levels[-1]]
        for block, skip in zip(
            self.more_up[head - 1] if own else self.up, levels[-2::-1], strict=True
        ):
            found.append(block(found[-1], skip))
        return found


def _prior_places(sizes: Sequence[int], prior_channels: int) -> list[slice | None]:
    """Where in the prior each head's channels lie; the last heads have one, as far as it goes."""
    places: list[slice | None] = []
    left = prior_channels
    for size in reversed(sizes):
        places.append(slice(left - size, left) if size <= left else None)
        left -= size if size <= left else left
    return places[::-1]
