"""What follows a convolution: norm, short cut, activation; in bfloat16 rounded once, at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SLAB = 1 << 18
"""Values that are worked on at a time: as many as a core's own cache holds."""


def finish(
    x: Tensor, norm: nn.InstanceNorm3d, slope: float, added: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """LeakyReLU of normed features, with a short cut added in between.

    Where a CPU computes in bfloat16 and nothing is learned, everything here is done in float32, a
    slab at a time: one rounding in place of three, and memory is read twice in place of four times.

    Parameters
    ----------
    x : Tensor, shape (N, C, I, J, K)
        What a convolution gave.
    norm : InstanceNorm3d
        With scale and shift.
    slope : float
        Of the LeakyReLU below 0; 0 is a ReLU.
    added : Tensor, shape (N, C, I, J, K), optional
        The short cut.
    dtype : torch.dtype
        What the values are rounded to where it is done in slabs.

    Returns
    -------
    Tensor, shape (N, C, I, J, K)
        In `dtype`, channels last, where it was done in slabs.
    """
    if _rounds(x):
        return _in_slabs(x, norm, slope, added, dtype)
    found = norm(x)
    if added is not None:
        found += added
    return F.leaky_relu(found, slope, inplace=True)


def _rounds(x: Tensor) -> bool:
    """Whether a single volume would be rounded to bfloat16 on a CPU, and nothing is learned."""
    low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return low and x.device.type == "cpu" and len(x) == 1 and not torch.is_grad_enabled()


def _in_slabs(
    x: Tensor, norm: nn.InstanceNorm3d, slope: float, added: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, more = _rows(x), None if added is None else _rows(added)
    scale, shift = _affine(rows, norm)
    out = torch.empty_like(rows, dtype=dtype)
    step = max(1, _SLAB // rows.shape[1])
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        slab = torch.addcmul(shift, rows[some].float(), scale)
        if more is not None:
            slab += more[some]
        out[some] = F.leaky_relu_(slab, slope)
    return out.reshape(1, *x.shape[2:], -1).permute(0, 4, 1, 2, 3)


def _rows(x: Tensor) -> Tensor:
    """The voxels of a volume (1, C, I, J, K) with channels last: (I·J·K, C)."""
    return x.permute(0, 2, 3, 4, 1).contiguous().reshape(-1, x.shape[1])


def _affine(rows: Tensor, norm: nn.InstanceNorm3d) -> tuple[Tensor, Tensor]:
    """Factor and summand (C,), float32, that norm rows (n, C) and scale and shift them."""
    kept = torch.zeros(rows.shape[1]), torch.ones(rows.shape[1])
    mean, variance = torch.batch_norm_update_stats(rows, *kept, 0.0)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale
