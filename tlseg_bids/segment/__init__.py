"""From a prepared image to class probabilities."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from tlseg_bids.segment.walk import sliding, tiles, views, whole

STRATEGIES: dict[str, Callable] = {
    "sliding": sliding,
    "whole": whole,
    "tiles": tiles,
    "views": views,
}
HOW_ASKED = ("name", "mirror", "merged", "halves", "trim")
"""Keys of a card's ``[strategy]`` that say how a network is asked; the others are arguments."""
GIVEN = ("factor", "progress", "each")
"""Arguments that come from the program and not from a card."""


def arguments_of(strategy: str) -> tuple[str, ...]:
    """The arguments of a strategy that a card may set."""
    found = inspect.signature(STRATEGIES[strategy]).parameters.values()
    return tuple(
        one.name for one in found if one.kind is one.KEYWORD_ONLY and one.name not in GIVEN
    )
