"""Values of a recipe's tables: of the kind that their fields are, and within what is possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tlseg_bids.errors import UsageError
from tlseg_bids.train.synth import Mix

Hints = dict[str, Any]
Limits = dict[str, tuple[float, float]]

LARGE = 1e9
SIDES = (1, 1024)
SHARE = (0.0, 1.0)
FACTOR = (0.0, 1e6)
ONE = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
SEVERAL = {int: "whole numbers", float: "numbers", str: "texts", bool: "truth values"}
COUNTS = {2: "two", 3: "three"}

LIMITS: dict[str, Limits] = {
    "": {
        "patch": SIDES, "spacing_mm": (0.1, 50), "box_mm": (-1000, 1000), "centred": SHARE,
        "fold": (0, LARGE), "steps": (1, LARGE), "learning_rate": FACTOR, "weight_decay": FACTOR,
        "warmup": (0, LARGE), "ema": SHARE, "seed": (0, 2**53), "dice_weight": FACTOR,
        "prior_mm": (0.1, 50), "parts": (1, 8), "coarse": SHARE, "accumulate": (1, 100_000),
        "batch": (1, 100_000), "checkpoint_minutes": (0, LARGE),
    },
    "shape": {
        "rotation": (0, 180), "log_scale": (-3, 3), "anisotropy": (0, 3), "shear": (0, 3),
        "shift_mm": (0, 1000), "elastic_mm": (0, 100), "elastic_spacing_mm": (1, 1000),
    },
    "mix": {one.name: SHARE for one in fields(Mix)} | {"noise": FACTOR},
    "descent": {"momentum": SHARE, "power": (0, 100), "age_rate": FACTOR},
    "loss": {
        "entropy": FACTOR, "edges": FACTOR, "rim": (0, 64), "coarser": FACTOR, "age": FACTOR,
        "amount": FACTOR,
    },
    "places": {
        "begins": (0, SIDES[1]), "axes": (0, 2), "slices": SIDES, "merged": (0, LARGE),
        "voxels": (2, LARGE), "rim": (0, 64),
    },
}  # fmt: skip
"""Of every number in a value, by table."""

DATASET: Hints = {
    "protocol": str, "labels": str, "merge": list[tuple[int, int]], "ignore": list[int],
    "fill": int, "images": list[str], "moved": dict[str, tuple[float, float, float]],
    "first": int, "head": str, "budget": dict[str, Any], "weight": float, "real": float,
    "mix": dict[str, Any],
}  # fmt: skip
"""The rules of a dataset in a recipe."""
DATASET_LIMITS: Limits = {
    "ignore": (0, LARGE), "first": (1, LARGE), "weight": FACTOR, "real": SHARE,
}  # fmt: skip
BUDGET: Hints = {"axis": str, "share": float}
LOOSER: Hints = {"way": list[float], "shares": list[float]}
"""Of fields whose table tells by itself how many values they have."""


def hints_of(table: type) -> Hints:
    """The kind of every field of a table that is a dataclass."""
    return {key: LOOSER.get(key, hint) for key, hint in get_type_hints(table).items()}


def check_values(values: Mapping[str, Any], hints: Hints, limits: Limits, where: str) -> None:
    """Refuse keys that nobody reads, values of another kind, and numbers beyond the limits.

    Parameters
    ----------
    hints : dict
        Annotation of each known key; a table that is a dataclass of its own is looked into
        elsewhere.
    limits : dict
        Lowest and highest number, for the keys that have any.

    Raises
    ------
    UsageError
        With the value, the file and table, and what would be right.
    """
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UsageError(f"unknown keys {unknown}", where, f"known are {', '.join(hints)}")
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise UsageError(f"{key} is {_short(value)}", where, f"write {_words(hints[key])}")
        low, high = limits.get(key, (-float("inf"), float("inf")))
        beyond = [number for number in _numbers(value) if not low <= number <= high]
        if beyond:
            raise UsageError(
                f"{key} is {_short(value)}", where,
                f"write {_words(hints[key])} from {low:g} to {high:g}",
            )  # fmt: skip


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file is of the kind that an annotation asks for."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        several = isinstance(value, list | tuple) and len(value) == len(inner)
        return several and all(_fits(v, one) for v, one in zip(value, inner, strict=True))
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if hint is Any:
        return True
    if is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:  # the comparison tells NaN and infinity, of however long an integer
        return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300
    return isinstance(value, hint) and (hint is bool or type(value) is not bool)


def _words(hint: Any) -> str:
    """What an annotation asks for, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return " or ".join(_words(one) for one in inner if one is not type(None))
    if origin is tuple:
        return f"{COUNTS[len(inner)]} {SEVERAL[inner[0]]}"
    if origin in (list, Sequence):
        return f"a list of {_plural(inner[0])}"
    if origin in (dict, Mapping):
        return "a table" if inner[1] is Any else f"a table of {_plural(inner[1])}"
    return ONE.get(hint, "a table")


def _plural(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return f"lists of {_words(hint)}"
    return f"lists of {SEVERAL[inner[0]]}" if origin is list else SEVERAL.get(hint, "tables")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value, however deep."""
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and type(value) is not bool:
        yield value


def _short(value: Any) -> str:
    return repr(value)[:200]
