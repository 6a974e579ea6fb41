"""Ways to walk a network over a volume, with one blend.

A strategy sees only a `predict` function: a window of the image (1, C, i, j, k), its corner in
voxels and, where independent networks share the volume, the number of the one that is asked go in,
probabilities (1, channels, i/f, j/f, k/f) come out. `each` applies it to the windows: like `map`,
in their order, but it may be ahead of the window that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

Corner = tuple[int, int, int]
Predict = Callable[..., Tensor]
Progress = Callable[[int, int], None]
Each = Callable[[Callable, Iterable], Iterable]
TIE = 1 / 128


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


def sliding(  # noqa: PLR0913
    predict: Predict,
    image: Tensor,
    *,
    window: int | Sequence[int] = 96,
    overlap: float = 0.33,
    factor: int = 1,
    progress: Progress = _silent,
    each: Each = map,
) -> Tensor:
    """Overlapping windows, probabilities averaged with a tent weight while they come in.

    Parameters
    ----------
    predict : callable
        See the module's docstring.
    image : Tensor, shape (1, C, I, J, K)
        Sizes at least `window` and multiples of `factor`.
    window : int or sequence of 3 int
        Voxels along the sides of a window, multiples of `factor`.
    overlap : float
        Least share of a window that it has in common with its neighbour.
    factor : int
        How much coarser the network's output is than the image.
    progress : callable
        Called with windows done and windows in all.
    each : callable
        See the module's docstring.

    Returns
    -------
    Tensor, shape (channels, I/factor, J/factor, K/factor)
        Of the type that `predict` gives.
    """
    shape = tuple(n // factor for n in image.shape[2:])
    side = _sides(window, image)
    begins = [starts(n, w, overlap, factor) for n, w in zip(image.shape[2:], side, strict=True)]
    tents = [
        dict(zip(begin, blend(n // factor * factor, w, begin, factor), strict=True))
        for n, w, begin in zip(image.shape[2:], side, begins, strict=True)
    ]

    def ask(corner: Corner) -> Tensor:
        return predict(image[_window(corner, side)], corner)[0]

    total = None
    todo = list(product(*begins))
    if len(todo) == 1:
        (total,) = each(ask, todo)
        progress(1, 1)
        return total
    for number, (corner, found) in enumerate(zip(todo, each(ask, todo), strict=True)):
        there = tuple(
            slice(c // factor, (c + n) // factor) for c, n in zip(corner, side, strict=True)
        )
        if total is None:
            total = _zeros(found, shape)
        x, y, z = (tent[c].to(found) for tent, c in zip(tents, corner, strict=True))
        weight = x[:, None, None] * y[None, :, None] * z[None, None, :]
        total[(slice(None), *there)].addcmul_(found, weight)
        progress(number + 1, len(todo))
    return total


def _sides(window: int | Sequence[int], image: Tensor) -> list[int]:
    """Voxels along the sides of a window, which is no larger than the image (1, C, I, J, K)."""
    sides = [window] * 3 if isinstance(window, int) else window
    return [min(side, n) for side, n in zip(sides, image.shape[2:], strict=True)]


def _window(corner: Sequence[int], side: Sequence[int]) -> tuple[slice, ...]:
    """The index of a window in an image (1, C, I, J, K)."""
    cut = (slice(c, c + n) for c, n in zip(corner, side, strict=True))
    return (slice(None), slice(None), *cut)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros (channels, I, J, K) that lie in memory in the order of `like`'s axes."""
    order = sorted(range(4), key=like.stride, reverse=True)
    sizes = (like.shape[0], *shape)
    zeros = like.new_zeros([sizes[axis] for axis in order])
    return zeros.permute([order.index(axis) for axis in range(4)])


def whole(
    predict: Predict, image: Tensor, *, factor: int = 1, progress: Progress = _silent,
    each: Each = map,
) -> Tensor:  # fmt: skip
    """The whole volume at once, enlarged with zeros to a multiple of `factor`.

    Arguments and result as for `sliding`; the result covers the image, rounded up.
    """
    short = [-n % factor for n in image.shape[:1:-1]]
    image = torch.nn.functional.pad(image, [p for n in short for p in (0, n)])
    (found,) = each(lambda corner: predict(image, corner)[0], [(0, 0, 0)])
    progress(1, 1)
    return found


def tiles(  # noqa: PLR0913
    predict: Predict,
    image: Tensor,
    *,
    window: int | Sequence[int] = 96,
    begins: Sequence[Sequence[int]] | None = None,
    overlap: float = 0.33,
    fuse: str = "mean",
    factor: int = 1,
    progress: Progress = _silent,
    each: Each = map,
) -> Tensor:
    """A network of its own for each tile of the volume.

    Source: Huo et al. 2019, doi:10.1016/j.neuroimage.2019.03.041.

    Parameters
    ----------
    window : int or sequence of 3 int
        Voxels of a tile along each axis.
    begins : sequence of 3 sequences of int, optional
        First voxels of the tiles along each axis; spread evenly with `overlap` if not given. The
        tile's number counts with the last axis running fastest.
    fuse : str
        Where tiles overlap: ``mean`` of their probabilities, or ``vote``, the share of tiles with
        that label; of labels with as many votes the lowest is made the likeliest.

    Other arguments and the result are as for `sliding`.
    """
    shape = image.shape[2:]
    sides = _sides(window, image)
    if begins is None:
        begins = [starts(n, w, overlap, factor) for n, w in zip(shape, sides, strict=True)]
    todo = list(product(*begins))
    coverage = torch.zeros([n // factor for n in shape])

    def ask(tile: tuple[int, Corner]) -> Tensor:
        number, corner = tile
        return predict(image[_window(corner, sides)], corner, number)[0]

    total = None
    tiled = list(enumerate(todo))
    for (number, corner), found in zip(tiled, each(ask, tiled), strict=True):
        there = tuple(
            slice(c // factor, (c + n) // factor) for c, n in zip(corner, sides, strict=True)
        )
        if total is None:
            total = found.new_zeros((found.shape[0], *coverage.shape))
        if fuse == "vote":
            found = torch.zeros_like(found).scatter_(0, first_of_highest(found)[None], 1)
        total[(slice(None), *there)] += found
        coverage[there] += 1
        progress(number + 1, len(todo))
    if int(coverage.min()) == 0:
        raise ValueError("the tiles do not cover the volume")
    total /= coverage.to(total)
    if fuse == "vote":
        winner = first_of_highest(total)[None]
        total.mul_(1 - TIE).scatter_add_(0, winner, torch.full_like(total[:1], TIE))
    return total


def first_of_highest(values: Tensor) -> Tensor:
    """Along the first axis, the lowest index of the highest value: (n, …) to (…)."""
    best = values.amax(0)
    winner = torch.zeros(best.shape, dtype=torch.int64)
    for index in range(len(values) - 1, -1, -1):
        winner[values[index] == best] = index
    return winner


def views(  # noqa: PLR0913
    predict: Predict,
    image: Tensor,
    *,
    axes: Sequence[int] = (2, 1, 0),
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    window: int = 16,
    factor: int = 1,
    progress: Progress = _silent,
    each: Each = map,
) -> Tensor:
    """Slices across one axis, or across several with a network of its own for each.

    Source: Guha Roy et al. 2019, arXiv 1801.04161.

    Parameters
    ----------
    axes : sequence of int
        For each network the axis that its slices are stacked along.
    weights : sequence of float
        Of each network's probabilities in the mean.
    window : int
        Slices that go through a network together, a multiple of `factor`.

    Other arguments and the result are as for `sliding`.
    """
    shape = [n // factor * factor for n in image.shape[2:]]
    todo = [
        (number, axis, start)
        for number, axis in enumerate(axes)
        for start in range(0, shape[axis], window)
    ]

    def ask(slices: tuple[int, int, int]) -> Tensor:
        number, axis, start = slices
        length = min(window, shape[axis] - start)
        corner = tuple(start if a == axis else 0 for a in range(3))
        return predict(image.narrow(2 + axis, start, length), corner, number)[0]

    total, share = None, sum(weights[: len(axes)])
    found_at = zip(todo, each(ask, todo), strict=True)
    for count, ((number, axis, start), found) in enumerate(found_at):
        length = min(window, shape[axis] - start)
        if total is None:
            total = found.new_zeros((found.shape[0], *(n // factor for n in shape)))
        part = total.narrow(1 + axis, start // factor, length // factor)
        part.add_(found, alpha=weights[number] / share)
        progress(count + 1, len(todo))
    return total
