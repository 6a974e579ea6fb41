"""Heads made older: ventricles grow, the rest gives way, image and labels stay together."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from tests import pretended
from tests.scripts import load_benchmark
from tlseg_bids.errors import UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.dataset import HERE, Sample, default_protocol, load_classes
from tlseg_bids.train.draw import mirror_sample
from tlseg_bids.train.recipe import load_recipe
from tlseg_bids.train.synth import Ageing, Random, aged, ageing, read_classes

PROTOCOL = default_protocol()
CLASSES = load_classes(PROTOCOL)
SIZE = 64
"""Voxels of 2 mm along each side of a head."""
OLD = Ageing(share=1.0, way=(1.2, 1.2), rest=0.0)


def number(kind: str, side: int = 0) -> int:
    return int(np.flatnonzero(CLASSES.kind == kind)[side])


def axes() -> torch.Tensor:
    """Template positions in mm of the head's voxels, (3, I, J, K)."""
    axis = (torch.arange(SIZE) - (SIZE - 1) / 2) * 2.0
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))


def head() -> Sample:
    """Balls of white matter and cortex in fluid, with a ventricle on the left."""
    place = axes()
    radius, off = place.norm(dim=0), (place - torch.tensor([-14.0, 0, 0])[:, None, None, None])
    numbers = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.uint8)
    for reach, kind in ((60, "csf"), (54, "cortex"), (44, "white-matter")):
        numbers[radius < reach] = number(kind)
    numbers[off.norm(dim=0) < 14] = number("ventricle")
    matrix = np.diag([2.0, 2.0, 2.0, 1.0])
    matrix[:3, 3] = -(SIZE - 1)
    image = numbers.float() * 10
    group = np.arange(len(PROTOCOL))
    return Sample("s", "d", numbers, {"T1w": image}, matrix, group, "", PROTOCOL, matrix)


def counts(numbers: torch.Tensor) -> np.ndarray:
    return np.bincount(numbers.numpy().ravel(), minlength=256)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("ageing")


def test_nothing_is_drawn_where_nobody_asks_for_it():
    rng, place = Random(0), axes()
    assert aged(rng, Ageing(), head(), place) is place
    assert rng.one() == Random(0).one(), "recipes of before draw what they drew"


def test_an_old_head_has_a_larger_ventricle_and_less_cortex():
    sample = head()
    there = aged(Random(0), OLD, sample, axes())
    before = counts(sample.classes)
    after = counts(read_classes(sample, there, sample.template_from_voxel))
    ventricle, cortex = number("ventricle"), number("cortex")
    assert 1.6 < after[ventricle] / before[ventricle] < np.exp(1.69 * 1.2), "less than is asked"
    assert 0.6 < after[cortex] / before[cortex] < 0.95


def test_a_young_head_has_a_smaller_ventricle():
    sample = head()
    there = aged(Random(0), replace(OLD, way=(-0.5, -0.5)), sample, axes())
    after = counts(read_classes(sample, there, sample.template_from_voxel))
    assert after[number("ventricle")] < 0.8 * counts(sample.classes)[number("ventricle")]


def test_nothing_folds():
    table = ageing.class_growth(PROTOCOL, ageing.ways()[0] * 1.6)
    there = ageing.places(ageing.SPACING_MM) + ageing.shift(table, ageing.growing(head()))
    steps = [torch.diff(there[axis], dim=axis) for axis in range(3)]
    assert min(float(step.min()) for step in steps) > 0.2 * ageing.SPACING_MM


def test_what_is_far_from_the_head_hardly_moves():
    sample, place = head(), axes()
    far = (aged(Random(0), OLD, sample, place) - place).norm(dim=0)[0]
    assert float(far.max()) < 2.0


def test_a_flow_has_the_divergence_that_is_asked_but_for_its_mean():
    wave = 2 * torch.pi * torch.arange(20) / 20
    rate = torch.sin(wave)[:, None, None] * torch.cos(2 * wave)[None, :, None] * torch.ones(24)
    flow = ageing.potential_flow(rate + 0.3, spacing=2.0)
    found = sum((flow[a].roll(-1, a) - flow[a].roll(1, a)) / 4 for a in range(3))
    assert torch.allclose(found, rate, atol=0.08), "central differences of a wave of 10 voxels"
    still = ageing.potential_flow(torch.full((8, 8, 8), 0.3), 1.0)
    assert float(still.abs().max()) < 1e-6


def test_the_mirror_image_grows_on_the_other_side():
    sample, place = head(), axes()
    one = aged(Random(3), OLD, sample, place)
    twin = aged(Random(3), OLD, mirror_sample(sample), place)
    turned = twin.flip(1) * torch.tensor([-1.0, 1, 1])[:, None, None, None]
    assert torch.allclose(one, turned, atol=0.02)


def test_both_sides_of_a_structure_grow_alike_and_one_seed_decides():
    drawn = ageing.growth(Random(5), Ageing(1.0))
    assert np.array_equal(drawn, drawn[PROTOCOL.mirror])
    assert np.array_equal(drawn, ageing.growth(Random(5), Ageing(1.0)))
    assert not np.array_equal(drawn, ageing.growth(Random(6), Ageing(1.0)))


def test_parcels_of_another_protocol_grow_as_what_they_are_part_of():
    other = load_protocol("braincolor")
    table = ageing.class_growth(other, ageing.ways()[0])
    of = dict(zip(other.table["abbreviation"], table.tolist(), strict=False))
    assert of["R-AnG"] == of["L-Cun"] == pytest.approx(-0.33)
    assert of["L-LV"] == pytest.approx(1.69)
    assert of["BG"] == 0


def test_the_table_names_every_structure_of_the_template_once():
    rows = pd.read_csv(HERE / "ageing.tsv", sep="\t")
    names = PROTOCOL.table["abbreviation"].str.replace(r"^[LR]-", "", regex=True)[1:]
    assert sorted(rows["structure"]) == sorted(set(names))


def test_a_recipe_asks_for_it_and_a_wrong_key_is_told(tmp_path):
    base = HERE / "recipes" / "adult-t1w-6.toml"
    assert load_recipe(base).ageing == Ageing(share=0.5)
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(f'base = "{base}"\n[ageing]\nshrae = 0.5\n')
    with pytest.raises(UsageError, match="shrae"):
        load_recipe(wrong)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("share = 1.5", "share is 1.5"),
        ("way = [1.0, 0.0]", r"way is \[1.0, 0.0\]"),
        ("way = [1.0]", r"way is \[1.0\]"),
        ("way = [0.0, 8.0]", r"way is \[0.0, 8.0\]"),
        ("rest = -1.0", "rest is -1.0"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, line, what):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(f'base = "{HERE / "recipes" / "adult-t1w-6.toml"}"\n[ageing]\n{line}\n')
    with pytest.raises(UsageError, match=what) as told:
        load_recipe(wrong)
    assert told.value.where == "[ageing] of the recipe"
    assert told.value.hint.startswith("write")


def test_the_way_leads_from_small_ventricles_to_large_ones(benchmark):
    rng = np.random.default_rng(0)
    age = np.linspace(0, 1, 12)
    logs = pd.DataFrame({
        "LV": 1.5 * age + rng.normal(0, 0.05, 12), "HIP": -0.4 * age + rng.normal(0, 0.05, 12),
        "PAL": rng.normal(0, 0.05, 12),
    })  # fmt: skip
    found = benchmark.table_of(logs)
    assert found.attrs["explained"] > 0.9
    assert 0.7 < found["way"]["LV"] < 1.5
    assert found["way"]["HIP"] / found["way"]["LV"] == pytest.approx(-0.4 / 1.5, abs=0.1)
    assert abs(found["way"]["PAL"]) < 0.1
    assert (found["rest"] < 0.1).all()


def test_scans_and_labels_are_written_alike(benchmark, tmp_path):
    sample = head()
    ratios = benchmark.write_dataset([sample], 1.2, tmp_path / "way-1.2")
    told = dict(zip(benchmark.TOLD, ratios[0], strict=True))
    assert np.isnan(told["L-HIP"]), "this head has none"
    assert told["L-LV"] > 1.6
    image = nib.load(tmp_path / "way-1.2/s/anat/s_T1w.nii.gz")
    labels = nib.load(tmp_path / "way-1.2/derivatives/labels/s/anat/s_seg-aseg_dseg.nii.gz")
    inside = np.asarray(labels.dataobj) == CLASSES.index[number("ventricle")]
    painted = np.asarray(image.dataobj)[inside]
    assert np.median(painted) == 10 * number("ventricle"), "the image shows what the labels say"
    assert (tmp_path / "way-1.2/participants.tsv").read_text() == "participant_id\ns\n"


def test_a_head_that_is_left_as_it_is_is_the_same(benchmark):
    sample = head()
    image, numbers = benchmark.older(sample, 0.0)
    assert np.array_equal(numbers, sample.classes.numpy())
    assert np.allclose(image, sample.images["T1w"].numpy(), atol=0.1)


def test_a_head_grows_on_a_device_as_here(monkeypatch):
    sample, place = head(), axes()
    here = aged(Random(2), Ageing(share=1.0), sample, place)
    with pretended.device(monkeypatch):
        rng = Random(2, pretended.DEVICE)
        there = aged(rng, Ageing(share=1.0), sample, place.to(pretended.DEVICE))
        assert there.device == pretended.DEVICE
        found = there.cpu()
    assert torch.allclose(here, found, atol=1e-3)
