"""The level ``group``: which scans of a participant are visits, and between which is a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.studies import Person, write_derivatives, write_raw
from tests.test_group import read, some
from tlseg_bids.cli.run import main


def visits(tmp_path: Path, people: list[Person], table: str) -> list[str]:
    """Write a study with the same sessions table for everybody; the arguments of the program."""
    texts = {f"sub-{one.label}/sub-{one.label}_sessions.tsv": table for one in people}
    write_raw(tmp_path / "raw", texts)
    write_derivatives(tmp_path / "out", people)
    return [str(tmp_path / "raw"), str(tmp_path / "out"), "group"]


def labelled_by(people: list[Person], name: str, version: str, weights: str = "ab") -> list[Person]:
    """The same scans, labelled by another model."""
    model = {"Name": name, "Version": version, "Sha256": weights * 32, "Licence": "CC0"}
    return [replace(one, sidecar={**one.sidecar, "Model": model}) for one in people]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            "session_id|age_months|scan_age\nses-a|n/a|41\nses-b|6|n/a\n",
            "no change is computed for sub-00, sub-01: at some visits only the age since birth is "
            "known and at others only the post-menstrual age, which count from different days; "
            "give acq_time, or one of the two ages for every visit, in scans.tsv or sessions.tsv",
        ),
        (
            "session_id|age\nses-a|30\nses-b|n/a\n",
            "no change is computed for sub-00, sub-01, as the time of some visits is not known; "
            "give acq_time, or the age at every visit, in scans.tsv or sessions.tsv",
        ),
    ],
)
def test_visits_that_no_time_orders_are_told(tmp_path, caplog, table, sentence) -> None:
    people = [*some(2, session="a"), *some(2, session="b")]
    assert main(visits(tmp_path, people, table)) == 0
    assert read(tmp_path / "out", "group_change").empty
    assert sentence in caplog.text
    assert sentence in (tmp_path / "out" / "group.html").read_text()


def test_post_menstrual_ages_at_every_visit_order_them(tmp_path, caplog) -> None:
    people = [*some(3, session="newborn"), *some(3, session="m06")]
    table = "session_id|age_months|scan_age\nses-newborn|n/a|41\nses-m06|6|67\n"
    assert main(visits(tmp_path, people, table)) == 0
    change = read(tmp_path / "out", "group_change")
    assert set(change["participant_id"]) == {"sub-00", "sub-01", "sub-02"}
    assert set(change["span_years"].round(6)) == {round(26 * 7 / 365.25, 6)}
    assert set(change["scan"].str.split("_").str[1]) == {"ses-newborn"}
    assert "no change" not in caplog.text


YEARLY = "session_id|age\nses-a|30\nses-b|31\nses-c|32\n"


def test_no_change_is_computed_between_scans_of_different_models(tmp_path, caplog) -> None:
    people = [*labelled_by(some(2, session="a"), "infant", "0.5.2"),
              *labelled_by(some(2, session="b"), "any", "0.6.3")]  # fmt: skip
    assert main(visits(tmp_path, people, YEARLY)) == 0
    assert read(tmp_path / "out", "group_change").empty
    mixed = (
        "different models labelled the scans of sub-00, sub-01 (any 0.6.3, infant 0.5.2): no "
        "change and no agreement is computed between scans of different models; for these, label "
        "all scans of a participant with one model that is made for all of them (tlseg BIDS_DIR "
        "OUT_DIR participant --participant-label 00 01 --model NAME; tlseg-zoo list names the "
        "models)"
    )
    pooled = (
        "different models labelled the scans (any 0.6.3: 2, infant 0.5.2: 2), and their volumes "
        "differ in one and the same brain: outliers, and ComBat and the correction for head size "
        "where asked for, are of all these scans together; compare groups within one value of the "
        "columns 'model' and 'model_version', or label all scans with one model (tlseg BIDS_DIR "
        "OUT_DIR participant --model NAME)"
    )
    page = (tmp_path / "out" / "group.html").read_text().replace("&#39;", "'")
    for sentence in (mixed, pooled):
        assert sentence in caplog.text
        assert sentence in page


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (("any", "0.6.2", "ab"), "any 0.6.2, any 0.6.3"),
        (("any", "0.6.3", "cd"), "any 0.6.3 (weights abababab), any 0.6.3 (weights cdcdcdcd)"),
    ],
)
def test_the_visits_of_one_model_among_several_have_a_change(
    tmp_path, caplog, other, shown
) -> None:
    later = [*some(2, session="b"), *some(2, session="c")]
    people = [*labelled_by(some(2, session="a"), *other), *labelled_by(later, "any", "0.6.3")]
    assert main(visits(tmp_path, people, YEARLY)) == 0
    assert f"different models labelled the scans of sub-00, sub-01 ({shown})" in caplog.text
    change = read(tmp_path / "out", "group_change")
    assert set(change["participant_id"]) == {"sub-00", "sub-01"}
    assert set(change["span_years"]) == {1.0}
    assert set(change["model"] + change["model_version"]) == {"any0.6.3"}
    assert set(change["scan"].str.split("_").str[1]) == {"ses-b"}


def test_agreement_is_that_of_one_model(tmp_path, caplog) -> None:
    first, second = (some(8, session="a", run=run) for run in "12")
    people = [*labelled_by(first[:6] + second[:3] + second[6:], "any", "0.6.3"),
              *labelled_by(first[6:] + second[3:6], "infant", "0.5.2")]  # fmt: skip
    assert main(visits(tmp_path, people, YEARLY)) == 0
    agree = read(tmp_path / "out", "group_reliability")
    assert set(agree["participants"]) == {3}  # those whose two scans one model labelled
    assert set(agree["model"] + agree["model_version"]) == {"any0.6.3"}
    assert "different models labelled the scans of sub-03, sub-04, sub-05, sub-06" in caplog.text


def test_one_model_needs_no_word(tmp_path, caplog) -> None:
    people = [*some(2, session="a"), *some(2, session="b")]
    assert main(visits(tmp_path, people, YEARLY)) == 0
    assert "different models" not in caplog.text
    assert not read(tmp_path / "out", "group_change").empty
