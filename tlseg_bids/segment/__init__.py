"""From a prepared image to class probabilities."""

from __future__ import annotations

from collections.abc import Callable

from tlseg_bids.segment.walk import sliding, tiles, views, whole

STRATEGIES: dict[str, Callable] = {
    "sliding": sliding,
    "whole": whole,
    "tiles": tiles,
    "views": views,
}
