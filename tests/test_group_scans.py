"""The level ``group``: which scans are in the tables, and as what."""

from __future__ import annotations

import json

import pytest

from tests.studies import TYPICAL, Person, write_person
from tests.test_group import read, some, study
from tlseg_bids.cli.run import main


def test_a_scan_without_its_sidecar_is_named_and_not_in_the_tables(tmp_path, caplog) -> None:
    people = some(3)
    arguments = study(tmp_path, people, None)
    sidecar = tmp_path / "out" / people[1].folder / f"{people[1].stem}_dseg.json"
    sidecar.unlink()
    assert main(arguments) == 1
    assert f"it is not finished: there is no {sidecar.name} ({sidecar.parent})" in caplog.text
    assert "label the scan again (level participant)" in caplog.text
    there = read(tmp_path / "out", "group_volumes")["participant_id"].tolist()
    assert there == ["sub-00", "sub-02"]
    assert sidecar.name in (tmp_path / "out" / "group.html").read_text()
