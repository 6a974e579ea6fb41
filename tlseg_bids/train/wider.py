"""Weights of a network for one of the same shape whose levels are wider."""

from __future__ import annotations

import re

import torch
from torch import Tensor

DECODER = re.compile(r"(up|more_up\.\d+)\.(?P<number>\d+)\.(conv1|match\.0)\.weight")
ANSWER = re.compile(r"(heads|deeper\.(?P<level>\d+))\.\d+\.(?P<name>\w+)")


def widths(weights: dict[str, Tensor]) -> list[int]:
    """Channels of a `UNet`'s levels, the finest first; none for another network's parameters."""
    found: list[int] = []
    while (first := weights.get(f"down.{len(found)}.conv1.weight")) is not None:
        found.append(len(first))
    return found


def widened(there: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights `there`, in the shapes of a wider network, so that it answers as theirs did.

    Every level keeps the channels that it had, first, and has further ones behind them. What reads
    a further channel and makes a kept one of it, or an answer, starts at 0; what makes a further
    channel keeps the random values of `own`, so that it learns what the kept ones have not (Chen
    et al. 2016, arXiv 1511.05641, copy channels instead).

    Parameters
    ----------
    there, own : dict
        Parameters of two `UNet` by their names.

    Returns
    -------
    dict
        `there` itself where the levels are as wide, or a level is narrower, there are more or
        fewer, or they are raised by transposed convolutions.
    """
    before, after = widths(there), widths(own)
    narrower = any(b > a for b, a in zip(before, after, strict=False))
    if len(before) != len(after) or before == after or narrower:
        return there
    if any(".rise." in key for key in there):
        return there
    return {key: _grown(key, value, own, before, after) for key, value in there.items()}


def _grown(
    key: str, value: Tensor, own: dict[str, Tensor], before: list[int], after: list[int]
) -> Tensor:
    """One tensor of `widened`; one that wider levels do not explain stays as it is."""
    answer = ANSWER.fullmatch(key)
    if answer:  # a head of the start may have another number, or no place, in the network
        if answer["name"] == "bias":
            return value
        level = 0 if answer["level"] is None else 1 + int(answer["level"])
        further = value.new_zeros(len(value), after[level] - value.shape[1], *value.shape[2:])
        return torch.cat([value, further], 1)
    if key not in own or value.dim() == 0 or key.startswith(("details.", "age.", "prior.")):
        return value
    found, rows = own[key].clone().to(value.dtype), len(value)
    if value.dim() == 1:
        found[:rows] = value
        return found
    columns = _columns(key, value.shape[1], before, after)
    if key.startswith("down.0.conv1") and found.shape[1] != len(columns):
        return value  # other images, too
    found[:rows] = 0
    found[:rows, columns] = value
    return found


def _columns(key: str, count: int, before: list[int], after: list[int]) -> list[int]:
    """Where the channels that a tensor read lie among those that its wider copy reads.

    A decoder's level reads the one below it, then its own skip.
    """
    match = DECODER.fullmatch(key)
    if not match:
        return list(range(count))
    level = len(before) - 2 - int(match["number"])
    deep, skip = before[level + 1], before[level]
    start = after[level + 1]
    return [*range(deep), *range(start, start + skip)]
