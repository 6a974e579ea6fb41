"""A scan's work shared out over threads: order, bounds, errors, and the same numbers whatever the
number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.datasets import real_dataset
from tests.phantom import Phantom, grid_over
from tests.test_segment import CARD, DETAILED, tensors
from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.flow import Job, Prepared
from tlseg_bids.postprocess import to_native
from tlseg_bids.preprocess import geometry
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import load_model
from tlseg_bids.volume import Grid, Volume, load_scan
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import load_weights


@pytest.fixture(autouse=True)
def one_thread_an_operation() -> Iterator[None]:
    """As in the program."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_what_comes_back_is_in_the_order_of_the_pieces():
    def slow_first(number: int) -> int:
        time.sleep(0.02 * (4 - number))
        return number * number

    assert list(Crew(4).map(slow_first, range(5))) == [0, 1, 4, 9, 16]
    assert list(ALONE.map(slow_first, range(3))) == [0, 1, 4]


def test_pieces_are_computed_side_by_side():
    meeting = threading.Barrier(3, timeout=10)  # breaks unless three wait at once
    assert len(list(Crew(3).map(lambda _: meeting.wait(), range(6)))) == 6


def test_no_more_is_ahead_than_there_are_threads():
    begun: list[int] = []
    walk = Crew(2).map(lambda number: begun.append(number) or number, range(100))
    assert next(walk) == 0
    time.sleep(0.05)
    assert len(begun) <= 3
    walk.close()
    time.sleep(0.05)
    assert len(begun) <= 4  # what was waiting is dropped


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_piece_is_raised(threads):
    def fails(number: int) -> int:
        if number == 2:
            raise ValueError("the third piece")
        return number

    with pytest.raises(ValueError, match="the third piece"):
        list(Crew(threads).map(fails, range(50)))


WHOLE = replace(DETAILED, strategy={"name": "sliding", "window": 32})
HALF = replace(DETAILED, strategy={"name": "sliding", "window": [24, 32, 32], "halves": True})


@pytest.mark.parametrize("card", [WHOLE, HALF], ids=["one window", "halves"])
def test_the_sides_of_the_mirror_go_side_by_side_where_one_window_sees_all(card, monkeypatch):
    image = np.zeros((1, 32, 32, 32), np.float32)
    prepared = Prepared(
        torch.from_numpy(image), Grid((32, 32, 32), np.eye(4)), None, np.eye(4), True, ()
    )
    meeting = threading.Barrier(2, timeout=10)  # breaks unless two wait at once
    model = replace(load_model(card, tensors(card)), crew=Crew(2))
    body = model.networks["segmenter"].body

    def meet(*given):
        meeting.wait()
        return body(*given)

    monkeypatch.setattr(model.networks["segmenter"], "body", meet)
    segment(model, prepared, Ask(mirror=True))


@pytest.mark.parametrize(
    "card", [CARD, DETAILED, WHOLE, HALF], ids=["coarse", "fine", "one window", "halves"]
)
def test_labels_and_volumes_do_not_depend_on_the_number_of_threads(card, monkeypatch):
    monkeypatch.setattr("tlseg_bids.segment.fine._VOXELS_AT_ONCE", (16, 16))
    monkeypatch.setattr("tlseg_bids.postprocess.field._POINTS_PER_SLAB", (2**10,) * 2)
    certain = tensors(card)
    certain["segmenter.heads.0.weight"] *= 100
    alone = load_model(card, certain)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 32)).astype(np.float32)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    grid = Grid((32, 32, 32), scan.grid.affine @ np.diag([0.5, 0.5, 0.5, 1]))
    prepared = Prepared(torch.from_numpy(image), grid, scan, np.eye(4), True, ())

    def run(threads: int):
        model = replace(alone, crew=Crew(threads))
        found = segment(model, prepared, Ask(mirror=True))
        there = to_native(found, scan, model.protocol, crew=model.crew)
        return np.asarray(found.probabilities), there

    one = run(1)
    with torch.inference_mode():  # of the caller's thread alone
        three = run(3)
    assert len(np.unique(one[1].labels.data)) > 3
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(one[1].labels.data, three[1].labels.data)
    np.testing.assert_array_equal(one[1].confidence, three[1].confidence)
    assert one[1].volumes.equals(three[1].volumes)


@pytest.mark.parametrize("step", [1.0, 2.3])
def test_a_scan_is_interpolated_the_same_by_several_threads(step, monkeypatch):
    """The second step is coarse enough for the scan to be blurred first."""
    monkeypatch.setattr(geometry, "_POINTS_PER_SLAB", (2**8,) * 2)
    data = np.random.default_rng(1).normal(size=(20, 22, 24)).astype(np.float32)
    scan = Volume(data, Grid(data.shape, np.diag([1.0, 1.1, 0.9, 1.0])))
    turned = np.array([[0.6, -0.5, 0, 1], [0.5, 0.6, 0, 2], [0, 0.1, 0.8, -1], [0, 0, 0, 1]])
    turned[:3, :3] *= step
    wanted = Grid((25, 25, 25), turned)
    with torch.inference_mode():  # of the caller's thread alone
        four = geometry.resample(scan, wanted, crew=Crew(4))
    one = geometry.resample(scan, wanted)
    assert one.std() > 0.05
    np.testing.assert_array_equal(one, four)


@pytest.mark.data
@pytest.mark.slow
def test_a_real_scan_gets_the_same_labels_from_one_thread_and_from_two():
    card = find_card(load_cards(()), "any", "--model")
    alone = load_model(card, load_weights(card, True))
    folder = real_dataset("infant")
    path = folder / "sub-inf01" / "anat" / "sub-inf01_T2w.nii.gz"
    job = Job(Scan(path, folder, {"sub": "inf01"}, "T2w"), card, "", (), (), "", "cpu", 0.0)
    scan, _ = load_scan(path)
    found = []
    for threads in (1, 2):
        model = replace(alone, crew=Crew(threads))
        prediction = app.finely(placing.find(scan, job, model), model)
        found.append(to_native(prediction, scan, model.protocol, crew=model.crew))
    np.testing.assert_array_equal(found[0].labels.data, found[1].labels.data)
    assert found[0].volumes.equals(found[1].volumes)
