"""The acceptance check finds what it is there to find."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.scripts import load_benchmark
from tlseg_bids.labels.protocol import load_protocol

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def acceptance() -> ModuleType:
    return load_benchmark("acceptance")


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path]:
    """A scan and its labels, all paired structures alike."""
    scan = tmp_path / "bids" / "sub-1" / "anat" / "sub-1_run-2_T2w.nii.gz"
    dseg = tmp_path / "out" / "sub-1" / "anat" / "sub-1_run-2_space-T2w_seg-aseg_dseg.nii.gz"
    for path in (scan, dseg):
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1, 2, 3, 1])), path)
    table = load_protocol("aseg").table[["index", "name"]].assign(hard_mm3=100.0)
    table.to_csv(volumes(dseg), sep="\t", index=False)
    return scan, dseg


def volumes(dseg: Path) -> Path:
    return dseg.with_name(dseg.name.replace("_dseg.nii.gz", "_desc-volumes_dseg.tsv"))


def test_labels_are_found_and_good_ones_pass(
    acceptance: ModuleType, labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    scan, dseg = labelled
    assert acceptance.scans(tmp_path / "bids") == [scan]
    assert acceptance.labels_of(scan, tmp_path / "bids", tmp_path / "out") == dseg
    assert acceptance.problems_of(scan, dseg) == []


def test_missing_labels_are_noticed(acceptance: ModuleType, labelled: tuple[Path, Path]) -> None:
    assert acceptance.problems_of(labelled[0], None) == ["sub-1_run-2_T2w.nii.gz: no labels"]


def test_another_affine_is_noticed(acceptance: ModuleType, labelled: tuple[Path, Path]) -> None:
    scan, dseg = labelled
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1, 2, 3.001, 1])), dseg)
    (problem,) = acceptance.problems_of(scan, dseg)
    assert "shape or affine differ" in problem


@pytest.mark.parametrize(("right_mm3", "noticed"), [(130.0, False), (140.0, True), (0.0, True)])
def test_a_lopsided_pair_is_noticed(
    acceptance: ModuleType, labelled: tuple[Path, Path], right_mm3: float, noticed: bool
) -> None:
    scan, dseg = labelled
    left, right = load_protocol("aseg").pairs()[0]
    table = pd.read_csv(volumes(dseg), sep="\t")
    table.loc[table["index"] == right, "hard_mm3"] = right_mm3
    table.to_csv(volumes(dseg), sep="\t", index=False)
    problems = acceptance.problems_of(scan, dseg)
    assert problems == ([f"{dseg.name}: {left}/{right} are 100/{right_mm3:.0f} mm³"] * noticed)


def test_a_change_of_the_input_is_noticed(acceptance: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to("gone")
    before = acceptance.fingerprint(tmp_path)
    assert acceptance.fingerprint(tmp_path) == before
    (tmp_path / "a").write_text("2")
    assert acceptance.fingerprint(tmp_path) != before


def test_time_and_memory_of_a_command_are_measured(acceptance: ModuleType) -> None:
    hold = "import time; block = bytearray(300 * 2**20); time.sleep(0.6); raise SystemExit(7)"
    code, seconds, peak = acceptance.run([sys.executable, "-c", hold])
    assert code == 7
    assert 0.6 <= seconds < 30
    assert 0.29 < peak < 1.0


def test_the_volumes_of_one_person_are_compared(tmp_path: Path, capsys) -> None:
    table = load_protocol("aseg").table[["index", "name"]].assign(soft_mm3=4000.0)
    changed = table.assign(cut_share=0.005)
    changed.loc[changed["name"] == "Left thalamus", "soft_mm3"] = 6000.0
    changed.loc[changed["name"] == "Right putamen", "cut_share"] = 0.2
    changed.loc[changed["name"] == "Third ventricle", "soft_mm3"] = 100.0
    folder = tmp_path / "sub-1" / "anat"
    folder.mkdir(parents=True)
    for name, content in (
        ("sub-1_ses-1_space-T1w", table),
        ("sub-1_ses-1_space-T2w", table),
        ("sub-1_ses-2_space-T1w", changed),
        ("sub-1_ses-1_ce-gad_space-T1w", table),
        ("sub-2_ses-1_space-T1w", table),
    ):
        content.to_csv(folder / f"{name}_seg-aseg_desc-volumes_dseg.tsv", sep="\t", index=False)
        labels = np.zeros((8, 8, 8), np.uint8)
        labels[1:4, 1:7, 1:7] = 10
        labels[4, : 2 if "ce-gad" in name else 4] = 2  # half of it, and it is cut
        affine = np.diag([1, 1, 2 if "ses-2" in name else 1, 1])
        nib.save(nib.Nifti1Image(labels, affine), folder / f"{name}_seg-aseg_dseg.nii.gz")
    assert load_benchmark("repeat").main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    heads = [line for line in said if not line.startswith("  ")]
    assert [line.split(",")[0] for line in heads] == [
        "contrast agent", "two contrasts", "two visits",
    ]  # fmt: skip
    assert heads[0].endswith(", Dice 0.833, of the sub-cortical 1.000")
    visits = said[said.index(heads[2]) :]
    assert heads[2].endswith("largest +22.2 % (thalamus)")
    assert "  thalamus: 8.0 ml, +22.2 %" in visits
    assert "  cerebral white matter: 8.0 ml, +0.0 %, cut" in visits
    assert "  putamen: 8.0 ml, +0.0 %, cut" in visits
    assert "  putamen: 8.0 ml, +0.0 %" in said[said.index(heads[0]) : said.index(heads[1])]
    shares = [line for line in visits if line.startswith("  without the cut ones")]
    assert len(shares) == 1 and shares[0].endswith("largest 22.2 %")
    assert not any("third ventricle" in line for line in said)


# Registration ------------------------------------------------------------------------------------


def test_an_affine_of_itk_is_turned_round_and_into_ras() -> None:
    registration = load_benchmark("registration")
    turn = np.array([[0.0, -1.1, 0], [0.9, 0, 0], [0, 0, 1.2]])
    centre, shift = np.array([5.0, -3, 2]), np.array([1.0, 2, 3])
    there = registration.itk_matrix(turn, shift, centre)
    for point in np.eye(3) * 7:
        in_scan = turn @ (point - centre) + shift + centre
        ras = [np.append(p * (-1, -1, 1), 1) for p in (in_scan, point)]
        assert there @ ras[0] == pytest.approx(ras[1])


def test_labels_that_lie_on_each_other_agree_and_a_shifted_person_does_not() -> None:
    registration = load_benchmark("registration")
    labels = np.zeros((12, 12, 12), np.int16)
    for number, index in enumerate(registration.DEEP):
        labels[number % 12 : number % 12 + 2, number // 12 * 6 : number // 12 * 6 + 4, 2:8] = index
    maps = [labels, labels, labels, np.roll(labels, 6, axis=2)]
    alike = registration.agreement(maps)
    assert alike[:3] == pytest.approx([1, 1, 1])
    assert alike[3] == pytest.approx(0, abs=0.2)


# Growth of a study -------------------------------------------------------------------------------


def test_thirds_of_a_run_are_told_apart() -> None:
    study = load_benchmark("study")
    done = [0, 0, *range(1, 10)]
    seconds = [0.0, 5, *np.cumsum([1, 1, 1, 2, 2, 2, 4, 4, 4]) + 5.0]
    run = study.Run(9, seconds=seconds, gib=[1.0] * 8 + [3, 3, 2], done=done)
    assert run.third(last=False) == (pytest.approx(4 / 3), 1.0)
    assert run.third(last=True) == (pytest.approx(4.0), 3.0)


def test_a_study_links_to_its_scans_in_turn(tmp_path) -> None:
    study = load_benchmark("study")
    scans = [tmp_path / "a_T1w.nii.gz", tmp_path / "b_T2w.nii.gz"]
    for scan in scans:
        scan.touch()
    study.dataset(tmp_path / "bids", scans, 3)
    found = sorted((tmp_path / "bids").rglob("*.nii.gz"))
    assert [link.name for link in found] == [
        "sub-0000_T1w.nii.gz", "sub-0001_T2w.nii.gz", "sub-0002_T1w.nii.gz",
    ]  # fmt: skip
    assert [link.readlink() for link in found] == [scans[0], scans[1], scans[0]]


def test_memory_of_a_process_and_what_it_started_is_seen() -> None:
    study = load_benchmark("study")
    assert study.tree_gib(os.getpid()) > 0.05
    assert study.tree_gib(2**22 + 1) == 0  # no such process


def test_the_reports_after_the_last_scan_are_no_time_of_scans() -> None:
    watching = load_benchmark("load")
    seen = watching.Watched(seconds=[0.0, 1, 2, 3, 4, 50, 100], done=[0, 2, 4, 6, 8, 8, 8])
    assert watching.rate(seen, (0, 0.3)) == pytest.approx(0.5)
    assert watching.rate(seen, (0.7, 1)) == pytest.approx(0.5)


@pytest.mark.parametrize("words", [["--help"], ["no-such-folder"]])
@pytest.mark.parametrize("name", ["references", "golden"])
def test_what_writes_into_the_program_does_not_take_a_wrong_word_for_its_data(
    name: str, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert load_benchmark(name).main(words) == 64
    assert f"benchmarks/{name}.py" in capsys.readouterr().err
