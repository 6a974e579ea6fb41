"""Each fault once: nothing lost, nothing half written, and a second run completes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load_benchmark

ROOT = Path(__file__).resolve().parents[1]


faults = load_benchmark("faults")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two toy heads, labelled once without a fault."""
    return faults.prepared(tmp_path_factory.mktemp("faults"), 2)


@pytest.mark.parametrize("name", list(faults.FAULTS))
def test_nothing_is_lost_and_the_next_run_completes(place, name):
    _, problems = faults.once(place, faults.FAULTS[name][1], np.random.default_rng(5))
    assert problems == []


def test_a_half_written_file_would_be_seen(place):
    assert faults.broken(place.out) == []
    dseg = next(place.out.glob("sub-00/anat/*_dseg.nii.gz"))
    content = dseg.read_bytes()
    dseg.write_bytes(content[:-100])
    assert faults.broken(place.out) == [str(dseg.relative_to(place.out))]
    dseg.write_bytes(content)


def test_the_same_scan_gives_the_same_bytes(place):
    found = faults.fingerprint(place.out, faults.DATA)
    assert found == place.reference
    assert len(found) == 1 + 3 * place.scans
