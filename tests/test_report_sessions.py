"""The sessions of a subject on the page: which are compared, and in which order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.test_report import report, words, write_scan
from tlseg_bids.report import derivatives
from tlseg_bids.report.changes import Changes, changes
from tlseg_bids.report.verdict import volume_rows


def tables(out: Path) -> list[Changes]:
    scans, _ = derivatives.labelled_scans(out, "01")
    return changes([(scan, volume_rows(scan)) for scan in scans])


def write(out: Path, *sessions: str, more: str = "") -> None:
    """A scan of every session; the dataset's folders have the sessions' names."""
    for session in sessions:
        stem = f"sub-01_ses-{session}{more}_space-T1w"
        dseg = write_scan(out, stem)
        raw = out / "raw" / "sub-01" / "anat" / f"{stem.replace('_space-', '_')}.nii.gz"
        here = out / "raw" / "sub-01" / f"ses-{session}" / "anat" / raw.name
        here.parent.mkdir(parents=True, exist_ok=True)
        raw.rename(here)
        sidecar = dseg.with_name(dseg.name.replace(".nii.gz", ".json"))
        told = json.loads(sidecar.read_text())
        told["Sources"] = [f"bids:raw:{here.relative_to(out / 'raw')}"]
        sidecar.write_text(json.dumps(told))


def names(table: Changes) -> list[str]:
    return [title.split(",")[0].removeprefix("session ") for title in table.titles]


def aged(out: Path, key: str, **ages: float | None) -> None:
    for session, age in ages.items():
        (sidecar,) = out.rglob(f"*ses-{session}_*aseg_dseg.json")
        told = json.loads(sidecar.read_text())
        sidecar.write_text(json.dumps({**told, "Age": {key: age}}))


def test_sessions_that_end_in_numbers_are_in_their_order(tmp_path) -> None:
    write(tmp_path, "1", "2", "10")
    (found,) = tables(tmp_path)
    assert (names(found), found.basis) == (["1", "2", "10"], "number of the session")


@pytest.mark.parametrize("key", ["Days", "PostMenstrualWeeks"])
def test_ages_come_before_names_where_all_differ(tmp_path, key) -> None:
    write(tmp_path, "1", "2")
    aged(tmp_path, key, **{"1": 300.5, "2": 200})
    assert (names(*tables(tmp_path)), tables(tmp_path)[0].basis) == (["2", "1"], "age")
    aged(tmp_path, key, **{"1": 200, "2": 200})
    assert tables(tmp_path)[0].basis == "number of the session"


@pytest.mark.parametrize("table", ["sessions", "scans"])
def test_the_acquisition_time_comes_before_everything(tmp_path, table) -> None:
    write(tmp_path, "post", "pre")
    aged(tmp_path, "Days", post=100, pre=200)
    folder = tmp_path / "raw" / "sub-01"
    dates = {"post": "2021-05-01T10:00:00", "pre": "2020-05-01"}
    rows = [f"ses-{session}\t{date}" for session, date in dates.items()]
    if table == "sessions":
        text = "\n".join(["session_id\tacq_time", *rows])
        (folder / "sub-01_sessions.tsv").write_text(text)
    else:
        for session, date in dates.items():
            text = f"filename\tacq_time\nanat/sub-01_ses-{session}_T1w.nii.gz\t{date}\n"
            (folder / f"ses-{session}" / f"sub-01_ses-{session}_scans.tsv").write_text(text)
    (found,) = tables(tmp_path)
    assert (names(found), found.basis) == (["pre", "post"], "acquisition time")


def test_without_an_order_there_is_no_change_and_a_sentence(tmp_path) -> None:
    write(tmp_path, "pre1", "post1")
    (found,) = tables(tmp_path)
    assert (names(found), found.basis) == (["post1", "pre1"], "")
    text = words(report(tmp_path).text)
    assert "Volumes of the sessions, T1w" in text
    assert "Change, %" not in text
    assert "No change is told, as nothing says which session came first" in text


def test_scans_of_another_acquisition_are_not_compared(tmp_path) -> None:
    write(tmp_path, "1", more="_acq-mprage")
    write(tmp_path, "2", more="_acq-space")
    assert tables(tmp_path) == []
    write(tmp_path, "2", more="_acq-mprage")
    write(tmp_path, "3", more="_acq-mprage_ce-gd")
    (found,) = tables(tmp_path)
    assert (names(found), found.kind) == (["1", "2"], "T1w, acquisition mprage")


def labelled_by(out: Path, **models: tuple[str, str, str]) -> None:
    """Write name, version and checksum of the model into the sidecar of each session."""
    for session, model in models.items():
        (sidecar,) = out.rglob(f"*ses-{session}_*aseg_dseg.json")
        told = json.loads(sidecar.read_text())
        named = dict(zip(("Name", "Version", "Sha256"), model, strict=True))
        sidecar.write_text(json.dumps({**told, "Model": {**told["Model"], **named}}))


def test_no_change_is_told_between_sessions_that_different_models_labelled(tmp_path) -> None:
    write(tmp_path, "1", "2")
    labelled_by(tmp_path, **{"1": ("infant", "0.5.2", "ab"), "2": ("any", "0.6.3", "cd")})
    (found,) = tables(tmp_path)
    assert (found.basis, found.models) == ("", ("infant 0.5.2", "any 0.6.3"))
    assert found.titles == ("session 1, T1w, infant 0.5.2", "session 2, T1w, any 0.6.3")
    assert all(math.isnan(percent) for _, _, percent in found.rows)
    text = words(report(tmp_path).text)
    assert "Volumes of the sessions, T1w" in text
    assert "Change, %" not in text
    assert (
        "No change is told, as the sessions were labelled by different models (infant 0.5.2, any "
        "0.6.3): a difference between models would look like one of the brain. For a change, label "
        "all sessions with one model that is made for all of them:" in text
    )
    assert "tlseg BIDS_DIR OUT_DIR participant --participant-label 01 --model NAME" in text


def test_sessions_of_one_model_among_several_have_their_own_change(tmp_path) -> None:
    write(tmp_path, "1", "2", "3")
    newer = dict.fromkeys("23", ("any", "0.6.3", "cd"))
    labelled_by(tmp_path, **{"1": ("any", "0.6.2", "ab")}, **newer)
    every, own = tables(tmp_path)
    assert every.models == ("any 0.6.2", "any 0.6.3")
    assert (names(own), own.kind) == (["2", "3"], "T1w, labelled by any 0.6.3")
    assert own.basis == "number of the session"


def test_weights_of_another_checksum_are_another_model(tmp_path) -> None:
    write(tmp_path, "1", "2")
    labelled_by(tmp_path, **{"1": ("lab", "1", "ab" * 32), "2": ("lab", "1", "cd" * 32)})
    (found,) = tables(tmp_path)
    assert found.models == ("lab 1 (weights abababab)", "lab 1 (weights cdcdcdcd)")
