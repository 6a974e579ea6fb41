"""Packed training data: what comes out is what went in, to 8 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import PARCELS, tiny_recipe, write_heads, write_parcels

from tlseg_bids.cli.train import main
from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.train import pack as packing
from tlseg_bids.train.loop import Training
from tlseg_bids.train.pack import quantise, read_pack
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.supply import describe, load_samples, pack

MIB = 2**20


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """A folder with label maps, and one scan with its image."""
    return write_parcels(write_heads(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A recipe of both datasets."""
    network = {**tiny_recipe().network, "prior_channels": 33}
    return replace(
        tiny_recipe(), network=network, protocol="braincolor", more_heads=["aseg"],
        datasets={"balls": {"weight": 1.0}, "parcels": PARCELS},
        fold=[1, 2], fold_datasets=["balls"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(heads, recipe, tmp_path_factory) -> Path:
    """Both datasets in one file."""
    path = tmp_path_factory.mktemp("packed") / "data.npz"
    assert pack([recipe], heads, path, MIB) == path.stat().st_size < MIB / 4
    return path


def test_packed_samples_are_those_of_the_folder(heads, recipe, packed):
    from_folder, from_file = load_samples(recipe, heads), load_samples(recipe, packed)
    assert [s.name for s in from_file["balls"]] == ["sub-00"], "the fold is taken when reading"
    for name, found in from_folder.items():
        for a, b in zip(found, from_file[name], strict=True):
            assert (a.name, a.dataset, a.sha256) == (b.name, b.dataset, b.sha256)
            assert a.protocol.name == b.protocol.name
            assert torch.equal(a.classes, b.classes)
            assert np.array_equal(a.world_from_voxel, b.world_from_voxel)
            assert np.array_equal(a.group, b.group)
            assert a.images.keys() == b.images.keys()
            for suffix, image in a.images.items():
                low, top = float(image.min()), np.percentile(image[image > image.min()], 99.9)
                apart = (image.clamp(max=float(top)) - b.images[suffix]).abs().max()
                assert b.images[suffix].dtype == torch.float32
                assert apart <= (top - low) / 255 / 2 + 1e-4


def test_a_run_on_packed_data_knows_hashes_licences_and_the_file(heads, recipe, packed):
    run = Training(recipe, packed, None)
    plain = Training(recipe, heads, None)
    assert run.data == plain.data
    assert run.licences == plain.licences == {"balls": "CC0-1.0", "parcels": "CC-BY-NC-3.0"}
    np.testing.assert_allclose(run.fixed["template"], plain.fixed["template"])
    assert plain.content()["packed"] == ""
    assert len(run.content()["packed"]) == 64
    examples = [one.draw(one.rng) for one in (run, plain)]
    assert torch.equal(examples[0].target, examples[1].target)
    torch.testing.assert_close(examples[0].image, examples[1].image, atol=0.02, rtol=0)


def test_the_same_data_give_the_same_file(heads, recipe, packed, tmp_path):
    pack([recipe], heads, tmp_path / "again.npz", MIB)
    assert (tmp_path / "again.npz").read_bytes() == packed.read_bytes()


def test_half_a_level_is_the_largest_error():
    rng = np.random.default_rng(0)
    image = np.where(rng.random((20, 20, 20)) < 0.5, 0, rng.gamma(9, 30, (20, 20, 20)))
    levels, low, step = quantise(image.astype(np.float32))
    top = np.percentile(image[image > 0], 99.9)
    below = image <= top
    assert np.abs(levels * step + low - image)[below].max() <= step / 2 * 1.001
    assert levels.dtype == np.uint8 and levels.max() == 255
    assert (levels[image > top] == 255).all()
    flat, low, step = quantise(np.full((2, 2, 2), 7.0, np.float32))
    assert (flat * step + low == 7).all()


@pytest.mark.parametrize("lowest", [-0.3, -1.0, -3.0, -600.0, -1e5])
def test_what_is_0_stays_0_where_values_lie_below_it(lowest):
    image = np.zeros((24, 24, 24), np.float32)
    image[6:18, 6:18, 6:18] = np.random.default_rng(0).normal(600, 100, (12, 12, 12))
    image[5, 5, 5] = lowest
    levels, low, step = quantise(image)
    back = torch.from_numpy(levels).float() * step + low
    assert (back[torch.from_numpy(image) == 0] == 0).all()
    top = np.percentile(image[image > image.min()], 99.9)
    assert np.abs(back.numpy() - image)[image <= top].max() <= step / 2 * 1.001
    assert step <= 2 * (top - lowest) / 255


def test_classes_are_known_by_their_labels_not_by_their_order(packed, recipe, monkeypatch):
    before = load_samples(recipe, packed)["balls"][0]
    known = packing.load_classes

    def turned(protocol):
        found = known(protocol)
        order = np.r_[0, len(found.index) - 1 : 0 : -1]
        return replace(found, index=found.index[order])

    monkeypatch.setattr(packing, "load_classes", turned)
    after = load_samples(recipe, packed)["balls"][0]
    assert not torch.equal(before.classes, after.classes)
    old, new = known(before.protocol).index, turned(before.protocol).index
    assert np.array_equal(old[before.classes.numpy()], new[after.classes.numpy()])


def test_a_label_that_is_gone_is_named(packed, recipe, monkeypatch):
    known = packing.load_classes

    def fewer(protocol):
        found = known(protocol)
        return replace(found, index=found.index[:-1])

    gone = known(load_samples(recipe, packed)["balls"][0].protocol).index[-1]
    monkeypatch.setattr(packing, "load_classes", fewer)
    with pytest.raises(DataError, match=rf"label {gone} of protocol 'aseg'.*data.npz.*again"):
        load_samples(recipe, packed)


def test_other_rules_or_datasets_are_refused(packed, recipe):
    other = replace(recipe, datasets={"balls": {"ignore": [24], "weight": 3.0}})
    with pytest.raises(DataError, match=r"'balls' was packed with another ignore.*data.npz.*again"):
        load_samples(other, packed)
    more = replace(recipe, datasets={"cubes": {}})
    with pytest.raises(DataError, match=r"no dataset 'cubes'.*data.npz.*holds balls, parcels"):
        load_samples(more, packed)
    assert describe(packed, "cubes") == {}


def test_what_is_no_packed_file_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    for content in (b"", b"no zip", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no packed training data.*data.npz.*tlseg-train pack"):
            read_pack(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(DataError, match=r"no packed training data.*index.*tlseg-train pack"):
        read_pack(path)
    np.savez(path, index=np.frombuffer(json.dumps({"format": 9}).encode(), np.uint8))
    with pytest.raises(DataError, match=r"packed in format 9 instead of 1.*pack it again"):
        read_pack(path)


def test_a_damaged_scan_is_named(packed, recipe, tmp_path):
    content = bytearray(packed.read_bytes())
    content[200:260] = bytes(60)
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"scan of dataset 'balls' cannot be read.*npz.*damaged"):
        load_samples(recipe, path)


def test_a_file_above_the_limit_is_not_left(heads, recipe, tmp_path):
    with pytest.raises(UsageError, match=r"take 0.00\d+ MiB, more than the 0.000954.*--limit"):
        pack([recipe], heads, tmp_path / "data.npz", 1000)
    assert list(tmp_path.iterdir()) == []


def test_two_recipes_that_read_a_dataset_in_two_ways_are_refused(heads, recipe, tmp_path):
    other = replace(recipe, name="other", datasets={"balls": {"ignore": [24]}})
    with pytest.raises(UsageError, match=r"'balls' is read in different ways.*'other'.*own"):
        pack([recipe, other], heads, tmp_path / "data.npz", MIB)


def test_the_command_packs(heads, tmp_path, capsys):
    path = tmp_path / "label.toml"
    path.write_text(
        'name = "label"\nrole = "segmenter"\nprotocol = "aseg"\npatch = 16\nspacing_mm = 2.0\n'
        "box_mm = [[-48, 48], [-48, 48], [-48, 48]]\n[network]\n[datasets.balls]\n"
    )
    words = ["pack", str(path), "--data", str(heads), "--output", str(tmp_path / "data.npz")]
    assert main(words) == 0
    assert "data.npz: 0.0 MiB" in capsys.readouterr().out
    assert main([*words, "--limit", "0.001"]) == UsageError.exit_code
    assert "allow more with --limit" in capsys.readouterr().err
