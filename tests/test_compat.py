"""Derivatives that fMRIPrep, sMRIPrep and NiBabies find, asked by their own queries."""

from __future__ import annotations

import dataclasses
import json
import subprocess

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.cards import small_card
from tests.datasets import SHAPE, config, made_up_job, made_up_segmentation, make_dataset
from tlseg_bids.bids.compat import TISSUES, first_of_visit
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.validate import find_validator
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.report.derivatives import dataset_links, resolve

NAMES = (
    "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.nii.gz",
    "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
)
ASEG = load_protocol("aseg")
LABELS = "desc-aseg_dseg"


@pytest.fixture
def out(tmp_path):
    """The derivatives of a T1w and a T2w of one session."""
    raw = make_dataset(tmp_path / "raw", NAMES)
    outputs = Derivatives(tmp_path / "out", raw)
    scans, _ = discover(config(raw))
    for scan in scans:
        job = dataclasses.replace(made_up_job(scan), precomputed=True)
        outputs.write_root([job.card], {"aseg": ASEG.table})
        found = made_up_segmentation(scan)
        labels = found.labels.data
        maps = ((labels == index).astype(np.float32) for index in ASEG.indices)
        files = outputs.write_scan(job, found, {}, maps)
        assert all(file.is_file() for file in files)
        assert outputs.finished(job)
    return outputs.out_dir


@pytest.fixture
def two_runs(tmp_path):
    """An output folder, and a job for each of two runs that share their names in ``compat``."""
    raw = make_dataset(tmp_path / "raw", [
        f"sub-01/ses-a/anat/sub-01_ses-a_run-{run}_T1w.nii.gz" for run in (1, 2)
    ])  # fmt: skip
    jobs = [made_up_job(scan, f"key-{n}") for n, scan in enumerate(discover(config(raw))[0], 1)]
    return Derivatives(tmp_path / "out", raw), *jobs


def asked(job):
    return dataclasses.replace(job, precomputed=True)


def write(outputs, job):
    count = len(load_protocol(job.card.protocol))
    maps = (np.full(SHAPE, 1 / count, np.float32) for _ in range(count))
    return outputs.write_scan(job, made_up_segmentation(job.scan), {}, maps)


def test_another_run_of_the_session_takes_the_place_of_the_first(two_runs):
    outputs, first, second = two_runs
    write(outputs, asked(first))
    write(outputs, second)
    assert outputs.finished(asked(first))
    assert outputs.finished(second)
    assert not outputs.finished(asked(second))
    files = write(outputs, asked(second))
    assert outputs.finished(asked(second))
    assert not outputs.finished(asked(first))
    told = [json.loads(f.read_text()) for f in files if "compat" in f.parts and f.suffix == ".json"]
    assert {source for about in told for source in about["Sources"]} == {second.scan.uri}
    write(outputs, first)  # takes nothing of the second run away
    assert outputs.finished(asked(second))
    write(outputs, second)
    assert names(outputs.out_dir / "compat") == []


def test_another_protocol_leaves_nothing_of_the_first(two_runs):
    outputs, job, _ = two_runs
    write(outputs, asked(job))
    other = dataclasses.replace(job, card=small_card(protocol="braincolor"), key="key-3")
    files = write(outputs, asked(other))
    written = sorted(f.name for f in files if "compat" in f.parts and f.name.endswith(".nii.gz"))
    assert names(outputs.out_dir / "compat") == written
    assert not any("desc-aseg" in name for name in written)
    assert not outputs.finished(asked(job))


def names(folder):
    return sorted(file.name for file in folder.rglob("*.nii.gz"))


def test_names_and_values(out):
    own = ["desc-aseg_dseg", "desc-brain_mask", "dseg", *(f"label-{t}_probseg" for t in TISSUES)]
    spaces = ("", "space-T1w_", "space-T2w_")
    expected = sorted(f"sub-01_ses-a_{space}{name}.nii.gz" for space in spaces for name in own)
    assert names(out / "compat") == expected
    folder = out / "compat" / "sub-01" / "ses-a" / "anat"
    aseg = np.asanyarray(nib.load(folder / "sub-01_ses-a_desc-aseg_dseg.nii.gz").dataobj)
    tissue = np.asanyarray(nib.load(folder / "sub-01_ses-a_dseg.nii.gz").dataobj)
    for label, code in ((2, 2), (3, 1), (10, 1), (16, 2), (4, 3), (24, 3), (0, 0)):
        assert set(np.unique(tissue[aseg == label])) <= {code}
    for name, code in TISSUES.items():
        file = folder / f"sub-01_ses-a_label-{name}_probseg.nii.gz"
        np.testing.assert_array_equal(nib.load(file).get_fdata() > 0.99, tissue == code)


def test_the_links_to_the_scans_hold_where_both_datasets_are_moved(out):
    moved = out.parent.rename(out.parent.with_name("moved"))
    folder = moved / "out" / "compat"
    sidecar = folder / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_desc-brain_mask.json"
    source = json.loads(sidecar.read_text())["SpatialReference"]
    found = resolve(source, folder, dataset_links(folder))
    assert found is not None
    assert found.samefile(moved / "raw" / NAMES[0])
    text = (folder / "dataset_description.json").read_text()
    assert json.loads(text)["SourceDatasets"] == [{"URL": "../../raw"}]
    assert "file:" not in text


def test_every_label_image_inherits_a_table_of_its_own_labels(out):
    """Of the tables that apply, the one with the most entities counts."""
    folder = out / "compat"
    tables = {name: pd.read_csv(folder / f"{name}.tsv", sep="\t") for name in ("dseg", LABELS)}
    assert tables["dseg"]["name"].tolist() == ["Background", *TISSUES]
    assert tables[LABELS]["index"].tolist() == ASEG.table["index"].tolist()
    assert tables[LABELS]["name"].tolist() == ASEG.table["name"].tolist()
    assert (folder / f"{LABELS}.tsv").read_bytes() == (out / "seg-aseg_dseg.tsv").read_bytes()


def test_their_own_queries_find_each_file_once(out):
    smriprep = pytest.importorskip("smriprep.utils.bids", reason="smriprep is not installed")
    found = smriprep.collect_derivatives(out / "compat", "01", [], session_id="a")
    assert found["t1w_mask"].endswith("sub-01_ses-a_desc-brain_mask.nii.gz")
    assert found["t1w_dseg"].endswith("sub-01_ses-a_dseg.nii.gz")
    assert [path.split("label-")[1][:3].strip("_") for path in found["t1w_tpms"]] == list(TISSUES)
    nibabies = pytest.importorskip("nibabies.utils.derivatives", reason="nibabies is not installed")
    found = nibabies.collect_anatomical_derivatives(out / "compat", "01", [], "a")
    for space in ("T1w", "T2w"):
        key = space.lower()
        for what, name in (
            ("mask", "desc-brain_mask"),
            ("dseg", "dseg"),
            ("aseg", "desc-aseg_dseg"),
        ):
            assert found[f"{key}_{what}"].endswith(f"sub-01_ses-a_space-{space}_{name}.nii.gz")
        assert len(found[f"{key}_tpms"]) == 3


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_accepts_both_datasets(out):
    for folder in (out, out / "compat"):
        answer = subprocess.run(
            [find_validator(), str(folder), "--json", "--ignoreWarnings"],
            capture_output=True,
            check=False,
        )
        issues = json.loads(answer.stdout)["issues"]["issues"]
        assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_one_scan_of_a_session_is_taken_before_contrast_agent(tmp_path):
    raw = make_dataset(tmp_path / "raw", [
        "sub-01/anat/sub-01_ce-gd_T1w.nii.gz", "sub-01/anat/sub-01_run-1_T1w.nii.gz",
        "sub-01/anat/sub-01_run-2_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-02/anat/sub-02_ce-gd_T1w.nii.gz",
    ])  # fmt: skip
    scans, _ = discover(config(raw))
    taken = [scans[number].path.name for number in sorted(first_of_visit(scans))]
    assert sorted(taken) == [
        "sub-01_T2w.nii.gz", "sub-01_run-1_T1w.nii.gz", "sub-02_ce-gd_T1w.nii.gz",
    ]  # fmt: skip
