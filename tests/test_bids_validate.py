"""The BIDS validator: on inputs, on what is written, and when it cannot be asked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cards import small_card
from tests.datasets import (
    SHAPE,
    config,
    made_up_job,
    made_up_segmentation,
    make_dataset,
    real_dataset,
    table,
    write_nifti,
)
from tlseg_bids.bids import validate as module
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.validate import find_validator, validate
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.errors import CannotCreateError, NotBidsError
from tlseg_bids.flow import Plan
from tlseg_bids.labels.protocol import load_protocol

needs_validator = pytest.mark.skipif(
    find_validator() is None, reason="bids-validator-deno is not installed"
)
TWO = ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
NAMES = (
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_T2w.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_task-x_acq-y_ce-gd_rec-z_run-1_echo-1_part-mag_chunk-2_T1w.nii",
    "sub-02/ses-2/anat/sub-02_ses-2_run-02_T2w.nii.gz",
)


def errors_in(folder: Path) -> list[str]:
    """Errors of the validator in a whole dataset, run as a user would."""
    done = subprocess.run(
        [find_validator(), str(folder), "--json"], capture_output=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]


@needs_validator
def test_a_sound_dataset_has_no_errors(tmp_path):
    people = table("participant_id|age", "sub-01|34", "sub-02|n/a")
    root = make_dataset(tmp_path / "raw", TWO, {"participants.tsv": people})
    assert validate(root, ["01", "02"]) == module.Validation()


@needs_validator
def test_only_the_selected_participants_are_looked_at(tmp_path):
    root = make_dataset(tmp_path / "raw", TWO)
    (root / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_bytes(b"broken")
    assert validate(root, ["01"]).findings == ()
    assert [f.file for f in validate(root, ["02"]).findings] == ["sub-02/anat/sub-02_T1w.nii.gz"]


@needs_validator
def test_a_participant_that_is_a_link_to_nowhere_is_not_looked_at(tmp_path):
    root = make_dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T1w.nii.gz"])
    (root / "sub-02").symlink_to("/not/mounted")
    assert validate(root, ["01"]) == module.Validation()


@needs_validator
def test_errors_of_scans_are_sentences_and_do_not_stop_the_run(tmp_path):
    root = make_dataset(tmp_path / "raw")
    anat = root / "sub-01" / "anat"
    write_nifti(anat / "sub-01_acq-4d_T1w.nii.gz", (*SHAPE, 2))
    (anat / "sub-01_acq-empty_T1w.nii.gz").touch()
    (anat / "sub-01_acq-annex_T1w.nii.gz").symlink_to(".git/annex/objects/x")
    (anat / "sub-01_T1.nii.gz").write_bytes((anat / "sub-01_T1w.nii.gz").read_bytes())
    (anat / "sub-01_t2.nii.gz").write_bytes((anat / "sub-01_T1w.nii.gz").read_bytes())
    found = {finding.code: str(finding) for finding in validate(root, ["01"]).findings}
    assert set(found) == {
        "T1W_FILE_WITH_TOO_MANY_DIMENSIONS", "EMPTY_FILE", "NIFTI_HEADER_UNREADABLE",
        "SYMLINK_BROKEN", "NOT_INCLUDED",
    }  # fmt: skip
    assert found["NOT_INCLUDED"].startswith("sub-01/anat/sub-01_T1.nii.gz: ")
    assert found["NOT_INCLUDED"].endswith(" [NOT_INCLUDED] (and in 1 more file)")
    assert found["T1W_FILE_WITH_TOO_MANY_DIMENSIONS"].startswith(
        "sub-01/anat/sub-01_acq-4d_T1w.nii.gz: "
    )
    assert "\n" not in "".join(found.values())


@needs_validator
def test_an_invalid_description_stops_the_run(tmp_path):
    root = make_dataset(tmp_path / "raw", texts={"dataset_description.json": {"Name": "x"}})
    with pytest.raises(NotBidsError) as error:
        validate(root, ["01"])
    assert " – BIDSVersion – " in error.value.what  # the rest is in the validator's words
    assert error.value.what.endswith(" [JSON_KEY_REQUIRED]")
    assert error.value.where == str(root / "dataset_description.json")
    assert error.value.hint == "mend it, or leave the check out with --skip-bids-validation"
    assert error.value.exit_code == 16


@needs_validator
def test_the_dataset_and_the_work_folder_are_left_as_they_were(tmp_path):
    root = make_dataset(tmp_path / "my raw", TWO, {".bidsignore": "x\n"})
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    validate(root, ["01"], tmp_path / "work")
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before
    assert list((tmp_path / "work").iterdir()) == []


def test_a_missing_validator_is_a_warning(tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "raw")
    monkeypatch.setattr(module, "find_validator", lambda: None)
    assert validate(root, ["01"]).warning == (
        "the dataset was not validated: bids-validator-deno is not installed "
        "(pip install bids-validator-deno)"
    )


@pytest.mark.parametrize(
    ("script", "warning"),
    [
        ("echo oh no >&2; exit 3", "ended with code 3: oh no"),
        ("exit 0", "ended with code 0: no output"),
        ("echo '{}'", "ended with code 0: {}"),
        ("""echo '{"issues": {"issues": 3}}'""",
         """ended with code 0: {"issues": {"issues": 3}}"""),
        ("sleep 30", "did not end within 0.2 seconds"),
    ],
)  # fmt: skip
def test_a_validator_that_fails_is_a_warning(tmp_path, monkeypatch, script, warning):
    root = make_dataset(tmp_path / "raw")
    program = tmp_path / "validator"
    program.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "find_validator", lambda: str(program))
    if "sleep" in script:
        monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    result = validate(root, ["01"])
    assert result.warning == f"the dataset was not validated: the validator {warning}"
    assert result.findings == ()


def test_a_validator_that_cannot_be_started_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_validator", lambda: str(tmp_path))
    root = make_dataset(tmp_path / "raw")
    assert validate(root, ["01"]).warning == (
        "the dataset was not validated: the validator cannot be started (Permission denied)"
    )


def test_a_work_folder_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_validator", lambda: "validator")
    root = make_dataset(tmp_path / "raw")
    work = root / "README.md" / "work"
    with pytest.raises(CannotCreateError) as error:
        validate(root, ["01"], work)
    assert str(error.value) == (
        f"the folder for validation cannot be made (Not a directory) – {work} – choose another "
        "--work-dir, or leave the check out with --skip-bids-validation"
    )


@needs_validator
@pytest.mark.parametrize("where", ["out", "raw/derivatives/tlseg", "my results (ü)"])
def test_what_is_written_is_valid(tmp_path, where):
    root = make_dataset(tmp_path / "raw", NAMES, {"T1w.json": {"EchoTime": 0.003}})
    assert errors_in(root) == []
    out = Derivatives(tmp_path / where, root, probabilities=True)
    jobs = [made_up_job(scan) for scan in discover(config(root))[0]]
    assert len(jobs) == len(NAMES)
    log = RunLog(out.out_dir)
    log.write_plan(Plan(tuple(jobs)))
    log.write_citation("# Methods\n")
    out.write_root([small_card()], {"aseg": load_protocol("aseg").table})
    for job in jobs:
        segmentation = made_up_segmentation(job.scan)
        maps = [segmentation.confidence / 255] * (1 + len(segmentation.volumes))
        with out.lock(job):
            out.write_scan(job, segmentation, {"seconds": {"read": 1.0}}, maps)
        paths = out.paths(job)
        paths.report.write_text("<html>")
        paths.figures.mkdir(parents=True, exist_ok=True)
        (paths.figures / "a.svg").write_text("<svg/>")
    (out.out_dir / "group_volumes.tsv").write_text("a\tb\n")
    (out.out_dir / "models" / "mine").mkdir(parents=True)
    (out.out_dir / "models" / "mine" / "card.toml").write_text("x = 1\n")
    assert errors_in(out.out_dir) == []
    assert errors_in(root) == []


@pytest.mark.data
@needs_validator
@pytest.mark.parametrize("name", ["malc", "infant", "ms", "ages", "heads"])
def test_real_datasets_are_valid(name):
    root = real_dataset(name)
    subjects = {scan.subject for scan in discover(config(root, Path("/nowhere")))[0]}
    assert validate(root, subjects) == module.Validation()
