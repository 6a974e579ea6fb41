"""Where the brain lies in a scan: the template's frame, as a model and its placer find it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from tlseg_bids.errors import ScanError
from tlseg_bids.flow import Job, Prepared
from tlseg_bids.postprocess.plausibility import turned_degrees
from tlseg_bids.postprocess.quality import CLEAR_DICE, HOPEFUL_DICE, SURE_DICE, expected_dice
from tlseg_bids.preprocess.brain import looks_skull_stripped
from tlseg_bids.preprocess.geometry import thinned
from tlseg_bids.preprocess.prepare import better_frame, looks, prepare
from tlseg_bids.preprocess.register import QUARTER_TURNS, TURNS, between, displacement_mm
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import Model
from tlseg_bids.segment.place import locate, survey
from tlseg_bids.volume import Grid, Volume, load_volume
from tlseg_bids.zoo.assemble import SETTLER
from tlseg_bids.zoo.card_file import digest
from tlseg_bids.zoo.evidence import skill

Frame = tuple[Grid, np.ndarray]
NEAR = 3.0
"""A last step may lead so many times farther than `settled_mm`: the next is a quarter as long."""
TURNED_DEGREES = 60.0
TURNED = (
    "by the header the head is turned by {:.0f}° from upright: the header is probably wrong, and "
    "if it mirrors instead of turning, left and right are exchanged in the labels; "
    "convert the scan from DICOM again"
)
UNCLEAR = (
    "in no direction does the scan clearly show a brain (expected Dice {:.2f}; most brains reach "
    "0.75): the header's direction was followed if it shows anything, else the first that does; "
    "look at the labels, and if they lie elsewhere than the brain, mend the header or leave the "
    "scan out"
)
APART_MM = 4.0
"""T1w and T2w of twelve infants, aligned to one grid, are seen 0.6 to 1.8 mm apart."""
APART = (
    "the brain in {}, which is shown to the model with this scan, lies {:.0f} mm from here: the "
    "labels fit at most one of the two; align the images, or choose a model of one image with "
    "--model"
)
NOT_SEEN = "{}, shown with this scan: {}; mend it, or choose a model of one image with --model"


def find(scan: Volume, job: Job, model: Model) -> Prepared:
    """The scan in the template's frame; where the header's directions show no brain, turned ones.

    Raises
    ------
    ScanError
        If no structures are found in any direction.
    """
    tasks = [partial(_found, scan, job, model)]
    if job.scan.skull_stripped is None:
        tasks.append(partial(looks_skull_stripped, scan))
    prepared, *told = model.crew.map(lambda task: task(), tasks)
    return replace(prepared, skull_stripped=told[0] if told else job.scan.skull_stripped)


def _found(scan: Volume, job: Job, model: Model) -> Prepared:
    if model.placer is not None:
        return placed(scan, job, model)
    together = shown_together(scan, job)
    kept, turns = _by_settler(scan, job, model, together)
    kept = kept or _by_segmenter(scan, job, model, together, turns)
    if (degrees := turned_degrees(kept.template_from_native)) > TURNED_DEGREES:
        kept = replace(kept, warnings=(*kept.warnings, TURNED.format(degrees)))
    return kept


def _looks(scan: Volume, job: Job, model: Model, turn: np.ndarray) -> Iterator[np.ndarray]:
    """What the model's locator finds, look by look, where the first is turned."""
    found = locate(model), model.landmarks, turn, model.crew
    return looks(scan, job.card.preprocess, *found)


def _by_settler(
    scan: Volume, job: Job, model: Model, together: Sequence[Volume]
) -> tuple[Prepared | None, Sequence[np.ndarray]]:
    """The scan in the first direction in which the settler is sure of a brain, or None.

    A few surveys tell a brain from one that is turned, so more directions are tried than the
    segmenter could be asked about. Beside it, the directions to ask that about, where the settler
    is not sure: those in which it saw most of a brain, and the header's in any case. Where the
    locator finds nothing in any of them, `_by_segmenter` says so.
    """
    if SETTLER not in model.networks:
        return None, TURNS
    every = (*TURNS, *QUARTER_TURNS)
    seen = np.zeros(len(every))
    for number, turn in enumerate(every):
        with contextlib.suppress(ScanError):
            for frame in _looks(scan, job, model, turn):
                found, dice = surveyed(scan, job, model, frame)
                if found is not None:
                    return _shown(scan, job, model, found, together), TURNS
                seen[number] = max(seen[number], dice)
    best = np.argsort(-seen, kind="stable")[: len(TURNS)]
    if 0 not in best:
        best[-1] = 0
    return None, [every[number] for number in best]


def _by_segmenter(
    scan: Volume, job: Job, model: Model, together: Sequence[Volume], turns: Sequence[np.ndarray]
) -> Prepared:
    """The scan in the direction in which coarse labels look most like a brain."""
    tried: list[tuple[float, Prepared]] = []
    as_told: Prepared | None = None
    failed = None
    for turn in turns:
        upright = turn is TURNS[0]
        try:
            *_, frame = _looks(scan, job, model, turn)
            patient = upright or turn is turns[0]
            prepared, dice = coarsely(scan, job, model, frame, together, patient=patient)
        except ScanError as error:
            failed = failed or error
            continue
        tried.append((dice, prepared))
        as_told = prepared if upright else as_told
        if dice >= CLEAR_DICE:
            break
    if not tried:
        raise failed
    best, kept = max(tried, key=itemgetter(0))
    if best >= SURE_DICE:
        return kept
    kept = as_told or tried[0][1]
    if best < skill(job.card) * SURE_DICE:
        kept = replace(kept, warnings=(*kept.warnings, UNCLEAR.format(best)))
    return kept


def _shown(
    scan: Volume, job: Job, model: Model, frame: np.ndarray, together: Sequence[Volume]
) -> Prepared:
    """The scan, and what is seen with it, as the model sees them in a frame."""
    return prepare(scan, job.card.preprocess, frame, together, model.crew, model.brain)


def placed(scan: Volume, job: Job, model: Model) -> Prepared:
    """The scan where the model that finds the brain for this one sees it."""
    other = model.placer
    seen = _found(scan, replace(job, card=other.card, companions=()), other)
    if seen_alike(model, other):
        return seen
    frame = between(other.template, model.template) @ seen.template_from_native
    prepared = _shown(scan, job, model, frame, shown_together(scan, job))
    return replace(prepared, warnings=(*seen.warnings, *apart(job, other, seen)))


def apart(job: Job, other: Model, seen: Prepared) -> tuple[str, ...]:
    """A warning for each further image of a visit that shows the brain in another place."""
    told = []
    for image in job.companions:
        alone = replace(job, card=other.card, scan=image, companions=())
        try:
            there = _found(load_volume(image.path), alone, other).template_from_native
        except ScanError as error:
            told.append(NOT_SEEN.format(image.path.name, error.what))
            continue
        far_mm = displacement_mm(seen.template_from_native, there, other.template)
        if far_mm > APART_MM:
            told.append(APART.format(image.path.name, far_mm))
    return tuple(told)


def seen_alike(model: Model, other: Model) -> bool:
    """Whether two models see the same image of a scan: of one channel, on one grid."""
    asked = [
        {key: one.card.preprocess.get(key) for key in ("box_mm", "spacing_mm", "standard")}
        for one in (model, other)
    ]
    alone = not model.card.channels and not other.card.channels
    one_template = np.array_equal(model.template, other.template, equal_nan=True)
    return alone and one_template and asked[0] == asked[1]


def settle(
    scan: Volume, job: Job, model: Model, frames: Iterable[np.ndarray],
    together: Sequence[Volume] = (),
) -> tuple[Prepared, float]:  # fmt: skip
    """The scan where the settler comes to rest from the first frame from which it does.

    Where it does not from any, the segmenter looks in the last, as `coarsely` has it. Frames are
    taken one by one: a locator need not look again once the settler rests.

    Returns
    -------
    prepared : Prepared
        The scan in the last frame, to which a coarse answer need not have been made.
    dice : float
        Expected Dice of the last coarse answer; 1 where the settler was sure.
    """
    for frame in frames:
        found, _ = surveyed(scan, job, model, frame)
        if found is not None:
            return _shown(scan, job, model, found, together), 1.0
    return coarsely(scan, job, model, frame, together)


def coarsely(
    scan: Volume, job: Job, model: Model, frame: np.ndarray, together: Sequence[Volume] = (),
    *, patient: bool = True,
) -> tuple[Prepared, float]:  # fmt: skip
    """The scan in the frame that the segmenter's coarse labels settle.

    Segmented again where that shows that the frame was far off. `together` are the images that a
    card of several channels sees.

    Returns
    -------
    prepared : Prepared
        The scan in the last frame, to which a coarse answer need not have been made.
    dice : float
        Expected Dice of the last answer; 1 where the model has no head that could tell. Without
        `patient` a first answer below `HOPEFUL_DICE` is the last.
    """
    options = job.card.preprocess
    if model.frame_head is None or not options.get("rounds"):
        return _shown(scan, job, model, frame, together), 1.0
    for _ in range(options["rounds"]):
        prepared = _shown(scan, job, model, frame, together)
        prediction = segment(model, prepared, Ask(head=model.frame_head, fine=False))
        dice = expected_dice(prediction.probabilities)
        frame, distance_mm = better_frame(prediction, frame, model.landmarks, scan.grid)
        if distance_mm < options["settled_mm"] or not (patient or dice >= HOPEFUL_DICE):
            break
        if distance_mm < NEAR * options["settled_mm"] and dice >= SURE_DICE:
            prepared = _shown(scan, job, model, frame, together)
            break
    else:
        unsettled = f"the brain's place still moved by {distance_mm:.1f} mm in the last pass"
        prepared = replace(prepared, warnings=(*prepared.warnings, unsettled))
    return prepared, dice


def surveyed(
    scan: Volume, job: Job, model: Model, frame: np.ndarray
) -> tuple[np.ndarray | None, float]:
    """The frame in which the card's settler comes to rest, and the Dice that it expects there.

    None where the card has none, where it is not sure of what it sees, does not come to rest or
    rests far from `frame`, as it does on a head that is upside down: then it is shown the scan in
    other directions, or the segmenter looks.
    """
    options = job.card.preprocess
    if SETTLER not in model.networks:
        return None, 0.0
    coarse = {key: value for key, value in options.items() if key != "standard"}
    coarse |= options[SETTLER]
    sure = options[SETTLER].get("sure_dice", SURE_DICE)
    near_mm = options[SETTLER].get("near_mm", math.inf)
    thin, found = thinned(scan, coarse["spacing_mm"]), frame
    for _ in range(options["rounds"]):
        seen = prepare(thin, coarse, found, crew=model.crew)
        prediction = survey(model, seen)
        found, distance_mm = better_frame(prediction, found, model.landmarks, scan.grid)
        if distance_mm < options["settled_mm"]:
            break
    dice = expected_dice(prediction.probabilities)
    rests = distance_mm < options["settled_mm"] and dice >= sure
    near = displacement_mm(frame, found, model.template) < near_mm
    return found if rests and near else None, dice


def shown_together(scan: Volume, job: Job) -> tuple[Volume, ...]:
    """The images that the card sees as channels, in its order; none for a card of one channel."""
    others = {other.suffix: other.path for other in job.companions}
    return tuple(
        scan if suffix == job.scan.suffix else load_volume(others[suffix])
        for suffix in job.card.channels
    )


def template_frame(file: Path, job: Job, model: Model, frames: dict[Any, Frame]) -> Frame:
    """Grid of a template, and where the model sees the brain in it; found once per model."""
    key = (digest(job.card), file)
    if key not in frames and (other := model.placer) is not None:
        grid, there = template_frame(file, replace(job, card=other.card), other, frames)
        frames[key] = grid, between(other.template, model.template) @ there
    if key not in frames:
        template, look = load_volume(file), (job.card.preprocess, locate(model), model.landmarks)
        frames_seen = looks(template, *look, crew=model.crew)
        together = [template] * len(job.card.channels)  # it is shown as every image of a visit
        prepared, _ = settle(template, job, model, frames_seen, together)
        frames[key] = template.grid, prepared.template_from_native
    return frames[key]
