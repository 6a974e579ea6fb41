"""The benchmark of speed: peers of the stated size, counted and timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.scripts import load_benchmark
from tlseg_bids.networks.convolution import Convolution

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("speed")


def parameters(network: torch.nn.Module) -> float:
    return sum(p.numel() for p in network.parameters()) / 1e6


def test_the_peers_have_the_size_that_their_papers_state(benchmark, monkeypatch):
    synthseg = benchmark.PlainUNet([24 * 2**level for level in range(5)], torch.nn.Conv3d)
    assert parameters(synthseg) == pytest.approx(13.2, abs=0.3)
    assert parameters(benchmark.meshnet()) == pytest.approx(0.2, abs=0.02)
    monkeypatch.setattr(benchmark, "VOLUME", (32, 32, 32))
    found = benchmark.peers(["synthseg", "meshnet"], threads=1)
    assert set(found) == {"synthseg", "meshnet"}
    for run, factor in found.values():
        assert factor == 1
        assert benchmark.flops(run) > 1e9
        assert benchmark.timed(run) > 0


def test_flops_are_counted_as_two_a_multiplication(benchmark):
    layer = torch.nn.Conv3d(3, 5, 1)
    image = torch.rand(1, 3, 4, 4, 4)
    assert benchmark.flops(lambda: layer(image)) == 2 * 3 * 5 * 4**3
    block = Convolution(3, 5)
    assert benchmark.flops(lambda: block(image)) == 2 * 3 * 5 * 27 * 4**3
    assert benchmark.peak_flops(torch.float32) > 1e9
