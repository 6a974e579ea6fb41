"""Convolutions of volumes, as a CPU computes them fastest where nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

THIN = 2


def convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A convolution (N, C, I, J, K) that nothing is learned from.

    In float32 on a CPU oneDNN is asked itself: on one thread PyTorch 2.13 takes a convolution of
    its own for most volumes, three to four times as slow.
    """
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    known = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if x.device.type != "cpu" or not single or not known:
        return F.conv3d(x, weight, bias, stride, padding)
    where = list(padding), list(stride), [1, 1, 1]
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, *where, 1)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Channels side by side: (N, C, I, J, K) each to (N, ΣC, I, J, K).

    Where channels lie side by side in memory already, the voxels are joined as rows of a matrix,
    which takes PyTorch a third of the time.
    """
    if len(parts) == 1:
        return parts[0]
    last = torch.channels_last_3d
    if not all(part.is_contiguous(memory_format=last) for part in parts):
        return torch.cat(tuple(parts), 1)
    rows = [part.permute(0, 2, 3, 4, 1) for part in parts]
    n, *shape = rows[0].shape[:-1]
    table = torch.cat([one.reshape(-1, one.shape[-1]) for one in rows], 1)
    return table.reshape(n, *shape, -1).permute(0, 4, 1, 2, 3)


def convolve_raised(deep: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    """A 3×3×3 convolution of `deep`, each of its voxels repeated 2³ times, joined with `skip`.

    A kernel that moves over repeated voxels sees 2³ different ones at a time, others for each of
    the eight places in a voxel. So the weights of equal voxels are added up, and `deep` is
    convolved where it is: 8 in place of 27 products for each of its channels, the same up to
    rounding (Shi et al. 2016, arXiv 1609.07009). What is found is added up in float32.

    Parameters
    ----------
    deep : Tensor, shape (N, C, I, J, K)
    skip : Tensor, shape (N, S, 2I, 2J, 2K)
    weight : Tensor, shape (O, C + S, 3, 3, 3)

    Returns
    -------
    Tensor, float32 (float64 of float64), shape (N, O, 2I, 2J, 2K)
    """
    channels, shape = deep.shape[1], deep.shape[2:]
    out = convolve(skip, weight[:, channels:].contiguous(), (1, 1, 1), (1, 1, 1))
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    voxels = out.permute(0, 2, 3, 4, 1)
    for part in product((0, 1), repeat=3):
        found = convolve(deep, _folded(weight[:, :channels], part), (1, 1, 1), (1, 1, 1))
        some = (slice(first, first + n) for first, n in zip(part, shape, strict=True))
        i, j, k = part
        voxels[:, i::2, j::2, k::2] += found[(slice(None), slice(None), *some)].permute(
            0, 2, 3, 4, 1
        )
    return out


def _folded(weight: Tensor, part: Sequence[int]) -> Tensor:
    """Weights (O, C, 2, 2, 2) on single voxels, of those (O, C, 3, 3, 3) on repeated ones.

    A lower half (0 in `part`) sees the voxel before, and twice its own; an upper one (1) its own
    twice, and the voxel behind.
    """
    for axis, upper in enumerate(part, 2):
        low, middle, high = weight.unbind(axis)
        ends = (low + middle, high) if upper else (low, middle + high)
        weight = torch.stack(ends, axis)
    return weight


class Convolution(nn.Conv3d):
    """3×3×3 convolution that learns in float32 where the features are two voxels thin.

    The gradient of its weights in bfloat16 on a CPU then holds what was in memory before (PyTorch
    2.13, oneDNN): rarely noticed at first, not a number later.

    Where nothing is learned, a CPU convolves in float32 what comes in float32: the image, and what
    a block keeps whole. Autocast would round it first.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve the channels of `x` and, behind them, of `more`."""
        if not torch.is_grad_enabled():
            whole = x.dtype == torch.float32 and x.device.type == "cpu"
            with torch.autocast("cpu", enabled=False) if whole else nullcontext():
                x = join([x, *(one.to(x.dtype) for one in more)])
                return convolve(x, self.weight, self.stride, self.padding)
        x = join([x, *more])
        if min(x.shape[2:]) > THIN or x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Pointwise(nn.Conv3d):
    """A linear layer on the channels of every voxel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return convolve(x, self.weight, self.stride, self.padding, self.bias)
