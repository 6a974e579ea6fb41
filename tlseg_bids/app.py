"""THE PROGRAM ON ONE PAGE: from a BIDS dataset to labelled brains and their reports."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlseg_bids import __version__
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.root import check_root, forget_replaced, hold_root
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.validate import validate
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.config import Config
from tlseg_bids.crew import Crew
from tlseg_bids.errors import LockedError, ScanError, no_memory
from tlseg_bids.executors import choose_executor
from tlseg_bids.flow import Job, Outcome, Plan, Prediction, Prepared, Segmentation
from tlseg_bids.placing import Frame, find, template_frame
from tlseg_bids.plan import describe, make_plan
from tlseg_bids.plan.choice import outside
from tlseg_bids.postprocess import probability_maps, to_native
from tlseg_bids.postprocess.judgement import assess
from tlseg_bids.postprocess.plausibility import judged_age_years
from tlseg_bids.postprocess.quality import implausible
from tlseg_bids.report.citation import citation
from tlseg_bids.report.methods import methods_text
from tlseg_bids.report.pages import Pages, check_reportable
from tlseg_bids.resources import (
    available_memory_gib,
    peak_memory_gib,
    restart_peak,
    reuse_freed_memory,
)
from tlseg_bids.runner import Labour, Progress, Steps, Work, exit_code, run_jobs
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import Model, Models
from tlseg_bids.volume import Grid, Volume, load_scan, load_volume
from tlseg_bids.zoo.evidence import skill
from tlseg_bids.zoo.registry import load_cards

LOG = logging.getLogger(__name__)
NO_ROOM = (
    "{} had not enough memory for this scan, which was labelled on the CPU: end other programs on "
    "the GPU, or give --device cpu"
)
NO_ROOM_BACK = (
    "{} had not enough memory to bring the labels of this scan to its own voxels, which was done "
    "on the CPU: end other programs on the GPU"
)
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
        check_root(config.out_dir, config.bids_dir)
        print(describe(plan), end="")
        return 0
    cards = tuple({job.card.name: job.card for job in plan.jobs}.values())
    if config.boilerplate_only:
        print(methods_text(cards, __version__))
        return 0
    subjects = sorted({entry.scan.subject for entry in (*plan.jobs, *plan.skips)})
    if config.reports_only:
        check_reportable(config.out_dir, subjects)
    config = share_out(config, plan)
    outputs = Derivatives(config.out_dir, config.bids_dir, config.probabilities)
    used = () if config.reports_only else cards
    outputs.write_root(used, {c.protocol: c.protocol_of(c.protocol).table for c in cards})
    log = RunLog(config.out_dir)
    log.write_config(config)
    log.write_plan(plan)
    pages = Pages(config.out_dir, config.command, [e.scan for e in (*plan.jobs, *plan.skips)])
    if config.reports_only:
        for subject in subjects:
            pages.write(subject)
        return 0
    with hold_root(config.out_dir):
        log.write_citation(citation(config.out_dir, cards, config.model_dirs))

    def record(outcome: Outcome, model: str) -> None:
        log.record(outcome, model)
        pages.ended(outcome)

    labour = Labour(config, log.run_id, workshop)
    outcomes = run_jobs(plan, labour, record, progress, choose_executor(config))
    if outcomes:
        with contextlib.suppress(LockedError), hold_root(config.out_dir):
            forget_replaced(config.out_dir, config.bids_dir, cards)
            log.write_citation(citation(config.out_dir, cards, config.model_dirs))
    return exit_code(outcomes)


def group(config: Config) -> int:
    """Tables and a page of every labelled scan in the output folder, as in `participant`."""
    from tlseg_bids.group import run_group

    return run_group(config)


def share_out(config: Config, plan: Plan) -> Config:
    """The run with CPUs for one scan; a Dask worker labels one scan at a time."""
    local = config.executor == "local"
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
    scan = load_volume(job.scan.path)
    prepared = find(scan, job, model)
    return prepared, to_native(finely(prepared, model), scan, model.protocol)


def run_job(
    job: Job, steps: Steps, models: Models, outputs: Derivatives, frames: dict[Any, Frame]
) -> Outcome:
    """One scan through the house: read, find the brain, label, back to its own grid, write."""
    restart_peak()
    with steps("read"):
        scan, odd = load_scan(job.scan.path)
    with models.turn(job.device):
        job, model, prepared, prediction = see(scan, job, steps, models)
        with steps("back"):
            job, prediction, segmentation = bring_back(scan, job, model, prepared, prediction)
        wanted = outputs.probabilities or job.precomputed
        precision = prediction.precision
        # Of what is written, the rest is made without the GPU, which is left to the next scan.
        prediction = prediction.on_cpu() if wanted or job.spaces else None
    with steps("back", more=True):
        if reason := implausible(segmentation.qc, skill(job.card)):
            raise ScanError(reason, "", CHECK_SCAN)
        segmentation = assess(
            segmentation, scan, model.protocol, prepared.template_from_native,
            judged_age_years(job.scan.age), (*odd, *prepared.warnings, *outside(job.warnings)),
            model.box_atlases.get(model.protocol.name),
        )  # fmt: skip
    with steps("write"):
        for number, space in enumerate(job.spaces):
            with models.turn(job.device):
                grid, there = template_frame(space.file, job, model, frames)
            matrix = np.linalg.inv(there) @ prepared.template_from_native
            target = Volume(scan.data, Grid(grid.shape, np.linalg.inv(matrix) @ grid.affine))
            found = to_native(prediction, target, model.protocol, crew=model.crew)
            outputs.write_space(job, number, found, matrix)
        provenance = {
            "skull_stripped": prepared.skull_stripped,
            "steps": list(prepared.steps),
            "scan_warnings": [*odd, *prepared.warnings],
            "precision": precision,
            "template_from_scan": prepared.template_from_native.round(6).tolist(),
            "seconds": dict(steps.seconds),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }
        maps = None
        if wanted:
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
    job = replace(_warned(job, NO_ROOM), device="cpu")
    return job, *_seen(scan, job, steps, models)


def bring_back(
    scan: Volume, job: Job, model: Model, prepared: Prepared, prediction: Prediction
) -> tuple[Job, Prediction, Segmentation]:
    """The labels on the scan's own grid; on the CPU if a GPU lacks memory for that.

    The prediction that is returned lies where it was read, and the job warns as in `see`.
    """
    how = scan, model.protocol, job.card.calibration, prepared.skull_stripped, model.crew
    try:
        return job, prediction, to_native(prediction, *how)
    except Exception as error:
        if job.device == "cpu" or not no_memory(error):
            raise
    torch.cuda.empty_cache()
    job = _warned(job, NO_ROOM_BACK)
    prediction = prediction.on_cpu()
    return job, prediction, to_native(prediction, *how)


def _warned(job: Job, sentence: str) -> Job:
    """The job with a warning that names its device, which is logged, too."""
    job = replace(job, warnings=(*job.warnings, sentence.format(job.device)))
    LOG.warning("%s: %s", job.scan.path.name, job.warnings[-1])
    return job


def _seen(
    scan: Volume, job: Job, steps: Steps, models: Models
) -> tuple[Model, Prepared, Prediction]:
    with steps("find"):
        model = models.get(job.card, job.device)
        prepared = find(scan, job, model)
    with steps("label"):
        return model, prepared, finely(prepared, model)


def finely(prepared: Prepared, model: Model) -> Prediction:
    """The model's last word, at its finest and as its card wants it."""
    mirror = model.card.strategy.get("mirror", False)
    return segment(model, prepared, Ask(model.head, mirror=mirror))
