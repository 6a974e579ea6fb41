"""A 2.5-D network: a voxel's label from three orthogonal patches and the atlas at that voxel.

Source: Kushibar et al. 2019, doi:10.1038/s41598-019-43299-z.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32
REACH = 10
CHUNK = 1024
CERTAIN = 20.0
PLANES = ((0, 1), (0, 2), (1, 2))


class Path(nn.Module):
    """A 32×32 patch to `dense` features: five 3×3 convolutions without padding, two poolings."""

    def __init__(self, channels: int, widths: Sequence[int], dense: int) -> None:
        super().__init__()
        a, b, c = widths
        sizes = (channels, a, a, b, b, c)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(1, n) for n in sizes[1:])
        self.slopes = nn.ModuleList(nn.PReLU(n) for n in sizes[1:])
        self.dense = nn.Sequential(nn.Linear(9 * c, dense), nn.PReLU(dense))

    def forward(self, x: Tensor) -> Tensor:
        layers = zip(self.convs, self.norms, self.slopes, strict=True)
        for number, (conv, norm, slope) in enumerate(layers):
            x = slope(norm(conv(x)))
            if number in (1, 3):
                x = F.max_pool2d(x, 2)
        return self.dense(x.flatten(1))


class Patches(nn.Module):
    """Answers voxel by voxel; where the atlas has no structure near, the answer is background.

    The window is standardised inside the network by its voxels above 0. Norms look at one patch at
    a time, so that voxels do not know of each other.

    Parameters
    ----------
    out_channels : int or sequence of int
        Number of classes of every head, background included.
    widths : sequence of 3 int
        Channels of the convolutions.
    dense : sequence of 3 int
        Features of each path, of the three joined, and with the atlas.
    prior_channels : int
        0 for none, else the classes of the atlas; it holds the last heads' as for the U-Net.
    reach : int
        Voxels around the atlas' structures that are candidates (diagonals count).
    dropout : float
        Before and after the joined layer, in training only.
    """

    stem = factor = divisor = image_channels = 1
    coarse_only = True

    def __init__(
        self,
        out_channels: int | Sequence[int],
        widths: Sequence[int] = (20, 40, 60),
        dense: Sequence[int] = (180, 540, 270),
        prior_channels: int = 0,
        reach: int = REACH,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = [out_channels] if isinstance(out_channels, int) else list(out_channels)
        self.prior_channels, self.reach = prior_channels, reach
        self.paths = nn.ModuleList(Path(1, widths, dense[0]) for _ in PLANES)
        self.dropout = nn.Dropout(dropout)
        self.joined = nn.Sequential(nn.Linear(3 * dense[0], dense[1]), nn.PReLU(dense[1]))
        self.last = nn.Sequential(
            nn.Linear(dense[1] + prior_channels, dense[2]), nn.PReLU(dense[2])
        )
        self.heads = nn.ModuleList(nn.Linear(dense[2], n) for n in sizes)

    def forward(
        self,
        image: Tensor,
        prior: Tensor | None = None,
        head: int = 0,
        parts: Sequence[Sequence[int]] | None = None,  # noqa: ARG002
        voxels: Tensor | None = None,
    ) -> Tensor:
        """Logits (1, channels, I, J, K) of a window (1, 1, I, J, K), or of some of its voxels.

        Parameters
        ----------
        prior : Tensor, shape (1, prior_channels, I, J, K)
            Probabilities; without them even ones, and every voxel is a candidate.
        voxels : Tensor of int, shape (n, 3)
            Answer for these alone: (1, channels, n, 1, 1).
        """
        if len(image) > 1:
            priors = [None] * len(image) if prior is None else prior.split(1)
            pairs = zip(image.split(1), priors, strict=True)
            return torch.cat([self(one, atlas, head) for one, atlas in pairs])
        asked = self.candidates(image, prior) if voxels is None else voxels
        padded = F.pad(self._standardised(image)[0, 0], (SIDE // 2,) * 6)
        answers = [self._answer(padded, prior, head, some) for some in asked.split(CHUNK)]
        classes = self.heads[head].out_features
        found = torch.cat(answers) if len(asked) else image.new_zeros(0, classes)
        if voxels is not None:
            return found.T[None, :, :, None, None]
        logits = found.new_zeros(classes, *image.shape[2:])
        logits[0] = CERTAIN
        i, j, k = asked.T
        logits[:, i, j, k] = found.T
        return logits[None]

    def candidates(self, image: Tensor, prior: Tensor | None) -> Tensor:
        """Voxels (n, 3) within `reach` of where the atlas holds a structure."""
        if prior is None:
            near = torch.ones(image.shape[2:], dtype=torch.bool, device=image.device)
        else:
            some = (prior[:, :1] < 1 - 1 / 512).float()
            near = F.max_pool3d(some, 2 * self.reach + 1, 1, self.reach)[0, 0] > 0
        return torch.nonzero(near)

    def _standardised(self, image: Tensor) -> Tensor:
        inside = image > 0
        count = inside.sum().clamp_min(1)
        mean = (image * inside).sum() / count
        sd = (((image - mean) ** 2 * inside).sum() / count).sqrt() + 1e-4
        return torch.where(inside, (image - mean) / sd, 0.0)

    def _answer(self, padded: Tensor, prior: Tensor | None, head: int, voxels: Tensor) -> Tensor:
        patches = orthogonal(padded, voxels)
        x = torch.cat([p(patches[:, n : n + 1]) for n, p in enumerate(self.paths)], 1)
        x = self.dropout(self.joined(self.dropout(x)))
        if self.prior_channels:
            i, j, k = voxels.T
            even = x.new_full((len(x), self.prior_channels), 1 / self.prior_channels)
            x = torch.cat([x, even if prior is None else prior[0, :, i, j, k].T.to(x.dtype)], 1)
        return self.heads[head](self.last(x))


def orthogonal(padded: Tensor, voxels: Tensor) -> Tensor:
    """Patches (n, 3, 32, 32) across axes 2, 1 and 0, the voxel at row and column 16.

    `padded` (I + 32, J + 32, K + 32) has 16 voxels more on each side than `voxels` (n, 3) count.
    """
    steps = torch.arange(SIDE, device=padded.device)
    found = []
    for rows, columns in PLANES:
        index = [(voxels[:, a] + SIDE // 2)[:, None, None] for a in range(3)]
        index[rows] = voxels[:, rows, None, None] + steps[:, None]
        index[columns] = voxels[:, columns, None, None] + steps
        found.append(padded[index[0], index[1], index[2]])
    return torch.stack(found, 1)
