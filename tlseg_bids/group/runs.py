"""Which run of a scan to use, where it was repeated: proposed, like all that is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tlseg_bids.errors import amount, listed
from tlseg_bids.group.exclusion import Proposal
from tlseg_bids.group.study import Row, number
from tlseg_bids.report.derivatives import SAME

DICE = ("qc", "qc_predicted_dice")


def one_of_each(
    rows: Sequence[Row], proposals: Sequence[Proposal], which: str
) -> tuple[list[Proposal], list[str]]:
    """Propose to leave out all but one of the scans that differ in nothing but ``run``.

    Parameters
    ----------
    rows : sequence of Row
    proposals : sequence of Proposal
        Of each row, made without regard to its other runs.
    which : str
        ``each``: nothing is changed. Of the runs that are not to be excluded anyway, one stays:
        with ``first`` that with the lowest number, with ``best-qc`` one to ``use`` before one to
        ``look`` at; of several, the one whose labels are expected to have the highest Dice, then
        the first.

    Returns
    -------
    proposals : list of Proposal
        ``exclude`` for the other runs, with the run to use instead as their first reason.
    said : list of str
        A sentence for the log and the page.
    """
    if which == "each":
        return list(proposals), []
    scans: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        scans.setdefault(_all_but_run(row), []).append(place)
    repeated = [runs for runs in scans.values() if len(runs) > 1]
    if not repeated:
        return list(proposals), [f"--multi-run {which}: no scan was repeated"]
    found, others, none = list(proposals), 0, []
    for runs in repeated:
        fit = [n for n in runs if proposals[n].proposal != "exclude"]
        if not fit:
            none.append(rows[runs[0]].stem)
            continue
        kept = min(fit, key=lambda n: _rank(rows[n], proposals[n], which))
        for n in runs:
            if n != kept:
                why = f"use {rows[kept].stem} instead (--multi-run {which})"
                reasons = (why, *proposals[n].reasons)
                found[n] = replace(proposals[n], proposal="exclude", reasons=reasons)
                others += 1
    said = [
        f"--multi-run {which}: {amount(len(repeated), 'scan')} with several runs; "
        f"one run of {len(repeated) - len(none)} is to be used, {amount(others, 'other')} to be "
        "left out (group_exclusion.tsv)"
    ]
    if none:
        said.append(f"--multi-run {which}: all runs are to be excluded of {listed(none)}")
    return found, said


def _all_but_run(row: Row) -> tuple[str, ...]:
    same = (row.entities.get(name, "") for name in SAME)
    return row.participant, row.session, row.stratum, *same


def _rank(row: Row, proposal: Proposal, which: str) -> tuple[float, ...]:
    """Lower is better."""
    run = row.entities.get("run", "0")
    order = float(run) if run.isdecimal() else 0.0
    if which == "first":
        return (order,)
    dice = number(row.facts.get(DICE, "n/a"))
    return (float(proposal.proposal != "use"), math.inf if math.isnan(dice) else -dice, order)
