"""Label maps painted as scans, and two models compared on them."""

from __future__ import annotations

from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from heads import write_heads

from tests.scripts import load_benchmark
from tlseg_bids.labels.protocol import load_protocol


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("painted")


def test_a_painted_scan_is_a_stripped_t1w_on_the_grid_of_its_labels(benchmark, tmp_path, capsys):
    data, out = write_heads(tmp_path / "data") / "balls", tmp_path / "out"
    assert benchmark.main([str(data), str(out)]) == 0
    scans = sorted(out.glob("sub-*/anat/*_T1w.nii.gz"))
    assert capsys.readouterr().out == f"{len(scans)} scans in {out}\n"
    assert len(scans) == len(list(data.glob("sub-*"))) > 0
    image = nib.load(scans[0])
    labels = nib.load(next(out.glob(f"derivatives/labels/{scans[0].parts[-3]}/anat/*dseg.nii.gz")))
    source = nib.load(next(data.glob(f"{scans[0].parts[-3]}/**/*dseg.nii.gz")))
    assert image.shape == labels.shape == source.shape
    assert np.allclose(image.affine, source.affine)
    found, known = np.asarray(labels.dataobj), np.asarray(source.dataobj)
    assert set(np.unique(found)) <= {0, *load_protocol("aseg").table["index"]}
    assert (found[found > 0] == known[found > 0]).all()
    assert (image.get_fdata()[known == 0] == 0).mean() > 0.9, "what is outside was stripped"


def test_the_scans_with_the_widest_ventricles_are_told_apart(benchmark, tmp_path, capsys):
    rows = []
    for scan, (ventricle, before, after) in enumerate(
        [(9, 0.5, 0.7), (1, 0.8, 0.7), (2, 0.8, 0.8)]
    ):
        for name, deep, volume in (
            ("Left lateral ventricle", 0, ventricle),
            ("Left thalamus", 1, 20),
        ):
            rows.append((f"sub-{scan}_seg-aseg_dseg.nii.gz", name, deep, volume, before, after))
    columns = ["predicted", "name", "subcortical14", "reference_mm3", "before", "after"]
    table, paths = pd.DataFrame(rows, columns=columns), []
    for which in ("before", "after"):
        paths.append(tmp_path / f"{which}.tsv")
        table.assign(dice=table[which]).to_csv(paths[-1], sep="\t", index=False)
    assert benchmark.main(["compare", *map(str, paths)]) == 0
    wide, _, others, every = capsys.readouterr().out.splitlines()
    assert wide == ("widest ventricles, 1 scans, Dice of 14: 0.500 ± nan, 0.700 ± nan, "
                    "+0.2000 ± nan")  # fmt: skip
    assert others == ("others, 2 scans, Dice of 14: 0.800 ± 0.000, 0.750 ± 0.071, "
                      "-0.0500 ± 0.0707")  # fmt: skip
    assert every.startswith("others, 2 scans, Dice of all: 0.800")


def test_tables_of_different_scans_are_refused(benchmark):
    one, other = (
        pd.DataFrame({"ventricle": [1.0, 1.0]}, index=i) for i in (["a", "b"], ["a", "c"])
    )
    with pytest.raises(SystemExit, match="b, c: in one of the two tables only; label and score"):
        benchmark.compare(one, other)
