"""How long an adaptation runs, and what its folds may see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.test_adapt import PROTOCOL, SIDE, affine, head
from tlseg_bids.adapt.choose import (
    ENOUGH_STEPS,
    LEAST_STEPS,
    SECONDS_TO_WRITE,
    Costs,
    ended_early,
    plan_course,
)
from tlseg_bids.adapt.inspect import overlap
from tlseg_bids.adapt.judge import Fold, held_out, visible
from tlseg_bids.errors import UsageError
from tlseg_bids.train import finetune, finetune_run
from tlseg_bids.train.adaptation import Adaptation
from tlseg_bids.train.dataset import IGNORE, Sample
from tlseg_bids.train.draw import mirror_sample
from tlseg_bids.volume import Grid

PERSONS = ("a", "b", "c", "d")


def recipe(**values) -> Adaptation:
    return Adaptation("test", "for a test", **values)


def seen(channels: np.ndarray, base: np.ndarray, shift_mm: float = 0.0):
    """A scan that the base sees `shift_mm` further right than its labels lie."""
    frame = np.eye(4)
    frame[0, 3] = shift_mm
    labelled = SimpleNamespace(channels=channels, grid=Grid(channels.shape, affine()))
    return SimpleNamespace(
        labelled=labelled, base=base, prepared=SimpleNamespace(template_from_native=frame)
    )


@pytest.mark.parametrize(
    ("left", "folds"),
    [(10_000.0, 4), (5.5 * ENOUGH_STEPS, 4), (4.5 * ENOUGH_STEPS, 3), (60.0, 2)],
)
def test_there_are_as_many_folds_as_leave_enough_steps(left, folds):
    course = plan_course(recipe(max_steps=1000), PERSONS, Costs(1.0, 0.0, 0.0, left + 10), 1.0)
    assert course.folds == folds
    assert course.steps == min(int(left / (folds + 1)), 1000)


def test_what_is_asked_for_is_enough():
    how, costs = recipe(), Costs(3.0, 2.0, 0.5, 100.0)
    with pytest.raises(UsageError, match=r"2 minutes are too few.*--budget.*give \d+") as caught:
        plan_course(how, PERSONS, costs, 2.0)
    asked = int(caught.value.hint.split()[1])
    assert asked > 2
    enough = replace(costs, left=costs.left + 60 * (asked - 2))
    assert plan_course(how, PERSONS, enough, asked).steps >= LEAST_STEPS
    with pytest.raises(UsageError):
        plan_course(how, PERSONS, replace(costs, left=enough.left - 60), asked - 1)


def test_a_synthesised_head_is_not_taken_for_a_scan_that_is_labelled():
    """It is labelled on a coarse grid alone: 3 s where a scan took 40 s."""
    costs = Costs(1.0, 40.0, 3.0, 1500.0)
    course = plan_course(recipe(shares=(0.6, 0.8, 1.0)), PERSONS[:2], costs, 25.0)
    judging = 2 * 5 * costs.answer + 6 * 4 * costs.head
    assert course.steps == int((costs.left - judging - SECONDS_TO_WRITE) / 3) > 300


def test_a_recipe_of_hardly_any_steps_is_refused_for_what_it_is():
    with pytest.raises(UsageError, match=r"max_steps is 5.*recipe 'test'.*write 10 or more"):
        plan_course(recipe(max_steps=5), PERSONS, Costs(1.0, 1.0, 1.0, 1e5), 60.0)


def test_runs_that_took_all_their_steps_are_not_remarked_upon():
    assert ended_early(10, [10, 10, 10]) == ()


def test_both_stages_are_timed(monkeypatch):
    class Staged:
        how, step, steps = SimpleNamespace(scope="two-stage"), 0, 30

    asked = []

    def of_stage(tuning) -> float:
        asked.append(tuning.step)
        return 4.0 if tuning.step >= finetune.FIRST_STAGE * tuning.steps else 1.0

    monkeypatch.setattr(finetune_run, "_measure_stage", of_stage)
    assert finetune_run.measure_step(Staged()) == pytest.approx(3.0)
    assert asked == [0, 10]


def test_no_voxel_of_a_half_is_both_learned_from_and_judged():
    """The plane between the halves is the same, however the labels lie in the template."""
    channels = np.ones((SIDE,) * 3, np.uint8)
    one, fold = seen(channels, channels, shift_mm=6.0), Fold((0,), "left")
    sample = Sample(
        "one", "site", torch.from_numpy(channels), {}, affine(), np.arange(2), "a", PROTOCOL,
        affine(),
    )  # fmt: skip
    (shown,) = visible([sample], [one], fold)
    judged = held_out(one, fold)
    assert judged.any() and not judged.all()
    np.testing.assert_array_equal(shown.classes.numpy() == IGNORE, judged)


def test_a_new_head_starts_from_what_a_fold_may_see():
    base = head(0)
    labels = (base > 0).astype(np.uint8)
    everywhere, left = np.ones(base.shape, bool), np.zeros(base.shape, bool)
    left[: SIDE // 2] = True
    other = np.where(left, base, 7)
    expected = np.bincount(base[(labels > 0) & left]).argmax()
    assert overlap([seen(labels, other)], [left], 2)[1] == expected
    assert overlap([seen(labels, other)], [everywhere], 2)[1] == 7
    assert overlap([seen(labels, other)], [~left], 2)[1] == 7


def test_what_a_fold_hides_and_a_mirror_shows_stays_on_its_device():
    device = torch.device("meta")
    channels = np.ones((SIDE,) * 3, np.uint8)
    sample = Sample(
        "one", "site", torch.empty(channels.shape, dtype=torch.uint8, device=device), {},
        affine(), np.arange(len(PROTOCOL)), "a", PROTOCOL, affine(),
    )  # fmt: skip
    assert mirror_sample(sample).classes.device == device
    (shown,) = visible([sample], [seen(channels, channels)], Fold((0,), "left"))
    assert shown.classes.device == device
