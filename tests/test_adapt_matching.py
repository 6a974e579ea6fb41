"""Which label image belongs to which scan of a site, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_adapt import (
    PROTOCOL,
    Told,
    answer,
    asked,
    base,  # noqa: F401
    head,
    paint,
    save_nifti,
    write_site,
)
from tlseg_bids.adapt import site
from tlseg_bids.adapt.labels import collect
from tlseg_bids.adapt.matching import Matched, match
from tlseg_bids.adapt.site import fine_tune
from tlseg_bids.bids.names import parse_name
from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import DataError, NoInputError


def scans_of(bids: Path, pattern: str = "*") -> list[Scan]:
    paths = sorted(bids.glob(f"sub-*/**/{pattern}_T?w.nii.gz"))
    return [Scan(path, bids, *parse_name(path.name)) for path in paths]


def named(matched: Matched) -> dict[str, str]:
    return {scan.path.name: file.name for scan, file in matched.pairs}


def test_labels_in_a_standard_space_are_not_those_of_the_scan(tmp_path):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    beside = derivative / "sub-00/anat"
    save_nifti(beside / "sub-00_space-MNI152NLin2009cAsym_seg-aseg_dseg.nii.gz", head(0))
    found = match(derivative, scans_of(bids))
    assert named(found) == {"sub-00_T1w.nii.gz": "sub-00_space-T1w_seg-aseg_dseg.nii.gz"}
    assert not found.refused
    (beside / "sub-00_space-T1w_seg-aseg_dseg.nii.gz").unlink()
    sentence = (
        r"of 1 label image none lies in the space of a scan, such as sub-00_space-MNI.*"
        "give labels on"
    )
    with pytest.raises(NoInputError, match=sentence):
        match(derivative, scans_of(bids))


def test_labels_whose_space_is_a_suffix_go_to_no_other_scan(tmp_path):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    save_nifti(bids / "sub-00/anat/sub-00_acq-space_T2w.nii.gz", paint(head(0), 5))
    of_t2w = "sub-00_space-T2w_seg-aseg_dseg.nii.gz"
    save_nifti(derivative / "sub-00/anat" / of_t2w, head(0))
    found = match(derivative, scans_of(bids))
    assert named(found) == {
        "sub-00_T1w.nii.gz": "sub-00_space-T1w_seg-aseg_dseg.nii.gz",
        "sub-00_acq-space_T2w.nii.gz": of_t2w,
    }
    alone = match(derivative, [scan for scan in scans_of(bids) if scan.suffix == "T1w"])
    assert list(named(alone)) == ["sub-00_T1w.nii.gz"] and not alone.refused


def test_label_images_of_no_selected_scan_are_named(tmp_path, caplog, base):  # noqa: F811
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    save_nifti(derivative / "sub-77/anat/sub-77_seg-aseg_dseg.nii.gz", head(0))
    save_nifti(derivative / "sub-01/ses-1/anat/sub-01_ses-1_seg-aseg_dseg.nii.gz", head(1))
    found = match(derivative, scans_of(bids))
    assert found.unmatched == (
        "sub-01_ses-1_seg-aseg_dseg.nii.gz", "sub-77_seg-aseg_dseg.nii.gz",
    )  # fmt: skip
    assert found.unlabelled == ("sub-01_T1w", "sub-02_T1w")
    assert fine_tune(replace(asked(bids, derivative, base), dry_run=True), answer, Told()) == 0
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warning.startswith("Not used, as they belong to no selected scan: sub-01_ses-1_seg-aseg")
    assert "Check that subject, session, run" in warning
    (note,) = [n for n in collect(found, PROTOCOL).reading.notes if "no selected scan" in n]
    assert note == warning


def test_scans_without_labels_are_told_by_default(tmp_path, caplog, base, monkeypatch):  # noqa: F811
    record = {
        "Refused": [],
        "Unlabelled": ["sub-01_T1w", "sub-02_T1w"],
        "Kept": False,
        "Reason": "as it is",
    }
    monkeypatch.setattr(site, "finished", lambda *_: record)
    what = asked(*write_site(tmp_path, {"sub-00": head(0)}), base)
    assert fine_tune(what, answer, Told()) == 0
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "without labels, and skipped: sub-01_T1w, sub-02_T1w" in warnings


def test_indices_are_compared_as_numbers(tmp_path):
    bids, derivative = write_site(tmp_path, {})
    for run in ("01", "2"):
        save_nifti(bids / f"sub-00/anat/sub-00_run-{run}_T1w.nii.gz", paint(head(0), 5))
    for run in ("1", "02"):
        save_nifti(derivative / f"sub-00/anat/sub-00_run-{run}_seg-aseg_dseg.nii.gz", head(0))
    assert named(match(derivative, scans_of(bids))) == {
        "sub-00_run-01_T1w.nii.gz": "sub-00_run-1_seg-aseg_dseg.nii.gz",
        "sub-00_run-2_T1w.nii.gz": "sub-00_run-02_seg-aseg_dseg.nii.gz",
    }


def refused_by_a_run(bids: Path, derivative: Path, models: Path, monkeypatch, **options) -> list:
    """What `fine_tune`, which must end with 1, hands to the work as refused."""
    seen = []

    class Seen:
        def __init__(self, asked, *_):
            seen.extend(asked.collected.refused)

        def adapt(self, _):
            refused = [{"Name": one.name, "What": one.what, "Hint": one.hint} for one in seen]
            return {"Refused": refused, "Unlabelled": [], "Kept": False, "Reason": "as it is"}

    monkeypatch.setattr(site, "Work", Seen)
    assert fine_tune(asked(bids, derivative, models, **options), answer, Told()) == 1
    return seen


def test_a_labelled_scan_that_cannot_be_read_is_refused(tmp_path, base, monkeypatch):  # noqa: F811
    bids, derivative = write_site(tmp_path, {"sub-00": head(0), "sub-01": head(1)})
    for number in (1, 2):
        scan = bids / f"sub-0{number}/anat/sub-0{number}_T1w.nii.gz"
        scan.unlink()
        scan.symlink_to("../../.git/annex/objects/x.nii.gz")
    (one,) = refused_by_a_run(bids, derivative, base, monkeypatch)
    assert one.name == "sub-01_T1w"
    assert one.what.startswith("the scan has labels and cannot be used: ")
    assert "datalad get" in one.hint


def test_if_the_only_labelled_scan_cannot_be_read_that_is_said(tmp_path, base):  # noqa: F811
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    scan = bids / "sub-00/anat/sub-00_T1w.nii.gz"
    scan.unlink()
    scan.symlink_to("../../.git/annex/objects/x.nii.gz")
    sentence = r"no labelled scan can be used; sub-00_T1w: the scan has labels and cannot be used"
    with pytest.raises(DataError, match=sentence):
        fine_tune(asked(bids, derivative, base), answer, Told())


def test_a_labelled_run_that_is_not_the_first_is_refused_by_the_plan(
    tmp_path, base, monkeypatch  # noqa: F811
):  # fmt: skip
    bids, derivative = write_site(tmp_path, {})
    for run in (1, 2):
        save_nifti(bids / f"sub-00/anat/sub-00_run-{run}_T1w.nii.gz", paint(head(0), run))
        save_nifti(derivative / f"sub-00/anat/sub-00_run-{run}_seg-aseg_dseg.nii.gz", head(0))
    (one,) = refused_by_a_run(bids, derivative, base, monkeypatch, multi_run="first")
    assert one.name == "sub-00_run-2_T1w"
    assert one.what == "--multi-run first: sub-00_run-1_T1w.nii.gz was taken"
    assert one.hint == "use --multi-run each for every run"
