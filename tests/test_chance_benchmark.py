"""What chance does to the group level, in simulated studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import linregress

from tests.scripts import load_benchmark

chance = load_benchmark("chance")


def test_the_p_values_are_those_of_a_linear_model():
    rng = np.random.default_rng(0)
    x, values = rng.normal(size=30), rng.normal(size=(30, 3))
    design = np.column_stack([np.ones(30), x])
    wanted = [linregress(x, one).pvalue for one in values.T]
    np.testing.assert_allclose(chance.p_values(values, design), wanted)


def test_the_three_tables_are_printed(capsys):
    assert chance.main(["3", "5"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    heads = [line[0] for line in lines if "±" not in line[-1]]
    assert heads == ["shift", "tests", "outliers"]
    found = {line[0]: float(line[1].split(" ± ")[0]) for line in lines if "±" in line[-1]}
    assert len(found) == 18
    assert abs(found["2 sites of 50"]) < 0.05
    assert found["100"] < 0.01


@pytest.mark.parametrize("words", [["many"], ["1", "2", "3"]])
def test_wrong_words_are_told_how_it_is_called(words, capsys):
    assert chance.main(words) == 64
    assert "Usage: ``python benchmarks/chance.py" in capsys.readouterr().err
