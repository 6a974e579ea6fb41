"""What has to agree between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, atleast_2d

from tlseg_bids.errors import DataError, UsageError, amount
from tlseg_bids.train.parallel import Team
from tlseg_bids.train.recipe import Recipe

MAY_CHANGE = (
    "steps", "checkpoint_every", "checkpoint_minutes", "batch", "compile", "deterministic",
)  # fmt: skip


def check_same(recipe: Recipe, saved: Recipe, where: object) -> None:
    """Refuse to go on from a checkpoint of another recipe; what is in `MAY_CHANGE` may differ.

    Raises
    ------
    UsageError
        Naming the keys with both values.
    """
    now, before = _flat(asdict(recipe)), _flat(asdict(saved))
    apart = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in sorted(now | before)
        if now.get(key) != before.get(key) and key not in MAY_CHANGE
    ]
    if apart:
        raise UsageError(
            f"the checkpoint was made with another {', '.join(apart)}", where,
            "take the recipe it was made with, or give this run another --name or --out",
        )  # fmt: skip


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys, tuples as lists."""
    found = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def check_data(now: dict[str, str], before: dict[str, str], where: object) -> None:
    """Refuse other scans than those that the run began with.

    Parameters
    ----------
    now, before : dict of str to str
        ``dataset/subject`` to the hash of its files.

    Raises
    ------
    DataError
        Naming one of them.
    """
    changed = sorted(key for key in before | now if before.get(key) != now.get(key))
    if changed:
        raise DataError(
            f"{amount(len(changed), 'scan is', 'scans are')} not as in the checkpoint, "
            f"'{changed[0]}' for one",
            where, "bring the data back, or give this run another --name",
        )  # fmt: skip


def generator_state(saved: dict[str, Any], team: Team, where: object) -> Tensor:
    """The state of this process's random numbers.

    Raises
    ------
    UsageError
        If the checkpoint is of another number of processes.
    """
    states = atleast_2d(saved["generator"])
    if len(states) != team.world:
        raise UsageError(
            f"the checkpoint is of {amount(len(states), 'process', 'processes')}, and here "
            f"{'is' if team.world == 1 else 'are'} {team.world}",
            where, f"start it with torchrun --nproc-per-node {len(states)}",
        )  # fmt: skip
    return states[team.rank].clone()  # a generator reads from the start of the storage


def code_trail(before: str, step: int, now: str) -> str:
    """The versions of the program that made a checkpoint, with the step where each took over."""
    if before.rpartition(": ")[2] == now:
        return before
    return f"{before}, from step {step}: {now}"
