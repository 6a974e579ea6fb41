"""The dataset of `make demo` is BIDS, and holds nilearn's template unchanged in place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import load_mni152_template

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "bids"
    subprocess.run((sys.executable, ROOT / "docs" / "demo.py", folder), check=True)
    return folder / "sub-MNI152" / "anat" / "sub-MNI152_T1w.nii.gz"


def test_the_scan_lies_where_the_template_lies(scan: Path) -> None:
    written, template = nib.load(scan), load_mni152_template(resolution=1)
    assert written.shape == template.shape
    assert np.array_equal(written.get_sform(), template.affine)
    assert np.allclose(written.get_qform(), template.affine)
    assert np.allclose(written.get_fdata() / 1000, template.get_fdata(), atol=5e-4)


def test_the_validator_finds_no_error(scan: Path) -> None:
    program = Path(sys.executable).with_name("bids-validator-deno")
    if not program.is_file() and shutil.which(program.name) is None:
        pytest.skip("bids-validator-deno is not installed")
    answer = subprocess.run(
        (program if program.is_file() else program.name, "--format", "json", scan.parents[2]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    issues = json.loads(answer.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_a_dataset_that_is_there_is_left_alone(scan: Path) -> None:
    before = scan.stat().st_mtime_ns
    subprocess.run((sys.executable, ROOT / "docs" / "demo.py", scan.parents[2]), check=True)
    assert scan.stat().st_mtime_ns == before


def test_a_missing_folder_is_asked_for() -> None:
    answer = subprocess.run(
        (sys.executable, ROOT / "docs" / "demo.py"), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert answer.stderr.strip() == "usage: python docs/demo.py FOLDER"
