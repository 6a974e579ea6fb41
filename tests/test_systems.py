"""The published systems: every recipe trains, every card labels, and both are the papers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_systems import shrunk, small_strategy, write_datasets

import tlseg_bids.train
from tests import pretended
from tests.datasets import made_up_job
from tests.phantom import Phantom, grid_over
from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.networks import build
from tlseg_bids.postprocess import to_native
from tlseg_bids.segment.model import load_model
from tlseg_bids.train.export import export, read_description
from tlseg_bids.train.loop import train
from tlseg_bids.train.recipe import load_checkpoint, load_recipe
from tlseg_bids.train.scope import trainable
from tlseg_bids.volume import Volume
from tlseg_bids.zoo.weights import load_weights

HERE = Path(tlseg_bids.train.__file__).parent
RECIPES = sorted((HERE / "recipes" / "systems").glob("*.toml"))
OURS = sorted((HERE / "recipes").glob("*.toml"))
CARDS = sorted((HERE / "models" / "systems").glob("*.toml"))
OF = {"monet": "monet-joint"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_datasets(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(path, data, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert {"infant", "malc", "labelmaps"} >= set(recipe.datasets)
    saved = load_checkpoint(train(shrunk(recipe), data, tmp_path, _quiet))
    assert saved["step"] == 1
    assert all(torch.isfinite(value).all() for value in saved["average"].values())


@pytest.mark.parametrize("path", [*RECIPES, *OURS], ids=lambda path: path.stem)
def test_every_recipe_trains_on_another_device(path, data, tmp_path, monkeypatch):
    """Nothing is mixed with the processor's tensors, and a GPU has a kernel for all of it."""
    recipe = shrunk(load_recipe(path))
    if path in OURS:  # which have more levels than so small a patch has voxels for
        features = recipe.network["features"][:3]
        recipe = replace(recipe, network={**recipe.network, "features": features})
    with pretended.device(monkeypatch) as counted:
        saved = train(recipe, data, tmp_path, _quiet, device=str(pretended.DEVICE))
    found = load_checkpoint(saved)
    assert (found["step"], found["device"]) == (1, pretended.DEVICE.type)
    assert all(torch.isfinite(value).all() for value in found["average"].values())
    assert counted.asked.total() > 300
    assert not pretended.without_kernel(counted.asked, "CUDA")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_system_labels_a_phantom(path, data, tmp_path, monkeypatch):
    """On whatever device, the same."""
    recipe = shrunk(
        load_recipe(HERE / "recipes" / "systems" / f"{OF.get(path.stem, path.stem)}.toml")
    )
    checkpoint = train(recipe, data, tmp_path, _quiet)
    said = read_description(path)
    said["strategy"] = small_strategy(said["strategy"])
    card = export(said, {"segmenter": checkpoint}, data, tmp_path / "zoo")
    card = replace(card, path=tmp_path / "zoo" / f"{card.name}.toml")
    model = load_model(card, load_weights(card))
    suffix = card.domain.suffixes[0]
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    job = replace(made_up_job(Scan(Path("x.nii"), Path(), {"sub": "01"}, suffix)), card=card)
    if card.channels:
        job = replace(job, companions=(Scan(_save(scan, tmp_path), Path(), {"sub": "01"}, "T2w"),))
    assert model.placer.card.name == "any" and set(model.networks) == {"segmenter"}
    together = placing.shown_together(scan, job)
    prepared, _ = placing.settle(scan, job, model, [np.eye(4)], together)
    found = app.finely(prepared, model)
    assert prepared.image.shape == (max(len(card.channels), 1), 24, 24, 24)
    assert found.probabilities.shape == (len(model.protocol), 24, 24, 24)
    np.testing.assert_allclose(found.probabilities.astype(np.float32).sum(0), 1, atol=0.02)
    labels = to_native(found, scan, model.protocol).labels
    assert labels.grid == scan.grid
    assert set(np.unique(labels.data)) <= set(model.protocol.indices.tolist())
    with pretended.device(monkeypatch):
        there = load_model(card, load_weights(card), pretended.DEVICE.type)
        seen_there, _ = placing.settle(scan, job, there, [np.eye(4)], together)
        elsewhere = np.asarray(app.finely(seen_there, there).probabilities, np.float32)
    exact = app.finely(prepared, replace(model, precision=torch.float32)).probabilities
    np.testing.assert_allclose(elsewhere, np.asarray(exact, np.float32), atol=0.01)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_walks_as_its_recipe_trains(path):
    recipe = load_recipe(HERE / "recipes" / "systems" / f"{OF.get(path.stem, path.stem)}.toml")
    strategy = read_description(path)["strategy"]
    if recipe.places.kind == "tiles":
        assert (strategy["begins"], strategy["window"]) == (recipe.places.begins, recipe.patch)
        assert recipe.places.count == len(recipe.network["each"])
    elif recipe.places.kind == "views":
        assert strategy["axes"] == recipe.places.axes
        assert strategy.get("merged", []) == recipe.places.merged
    elif recipe.places.kind == "voxels":
        sides = [round((high - low) / recipe.spacing_mm) for low, high in recipe.box_mm]
        assert strategy["name"] == "whole" and recipe.patch == sides
    else:
        assert strategy["window"] == recipe.patch


def test_the_networks_have_the_papers_sizes():
    def millions(name: str, member: bool = False) -> float:
        recipe = load_recipe(HERE / "recipes" / "systems" / f"{name}.toml")
        with torch.device("meta"):
            network = build(**recipe.network, out_channels=recipe.head_sizes)
        one = network.members[0] if member else network
        return sum(p.numel() for p in one.parameters()) / 1e6

    assert millions("quicknat", member=True) == pytest.approx(3.298, rel=0.001)
    assert millions("subcortical-25d") == pytest.approx(0.883, rel=0.01)
    assert millions("slant27", member=True) == pytest.approx(22.41, rel=0.001)


def test_the_six_strategies_change_more_and_more():
    network = build("unet", out_channels=3, features=[2] * 6, design={"supervised": 3})
    counts = []
    for name in ("none", "shallow", "medium", "deep", "all", "scratch"):
        recipe = load_recipe(HERE / "recipes" / "systems" / f"neonatal-transfer-{name}.toml")
        counts.append(len(trainable(network, recipe.descent.scope)))
    assert counts == sorted(counts) and counts[0] == 0
    assert len(set(counts)) == 5, "all and scratch differ by what they start from"


def test_budgets_cost_the_same():
    shares = {}
    for path in RECIPES:
        if path.stem.startswith("neonatal-budget"):
            rules = load_recipe(path).datasets["infant"]
            shares[path.stem] = rules.get("first", 9) / 9 * rules.get("budget", {}).get("share", 1)
    assert len(shares) == 5
    assert all(share == pytest.approx(1 / 3, abs=0.01) for share in shares.values())


def _save(scan: Volume, folder: Path) -> Path:
    import nibabel as nib

    path = folder / "sub-01_T2w.nii"
    nib.save(nib.Nifti1Image(scan.data, scan.grid.affine), path)
    return path


def _quiet(*_: object, **__: object) -> None:
    pass
