"""THE PROGRAM ON ONE PAGE: from a BIDS dataset to labelled brains and their reports."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
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
from tlseg_bids.errors import ScanError
from tlseg_bids.executors import choose_executor
from tlseg_bids.flow import Job, Outcome, Plan, Prediction, Prepared, Segmentation
from tlseg_bids.group import run_group
from tlseg_bids.plan import describe, make_plan
from tlseg_bids.plan.choice import outside
from tlseg_bids.postprocess import probability_maps, to_native
from tlseg_bids.postprocess.judgement import assess
from tlseg_bids.postprocess.quality import implausible
from tlseg_bids.preprocess.prepare import better_frame, find_template, prepare
from tlseg_bids.report.derivatives import all_failures
from tlseg_bids.report.methods import methods_text
from tlseg_bids.report.subject import write_subject_report
from tlseg_bids.resources import peak_memory_gib, restart_peak
from tlseg_bids.runner import Labour, Progress, Steps, Work, exit_code, run_jobs
from tlseg_bids.segment.model import Ask, Model, Models, locate, segment
from tlseg_bids.volume import Grid, Volume, load_scan, load_volume
from tlseg_bids.zoo.card import age_in_years
from tlseg_bids.zoo.registry import load_cards

Frame = tuple[Grid, np.ndarray]
LOG = logging.getLogger(__name__)
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
    outputs = Derivatives(config.out_dir, config.bids_dir, config.probabilities)
    outputs.write_root(cards, {c.protocol: c.protocol_of(c.protocol).table for c in cards})
    log = RunLog(config.out_dir)
    log.write_config(config)
    log.write_plan(plan)
    log.write_citation(methods_text(cards, __version__))
    subjects = {entry.scan.subject for entry in (*plan.jobs, *plan.skips)}
    if config.reports_only:
        report(config, subjects, ())
        return 0

    labour = Labour(config, log.run_id, workshop)
    outcomes = run_jobs(plan, labour, log, progress, choose_executor(config))
    unchanged = {o.scan.subject for o in outcomes if o.status == "reused"}
    unchanged -= {o.scan.subject for o in outcomes if o.status != "reused"}
    unchanged = {s for s in unchanged if (config.out_dir / f"sub-{s}.html").is_file()}
    report(config, subjects - unchanged, tuple(o for o in outcomes if o.status == "failed"))
    return exit_code(outcomes)


def group(config: Config) -> int:
    """Tables and a page of every labelled scan in the output folder, as in `participant`."""
    return run_group(config)


def workshop(config: Config) -> Work:
    """What a process that labels scans, on this machine or another, sets up once."""
    torch.set_num_threads(config.threads or config.nprocs)
    torch.manual_seed(config.random_seed)
    models = Models(config.offline)
    outputs = Derivatives(config.out_dir, config.bids_dir, config.probabilities)
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

    def answer(job: Job, model: Model) -> tuple[Prepared, Segmentation]:
        scan, _ = load_scan(job.scan.path)
        frame = find_template(scan, job.card.preprocess, locate(model), model.template)
        prepared, prediction = label(scan, job, model, frame)
        return prepared, to_native(prediction, scan, model.protocol)

    return adapt(config, answer, progress)


def run_job(
    job: Job, steps: Steps, models: Models, outputs: Derivatives, frames: dict[Any, Frame]
) -> Outcome:
    """One scan through the house: read, find the brain, label, back to its own grid, write."""
    restart_peak()
    with steps("read"):
        scan, odd = load_scan(job.scan.path)
        model = models.get(job.card, job.device)
    with steps("find"):
        frame = find_template(scan, job.card.preprocess, locate(model), model.template)
    with steps("label"):
        prepared, prediction = label(scan, job, model, frame)
    with steps("back"):
        segmentation = to_native(
            prediction, scan, model.protocol, job.card.calibration, prepared.skull_stripped
        )
        if reason := implausible(segmentation.qc):
            raise ScanError(reason, "", CHECK_SCAN)
        segmentation = assess(
            segmentation, scan, model.protocol, prepared.template_from_native,
            age_in_years(job.scan.age), (*odd, *prepared.warnings, *outside(job.warnings)),
        )  # fmt: skip
    with steps("write"):
        for number, space in enumerate(job.spaces):
            grid, there = template_frame(space.file, job, model, frames)
            matrix = np.linalg.inv(there) @ prepared.template_from_native
            wanted = Volume(scan.data, Grid(grid.shape, np.linalg.inv(matrix) @ grid.affine))
            outputs.write_space(job, number, to_native(prediction, wanted, model.protocol), matrix)
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
            every = probability_maps(prediction.probabilities, prediction.grid, scan.grid)
            maps = islice(every, 1, None)  # the background has no row in the table
        files = outputs.write_scan(job, segmentation, provenance, maps)
    return Outcome(job.scan, "done", files, dict(steps.seconds), peak_memory_gib())


def label(scan: Volume, job: Job, model: Model, frame: np.ndarray) -> tuple[Prepared, Prediction]:
    """Segment coarsely until the frame is right, then finely."""
    prepared = settle(scan, model, frame, job.scan.skull_stripped)
    mirror = model.card.strategy.get("mirror", False)
    return prepared, segment(model, prepared, Ask(mirror=mirror))


def settle(
    scan: Volume, model: Model, frame: np.ndarray, skull_stripped: bool | None
) -> Prepared:  # fmt: skip
    """Segment coarsely until the frame in which the brain lies does not move any more."""
    options = model.card.preprocess
    for _ in range(options["rounds"]):
        prepared = prepare(scan, options, frame, skull_stripped)
        prediction = segment(model, prepared, Ask(head=len(model.heads) - 1, fine=False))
        frame, distance_mm = better_frame(prediction, frame, model.template)
        if distance_mm < options["settled_mm"]:
            break
    else:
        unsettled = f"the brain's place still moved by {distance_mm:.1f} mm in the last pass"
        prepared = replace(prepared, warnings=(*prepared.warnings, unsettled))
    return prepared


def template_frame(file: Path, job: Job, model: Model, frames: dict[Any, Frame]) -> Frame:
    """Grid of a template, and where the model sees the brain in it; found once per model."""
    key = (job.card.weights.sha256, file)
    if key not in frames:
        template = load_volume(file)
        frame = find_template(template, job.card.preprocess, locate(model), model.template)
        settled = settle(template, model, frame, None)
        frames[key] = template.grid, settled.template_from_native
    return frames[key]


def report(config: Config, subjects: set[str], failed: tuple[Outcome, ...]) -> None:
    """Write the page of every subject named."""
    recorded = all_failures(config.out_dir)  # once: with many runs the logs are many
    for subject in sorted(subjects):
        path = write_subject_report(config.out_dir, subject, config.command, failed, recorded)
        LOG.info("report: %s", path)
