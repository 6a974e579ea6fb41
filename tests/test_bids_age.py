"""Age at the scan: every table, unit and excuse, and the sentence where there is none."""

from __future__ import annotations

import pytest

from tests.datasets import config, make_dataset, table
from tlseg_bids.bids.age import DAYS_PER_YEAR, parse_age
from tlseg_bids.bids.discover import discover
from tlseg_bids.errors import UsageError

MONTH = DAYS_PER_YEAR / 12
SESSION_SCAN = "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
PEOPLE = "participants.tsv"


def age_of(tmp_path, texts, scan="sub-01/anat/sub-01_T1w.nii.gz", **options):
    root = make_dataset(tmp_path / "raw", [scan], texts)
    (found,), unusable = discover(config(root, **options))
    assert not unusable
    return found.age


@pytest.mark.parametrize(
    ("text", "days", "pma"),
    [
        ("34", 34 * DAYS_PER_YEAR, None),
        ("34,5", 34.5 * DAYS_PER_YEAR, None),
        ("0", 0, None),
        ("6 months", 6 * MONTH, None),
        ("6m", 6 * MONTH, None),
        ("10 days old", 10, None),
        ("2y3m", 2 * DAYS_PER_YEAR + 3 * MONTH, None),
        ("2 years and 3 months", 2 * DAYS_PER_YEAR + 3 * MONTH, None),
        ("034Y", 34 * DAYS_PER_YEAR, None),
        ("000D", 0, None),
        ("40w pma", None, 40),
        ("40 PMA", None, 40),
        ("40+3 weeks pma", None, 40 + 3 / 7),
        ("280 days post-menstrual age", None, 40),
    ],
)
def test_an_age_on_the_command_line_is_read(text, days, pma):
    age = parse_age(text)
    assert age.source == "--age"
    assert age.days == pytest.approx(days)
    assert age.pma_weeks == pytest.approx(pma)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("old", "'old' is not an age"),
        ("-3", "'-3' is not an age"),
        ("12 13", "'12 13' is not an age"),
        ("6 fortnights", "'fortnights' is neither days, weeks, months nor years"),
        ("400", "'400' taken as years is more than 125 years"),
        ("5 pma", "'5 pma' is 5 post-menstrual weeks, outside 18 to 200"),
        ("89+", "it says '89+', which is a bound and no age"),
        ("n/a", "it says 'n/a'"),
    ],
)
def test_no_age_on_the_command_line_is_a_sentence(text, reason):
    with pytest.raises(UsageError) as error:
        parse_age(text)
    assert str(error.value) == (
        f"the age '{text}' cannot be used: {reason} – --age – write years (34), another unit "
        "(6 months, 10 days) or post-menstrual weeks (40w pma)"
    )
    assert error.value.exit_code == 64


def test_years_are_the_default_unit(tmp_path):
    age = age_of(tmp_path, {PEOPLE: table("participant_id|age", "sub-01|34")})
    assert age.years == 34
    assert age.source == "participants.tsv"


@pytest.mark.parametrize(
    ("units", "days"),
    [("months", 34 * MONTH), ("month(s)", 34 * MONTH), ("Weeks", 238), ("d", 34), ("yr", 12418.5)],
)
def test_units_of_the_json_are_obeyed(tmp_path, units, days):
    texts = {
        PEOPLE: table("participant_id|age", "sub-01|34"),
        "participants.json": {"age": {"Units": units}},
    }
    assert age_of(tmp_path, texts).days == pytest.approx(days)


@pytest.mark.parametrize(
    ("column", "days"),
    [("age_days", 34), ("age_weeks", 238), ("age_months", 34 * MONTH), ("Age_Years", 12418.5)],
)
def test_the_column_name_gives_the_unit(tmp_path, column, days):
    texts = {PEOPLE: table(f"participant_id|{column}", "01|34")}
    assert age_of(tmp_path, texts).days == pytest.approx(days)


@pytest.mark.parametrize("column", ["scan_age", "pma", "pma_weeks"])
def test_post_menstrual_age_is_read_in_weeks(tmp_path, column):
    texts = {
        "sub-01/sub-01_sessions.tsv": table(f"session_id|{column}", "ses-1|41.5"),
        PEOPLE: table("participant_id|age", "sub-01|1"),
    }
    age = age_of(tmp_path, texts, SESSION_SCAN)
    assert (age.pma_weeks, age.days, age.source) == (41.5, None, "sub-01_sessions.tsv")


def test_post_menstrual_units_of_the_json_are_obeyed(tmp_path):
    texts = {
        PEOPLE: table("participant_id|age", "sub-01|38"),
        "participants.json": {"age": {"Units": "weeks (post-menstrual age)"}},
    }
    assert age_of(tmp_path, texts).pma_weeks == 38


def test_weeks_of_gestation_are_post_menstrual(tmp_path):
    texts = {
        PEOPLE: table("participant_id|age", "sub-01|38"),
        "participants.json": {"age": {"Units": "GA weeks"}},
    }
    age = age_of(tmp_path, texts)
    assert (age.days, age.pma_weeks) == (None, 38)


@pytest.mark.parametrize("units", ["weeks post-conception", "postconceptional weeks"])
def test_weeks_since_conception_are_not_taken_as_since_birth(tmp_path, units):
    texts = {
        PEOPLE: table("participant_id|age", "sub-01|40"),
        "participants.json": {"age": {"Units": units}},
    }
    age = age_of(tmp_path, texts)
    assert (age.days, age.pma_weeks) == (None, None)
    assert age.source == (
        f"participants.tsv, column 'age': the unit '{units}' counts from conception; since birth "
        "or post-menstrual is needed"
    )


def test_scans_come_before_sessions_and_participants(tmp_path):
    texts = {
        "sub-01/ses-1/sub-01_ses-1_scans.tsv": table(
            "filename|age", "anat/sub-01_ses-1_T1w.nii.gz|3"
        ),
        "scans.json": {"age": {"Units": "days"}},
        "sub-01/sub-01_sessions.tsv": table("session_id|age", "ses-1|2"),
        PEOPLE: table("participant_id|age", "sub-01|1"),
    }
    age = age_of(tmp_path, texts, SESSION_SCAN)
    assert (age.days, age.source) == (3, "sub-01_ses-1_scans.tsv")


def test_sessions_come_before_participants_and_an_unknown_age_falls_through(tmp_path):
    texts = {
        "sub-01/ses-1/sub-01_ses-1_scans.tsv": table(
            "filename|age", "anat/sub-01_ses-1_T1w.nii.gz|n/a"
        ),
        "sub-01/sub-01_sessions.tsv": table("session_id|age", "ses-1|2", "ses-2|4"),
        PEOPLE: table("participant_id|age", "sub-01|1"),
    }
    age = age_of(tmp_path, texts, SESSION_SCAN)
    assert (age.years, age.source) == (2, "sub-01_sessions.tsv")


def test_a_participants_table_with_sessions_gives_the_row_of_the_session(tmp_path):
    people = table("participant_id|session_id|age", "sub-01|ses-1|7", "sub-01|ses-2|8")
    assert age_of(tmp_path, {PEOPLE: people}, SESSION_SCAN).years == 7


def test_the_command_line_wins(tmp_path):
    people = table("participant_id|age", "sub-01|1")
    age = age_of(tmp_path, {PEOPLE: people}, age="6 months")
    assert (age.days, age.source) == (pytest.approx(6 * MONTH), "--age")


@pytest.mark.parametrize(
    ("people", "source"),
    [
        (None, "not given"),
        ("", "participants.tsv is empty"),
        (table("participant_id|sex", "sub-01|F"), "participants.tsv has no age column"),
        (table("participant_id|age", "sub-02|3"), "participants.tsv has no row for it"),
        (table("subject|age", "sub-01|3"), "participants.tsv has no column 'participant_id'"),
        ("participant_id,age\nsub-01,3\n", "participants.tsv has no column 'participant_id'"),
        (
            table("participant_id|age", "sub-01"),
            "participants.tsv, column 'age': it says 'nothing'",
        ),
        (
            table("participant_id|age", "sub-01|n/a"),
            "participants.tsv, column 'age': it says 'n/a'",
        ),
        (
            table("participant_id|age", "sub-01|89+"),
            "participants.tsv, column 'age': it says '89+', which is a bound and no age",
        ),
        (
            table("participant_id|age", "sub-01|<b>"),
            "participants.tsv, column 'age': '<b>' is not an age",
        ),
        (
            table("participant_id|age", "sub-01|300"),
            "participants.tsv, column 'age': '300' taken as years is more than 125 years",
        ),
        (
            table("participant_id|age", "sub-01|3", "sub-01|4"),
            "participants.tsv has 2 rows for it with different ages",
        ),
    ],
)
def test_an_age_that_is_not_there_is_no_error_but_a_reason(tmp_path, people, source):
    age = age_of(tmp_path, {} if people is None else {PEOPLE: people})
    assert (age.days, age.pma_weeks, age.source) == (None, None, source)


@pytest.mark.parametrize(
    ("header", "described"),
    [
        ("participant_id|age", {"Age": {"Units": "weeks"}}),
        ("participant_id|AGE", {"age": {"units": "weeks"}}),
        ("Participant_ID|age", {"age": {"Units": "weeks"}}),
        ("Participant_ID|Session_ID|age", {"age": {"Units": "weeks"}}),
    ],
)
def test_upper_and_lower_case_of_names_do_not_matter(tmp_path, header, described):
    rows = {2: ("sub-01|34",), 3: ("sub-01|ses-1|34", "sub-01|ses-2|40")}[header.count("|") + 1]
    texts = {PEOPLE: table(header, *rows), "participants.json": described}
    age = age_of(tmp_path, texts, SESSION_SCAN)
    assert (age.days, age.source) == (34 * 7, "participants.tsv")


@pytest.mark.parametrize("written", ["anat/{}", "./anat/{}", "/anat/{}"])
def test_the_row_of_a_scan_is_found_by_its_path(tmp_path, written):
    file = written.format("sub-01_ses-1_T1w.nii.gz")
    texts = {"sub-01/ses-1/sub-01_ses-1_scans.tsv": table("Filename|age", f"{file}|34")}
    assert age_of(tmp_path, texts, SESSION_SCAN).days == 34 * DAYS_PER_YEAR


def test_an_unknown_unit_is_a_reason(tmp_path):
    texts = {
        PEOPLE: table("participant_id|age", "sub-01|3"),
        "participants.json": {"age": {"Units": "moons"}},
    }
    assert age_of(tmp_path, texts).source == (
        "participants.tsv, column 'age': the unit 'moons' is neither days, weeks, months nor years"
    )


def test_a_table_that_is_a_dangling_link_is_a_reason(tmp_path):
    root = make_dataset(tmp_path / "raw")
    (root / PEOPLE).symlink_to(".git/annex/objects/x")
    (scan,), _ = discover(config(root))
    assert scan.age.source == "participants.tsv is a link to a file that is not here"


@pytest.mark.parametrize("inside", ["\v", "\f", "\x1e", "\x85", "\u2028"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_break_inside_a_cell_ends_no_row(tmp_path, inside, end):
    lines = ("participant_id\tnote\tage", f"sub-01\tmoved{inside}twice\t0.5", "sub-02\t\t30", "")
    age = age_of(tmp_path, {PEOPLE: end.join(lines)})
    assert (age.years, age.source) == (0.5, PEOPLE)


def test_a_table_in_another_encoding_is_read(tmp_path):
    root = make_dataset(tmp_path / "raw")
    (root / PEOPLE).write_bytes(b"\xef\xbb\xbfparticipant_id\tname\tage\r\nsub-01\tJos\xe9\t3\r\n")
    (scan,), _ = discover(config(root))
    assert scan.age.years == 3
