"""Repeated scans at the level ``group``: which run ``--multi-run`` proposes to use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.studies import STRUCTURES, TYPICAL, Person, write_derivatives, write_raw
from tlseg_bids.cli.run import main

MOVED = {"Verdict": {"Decision": "exclude", "Reasons": ["The image is noisy."]}}


def dice(value: float) -> dict[str, object]:
    return {"QualityControl": {"predicted_dice": value}}


def group(tmp_path: Path, people: list[Person], *options: str) -> pd.DataFrame:
    """The table of proposals, by scan."""
    raw, out = write_raw(tmp_path / "raw"), write_derivatives(tmp_path / "out", people)
    assert main([str(raw), str(out), "group", *options]) == 0
    table = pd.read_csv(out / "group_exclusion.tsv", sep="\t", na_values="n/a")
    return table.set_index("scan")


def repeated(*qualities: dict[str, object], **more: str) -> list[Person]:
    """Runs of one participant, in the order of their numbers."""
    return [
        Person("01", TYPICAL, run=f"{n}", sidecar=quality, **more)
        for n, quality in enumerate(qualities, 1)
    ]


@pytest.mark.parametrize(
    ("qualities", "best"),
    [
        ((dice(0.80), dice(0.85)), 2),
        ((dice(0.85), dice(0.80)), 1),
        ((dice(0.85), dice(0.85)), 1),
        (({**dice(0.90), **MOVED}, dice(0.70)), 2),
        (({**dice(0.90), "Flags": ["The scan ends early."]}, dice(0.70)), 2),
        (({"QualityControl": {}}, dice(0.70)), 2),
    ],
)
def test_the_run_of_best_quality_is_to_be_used(tmp_path, caplog, qualities, best) -> None:
    people = repeated(*qualities)
    found = group(tmp_path, people, "--multi-run", "best-qc")
    stems = [person.stem for person in people]
    other = stems[2 - best]
    assert found.loc[other, "proposal"] == "exclude"
    first = found.loc[other, "reasons"].split("; ")[0]
    assert first == f"use {stems[best - 1]} instead (--multi-run best-qc)"
    assert "instead" not in str(found.loc[stems[best - 1], "reasons"])
    assert found.loc[stems[best - 1], "proposal"] != "exclude"
    assert (
        "--multi-run best-qc: 1 scan with several runs; one run of 1 is to be used, 1 other to be "
        "left out (group_exclusion.tsv)"
    ) in caplog.text


@pytest.mark.parametrize("which", ["first", "best-qc"])
def test_a_scan_none_of_whose_runs_is_fit_is_told(tmp_path, caplog, which) -> None:
    people = repeated({**dice(0.70), **MOVED}, {**dice(0.80), **MOVED})
    found = group(tmp_path, people, "--multi-run", which)
    assert set(found["proposal"]) == {"exclude"}
    assert not found["reasons"].str.contains("instead").any()
    assert f"all runs are to be excluded of {people[0].stem}" in caplog.text
    assert "one run of 0 is to be used, 0 others to be left out" in caplog.text


def test_first_passes_over_a_run_to_exclude(tmp_path) -> None:
    people = repeated({**dice(0.90), **MOVED}, dice(0.70), dice(0.80))
    found = group(tmp_path, people, "--multi-run", "first")
    assert list(found["proposal"]) == ["exclude", "use", "exclude"]
    assert found.loc[people[0].stem, "reasons"].startswith(f"use {people[1].stem} instead")


def test_a_rater_outweighs_the_expected_dice(tmp_path) -> None:
    people = repeated(dice(0.9), dice(0.7))
    ratings = tmp_path / "x_ratings.tsv"
    ratings.write_text(f"participant_id\tscan\trating\nsub-01\t{people[0].stem}\tfail\n")
    found = group(tmp_path, people, "--multi-run", "best-qc", "--ratings", str(ratings))
    assert found["proposal"].to_dict() == {people[0].stem: "exclude", people[1].stem: "use"}
    assert found.loc[people[0].stem, "reasons"].endswith("rated 'fail'")


def test_first_takes_the_lowest_number_and_each_leaves_all(tmp_path) -> None:
    people = [Person("01", TYPICAL, run=run) for run in ("10", "9")]
    found = group(tmp_path, people, "--multi-run", "first")
    assert found["proposal"].to_dict() == {people[0].stem: "exclude", people[1].stem: "use"}
    for options in ((), ("--multi-run", "each")):
        assert set(group(tmp_path, people, *options)["proposal"]) == {"use"}


def test_only_runs_of_one_scan_stand_for_each_other(tmp_path, caplog) -> None:
    people = [
        Person("01", TYPICAL, session="a"), Person("01", TYPICAL, session="b"),
        Person("02", TYPICAL), Person("02", TYPICAL, suffix="T2w"),
        Person("03", TYPICAL, echo="1", run="1"), Person("03", TYPICAL, echo="2", run="2"),
    ]  # fmt: skip
    assert set(group(tmp_path, people, "--multi-run", "best-qc")["proposal"]) == {"use"}
    assert "--multi-run best-qc: no scan was repeated" in caplog.text


def test_reliability_and_tables_keep_every_run(tmp_path) -> None:
    noise = np.random.default_rng(0).normal(1, 0.05, (4, 2, STRUCTURES))
    people = [
        Person(f"{n:02d}", TYPICAL * noise[n, run - 1], run=str(run), sidecar=dice(0.7 + run / 100))
        for n in range(4)
        for run in (1, 2)
    ]
    found = group(tmp_path, people, "--multi-run", "best-qc")
    assert (found["proposal"] == "exclude").sum() == 4
    for name, rows in (("group_volumes", 8), ("group_reliability", STRUCTURES + 2)):
        table = pd.read_csv(tmp_path / "out" / f"{name}.tsv", sep="\t")
        assert len(table) == rows
