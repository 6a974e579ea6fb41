"""The whole program on a real scan: MNI152, 2 mm, as it ships inside nilearn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.scripts import load_benchmark
from tlseg_bids import __version__
from tlseg_bids.bids.validate import find_validator
from tlseg_bids.cli.run import main
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.zoo.registry import load_cards

DESCRIPTION = {"Name": "MNI152", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
README = "The average brain of 152 adults, at 2 mm, as a dataset for tests. " * 4
PROTOCOL = load_protocol("aseg")


def mni152() -> nib.Nifti1Image:
    """MNI152 T1w at 2 mm, int16."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=2)
    data = np.rint(np.asarray(image.dataobj, np.float32) * 1000).astype(np.int16)
    scan = nib.Nifti1Image(data, image.affine)
    scan.header.set_xyzt_units("mm", "sec")
    return scan


@pytest.fixture(scope="session")
def brain() -> nib.Nifti1Image:
    """The scan of `mni152`."""
    return mni152()


def add_scan(root: Path, subject: str, image: nib.Nifti1Image, name: str = "T1w") -> Path:
    """Put an image into a dataset; the dataset is made if there is none."""
    path = root / f"sub-{subject}" / "anat" / f"sub-{subject}_{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    if not (root / "README").exists():
        (root / "dataset_description.json").write_text(json.dumps(DESCRIPTION))
        (root / "README").write_text(README)
    return path


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file."""
    return {
        str(p.relative_to(root)): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in sorted(root.rglob("*"))
        if not p.is_dir()
    }


def run(*words: object) -> int:
    """The program in this process."""
    return main([str(word) for word in words])


def labels_of(out: Path, subject: str) -> nib.Nifti1Image:
    """The label map of a subject's T1w."""
    return nib.load(
        out / f"sub-{subject}" / "anat" / f"sub-{subject}_space-T1w_seg-aseg_dseg.nii.gz"
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, brain) -> tuple[Path, Path]:
    """A dataset of one scan and what the program made of it."""
    root = tmp_path_factory.mktemp("whole")
    add_scan(root / "bids", "01", brain)
    (root / "bids" / "participants.tsv").write_text("participant_id\tage\nsub-01\t25\n")
    before = snapshot(root / "bids")
    assert run(root / "bids", root / "out", "participant") == 0
    assert snapshot(root / "bids") == before
    return root / "bids", root / "out"


def test_labels_lie_on_the_scans_own_grid(finished, brain):
    found = labels_of(finished[1], "01")
    assert found.shape == brain.shape
    np.testing.assert_array_equal(found.affine, brain.affine)
    assert set(np.unique(found.dataobj)) <= set(PROTOCOL.indices.tolist())


def test_a_model_of_two_protocols_labels_in_the_second_where_it_is_asked(finished, tmp_path):
    bids, out = finished
    words = (bids, tmp_path / "out", "participant", "--model", "adult-t1w")
    assert run(*words, "--protocol", "aseg") == 0
    found, other = (np.asarray(labels_of(place, "01").dataobj) for place in (tmp_path / "out", out))
    for index in (10, 49, 12, 51, 2, 3, 16):  # thalamus, putamen, white matter, cortex, brain stem
        both = 2 * ((found == index) & (other == index)).sum()
        assert both / ((found == index).sum() + (other == index).sum()) > 0.8, index
    assert not list((tmp_path / "out").rglob("*braincolor*"))
    page = (tmp_path / "out" / "sub-01.html").read_text()
    assert "gives the labels of the protocol &#39;aseg&#39;" in page
    assert (
        "gives the labels of the protocol 'aseg'"
        in (tmp_path / "out" / "logs" / "CITATION.md").read_text()
    )
    assert run(*words) == 0
    assert {p.name for p in (tmp_path / "out" / "sub-01" / "anat").glob("*_seg-*_dseg.nii.gz")} == {
        f"sub-01_space-T1w_seg-{name}_dseg.nii.gz" for name in ("aseg", "braincolor")
    }


def test_every_structure_is_there_and_of_a_plausible_size(finished):
    _, out = finished
    table = pd.read_csv(
        next(out.glob("sub-01/anat/*_desc-volumes_dseg.tsv")), sep="\t", index_col="index"
    )
    assert list(table.index) == PROTOCOL.indices[1:].tolist() or len(table) == len(PROTOCOL)
    litres = table["hard_mm3"].drop(0, errors="ignore").sum() / 1e6
    assert 1.2 < litres < 2.4
    for left, right in PROTOCOL.pairs():
        a, b = table.loc[left, "hard_mm3"], table.loc[right, "hard_mm3"]
        assert a > 0
        assert b > 0
        assert abs(a - b) / ((a + b) / 2) < 0.3, (left, a, b)


def test_the_labels_are_those_of_the_golden_set(finished):
    golden = load_benchmark("golden")
    labels, volumes, sha256 = golden.read_golden()
    assert golden.differences(golden.read_run(finished[1]), (labels, volumes, sha256)) == [], (
        "if the change is meant: python benchmarks/golden.py, and a line under Numbers"
    )
    swapped = volumes.rename(index={10: 49, 49: 10})
    assert golden.differences((labels[::-1], swapped, sha256), (labels, volumes, sha256))
    (said,) = golden.differences((labels, volumes, "0" * 64), (labels, volumes, sha256))
    assert said.startswith("the weights are 000000000000, those of the golden set ")


def test_left_is_left(finished):
    found = labels_of(finished[1], "01")
    data = np.asarray(found.dataobj)
    for left, right in PROTOCOL.pairs():
        x = [found.affine[0] @ [*np.argwhere(data == i).mean(0), 1] for i in (left, right)]
        assert x[0] < 0 < x[1], (left, right)


def test_the_order_of_the_axes_does_not_matter(finished, brain, tmp_path):
    bids, out = tmp_path / "bids", tmp_path / "out"
    codes = ("LAS", "PSR", "IAL")
    for code in codes:
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(brain.affine), nib.orientations.axcodes2ornt(code)
        )
        add_scan(bids, code, brain.as_reoriented(turn))
    assert run(bids, out, "participant", "--skip-bids-validation") == 0
    straight = np.asarray(nib.as_closest_canonical(labels_of(finished[1], "01")).dataobj)
    for code in codes:
        found = labels_of(out, code)
        assert "".join(nib.aff2axcodes(found.affine)) == code
        turned = np.asarray(nib.as_closest_canonical(found).dataobj)
        assert np.mean(turned[straight > 0] == straight[straight > 0]) > 0.97


def test_labels_land_on_the_structures_of_a_template(finished, brain, tmp_path, monkeypatch):
    """The template is the scan itself, turned by 10° and moved, so that its labels are known."""
    bids, out = finished[0], tmp_path / "out"
    name = "tpl-MNI152NLin2009cAsym"
    template = tmp_path / name / f"{name}_res-02_T1w.nii.gz"
    template.parent.mkdir()
    c, s = np.cos(np.radians(10)), np.sin(np.radians(10))
    moved = np.array([[1, 0, 0, 7], [0, c, -s, -11], [0, s, c, 5], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.asarray(brain.dataobj), moved @ brain.affine), template)
    monkeypatch.setattr("tlseg_bids.plan.make.find_template_file", lambda *_: template)
    options = ("--skip-bids-validation", "--output-spaces", "MNI152NLin2009cAsym:res-2")
    assert run(bids, out, "participant", *options) == 0
    found = nib.load(next(out.rglob("*_space-MNI152NLin2009cAsym_seg-aseg_res-2_dseg.nii.gz")))
    np.testing.assert_array_equal(found.affine, nib.load(template).affine)
    there, here = np.asarray(found.dataobj), np.asarray(labels_of(out, "01").dataobj)
    assert np.mean(there[here > 0] == here[here > 0]) > 0.9


def test_the_sidecar_tells_where_the_labels_come_from(finished):
    _, out = finished
    sidecar = json.loads(next(out.glob("sub-01/anat/*_seg-aseg_dseg.json")).read_text())
    assert sidecar["Model"]["Name"] == "any"
    assert len(sidecar["Model"]["Sha256"]) == 64
    assert sidecar["Sources"] == ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]
    assert sidecar["SkullStripped"] is True
    assert sidecar["ProgramVersion"] == __version__
    assert sidecar["Command"].startswith("tlseg ")
    assert sidecar["Seconds"]["label"] > 0


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_finds_no_error_in_the_output(finished):
    said = subprocess.run(
        [find_validator(), str(finished[1]), "--json", "--ignoreWarnings"],
        capture_output=True, check=False,
    )  # fmt: skip
    issues = json.loads(said.stdout)["issues"]["issues"]
    assert [i for i in issues if i.get("severity") == "error"] == []


def test_a_second_run_reuses_the_scan(finished, capsys):
    bids, out = finished
    stamp = next(out.glob("sub-01/anat/*_dseg.nii.gz")).stat().st_mtime_ns
    assert run(bids, out, "participant", "--skip-bids-validation") == 0
    assert next(out.glob("sub-01/anat/*_dseg.nii.gz")).stat().st_mtime_ns == stamp
    assert "reused" in capsys.readouterr().err


def test_a_second_run_cites_the_models_of_the_first_too(finished, tmp_path):
    bids, out = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    description = json.loads((copy / "dataset_description.json").read_text())
    other = next(card for card in load_cards() if card.name == "infant")
    description["GeneratedBy"].append({
        "Name": "model infant", "Version": other.version,
        "Description": f"weights with sha256 {other.weights.sha256}, {other.weights.licence}",
    })  # fmt: skip
    replaced = {**description["GeneratedBy"][-1], "Version": "0.0.1"}
    description["GeneratedBy"] += [replaced, {"Name": "tlseg", "Version": "0.0.7"}]
    (copy / "dataset_description.json").write_text(json.dumps(description))
    labels = copy / "sub-09" / "anat" / "sub-09_space-T1w_seg-infant_dseg.json"
    labels.parent.mkdir(parents=True)
    model = {"Name": "infant", "Version": other.version, "Sha256": other.weights.sha256}
    labels.write_text(json.dumps({"ProgramVersion": __version__, "Model": model}))
    assert run(bids, copy, "participant", "--skip-bids-validation") == 0
    text = (copy / "logs" / "CITATION.md").read_text()
    assert "model 'any' (version" in text and "model 'infant' (version" in text
    assert "0.0.1" not in text and "0.0.7" not in text
    after = json.loads((copy / "dataset_description.json").read_text())["GeneratedBy"]
    assert [(one["Name"], one["Version"]) for one in after][-1] == ("model infant", other.version)
    assert len(after) == 3


def test_the_plan_alone_writes_nothing(finished, tmp_path, capsys):
    bids, _ = finished
    assert run(bids, tmp_path / "out", "participant", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "sub-01/anat/sub-01_T1w.nii.gz" in said
    assert "any" in said
    assert not (tmp_path / "out").exists()


def test_bad_scans_do_not_stop_the_good_one(tmp_path, brain, capsys):
    bids, out = tmp_path / "bids", tmp_path / "out"
    add_scan(bids, "good", brain)
    data = np.asarray(brain.dataobj)
    path = add_scan(bids, "cut", brain)
    path.write_bytes(path.read_bytes()[:20_000])
    add_scan(bids, "four", nib.Nifti1Image(np.stack([data, data], -1), brain.affine))
    broken = data.astype(np.float32)
    broken[40:50, 40:50, 40:50] = np.nan
    add_scan(bids, "nan", nib.Nifti1Image(broken, brain.affine))
    add_scan(bids, "empty", nib.Nifti1Image(np.zeros_like(data), brain.affine))
    add_scan(bids, "noise", nib.Nifti1Image(
        np.random.default_rng(0).normal(500, 100, data.shape).astype(np.int16), brain.affine
    ))  # fmt: skip
    link = bids / "sub-link" / "anat" / "sub-link_T1w.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../.git/annex/objects/gone.nii.gz")
    (bids / "participants.tsv").write_text("participant_id\tage\nsub-good\tn/a\n")

    assert run(bids, out, "participant", "--skip-bids-validation") == 1

    assert labels_of(out, "good").shape == brain.shape
    status = pd.read_csv(next((out / "logs").glob("status_*.tsv")), sep="\t", dtype=str)
    status = status.set_index(status["scan"].str.extract(r"sub-(\w+)/", expand=False))
    expected = {
        "cut": ("truncated|cannot be read|read to its end", "copy|datalad get"),
        "four": ("4 dimensions", "keep one volume"),
        "nan": ("1000 of .* voxels are NaN", "repair"),
        "empty": ("every voxel is 0", "export it again"),
        "noise": ("no brain found|what was labelled", "orientation"),
        "link": ("not on this machine", "datalad get"),
    }
    assert status.loc["good", "status"] == "done"
    for subject, (what, hint) in expected.items():
        assert status.loc[subject, "status"] == "failed"
        assert pd.Series([status.loc[subject, "error"]]).str.contains(what)[0], subject
        assert pd.Series([status.loc[subject, "hint"]]).str.contains(hint)[0], subject
        assert (out / f"sub-{subject}.html").is_file()
    warnings = json.loads(next(out.glob("sub-good/anat/*_seg-aseg_dseg.json")).read_text())
    assert any("age" in line for line in warnings["Warnings"])
    assert "[7/7]" in capsys.readouterr().err


def test_stop_on_first_crash_leaves_the_rest_untried(tmp_path, brain):
    bids, out = tmp_path / "bids", tmp_path / "out"
    broken = np.asarray(brain.dataobj, np.float32).copy()
    broken[0, 0, 0] = np.inf
    add_scan(bids, "01", nib.Nifti1Image(broken, brain.affine))
    add_scan(bids, "02", brain)
    words = ("--skip-bids-validation", "--stop-on-first-crash", "--nprocs", "1")
    assert run(bids, out, "participant", *words) == 1
    status = pd.read_csv(next((out / "logs").glob("status_*.tsv")), sep="\t")
    assert status["status"].tolist() == ["failed", "failed"]
    assert status["error"].tolist()[1] == "not tried"
    assert "--stop-on-first-crash" in status["hint"].tolist()[1]


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next_one(tmp_path, brain):
    bids, out = tmp_path / "bids", tmp_path / "out"
    for subject in ("01", "02", "03"):
        add_scan(bids, subject, brain)
    command = [
        sys.executable, "-m", "tlseg_bids.cli.run", str(bids), str(out), "participant",
        "--skip-bids-validation",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("sub-01/anat/*_seg-aseg_dseg.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "sub-03.html").exists()

    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0

    latest = max((out / "logs").glob("status_*.tsv"), key=lambda p: p.stat().st_mtime_ns)
    status = pd.read_csv(latest, sep="\t")
    assert status["status"].tolist()[0] == "reused"
    assert status["status"].tolist()[2] == "done"
    for subject in ("01", "02", "03"):
        assert labels_of(out, subject).shape == brain.shape
        assert (out / f"sub-{subject}.html").is_file()
    assert not list(out.rglob("*.part"))


def test_probabilities_are_written_on_request(tmp_path, brain):
    bids, out = tmp_path / "bids", tmp_path / "out"
    add_scan(bids, "01", brain)
    assert run(bids, out, "participant", "--skip-bids-validation", "--probabilities") == 0
    maps = nib.load(next(out.glob("sub-01/anat/*_seg-aseg_probseg.nii.gz")))
    assert maps.shape == (*brain.shape, len(PROTOCOL) - 1)
    total = np.asarray(maps.dataobj, np.float32).sum(-1)
    inside = np.asarray(labels_of(out, "01").dataobj) > 0
    assert total.max() < 1.1
    assert np.median(total[inside]) > 0.9
    assert np.median(total[~inside]) < 0.01
    names = json.loads(next(out.glob("sub-01/anat/*_seg-aseg_probseg.json")).read_text())
    assert names["LabelMap"][0] == "Left cerebral white matter"


def test_reports_of_nothing_are_refused(finished, tmp_path, capsys):
    bids, _ = finished
    options = ("--reports-only", "--skip-bids-validation")
    assert run(bids, tmp_path / "out", "participant", *options) == 66
    said = capsys.readouterr().err
    assert f"there is nothing to report – {tmp_path / 'out'} – leave out --reports-only" in said
    assert not (tmp_path / "out").exists()


def test_reports_can_be_made_again(finished, tmp_path):
    bids, out = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "sub-01.html").unlink()
    description = json.loads((copy / "dataset_description.json").read_text())
    description["GeneratedBy"][0]["Version"] = "0.0.7"
    (copy / "dataset_description.json").write_text(json.dumps(description))
    (copy / "logs" / "CITATION.md").write_text("of 0.0.7")
    assert run(bids, copy, "participant", "--reports-only", "--skip-bids-validation") == 0
    assert (copy / "sub-01.html").stat().st_size > 100_000
    again = json.loads((copy / "dataset_description.json").read_text())
    assert again["GeneratedBy"] == description["GeneratedBy"]
    assert (copy / "logs" / "CITATION.md").read_text() == "of 0.0.7"
