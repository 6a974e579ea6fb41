"""THE PROGRAM ON ONE PAGE: from a BIDS dataset to labelled brains and their reports."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlseg_bids import __version__
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.validate import validate
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.config import Config
from tlseg_bids.crew import Crew
from tlseg_bids.errors import ScanError, no_memory
from tlseg_bids.executors import choose_executor
from tlseg_bids.flow import Job, Outcome, Plan, Prediction, Prepared, Segmentation
from tlseg_bids.plan import describe, make_plan
from tlseg_bids.plan.choice import outside
from tlseg_bids.postprocess import probability_maps, to_native
from tlseg_bids.postprocess.judgement import assess
from tlseg_bids.postprocess.plausibility import judged_age_years, turned_degrees
from tlseg_bids.postprocess.quality import HOPEFUL_DICE, SURE_DICE, expected_dice, implausible
from tlseg_bids.preprocess.brain import looks_skull_stripped
from tlseg_bids.preprocess.prepare import better_frame, find_template, prepare
from tlseg_bids.preprocess.register import TURNS, between, displacement_mm
from tlseg_bids.report.methods import methods_text
from tlseg_bids.report.pages import Pages
from tlseg_bids.resources import (
    available_memory_gib,
    peak_memory_gib,
    restart_peak,
    reuse_freed_memory,
)
from tlseg_bids.runner import Labour, Progress, Steps, Work, exit_code, run_jobs
from tlseg_bids.segment.model import Ask, Model, Models, segment
from tlseg_bids.segment.place import locate, survey
from tlseg_bids.volume import Grid, Volume, load_scan, load_volume
from tlseg_bids.zoo.assemble import SETTLER
from tlseg_bids.zoo.card_file import digest
from tlseg_bids.zoo.evidence import skill
from tlseg_bids.zoo.registry import load_cards

Frame = tuple[Grid, np.ndarray]
LOG = logging.getLogger(__name__)
NEAR = 3.0
"""A last step may lead so many times farther than `settled_mm`: the next is a quarter as long."""
TURNED_DEGREES = 60.0
TURNED = (
    "by the header the head is turned by {:.0f}° from upright: the header is probably wrong, and "
    "if it mirrors instead of turning, left and right are exchanged in the labels; "
    "convert the scan from DICOM again"
)
NO_ROOM = (
    "{} had not enough memory for this scan, which was labelled on the CPU: end other programs on "
    "the GPU, or give --device cpu"
)
APART_MM = 4.0
"""T1w and T2w of twelve infants, aligned to one grid, are seen 0.6 to 1.8 mm apart."""
APART = (
    "the brain in {}, which is shown to the model with this scan, lies {:.0f} mm from here: the "
    "labels fit at most one of the two; align the images, or choose a model of one image with "
    "--model"
)
NOT_SEEN = "{}, shown with this scan: {}; mend it, or choose a model of one image with --model"
CHECK_SCAN = "check that the scan shows a whole brain and that its header's orientation is right"


def participant(config: Config, progress: Progress) -> int:
    """Label every selected scan and report on every subject.

    Returns
    -------
    int
        Exit code: 0 all done, 1 a scan failed, 75 the only failures are scans that another run
        is processing.
    """
    plan = decide(config)
    if config.dry_run:
        print(describe(plan), end="")
        return 0
    cards = tuple({job.card.name: job.card for job in plan.jobs}.values())
    if config.boilerplate_only:
        print(methods_text(cards, __version__))
        return 0
    config = share_out(config, plan)
    outputs = Derivatives(config.out_dir, config.bids_dir, config.probabilities)
    used = () if config.reports_only else cards
    outputs.write_root(used, {c.protocol: c.protocol_of(c.protocol).table for c in cards})
    log = RunLog(config.out_dir)
    log.write_config(config)
    log.write_plan(plan)
    pages = Pages(config.out_dir, config.command, [e.scan for e in (*plan.jobs, *plan.skips)])
    if config.reports_only:
        for subject in sorted({entry.scan.subject for entry in (*plan.jobs, *plan.skips)}):
            pages.write(subject)
        return 0
    log.write_citation(methods_text(cards, __version__))

    def record(outcome: Outcome, model: str) -> None:
        log.record(outcome, model)
        pages.ended(outcome)

    labour = Labour(config, log.run_id, workshop)
    outcomes = run_jobs(plan, labour, record, progress, choose_executor(config))
    return exit_code(outcomes)


def group(config: Config) -> int:
    """Tables and a page of every labelled scan in the output folder, as in `participant`."""
    from tlseg_bids.group import run_group

    return run_group(config)


def share_out(config: Config, plan: Plan) -> Config:
    """The run with CPUs for one scan; a GPU and a Dask worker label one scan at a time."""
    local = config.executor == "local" and all(job.device == "cpu" for job in plan.jobs)
    each_gib = max((job.memory_gib for job in plan.jobs), default=0.0)
    return config.shared_out(len(plan.jobs) if local else 1, each_gib, available_memory_gib())


def workshop(config: Config) -> Work:
    """What a process that labels scans, on this machine or another, sets up once."""
    reuse_freed_memory()
    torch.set_num_threads(1)  # a scan's threads share it out instead: see `Crew`
    torch.manual_seed(config.random_seed)
    models = Models(config.offline, Crew(config.threads or config.nprocs))
    outputs = Derivatives(config.out_dir, config.bids_dir, config.probabilities, config.command)
    frames: dict[tuple[str, Path], Frame] = {}

    def work(job: Job, steps: Steps) -> Outcome:
        return run_job(job, steps, models, outputs, frames)

    return work


def decide(config: Config) -> Plan:
    """Scan × cards → jobs and skips, each with its reason; only headers are read."""
    scans, unusable = discover(config)
    if config.validate and not config.dry_run:
        said = validate(config.bids_dir, {scan.subject for scan in scans}, config.work_dir)
        for line in filter(None, (said.warning, *map(str, said.findings))):
            LOG.warning("BIDS validator: %s", line)
    cards = load_cards(config.model_dirs, config.out_dir)
    return make_plan(scans, unusable, cards, config, __version__)


def fine_tune(config: Config, progress: Progress) -> int:
    """Adapt a model to labelled scans, and keep it where it is better; returns the exit code."""
    from tlseg_bids.adapt.site import fine_tune as adapt

    reuse_freed_memory()
    return adapt(config, answer, progress)


def answer(job: Job, model: Model) -> tuple[Prepared, Segmentation]:
    """A scan as the model saw it, and its labels on its own grid; nothing is written."""
    scan, _ = load_scan(job.scan.path)
    prepared = find(scan, job, model)
    return prepared, to_native(finely(prepared, model), scan, model.protocol)


def run_job(
    job: Job, steps: Steps, models: Models, outputs: Derivatives, frames: dict[Any, Frame]
) -> Outcome:
    """One scan through the house: read, find the brain, label, back to its own grid, write."""
    restart_peak()
    with steps("read"):
        scan, odd = load_scan(job.scan.path)
    job, model, prepared, prediction = see(scan, job, steps, models)
    with steps("back"):
        segmentation = to_native(
            prediction, scan, model.protocol, job.card.calibration, prepared.skull_stripped,
            model.crew,
        )  # fmt: skip
        if reason := implausible(segmentation.qc, skill(job.card)):
            raise ScanError(reason, "", CHECK_SCAN)
        segmentation = assess(
            segmentation, scan, model.protocol, prepared.template_from_native,
            judged_age_years(job.scan.age), (*odd, *prepared.warnings, *outside(job.warnings)),
            model.box_atlases.get(model.protocol.name),
        )  # fmt: skip
    with steps("write"):
        for number, space in enumerate(job.spaces):
            grid, there = template_frame(space.file, job, model, frames)
            matrix = np.linalg.inv(there) @ prepared.template_from_native
            wanted = Volume(scan.data, Grid(grid.shape, np.linalg.inv(matrix) @ grid.affine))
            found = to_native(prediction, wanted, model.protocol, crew=model.crew)
            outputs.write_space(job, number, found, matrix)
        provenance = {
            "skull_stripped": prepared.skull_stripped,
            "steps": list(prepared.steps),
            "scan_warnings": [*odd, *prepared.warnings],
            "precision": str(model.precision).removeprefix("torch."),
            "template_from_scan": prepared.template_from_native.round(6).tolist(),
            "seconds": dict(steps.seconds),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }
        maps = None
        if outputs.probabilities or job.precomputed:
            maps = probability_maps(prediction.probabilities, prediction.grid, scan.grid)
        files = outputs.write_scan(job, segmentation, provenance, maps)
    return Outcome(job.scan, "done", files, dict(steps.seconds), peak_memory_gib())


def see(
    scan: Volume, job: Job, steps: Steps, models: Models
) -> tuple[Job, Model, Prepared, Prediction]:
    """Find the brain and label it on the job's device; on the CPU if a GPU lacks memory.

    Smaller windows would need less memory, but they spoil the labels (docs/speed.md). The job that
    is returned names the device that was used, and warns where it is another one.
    """
    try:
        return job, *_seen(scan, job, steps, models)
    except Exception as error:
        if job.device == "cpu" or not no_memory(error):
            raise
    torch.cuda.empty_cache()
    job = replace(job, device="cpu", warnings=(*job.warnings, NO_ROOM.format(job.device)))
    LOG.warning("%s: %s", job.scan.path.name, job.warnings[-1])
    return job, *_seen(scan, job, steps, models)


def _seen(
    scan: Volume, job: Job, steps: Steps, models: Models
) -> tuple[Model, Prepared, Prediction]:
    with steps("find"):
        model = models.get(job.card, job.device)
        prepared = find(scan, job, model)
    with steps("label"):
        return model, prepared, finely(prepared, model)


def find(scan: Volume, job: Job, model: Model) -> Prepared:
    """The scan in the template's frame; where the header's directions show no brain, turned ones.

    Raises
    ------
    ScanError
        If no structures are found in any direction.
    """
    if job.scan.skull_stripped is None:
        job = replace(job, scan=replace(job.scan, skull_stripped=looks_skull_stripped(scan)))
    if model.placer is not None:
        return placed(scan, job, model)
    kept, failed = None, None
    for turn in TURNS:
        try:
            frame = find_template(
                scan, job.card.preprocess, locate(model), model.landmarks, turn, model.crew
            )
        except ScanError as error:
            failed = failed or error
            continue
        prepared, dice = settle(scan, job, model, frame, patient=turn is TURNS[0])
        kept = kept or prepared
        if dice >= SURE_DICE:
            kept = prepared
            break
    if kept is None:
        raise failed
    if (degrees := turned_degrees(kept.template_from_native)) > TURNED_DEGREES:
        kept = replace(kept, warnings=(*kept.warnings, TURNED.format(degrees)))
    return kept


def placed(scan: Volume, job: Job, model: Model) -> Prepared:
    """The scan where the model that finds the brain for this one sees it."""
    other = model.placer
    seen = find(scan, replace(job, card=other.card, companions=()), other)
    if seen_alike(model, other):
        return seen
    frame = between(other.template, model.template) @ seen.template_from_native
    shown = job.scan.skull_stripped, shown_together(scan, job), model.crew
    told = (*seen.warnings, *apart(job, other, seen))
    return replace(prepare(scan, job.card.preprocess, frame, *shown), warnings=told)


def apart(job: Job, other: Model, seen: Prepared) -> tuple[str, ...]:
    """A warning for each further image of a visit that shows the brain in another place."""
    told = []
    for image in job.companions:
        alone = replace(job, card=other.card, scan=image, companions=())
        try:
            there = find(load_scan(image.path)[0], alone, other).template_from_native
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
    scan: Volume, job: Job, model: Model, frame: np.ndarray, patient: bool = True
) -> tuple[Prepared, float]:
    """Segment coarsely in a frame, again where that shows that the frame was far off.

    Returns
    -------
    prepared : Prepared
        The scan in the last frame, to which a coarse answer need not have been made.
    dice : float
        Expected Dice of the last answer; 1 where the model has no head that could tell, or where
        its settler was sure. Without `patient` a first answer below `HOPEFUL_DICE` is the last.
    """
    options = job.card.preprocess
    shown = job.scan.skull_stripped, shown_together(scan, job), model.crew
    if (found := surveyed(scan, job, model, frame)) is not None:
        return prepare(scan, options, found, *shown), 1.0
    if model.frame_head is None or not options.get("rounds"):
        return prepare(scan, options, frame, *shown), 1.0
    for _ in range(options["rounds"]):
        prepared = prepare(scan, options, frame, *shown)
        prediction = segment(model, prepared, Ask(head=model.frame_head, fine=False))
        dice = expected_dice(prediction.probabilities)
        frame, distance_mm = better_frame(prediction, frame, model.landmarks, scan.grid)
        if distance_mm < options["settled_mm"] or not (patient or dice >= HOPEFUL_DICE):
            break
        if distance_mm < NEAR * options["settled_mm"] and dice >= SURE_DICE:
            prepared = prepare(scan, options, frame, *shown)
            break
    else:
        unsettled = f"the brain's place still moved by {distance_mm:.1f} mm in the last pass"
        prepared = replace(prepared, warnings=(*prepared.warnings, unsettled))
    return prepared, dice


def surveyed(scan: Volume, job: Job, model: Model, frame: np.ndarray) -> np.ndarray | None:
    """The frame in which the card's settler comes to rest.

    None where the card has none, where it is not sure of what it sees, does not come to rest or
    rests far from `frame`, as it does on a head that is upside down: then the segmenter has to
    look.
    """
    options = job.card.preprocess
    if SETTLER not in model.networks:
        return None
    coarse = {key: value for key, value in options.items() if key != "standard"}
    coarse |= options[SETTLER]
    sure = options[SETTLER].get("sure_dice", SURE_DICE)
    near_mm = options[SETTLER].get("near_mm", math.inf)
    found = frame
    for _ in range(options["rounds"]):
        seen = prepare(scan, coarse, found, job.scan.skull_stripped, crew=model.crew)
        prediction = survey(model, seen)
        found, distance_mm = better_frame(prediction, found, model.landmarks, scan.grid)
        if distance_mm < options["settled_mm"]:
            near = displacement_mm(frame, found, model.template) < near_mm
            return found if near and expected_dice(prediction.probabilities) >= sure else None
    return None


def finely(prepared: Prepared, model: Model) -> Prediction:
    """The model's last word, at its finest and as its card wants it."""
    return segment(model, prepared, Ask(mirror=model.card.strategy.get("mirror", False)))


def shown_together(scan: Volume, job: Job) -> tuple[Volume, ...]:
    """The images that the card sees as channels, in its order; none for a card of one channel."""
    others = {other.suffix: other.path for other in job.companions}
    return tuple(
        scan if suffix == job.scan.suffix else load_scan(others[suffix])[0]
        for suffix in job.card.channels
    )


def template_frame(file: Path, job: Job, model: Model, frames: dict[Any, Frame]) -> Frame:
    """Grid of a template, and where the model sees the brain in it; found once per model."""
    key = (digest(job.card), file)
    if key not in frames and (other := model.placer) is not None:
        grid, there = template_frame(file, replace(job, card=other.card), other, frames)
        frames[key] = grid, between(other.template, model.template) @ there
    if key not in frames:
        template, alone = load_volume(file), replace(job.scan, skull_stripped=None)
        look = job.card.preprocess, locate(model), model.landmarks
        frame = find_template(template, *look, crew=model.crew)
        prepared, _ = settle(template, replace(job, scan=alone), model, frame)
        frames[key] = template.grid, prepared.template_from_native
    return frames[key]
