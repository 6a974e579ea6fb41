"""Ways to walk a network over a volume, with one blend.

A strategy sees only a `predict` function: a window of the image (1, C, i, j, k) and its corner in
voxels go in, probabilities (1, channels, i/f, j/f, k/f) come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

Corner = tuple[int, int, int]
Predict = Callable[[Tensor, Corner], Tensor]
Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def starts(size: int, window: int, overlap: float, step: int) -> list[int]:
    """First voxels of evenly spread windows that cover `size` voxels, multiples of `step`."""
    if size <= window:
        return [0]
    free = size - window
    count = -(-free // max(int(window * (1 - overlap)), 1)) + 1
    return [round(i * free / (count - 1) / step) * step for i in range(count)]


def corners(shape: Corner, window: int, overlap: float, step: int) -> Iterator[Corner]:
    """Corners of all windows over a volume."""
    return product(*(starts(n, window, overlap, step) for n in shape))


def taper(length: int) -> Tensor:
    """Blending weight along one axis, (length,): 1 in the middle, near 0 at the ends."""
    position = (torch.arange(length, dtype=torch.float32) + 0.5) / length
    return (1 - (2 * position - 1).abs()).clamp_min(1e-3)


def blend(size: int, window: int, begins: list[int], factor: int) -> list[Tensor]:
    """Weight of every window along an axis, (window/factor,) each; over all windows they sum to 1.

    `begins` are the windows' first voxels, at the image's resolution.
    """
    tent = taper(window // factor)
    total = torch.zeros(size // factor)
    for begin in begins:
        total[begin // factor : (begin + window) // factor] += tent
    return [tent / total[b // factor : (b + window) // factor] for b in begins]


def sliding(
    predict: Predict,
    image: Tensor,
    *,
    window: int = 96,
    overlap: float = 0.33,
    factor: int = 1,
    progress: Progress = _silent,
) -> Tensor:
    """Overlapping windows, probabilities averaged with a tent weight while they come in.

    Parameters
    ----------
    predict : callable
        See the module's docstring.
    image : Tensor, shape (1, C, I, J, K)
        Sizes at least `window` and multiples of `factor`.
    window : int
        Voxels along each side of a window, a multiple of `factor`.
    overlap : float
        Least share of a window that it has in common with its neighbour.
    factor : int
        How much coarser the network's output is than the image.
    progress : callable
        Called with windows done and windows in all.

    Returns
    -------
    Tensor, shape (channels, I/factor, J/factor, K/factor)
        Of the type that `predict` gives.
    """
    shape = tuple(n // factor for n in image.shape[2:])
    side = [min(window, n) for n in image.shape[2:]]
    begins = [starts(n, w, overlap, factor) for n, w in zip(image.shape[2:], side, strict=True)]
    tents = [
        dict(zip(begin, blend(n // factor * factor, w, begin, factor), strict=True))
        for n, w, begin in zip(image.shape[2:], side, begins, strict=True)
    ]
    total = None
    todo = list(product(*begins))
    for number, corner in enumerate(todo):
        here = tuple(slice(c, c + n) for c, n in zip(corner, side, strict=True))
        there = tuple(slice(s.start // factor, s.stop // factor) for s in here)
        found = predict(image[(slice(None), slice(None), *here)], corner)[0]
        if total is None:
            total = _zeros(found, shape)
        x, y, z = (tent[c].to(found) for tent, c in zip(tents, corner, strict=True))
        weight = x[:, None, None] * y[None, :, None] * z[None, None, :]
        total[(slice(None), *there)].addcmul_(found, weight)
        progress(number + 1, len(todo))
    return total


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros (channels, I, J, K) that lie in memory in the order of `like`'s axes."""
    order = sorted(range(4), key=like.stride, reverse=True)
    sizes = (like.shape[0], *shape)
    zeros = like.new_zeros([sizes[axis] for axis in order])
    return zeros.permute([order.index(axis) for axis in range(4)])


def whole(
    predict: Predict, image: Tensor, *, factor: int = 1, progress: Progress = _silent
) -> Tensor:
    """The whole volume at once, enlarged with zeros to a multiple of `factor`.

    Arguments and result as for `sliding`; the result covers the image, rounded up.
    """
    short = [-n % factor for n in image.shape[:1:-1]]
    image = torch.nn.functional.pad(image, [p for n in short for p in (0, n)])
    found = predict(image, (0, 0, 0))[0]
    progress(1, 1)
    return found
