"""Jobs that go wrong in every way, beside jobs that go well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets import config, made_up_job, make_dataset
from tlseg_bids import app, runner
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.cli.progress import Progress
from tlseg_bids.errors import LockedError, OutputError, ScanError
from tlseg_bids.flow import Job, Outcome, Plan, Skip
from tlseg_bids.runner import Labour, Steps, exit_code, run_jobs


class Setting:
    """A dataset of two scans, the jobs for them and where their outcomes go."""

    def __init__(self, root: Path) -> None:
        scans = [f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz" for n in (1, 2)]
        self.raw = make_dataset(root / "raw", scans)
        self.out = root / "out"
        self.outputs = Derivatives(self.out, self.raw)
        self.log = RunLog(self.out)
        found, _ = discover(config(self.raw))
        jobs = [made_up_job(scan) for scan in found]
        self.plan = Plan(tuple(jobs))

    def run(self, work, **options) -> list[Outcome]:
        asked = replace(config(self.raw), out_dir=self.out, **options)
        labour = Labour(asked, self.log.run_id, lambda _: work)
        return run_jobs(self.plan, labour, self.log.record, Progress())

    def crashes(self) -> list[str]:
        return [path.read_text() for path in sorted((self.out / "logs").glob("crash_*"))]


@pytest.fixture
def setting(tmp_path) -> Setting:
    """Two scans to do."""
    return Setting(tmp_path)


def well(job: Job, steps: Steps) -> Outcome:
    """Work that does nothing and succeeds."""
    with steps("read"):
        pass
    return Outcome(job.scan, "done", (), dict(steps.seconds))


def raising(error: Exception):
    """Work that fails on the first scan alone."""

    def work(job: Job, steps: Steps) -> Outcome:
        if job.scan.subject == "01":
            with steps("label"):
                raise error
        return well(job, steps)

    return work


def test_all_is_well(setting):
    outcomes = setting.run(well)
    assert [o.status for o in outcomes] == ["done", "done"]
    assert outcomes[0].seconds == {"read": 0.0}
    assert exit_code(outcomes) == 0


@pytest.mark.parametrize(
    ("error", "what", "hint"),
    [
        (ScanError("it is upside down", "", "turn it"), "it is upside down", "turn it"),
        (MemoryError(), "not enough memory", "lower --nprocs"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            ),
            "not enough memory",
            "lower --nprocs",
        ),
        (ValueError("oops"), "ValueError: oops", "report it with logs/crash_"),
    ],
)
def test_a_failure_is_named_and_the_next_scan_is_done(setting, error, what, hint):
    outcomes = setting.run(raising(error))
    assert [o.status for o in outcomes] == ["failed", "done"]
    assert outcomes[0].error == what
    assert hint in outcomes[0].hint
    assert "label" in outcomes[0].seconds
    assert exit_code(outcomes) == 1
    assert type(error).__name__ in setting.crashes()[0]


def test_a_full_disk_ends_the_run(setting):
    with pytest.raises(OutputError, match="no space left"):
        setting.run(raising(OutputError("no space left", "out", "free some")))


def test_a_scan_that_another_run_holds_for_long_is_tried_again_later(setting, monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE_S", 0.1)
    with setting.outputs.lock(setting.plan.jobs[0]):
        outcomes = setting.run(well)
    assert [o.status for o in outcomes] == ["failed", "done"]
    assert outcomes[0].error.startswith("locked: ")
    assert exit_code(outcomes) == LockedError.exit_code == 75
    assert setting.crashes() == []


def test_a_scan_that_another_run_ends_meanwhile_is_waited_for(setting):
    held = setting.outputs.lock(setting.plan.jobs[0])
    held.__enter__()

    def other_run_ends(job, steps):
        if job.scan.subject == "02":
            held.__exit__(None, None, None)
        return well(job, steps)

    outcomes = setting.run(other_run_ends)
    assert [o.status for o in outcomes] == ["done", "done"]


def test_a_wanted_skip_is_no_failure(setting):
    scan = setting.plan.jobs[0].scan
    skips = (Skip(scan, "another run was taken", "--multi-run each", wanted=True),)
    setting.plan = Plan(setting.plan.jobs[1:], skips)
    outcomes = setting.run(well)
    assert [o.status for o in outcomes] == ["skipped", "done"]
    assert exit_code(outcomes) == 0
    setting.plan = Plan((), (replace(skips[0], wanted=False),))
    assert exit_code(setting.run(well)) == 1


def test_scans_stand_side_by_side_unless_they_share_a_worker(tmp_path, monkeypatch):
    plan = Setting(tmp_path).plan
    asked = config(tmp_path / "raw", nprocs=4)
    monkeypatch.setattr(app, "available_memory_gib", lambda: 64.0)
    assert app.share_out(asked, plan).threads == 2
    monkeypatch.setattr(app, "available_memory_gib", lambda: 1.5)
    assert app.share_out(asked, plan).threads == 4
    monkeypatch.setattr(app, "available_memory_gib", lambda: 64.0)
    assert app.share_out(replace(asked, executor="dask"), plan).threads == 4
    on_gpu = Plan(tuple(replace(job, device="cuda") for job in plan.jobs))
    assert app.share_out(asked, on_gpu).threads == 2
    assert app.share_out(asked, Plan(())).threads == 4
