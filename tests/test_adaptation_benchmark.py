"""The comparison of adaptations: which share counts, and what the table says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest

from tests.scripts import load_benchmark
from tlseg_bids.adapt.judge import MOST_FORGOTTEN

ROOT = Path(__file__).resolve().parents[1]
MUCH, LITTLE = MOST_FORGOTTEN + 0.01, MOST_FORGOTTEN - 0.01


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("adaptation")


def row(recipe: str, share: float | None, lost: float | None, dice: float, adults: float) -> dict:
    base = recipe == "base"
    return {
        "draw": 0, "scans": 0 if base else 3, "recipe": recipe, "share": share,
        "length": "none" if base else "300 steps", "rehearsal_lost": lost, "dice": dice,
        "adults": adults, "cpu_minutes": None if base else 5.0,
    }  # fmt: skip


@pytest.fixture
def rows() -> pd.DataFrame:
    return pd.DataFrame([
        row("base", None, None, 0.60, 0.73),
        row("auto", 1.0, MUCH, 0.80, 0.70),
        row("auto", 0.6, LITTLE, 0.75, 0.72),
        row("auto", 0.3, 0.0, 0.65, 0.73),
        row("new-only", 1.0, MUCH, 0.82, 0.60),
        row("scratch", 1.0, MUCH, 0.50, 0.10),
    ])  # fmt: skip


def test_the_furthest_share_that_forgets_little_counts(benchmark, rows):
    kept = benchmark.taken(rows).set_index("recipe")
    assert kept.loc["auto", "share"] == 0.6
    assert kept.loc["auto", "dice"] == 0.75


def test_without_such_a_share_the_smallest_is_told_as_refused(benchmark, rows):
    rows = pd.concat([rows, pd.DataFrame([row("new-only", 0.5, MUCH, 0.70, 0.68)])])
    found = benchmark.taken(rows.reset_index(drop=True)).set_index("recipe")
    assert found["kept"].to_dict() == {
        "auto": True, "base": True, "new-only": False, "scratch": True,
    }  # fmt: skip
    assert tuple(found.loc["new-only", ["share", "dice", "adults"]]) == (0.5, 0.70, 0.68)


def test_what_starts_from_scratch_forgets_nothing_that_counts(benchmark, rows):
    assert benchmark.taken(rows).set_index("recipe").loc["scratch", "dice"] == 0.50


def test_the_table_tells_gain_and_fall(benchmark, rows):
    lines = benchmark.summary(rows).splitlines()
    found = {line.split(" | ")[0].strip("| "): line for line in lines[2:]}
    assert set(found) == {"auto", "new-only", "scratch", "median of the recipes"}
    assert "| 0.750 | 0.150 | 0.130 | 5.0 |" in found["median of the recipes"]
    assert "1 of 1 | 0.6 | 0.750 (0.750 to 0.750) | 0.150 (0.150 to 0.150)" in found["auto"]
    assert "0 of 1 | 1 | 0.820 (0.820 to 0.820) | 0.220" in found["new-only"]


def test_a_task_without_the_base_dice_has_no_gain(benchmark, rows):
    line = benchmark.summary(rows.assign(dice=rows["dice"].where(rows["scans"] > 0)))
    assert "nan (nan to nan)" in line


def test_what_is_there_is_known_again(benchmark, tmp_path):
    table = benchmark.Table(tmp_path / "t.tsv")
    key = {"draw": 0, "scans": 3, "recipe": "auto", "length": "300 steps"}
    assert not table.has(key)
    table.add({**key, "share": 1.0, "dice": 0.7})
    again = benchmark.Table(tmp_path / "t.tsv")
    assert again.has(key)
    assert not again.has({**key, "length": "2 min"})


def test_from_scratch_nothing_is_rehearsed_or_averaged(benchmark):
    reading = SimpleNamespace(new_head=False)
    how = benchmark.how_to("scratch", SimpleNamespace(reading=reading), [])
    assert (how.name, how.scope, how.rehearsal) == ("scratch", "all", 0)
    assert (how.distillation, how.division) == (0, 0), "random weights have nothing to teach"
    assert how.shares == (1.0,)
