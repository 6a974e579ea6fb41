"""Jobs done by the workers of a Dask cluster: what comes back, and what is said when none can."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.datasets import config, made_up_job, make_dataset
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.cli.progress import Progress
from tlseg_bids.errors import DataError, NoInputError, OutputError, ScanError, UsageError
from tlseg_bids.executors import choose_executor
from tlseg_bids.executors import cluster as workers
from tlseg_bids.executors.cluster import connect, read_queue_file
from tlseg_bids.flow import Outcome, Plan
from tlseg_bids.runner import Labour, exit_code, in_threads, run_jobs

distributed = pytest.importorskip("distributed", reason="Dask is not installed (extra 'dask')")
pytestmark = pytest.mark.dask


def well(_):
    """Work that says who did it, on which device, with how many threads."""

    def work(job, steps):
        with steps("read"):
            pass
        return Outcome(job.scan, "done", (), {"pid": float(os.getpid())}, hint=job.device)

    return work


def failing(_):
    """Work that fails on the first scan."""

    def work(job, steps):  # noqa: ARG001
        if job.scan.subject == "01":
            raise ScanError("it is upside down", "", "turn it")
        return Outcome(job.scan, "done")

    return work


def upside_down(_):
    """Work that fails on every scan."""

    def work(job, steps):  # noqa: ARG001
        raise ScanError("it is upside down", "", "turn it")

    return work


def full(_):
    """Work that finds the disk full."""

    def work(job, steps):  # noqa: ARG001
        raise OutputError("no space left", "out", "free some")

    return work


def deadly(_):
    """Work that kills its worker at the first scan, whoever tries it."""

    def work(job, steps):  # noqa: ARG001
        if job.scan.subject == "01":
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(job.scan, "done")

    return work


HELD = ExitStack()
"""Locks of another run."""


def other_run_ends(_):
    """Work during which the other run ends, at the second scan."""

    def work(job, steps):  # noqa: ARG001
        if job.scan.subject == "02":
            HELD.close()
        return Outcome(job.scan, "done")

    return work


@pytest.fixture(scope="module")
def address():
    """A scheduler with one worker in this process."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def run(tmp_path, address):
    """Run three jobs with a kind of work on the cluster."""
    raw = make_dataset(tmp_path / "raw", [f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz" for n in (1, 2, 3)])
    log = RunLog(tmp_path / "out")
    found, _ = discover(config(raw))
    plan = Plan(tuple(replace(made_up_job(scan), device="auto") for scan in found))

    def run(prepare, where=address, **options):
        asked = replace(
            config(raw), out_dir=tmp_path / "out", executor="dask", dask=where,
            **{"device": "cpu", **options},
        )  # fmt: skip
        log.write_config(asked)
        labour = Labour(asked, log.run_id, prepare)
        return run_jobs(plan, labour, log.record, Progress(), choose_executor(asked))

    run.log, run.plan = log, plan
    return run


def test_the_default_is_this_process(tmp_path):
    assert choose_executor(config(tmp_path)) is in_threads


def test_outcomes_come_back_in_the_order_of_the_plan_and_are_recorded(run):
    outcomes = run(well)
    assert [o.scan.subject for o in outcomes] == ["01", "02", "03"]
    assert {o.status for o in outcomes} == {"done"}
    assert {o.hint for o in outcomes} == {"cpu"}, "the worker names its own device"
    rows = run.log.status_file.read_text().splitlines()
    assert len(rows) == 4


def test_a_failure_is_named_and_the_next_scan_is_done(run):
    outcomes = run(failing)
    assert [o.status for o in outcomes] == ["failed", "done", "done"]
    assert outcomes[0].error == "it is upside down"
    (crash,) = run.log.folder.glob("crash_*")
    assert "ScanError" in crash.read_text()


def test_after_the_first_failure_the_rest_can_be_left(run):
    outcomes = run(failing, stop_on_first_crash=True)
    assert outcomes[0].error == "it is upside down"
    assert "not tried" in {o.error for o in outcomes[1:]}


@pytest.fixture
def held(run):
    """Another run holds the first scan."""
    job = run.plan.jobs[0]
    HELD.enter_context(Derivatives(run.log.folder.parent, job.scan.bids_dir).lock(job))
    yield
    HELD.close()


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("stop", [False, True])
def test_a_scan_that_another_run_ends_meanwhile_is_waited_for(run, stop):
    outcomes = run(other_run_ends, stop_on_first_crash=stop)
    assert [(o.status, o.error) for o in outcomes] == [("done", "")] * 3


@pytest.mark.usefixtures("held")
def test_a_scan_that_another_run_holds_for_long_is_tried_again_later(run, monkeypatch):
    monkeypatch.setattr(workers, "LOCK_PATIENCE_S", 0.1)
    outcomes = run(well, stop_on_first_crash=True)
    assert [o.status for o in outcomes] == ["failed", "done", "done"]
    assert outcomes[0].error.startswith("locked: sub-01_T1w.nii.gz is being processed by another")
    assert exit_code(outcomes) == 75


@pytest.mark.usefixtures("held")
def test_a_scan_that_another_run_holds_is_left_after_the_first_failure(run):
    outcomes = run(upside_down, stop_on_first_crash=True)
    assert outcomes[0].error == "not tried"
    assert sorted(o.error for o in outcomes[1:]) == ["it is upside down", "not tried"]


def test_a_full_disk_ends_the_run(run):
    with pytest.raises(OutputError, match="no space left – out – free some"):
        run(full)


def test_a_worker_with_other_files_is_a_sentence(run):
    folder = run.plan.jobs[0].scan.bids_dir
    with pytest.raises(NoInputError, match=r"does not see .*nowhere – worker \d+ on .*same paths"):
        run(well, bids_dir=folder / "nowhere")


def test_a_worker_of_another_version_is_a_sentence(run):
    labour = Labour(config(run.plan.jobs[0].scan.bids_dir), "id", well)
    with pytest.raises(DataError, match=r"the worker has tlseg .* and the run is of 9\.9 – worker"):
        workers._begin(labour, "9.9")


def test_cuda_needs_workers_that_offer_a_gpu(run):
    with pytest.raises(UsageError, match=r"none of 1 Dask workers offers the resource GPU – --dev"):
        run(well, device="cuda")


def test_a_gpu_per_worker(run):
    """A worker with one GPU gets jobs that ask for one; the device itself is found on it."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=4, processes=False, protocol="tcp", dashboard_address=None,
        resources={"GPU": 1},
    ) as cluster:  # fmt: skip
        import torch

        if torch.cuda.is_available():
            assert {o.status for o in run(well, cluster.scheduler_address, device="cuda")} == {
                "done"
            }
            return
        with pytest.raises(UsageError, match=r"the device cuda is not there"):
            run(well, cluster.scheduler_address, device="cuda")


def test_a_scheduler_without_workers_is_a_sentence(run, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_S", 0.2)
    with (
        distributed.LocalCluster(
            n_workers=0, processes=False, protocol="tcp", dashboard_address=None
        ) as cluster,
        pytest.raises(UsageError, match=r"the Dask scheduler has no worker after 0 s – --dask"),
    ):
        run(well, cluster.scheduler_address)


def test_a_scan_that_kills_every_worker_fails_alone(run):
    dask = pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
    ):
        outcomes = run(deadly, cluster.scheduler_address)
    assert [o.status for o in outcomes] == ["failed", "done", "done"]
    assert outcomes[0].error == "every worker that tried it was lost"
    assert "more memory" in outcomes[0].hint


def test_no_scheduler_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("connection refused")

    monkeypatch.setattr(distributed, "Client", refuse)
    asked = replace(config(tmp_path), dask="tcp://nowhere:1")
    with pytest.raises(NoInputError, match=r"no Dask scheduler answers \(connection refused\) – -"):
        connect(asked, ExitStack())
    asked = replace(config(tmp_path), dask=str(tmp_path / "gone.json"))
    with pytest.raises(
        NoInputError, match=r"no such scheduler file – .*gone\.json – start `dask s"
    ):
        connect(asked, ExitStack())


def test_without_dask_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    asked = replace(config(tmp_path), dask="tcp://h:1")
    with pytest.raises(UsageError, match=r"Dask is not installed – --executor dask – pip install"):
        connect(asked, ExitStack())
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    file = tmp_path / "q.toml"
    file.write_text('cluster = "slurm"\n')
    with pytest.raises(
        UsageError, match=r"dask-jobqueue is not installed – --dask .*q\.toml – pip"
    ):
        workers.start_cluster(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster = ", "is not TOML"),
        ('cluster = "k8s"', "cluster = 'k8s' is not known – .* – it takes cluster \\(slurm, pbs"),
        ('cluster = "slurm"\nqueue = "x"', "unknown key 'queue' – .* – it takes"),
        ('cluster = "slurm"\njobs = 0', "jobs = 0, or options, is of the wrong kind"),
        ('cluster = "slurm"\noptions = 3', "or options, is of the wrong kind"),
    ],
)
def test_a_wrong_cluster_file_is_a_sentence(tmp_path, text, message):
    file = tmp_path / "q.toml"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_queue_file(file)


def test_a_missing_cluster_file_is_a_sentence(tmp_path):
    with pytest.raises(NoInputError, match=r"cannot be read \(No such file.* – correct the path"):
        read_queue_file(tmp_path / "gone.toml")


@pytest.mark.parametrize("cluster", sorted(workers.CLUSTERS))
def test_every_queue_gets_a_job_of_one_worker_that_labels_one_scan_at_a_time(
    tmp_path, monkeypatch, cluster
):
    dask_jobqueue = pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    kind = getattr(dask_jobqueue, workers.CLUSTERS[cluster])
    monkeypatch.setattr(kind, "scale", lambda self, jobs: setattr(self, "asked_jobs", jobs))
    file = tmp_path / "q.toml"
    disk = 'disk = "1GB"\n' if cluster == "htcondor" else ""
    file.write_text(
        f'cluster = "{cluster}"\njobs = 7\n[options]\ncores = 2\nmemory = "4GB"\n{disk}'
        'worker_extra_args = ["--resources", "GPU=1"]\n'
    )
    with workers.start_cluster(file) as started:
        script = started.job_script()
        assert started.asked_jobs == 7
    assert script.rindex("--nthreads 1") > script.find("--nthreads 2")
    assert "--resources GPU=1" in script


def test_a_queue_that_refuses_an_option_is_a_sentence(tmp_path):
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    file = tmp_path / "q.toml"
    file.write_text('cluster = "slurm"\n[options]\nnonsense = 1\ncores = 1\nmemory = "1GB"\n')
    with pytest.raises(DataError, match=r"dask-jobqueue refuses the options \(.*nonsense.*q\.toml"):
        workers.start_cluster(file)
