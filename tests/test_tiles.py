"""Tiles with networks of their own and views, as the papers place them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tlseg_bids.segment.walk import first_of_highest, tiles, views

SLANT27 = [[0, 38, 76], [0, 46, 92], [0, 34, 68]]
SPACE = (172, 220, 156)


def test_the_27_tiles_lie_where_the_paper_has_them_and_cover_the_space():
    seen, coverage = [], torch.zeros(SPACE, dtype=torch.int64)

    def predict(window, corner, number):
        seen.append((number, corner, tuple(window.shape[2:])))
        coverage[tuple(slice(c, c + n) for c, n in zip(corner, window.shape[2:], strict=True))] += 1
        return torch.ones(1, 1, *window.shape[2:], dtype=torch.float16)

    tiles(predict, torch.zeros(1, 1, *SPACE), window=[96, 128, 88], begins=SLANT27)
    assert seen == [(n, c, (96, 128, 88)) for n, c in enumerate(product(*SLANT27))]
    for axis, (n, side) in enumerate(zip(SPACE, (96, 128, 88), strict=True)):
        wanted = [sum(b <= x < b + side for b in SLANT27[axis]) for x in range(n)]
        line = coverage.movedim(axis, 0)[:, 0, 0]
        assert line.tolist() == wanted
    assert (int(coverage.min()), int(coverage.max())) == (1, 27)
    assert int(coverage[86, 110, 78]) == 27


def test_the_8_tiles_touch():
    coverage = torch.zeros(SPACE, dtype=torch.int64)

    def predict(window, corner, number):
        here = tuple(slice(c, c + n) for c, n in zip(corner, window.shape[2:], strict=True))
        coverage[here] += number + 1
        return torch.ones(1, 1, *window.shape[2:], dtype=torch.float16)

    begins = [[0, 86], [0, 110], [0, 78]]
    tiles(predict, torch.zeros(1, 1, *SPACE), window=[86, 110, 78], begins=begins)
    corners = coverage[::171, ::219, ::155].flatten().tolist()
    assert corners == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(coverage.unique().tolist()) == corners


def test_the_majority_wins_and_of_equals_the_lowest():
    answers = [2, 1, 1, 0]

    def predict(window, _corner, number):
        found = torch.full((1, 3, *window.shape[2:]), 0.1)
        found[:, answers[number]] = 0.8
        return found

    image = torch.zeros(1, 1, 6, 2, 2)
    found = tiles(predict, image, window=[3, 2, 2], begins=[[0, 1, 2, 3], [0], [0]], fuse="vote")
    assert found.argmax(0)[:, 0, 0].tolist() == [2, 1, 1, 1, 0, 0]
    torch.testing.assert_close(found.sum(0), torch.ones(6, 2, 2))
    assert float(found[2, 1, 0, 0]) == pytest.approx(0.5, abs=0.01)
    assert first_of_highest(torch.tensor([[0.0], [1.0], [1.0]])).tolist() == [1]


def test_a_hole_between_tiles_is_no_answer():
    with pytest.raises(ValueError, match="the tiles do not cover the volume"):
        tiles(lambda w, *_: w, torch.zeros(1, 1, 6, 2, 2), window=2, begins=[[0, 4], [0], [0]])


def test_views_are_weighed():
    def predict(window, _corner, number):
        assert window.shape[2 + (2, 1, 0)[number]] <= 2
        return torch.full((1, 1, *window.shape[2:]), float(number))

    found = views(predict, torch.zeros(1, 1, 3, 4, 5), weights=[0.4, 0.4, 0.2], window=2)
    torch.testing.assert_close(found, torch.full((1, 3, 4, 5), 0.8))
    one = views(predict, torch.zeros(1, 1, 3, 4, 5), axes=[2], window=2)
    torch.testing.assert_close(one, torch.zeros(1, 3, 4, 5))
