"""The level ``group``: which scans are in the tables, and as what."""

from __future__ import annotations

import json

from tests.studies import Person
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


def test_an_unfinished_scan_of_a_session_that_was_not_selected_is_no_failure(
    tmp_path, caplog
) -> None:
    people = [*some(2, session="newborn"), *some(2, session="m06")]
    arguments = study(tmp_path, people, None)
    (tmp_path / "out" / people[3].folder / f"{people[3].stem}_dseg.json").unlink()
    assert main([*arguments, "--session-label", "newborn"]) == 0
    assert "is not finished" not in caplog.text
    assert main([*arguments, "--session-label", "newborn", "m06"]) == 1
    assert f"it is not finished: there is no {people[3].stem}_dseg.json" in caplog.text


def test_echoes_of_one_scan_are_no_repeated_scans(tmp_path) -> None:
    people = [
        Person(one.label, one.volumes * (1 + 0.1 * int(echo)), session="a", echo=echo)
        for one in some(4)
        for echo in "12"
    ]
    assert main(study(tmp_path, people, None)) == 0
    out = tmp_path / "out"
    assert read(out, "group_volumes")["echo"].tolist() == [1, 2] * 4
    assert json.loads((out / "group_volumes.json").read_text())["echo"]["Description"]
    assert read(out, "group_reliability").empty


def test_the_dictionary_says_what_a_brain_volume_and_an_exclusion_are(tmp_path) -> None:
    assert main(study(tmp_path, some(3), None)) == 0
    told = json.loads((tmp_path / "out" / "group_volumes.json").read_text())
    assert told["brain_mm3"]["Description"] == (
        "Volume of brain without the fluid around it (hard), as measured"
    )
    told = json.loads((tmp_path / "out" / "group_exclusion.json").read_text())
    assert told["proposal"]["Levels"]["exclude"] == (
        "a rater failed it, or nobody rated it and its verdict is exclude; with --multi-run first "
        "or best-qc also: another run of the scan is to be used"
    )
