"""The mean of the weights of a run and of what it started from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from heads import tiny_recipe, write_heads

from tests.scripts import load_benchmark
from tlseg_bids.train.loop import train
from tlseg_bids.train.recipe import load_checkpoint


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("between")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    heads, out = (tmp_path_factory.mktemp(name) for name in ("data", "runs"))
    write_heads(heads)
    recipe = tiny_recipe()
    wider = {**recipe.network, "features": [6, 8]}
    made = [recipe, replace(recipe, name="other", seed=recipe.seed + 1),
            replace(recipe, name="wider", network=wider)]  # fmt: skip
    return [train(one, heads, out, lambda *_, **__: None) for one in made]


def test_a_share_of_the_way_between_the_weights(benchmark, runs, tmp_path, capsys):
    out = tmp_path / "between.pt"
    assert benchmark.main([str(runs[0]), str(runs[1]), "0.25", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    one, other, mixed = (load_checkpoint(path) for path in (runs[0], runs[1], out))
    for key, value in mixed["average"].items():
        wanted = 0.25 * one["average"][key] + 0.75 * other["average"][key]
        assert torch.allclose(value, wanted, atol=1e-6)
    assert mixed["recipe"] == one["recipe"]


def test_another_network_is_refused(benchmark, runs):
    with pytest.raises(SystemExit, match="are not the same network; name what the run began with"):
        benchmark.between(runs[0], runs[2], 0.5)
