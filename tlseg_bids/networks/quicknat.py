"""QuickNAT: a 2-D network of dense blocks whose unpooling reuses the pooling's indices.

Source: Guha Roy et al. 2019, arXiv 1801.04161.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VIEWS = ("sagittal", "coronal", "axial")


class DenseBlock(nn.Module):
    """Two convolutions, each seeing what came before it too, then a 1×1 convolution.

    Every convolution follows an instance norm and a PReLU.
    """

    def __init__(self, inputs: int, width: int, kernel: int) -> None:
        super().__init__()
        widths = [inputs, inputs + width, inputs + 2 * width]
        self.norms = nn.ModuleList(nn.InstanceNorm2d(n, affine=True) for n in widths)
        self.slopes = nn.ModuleList(nn.PReLU() for _ in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(n, width, size, padding=size // 2, bias=False)
            for n, size in zip(widths, (kernel, kernel, 1), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, (norm, slope, conv) in enumerate(
            zip(self.norms, self.slopes, self.convs, strict=True)
        ):
            found = conv(slope(norm(x)))
            x = found if number == 2 else torch.cat([x, found], 1)
        return x


class QuickNAT(nn.Module):
    """Slices of one view, each by itself: (N, C, I, J, K) to (N, channels, I, J, K).

    The slices of a window go through the network as a batch, padded with zeros where they cannot be
    halved often enough; intensities are taken as they are, 0 to 1. Norms are instance norms, so
    that a slice's answer does not depend on the others of its batch.

    Parameters
    ----------
    out_channels : int or sequence of int
        Number of classes of every head, background included.
    features : sequence of int
        Width of the dense blocks: of each level, the bottleneck last.
    view : str
        ``axial``, ``coronal`` or ``sagittal``: across which axis the slices lie.
    kernel : int
        Side of the dense blocks' convolutions; odd.
    dropout : float
        After every block of encoder and decoder, whole channels, in training only.
    image_channels : int
        Channels of the image.
    """

    stem = factor = divisor = 1
    prior_channels = 0
    coarse_only = True

    def __init__(
        self,
        out_channels: int | Sequence[int],
        features: Sequence[int] = (64, 64, 64, 64, 64),
        view: str = "axial",
        kernel: int = 5,
        dropout: float = 0.2,
        *,
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"view is '{view}', not {' or '.join(VIEWS)}")
        sizes = [out_channels] if isinstance(out_channels, int) else list(out_channels)
        self.view, self.axis, self.image_channels = view, VIEWS.index(view), image_channels
        self.halved = 2 ** (len(features) - 1)
        self.dropout = nn.Dropout2d(dropout)
        self.down = nn.ModuleList(
            DenseBlock(a, b, kernel)
            for a, b in zip((image_channels, *features[:-2]), features[:-1], strict=True)
        )
        self.bottom = nn.Sequential(
            nn.Conv2d(features[-2], features[-1], kernel, padding=kernel // 2, bias=False),
            nn.InstanceNorm2d(features[-1], affine=True),
        )
        self.rise = nn.ModuleList(
            nn.Conv2d(deep, width, 1) if deep != width else nn.Identity()
            for deep, width in zip(features[:0:-1], features[-2::-1], strict=True)
        )
        self.up = nn.ModuleList(DenseBlock(2 * width, width, kernel) for width in features[-2::-1])
        self.heads = nn.ModuleList(nn.Conv3d(features[0], n, 1) for n in sizes)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(
        self,
        image: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        head: int = 0,
        parts: Sequence[Sequence[int]] | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Logits of a window (N, image_channels, I, J, K)."""
        stack = image.movedim(2 + self.axis, 1)
        n, slices, _, high, wide = stack.shape
        x = F.pad(stack.flatten(0, 1), (0, -wide % self.halved, 0, -high % self.halved))
        x = self._slices(x)[..., :high, :wide]
        volume = x.unflatten(0, (n, slices)).movedim(1, 2 + self.axis)
        return self.heads[head](volume)

    def _slices(self, x: Tensor) -> Tensor:
        """Features of slices (n, C, h, w)."""
        skips, places = [], []
        for block in self.down:
            x = self.dropout(block(x))
            skips.append(x)
            x, place = F.max_pool2d(x, 2, return_indices=True)
            places.append(place)
        x = self.bottom(x)
        for rise, block in zip(self.rise, self.up, strict=True):
            x = F.max_unpool2d(rise(x), places.pop(), 2)
            x = self.dropout(block(torch.cat([x, skips.pop()], 1)))
        return x
