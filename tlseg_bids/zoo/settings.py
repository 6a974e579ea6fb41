"""Numbers of a card's ``[preprocess]`` and ``[strategy]``: of the right kind, and possible.

Keys that are not named here are left to whoever reads them.
"""

from __future__ import annotations

from typing import Any

from tlseg_bids.errors import DataError, amount

SEE = "see docs/cards.md"
LARGEST_MM = 1000.0
MOST_VOXELS = 1024
MOST_TIMES = 100
PREPROCESS = {"spacing_mm": (0.1, 50.0), "settled_mm": (0.0, LARGEST_MM)}
PREPROCESS_WHOLE = {"rounds": (0, MOST_TIMES)}
LOOK = {"spacing_mm": (0.1, 50.0)}
SETTLE = {**LOOK, "sure_dice": (0.0, 1.0), "near_mm": (0.0, LARGEST_MM)}
LOOK_WHOLE = {"size": (1, MOST_VOXELS), "looks": (1, MOST_TIMES)}
STRATEGY = {"overlap": (0.0, 0.95)}
STRATEGY_WHOLE = {"window": (1, MOST_VOXELS)}
FUSES = ("mean", "vote")
VIEWS = 3
"""How many views there are where a card names no axes."""
TO_FIND = ("box_mm", "spacing_mm", "rounds", "settled_mm", "locator")
TO_PREPARE = ("box_mm", "spacing_mm")
TO_LOOK = ("size", "spacing_mm", "looks")


def check_settings(preprocess: dict[str, Any], strategy: dict[str, Any], where: object) -> None:
    """Refuse settings that no scan could be labelled with.

    Raises
    ------
    DataError
        With the value, the file and key, and what would be right.
    """
    place = f"{where}, [preprocess]"
    _check_numbers(preprocess, PREPROCESS, place)
    _check_numbers(preprocess, PREPROCESS_WHOLE, place, whole=True)
    if "box_mm" in preprocess:
        _check_box(preprocess["box_mm"], f"{place}, box_mm")
    if not isinstance(preprocess.get("placed_by", ""), str):
        raise DataError(
            f"{preprocess['placed_by']!r} is not the name of a model", f"{place}, placed_by", SEE
        )
    look = preprocess.get("locator", {})
    if not isinstance(look, dict):
        raise DataError(f"{look!r} is not a table", f"{place}, locator", SEE)
    _check_numbers(look, LOOK, f"{place}, locator")
    _check_numbers(look, LOOK_WHOLE, f"{place}, locator", whole=True)
    settler = preprocess.get("settler", {})
    if not isinstance(settler, dict):
        raise DataError(f"{settler!r} is not a table", f"{place}, settler", SEE)
    _check_numbers(settler, SETTLE, f"{place}, settler")
    place = f"{where}, [strategy]"
    _check_numbers(strategy, STRATEGY, place)
    window = strategy.get("window")
    for side in window if isinstance(window, list) and len(window) == 3 else [window]:
        shown = {} if side is None else {"window": side}
        _check_numbers(shown, STRATEGY_WHOLE, place, whole=True)
    for key in ("mirror", "halves"):
        if not isinstance(strategy.get(key, False), bool):
            raise DataError(
                f"{strategy[key]!r} is not a truth value", f"{place}, {key}", "write true or false"
            )
    _check_halves(strategy, place)
    _check_shared(strategy, place)


def _check_shared(strategy: dict[str, Any], place: str) -> None:
    """Refuse what does not say how several networks share a volume and are joined."""
    _check_list(strategy, "axes", (0, 2), place, whole=True)
    _check_list(strategy, "merged", (0, MOST_TIMES), place, whole=True)
    _check_list(strategy, "weights", (0, MOST_TIMES), place)
    if "weights" in strategy:
        views, weights = strategy.get("axes", [0] * VIEWS), strategy["weights"]
        if len(weights) < len(views) or not sum(weights[: len(views)]):
            raise DataError(
                f"{list(weights)} cannot weigh {amount(len(views), 'view')}", f"{place}, weights",
                "write a number for each view, at least one of them above 0",
            )  # fmt: skip
    if strategy["name"] == "views" and isinstance(strategy.get("window"), list):
        raise DataError(
            f"{strategy['window']} is not a number of slices", f"{place}, window",
            "write one whole number",
        )  # fmt: skip
    if strategy.get("fuse", FUSES[0]) not in FUSES:
        raise DataError(
            f"{strategy['fuse']!r} is no way to join tiles", f"{place}, fuse",
            f"write {' or '.join(FUSES)}",
        )  # fmt: skip
    begins = strategy.get("begins", [[0]] * 3)
    if not isinstance(begins, list | tuple) or len(begins) != 3:
        raise DataError(
            f"{str(begins)[:200]!r} does not say where tiles begin", f"{place}, begins",
            "write three lists, of the tiles' first voxels along each axis",
        )  # fmt: skip
    for firsts in begins:
        _check_list({"begins": firsts}, "begins", (0, MOST_VOXELS), place, whole=True)


def _check_list(
    table: dict[str, Any], key: str, bounds: tuple[float, float], place: str, whole: bool = False
) -> None:
    """Refuse what is no list of numbers, each within bounds; it may be left out."""
    values = table.get(key, ())
    if not isinstance(values, list | tuple) or (key in table and key != "merged" and not values):
        raise DataError(
            f"{str(values)[:200]!r} is not a list of numbers", f"{place}, {key}",
            "write numbers in square brackets",
        )  # fmt: skip
    for value in values:
        _check_numbers({key: value}, {key: bounds}, place, whole)


def _check_halves(strategy: dict[str, Any], place: str) -> None:
    """Refuse halves that are no halves, and a trim that is not three numbers of voxels."""
    walks = strategy.get("name") == "sliding" and "window" in strategy
    if strategy.get("halves", False) and (strategy.get("mirror", False) or not walks):
        raise DataError(
            "halves = true needs name = \"sliding\" and a window, and shows a half in the mirror "
            "without mirror = true", place, SEE,
        )  # fmt: skip
    trim = strategy.get("trim", [0, 0, 0])
    if not isinstance(trim, list | tuple) or len(trim) != 3:
        raise DataError(
            f"{str(trim)[:200]} is not a trim", f"{place}, trim",
            "write three whole numbers, of the voxels to leave out at both ends of each axis",
        )  # fmt: skip
    for side in trim:
        _check_numbers({"trim": side}, {"trim": (0, MOST_VOXELS)}, place, whole=True)


def check_complete(preprocess: dict[str, Any], where: object) -> None:
    """Refuse settings that lack what finding the brain in a scan needs.

    Where another model finds it (`placed_by`), that is the grid alone.

    Raises
    ------
    DataError
        Naming the keys.
    """
    placed, look = "placed_by" in preprocess, preprocess.get("locator", {})
    missing = [key for key in (TO_PREPARE if placed else TO_FIND) if key not in preprocess]
    missing += [f"locator.{key}" for key in TO_LOOK if key not in look and not placed]
    if missing:
        raise DataError(f"missing: {', '.join(missing)}", f"{where}, [preprocess]", SEE)


def _check_numbers(
    table: dict[str, Any],
    bounds: dict[str, tuple[float, float]],
    where: str,
    whole: bool = False,
) -> None:
    for key, (low, high) in bounds.items():
        value = table.get(key, low)
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise DataError(
                f"{value!r} is not {kind} from {low:g} to {high:g}", f"{where}, {key}", SEE
            )


def _check_box(box: Any, where: str) -> None:
    right = isinstance(box, list | tuple) and len(box) == 3
    for axis in box if right else ():
        pair = isinstance(axis, list | tuple) and len(axis) == 2
        numbers = pair and all(isinstance(n, int | float) for n in axis)
        right = right and numbers and -LARGEST_MM <= axis[0] < axis[1] <= LARGEST_MM
    if not right:
        raise DataError(
            f"{str(box)[:200]} is not a box", where, "write [[left, right], [back, front], "
            f"[low, high]] in mm, each from {-LARGEST_MM:g} to {LARGEST_MM:g}",
        )  # fmt: skip
