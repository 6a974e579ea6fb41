"""Independent networks of one kind, one for each part of a volume or for each view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Members(nn.Module):
    """Several networks that share nothing; a strategy says which one answers for a window.

    Parameters
    ----------
    out_channels : int or sequence of int
        Of every member.
    of : dict
        What a member is: ``network`` and its arguments.
    each : sequence of dict
        Arguments in which the members differ, one dict for each; ``{}`` for none.

    Notes
    -----
    A window is padded with zeros where a member cannot halve it often enough.
    """

    divisor = 1

    def __init__(
        self,
        out_channels: int | Sequence[int],
        of: Mapping[str, Any],
        each: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__()
        from tlseg_bids.networks import build

        self.members = nn.ModuleList(
            build(**of, **extra, out_channels=out_channels) for extra in each
        )
        first = self.members[0]
        self.stem, self.factor, self.coarse_only = first.stem, first.factor, first.coarse_only
        self.prior_channels, self.image_channels = first.prior_channels, first.image_channels
        self.halved = max(member.divisor for member in self.members)

    def forward(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        head: int = 0,
        parts: Sequence[Sequence[int]] | None = None,
        member: int | None = None,
    ) -> Tensor:
        """Logits of one member, or the mean of all members' where none is named."""
        chosen = self.members if member is None else [self.members[member]]
        sides = image.shape[2:]
        short = [x for side in reversed(sides) for x in (0, -side % self.halved)]
        if any(short):
            image = F.pad(image, short)
            prior = None if prior is None else F.pad(prior, [n // self.stem for n in short])
        found = [one(image, prior, head, parts) for one in chosen]
        logits = found[0] if member is not None else torch.stack(found).mean(0)
        if not any(short):
            return logits
        fine = [round(n * logits.shape[2 + a] / image.shape[2 + a]) for a, n in enumerate(sides)]
        return logits[..., : fine[0], : fine[1], : fine[2]]
