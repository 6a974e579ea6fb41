"""The level ``group``: from which scans and volumes a correction is fitted, and what is scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.studies import Person, simulate
from tests.test_group import COMBAT, THREE_SITES, study, told
from tlseg_bids.cli.run import main

RESIDUAL = ("--icv-correction", "residual")


def parameters(out: Path) -> dict:
    """What was fitted, of the only stratum."""
    (stratum,) = json.loads((out / "group_parameters.json").read_text())["Strata"].values()
    return stratum


def sites(fitted: dict) -> dict[str, int]:
    """Scans of every site in the fit."""
    return {site: told["Scans"] for site, told in fitted["Combat"]["Sites"].items()}


def twice(people: list[Person], **more: object) -> list[Person]:
    """Two sessions of everybody; `more` is of the first alone."""
    first = [replace(one, session="1", **more) for one in people]
    return [*first, *(replace(one, session="2") for one in people)]


def test_the_first_scan_is_the_first_of_those_that_are_fitted_on(tmp_path) -> None:
    people, rows = simulate(60, THREE_SITES)
    arguments = study(tmp_path, twice(people), "\n".join(rows) + "\n")
    options = [*COMBAT, *RESIDUAL, "--fit-where", "session_id=ses-2"]
    assert main([*arguments, *options]) == 0
    later = parameters(tmp_path / "out")
    assert later["HeadSize"]["Scans"] == 60
    assert sites(later) == {"A": 20, "B": 20, "C": 20}
    assert main([*arguments, *options[:-1], "session_id=ses-1"]) == 0
    assert parameters(tmp_path / "out") == later  # both sessions hold the same volumes


def test_a_first_scan_without_head_size_or_covariate_gives_way_to_the_second(tmp_path) -> None:
    people, rows = simulate(60, THREE_SITES)
    texts = {
        f"sub-{one.label}/sub-{one.label}_sessions.tsv":
        "session_id|weight\nses-1|n/a\nses-2|" + str(60 + n) + "\n" for n, one in enumerate(people)
    }  # fmt: skip
    arguments = study(tmp_path, twice(people, icv=None), "\n".join(rows) + "\n")
    for name, text in texts.items():
        (tmp_path / "raw" / name).parent.mkdir()
        (tmp_path / "raw" / name).write_text(text.replace("|", "\t"))
    assert main([*arguments, *RESIDUAL]) == 0
    assert parameters(tmp_path / "out")["HeadSize"]["Scans"] == 60
    assert main([*arguments, "--combat", "site", "--combat-covariates", "weight"]) == 0
    assert sites(parameters(tmp_path / "out")) == {"A": 20, "B": 20, "C": 20}


def test_a_covariate_that_no_scan_has_is_named(tmp_path, capsys) -> None:
    people, rows = simulate(30, THREE_SITES)
    table = [rows[0] + "|weight", *(f"{row}|n/a" for row in rows[1:])]
    arguments = study(tmp_path, people, "\n".join(table) + "\n")
    assert main([*arguments, *COMBAT, "weight"]) == 64
    assert "the column 'weight' has no value in the scans of the fit" in told(capsys)
