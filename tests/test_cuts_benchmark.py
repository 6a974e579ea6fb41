"""The benchmark that lets scans end inside the brain."""

import numpy as np
import pytest

from tests import toy
from tests.scripts import load_benchmark
from tlseg_bids.segment.model import Models
from tlseg_bids.volume import Grid, Volume


@pytest.mark.parametrize(("end", "kept"), [("bottom", (5, 20)), ("top", (0, 11))])
@pytest.mark.parametrize("up", [True, False])
def test_slices_go_from_the_end_that_was_asked_for_and_no_voxel_moves(end, kept, up):
    """A head in slices 3 to 12 of 20, counted from below, of 4 mm: 8 mm are two slices of it."""
    data = np.zeros((6, 5, 20), np.float32)
    data[2:4, 2:4, 3:13] = 1 + np.arange(10)
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    affine[:3, 3] = 10, 20, -30
    if not up:
        affine = affine @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 19], [0, 0, 0, 1]]
        data = data[..., ::-1].copy()
    scan = Volume(data, Grid(data.shape, affine))
    part = load_benchmark("cuts").cut(scan, end, 8.0)
    below, above = kept
    assert part.grid.shape == (6, 5, above - below) == part.data.shape
    places = np.linalg.inv(scan.grid.affine) @ part.grid.affine
    first = below if up else 20 - above
    np.testing.assert_allclose(places[:3, 3], [0, 0, first], atol=1e-9)
    np.testing.assert_array_equal(part.data, data[..., first : first + above - below])


def test_a_line_for_every_cut(tmp_path, capsys, monkeypatch):
    benchmark = load_benchmark("cuts")
    monkeypatch.setattr(benchmark, "CUTS", (("top", 4), ("bottom", 2000)))
    path = tmp_path / "sub-01_T1w.nii.gz"
    toy.write_scan(path)
    card = toy.write_toy_model(tmp_path / "models").path
    assert benchmark.main([str(card), str(path)]) == 0
    told = capsys.readouterr()
    assert "| 4 mm at the top | 1 | " in told.out
    assert "| 2000 mm at the bottom | 0 |" in told.out and "sub-01_T1w.nii.gz" in told.err


def test_the_blind_model_takes_structures_as_whole(tmp_path):
    model = Models().get(toy.write_toy_model(tmp_path), "cpu")
    blind = load_benchmark("cuts").blinded(model)
    assert model.landmarks.atlas is not None and blind.landmarks.atlas is None
    np.testing.assert_array_equal(blind.landmarks.centroids, model.template)
