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
from dataclasses import dataclass, field
from itertools import islice
from threading import local
from typing import TypeVar
from weakref import ReferenceType, ref

Piece = TypeVar("Piece")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Crew:
    """So many threads for one scan.

    More than one only makes sense where the libraries' own threads are switched off
    (``torch.set_num_threads(1)``). Each thread that shares out work has as many of its own, so that
    scans side by side do not wait for each other's. They begin with the first piece and stay as
    long as the one they work for: oneDNN and the allocator keep for every thread what they need.
    """

    threads: int = 1
    _of_thread: local = field(default_factory=local, init=False, repr=False, compare=False)

    def _team(self) -> tuple[ThreadPoolExecutor, bool]:
        """The threads that work for the one that asks, and whether it is one of them itself."""
        team = getattr(self._of_thread, "team", None)
        if isinstance(team, ReferenceType):
            return team(), True
        if team is None:
            # not a strong reference, or the threads would keep themselves
            place: list[ReferenceType[ThreadPoolExecutor]] = []
            team = ThreadPoolExecutor(self.threads, "piece", _join, (self._of_thread, place))
            place.append(ref(team))
            self._of_thread.team = team
        return team, False

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
        team, belongs = self._team()
        ahead: deque[tuple[Piece, Future[Found]]] = deque()
        try:
            if belongs:
                yield from self._helping(team, function, iter(pieces), ahead)
                return
            for piece in pieces:
                ahead.append((piece, team.submit(function, piece)))
                if len(ahead) > self.threads:
                    yield ahead.popleft()[1].result()
            while ahead:
                yield ahead.popleft()[1].result()
        finally:
            wait([future for _, future in ahead if not future.cancel()])

    def _helping(
        self, team: ThreadPoolExecutor, function: Callable[[Piece], Found],
        pieces: Iterator[Piece], ahead: deque[tuple[Piece, Future[Found]]],
    ) -> Iterator[Found]:  # fmt: skip
        """`map` for a thread of the team: what no other has begun it computes itself."""
        for own in pieces:
            ahead.append((own, Future()))
            while ahead:
                piece, future = ahead.popleft()
                for other in islice(pieces, self.threads - len(ahead)):
                    ahead.append((other, team.submit(function, other)))
                if future.cancel():
                    yield function(piece)
                    continue
                for number, (other, waiting) in enumerate(ahead):
                    if future.done():
                        break
                    if waiting.cancel():
                        ahead[number] = other, _computed(function, other)
                yield future.result()

    def each(self, function: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
        """`map` for what is done and gives nothing."""
        for _ in self.map(function, pieces):
            pass


def _join(of_thread: local, place: list[ReferenceType[ThreadPoolExecutor]]) -> None:
    """Let a thread know the team that it belongs to."""
    of_thread.team = place[0]


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
