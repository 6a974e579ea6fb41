"""SPDX licence expressions: whether weights may be used for everything, commerce included.

The grammar is that of the SPDX specification, annex "SPDX license expressions"; names are also
read as datasets write them (``CC BY 4.0``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PERMISSIVE = frozenset(
    {
        "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY", "CC-BY-3.0", "CC-BY-4.0",
        "CC0", "CC0-1.0", "ISC", "MIT", "ODC-By-1.0", "PDDL-1.0", "Unlicense", "Zlib",
    }
)  # fmt: skip
"""SPDX identifiers of licences that allow every use, commercial use included; ``CC-BY`` and
``CC0`` are what datasets write that do not say which version."""

_KNOWN = frozenset(name.casefold() for name in PERMISSIVE)
_TOKEN = re.compile(r"\s*(\(|\)|\b(?:AND|OR)\b|(?:(?!\b(?:AND|OR)\b)[^()])+)", re.IGNORECASE)


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression allows every use.

    ``A AND B`` needs both, ``A OR B`` one of the two; ``AND`` binds more tightly; an exception
    (``A WITH B``) only adds to what A allows. What cannot be read, and what is not in
    `PERMISSIVE`, is not permissive.

    Examples
    --------
    >>> is_permissive("CC BY 4.0 AND Apache-2.0"), is_permissive("CC BY-NC 4.0 OR MIT")
    (True, True)
    >>> is_permissive("CC-BY-NC-3.0 AND MIT"), is_permissive("MIT AND")
    (False, False)
    """
    tokens = [token for found in _TOKEN.findall(expression) if (token := found.strip())]
    try:
        allowed = _alternatives(tokens)
    except (IndexError, ValueError):
        return False
    return allowed and not tokens


def all_of(expressions: Iterable[str]) -> tuple[str, ...]:
    """What several expressions ask for together, each once, to be joined with ``AND``.

    An expression with alternatives stands in brackets, so that ``AND`` leaves it whole.

    Examples
    --------
    >>> " AND ".join(all_of(["MIT OR GPL-3.0-only", "CC0-1.0 AND MIT", "CC0-1.0"]))
    '(MIT OR GPL-3.0-only) AND CC0-1.0 AND MIT'
    """
    return tuple(dict.fromkeys(part for text in expressions for part in _parts(text.strip())))


def _parts(expression: str) -> list[str]:
    """An expression between each ``AND`` outside of brackets; with ``OR`` there, it as a whole."""
    parts, start, depth = [], 0, 0
    for found in _TOKEN.finditer(expression):
        word = found[1].strip()
        depth += (word == "(") - (word == ")")
        if depth == 0 and word.upper() == "OR":
            return [f"({expression})"]
        if depth == 0 and word == "AND":
            parts.append(expression[start : found.start()].strip())
            start = found.end()
    return [*parts, expression[start:].strip()]


def _alternatives(tokens: list[str]) -> bool:
    allowed = _together(tokens)
    while tokens and tokens[0].upper() == "OR":
        tokens.pop(0)
        allowed = _together(tokens) or allowed
    return allowed


def _together(tokens: list[str]) -> bool:
    allowed = _one(tokens)
    while tokens and tokens[0].upper() == "AND":
        tokens.pop(0)
        allowed = _one(tokens) and allowed
    return allowed


def _one(tokens: list[str]) -> bool:
    token = tokens.pop(0)
    if token == "(":
        allowed = _alternatives(tokens)
        if tokens.pop(0) != ")":
            raise ValueError(")")
        return allowed
    if token == ")" or token.upper() in ("AND", "OR"):
        raise ValueError(token)
    name = re.split(r"\s+WITH\s+", token, flags=re.IGNORECASE)[0].strip().removesuffix("+")
    return re.sub(r"[\s_-]+", "-", name).casefold() in _KNOWN
