"""The level ``group``: from which scans and volumes a correction is fitted, and what is scored."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.studies import Person, simulate, write_person, write_raw
from tests.test_group import COMBAT, THREE_SITES, read, some, study, told
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


def test_a_few_words_in_a_column_of_numbers_are_unknown_and_told(tmp_path, caplog) -> None:
    people, rows = simulate(60, THREE_SITES)
    capped = [*rows[:5], "|".join(["sub-00004", "89+", *rows[5].split("|")[2:]]), *rows[6:]]
    arguments = study(tmp_path, people, "\n".join(capped) + "\n")
    options = ["--combat", "site", "--combat-covariates", "age", "sex"]
    assert main([*arguments, *options]) == 0
    assert parameters(tmp_path / "out")["Combat"]["Terms"] == ["scale", "offset", "age", "sex=M"]
    assert (
        "most values of the column 'age' are numbers, but '89+' is none: ComBat takes the column "
        "for numbers and these for unknown, so that the scans that have them are not harmonised; "
        "write numbers there if they are known, or words everywhere if these are categories"
        in caplog.text
    )
    table = read(tmp_path / "out", "group_volumes")
    assert np.flatnonzero(table["left_thalamus_combat_mm3"].isna()).tolist() == [4]


def test_words_with_a_few_numbers_are_categories(tmp_path, caplog) -> None:
    people, rows = simulate(60, THREE_SITES)
    table = [f"{row}|{('kind', 'x', 'y', '3')[0 if n == 0 else 1 + n // 2 % 3]}"
             for n, row in enumerate(rows)]  # fmt: skip
    arguments = study(tmp_path, people, "\n".join(table) + "\n")
    assert main([*arguments, *COMBAT, "kind"]) == 0
    terms = parameters(tmp_path / "out")["Combat"]["Terms"]
    assert terms[-2:] == ["kind=x", "kind=y"]
    assert "most values of the column" not in caplog.text


def test_a_scan_without_intracranial_volume_costs_the_others_nothing(tmp_path, caplog) -> None:
    people, rows = simulate(60, THREE_SITES)
    arguments = study(tmp_path, people, "\n".join(rows) + "\n")
    options = [*COMBAT, "--combat-reference", "A", *RESIDUAL]
    assert main([*arguments, *options]) == 0
    before = read(tmp_path / "out", "group_volumes")
    write_person(tmp_path / "out", replace(people[31], icv=None))
    assert main([*arguments, *options]) == 0
    assert (
        "59 of the 60 scans of the fit have a volume 'icv': ComBat is fitted on these"
        in caplog.text
    )
    after = read(tmp_path / "out", "group_volumes")
    assert np.flatnonzero(after["icv_combat_mm3"].isna()).tolist() == [31]
    others = np.arange(60) != 31
    assert np.allclose(after["icv_combat_mm3"][others], before["icv_combat_mm3"][others], rtol=0.02)
    thalamus = [table["left_thalamus_combat_mm3"] for table in (before, after)]
    assert np.allclose(*thalamus, rtol=1e-6)
    assert np.flatnonzero(after["left_thalamus_adjusted"].isna()).tolist() == [31]


def test_an_intracranial_volume_that_too_few_have_is_told_as_it_is(
    tmp_path, caplog, capsys
) -> None:
    people, rows = simulate(60, THREE_SITES)
    people = [replace(one, icv=None) if n % 3 == 2 else one for n, one in enumerate(people)]
    arguments = study(tmp_path, people, "\n".join(rows) + "\n")
    assert main([*arguments, *COMBAT]) == 0
    assert "40 of the 60 scans of the fit have a volume 'icv'" in caplog.text
    assert "ComBat is fitted on these, and not at C, which have too few" in caplog.text
    harmonised = read(tmp_path / "out", "group_volumes")["icv_combat_mm3"]
    assert harmonised.isna().tolist() == [False, False, True] * 20

    for one in people[:54]:
        write_person(tmp_path / "out", replace(one, icv=None))
    told(capsys)
    assert main([*arguments, *COMBAT, *RESIDUAL]) == 65
    error = told(capsys)
    assert "no scan has a harmonised intracranial volume – --icv-correction residual – " in error
    assert "--head-size brain" in error
    assert "leave the correction or ComBat out" in error
    assert main([*arguments, *COMBAT]) == 0
    assert (
        "4 of the 60 scans of the fit have a volume 'icv': too few for ComBat; its harmonised "
        "volumes are n/a" in caplog.text
    )


def two_contrasts(tmp_path: Path) -> tuple[list[str], list[Person]]:
    """60 T1w at three sites, and of the first three people (one a site) a T2w without ICV."""
    people, rows = simulate(60, THREE_SITES)
    t2w = [replace(one, suffix="T2w", icv=None) for one in people[:3]]
    return study(tmp_path, [*people, *t2w], "\n".join(rows) + "\n"), t2w


def test_a_stratum_that_cannot_be_corrected_costs_the_others_nothing(tmp_path, caplog) -> None:
    arguments, _ = two_contrasts(tmp_path)
    out = tmp_path / "out"
    assert main([*arguments, *RESIDUAL]) == 0
    assert (
        "aseg_T2w: not corrected for head size, so that corrected volumes are n/a, and outliers "
        "are of uncorrected ones: no scan has an intracranial volume – --icv-correction residual – "
        "correct by the other volume (--head-size brain), or leave the correction out"
        in caplog.text
    )
    assert "aseg_T1w: not corrected" not in caplog.text
    table = read(out, "group_volumes").set_index("suffix")["left_thalamus_adjusted"]
    assert table["T1w"].notna().all() and table["T2w"].isna().all()

    caplog.clear()
    assert main([*arguments, *COMBAT, *RESIDUAL]) == 0
    assert (
        "aseg_T2w: not harmonised, so that harmonised and corrected volumes are n/a, and outliers, "
        "change and agreement are of the volumes as measured: 0 sites have the 3 scans that ComBat "
        "needs (of A: 1, B: 1, C: 1) – --combat site – widen --fit-where" in caplog.text
    )
    assert "not corrected for head size" not in caplog.text
    table = read(out, "group_volumes").set_index("suffix")
    for column in ("left_thalamus_combat_mm3", "left_thalamus_adjusted"):
        assert table[column]["T1w"].notna().all() and table[column]["T2w"].isna().all()
    assert table["left_thalamus_mm3"].notna().all()
    assert "aseg_T2w: not harmonised" in (out / "group.html").read_text()
    assert list(json.loads((out / "group_parameters.json").read_text())["Strata"]) == ["aseg_T1w"]


def test_a_correction_that_no_stratum_can_have_is_an_error_that_names_them(
    tmp_path, capsys
) -> None:
    arguments, t2w = two_contrasts(tmp_path)
    for one in t2w[:2]:
        write_person(tmp_path / "out", replace(one, icv=1.4e6))
    assert main([*arguments, *RESIDUAL, "--participant-label", "00000", "00001"]) == 65
    error = told(capsys).splitlines()[-1]
    assert error.count("aseg_T") == 0  # the same in both
    assert "2 scans with a different intracranial volume are too few for a slope" in error
    assert main([*arguments, *RESIDUAL, "--participant-label", "00000", "00002"]) == 65
    assert (
        "aseg_T1w: 2 scans with a different intracranial volume are too few for a slope; "
        "aseg_T2w: 1 scan with" in told(capsys)
    )
    assert main([*arguments, "--combat", "site", "--combat-covariates", "no_such"]) == 64
    assert "tlseg: the table has no column 'no_such' – " in told(capsys)


@pytest.mark.parametrize("measure", ["icv", "brain"])
def test_the_head_size_is_scored_as_it_was_measured(tmp_path, measure) -> None:
    people, _ = simulate(120, THREE_SITES)
    arguments = study(tmp_path, people, None)
    options = ["--icv-correction", "power-proportion", "--head-size", measure]
    assert main([*arguments, *options]) == 0
    corrected = read(tmp_path / "out", "group_outliers")
    assert main(arguments) == 0
    measured = read(tmp_path / "out", "group_outliers")
    of_corrected, of_measured = (
        table[table["structure"] == measure].reset_index(drop=True)
        for table in (corrected, measured)
    )
    assert of_corrected.equals(of_measured)
    assert (of_corrected["robust_z"].abs() < 10).all()


def test_a_saved_fit_outlives_a_run_that_fits_nothing(tmp_path, caplog) -> None:
    people, rows = simulate(30, THREE_SITES)
    arguments = study(tmp_path, people, "\n".join(rows) + "\n")
    out = tmp_path / "out"
    assert main([*arguments, *RESIDUAL]) == 0
    saved = (out / "group_parameters.json").read_bytes()
    os.utime(out / "group_parameters.json", (0, 0))
    assert main(arguments) == 0
    assert not (out / "group_parameters.json").exists()
    kept = out / "group_parameters_19700101T000000Z.json"
    assert kept.read_bytes() == saved
    sentence = (
        "this run fits nothing, so group_parameters.json of an earlier run, which does not belong "
        f"to these tables, is kept as {kept.name}; --group-parameters {kept} applies it"
    )
    assert sentence in caplog.text
    assert sentence in (out / "group.html").read_text()
    assert main([*arguments, "--group-parameters", str(kept)]) == 0
    assert kept.read_bytes() == saved
    caplog.clear()
    assert main(arguments) == 0
    assert "fits nothing" not in caplog.text


def test_a_saved_fit_with_other_priors_is_applied_and_told(tmp_path, caplog) -> None:
    people, rows = simulate(60, THREE_SITES)
    arguments = study(tmp_path, people, "\n".join(rows) + "\n")
    assert main([*arguments, *COMBAT]) == 0
    new, before = parameters(tmp_path / "out"), read(tmp_path / "out", "group_volumes")
    saved = tmp_path / "saved.json"
    text = (tmp_path / "out" / "group_parameters.json").read_text()
    sentence = (
        "the saved ComBat of aseg_T1w was fitted with priors of each structure over the sites, "
        "which leave part of what a scanner does to all structures; fit it again"
    )
    for old in (False, True):
        content = json.loads(text)
        if old:
            del content["Strata"]["aseg_T1w"]["Combat"]["Priors"]
        saved.write_text(json.dumps(content))
        assert main([*arguments, "--group-parameters", str(saved)]) == 0
        assert (sentence in caplog.text) is old
        assert read(tmp_path / "out", "group_volumes").equals(before)
    assert new["Combat"]["Priors"] == "of each site over the structures"


def test_a_saved_fit_that_cannot_be_kept_is_an_error(tmp_path, capsys, monkeypatch) -> None:
    arguments = study(tmp_path, some(3), None)
    (tmp_path / "out" / "group_parameters.json").write_text("{}")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "group_parameters.json":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert main(arguments) == 74
    error = told(capsys)
    assert "the fit of an earlier run cannot be renamed (Permission denied) – " in error
    assert "group_parameters.json – move it yourself: this run fits nothing" in error


def test_one_that_cannot_be_harmonised_costs_the_others_no_agreement(tmp_path) -> None:
    people, rows = simulate(60, THREE_SITES)
    alone = [*rows[:-1], "sub-00059|50|M|D|control"]
    again = [replace(one, run="2", volumes=one.volumes * 1.01) for one in people]
    runs = [*(replace(one, run="1") for one in people), *again]
    arguments = study(tmp_path, runs, "\n".join(alone) + "\n")
    assert main([*arguments, *COMBAT]) == 0
    agree = read(tmp_path / "out", "group_reliability").set_index("structure")
    assert set(agree["participants"]) == {59}
    harmonised = read(tmp_path / "out", "group_volumes")["left_thalamus_combat_mm3"].to_numpy()
    first, second = harmonised.reshape(-1, 2)[:59].T
    apart = 100 * np.mean(np.abs(first - second) / ((first + second) / 2))
    assert agree["absolute_difference_percent"]["left_thalamus"] == pytest.approx(apart)


def test_a_level_of_a_small_site_alone_costs_the_others_nothing(tmp_path, caplog, capsys) -> None:
    people, rows = simulate(60, THREE_SITES)
    alone = [*rows[:-1], "sub-00059|50|X|D|control"]
    arguments = study(tmp_path, people, "\n".join(alone) + "\n")
    assert main([*arguments, *COMBAT]) == 0
    fitted = parameters(tmp_path / "out")
    assert fitted["Combat"]["Terms"] == ["scale", "offset", "age_years", "sex=M"]
    assert sites(fitted) == {"A": 20, "B": 20, "C": 19}
    assert "ComBat leaves out sites with fewer than 3 scans in the fit: D (1 scan)" in caplog.text
    harmonised = read(tmp_path / "out", "group_volumes")["left_thalamus_combat_mm3"]
    assert np.flatnonzero(harmonised.isna()).tolist() == [59]
    same = [f"{row}|{'only' if n else 'kind'}" for n, row in enumerate(rows)]
    same[-1] = "sub-00059|50|M|D|control|other"
    write_raw(tmp_path / "raw", {"participants.tsv": "\n".join(same) + "\n"})
    assert main([*arguments, *COMBAT, "kind"]) == 64
    assert "the column 'kind' has one value only in the scans of the fit" in told(capsys)
