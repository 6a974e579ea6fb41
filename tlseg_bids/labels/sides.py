"""Which side of the body the name of a structure says, and what its partner is called."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

_WORD = re.compile(r"[^\W_]+")
_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_OTHER = {"left": "right", "lh": "rh", "l": "r"}
_OTHER |= {right: left for left, right in _OTHER.items()}
_LEFT = ("left", "lh", "l")


def side_of(name: str) -> str:
    """``left``, ``right`` or ``none``.

    Read from left or right anywhere between words or capitals (``Hippocampus (left)``,
    ``LeftAmygdala``), else from lh or rh (``ctx-lh-insula``), else from l or r as the first or last
    word (``L_Hippocampus``, ``hippocampus.R``). A name that says both, or nothing else, has none.
    """
    span = _span(name)
    if span is None:
        return "none"
    return "left" if name[slice(*span)].lower() in _LEFT else "right"


def mirrored_name(name: str) -> str:
    """The name of the structure on the other side."""
    span = _span(name)
    return name if span is None else _with(name, span, _OTHER[name[slice(*span)].lower()])


def without_side(name: str) -> str:
    """The name with a space where the side is told."""
    span = _span(name)
    return name if span is None else _with(name, span, " ")


def unpaired(table: pd.DataFrame) -> tuple[str, ...]:
    """Names of a protocol's table that say a side and have no partner on the other one.

    In the mirror such a structure would lie on the side that its name does not say.
    """
    alone = table[table["index"] == table["mirror"]]["name"]
    return tuple(str(name) for name in alone if side_of(str(name)) != "none")


def _with(name: str, span: tuple[int, int], text: str) -> str:
    return name[: span[0]] + text + name[span[1] :]


def _span(name: str) -> tuple[int, int] | None:
    """Where the side stands in the name."""
    words = [match.span() for match in _WORD.finditer(name)]
    parts = [
        (start + match.start(), start + match.end())
        for start, end in words
        for match in _PART.finditer(name[start:end])
    ]
    # "Rh" inside a word is short for something else, such as perirhinal
    plain = [span for span in parts if not name[slice(*span)].istitle()]
    ends = (*words[:1], *words[-1:])
    for sides, spans, allowed in (
        (("left", "right"), [*words, *parts], None),
        (("lh", "rh"), [*words, *plain], None),
        (("l", "r"), words, ends),
    ):
        found = [span for span in spans if name[slice(*span)].lower() in sides]
        if found and (len(parts) == 1 or _differ(name[slice(*span)] for span in found)):
            return None
        found = [span for span in found if allowed is None or span in allowed]
        if found:
            return found[0]
    return None


def _differ(texts: Iterable[str]) -> bool:
    return len({text.lower() for text in texts}) > 1
