"""Jobs in processes of their own: one that hangs, and one that the system kills."""

from __future__ import annotations

import os
import pickle
import signal
import time
from dataclasses import replace
from multiprocessing import Pipe, active_children
from pathlib import Path

import pytest

from tests.test_runner import Setting
from tlseg_bids import errors
from tlseg_bids.cli.progress import Progress
from tlseg_bids.cli.run import make_config
from tlseg_bids.config import Config
from tlseg_bids.errors import OutputError, ScanError, UsageError
from tlseg_bids.executors import choose_executor
from tlseg_bids.executors.processes import Slots, _Sent, in_processes
from tlseg_bids.flow import Outcome
from tlseg_bids.runner import Labour, in_threads, run_jobs


def hanging(config: Config):  # noqa: ARG001
    """Work that never ends on the first scan."""

    def work(job, steps):
        with steps("read"):
            if job.scan.subject == "01":
                time.sleep(600)
        return Outcome(job.scan, "done", (), dict(steps.seconds))

    return work


def killed(config: Config):  # noqa: ARG001
    """Work whose process the system kills on the first scan."""

    def work(job, steps):  # noqa: ARG001
        if job.scan.subject == "01":
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(job.scan, "done")

    return work


def full(config: Config):  # noqa: ARG001
    """Work that finds the disk full."""

    def work(job, steps):  # noqa: ARG001
        raise OutputError("no space left", "out", "free some")

    return work


class Steps(Progress):
    """Remembers the steps that were told."""

    def __init__(self) -> None:
        self.told = []

    def step(self, scan, name, number, of):
        self.told.append((scan, name, number, of))


def run(setting: Setting, prepare, minutes: float = 0.5):
    """Outcomes, and the steps that were told."""
    asked = replace(Config(setting.raw, setting.out, "participant"), scan_timeout_minutes=minutes)
    progress = Steps()
    labour = Labour(asked, setting.log.run_id, prepare)
    return run_jobs(setting.plan, labour, setting.log.record, progress, in_processes), progress.told


def test_a_scan_that_hangs_is_given_up_and_the_next_is_done(tmp_path):
    setting = Setting(tmp_path)
    outcomes, told = run(setting, hanging, 0.1)
    assert [o.status for o in outcomes] == ["failed", "done"]
    assert outcomes[0].error == "it took more than 0.1 minutes"
    assert outcomes[0].hint.startswith("raise --scan-timeout")
    assert "it took more than 0.1 minutes" in setting.crashes()[0]
    assert ("sub-01_T1w.nii.gz", "read", 1, 5) in told
    assert not list((setting.out / "logs" / "locks").glob("sub-02*"))


def test_a_scan_whose_process_is_killed_has_failed_and_the_next_is_done(tmp_path):
    setting = Setting(tmp_path)
    outcomes, _ = run(setting, killed)
    assert [o.status for o in outcomes] == ["failed", "done"]
    assert outcomes[0].error == "the process that labelled it was killed (signal 9)"
    assert "needs more memory" in outcomes[0].hint


def test_a_full_disk_ends_the_run(tmp_path):
    with pytest.raises(OutputError, match="no space left – out – free some"):
        run(Setting(tmp_path), full)


def test_the_option_chooses_processes(tmp_path):
    plain = Config(tmp_path, tmp_path, "participant")
    assert choose_executor(plain) is in_threads
    assert choose_executor(replace(plain, scan_timeout_minutes=5.0)) is in_processes
    values = {"bids_dir": tmp_path, "out_dir": tmp_path, "level": "participant",
              "scan_timeout_minutes": 5.0, "executor": "dask", "dask": "tcp://x:1"}  # fmt: skip
    with pytest.raises(UsageError, match="--scan-timeout is for this machine alone – .* – set the"):
        make_config(values)


def test_every_error_survives_the_way_between_processes():
    kinds = [kind for kind in vars(errors).values()
             if isinstance(kind, type) and issubclass(kind, errors.TlsegError)]  # fmt: skip
    for kind in kinds:
        assert str(pickle.loads(pickle.dumps(kind("a", "b", "c")))) == "a – b – c"  # noqa: S301


def failing(config: Config):  # noqa: ARG001
    """Work that fails on every scan."""

    def work(job, steps):  # noqa: ARG001
        raise ScanError("it is upside down", "", "turn it")

    return work


def test_after_a_failure_no_other_scan_is_tried_where_that_was_asked_for(tmp_path):
    setting = Setting(tmp_path)
    asked = replace(Config(setting.raw, setting.out, "participant"), scan_timeout_minutes=1.0,
                    stop_on_first_crash=True)  # fmt: skip
    labour = Labour(asked, setting.log.run_id, failing)
    outcomes = run_jobs(setting.plan, labour, setting.log.record, Steps(), in_processes)
    assert [o.error for o in outcomes] == ["it is upside down", "not tried"]


def labour_of(setting: Setting, prepare, at_once: int = 1) -> Labour:
    asked = Config(setting.raw, setting.out, "participant", nprocs=at_once, threads=1)
    return Labour(replace(asked, scan_timeout_minutes=1.0), setting.log.run_id, prepare)


def test_a_scan_that_is_stopped_is_no_failure_and_is_not_waited_for(tmp_path):
    """Ctrl-C goes to every process of a terminal; that of the run ends the others."""
    setting, progress = Setting(tmp_path), Steps()
    outcomes = in_processes(setting.plan.jobs, labour_of(setting, hanging, 2), progress)
    assert next(outcomes)[1].status == "done"
    while not progress.told:
        time.sleep(0.1)
    processes = active_children()
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert [process.is_alive() for process in processes] == [True, True]
    begun = time.monotonic()
    outcomes.close()
    assert time.monotonic() - begun < 10
    assert setting.crashes() == []


def test_a_process_whose_run_is_gone_ends_and_accuses_no_scan(tmp_path):
    setting = Setting(tmp_path)
    ours, theirs = Pipe()
    attempt = labour_of(setting, hanging).begin(_Sent(theirs))
    ours.close()
    with pytest.raises(SystemExit):
        attempt(setting.plan.jobs[0])
    assert setting.crashes() == []


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="open files are not counted here")
def test_processes_that_were_lost_leave_no_file_open(tmp_path):
    setting = Setting(tmp_path)
    labour = labour_of(setting, killed)
    slots, opened = Slots(labour, Steps()), []
    for _ in range(3):
        assert slots(setting.plan.jobs[0], 0.0).status == "failed"
        opened.append(len(list(Path("/dev/fd").iterdir())))
    assert opened[0] == opened[1] == opened[2]
