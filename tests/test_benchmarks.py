"""The acceptance check finds what it is there to find."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tlseg_bids.labels.protocol import load_protocol

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def acceptance() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "acceptance", ROOT / "benchmarks" / "acceptance.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
