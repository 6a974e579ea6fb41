"""The level ``group`` from the command line: tables, corrections, exclusion, bad input."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.studies import (
    STRUCTURES,
    TYPICAL,
    Effects,
    Person,
    simulate,
    write_derivatives,
    write_person,
    write_raw,
)
from tlseg_bids.bids.validate import find_validator
from tlseg_bids.cli.run import main
from tlseg_bids.errors import NoInputError
from tlseg_bids.group.study import structures
from tlseg_bids.labels.protocol import load_protocol

NAMES = structures(load_protocol("aseg"))
COMBAT = ("--combat", "site", "--combat-covariates", "age_years", "sex")
THREE_SITES = Effects({"A": 0.0, "B": 0.15, "C": -0.12}, {"A": 1.0, "B": 1.6, "C": 0.8})


def read(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / f"{name}.tsv", sep="\t", na_values="n/a")


def study(tmp_path: Path, people: list[Person], participants: str | None) -> list[str]:
    """Write a study; returns the arguments of the program."""
    tables = {} if participants is None else {"participants.tsv": participants}
    raw = write_raw(tmp_path / "raw", tables)
    return [str(raw), str(write_derivatives(tmp_path / "out", people)), "group"]


def some(count: int, **more: object) -> list[Person]:
    """People whose volumes differ a little."""
    rng = np.random.default_rng(1)
    noise = rng.normal(1, 0.03, (count, STRUCTURES))
    return [Person(f"{n:02d}", TYPICAL * noise[n], **more) for n in range(count)]


def told(capsys) -> str:
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def three_sites(tmp_path_factory: pytest.TempPathFactory):
    """A harmonised and corrected study of three sites: folder, participants, arguments."""
    folder = tmp_path_factory.mktemp("three")
    people, rows = simulate(180, THREE_SITES)
    arguments = study(folder, people, "\n".join(rows) + "\n")
    options = [*COMBAT, "--combat-reference", "A", "--icv-correction", "residual"]
    assert main([*arguments, *options]) == 0
    return folder / "out", people, arguments


def site_effect(values: np.ndarray, table: pd.DataFrame) -> float:
    """Largest difference between mean residuals of sites, in residual standard deviations."""
    design = np.column_stack([np.ones(len(table)), table["age_years"], table["sex"] == "M"])
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    means = [left[table["site"] == site].mean() for site in "ABC"]
    return float(np.ptp(means) / left.std())


def age_slope(values: np.ndarray, table: pd.DataFrame) -> float:
    """Slope on age with the sites and the sex in the model, mm³ per year."""
    parts = [table["age_years"], table["sex"] == "M", *(table["site"] == s for s in "ABC")]
    design = np.column_stack(parts).astype(float)
    return float(np.linalg.lstsq(design, values, rcond=None)[0][0])


def test_combat_removes_the_site_and_keeps_the_age(three_sites) -> None:
    """The means of three times 60 scans without a site effect lie about 0.22 apart by chance."""
    out, _, _ = three_sites
    table = read(out, "group_volumes")
    left = [site_effect(table[f"{name}_combat_mm3"].to_numpy(), table) for name in NAMES]
    assert max(left) < 0.35
    assert np.mean(left) < 0.1
    for name, typical in zip(NAMES, TYPICAL, strict=True):
        raw = table[f"{name}_mm3"].to_numpy()
        harmonised = table[f"{name}_combat_mm3"].to_numpy()
        assert site_effect(raw, table) > 1.2
        truth = THREE_SITES.per_year * typical
        assert age_slope(harmonised, table) == pytest.approx(truth, rel=0.35)
        assert age_slope(harmonised, table) == pytest.approx(age_slope(raw, table), rel=0.2)
    slopes = [age_slope(table[f"{n}_combat_mm3"].to_numpy(), table) for n in NAMES]
    assert np.mean(slopes / (THREE_SITES.per_year * TYPICAL)) == pytest.approx(1.0, rel=0.1)
    shares = read(out, "group_combat")
    assert (shares["site_share_before"].head(STRUCTURES) > 0.3).all()
    assert (shares["site_share_after"].head(STRUCTURES) < 0.02).all()


def test_combat_evens_out_the_spread_of_the_sites(three_sites) -> None:
    table = read(three_sites[0], "group_volumes")
    ratios = {"mm3": [], "combat_mm3": []}
    for kind, found in ratios.items():
        for name in NAMES:
            spread = {}
            for site in "BC":
                here = table[table["site"] == site]
                design = np.column_stack(
                    [np.ones(len(here)), here["age_years"], here["sex"] == "M"]
                )
                y = here[f"{name}_{kind}"].to_numpy()
                design = design.astype(float)
                spread[site] = (y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).std()
            found.append(spread["B"] / spread["C"])
    assert np.mean(ratios["mm3"]) > 1.15
    assert np.mean(ratios["combat_mm3"]) == pytest.approx(1.0, abs=0.08)


def test_the_reference_site_stays_as_it_is_and_raw_volumes_are_kept(three_sites) -> None:
    out, people, _ = three_sites
    table = read(out, "group_volumes")
    here = table["site"] == "A"
    raw, combat = (
        table[[f"{n}{end}" for n in NAMES]].to_numpy() for end in ("_mm3", "_combat_mm3")
    )
    assert (raw[here] == combat[here]).all()
    assert (raw[~here] != combat[~here]).all()
    assert (raw == np.array([person.volumes for person in people])).all()


def test_the_tables_are_those_that_pandas_computes_by_hand(three_sites) -> None:
    """Wide against the derivatives and participants.tsv, long against wide, to the last digit."""
    out, people, _ = three_sites
    hand = pd.read_csv(out.parent / "raw" / "participants.tsv", sep="\t")
    for person in people:
        file = out / person.folder / f"{person.stem}_desc-volumes_dseg.tsv"
        one = pd.read_csv(file, sep="\t").iloc[1:]
        totals = json.loads(file.with_suffix(".json").read_text())
        row = hand["participant_id"] == f"sub-{person.label}"
        for name, value in zip(NAMES, one["hard_mm3"], strict=True):
            hand.loc[row, f"{name}_mm3"] = value
        hand.loc[row, "icv_mm3"] = totals["IntracranialVolume"]["Value"]
    wide = read(out, "group_volumes")
    pd.testing.assert_frame_equal(wide[hand.columns], hand, check_exact=True)
    left = wide["left_hippocampus_mm3"] - wide["right_hippocampus_mm3"]
    both = wide["left_hippocampus_mm3"] + wide["right_hippocampus_mm3"]
    assert (wide["hippocampus_asymmetry_percent"] == 200.0 * left / both).all()

    long = read(out, "group_volumes_long")
    assert len(long) == len(people) * STRUCTURES
    turned = long.pivot(index="scan", columns="structure", values="hard_mm3").loc[
        wide["scan"], NAMES
    ]
    assert (turned.to_numpy() == wide[[f"{name}_mm3" for name in NAMES]].to_numpy()).all()
    turned = long.pivot(index="scan", columns="structure", values="combat_mm3").loc[wide["scan"]]
    columns = [f"{name}_combat_mm3" for name in NAMES]
    assert (turned[NAMES].to_numpy() == wide[columns].to_numpy()).all()


def test_the_correction_for_head_size_is_that_of_pandas(three_sites) -> None:
    wide = read(three_sites[0], "group_volumes")
    icv, volume = wide["icv_combat_mm3"], wide["left_hippocampus_combat_mm3"]
    slope = np.polyfit(icv - icv.mean(), volume, 1)[0]
    expected = volume - slope * (icv - icv.mean())
    assert np.allclose(wide["left_hippocampus_adjusted"], expected, rtol=1e-9)
    assert abs(np.corrcoef(wide["left_hippocampus_adjusted"], icv)[0, 1]) < 1e-9
    assert abs(np.corrcoef(volume, icv)[0, 1]) > 0.3


def test_every_column_is_in_the_dictionary(three_sites) -> None:
    out = three_sites[0]
    for file in sorted(out.glob("group_*.tsv")):
        told = json.loads(file.with_suffix(".json").read_text())
        columns = file.read_text().split("\n", 1)[0].split("\t")
        assert set(told) == {*columns, "GeneratedBy"}, file.name
        assert all(told[column]["Description"] for column in columns)
    said = json.loads((out / "group_volumes.json").read_text())
    assert said["left_hippocampus_mm3"]["Units"] == "mm^3"
    assert "ComBat by 'site', reference A" in said["left_hippocampus_combat_mm3"]["Description"]
    assert "age_years, sex" in said["left_hippocampus_combat_mm3"]["Description"]
    assert "Radiology 172:549-554" in said["left_hippocampus_adjusted"]["Description"]


def test_saved_parameters_do_the_same_to_the_same_scans_and_serve_new_ones(
    three_sites, tmp_path, caplog
) -> None:
    """Fitted on 180 scans of three sites, applied to 60 others and to one of a fourth site."""
    out, _, arguments = three_sites
    file = tmp_path / "saved.json"
    file.write_bytes((out / "group_parameters.json").read_bytes())
    before = (out / "group_volumes.tsv").read_bytes()
    assert main([*arguments, "--group-parameters", str(file)]) == 0
    assert (out / "group_volumes.tsv").read_bytes() == before

    people, rows = simulate(60, THREE_SITES, seed=5)
    people.append(Person("new", TYPICAL, days=365.25 * 40))
    fresh = study(tmp_path, people, "\n".join([*rows, "sub-new|40|M|D|control"]) + "\n")
    assert main([*fresh, "--group-parameters", str(file)]) == 0
    assert "no site effect is known for D (1): their harmonised volumes are n/a" in caplog.text
    table = read(tmp_path / "out", "group_volumes")
    here = table["site"] != "D"
    raw, combat = (table[f"left_thalamus{end}"] for end in ("_mm3", "_combat_mm3"))
    assert site_effect(raw[here].to_numpy(), table[here]) > 1.2
    assert site_effect(combat[here].to_numpy(), table[here]) < 0.7
    assert combat[~here].isna().all()
    assert raw.notna().all()


def test_a_fit_on_controls_takes_no_notice_of_patients(tmp_path) -> None:
    people, rows = simulate(120, THREE_SITES)
    arguments = study(tmp_path, people, "\n".join(rows) + "\n")
    options = [*COMBAT, "--fit-where", "group=control", "--icv-correction", "power-proportion"]
    assert main([*arguments, *options]) == 0
    first = json.loads((tmp_path / "out" / "group_parameters.json").read_text())
    assert first["FitWhere"] == ["group=control"]
    for person, row in zip(people, rows[1:], strict=True):
        if row.endswith("patient"):
            ill = Person(person.label, person.volumes * 0.5, person.icv, days=person.days)
            write_person(tmp_path / "out", ill)
    assert main([*arguments, *options]) == 0
    assert json.loads((tmp_path / "out" / "group_parameters.json").read_text()) == first
    assert main([*arguments, *options[:-4], "--icv-correction", "none"]) == 0
    second = json.loads((tmp_path / "out" / "group_parameters.json").read_text())
    assert second["Strata"] != first["Strata"]


def test_ratio_and_soft_volumes(tmp_path) -> None:
    arguments = study(tmp_path, some(4), None)
    options = ["--volume", "soft", "--icv-correction", "ratio", "--head-size", "brain"]
    assert main([*arguments, *options]) == 0
    table = read(tmp_path / "out", "group_volumes")
    soft = table["left_hippocampus_mm3"]
    assert np.allclose(soft, TYPICAL[NAMES.index("left_hippocampus")] * 1.01, rtol=0.2)
    assert (table["left_hippocampus_adjusted"] == soft / table["brain_mm3"]).all()
    assert "brain_adjusted" not in table
    said = json.loads((tmp_path / "out" / "group_volumes.json").read_text())
    assert said["left_hippocampus_adjusted"]["Units"] == "1"


def test_nothing_is_corrected_that_was_not_asked_for(tmp_path) -> None:
    assert main(study(tmp_path, some(10), None)) == 0
    columns = read(tmp_path / "out", "group_volumes").columns
    assert not [name for name in columns if "combat" in name or "adjusted" in name]
    assert not (tmp_path / "out" / "group_parameters.json").exists()


def test_an_outlier_is_found_listed_and_proposed_for_a_look(tmp_path) -> None:
    people = some(30)
    people[7].volumes[NAMES.index("left_thalamus")] *= 1.3
    assert main(study(tmp_path, people, None)) == 0
    found = read(tmp_path / "out", "group_outliers")
    assert ("sub-07", "left_thalamus") in set(
        zip(found["participant_id"], found["structure"], strict=True)
    )
    assert (found["robust_z"].abs() > 3.5).all()
    proposed = read(tmp_path / "out", "group_exclusion").set_index("participant_id")
    assert proposed.loc["sub-07", "proposal"] == "look"
    assert "left_thalamus" in proposed.loc["sub-07", "reasons"]
    assert (proposed["proposal"] == "use").sum() > 20
    assert len(read(tmp_path / "out", "group_volumes")) == 30


def test_a_scan_with_the_verdict_to_leave_it_out_is_proposed_unless_somebody_rated_it(
    tmp_path,
) -> None:
    people = some(12)
    verdict = {"Verdict": {"Decision": "exclude", "Reasons": ["The image is noisy."]}}
    for n in (3, 4):
        people[n] = Person(f"{n:02d}", people[n].volumes, sidecar=verdict)
    rated = ratings(tmp_path, f"sub-04||{people[4].stem}|pass||me|1||")
    assert main([*study(tmp_path, people, None), *rated]) == 0
    proposed = read(tmp_path / "out", "group_exclusion").set_index("participant_id")
    assert proposed.loc["sub-03", "proposal"] == "exclude"
    assert proposed.loc["sub-03", "reasons"].startswith("The image is noisy.")
    assert proposed.loc["sub-04", "proposal"] == "use"
    assert read(tmp_path / "out", "group_volumes").loc[3, "verdict"] == "exclude"


def ratings(tmp_path: Path, *lines: str) -> list[str]:
    head = "participant_id|session_id|scan|rating|note|rater|time|content_key|version"
    file = tmp_path / "r" / "sub-x_ratings.tsv"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join([head, *lines]).replace("|", "\t") + "\n")
    return ["--ratings", str(file.parent)]


def test_ratings_make_the_proposal_and_the_table_keeps_every_scan(tmp_path, caplog) -> None:
    people = some(12)
    people[3] = Person("03", people[3].volumes, sidecar={"Flags": ["The scan ends early."]})
    people[4] = Person("04", people[4].volumes, sidecar={"Flags": ["The scan ends early."]})
    people[9] = Person("09", people[9].volumes, sidecar={"Warnings": ["the age is not known"]})
    arguments = study(tmp_path, people, None)
    stem = {n: people[n].stem for n in range(12)}
    options = ratings(
        tmp_path,
        f"sub-01|n/a|{stem[1]}|fail|moved|ann|2026-01-02|key-{stem[1]}|1",
        f"sub-02|n/a|{stem[2]}|fail|n/a|ann|2026-01-01|key-{stem[2]}|1",
        f"sub-02|n/a|{stem[2]}|pass|n/a|ann|2026-01-03|key-{stem[2]}|1",
        f"sub-03|n/a|{stem[3]}|pass|n/a|ann|2026-01-02|key-{stem[3]}|1",
        f"sub-05|n/a|{stem[5]}|needs edit|n/a|bob|2026-01-02|key-{stem[5]}|1",
        f"sub-06|n/a|{stem[6]}|fail|n/a|bob|2026-01-02|an-older-key|1",
        f"sub-07|n/a|{stem[7]}|n/a|n/a|bob|n/a|n/a|1",
        f"sub-08|n/a|{stem[8]}|superb|n/a|bob|n/a|n/a|1",
        "sub-99|n/a|sub-99_space-T1w_seg-aseg|fail|n/a|bob|n/a|n/a|1",
    )
    assert main([*arguments, *options]) == 0
    table = read(tmp_path / "out", "group_exclusion").set_index("participant_id")
    proposal = table["proposal"].to_dict()
    assert [proposal[f"sub-{n:02d}"] for n in (1, 2, 3, 4, 5, 9)] == [
        "exclude", "use", "use", "look", "look", "use",
    ]  # fmt: skip
    assert proposal["sub-06"] != "exclude"
    assert "rated 'fail' by ann (moved)" in table.loc["sub-01", "reasons"]
    assert "of an earlier result" in table.loc["sub-06", "reasons"]
    assert "ratings of scans that are not in the tables are left aside: sub-99" in caplog.text
    assert "ratings other than pass, needs edit, fail are left aside: 'superb'" in caplog.text
    assert len(read(tmp_path / "out", "group_volumes")) == 12


def test_change_per_year_and_repeated_scans(tmp_path) -> None:
    """Ten people: two visits two years apart (−2 % a year), the first with two runs."""
    rng = np.random.default_rng(3)
    people, texts = [], {}
    for n in range(10):
        label, own = f"{n:02d}", TYPICAL * rng.normal(1, 0.1)
        for run in "12":
            jitter = rng.normal(1, 0.01, STRUCTURES)
            people.append(Person(label, own * jitter, session="a", run=run))
        people.append(Person(label, own * 0.96, session="b", run="1"))
        texts[f"sub-{label}/sub-{label}_sessions.tsv"] = (
            "session_id|acq_time|age\nses-a|1900-01-01T10:00:00|30\nses-b|1902-01-01T10:00:00|31\n"
        )
    write_raw(tmp_path / "raw", texts)
    arguments = [str(tmp_path / "raw"), str(tmp_path / "out"), "group"]
    write_derivatives(tmp_path / "out", people)
    assert main(arguments) == 0
    change = read(tmp_path / "out", "group_change")
    assert len(change) == 10 * (STRUCTURES + 1 + 1)  # brain and intracranial volume too
    labels = change[~change["structure"].isin(["icv", "brain"])]
    assert set(labels["visits"]) == {2}
    assert set(labels["time_from"]) == {"acq_time"}
    assert labels["span_years"].to_numpy() == pytest.approx(730 / 365.25)
    assert labels["percent_per_year"].mean() == pytest.approx(100 * -0.04 / 0.98 / 2, rel=0.03)
    rate = (labels["last_mm3"] - labels["first_mm3"]) / labels["span_years"]
    assert np.allclose(labels["rate_mm3_per_year"], rate, rtol=1e-9)
    agree = read(tmp_path / "out", "group_reliability").set_index("structure").loc[NAMES]
    assert set(agree["participants"]) == {10}
    assert (agree["icc_3_1"] > 0.9).all()
    assert agree["within_subject_cv_percent"].mean() == pytest.approx(1.0, rel=0.2)
    assert (agree["icc_2_1_low"] < agree["icc_2_1"]).all()
    table = read(tmp_path / "out", "group_volumes")
    assert set(table["age_years"]) == {30.0, 31.0}
    assert set(table["age_source"]) == {f"sub-{n:02d}_sessions.tsv" for n in range(10)}


# --- bad input --------------------------------------------------------------------------------


def test_no_derivatives(tmp_path, capsys) -> None:
    raw = str(write_raw(tmp_path / "raw"))
    assert main([raw, str(tmp_path / "out"), "group"]) == NoInputError.exit_code
    assert "there is no folder of derivatives" in told(capsys)
    (tmp_path / "out").mkdir()
    assert main([raw, str(tmp_path / "out"), "group"]) == 66
    assert "holds no labelled participant (sub-…)" in told(capsys)
    (tmp_path / "out" / "sub-01").mkdir()
    assert main([raw, str(tmp_path / "out"), "group"]) == 66
    assert "no readable label map with its volumes table" in told(capsys)
    assert main([str(tmp_path / "x"), str(tmp_path / "out"), "group"]) == 66
    assert "there is no such folder" in told(capsys)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sub-01"]


def test_filters(tmp_path, capsys) -> None:
    people = [Person("01", TYPICAL, session="a"), Person("02", TYPICAL, session="b")]
    arguments = study(tmp_path, people, None)
    assert main([*arguments, "--participant-label", "02"]) == 0
    assert read(tmp_path / "out", "group_volumes")["participant_id"].tolist() == ["sub-02"]
    assert main([*arguments, "--session-label", "a"]) == 0
    assert read(tmp_path / "out", "group_volumes")["session_id"].tolist() == ["ses-a"]
    told(capsys)
    assert main([*arguments, "--participant-label", "3"]) == 18
    assert "there is no labelled participant 3" in told(capsys)
    assert main([*arguments, "--session-label", "c"]) == 18
    assert "there is no labelled scan of session c" in told(capsys)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: f.unlink(), "it has no volumes table beside it"),
        (lambda f: f.write_text("index\tname\n"), "lacks the labels 2, 3, 4"),
        (lambda f: f.write_text(f.read_text() + f.read_text().splitlines()[3] + "\n"), "3 twice"),
        (lambda f: f.write_text(re.sub(r"(\n2\t[^\t]+)\t[\d.]+", r"\1\tx", f.read_text())),
         "no volume for the label 2"),
        (lambda f: f.write_text(f.read_text().replace("\n2\t", "\ntwo\t")), "has the index 'two'"),
        (lambda f: f.with_suffix(".json").write_text("{"), "is not valid JSON"),
    ],
)  # fmt: skip
def test_a_damaged_scan_is_a_sentence_and_the_others_go_on(tmp_path, caplog, damage, sentence):
    people = some(3)
    arguments = study(tmp_path, people, None)
    folder = tmp_path / "out" / people[1].folder
    damage(folder / f"{people[1].stem}_desc-volumes_dseg.tsv")
    assert main(arguments) == 1
    assert sentence in caplog.text
    assert len(read(tmp_path / "out", "group_volumes")) == 2
    assert "Not in the tables: 1" in (tmp_path / "out" / "group.html").read_text()


def test_participants_that_are_missing_doubled_or_of_unknown_age(tmp_path, caplog) -> None:
    table = (
        "participant_id|age|site|brain_mm3\nsub-00|34|A|7\nsub-01|n/a|A|7\nsub-02|89+|B|7\n"
        "sub-03|40|A|7\nsub-03|40|B|7\n"
    )
    assert main(study(tmp_path, some(5), table)) == 0
    assert "participants.tsv has no row for sub-04; their covariates are n/a" in caplog.text
    assert "participants.tsv has several rows for sub-03; cells in which they differ" in caplog.text
    wide = read(tmp_path / "out", "group_volumes").set_index("participant_id")
    assert wide.loc["sub-00", "age_years"] == 34
    assert wide["age_years"].isna().tolist() == [False, True, True, False, True]
    assert (
        wide.loc["sub-01", "age_source"] == "not given" or "n/a" in wide.loc["sub-01", "age_source"]
    )
    assert str(wide.loc["sub-02", "age"]) == "89+"
    assert pd.isna(wide.loc["sub-03", "site"])
    assert wide["participants_brain_mm3"].dropna().eq(7).all()  # their column, not ours
    assert (wide["brain_mm3"] > 1000).all()


def test_an_age_that_was_mended_since_is_taken_and_told(tmp_path, caplog) -> None:
    people = [Person("00", TYPICAL, days=30 * 365.25)]
    assert main(study(tmp_path, people, "participant_id|age\nsub-00|31\n")) == 0
    assert (
        "the tables give another age now than when the scan was labelled for sub-00" in caplog.text
    )
    assert read(tmp_path / "out", "group_volumes")["age_years"].tolist() == [31.0]


def test_hostile_cells_neither_run_nor_break_anything(tmp_path) -> None:
    cells = ["=cmd|' /C calc'!A0".replace("|", "!"), "<script>alert(1)</script>", "-5", "+", "@x"]
    rows = "".join(f"sub-{n:02d}|{cell}\n" for n, cell in enumerate(cells))
    flag = {"Flags": ["</script><img src=x onerror=alert(2)>"]}
    people = [*some(4), Person("04", TYPICAL, sidecar=flag)]
    assert main(study(tmp_path, people, f"participant_id|note\n{rows}")) == 0
    written = read(tmp_path / "out", "group_volumes")["note"].tolist()
    assert written == [f"'{cells[0]}", cells[1], "-5", "+", "'@x"]
    page = (tmp_path / "out" / "group.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("</script>") == 2


def page_data(out: Path) -> dict:
    """What the script of ``group.html`` is given."""
    page = (out / "group.html").read_text(encoding="utf-8")
    found = re.search(r'<script id="group-data" type="application/json">(.*?)</script>', page)
    return json.loads(found[1])


def test_the_page_offers_no_kind_of_volume_without_a_structure(tmp_path) -> None:
    """Eight scans are the least that robust scores take."""
    assert main(study(tmp_path, some(5), None)) == 0
    (stratum,) = page_data(tmp_path / "out")["strata"]
    assert [kind["kind"] for kind in stratum["kinds"]] == ["raw", "asymmetry"]
    assert all(kind["names"] for kind in stratum["kinds"])


def test_the_page_says_how_many_failures_it_does_not_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tlseg_bids.group.page.MOST_NOTES", 2)
    arguments = study(tmp_path, some(8), None)
    for n in range(5):
        (tmp_path / "out" / f"sub-{n:02d}/anat/sub-{n:02d}_space-T1w_seg-aseg_dseg.json").unlink()
    assert main(arguments) == 1
    page = (tmp_path / "out" / "group.html").read_text()
    assert "Not in the tables: 5" in page
    assert "And 3 more, which the log tells." in page
    assert page.count("it is not finished") == 2


def axes(out: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the numbers, and levels of the categories, that the page plots against."""
    data = page_data(out)
    categories = [(one["name"], one["levels"]) for one in data["categories"]]
    assert len(dict(categories)) == len(categories), "two categories have one name"
    return [one["name"] for one in data["numbers"]], dict(categories)


def test_numbers_that_name_sites_are_categories_of_the_page(tmp_path) -> None:
    """By their description in the dataset, or as ComBat's sites; in the order of their size."""
    rows = "".join(f"sub-{n:02d}|{n % 12}|{n % 12}|{20 + n}\n" for n in range(48))
    arguments = study(tmp_path, some(48), f"participant_id|site|centre|age\n{rows}")
    described = {"centre": {"Levels": {str(n): f"hospital {n}" for n in range(12)}}}
    (tmp_path / "raw" / "participants.json").write_text(json.dumps(described))
    assert main(arguments) == 0
    numbers, categories = axes(tmp_path / "out")
    assert categories["centre"] == [str(n) for n in range(12)]
    assert "site" in numbers
    assert main([*arguments, "--combat", "site", "--combat-covariates", "none"]) == 0
    numbers, categories = axes(tmp_path / "out")
    assert categories["site"] == categories["centre"]
    assert "age" in numbers


def test_ages_of_a_small_study_are_numbers_of_the_page(tmp_path) -> None:
    """Five people of five ages are not five groups; two field strengths are."""
    rows = "".join(f"sub-{n:02d}|{20 + n * n}|{(1.5, 3)[n % 2]}\n" for n in range(5))
    assert main(study(tmp_path, some(5), f"participant_id|age|tesla\n{rows}")) == 0
    numbers, categories = axes(tmp_path / "out")
    assert {"age", "age_years"} <= set(numbers)
    assert categories["tesla"] == ["1.5", "3"]


def test_the_page_names_the_columns_that_it_does_not_offer(tmp_path) -> None:
    rows = "".join(f"sub-{n:02d}|family {n}|{('yes', 'no')[n % 2]}\n" for n in range(41))
    assert main(study(tmp_path, some(41), f"participant_id|family|sport\n{rows}")) == 0
    numbers, categories = axes(tmp_path / "out")
    assert "sport" in categories
    assert "family" not in {*numbers, *categories}
    page = (tmp_path / "out" / "group.html").read_text()
    assert (
        "Not among the choices, as they have more than 40 different words or come after the first "
        "60 columns: family." in page
    )


def test_a_column_called_proposal_is_told_from_the_programs_own(tmp_path) -> None:
    rows = "".join(f"sub-{n:02d}|{('yes', 'no')[n % 2]}\n" for n in range(4))
    assert main(study(tmp_path, some(4), f"participant_id|proposal\n{rows}")) == 0
    _, categories = axes(tmp_path / "out")
    assert categories["proposal"] == ["use", "look", "exclude"]
    assert categories["participants_proposal"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--combat", "site"], 64, "--combat needs --combat-covariates"),
        (["--combat", "centre", "--combat-covariates", "none"], 64, "has no column 'centre'"),
        (["--combat", "site", "--combat-covariates", "weight"], 64, "has no column 'weight'"),
        (["--combat", "site", "--combat-covariates", "model"], 64, "'model' has one value only"),
        ([*COMBAT, "--combat-reference", "Z"], 64, "reference site 'Z' is not among the sites"),
        ([*COMBAT, "--fit-where", "group=martian"], 64, "no scan meets group=martian"),
        ([*COMBAT, "--fit-where", "group"], 64, "'group' is not COLUMN=VALUE"),
        ([*COMBAT, "--fit-where", "site=A"], 65, "1 site has the 3 scans that ComBat needs"),
        (["--combat", "site", "--combat-covariates", "site"], 65, "cannot be told from that of"),
        (["--icv-correction", "shrink"], 64, "invalid choice: 'shrink'"),
        (["--group-parameters", "nowhere.json"], 66, "there is no such file of parameters"),
        ([*COMBAT, "--group-parameters", "x"], 64, "brings its own ComBat and head-size"),
        (["--ratings", "nowhere"], 66, "there is no such file"),
        (["--dry-run"], 64, "--dry-run is of the level participant"),
    ],
)
def test_options_that_make_no_sense(three_sites, capsys, options, code, sentence) -> None:
    before = (three_sites[0] / "group_volumes.tsv").read_bytes()
    assert main([*three_sites[2], *options]) == code
    error = told(capsys).splitlines()[-1]
    assert sentence in error
    assert error.count(" – ") == 2
    assert (three_sites[0] / "group_volumes.tsv").read_bytes() == before


def test_no_head_size_and_too_few_of_them(tmp_path, capsys) -> None:
    arguments = study(tmp_path, some(4, icv=None), None)
    assert main([*arguments, "--icv-correction", "residual"]) == 65
    assert "no scan has an intracranial volume" in told(capsys)
    assert main([*arguments, "--icv-correction", "ratio", "--head-size", "brain"]) == 0
    assert main([*arguments[:2], "group", "--icv-correction", "residual", "--head-size", "brain",
                 "--participant-label", "00", "01"]) == 65  # fmt: skip
    assert "2 scans with a different brain volume are too few for a slope" in told(capsys)


def test_sites_with_a_scan_or_two_and_unknown_covariates(tmp_path, caplog) -> None:
    people, rows = simulate(40, THREE_SITES)
    rows[40] = rows[40].replace("|A|", "|E|").replace("|B|", "|E|").replace("|C|", "|E|")
    rows[39] = re.sub(r"\|[MF]\|", "|n/a|", rows[39])
    assert main([*study(tmp_path, people, "\n".join(rows) + "\n"), *COMBAT]) == 0
    assert "leaves out sites with fewer than 3 scans in the fit: E (1 scan)" in caplog.text
    assert "no site effect is known for E (1)" in caplog.text
    assert "1 scan lacks a covariate of ComBat" in caplog.text
    table = read(tmp_path / "out", "group_volumes")
    assert table["left_thalamus_combat_mm3"].isna().tolist() == [False] * 38 + [True] * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _: "{", "is not valid JSON"),
        (lambda c: {**c, "Format": "x"}, "this is no file of group parameters of version 1"),
        (lambda c: {**c, "Volume": "wet"}, "is damaged (Volume is 'wet')"),
        (lambda c: {k: v for k, v in c.items() if k != "Strata"}, "('Strata' is missing)"),
        (lambda c: json.dumps(c).replace("left_thalamus", "tail"), "of other structures"),
        (lambda c: json.loads(re.sub(r'"Slopes": \[[^,]*, ', '"Slopes": [', json.dumps(c))),
         "HeadSize has numbers of shape (33,) instead of (34,)"),
    ],
)  # fmt: skip
def test_damaged_parameters(tmp_path, capsys, change, sentence) -> None:
    people, rows = simulate(30, THREE_SITES)
    arguments = study(tmp_path, people, "\n".join(rows) + "\n")
    assert main([*arguments, *COMBAT, "--icv-correction", "residual"]) == 0
    content = json.loads((tmp_path / "out" / "group_parameters.json").read_text())
    new = change(content)
    file = tmp_path / "p.json"
    file.write_text(new if isinstance(new, str) else json.dumps(new))
    assert main([*arguments, "--group-parameters", str(file)]) == 65
    assert sentence in told(capsys)


def test_a_table_of_ratings_that_is_none(tmp_path, capsys) -> None:
    arguments = study(tmp_path, some(2), None)
    (tmp_path / "r").mkdir()
    assert main([*arguments, "--ratings", str(tmp_path / "r")]) == 66
    assert "the folder holds no *_ratings.tsv" in told(capsys)
    (tmp_path / "r" / "a_ratings.tsv").write_text("a\tb\n1\t2\n")
    assert main([*arguments, "--ratings", str(tmp_path / "r")]) == 65
    assert "the table of ratings has no column participant_id, scan, rating" in told(capsys)


def test_two_contrasts_are_never_mixed(tmp_path) -> None:
    people = [*some(12), *some(12, suffix="T2w")]
    people = [Person(p.label, p.volumes * (3 if p.suffix == "T2w" else 1), suffix=p.suffix)
              for p in people]  # fmt: skip
    assert main(study(tmp_path, people, None)) == 0
    assert len(read(tmp_path / "out", "group_volumes")) == 24
    assert read(tmp_path / "out", "group_volumes_long")["robust_z"].abs().max() < 15
    assert read(tmp_path / "out", "group_change").empty


@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_validator_passes_over_what_the_group_level_writes(three_sites) -> None:
    out = three_sites[0]
    (out / ".bidsignore").unlink()
    assert main([*three_sites[2], "--group-parameters", str(out / "group_parameters.json")]) == 0
    assert "group_*" in (out / ".bidsignore").read_text().splitlines()
    done = subprocess.run([find_validator(), str(out), "--json"], capture_output=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [i for i in issues if i["severity"] == "error"]
    assert not [i for i in errors if "group" in str(i.get("location"))]


def test_one_liners_of_the_documentation_load_every_table(three_sites, monkeypatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "group.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    monkeypatch.chdir(three_sites[0].parent)
    scope: dict[str, object] = {}
    exec(compile(code.replace("OUT/", "out/"), "group.md", "exec"), scope)  # noqa: S102
    loaded = {name for name in three_sites[0].glob("group_*.tsv") if name.name in code}
    assert loaded == set(three_sites[0].glob("group_*.tsv"))
    assert len(scope["volumes"]) == 180
