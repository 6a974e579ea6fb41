"""One adaptation at work: inspect, choose, folds, final run, judge, record.

What takes time is kept in a work folder, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.adapt.choose import (
    AUTO,
    Costs,
    Course,
    choose_recipe,
    ended_early,
    plan_course,
)
from tlseg_bids.adapt.earlier import (
    Rival,
    against_earlier,
    earlier_model,
    find_rival,
    known_to_base,
)
from tlseg_bids.adapt.evidence import why_wrong
from tlseg_bids.adapt.inspect import Answer, Inspected, inspect
from tlseg_bids.adapt.judge import (
    Fold,
    Verdict,
    decide,
    folds,
    held_out_dice,
    mean,
    native_labels,
    program_labels,
    rehearsal_dice,
    rehearsal_set,
)
from tlseg_bids.adapt.labels import Collected
from tlseg_bids.adapt.matching import Refused
from tlseg_bids.adapt.material import Material, Stock
from tlseg_bids.adapt.page import write_page
from tlseg_bids.adapt.record import (
    CARD,
    NOT_KEPT,
    RECORD,
    Outcome,
    Tested,
    write_model,
    write_record,
)
from tlseg_bids.bids.atomic import atomic_folder, write_json
from tlseg_bids.bids.tables import read_json
from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, ScanError, UsageError
from tlseg_bids.flow import Job
from tlseg_bids.runner import Progress
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.train.finetune import FineTuning, blended
from tlseg_bids.train.finetune_run import measure_step, run
from tlseg_bids.zoo.assemble import stored_atlases
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.weights import load_weights

LOG = logging.getLogger(__name__)
FINAL = "final"
COURSE = "course.json"
LEAST_SHARE = 0.8
"""Of the folds' steps that the final run takes, however slow: their verdict is about such a run."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What an adaptation is about: the run, a job with the base per scan, labels, content key."""

    config: Config
    jobs: tuple[Job, ...]
    collected: Collected
    key: str


def check_adaptable(card: ModelCard, new_head: bool = False) -> None:
    """Refuse a model that adaptation cannot judge, or that it cannot give a head that it needs.

    Parameters
    ----------
    card : ModelCard
        The base.
    new_head : bool
        Whether the labels are in a protocol of their own.

    Raises
    ------
    UsageError
        If it sees several images at once, or has no head in the template's protocol; for a new
        head, if it is several networks, has a decoder for each head or answers of coarser levels.
    """
    why = "sees several images at once" if card.channels else ""
    if card.located_in not in card.heads:
        why = f"has no head in the template's protocol '{card.located_in}'"
    if why:
        raise UsageError(
            f"the model {why}, so it cannot be adapted here", card.path or card.name,
            "go on training it with tlseg-train and --start, or choose another --base",
        )  # fmt: skip
    why = _no_new_head(card.networks["segmenter"]) if new_head else ""
    if why:
        raise UsageError(
            f"the labels need a new head, and the model {why}, so it cannot be given one here",
            card.path or card.name,
            "go on training it with tlseg-train and --start, choose another --base, or give "
            "labels in the model's protocol",
        )  # fmt: skip


def _no_new_head(segmenter: Mapping[str, Any]) -> str:
    """Why a segmenter cannot be given a new head, by what it is built from; else empty."""
    design = segmenter.get("design", {})
    if segmenter["network"] == "members":
        return "is several networks"
    if design.get("decoders") == "own":
        return "has a decoder for each head"
    return "has answers of coarser levels" if design.get("supervised") else ""


class Work:
    """One adaptation.

    Parameters
    ----------
    asked : Asked
    answer : callable
        How the program labels a scan.
    progress : Progress
    kept : Path
        The work folder.
    """

    def __init__(self, asked: Asked, answer: Answer, progress: Progress, kept: Path) -> None:
        self.asked, self.answer, self.progress, self.kept = asked, answer, progress, kept
        self.config, self.card = asked.config, asked.jobs[0].card
        self.reading = asked.collected.reading
        check_adaptable(self.card, self.reading.new_head)
        self.jobs = {f"{job.scan.stem}_{job.scan.suffix}": job for job in asked.jobs}
        self.stock = Stock(self.card, self.reading)
        self.begun, self.carried_s = time.monotonic(), 0.0

    def adapt(self, folder: Path) -> dict[str, Any]:
        """Do everything and write `folder`; returns the record."""
        torch.set_num_threads(self.config.threads or self.config.nprocs)
        tensors = load_weights(self.card, self.config.offline)
        base = load_model(self.card, tensors, self.asked.jobs[0].device)
        self.progress.begin(len(self.asked.collected.usable), models=1)
        inspected, refused = self._inspect(base)
        how, reasons = choose_recipe(self.config.fine_tune or AUTO, inspected, self.reading)
        known = known_to_base(self.card, [one.labelled for one in inspected])
        for sentence in known:
            LOG.warning("%s", sentence)
        material = self.stock.whole(how, inspected, base)
        course = self._course(material)
        earlier = earlier_model(folder)
        tested, verdict, child, curves = self._train(material, course, earlier)
        steps = [int(rows[-1][0]) for rows in curves.values()]
        reasons += (*known, *course.reasons, *ended_early(course.steps, steps))
        outcome = Outcome(
            self.config.site, self.asked.key, self.card, self.reading, how,
            tuple(one.labelled for one in inspected), refused, self.asked.collected.unlabelled,
            reasons, tested, verdict, steps[-1],
            self.carried_s + time.monotonic() - self.begun, self.config.random_seed, curves,
            tuple(protocol.name for protocol in material.model.heads),
            self.stock.segmenter_options(material.model), earlier,
        )  # fmt: skip
        taken = {**tensors, **stored_atlases(material.model.priors)}
        target = self._write(folder, outcome, taken, child)
        self.progress.finish(self.config.site, "done", verdict.reason)
        return read_json(target / RECORD)[0]

    def _write(
        self, folder: Path, outcome: Outcome, base: dict[str, Tensor], child: dict[str, Tensor]
    ) -> Path:
        """Put the model, or why there is none, in its place at once; returns the folder."""
        kept = outcome.verdict.kept
        target = folder / NOT_KEPT if not kept and (folder / CARD).is_file() else folder
        with atomic_folder(target) as new:
            files = [write_page(new, outcome)]
            if kept:
                card = write_model(new, outcome, base, child)
                files += [card.path, new / card.weights.file, *card.own_tables.values()]
            write_record(new, outcome, files)
        return target

    def _inspect(self, base: Model) -> tuple[list[Inspected], tuple[Refused, ...]]:
        """Label every scan with the base, and leave out those whose labels are not theirs."""
        found, refused = [], list(self.asked.collected.refused)
        for one in self.asked.collected.usable:
            self.progress.step(one.name, "look", 1, 1)
            try:
                path = self.kept / f"{one.name}.npz"
                found.append(
                    inspect(one, self.jobs[one.name], base, self.reading, self.answer, path)
                )
            except ScanError as error:
                refused.append(Refused(one.name, error.what, error.hint))
                self.progress.finish(one.name, "failed", f"{error.what} – {error.hint}")
            else:
                note = f"Dice with the base {found[-1].evidence.agreement:.2f}"
                self.progress.finish(one.name, "done", note)
        kept = []
        for one in found:
            others = [other.evidence for other in found if other is not one]
            why = why_wrong(one.labelled.file.name, one.evidence, others)
            if why is None:
                kept.append(one)
            else:
                refused.append(Refused(one.name, *why))
                LOG.warning("%s is left out: %s – %s", one.name, *why)
        if not kept:
            raise DataError(
                f"no labelled scan can be used; {refused[0].name}: {refused[0].what}",
                f"--labels {self.config.labels_dir}", refused[0].hint,
            )  # fmt: skip
        return kept, tuple(refused)

    def _course(self, material: Material) -> Course:
        """Folds and steps; what an interrupted run had decided holds."""
        stored, problem = read_json(self.kept / COURSE)
        if not problem and stored.get("Recipe") == material.how.name:
            return Course(
                stored["Folds"], stored["Steps"], stored["LimitSeconds"], tuple(stored["Reasons"])
            )
        subjects = [one.labelled.scan.subject for one in material.inspected]
        costs, minutes = self._costs(material), self.config.budget_minutes
        course = plan_course(material.how, subjects, costs, minutes)
        write_json(self.kept / COURSE, {
            "Recipe": material.how.name, "Folds": course.folds, "Steps": course.steps,
            "LimitSeconds": course.limit_s, "Reasons": course.reasons,
        })  # fmt: skip
        return course

    def _costs(self, material: Material) -> Costs:
        """What a step, a label and a synthesised head take here, and what the budget leaves."""
        step = measure_step(self._run(material, steps=1000))
        began = [time.monotonic()]
        self._labels(material.model, material.inspected[0])
        began.append(time.monotonic())
        parent = material.parent
        heads = rehearsal_set(material.maps[:1], parent.box_mm, parent.spacing_mm)
        rehearsal_dice(material.model, heads)
        began.append(time.monotonic())
        answer, head = np.diff(began).tolist()
        left = 60 * self.config.budget_minutes - (began[-1] - self.begun)
        return Costs(step, answer, head, left)

    def _train(
        self, material: Material, course: Course, earlier: ModelCard | None
    ) -> tuple[tuple[Tested, ...], Verdict, dict[str, Tensor], dict[str, list]]:
        """Folds, final run and judgement."""
        subjects = [one.labelled.scan.subject for one in material.inspected]
        parts = folds(subjects, course.folds)
        total, done, curves = (len(parts) + 1) * course.steps, 0, {}
        children, base, quick = [], [], {share: [] for share in material.how.shares}
        taken: list[int] = []
        seen = [self.stock.visible_to(material, fold) for fold in parts]
        for number, (fold, one) in enumerate(zip([*parts, None], [*seen, material], strict=True)):
            name = FINAL if fold is None else f"fold-{fold.name}"
            tuning = self._run(one, course.steps)
            report = self._reporter(number, len(parts), done, total)
            least = round(LEAST_SHARE * np.mean(taken)) if fold is None else 0
            begun = time.monotonic()
            child = run(tuning, self.kept / f"{name}.pt", report, course.limit_s, least)
            self.carried_s += max(0.0, tuning.seconds - (time.monotonic() - begun))
            taken.append(tuning.step)
            curves[name], done = tuning.curve, done + course.steps
            children.append(child)
            if fold is not None:
                self._judge_fold(one, fold, child, base, quick)
        rehearsal = self._rehearse(material, children[-1])
        verdict = decide(base, quick, rehearsal)
        share = verdict.judged
        rival = None
        if verdict.kept:
            rival = find_rival(earlier, self.asked.jobs[0], self.reading, self.answer)
        tested = [
            one
            for fold, child, there in zip(parts, children[:-1], seen, strict=True)
            for one in self._tested(there, fold, blended(there.parent.network, child, share), rival)
        ]
        verdict = against_earlier(verdict, earlier, tested)
        final = blended(material.parent.network, children[-1], share)
        return tuple(tested), verdict, final, curves

    def _run(self, material: Material, steps: int) -> FineTuning:
        return FineTuning(
            material.how, material.parent, material.samples, material.maps, steps,
            self.config.random_seed,
        )  # fmt: skip

    def _reporter(self, number: int, runs: int, done: int, total: int):
        """Says which run it is and how long the whole still takes."""
        begun = time.monotonic()
        name = "final run" if number == runs else f"fold {number + 1} of {runs}"
        first: list[int] = []

        def report(step: int, _: int) -> None:
            first.append(step) if not first else None
            rate = (time.monotonic() - begun) / max(step - first[0] + 1, 1)
            minutes = rate * (total - done - step) / 60
            left = f"{name}, {minutes:.0f} min left"
            self.progress.step(self.config.site, left, done + step, total)

        return report

    def _judge_fold(
        self, material: Material, fold: Fold, child: dict[str, Tensor], base: list[float],
        quick: dict[float, list[float]],
    ) -> None:  # fmt: skip
        """Add a fold's Dice of the parent and of the child at every share."""
        held = [material.inspected[i] for i in fold.held_out]
        base += [mean(held_out_dice(self._before(material, one), one, fold)) for one in held]
        for share, scores in quick.items():
            model = self.stock.child(material, blended(material.parent.network, child, share))
            scores += [mean(held_out_dice(self._labels(model, one), one, fold)) for one in held]

    def _labels(self, model: Model, one: Inspected) -> np.ndarray:
        """Channels of a scan as the program would label it with the model."""
        return program_labels(model, one, self.jobs[one.name], self.answer)

    def _before(self, material: Material, one: Inspected) -> np.ndarray:
        """Channels of a scan before the adaptation."""
        return native_labels(material.model, one) if self.reading.new_head else one.base

    def _rehearse(self, material: Material, child: dict[str, Tensor]) -> dict[float, float]:
        """Dice on the rehearsal set of the parent (0) and of the final child at every share."""
        parent = material.parent
        heads = rehearsal_set(material.maps, parent.box_mm, parent.spacing_mm)
        scores = {0.0: float(np.mean(rehearsal_dice(material.model, heads)))}
        for share in material.how.shares:
            model = self.stock.child(material, blended(parent.network, child, share))
            scores[share] = float(np.mean(rehearsal_dice(model, heads)))
        return scores

    def _tested(
        self, material: Material, fold: Fold, state: dict[str, Tensor], rival: Rival | None
    ) -> list[Tested]:
        """Dice before and after of what a fold held out, as the program would label it.

        Parts without a labelled structure have no Dice and are left out.
        """
        model, found = self.stock.child(material, state), []
        for i in fold.held_out:
            one = material.inspected[i]
            before = self._before(material, one)
            dice = held_out_dice(before, one, fold)
            if not dice:
                continue
            after = self._labels(model, one)
            found.append(Tested(
                one.labelled, f"{one.name} {fold.side}".strip(),
                dice, held_out_dice(after, one, fold), before, after,
                rival and rival.dice(one, self.jobs[one.name], fold),
            ))  # fmt: skip
        return found
