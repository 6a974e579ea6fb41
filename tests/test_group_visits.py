"""The level ``group``: which scans of a participant are visits, and between which is a change."""

from __future__ import annotations

from pathlib import Path

from tests.studies import Person, write_derivatives, write_raw
from tests.test_group import read, some
from tlseg_bids.cli.run import main


def visits(tmp_path: Path, people: list[Person], table: str) -> list[str]:
    """Write a study with the same sessions table for everybody; the arguments of the program."""
    texts = {f"sub-{one.label}/sub-{one.label}_sessions.tsv": table for one in people}
    write_raw(tmp_path / "raw", texts)
    write_derivatives(tmp_path / "out", people)
    return [str(tmp_path / "raw"), str(tmp_path / "out"), "group"]


def test_ages_since_birth_and_post_menstrual_ages_are_not_put_on_one_line(tmp_path, caplog) -> None:
    people = [*some(3, session="newborn"), *some(3, session="m06")]
    heads = "session_id|age_months|scan_age\n"
    mixed = heads + "ses-newborn|n/a|41\nses-m06|6|n/a\n"
    assert main(visits(tmp_path, people, mixed)) == 0
    assert read(tmp_path / "out", "group_change").empty
    sentence = (
        "no change is computed for sub-00, sub-01, sub-02: at some visits only the age since birth "
        "is known and at others only the post-menstrual age, which count from different days; give "
        "acq_time, or one of the two ages for every visit, in scans.tsv or sessions.tsv"
    )
    assert sentence in caplog.text
    assert sentence in (tmp_path / "out" / "group.html").read_text()
    caplog.clear()
    post_menstrual = heads + "ses-newborn|n/a|41\nses-m06|6|67\n"
    assert main(visits(tmp_path, people, post_menstrual)) == 0
    change = read(tmp_path / "out", "group_change")
    assert set(change["participant_id"]) == {"sub-00", "sub-01", "sub-02"}
    assert set(change["span_years"].round(6)) == {round(26 * 7 / 365.25, 6)}
    assert set(change["scan"].str.split("_").str[1]) == {"ses-newborn"}
    assert "no change" not in caplog.text


def test_visits_without_a_time_are_told(tmp_path, caplog) -> None:
    people = [*some(2, session="a"), *some(2, session="b")]
    assert main(visits(tmp_path, people, "session_id|age\nses-a|30\nses-b|n/a\n")) == 0
    assert read(tmp_path / "out", "group_change").empty
    assert (
        "no change is computed for sub-00, sub-01, as the time of some visits is not known; give "
        "acq_time, or the age at every visit, in scans.tsv or sessions.tsv" in caplog.text
    )
