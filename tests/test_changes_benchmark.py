"""Measured changes of volume beside the true ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from tests.scripts import load_benchmark

ROWS = (
    ("sub-1", "Left thalamus", 40.0, 50.0), ("sub-1", "Right thalamus", 60.0, 50.0),
    ("sub-1", "Brain stem", 20.0, 20.0), ("sub-2", "Left thalamus", 100.0, 100.0),
    ("sub-2", "Brain stem", 0.0, 20.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("changes")


def table(path: Path, measured: float = 1.0, true: float = 1.0) -> Path:
    rows = [
        (f"{person}_space-T1w_seg-aseg_dseg.nii.gz", name, predicted * measured, reference * true)
        for person, name, predicted, reference in ROWS
    ]
    columns = ["predicted", "name", "predicted_mm3", "reference_mm3"]
    pd.DataFrame(rows, columns=columns).to_csv(path, sep="\t", index=False)
    return path


def test_both_sides_count_together_and_what_is_not_found_is_left_out(benchmark, tmp_path):
    before = benchmark.volumes(table(tmp_path / "before.tsv"))
    assert before.loc[("sub-1", "thalamus"), "predicted_mm3"] == 100
    found = benchmark.changes(before, benchmark.volumes(table(tmp_path / "a.tsv", 0.9, 0.8)))
    assert list(found.index) == [("sub-1", "brain stem"), ("sub-1", "thalamus"),
                                 ("sub-2", "thalamus")]  # fmt: skip
    assert np.allclose(found["true"], np.log(0.8))
    assert np.allclose(found["error"], np.log(0.9 / 0.8))


def test_a_line_for_each_structure_and_one_for_all(benchmark, tmp_path, capsys):
    before, after = table(tmp_path / "before.tsv"), table(tmp_path / "after.tsv", 0.9, 0.8)
    assert benchmark.main([str(before), str(after)]) == 0
    head, stem, thalamus, every = capsys.readouterr().out.splitlines()
    assert head == f"{after}, 2 persons:"
    assert stem == "  brain stem: 0.800, measured 0.900 (+12.5 ± nan %)", "of one person"
    assert thalamus == "  thalamus: 0.800, measured 0.900 (+12.5 ± 0.0 %)"
    assert every == "  mean absolute error of the log ratio 0.118, of no change 0.223"
