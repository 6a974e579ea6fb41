"""Two processes that share a run: their step is one process's step of twice the examples."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from heads import tiny_recipe, write_heads
from torch import multiprocessing

from tlseg_bids.errors import UsageError
from tlseg_bids.train import loop
from tlseg_bids.train.loop import Training, train
from tlseg_bids.train.parallel import Team
from tlseg_bids.train.recipe import load_checkpoint
from tlseg_bids.train.synth import Random


def share(rank: int, ports: list[int], heads: Path, out: Path) -> None:
    """One of two processes: a whole run, a cut one, and one whose machines share no folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    torch.set_num_threads(1)
    loop.REPORT_EVERY = 2
    recipe, lines = replace(tiny_recipe(), steps=4), []
    os.environ["MASTER_PORT"] = str(ports[0])
    train(recipe, heads, out / "whole", lambda line, **_: lines.append(line))
    (out / f"lines-{rank}.txt").write_text("\n".join(lines))
    os.environ["MASTER_PORT"] = str(ports[1])
    train(recipe, heads, out / "cut", _quiet, until=1)
    os.environ["MASTER_PORT"] = str(ports[2])
    train(recipe, heads, out / "cut", _quiet)
    os.environ["MASTER_PORT"] = str(ports[3])
    try:
        train(recipe, heads, out / ("whole" if rank else "elsewhere"), _quiet)
    except UsageError as error:
        (out / f"refused-{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """What two processes left."""
    out = tmp_path_factory.mktemp("shared")
    heads = write_heads(out / "data")
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(4)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    multiprocessing.spawn(share, (ports, heads, out), nprocs=2)
    return out


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_examples_of_both(shared):
    saved = load_checkpoint(shared / "whole" / "tiny.pt")
    torch.manual_seed(0)
    alone = Training(replace(tiny_recipe(), steps=4), shared / "data", None)
    other = Random(Team(rank=1, world=2).seed(alone.recipe.seed))
    for _ in range(4):
        alone.learn([alone.draw(alone.rng), alone.draw(other)])
    for key, value in alone.network.state_dict().items():
        torch.testing.assert_close(saved["network"][key], value, atol=1e-4, rtol=1e-3)
    told = torch.stack(alone.losses).reshape(2, 4, 2).mean(1)
    rows = torch.tensor([row[2:4] for row in saved["curve"]])
    torch.testing.assert_close(rows, told, atol=1e-4, rtol=1e-3)
    assert torch.equal(saved["generator"][0], alone.rng.generator.get_state())
    assert torch.equal(saved["generator"][1], other.generator.get_state())


@pytest.mark.slow
def test_two_processes_resume_to_the_step(shared):
    whole, cut = (load_checkpoint(shared / name / "tiny.pt") for name in ("whole", "cut"))
    assert cut["step"] == whole["step"] == 4
    assert cut["processes"] == 2
    assert torch.equal(cut["generator"], whole["generator"])
    assert [row[2:4] for row in cut["curve"]] == [row[2:4] for row in whole["curve"]]
    for part in ("network", "average"):
        for key, value in whole[part].items():
            assert torch.equal(cut[part][key], value), key


@pytest.mark.slow
def test_one_process_reports_and_a_folder_apart_is_refused(shared):
    assert len((shared / "lines-0.txt").read_text().splitlines()) == 2
    assert (shared / "lines-1.txt").read_text() == ""
    for rank in (0, 1):
        said = (shared / f"refused-{rank}.txt").read_text()
        assert said.startswith("the processes of this run find different checkpoints – ")
        assert said.endswith("give --out a folder that all machines share")


def test_every_process_has_a_seed_of_its_own():
    seeds = [Team(rank, 8).seed(5) for rank in range(8)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_process_alone_changes_nothing():
    team, values = Team(), torch.tensor([1.0, 2.0])
    assert torch.equal(team.mean(values), values)
    assert (team.any(True), team.any(False)) == (True, False)
    assert team.gather(values).tolist() == [[1.0, 2.0]]


def _quiet(*words: object, **how: object) -> None:
    pass
