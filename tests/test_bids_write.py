"""Derivatives: names, bytes, resuming, full disks, locks and logs."""

from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.cards import small_card
from tests.datasets import (
    OBLIQUE,
    SHAPE,
    config,
    made_up_job,
    made_up_segmentation,
    make_dataset,
    write_nifti,
)
from tlseg_bids import __version__
from tlseg_bids.bids.atomic import atomic, clean_cell, plain, write_text
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.lock import hold
from tlseg_bids.bids.metadata import sidecar_of
from tlseg_bids.bids.nifti import write_fractions, write_labels
from tlseg_bids.bids.root import forget_replaced
from tlseg_bids.bids.runlog import PLAN_COLUMNS, RunLog, new_run_id
from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.spaces import Space
from tlseg_bids.bids.validate import find_validator
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.cli.run import main
from tlseg_bids.errors import (
    CannotCreateError,
    LockedError,
    OutputError,
    ScanError,
    UsageError,
)
from tlseg_bids.flow import Outcome, Plan, Skip
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.report.derivatives import dataset_links, resolve
from tlseg_bids.report.display import load_display
from tlseg_bids.report.methods import methods_text
from tlseg_bids.zoo.calibration import Calibration

NAME = "sub-01_ses-a_acq-x_ce-gd_rec-y_run-01"
PROTOCOLS = {"aseg": load_protocol("aseg").table}


@pytest.fixture
def raw(tmp_path):
    return make_dataset(tmp_path / "raw", [f"sub-01/ses-a/anat/{NAME}_T1w.nii.gz"])


@pytest.fixture
def job(raw):
    (scan,), _ = discover(config(raw))
    return made_up_job(scan)


@pytest.fixture
def out(tmp_path, raw):
    return Derivatives(tmp_path / "out", raw)


def write(out, job, found=None, **options):
    found = found or made_up_segmentation(job.scan)
    return out.write_scan(job, found, {"peak_memory_gib": 1.5}, **options)


def probabilities(job):
    """A map of the background and one of every structure."""
    one = np.full(SHAPE, 0.25, np.float16)
    return (one for _ in range(1 + len(made_up_segmentation(job.scan).volumes)))


# Names -------------------------------------------------------------------------------------------


def test_the_files_of_a_scan_have_the_names_of_bids(out, job):
    out.probabilities = True
    files = write(out, job, probabilities=probabilities(job))
    space = f"sub-01/ses-a/anat/{NAME}_space-T1w"
    assert [path.relative_to(out.out_dir).as_posix() for path in files] == [
        f"{space}_seg-aseg_dseg.nii.gz",
        f"{space}_seg-aseg_dseg.json",
        f"{space}_seg-aseg_desc-volumes_dseg.tsv",
        f"{space}_seg-aseg_desc-volumes_dseg.json",
        f"{space}_desc-brain_mask.nii.gz",
        f"{space}_desc-brain_mask.json",
        f"{space}_seg-aseg_probseg.nii.gz",
        f"{space}_seg-aseg_probseg.json",
        f"{space}_seg-aseg_desc-uncertainty_probseg.nii.gz",
        f"{space}_seg-aseg_desc-uncertainty_probseg.json",
    ]
    assert sorted(path for path in out.out_dir.rglob("*") if path.is_file()) == sorted(files)


def test_a_t2w_lies_in_its_own_space_and_entities_in_the_order_of_the_standard(out, job):
    scan = dataclasses.replace(
        job.scan, suffix="T2w", entities={"sub": "01", "chunk": "2", "run": "1", "acq": "z"}
    )
    paths = out.paths(dataclasses.replace(job, scan=scan))
    name = "sub-01_acq-z_run-1_space-T2w_chunk-2_seg-aseg_dseg.nii.gz"
    assert paths.dseg == out.out_dir / "sub-01" / "anat" / name
    assert paths.report == out.out_dir / "sub-01.html"
    assert paths.figures == out.out_dir / "sub-01" / "figures"


@pytest.mark.parametrize(
    ("entities", "protocol", "what"),
    [
        ({"sub": "../../etc"}, "aseg", "'sub-../../etc' cannot stand in a file name"),
        ({"sub": "01", "acq": "a/b"}, "aseg", "'acq-a/b' cannot stand in a file name"),
        ({"sub": "01", "x/y": "1"}, "aseg", "'x/y-1' cannot stand in a file name"),
        ({"sub": "01"}, "../aseg", "'seg-../aseg' cannot stand in a file name"),
        ({"sub": ""}, "aseg", "'sub-' cannot stand in a file name"),
    ],
)
def test_no_name_leaves_the_output_folder(out, job, entities, protocol, what):
    scan = dataclasses.replace(job.scan, entities=entities)
    broken = dataclasses.replace(job, scan=scan, card=small_card(protocol=protocol))
    with pytest.raises(CannotCreateError) as error:
        out.paths(broken)
    assert str(error.value) == f"{what} – {job.scan.path} – rename the scan as BIDS asks"


# Content -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (2, 1), (4, 4)])
@pytest.mark.parametrize("name", ["a_T1w.nii.gz", "a_T1w.nii"])
def test_labels_lie_on_the_grid_of_the_scan(tmp_path, codes, name):
    scan = write_nifti(tmp_path / name, codes=codes)
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 61
    written = nib.load(write_labels(tmp_path / "out_dseg.nii.gz", labels, scan, 60))
    source = nib.load(scan)
    assert written.shape == SHAPE
    assert np.array_equal(written.affine, source.affine)
    for field in (
        "sform_code",
        "qform_code",
        "pixdim",
        "srow_x",
        "srow_z",
        "quatern_b",
        "qoffset_x",
    ):
        assert np.array_equal(written.header[field], source.header[field]), field
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    assert written.header.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), labels)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_big_endian_scan_with_a_fourth_axis_and_private_fields_gets_3d_labels(tmp_path, kind):
    header = kind.header_class(endianness=">")
    header["descrip"], header["aux_file"] = b"Jane Doe", b"jane.txt"
    image = kind(np.zeros((*SHAPE, 1), ">i2"), OBLIQUE, header)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, tmp_path / "a_T1w.nii.gz")
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    path = write_labels(tmp_path / "out.nii.gz", labels, tmp_path / "a_T1w.nii.gz", 300)
    written = nib.load(path)
    assert isinstance(written, kind)
    assert written.shape == SHAPE
    assert written.header.get_data_dtype() == np.int16
    assert np.array_equal(np.asarray(written.dataobj), labels)
    assert np.array_equal(written.affine, nib.load(tmp_path / "a_T1w.nii.gz").affine)
    assert b"Jane" not in gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("more", [(1,), (1, 1)])
def test_what_is_written_of_a_scan_with_further_axes_can_be_shown(out, job, more):
    write_nifti(job.scan.path, (*SHAPE, *more))
    out.probabilities = True
    files = write(out, job, probabilities=probabilities(job))
    shapes = {path.name: nib.load(path).shape for path in files if path.name.endswith(".nii.gz")}
    count = len(made_up_segmentation(job.scan).volumes)
    assert sorted(shapes.values()) == [SHAPE, SHAPE, SHAPE, (*SHAPE, count)]
    shown = load_display(out.paths(job).dseg, job.scan.path, load_protocol("aseg"))
    assert shown.channels.shape == shown.image.shape


def test_the_same_result_gives_the_same_bytes(out, job):
    first = {path: hashlib.sha256(path.read_bytes()).digest() for path in write(out, job)}
    time.sleep(1.1)
    second = {path: hashlib.sha256(path.read_bytes()).digest() for path in write(out, job)}
    assert first == second


def test_labels_that_do_not_fit_are_a_sentence(tmp_path):
    scan = write_nifti(tmp_path / "a_T1w.nii.gz")
    with pytest.raises(ScanError) as error:
        write_labels(tmp_path / "x.nii.gz", np.zeros((2, 3, 4), int), scan, 1)
    assert str(error.value) == (
        f"a result of shape (2, 3, 4) does not fit the scan's shape {SHAPE} – {scan} – "
        "report this as a defect"
    )
    with pytest.raises(ScanError) as error:
        write_labels(tmp_path / "x.nii.gz", np.full(SHAPE, 40_000), scan, 1)
    assert str(error.value) == (
        f"the labels 40000 to 40000 do not fit int16 – {scan} – use a protocol with labels below "
        "32768"
    )
    assert not (tmp_path / "x.nii.gz").exists()


def test_a_scan_that_vanished_is_a_sentence(tmp_path):
    with pytest.raises(ScanError) as error:
        write_labels(tmp_path / "x.nii.gz", np.zeros(SHAPE, int), tmp_path / "gone.nii.gz", 1)
    assert error.value.what.startswith("the scan cannot be read any more (")
    assert error.value.hint == "check the disk and start again"


def test_fractions_are_kept_to_one_part_in_255(tmp_path):
    scan = write_nifti(tmp_path / "a_T1w.nii.gz")
    maps = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    maps[0, 0, 0, 0] = np.nan
    path = write_fractions(tmp_path / "p.nii.gz", iter(maps), 3, scan)
    written = nib.load(path)
    assert written.shape == (*SHAPE, 3)
    assert np.abs(written.get_fdata() - np.moveaxis(np.nan_to_num(maps), 0, -1)).max() <= 0.5 / 254


@pytest.mark.parametrize("of_scan", [0, 2.3])
def test_the_spacing_of_the_fourth_axis_is_not_that_of_the_scan(tmp_path, of_scan):
    """A 3-D scan has 0 there, or its repetition time; a spacing of 0 is an error in ITK."""
    scan = write_nifti(tmp_path / "a_T1w.nii.gz")
    image = nib.load(scan)
    image.header["pixdim"][4] = of_scan
    nib.save(image, tmp_path / "b_T1w.nii.gz")
    maps = [np.zeros(SHAPE)] * 3
    path = write_fractions(tmp_path / "p.nii.gz", maps, 3, tmp_path / "b_T1w.nii.gz")
    zooms = nib.load(path).header.get_zooms()
    assert zooms == (*nib.load(scan).header.get_zooms(), 1)


@pytest.mark.parametrize(
    ("maps", "what"),
    [
        ([], "there are no probabilities to write"),
        ([np.zeros(SHAPE)] * 2, "2 probability maps came where 3 are needed"),
        (
            [np.zeros(SHAPE), np.zeros((1, 1, 1))],
            f"a result of shape (1, 1, 1) does not fit the scan's shape {SHAPE}",
        ),
    ],
)
def test_probabilities_that_do_not_fit_are_a_sentence(tmp_path, maps, what):
    scan = write_nifti(tmp_path / "a_T1w.nii.gz")
    with pytest.raises(ScanError) as error:
        write_fractions(tmp_path / "p.nii.gz", maps, 3, scan)
    assert str(error.value) == f"{what} – {scan} – report this as a defect"
    assert [path.name for path in tmp_path.iterdir()] == ["a_T1w.nii.gz"]


def test_the_uncertainty_is_the_entropy_of_all_labels_and_the_background(out, job):
    out.probabilities = True
    names = list(made_up_segmentation(job.scan).volumes["name"])
    number = 1 + len(names)
    background = np.zeros(SHAPE, np.float32)
    structures = np.zeros((len(names), *SHAPE), np.float32)
    structures[3] = 1  # sure
    background[0], structures[:, 0] = 1 / number, 1 / number  # all alike
    background[1], structures[3, 1] = 0.5, 0.5  # the edge of a structure
    structures[3, 2], structures[4, 2] = 0.5, 0.5  # between two structures
    background[3], structures[3, 3] = 1, 0  # sure that nothing is there
    write(out, job, probabilities=iter([background, *structures]))
    found = nib.load(out.paths(job).uncertainty).get_fdata()
    two = np.log(2) / np.log(number)
    for plane, expected in enumerate((1, two, two, 0, 0)):
        assert found[plane] == pytest.approx(expected, abs=1 / 255), plane
    maps = nib.load(out.paths(job).probseg).get_fdata()
    assert maps == pytest.approx(np.moveaxis(structures, 0, -1), abs=1 / 255)
    about = json.loads(out.paths(job).probseg.with_name(
        out.paths(job).probseg.name.replace(".nii.gz", ".json")
    ).read_text())  # fmt: skip
    assert about["LabelMap"] == names


def test_the_sources_are_all_scans_that_the_model_saw(out, job):
    beside = dataclasses.replace(job.scan, suffix="T2w", path=job.scan.path.with_name("x_T2w.nii"))
    paths = out.paths(job)
    for companions in ((beside,), ()):
        seen = dataclasses.replace(job, companions=companions)
        out.probabilities = bool(companions)
        write(out, seen, probabilities=probabilities(job) if companions else None)
        assert len(list(paths.dseg.parent.glob("*_probseg.*"))) == 4 * len(companions)
        assert out.finished(seen)
        for file in (paths.sidecar, sidecar_of(paths.mask), sidecar_of(paths.volumes)):
            sources = json.loads(file.read_text())["Sources"]
            assert sources == [scan.uri for scan in (job.scan, *companions)]
        assert json.loads(paths.sidecar.read_text())["SpatialReference"] == job.scan.uri


def test_the_sidecar_says_where_the_labels_come_from(out, job):
    write(out, job)
    content = json.loads(out.paths(job).sidecar.read_text())
    assert content["SpatialReference"] == job.scan.uri
    assert content["Sources"] == [f"bids:raw:sub-01/ses-a/anat/{NAME}_T1w.nii.gz"]
    assert content["Model"] == {
        "Name": "small", "Version": "1.0", "Status": "experimental", "Sha256": "0" * 64,
        "Licence": "MIT",
    }  # fmt: skip
    assert content["ModelReason"] == "only one"
    assert content["ModelsRefused"] == [{"Model": "other", "Reason": "it is for infants"}]
    assert content["Age"] == {"Days": None, "PostMenstrualWeeks": None, "Source": "not given"}
    assert content["Warnings"] == ["no age"]
    assert content["Flags"] == ["small"]
    assert content["QualityControl"] == {"score": 0.75}
    assert content["PeakMemoryGib"] == 1.5
    assert content["ProgramVersion"] == __version__
    assert "Command" not in content
    assert content["ContrastAgent"] == "gd"
    assert list(content)[-1] == "ContentKey"


def test_the_sidecar_keeps_the_command(out, job):
    out.command = "tlseg /raw /out participant"
    write(out, job)
    content = json.loads(out.paths(job).sidecar.read_text())
    assert content["Command"] == "tlseg /raw /out participant"
    assert list(content)[-1] == "ContentKey"


def test_volumes_hold_every_label_and_their_units(out, job):
    write(out, job)
    paths = out.paths(job)
    table = pd.read_csv(paths.volumes, sep="\t")
    assert table["index"].tolist() == PROTOCOLS["aseg"]["index"].tolist()[1:]
    labels = made_up_segmentation(job.scan).labels
    expected = np.count_nonzero(labels.data) * labels.grid.voxel_mm3
    assert table["hard_mm3"].sum() == pytest.approx(expected)
    content = json.loads(paths.volumes.with_suffix(".json").read_text())
    assert set(table) <= set(content), "every column is described"
    assert content["hard_mm3"]["Units"] == "mm^3"
    assert content["BrainVolume"]["Value"] == pytest.approx(
        np.count_nonzero(made_up_segmentation(job.scan).brain_mask) * labels.grid.voxel_mm3
    )
    assert content["Calibration"] is None


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_has_no_doubt_about_the_columns(out, job):
    out.write_root([job.card], PROTOCOLS)
    write(out, job)
    said = subprocess.run(
        [find_validator(), str(out.out_dir), "--json"], capture_output=True, check=False
    )
    issues = json.loads(said.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["code"].startswith("TSV_")] == []


def test_the_intracranial_volume_or_why_there_is_none(out, job):
    found = made_up_segmentation(job.scan)
    write(out, job, dataclasses.replace(found, qc={"icv_mm3": 1.5e6, "brain_mm3": 1.2e6}))
    file = out.paths(job).volumes.with_suffix(".json")
    content = json.loads(file.read_text())
    assert content["IntracranialVolume"]["Value"] == 1.5e6
    assert content["IntracranialVolume"]["Units"] == "mm^3"
    assert "Reason" not in content["IntracranialVolume"]
    assert content["BrainVolume"]["Value"] == 1.2e6
    write(
        out, job, dataclasses.replace(found, unmeasured={"icv_mm3": "the scan is skull-stripped"})
    )
    content = json.loads(file.read_text())
    assert content["IntracranialVolume"]["Value"] is None
    assert content["IntracranialVolume"]["Reason"] == "the scan is skull-stripped"


def test_the_table_says_what_its_calibration_rests_on(out, job):
    calibration = Calibration("24 scans of infant", {"aseg": 1.1})
    calibrated = dataclasses.replace(
        job, card=dataclasses.replace(job.card, calibration=calibration)
    )
    write(out, calibrated)
    content = json.loads(out.paths(calibrated).volumes.with_suffix(".json").read_text())
    assert content["Calibration"] == {"How": "24 scans of infant", "IntervalLevel": 0.9}


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, "n/a"), ("", "n/a"), (float("nan"), "n/a"), ("a\tb\nc", "a b c"), (3, "3"),
        (1234567.891, "1234567.891"), (np.float64(0.1), "0.1"), ("<b>", "<b>"),
        ("\x1b[31m", "[31m"),
    ],
)  # fmt: skip
def test_a_cell_never_breaks_its_table(value, cell):
    assert clean_cell(value) == cell


def test_json_holds_no_nan_and_no_numpy():
    value = {"a": np.float32("nan"), 1: np.arange(2), "p": Path("x"), "t": (True, np.int16(3))}
    assert plain(value) == {"a": None, "1": [0, 1], "p": "x", "t": [True, 3]}


# Whole or absent ---------------------------------------------------------------------------------


def test_a_scan_is_finished_only_with_the_same_key_and_every_file(out, job):
    assert not out.finished(job)
    files = write(out, job)
    assert out.finished(job)
    assert not out.finished(dataclasses.replace(job, key="key-2"))
    out.probabilities = True
    assert not out.finished(job)
    out.probabilities = False
    for path in files:
        content = path.read_bytes()
        path.write_bytes(b"")
        assert not out.finished(job), path
        path.unlink()
        assert not out.finished(job), path
        path.write_bytes(content)
    assert out.finished(job)


def test_a_sidecar_that_is_no_json_means_not_finished(out, job):
    write(out, job)
    out.paths(job).sidecar.write_text('{"ContentKey": "key-1"')
    assert not out.finished(job)


def test_the_key_is_written_last_and_an_old_one_goes_first(out, job, monkeypatch):
    write(out, job)
    segmentation = made_up_segmentation(job.scan)
    monkeypatch.setattr(segmentation.volumes, "columns", ["x"] * 6)  # fails after some files
    with pytest.raises(KeyError):
        out.write_scan(job, segmentation, {})
    assert not out.paths(job).sidecar.exists()
    assert not out.finished(job)


def test_the_mask_of_another_protocol_is_not_taken_for_ones_own(out, job, monkeypatch):
    other = dataclasses.replace(job, card=small_card(protocol="braincolor"), key="key-2")
    write(out, job)
    write(out, other)
    assert out.finished(other)
    assert not out.finished(job)
    write(out, job)
    assert out.finished(job)
    assert not out.finished(other)

    def die_at_the_mask(path, *content):
        write_labels(path, *content)
        if "_mask" in path.name:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr("tlseg_bids.bids.write.write_labels", die_at_the_mask)
    with pytest.raises(KeyboardInterrupt):
        write(out, other)
    assert out.paths(job).sidecar.exists()
    assert not out.finished(job)


def test_two_protocols_do_not_write_the_mask_of_a_scan_at_a_time(out, job):
    other = dataclasses.replace(job, card=small_card(protocol="braincolor"))
    with out.lock(job), pytest.raises(LockedError, match="is being processed"), out.lock(other):
        pass


@pytest.fixture
def everything(out, job):
    """A result with all that can be asked for, and the job of the next one, which asks for none."""
    template = out.bids_dir.parent / "tpl-X" / "tpl-X_T1w.nii.gz"
    template.parent.mkdir()
    template.write_bytes(job.scan.path.read_bytes())
    asked = dataclasses.replace(job, precomputed=True, spaces=(Space("X", file=template),))
    out.probabilities = True
    out.write_space(asked, 0, made_up_segmentation(job.scan), np.eye(4))
    files = write(out, asked, probabilities=probabilities(job))
    assert out.finished(asked)
    out.probabilities = False
    return files, dataclasses.replace(job, key="key-2")


def test_nothing_of_an_old_result_is_left_beside_a_new_one(out, everything):
    old, new = everything
    files = write(out, new)
    assert out.finished(new)
    assert not [path for path in set(old) - set(files) if path.exists()]
    assert len(old) > 2 * len(files)


def test_the_optional_files_of_another_protocol_stay(out, everything):
    old, new = everything
    write(out, dataclasses.replace(new, card=small_card(protocol="braincolor")))
    assert all(path.exists() for path in old)


class _Killed(BaseException):
    pass


def test_a_kill_at_no_moment_leaves_old_beside_new(out, everything, monkeypatch):
    old, new = everything
    whole = {path: path.read_bytes() for path in old}
    steps, unlink, replace = 0, Path.unlink, Path.replace

    def dying(change):
        def step(path, *words, **options):
            nonlocal steps
            if path.suffix != ".lock":
                steps -= 1
                if steps < 0:
                    raise _Killed
            return change(path, *words, **options)

        return step

    for number in range(1000):
        for path, content in whole.items():
            path.write_bytes(content)
        steps = number
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", dying(unlink))
            patched.setattr(Path, "replace", dying(replace))
            try:
                write(out, new)
            except _Killed:
                left = {path for path in old if path.exists()}
                as_before = all(path.read_bytes() == whole[path] for path in left)
                done = out.finished(new) and left <= set(out.paths(new).files)
                assert as_before or done or not out.paths(new).sidecar.exists(), number
            else:
                break
    assert number > 20
    assert out.finished(new)


def test_an_old_file_that_cannot_be_removed_is_a_sentence(out, everything, monkeypatch):
    old, new = everything
    stale = next(path for path in old if path.name.endswith("_desc-uncertainty_probseg.nii.gz"))
    unlink = Path.unlink

    def refuse(path, **options):
        if path == stale:
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CannotCreateError) as error:
        write(out, new)
    assert str(error.value) == (
        f"the file cannot be made (Permission denied) – {stale} – check that the output folder may "
        "be written to"
    )


def _write_and_die(out, job, segmentation):
    import tlseg_bids.bids.write as module

    def die(*_args):
        os.kill(os.getpid(), signal.SIGKILL)

    module._tsv = die
    with out.lock(job):
        out.write_scan(job, segmentation, {})


def test_a_run_that_was_killed_is_resumed(out, job):
    process = multiprocessing.get_context("fork").Process(
        target=_write_and_die, args=(out, job, made_up_segmentation(job.scan))
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert out.paths(job).dseg.exists()
    assert not out.finished(job)
    with out.lock(job):
        write(out, job)
    assert out.finished(job)
    assert not list(out.out_dir.rglob("*.lock"))


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")

    def fail_halfway():
        with atomic(path) as stream:
            stream.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_removed(tmp_path):
    code = (
        "import os, sys, pathlib; from tlseg_bids.bids.atomic import atomic\n"
        "with atomic(pathlib.Path(sys.argv[1])) as stream:\n"
        " stream.write(b'x'); stream.flush(); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "a.txt"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=root)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    write_text(path, "whole")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def left(tmp_path):
    """A temporary file of ``a.txt`` that a killed run left."""
    with atomic(tmp_path / "a.txt"):
        (partial,) = tmp_path.iterdir()
    (tmp_path / "a.txt").unlink()
    partial.write_bytes(b"x")
    return partial


def test_what_a_killed_run_left_is_removed_on_nfs(left, monkeypatch):
    """NFS locks a file exclusively only where it is open for writing."""
    plain = fcntl.flock

    def on_nfs(handle, how):
        for_reading = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if how & fcntl.LOCK_EX and for_reading:
            raise OSError(errno.EBADF, "Bad file descriptor")
        plain(handle, how)

    monkeypatch.setattr(fcntl, "flock", on_nfs)
    path = write_text(left.with_name("a.txt"), "whole")
    assert list(left.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK])
def test_without_locks_what_was_left_stays_and_the_file_is_written(left, monkeypatch, code):
    def refuse(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = write_text(left.with_name("a.txt"), "whole")
    assert set(left.parent.iterdir()) == {path, left}


def test_what_another_user_left_stays(left, monkeypatch):
    plain = Path.open

    def refuse(path, mode="r", *words, **options):
        if path == left:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, mode, *words, **options)

    monkeypatch.setattr(Path, "open", refuse)
    path = write_text(left.with_name("a.txt"), "whole")
    assert set(left.parent.iterdir()) == {path, left}


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_full_disk_is_a_sentence(out, job):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OutputError) as error:
            write(out, job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert str(error.value) == (
        f"there is no space left to write (File too large) – {out.paths(job).dseg} – free some "
        "space or choose another output folder, then start again; finished scans are reused"
    )
    assert error.value.exit_code == 74
    assert not [path for path in out.out_dir.rglob("*") if path.is_file()]


def test_a_failing_disk_is_a_sentence(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as error:
        write_text(tmp_path / "a.txt", "x")
    assert str(error.value) == (
        f"writing failed (Input/output error) – {tmp_path / 'a.txt'} – check the disk or the "
        "network drive, then start again; finished scans are reused"
    )
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_made_is_a_sentence(tmp_path, raw, job):
    (tmp_path / "file").touch()
    out = Derivatives(tmp_path / "file" / "out", raw)
    with pytest.raises(CannotCreateError) as error:
        write(out, job)
    assert str(error.value) == (
        f"the file cannot be made (Not a directory) – {out.paths(job).sidecar} – check that the "
        "output folder may be written to"
    )
    assert error.value.exit_code == 73
    with pytest.raises(CannotCreateError) as error:
        out.write_root([], {})
    lock = out.out_dir / "logs" / "locks" / "root.lock"
    assert str(error.value) == (
        f"the lock file cannot be made (Not a directory) – {lock} – check the permissions of the "
        "folder and the space on the disk"
    )


# Root files --------------------------------------------------------------------------------------


def test_the_root_says_what_the_dataset_is(out, monkeypatch):
    monkeypatch.setenv("TLSEG_CONTAINER", "docker:ghcr.io/tlseg/tlseg:0.1.0")
    out.write_root([small_card()], PROTOCOLS)
    content = json.loads((out.out_dir / "dataset_description.json").read_text())
    program, model = content["GeneratedBy"]
    assert program["Name"] == "tlseg"
    assert program["Container"] == {
        "Type": "docker", "Tag": "ghcr.io/tlseg/tlseg:0.1.0",
        "URI": "docker://ghcr.io/tlseg/tlseg:0.1.0",
    }  # fmt: skip
    assert model == {
        "Name": "model small", "Version": "1.0",
        "Description": f"weights with sha256 {'0' * 64}, MIT",
    }  # fmt: skip
    assert content["DatasetLinks"] == {"raw": "../raw"}
    assert content["DatasetType"] == "derivative"
    ignored = (out.out_dir / ".bidsignore").read_text().splitlines()
    assert ignored == ["*.html", "figures", "group_*", "models", "logs", "compat", "*_xfm.*"]
    lines = (out.out_dir / "seg-aseg_dseg.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["index", "name", "abbreviation", "color", "mapping"]
    assert len(lines) == 1 + len(PROTOCOLS["aseg"])
    by_name = {line.split("\t")[1]: line.split("\t")[4] for line in lines[1:]}
    assert by_name["Left putamen"] == "9"
    assert "n/a" not in by_name.values()


@pytest.mark.parametrize("linked", ["out", "raw", "both"])
def test_the_link_to_the_dataset_holds_behind_links(tmp_path, job, linked):
    place = tmp_path / "x" / "y" / "z" / "scratch"
    place.mkdir(parents=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "scratch").symlink_to(place)
    (home / "data").symlink_to(job.scan.bids_dir)
    raw = job.scan.bids_dir if linked == "out" else home / "data"
    out_dir = (tmp_path if linked == "raw" else home / "scratch") / "out"
    Derivatives(out_dir, raw).write_root([], {})
    for folder in (out_dir, out_dir.resolve()):
        link = dataset_links(folder)["raw"]
        assert link.samefile(raw)
        assert resolve(job.scan.uri, folder, {"raw": link}).samefile(job.scan.path)


def test_another_run_adds_to_the_root_and_keeps_the_rest(out):
    out.write_root([small_card()], PROTOCOLS)
    (out.out_dir / "README.md").write_text("mine")
    (out.out_dir / ".bidsignore").write_text("mine\nlogs\n")
    out.write_root([small_card("second"), small_card()], PROTOCOLS)
    content = json.loads((out.out_dir / "dataset_description.json").read_text())
    assert [g["Name"] for g in content["GeneratedBy"]] == ["tlseg", "model small", "model second"]
    assert (out.out_dir / "README.md").read_text() == "mine"
    lines = (out.out_dir / ".bidsignore").read_text().splitlines()
    assert lines == ["mine", "logs", "*.html", "figures", "group_*", "models", "compat", "*_xfm.*"]


@pytest.mark.parametrize(
    ("sidecar", "kept"), [("{}", ["tlseg", "model new"]), ("{", ["tlseg", "tlseg", "model old",
                                                               "model new"])]
)  # fmt: skip
def test_a_model_whose_labels_are_replaced_is_forgotten(out, monkeypatch, sidecar, kept):
    old, new = (dataclasses.replace(small_card(), name=name) for name in ("old", "new"))
    with monkeypatch.context() as patch:
        patch.setattr("tlseg_bids.bids.root.__version__", "0.0.7")
        out.write_root([old], {})
    out.write_root([new], {})
    labels = out.out_dir / "sub-01" / "anat" / "sub-01_space-T1w_seg-aseg_dseg.json"
    labels.parent.mkdir(parents=True)
    labels.write_text(sidecar)
    forget_replaced(out.out_dir, out.bids_dir, (new,))
    described = json.loads((out.out_dir / "dataset_description.json").read_text())
    assert [maker["Name"] for maker in described["GeneratedBy"]] == kept


def test_the_root_keeps_the_versions_that_labelled(out, monkeypatch):
    def programs():
        content = json.loads((out.out_dir / "dataset_description.json").read_text())
        return [g["Version"] for g in content["GeneratedBy"] if g["Name"] == "tlseg"]

    for version, cards, expected in (
        ("0.8", [], ["0.8"]),
        ("0.9", [small_card()], ["0.9", "0.8"]),
        ("1.0", [], ["0.9", "0.8"]),  # the level group, or reports alone
        ("1.0", [small_card()], ["1.0", "0.9", "0.8"]),
        ("0.9", [small_card()], ["0.9", "1.0", "0.8"]),
    ):
        monkeypatch.setattr("tlseg_bids.bids.root.__version__", version)
        out.write_root(cards, PROTOCOLS)
        assert programs() == expected


def test_the_bids_folder_is_never_the_output_folder(raw):
    with pytest.raises(UsageError) as error:
        Derivatives(raw / "sub-01" / "..", raw).write_root([], {})
    assert str(error.value) == (
        f"the output folder is the BIDS folder itself – {raw}/sub-01/.. – choose another, such as "
        f"{raw}/derivatives/tlseg"
    )


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ('{"GeneratedBy": [{"Name": "fMRIPrep"}]}', "fMRIPrep"),
        ('{"Name": "x"}', "not by this program"),
        ("{", "is not valid JSON (line 1: Expecting property name enclosed in double quotes)"),
    ],
)
def test_another_dataset_is_not_mixed_with(out, text, who):
    out.out_dir.mkdir()
    path = out.out_dir / "dataset_description.json"
    path.write_text(text)
    with pytest.raises(CannotCreateError) as error:
        out.write_root([], {})
    assert str(error.value) == (
        f"the output folder holds another dataset ({who}) – {out.out_dir} – choose an empty "
        "folder, so that its files are not mixed with these"
    )
    assert path.read_text() == text


def described(folder, name, doi=None):
    """A dataset with this Name and DatasetDOI."""
    more = {"DatasetDOI": doi} if doi else {}
    description = {"Name": name, "BIDSVersion": "1.10.0", **more}
    return make_dataset(folder, texts={"dataset_description.json": description})


def link_of(out_dir):
    return json.loads((out_dir / "dataset_description.json").read_text())["DatasetLinks"]["raw"]


def test_a_second_dataset_is_not_mixed_with_the_first(tmp_path):
    one, two = described(tmp_path / "a", "one"), described(tmp_path / "b", "two")
    Derivatives(tmp_path / "out", one).write_root([small_card()], PROTOCOLS)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for out_dir in (tmp_path / "out", tmp_path / "link"):
        with pytest.raises(CannotCreateError) as error:
            Derivatives(out_dir, two).write_root([small_card()], PROTOCOLS)
        assert str(error.value) == (
            f"the output folder holds results of another dataset, 'one' in {one} – {out_dir} – "
            "choose another folder for 'two', so that scans of one name do not replace each "
            "other; if both are the same dataset, give them the same Name and DatasetDOI"
        )
        assert link_of(out_dir) == "../a"


def test_a_dry_run_tells_of_an_output_folder_that_is_not_its_own(tmp_path, capsys):
    one, two = described(tmp_path / "a", "one"), described(tmp_path / "b", "two")
    Derivatives(tmp_path / "out", one).write_root([small_card()], PROTOCOLS)
    words = [str(tmp_path / "out"), "participant", "--dry-run", "--device", "cpu"]
    assert main([str(two), *words]) == CannotCreateError.exit_code == 73
    assert "holds results of another dataset, 'one'" in capsys.readouterr().err
    assert main([str(one), *words]) == 0
    assert main([str(two), str(tmp_path / "new"), *words[1:]]) == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("one",), (" one ",), True),
        (("one", "10.1/openneuro.ds1.v1.0.0"), ("one", "doi:10.1/OpenNeuro.ds1.v2.0"), True),
        (("one", "10.1/x"), ("new name", "https://doi.org/10.1/x"), True),
        (("one", "10.1/x"), ("one", "10.1/y"), False),
        (("one", "10.1/x"), ("one",), True),
        (("one", "10.1/x"), ("two",), False),
    ],
)
def test_a_copy_of_the_dataset_is_known_by_its_description(tmp_path, first, second, same):
    one, two = described(tmp_path / "a", *first), described(tmp_path / "b", *second)
    Derivatives(tmp_path / "out", one).write_root([], {})
    if same:
        Derivatives(tmp_path / "out", two).write_root([], {})
    else:
        with pytest.raises(CannotCreateError, match="holds results of another dataset, 'one' in"):
            Derivatives(tmp_path / "out", two).write_root([], {})
    assert link_of(tmp_path / "out") == ("../b" if same else "../a")


def test_a_dataset_that_was_moved_or_renamed_goes_on(tmp_path):
    out = tmp_path / "out"
    Derivatives(out, described(tmp_path / "a", "one")).write_root([], {})
    Derivatives(out, described(tmp_path / "a", "better name")).write_root([], {})
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    Derivatives(out, tmp_path / "linked").write_root([], {})
    (tmp_path / "linked").unlink()
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    Derivatives(out, described(moved, "yet another name")).write_root([], {})
    assert link_of(out) == "../moved"


def test_a_path_of_a_container_at_which_another_dataset_lies_here(tmp_path):
    inside = tmp_path / "container"
    Derivatives(inside / "out", described(inside / "bids", "one")).write_root([], {})
    here = tmp_path / "here"
    here.mkdir()
    (inside / "out").rename(here / "out")
    described(here / "bids", "two")
    Derivatives(here / "out", described(here / "one", "one")).write_root([], {})
    assert link_of(here / "out") == "../one"


def image(path, at_mm):
    """A header that a scan, or its labels, can have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = at_mm
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 32), np.uint8), affine), path)


@pytest.mark.parametrize(
    ("name", "scans", "mixed"),
    [
        ("two", {"01": 5}, True),  # another scan of the same name
        ("two", {}, True),  # none of that name
        ("two", {"01": 0}, False),  # the dataset was renamed
        ("two", {"01": 5, "02": 0}, False),  # and a scan was exported again
        ("one", {"01": 5}, False),
    ],
)
def test_two_datasets_at_one_path_of_a_container_are_not_mixed(tmp_path, name, scans, mixed):
    out, bids = tmp_path / "out", tmp_path / "bids"
    Derivatives(out, described(bids, "one")).write_root([], {})
    for label in ("01", "02"):
        labels = out / f"sub-{label}" / "anat" / f"sub-{label}_space-T1w_seg-aseg_dseg.nii.gz"
        image(labels, 0)
        source = f"bids:raw:sub-{label}/anat/sub-{label}_T1w.nii.gz"
        sidecar = labels.with_name(labels.name.replace(".nii.gz", ".json"))
        sidecar.write_text(json.dumps({"Sources": [source]}))
    shutil.rmtree(bids)
    described(bids, name)
    shutil.rmtree(bids / "sub-01")
    for label, at_mm in scans.items():
        image(bids / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz", at_mm)
    if mixed:
        with pytest.raises(CannotCreateError) as error:
            Derivatives(out, bids).write_root([], {})
        assert str(error.value).startswith(
            f"the output folder holds results of another dataset, 'one' – {out} – choose another "
            "folder for 'two', so that scans of one name"
        )
    else:
        Derivatives(out, bids).write_root([], {})


def test_a_link_without_content_is_no_other_dataset(tmp_path):
    out, bids = tmp_path / "out", tmp_path / "bids"
    Derivatives(out, described(bids, "one")).write_root([], {})
    labels = out / "sub-01" / "anat" / "sub-01_space-T1w_seg-aseg_dseg.json"
    labels.parent.mkdir(parents=True)
    labels.write_text(json.dumps({"Sources": ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]}))
    scan = described(bids, "two") / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    scan.unlink()
    scan.symlink_to("gone")
    Derivatives(out, bids).write_root([], {})


@pytest.mark.parametrize("link", ["//[", "\0", "x" * 5000, "file:///%00", 3, "\ud800"])
def test_an_odd_link_of_an_earlier_run_is_replaced(out, link):
    out.write_root([], {})
    path = out.out_dir / "dataset_description.json"
    content = {**json.loads(path.read_text()), "DatasetLinks": {"raw": link}}
    path.write_text(json.dumps(content))
    out.write_root([], {})
    assert link_of(out.out_dir) == "../raw"


def test_a_bidsignore_that_cannot_be_read_is_a_sentence(out):
    path = out.out_dir / ".bidsignore"
    path.mkdir(parents=True)
    with pytest.raises(CannotCreateError) as error:
        out.write_root([], {})
    assert str(error.value) == (
        f"the file cannot be made (Is a directory) – {path} – check that the output folder may be "
        "written to"
    )


# Locks -------------------------------------------------------------------------------------------


def test_a_scan_is_not_processed_twice_at_a_time(out, job):
    with out.lock(job):
        (path,) = (out.out_dir / "logs" / "locks").iterdir()
        with pytest.raises(LockedError) as error, out.lock(job):
            pass
        assert str(error.value).startswith(
            f"{NAME}_T1w.nii.gz is being processed by another run (process {os.getpid()} on "
        )
        assert str(error.value).endswith(
            f" – {path} – wait until it ends, then start again; what it finished is reused"
        )
        assert error.value.exit_code == 75
    with out.lock(job):
        pass
    assert not path.exists()


def test_another_scan_is_not_held_up(out, job):
    other = dataclasses.replace(job.scan, suffix="T2w")
    with out.lock(job), out.lock(dataclasses.replace(job, scan=other)):
        pass


def test_a_lock_of_a_killed_process_does_not_hold(tmp_path):
    path = tmp_path / "x.lock"
    code = (
        "import sys, time, pathlib; from tlseg_bids.bids.lock import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), 'x'):\n print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LockedError), hold(path, "x"):
            pass
        process.kill()
    assert path.exists()
    with hold(path, "x"):
        pass


def _count_up(folder):
    for _ in range(20):
        with hold(folder / "x.lock", "x", wait_s=30):
            count = int((folder / "n").read_text())
            time.sleep(0.001)
            (folder / "n").write_text(str(count + 1))


def test_a_lock_that_is_waited_for_keeps_order(tmp_path):
    (tmp_path / "n").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_up, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "n").read_text() == "80"


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with hold(tmp_path / "x.lock", "x"):
        pass


# Logs --------------------------------------------------------------------------------------------


def read_tsv(path):
    return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))


def test_the_plan_is_logged(out, job):
    broken = Scan(
        job.scan.bids_dir / "sub-01\tx\n.nii.gz", job.scan.bids_dir, {"sub": "01x"}, "T1w"
    )
    plan = Plan((job,), (Skip(broken, "the file is empty", "copy it again"),))
    log = RunLog(out.out_dir, "run-1")
    table, content = log.write_plan(plan)
    planned, skipped = read_tsv(table)
    assert tuple(planned) == PLAN_COLUMNS
    assert planned["scan"] == f"sub-01/ses-a/anat/{NAME}_T1w.nii.gz"
    assert planned["refused"] == "other: it is for infants"
    assert (planned["model"], planned["device"], planned["memory_gib"]) == ("small", "cpu", "1")
    assert skipped["scan"] == "sub-01 x .nii.gz"
    assert skipped["reason"] == "the file is empty – copy it again"
    assert (skipped["status"], skipped["model"]) == ("skipped", "n/a")
    content = json.loads(content.read_text())
    assert content["Jobs"][0]["Refused"] == [{"Model": "other", "Reason": "it is for infants"}]
    assert content["Skipped"][0]["Hint"] == "copy it again"
    assert table.name == "plan_run-1.tsv"


def test_what_became_of_each_scan_is_logged_at_once(out, job):
    log = RunLog(out.out_dir, "run-1")
    log.record(Outcome(job.scan, "done", (Path("/x/a.nii.gz"),), {"read": 1.25, "net": 2}, 3), "m")
    log.record(Outcome(job.scan, "failed", error="bad\nvoxels", hint="mend\tthem"))
    done, failed = read_tsv(log.status_file)
    assert (done["status"], done["seconds"], done["files"]) == ("done", "3.2", "a.nii.gz")
    assert (done["model"], done["peak_memory_gib"], done["error"]) == ("m", "3.00", "n/a")
    assert (failed["status"], failed["error"], failed["hint"]) == (
        "failed",
        "bad voxels",
        "mend them",
    )


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path, job):
    (tmp_path / "logs").touch()
    log = RunLog(tmp_path, "run-1")
    with pytest.raises(CannotCreateError) as error:
        log.record(Outcome(job.scan, "done"))
    assert error.value.where == str(tmp_path / "logs" / "status_run-1.tsv")


def test_a_crash_is_logged_with_its_traceback(out, job):
    try:
        raise ZeroDivisionError("no voxels")
    except ZeroDivisionError as error:
        path = RunLog(out.out_dir, "run-1").crash(job.scan, error)
    assert path.name == f"crash_run-1_{NAME}_T1w.txt"
    text = path.read_text()
    assert "ZeroDivisionError: no voxels" in text
    assert f"scan: {job.scan.path.relative_to(job.scan.bids_dir)}\n" in text


def test_the_configuration_is_logged_as_toml(out, raw):
    path = RunLog(out.out_dir, "run-1").write_config(config(raw, participants=("01",)))
    assert tomllib.loads(path.read_text())["participant-label"] == ["01"]


def test_the_citation_is_what_the_report_says(out):
    path = RunLog(out.out_dir).write_citation(methods_text([small_card()], "1.2.3"))
    text = path.read_text()
    assert path.name == "CITATION.md"
    assert "tlseg 1.2.3" in text
    assert "10.1000/made-up" in text
    assert "sdata.2016.44" in text


def test_run_ids_differ_and_sort_by_time():
    first, second = new_run_id(Path()), new_run_id(Path())
    assert first != second
    assert first[:15] <= second[:15]
