"""Which recipe, how many folds and how many steps: decided from scans and time, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlseg_bids.adapt.inspect import Inspected
from tlseg_bids.adapt.judge import FOLDS, REHEARSAL_CONTRASTS, folds
from tlseg_bids.adapt.reading import Reading
from tlseg_bids.errors import UsageError, amount, listed
from tlseg_bids.train.adaptation import Adaptation, load_adaptation

AUTO = "auto"
OWN_LABELS = "own-labels"
FEW_PERSONS = 2
NEAR_DICE = 0.85
LEAST_STEPS = 10
ENOUGH_STEPS = 150
SECONDS_TO_WRITE = 10.0
SLOWER = 1.3


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on this machine, and what the budget leaves of them.

    Parameters
    ----------
    step, answer, head : float
        A step of training, labelling a scan, synthesising and labelling a head to rehearse on.
    left : float
        Of the budget.
    """

    step: float
    answer: float
    head: float
    left: float


@dataclass(frozen=True)
class Course:
    """How the adaptation runs.

    Parameters
    ----------
    folds, steps : int
        Runs of the cross-validation, and steps of each run and of the final one.
    limit_s : float
        Seconds that a run may train, `SLOWER` times what was expected: other work on the machine
        must not multiply the budget.
    reasons : tuple of str
        Sentences.
    """

    folds: int
    steps: int
    limit_s: float
    reasons: tuple[str, ...]


def choose_recipe(
    asked: str, inspected: Sequence[Inspected], reading: Reading
) -> tuple[Adaptation, tuple[str, ...]]:
    """The recipe, and why.

    Parameters
    ----------
    asked : str
        ``auto``, a preset or a file.
    inspected : sequence of Inspected
        The usable scans beside the base's answer.
    reading : Reading
        What the labels mean.

    Raises
    ------
    NoInputError, UsageError
        As `load_adaptation`; also if the labels need a new head and the recipe has none.
    """
    persons = len({one.labelled.scan.subject for one in inspected})
    if asked != AUTO:
        how = load_adaptation(asked)
        if reading.new_head and how.head != "new":
            raise UsageError(
                f"the labels are in a protocol of their own, '{reading.target.name}', and recipe "
                f"'{how.name}' keeps the model's", "--fine-tune",
                f"use {AUTO} or {OWN_LABELS}, or give labels that the model knows",
            )  # fmt: skip
        return how, (f"Recipe '{how.name}' was asked for: {how.summary}.",)
    if reading.new_head:
        return load_adaptation(OWN_LABELS), (
            f"Recipe '{OWN_LABELS}': the labels are in a protocol that the model does not answer "
            "in.",
        )
    said = [amount(persons, "labelled person")]
    agreement = float(np.nanmean([one.evidence.agreement for one in inspected]))
    near = agreement >= NEAR_DICE
    if np.isfinite(agreement):
        words = "is near to" if near else "differs from"
        said.append(f"the base {words} the labels (Dice {agreement:.2f} over large structures)")
    name = "careful" if persons <= FEW_PERSONS or near else "rehearse"
    how = load_adaptation(name)
    return how, (f"Recipe '{name}', as there are {' and '.join(said)}: {how.summary}.",)


def plan_course(how: Adaptation, subjects: Sequence[str], costs: Costs, minutes: float) -> Course:
    """Folds and steps that fit into the time: the most folds that leave a run `ENOUGH_STEPS`.

    Parameters
    ----------
    how : Adaptation
        The recipe.
    subjects : sequence of str
        The person of each scan.
    costs : Costs
        What things take here.
    minutes : float
        The whole budget, for the sentence.

    Raises
    ------
    UsageError
        If not even `LEAST_STEPS` steps a run fit.
    """
    if how.max_steps < LEAST_STEPS:
        raise UsageError(
            f"max_steps is {how.max_steps}, and fewer than {LEAST_STEPS} steps teach nothing",
            f"recipe '{how.name}'", f"write {LEAST_STEPS} or more",
        )  # fmt: skip
    judged = len(subjects) * (1 if len(set(subjects)) > 1 else 2)
    judging = judged * (len(how.shares) + 2) * costs.answer
    judging += len(REHEARSAL_CONTRASTS) * (len(how.shares) + 1) * costs.head
    left = costs.left - judging - SECONDS_TO_WRITE
    for count in range(len(folds(subjects, FOLDS)), 1, -1):
        steps = int(min(left / ((count + 1) * costs.step), how.max_steps))
        if steps >= min(how.max_steps, ENOUGH_STEPS):
            break
    if steps < LEAST_STEPS:
        short = ((count + 1) * LEAST_STEPS * costs.step - left) / 60
        raise UsageError(
            f"{amount(float(minutes), 'minute is', 'minutes are')} too few: a step takes "
            f"{costs.step:.1f} s here, labelling a scan {costs.answer:.0f} s", "--budget",
            f"give {np.ceil(minutes + short):g} or more",
        )  # fmt: skip
    return Course(count, steps, SLOWER * steps * costs.step, (
        f"{count} folds and {steps} steps a run: a step takes {costs.step:.2f} s here, labelling a "
        f"scan {costs.answer:.1f} s, and the budget is "
        f"{amount(float(minutes), 'minute')}.",
    ))  # fmt: skip


def ended_early(planned: int, taken: Sequence[int]) -> tuple[str, ...]:
    """A sentence where runs ended before their `planned` steps.

    Parameters
    ----------
    planned : int
        `Course.steps`.
    taken : sequence of int
        Steps of each fold's run and, last, of the final one.
    """
    if min(taken) >= planned:
        return ()
    *parts, final = taken
    return (
        f"The machine became slower, so runs ended before their {planned} steps: those of the "
        f"folds after {listed(parts)}, the final one after {final}.",
    )
