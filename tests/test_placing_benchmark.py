"""How far off the place is where a model sees the brain."""

from __future__ import annotations

import numpy as np
import pytest

from tests import toy
from tests.scripts import load_benchmark
from tlseg_bids.segment.model import Models


def test_the_distance_is_that_of_the_structures_in_mm(tmp_path):
    benchmark = load_benchmark("placing")
    toy.write_scan(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    model = Models().get(toy.write_toy_model(tmp_path / "models"), "cpu")
    shifted = np.eye(4)
    located, settled = benchmark.distances(tmp_path, "01", "T1w", model, shifted)
    shifted[:3, 3] = 300, 400, 0
    far = benchmark.distances(tmp_path, "01", "T1w", model, shifted)
    assert far == pytest.approx([500, 500], abs=20)
    assert located < 20 and settled < 20


def test_without_a_card_it_says_what_it_is(capsys):
    assert load_benchmark("placing").main(["DATA"]) == 64
    assert "How far off the place is" in capsys.readouterr().err
