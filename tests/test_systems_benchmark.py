"""The comparison of systems: what is trained on what, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cards import write_model

from tests.scripts import load_benchmark
from tlseg_bids.train.recipe import load_recipe
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.evidence import skill

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("systems")


@pytest.fixture(scope="module")
def setups() -> ModuleType:
    return load_benchmark("setups")


@pytest.fixture(scope="module")
def systems_table() -> ModuleType:
    return load_benchmark("systems_table")


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    return load_benchmark("findings")


def test_every_system_is_put_on_every_dataset_without_the_fold(benchmark):
    for system, setup in benchmark.MORE.items():
        for dataset, spec in benchmark.DATASETS.items():
            recipe = benchmark.on_dataset(setup, dataset, 1)
            assert recipe.fold == [1, spec["folds"]], system
            assert recipe.fold_datasets == [dataset]
            assert set(recipe.datasets) <= {dataset, "labelmaps"}
            assert recipe.protocol in ("subcortical", spec["protocol"])
            shown = max(len(recipe.channels), 1)
            assert recipe.network.get("image_channels", 1) == shown
            own = load_recipe(benchmark.TRAIN / "recipes" / f"{setup.recipe}.toml")
            assert recipe.descent == own.descent and recipe.loss == own.loss
            assert recipe.places.kind == own.places.kind
            if recipe.network.get("prior_channels"):
                assert recipe.prior_heads[-1] == recipe.heads[-1]


def test_a_budget_is_the_datasets_only_change(benchmark, setups):
    plain = benchmark.on_dataset(setups.SYSTEMS[setups.OURS], "infant", 0)
    for setup in setups.BUDGETS.values():
        recipe = benchmark.on_dataset(setup, "infant", 0)
        assert recipe.datasets["infant"] == {**plain.datasets["infant"], **setup.own}
        assert recipe.datasets["labelmaps"] == plain.datasets["labelmaps"]


@pytest.mark.parametrize("spacing_mm", [2.0, 4.0])
def test_larger_voxels_keep_the_millimetres_of_windows_and_tiles(benchmark, spacing_mm):
    for setup in benchmark.SYSTEMS.values():
        fine = benchmark.on_dataset(setup, "infant", 0)
        coarse = benchmark.coarser(fine, setup, spacing_mm)
        assert benchmark.coarser(fine, setup, 1.0) == fine
        if setup.ours:
            continue
        size = min(spacing_mm, setup.coarsest_mm)
        assert coarse.spacing_mm == size
        for one, two in zip(fine.sides, coarse.sides, strict=True):
            assert abs(two * size - one) <= size / 2
        for one, two in zip(fine.places.begins, coarse.places.begins, strict=True):
            assert all(abs(size * n - m) <= size for n, m in zip(two, one, strict=True))
    voxels = benchmark.SYSTEMS["subcortical-25d"]
    coarse = benchmark.coarser(benchmark.on_dataset(voxels, "infant", 0), voxels, 2.0)
    assert (coarse.network["reach"], coarse.places.rim) == (5, 2)


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("system", ["slant8", "slant27"])
def test_tiles_cover_every_larger_voxel_and_none_reaches_beyond(benchmark, system, spacing_mm):
    setup = benchmark.SYSTEMS[system]
    recipe = benchmark.coarser(benchmark.on_dataset(setup, "malc", 0), setup, spacing_mm)
    for (low, high), begins, side in zip(
        recipe.box_mm, recipe.places.begins, recipe.sides, strict=True
    ):
        size = int((high - low) / spacing_mm)
        covered = {voxel for begin in begins for voxel in range(begin, begin + side)}
        assert covered == set(range(size))


def test_our_engine_stays_or_its_body_follows(benchmark):
    ours, scratch = benchmark.SYSTEMS["ours"], benchmark.SYSTEMS["ours-scratch"]
    fine = benchmark.on_dataset(ours, "infant", 0)
    assert benchmark.coarser(fine, ours, 4.0) == fine
    fine = benchmark.on_dataset(scratch, "infant", 0)
    assert benchmark.coarser(fine, scratch, 2.0) == fine, "it folds 2 mm into channels anyway"
    coarse = benchmark.coarser(fine, scratch, 4.0)
    assert coarse.spacing_mm == 2.0
    assert list(coarse.sides) == [side // 2 for side in fine.sides]


def test_the_card_has_the_windows_that_were_trained(benchmark):
    slant = benchmark.SYSTEMS["slant27"]
    coarse = benchmark.coarser(benchmark.on_dataset(slant, "infant", 0), slant, 2.0)
    assert coarse.places.begins == [[0, 19, 38], [0, 23, 46], [0, 17, 34]]
    said = {"name": "tiles", "window": [96, 128, 88], "begins": [[0]] * 3, "fuse": "vote"}
    assert benchmark.strategy(said, coarse) == {
        "name": "tiles", "window": [48, 64, 44], "begins": coarse.places.begins, "fuse": "vote",
    }  # fmt: skip
    views = {"name": "views", "axes": [2], "window": 8}
    assert benchmark.strategy(views, coarse) == views
    neonatal = benchmark.SYSTEMS["neonatal"]
    fine = benchmark.on_dataset(neonatal, "infant", 0)
    said = {"name": "sliding", "window": 160}
    assert benchmark.strategy(said, fine) == said
    coarse = benchmark.coarser(fine, neonatal, 4.0)
    assert benchmark.strategy(said, coarse)["window"] == [32, 32, 32]
    ours = benchmark.SYSTEMS["ours"]
    recipe = benchmark.on_dataset(ours, "infant", 0)
    halved = {"name": "sliding", "window": [96, 176, 160], "halves": True, "trim": [0, 8, 0]}
    assert benchmark.strategy(halved, recipe) == {
        "name": "sliding", "window": recipe.patch, "overlap": 0.33, "mirror": True,
    }  # fmt: skip


def test_the_stage_before_sees_no_scan_of_the_dataset(benchmark):
    setup = benchmark.SYSTEMS["monet"]
    recipe = benchmark.on_dataset(setup, "malc", 0, setup.before)
    assert set(recipe.datasets) == {"labelmaps"}
    assert recipe.network["features"] == setup.features


def test_folds_are_counted_as_training_counts_them(benchmark, tmp_path):
    for number in range(5):
        (tmp_path / f"sub-{number:02}").mkdir()
    assert benchmark.subjects(tmp_path, 1, 4) == ["01"]
    assert benchmark.subjects(tmp_path, 0, 4) == ["00", "04"]


def rows(system: str, dice: list[float]) -> pd.DataFrame:
    return pd.DataFrame({
        "dataset": "malc", "fold": 0, "system": system, "scan": [f"s{n}" for n in range(len(dice))],
        "structures": "14", "n": 14, "dice": dice, "weighted_dice": 0.5, "hd95_mm": 2.0,
        "seconds": 10.0, "parameters": 2_500_000, "steps": 100, "minutes": 20.0,
    })  # fmt: skip


def test_the_table_has_spread_paper_and_corrected_p(systems_table):
    ours = rows("ours", [0.80, 0.82, 0.84, 0.86, 0.88, 0.90])
    worse = rows("slant27", [0.70, 0.71, 0.72, 0.73, 0.74, 0.75])
    every = pd.concat([ours, worse, rows("monet", [0.8] * 6)])
    text = systems_table.markdown(every, ["ours", "monet", "slant27"])
    assert "| ours | 6 | 0.850 ± 0.037 | 0.500 ± 0.000 | 2.00 | 10 | 2.50 M | 100 |" in text
    assert "-0.125, p = 0.0625 | – |" in text, "0.03125 of six pairs, times two comparisons"
    assert "0.826 (15 structures)" in text
    assert text.index("| ours") < text.index("| monet") < text.index("| slant27")


def test_what_was_measured_is_not_measured_again(benchmark, tmp_path):
    path = tmp_path / "systems.tsv"
    assert not benchmark.known(path, "malc", 0, "ours")
    rows("ours", [0.8]).to_csv(path, sep="\t", index=False)
    assert benchmark.known(path, "malc", 0, "ours")
    assert not benchmark.known(path, "malc", 1, "ours")
    assert not benchmark.known(path, "infant", 0, "ours")


def test_no_distance_is_made_up_where_nothing_was_found(systems_table):
    assert systems_table.distance(pd.Series([np.nan, np.nan])) == "–"
    assert systems_table.distance(pd.Series([2.0, np.nan, 3.0])) == "2.50"


def test_equal_scans_are_no_evidence(systems_table):
    same = pd.Series(np.full(4, 0.8), index=list("abcd"))
    assert systems_table.against(same, same, 3) == "–"


def test_steps_decide_where_they_are_given(benchmark, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "train", lambda recipe, *_: asked.append(recipe.steps))
    recipe = benchmark.on_dataset(benchmark.SYSTEMS["ours"], "infant", 0)
    benchmark.trained(recipe, tmp_path, tmp_path, 1.0, steps=7)
    benchmark.trained(recipe, tmp_path, tmp_path, 1.0)
    assert asked == [7, 7], "a run that was cut off goes on to the same end"


def test_minutes_become_steps_by_a_trial_whose_first_steps_are_not_timed(
    benchmark, tmp_path, monkeypatch
):
    asked, passed, clock = [], [0], [0.0]
    first, last = benchmark.TRIAL_STEPS

    def train(recipe, _data, out, watch, until=None):
        clock[0] += 1000  # loading does not count
        asked.append(until or recipe.steps)
        watch.begin(None)
        for step in range(passed[0], asked[-1]):
            clock[0] += 8 if step < first else 1  # of two threads together
            watch.step(None)
        passed[0] = asked[-1]
        return out / f"{recipe.name}.pt"

    monkeypatch.setattr(benchmark, "train", train)
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(benchmark.torch, "get_num_threads", lambda: 2)
    recipe = benchmark.on_dataset(benchmark.SYSTEMS["ours"], "infant", 0)
    path = benchmark.trained(recipe, tmp_path, tmp_path, 2.0)
    assert asked == [last, 240]
    took = (8 * first + 240 - first) / 2
    assert benchmark.minutes_of([path, path]) == pytest.approx(2 * took / 60)
    benchmark.trained(recipe, tmp_path, tmp_path, 2.0)
    assert asked == [last, 240, 240], "the trial is not repeated"
    assert benchmark.minutes_of([path]) == pytest.approx(took / 60)


def test_the_stage_before_counts_in_the_minutes(benchmark, tmp_path, monkeypatch):
    spent = {}

    def trained(recipe, _data, out, minutes, _steps=None):
        spent[recipe.name] = minutes
        path = out / f"{recipe.name}.pt"
        average = {"weight": torch.zeros(3, 2)}
        torch.save({"step": 7, "average": average}, path)
        (out / f"{recipe.name}.steps.json").write_text(json.dumps({"seconds": 60 * minutes}))
        return path

    monkeypatch.setattr(benchmark, "trained", trained)
    monkeypatch.setattr(benchmark, "load_checkpoint", lambda path: torch.load(path.resolve()))
    monkeypatch.setattr(benchmark, "export", lambda *_: None)
    monkeypatch.setattr(benchmark, "record", lambda *_: None)
    monkeypatch.setattr(benchmark, "label", lambda *_: None)
    scores = rows("monet", [0.5, 0.6]).drop(columns=["parameters", "steps", "minutes"])
    monkeypatch.setattr(benchmark, "scored", lambda *_: scores)
    (tmp_path / "malc").mkdir()
    options = SimpleNamespace(
        data=tmp_path, work=tmp_path, minutes=6.0, steps=None, spacing=2.0, limit=None
    )
    found = benchmark.run(options, "malc", 0, "monet")
    assert spent == {"monet-partial-malc": 2.0, "monet-malc-f0": 4.0}
    assert found["minutes"].tolist() == [6.0, 6.0]
    assert found["parameters"].tolist() == [6, 6] and found["steps"].tolist() == [7, 7]


def test_what_was_measured_stands_in_the_systems_card(benchmark, tmp_path):
    written = write_model(tmp_path, "slant8-malc-f0")
    both = pd.concat([rows("slant8", [0.5, 0.6]), rows("slant8", [0.1]).assign(structures="all")])
    benchmark.record(written.path, both, "malc", 0)
    card = read_card(written.path)
    assert [row["structures"] for row in card.evidence] == ["14 sub-cortical", "all structures"]
    first, second = card.evidence
    assert (first["mean"], first["n"], first["how"]) == (0.55, 2, "fold 0, held out")
    assert first["sd"] == pytest.approx(0.0707, abs=1e-4)
    assert (second["mean"], second["n"], second["sd"]) == (0.1, 1, 0.0)
    assert skill(card) == pytest.approx(0.1 / 0.75)


def test_every_run_of_a_finding_is_narrowed_and_without_the_fold(findings):
    for name, finding in findings.FINDINGS.items():
        of_all = (
            [finding.source, *finding.runs.values()] if finding.source else finding.runs.values()
        )
        recipes = {of: findings.prepared(finding, of, 4.0) for of in of_all if of}
        for of, recipe in recipes.items():
            own = load_recipe(findings.TRAIN / "recipes" / "systems" / f"{of}.toml")
            assert recipe.spacing_mm == finding.coarsest_mm
            assert (recipe.descent, recipe.loss) == (own.descent, own.loss), of
            infants = "infant" in recipe.datasets
            assert recipe.fold == (findings.FOLD if own.fold_datasets else []), of
            assert not infants or "infant" in recipe.fold_datasets, of
            assert set(recipe.datasets) == set(own.datasets)
        shapes = {str(recipe.network) for recipe in recipes.values()}
        assert len(shapes) <= 1 + bool(finding.source), f"{name}: networks that do not compare"
        assert set(finding.from_scratch) < set(finding.runs)


def test_the_source_of_the_tiles_learns_the_adults_in_the_transfers_structures(findings):
    slant = findings.FINDINGS["slant"]
    source = findings.prepared(slant, slant.source, 4.0)
    assert source.protocol == "aseg" and source.datasets["malc"]["head"] == "aseg"
    assert findings.prepared(slant, "slant8-new", 4.0).protocol == "aseg"


def test_the_runs_of_a_finding_take_as_many_steps_as_the_first(findings, tmp_path, monkeypatch):
    asked, shown = {}, []

    def trained(recipe, _data, _out, minutes, steps=None):
        asked[recipe.name] = (recipe.start, minutes, steps)
        return tmp_path / f"{recipe.name}.pt"

    def measured(_options, _finding, recipe, checkpoint, title):
        shown.append((title, recipe.name, checkpoint.stem))
        yield rows("any", [0.5]).drop(columns=["steps", "minutes"]).assign(suffix="T1w")

    monkeypatch.setattr(findings, "trained", trained)
    monkeypatch.setattr(findings, "measured", measured)
    monkeypatch.setattr(findings, "load_checkpoint", lambda _: {"step": 50})
    monkeypatch.setattr(findings, "minutes_of", lambda _: 4.0)
    options = SimpleNamespace(
        data=tmp_path, work=tmp_path, spacing=4.0, minutes=4.0, source_minutes=6.0
    )
    found = findings.run(options, "stages")
    source = str(tmp_path / "stages-source.pt")
    assert asked == {
        "stages-source": ("", 6.0, None),
        "stages-two-stage": (source, 4.0, None),
        "stages-all-at-once": (source, 4.0, 50),
        "stages-scratch": ("", 4.0, 50),
    }
    assert shown[0] == ("stages-none", "stages-source", "stages-source"), "the source as it is"
    assert list(found["run"]) == ["none", "two-stage", "all-at-once", "scratch"]
    assert list(found.columns) == list(findings.COLUMNS)


def test_the_table_of_a_finding_has_its_runs_in_order(findings):
    both = [
        rows("any", dice).assign(finding="slant", run=name, suffix="T1w", structures=kind)
        for name, dice in (("mixed", [0.7, 0.8]), ("new", [0.4, 0.6]), ("source", [0.1, 0.1]))
        for kind in ("14", "all")
    ]
    text = findings.markdown(pd.concat(both))
    assert "`slant`: `malc`, T1w" in text
    assert "| run | 14 sub-cortical | all structures | steps |" in text
    assert "| mixed | 0.750 ± 0.071 | 0.750 ± 0.071 | 100 |" in text
    assert text.index("| source") < text.index("| new") < text.index("| mixed")
