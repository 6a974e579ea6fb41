"""A scan's work, shared out over threads so that its results do not depend on their number.

Libraries that divide one operation over threads add up in an order that depends on how many there
are; in bfloat16 that moves labels at the borders of small structures. Here a piece of work (a
window, a slab) is computed on one thread, pieces side by side, and what they give is taken in
their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from threading import current_thread
from typing import TypeVar

Piece = TypeVar("Piece")
Found = TypeVar("Found")
_NAME = "piece"


@dataclass(frozen=True)
class Crew:
    """So many threads for one scan.

    More than one only makes sense where the libraries' own threads are switched off
    (``torch.set_num_threads(1)``). They begin with the first piece and stay, as oneDNN keeps for
    every thread what it needs: on a new one a small convolution takes twice as long.
    """

    threads: int = 1

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, _NAME)

    def map(
        self, function: Callable[[Piece], Found], pieces: Iterable[Piece]
    ) -> Iterator[Found]:  # fmt: skip
        """What `function` gives for each piece, in the pieces' order.

        As many pieces as there are threads are computed ahead of the one that is taken, no more,
        so that memory stays bounded. The first error ends the walk and is raised. A piece may be
        shared out itself: its thread then computes what no other has begun, so that none waits for
        a thread that waits for it.
        """
        if self.threads == 1:
            yield from map(function, pieces)
            return
        ahead: deque[tuple[Piece, Future[Found]]] = deque()
        try:
            for piece in pieces:
                ahead.append((piece, self._pool.submit(function, piece)))
                if len(ahead) > self.threads:
                    yield _first(function, ahead)
            while ahead:
                yield _first(function, ahead)
        finally:
            wait([future for _, future in ahead if not future.cancel()])

    def each(self, function: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
        """`map` for what is done and gives nothing."""
        for _ in self.map(function, pieces):
            pass


def _first(
    function: Callable[[Piece], Found], ahead: deque[tuple[Piece, Future[Found]]]
) -> Found:  # fmt: skip
    """Take away the first of the pieces that are ahead: what it gives, or its error."""
    if current_thread().name.startswith(_NAME):
        for number, (piece, future) in enumerate(ahead):
            if ahead[0][1].done():
                break
            if future.cancel():
                ahead[number] = piece, _computed(function, piece)
    return ahead.popleft()[1].result()


def _computed(function: Callable[[Piece], Found], piece: Piece) -> Future[Found]:
    """A piece computed here and now, its error kept for the one who takes it."""
    found: Future[Found] = Future()
    try:
        found.set_result(function(piece))
    except Exception as error:
        found.set_exception(error)
    return found


ALONE = Crew()
"""One piece after the other, in the thread that asks."""
