"""Standard spaces: what is asked for, where the template lies, and labels on its grid."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.cards import write_model
from tests.datasets import config, made_up_job, made_up_segmentation, make_dataset
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.names import in_standard_space
from tlseg_bids.bids.spaces import Space, find_template_file, parse_space
from tlseg_bids.bids.validate import find_validator
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.bids.xfm import write_xfm
from tlseg_bids.cli.evaluate import label_files
from tlseg_bids.cli.run import main
from tlseg_bids.errors import NoInputError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.plan import make_plan
from tlseg_bids.report.derivatives import labelled_scans
from tlseg_bids.volume import Grid

NAME = "MNI152NLin2009cAsym"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NAME, [{"space": NAME}]),
        (f"{NAME}:res-2", [{"space": NAME, "res": "2"}]),
        (f"{NAME}:res-02", [{"space": NAME, "res": "2"}]),
        ("MNIInfant:cohort-1:cohort-2", [{"space": "MNIInfant+1"}, {"space": "MNIInfant+2"}]),
    ],
)
def test_the_grammar_is_templateflows(text: str, expected: list[dict]) -> None:
    assert [space.entities for space in parse_space(text)] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere", '"nowhere" is invalid'),
        ("MNIInfant", "not fully defined. Set a valid cohort"),
        ("fsaverage", "'fsaverage' is no volumetric template"),
        ("T1w", "'T1w' is no volumetric template; labels on the scan's own grid are always"),
        (f"{NAME}:den-2", "labels know no 'den'"),
    ],
)
def test_what_is_no_space_is_refused_with_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_space(text)


def test_a_template_that_is_not_here_is_named_with_what_to_do(tmp_path, monkeypatch) -> None:
    from templateflow import api

    empty = tmp_path / f"tpl-{NAME}" / f"tpl-{NAME}_res-02_T1w.nii.gz"
    empty.parent.mkdir()
    empty.touch()
    monkeypatch.setattr(api, "ls", lambda *_, **__: [empty])

    def lost(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(api, "get", lost)
    space = parse_space(f"{NAME}:res-2")[0]
    with pytest.raises(NoInputError, match=r"not on this machine and --offline forbids") as caught:
        find_template_file(space, offline=True)
    assert f"templateflow get {NAME}" in caught.value.hint
    assert "TEMPLATEFLOW_HOME" in caught.value.hint
    with pytest.raises(NoInputError, match=r"it cannot be fetched \(ConnectionError\)"):
        find_template_file(space, offline=False)
    empty.write_bytes(b"x")
    assert find_template_file(space, offline=True) == empty
    monkeypatch.setattr(api, "ls", lambda *_, **__: [])
    with pytest.raises(NoInputError, match=f"no T1w for '{NAME}:res-2'"):
        find_template_file(space, offline=True)


@pytest.fixture
def out(tmp_path):
    """A scan whose labels were written on the grid of a made-up template too."""
    raw = make_dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T1w.nii.gz"])
    (scan,), _ = discover(config(raw))
    template = tmp_path / f"tpl-{NAME}" / f"tpl-{NAME}_res-02_T1w.nii.gz"
    template.parent.mkdir()
    shutil.copyfile(scan.path, template)
    space = Space(NAME, res="2", file=template)
    job = dataclasses.replace(made_up_job(scan), spaces=(space,))
    outputs = Derivatives(tmp_path / "out", raw)
    outputs.write_root([job.card], {"aseg": load_protocol("aseg").table})
    found = made_up_segmentation(scan)
    outputs.write_space(job, 0, found, np.eye(4))
    assert not outputs.finished(job)
    outputs.write_scan(job, found, {})
    assert outputs.finished(job)
    next(outputs.out_dir.rglob(f"*{NAME}_res-2_desc-brain_mask.json")).unlink()
    assert not outputs.finished(job)
    outputs.write_space(job, 0, found, np.eye(4))
    assert not outputs.paths(job).sidecar.exists()
    outputs.write_scan(job, found, {})
    return outputs.out_dir


def test_names_and_sidecar_in_a_standard_space(out) -> None:
    file = out / "sub-01" / "anat" / f"sub-01_space-{NAME}_seg-aseg_res-2_dseg.nii.gz"
    assert np.asanyarray(nib.load(file).dataobj).any()
    told = json.loads(file.with_name(file.name.replace(".nii.gz", ".json")).read_text())
    archive = "https://templateflow.s3.amazonaws.com"
    assert told["SpatialReference"] == f"{archive}/tpl-{NAME}/tpl-{NAME}_res-02_T1w.nii.gz"
    assert told["TemplateFromScan"] == np.eye(4).tolist()
    assert told["Resolution"] == f"That of {NAME}:res-2"


def test_the_way_to_a_template_is_written_as_itk_reads_it(tmp_path) -> None:
    linear = pytest.importorskip("nitransforms.linear")
    matrix = np.array([[1.1, 0.1, 0, 5], [-0.1, 0.9, 0.2, -7], [0, -0.2, 1.2, 30], [0, 0, 0, 1.0]])
    path = write_xfm(tmp_path / "x_xfm.txt", matrix)
    read = linear.load(path, fmt="itk")
    np.testing.assert_allclose(np.linalg.inv(np.squeeze(read.matrix)), matrix, atol=1e-7)
    points = np.array([[10.0, -20.0, 30.0]])
    there = points @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(read.map(there), points, atol=1e-6)  # a template's to the scan's


def test_a_template_has_one_way_whatever_its_resolutions(tmp_path) -> None:
    raw = make_dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T1w.nii.gz"])
    (scan,), _ = discover(config(raw))
    folder = tmp_path / f"tpl-{NAME}"
    folder.mkdir()
    files = [folder / f"tpl-{NAME}_res-0{n}_T1w.nii.gz" for n in (1, 2)]
    for file in files:
        shutil.copyfile(scan.path, file)
    spaces = tuple(Space(NAME, res=str(n), file=file) for n, file in enumerate(files, 1))
    job = dataclasses.replace(made_up_job(scan), spaces=spaces)
    outputs, found = Derivatives(tmp_path / "out", raw), made_up_segmentation(scan)
    moved = np.eye(4)
    moved[0, 3] = 2.0
    for number, matrix in enumerate((np.eye(4), moved)):
        outputs.write_space(job, number, found, matrix)
    outputs.write_scan(job, found, {})
    assert outputs.finished(job)
    (xfm,) = outputs.out_dir.rglob("*_xfm.txt")
    assert xfm.name == f"sub-01_from-T1w_to-{NAME}_mode-image_xfm.txt"
    assert "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0\n" in xfm.read_text().replace("-0", "0")
    told = json.loads(xfm.with_suffix(".json").read_text())
    assert told["TemplateFromScan"] == np.eye(4).tolist()
    outputs.write_scan(made_up_job(scan), found, {})
    assert not list(outputs.out_dir.rglob("*_xfm.*")), "it was not asked for again"


def test_the_t1w_takes_the_place_of_a_t2w_of_its_name(tmp_path) -> None:
    names = [f"sub-01/anat/sub-01_{suffix}.nii.gz" for suffix in ("T1w", "T2w")]
    raw = make_dataset(tmp_path / "raw", names)
    template = tmp_path / f"tpl-{NAME}" / "x_T1w.nii.gz"
    template.parent.mkdir()
    shutil.copyfile(raw / names[0], template)
    plain = {scan.suffix: made_up_job(scan, scan.suffix) for scan in discover(config(raw))[0]}
    spaced = {
        suffix: dataclasses.replace(job, spaces=(Space(NAME, file=template),))
        for suffix, job in plain.items()
    }
    outputs, found = Derivatives(tmp_path / "out", raw), made_up_segmentation(plain["T1w"].scan)
    outputs.write_scan(plain["T1w"], found, {})
    outputs.write_space(spaced["T2w"], 0, found, np.eye(4))
    outputs.write_scan(spaced["T2w"], found, {})
    assert outputs.finished(plain["T1w"])
    assert not outputs.finished(spaced["T1w"])
    outputs.write_space(spaced["T1w"], 0, found, np.eye(4))
    outputs.write_scan(spaced["T1w"], found, {})
    assert outputs.finished(spaced["T1w"])
    assert outputs.finished(plain["T2w"])
    outputs.write_scan(plain["T2w"], found, {})  # takes nothing of the T1w away
    assert outputs.finished(spaced["T1w"])
    outputs.write_scan(plain["T1w"], found, {})
    assert not [path for path in outputs.out_dir.rglob("*") if in_standard_space(path)]


def test_reports_tables_and_scores_keep_to_the_grid_of_the_scan(out) -> None:
    scans, failed = labelled_scans(out, "01")
    assert [scan.entities["space"] for scan in scans] == ["T1w"]
    assert not failed
    assert [file.name for file in label_files(out)] == ["sub-01_space-T1w_seg-aseg_dseg.nii.gz"]
    assert not in_standard_space(Path("sub-01_seg-x_dseg.nii.gz"))
    assert not in_standard_space(Path("sub-01_space-orig_seg-x_dseg.nii.gz"))
    assert in_standard_space(Path("sub-01_space-MNIInfant+2_seg-x_dseg.nii.gz"))


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_accepts_it(out) -> None:
    answer = subprocess.run(
        [find_validator(), str(out), "--json", "--ignoreWarnings"], capture_output=True, check=False
    )
    issues = json.loads(answer.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_of_a_t1w_and_its_t2w_the_t1w_names_the_standard_space(tmp_path, monkeypatch) -> None:
    names = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz",
             "sub-02/anat/sub-02_T2w.nii.gz"]  # fmt: skip
    raw = make_dataset(tmp_path / "raw", names)
    twice = (f"{NAME}:res-2", f"{NAME}:res-02")
    asked = dataclasses.replace(config(raw), output_spaces=twice, device="cpu")
    file = tmp_path / "template.nii.gz"
    monkeypatch.setattr("tlseg_bids.plan.make.find_template_file", lambda *_: file)
    grid = Grid((64, 64, 64), np.eye(4))
    monkeypatch.setattr("tlseg_bids.plan.make.load_grid", lambda _: (grid, ()))
    scans, unusable = discover(asked)
    card = write_model(tmp_path / "models")
    plan = make_plan(scans, unusable, (card,), asked, "1")
    named = {job.scan.path.name: [str(space) for space in job.spaces] for job in plan.jobs}
    wanted = [f"{NAME}:res-2"]
    assert named == {
        "sub-01_T1w.nii.gz": wanted, "sub-01_T2w.nii.gz": [], "sub-02_T2w.nii.gz": wanted,
    }  # fmt: skip
    assert {space.file for job in plan.jobs for space in job.spaces} == {file}


def test_a_dry_run_tells_of_a_template_that_is_missing_and_fetches_none(
    tmp_path, monkeypatch, capsys
) -> None:
    from templateflow import api

    empty = tmp_path / f"tpl-{NAME}_res-02_T1w.nii.gz"
    empty.touch()
    monkeypatch.setattr(api, "ls", lambda *_, **__: [empty])
    monkeypatch.setattr(api, "get", lambda *_, **__: pytest.fail("fetched"))
    make_dataset(tmp_path / "raw")
    words = [str(tmp_path / "raw"), str(tmp_path / "out"), "participant", "--dry-run",
             "--device", "cpu", "--output-spaces", f"{NAME}:res-2"]  # fmt: skip
    assert main([*words, "--offline"]) == NoInputError.exit_code == 66
    said = capsys.readouterr().err
    assert f"the template '{NAME}:res-2' is not on this machine and --offline forbids" in said
    assert main(words) == 0
    monkeypatch.setattr(api, "ls", lambda *_, **__: [])
    assert main(words) == 66
    assert f"TemplateFlow has no T1w for '{NAME}:res-2'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_template_that_the_image_cannot_get_is_named_and_left_out(monkeypatch, capsys) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "container" / "templates.py"))

    def find(space: Space, offline: bool) -> Path:
        assert not offline
        if space.name == NAME:
            return Path("here.nii.gz")
        raise NoInputError("the template is lost", "there", "look elsewhere")

    monkeypatch.setitem(script["main"].__globals__, "find_template_file", find)
    script["main"]([NAME, "MNIInfant:cohort-1"])
    said = capsys.readouterr()
    assert f"{NAME}: here.nii.gz" in said.out
    assert said.err == "left out: the template is lost – there – look elsewhere\n"
