"""A scan's work, shared out over threads so that its results do not depend on their number.

Libraries that divide one operation over threads add up in an order that depends on how many there
are; in bfloat16 that moves labels at the borders of small structures. Here a piece of work (a
window, a slab) is computed on one thread, pieces side by side, and what they give is taken in
their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

CPU = torch.device("cpu")
Piece = TypeVar("Piece")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Crew:
    """So many threads for one scan, and the device on which its voxels lie.

    More than one only makes sense where the libraries' own threads are switched off
    (``torch.set_num_threads(1)``), and on the CPU: a GPU is handed one piece after the other.
    """

    threads: int = 1
    device: torch.device = CPU

    def pieces_of(self, on_a_core: int, on_a_gpu: int) -> int:
        """How much is worked on at a time: what fits a core's cache, or what fills a GPU."""
        return on_a_core if self.device.type == "cpu" else on_a_gpu

    def map(
        self, function: Callable[[Piece], Found], pieces: Iterable[Piece]
    ) -> Iterator[Found]:  # fmt: skip
        """What `function` gives for each piece, in the pieces' order.

        As many pieces as there are threads are computed ahead of the one that is taken, no more,
        so that memory stays bounded. The first error ends the walk and is raised.
        """
        if self.threads == 1:
            yield from map(function, pieces)
            return
        with ThreadPoolExecutor(self.threads, "piece") as pool:
            ahead: deque[Future[Found]] = deque()
            try:
                for piece in pieces:
                    ahead.append(pool.submit(function, piece))
                    if len(ahead) > self.threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def each(self, function: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
        """`map` for what is done and gives nothing."""
        for _ in self.map(function, pieces):
            pass


ALONE = Crew()
"""One piece after the other, in the thread that asks."""
