"""Finding scans: entities, filters, shards, metadata, and everything that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.datasets import config, make_dataset, make_hostile_dataset, real_dataset, table
from tlseg_bids.bids.discover import check_dataset, discover
from tlseg_bids.bids.source import is_gone
from tlseg_bids.errors import (
    CannotCreateError,
    DataError,
    NoInputError,
    NotBidsError,
    NothingSelectedError,
    UsageError,
)

SMALLEST = '{"Name": "my data", "BIDSVersion": "1.10.0"}'
MANY = [f"sub-{n:02d}/anat/sub-{n:02d}_{s}.nii.gz" for n in range(1, 8) for s in ("T1w", "T2w")]
SESSIONS = [f"sub-01/ses-{n}/anat/sub-01_ses-{n}_acq-{n}_T1w.nii.gz" for n in (1, 2)]


def stems(found):
    return [f"{scan.stem}_{scan.suffix}" for scan in found[0]]


def close(monkeypatch, *closed):
    """Take the permission to read `closed`, which a test that is run as root has all the same."""
    access = os.access

    def refuses(path, mode, **options):
        return Path(path) not in closed and access(path, mode, **options)

    monkeypatch.setattr(os, "access", refuses)


def test_entities_keep_the_order_of_the_file_name(tmp_path):
    name = "sub-01_ses-a_rec-x_acq-y_ce-gadolinium_run-01_T1w.nii.gz"
    root = make_dataset(tmp_path / "raw", [f"sub-01/ses-a/anat/{name}"])
    (scan,), unusable = discover(config(root))
    assert list(scan.entities) == ["sub", "ses", "rec", "acq", "ce", "run"]
    assert scan.stem + "_T1w.nii.gz" == name
    assert (scan.entities["run"], scan.contrast_agent, unusable) == ("01", "gadolinium", ())
    assert scan.uri == f"bids:raw:sub-01/ses-a/anat/{name}"


def test_only_t1w_and_t2w_are_taken(tmp_path):
    names = ["T1w", "T2w", "FLAIR", "PDw", "T2star", "part-phase_T1w"]
    root = make_dataset(
        tmp_path / "raw",
        [f"sub-01/anat/sub-01_{name}.nii.gz" for name in names] + ["sub-01/func/sub-01_T1w.nii.gz"],
    )
    found = discover(config(root))
    assert stems(found) == ["sub-01_T1w", "sub-01_T2w"]
    assert found[1] == ()


def test_datasets_inside_the_dataset_are_left_alone(tmp_path):
    inside = "sub-01/anat/sub-01_T1w.nii.gz"
    folders = ("derivatives/x", "derivatives", "sourcedata", "out", ".git", "code")
    root = make_dataset(tmp_path / "raw", [inside, *(f"{folder}/{inside}" for folder in folders)])
    (scan,), unusable = discover(config(root))
    assert (scan.path, unusable) == (root / inside, ())


@pytest.mark.parametrize("database", [None, "kept"])
def test_what_a_mac_leaves_beside_a_scan_is_left_alone(tmp_path, database):
    scans = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-a b/anat/sub-ab_T1w.nii.gz"]
    root = make_dataset(tmp_path / "raw", scans)
    for scan in scans:
        beside = (root / scan).with_name(f"._{Path(scan).name}")
        beside.write_bytes(b"\x00\x05\x16\x07")
        beside.with_name("._sub-01_T1w.json").write_bytes(b"\x00\x05\x16\x07")
    for _ in range(2):
        found, unusable = discover(config(root, database_dir=database and tmp_path / database))
        assert [scan.path for scan in found] == [root / scans[0]]
        assert [one.scan.path for one in unusable] == [root / scans[1]]


def test_a_link_to_the_content_keeps_its_bids_name(tmp_path):
    root = make_dataset(tmp_path / "raw", ["store/blob.nii.gz"])
    (root / "sub-01" / "anat").mkdir(parents=True)
    link = root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    link.symlink_to("../../store/blob.nii.gz")
    (scan,), _ = discover(config(root))
    assert scan.path == link


@pytest.mark.parametrize("labels", [("02", "05"), ("sub-05", "02", "02")])
def test_participants_are_selected(tmp_path, labels):
    root = make_dataset(tmp_path / "raw", MANY)
    found = discover(config(root, participants=labels))
    assert {scan.subject for scan in found[0]} == {"02", "05"}


def test_sessions_are_selected(tmp_path):
    root = make_dataset(tmp_path / "raw", SESSIONS)
    assert stems(discover(config(root, sessions=("ses-2",)))) == ["sub-01_ses-2_acq-2_T1w"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"t1w": {"acquisition": "2"}}, ["sub-01_ses-2_acq-2_T1w"]),
        ({"t1w": {"acq": ["1"]}, "bold": {"task": "rest"}}, ["sub-01_ses-1_acq-1_T1w"]),
        ({"t1w": {"session": None}}, ["sub-01_T1w"]),
        ({"t1w": {"session": "Query.NONE"}}, ["sub-01_T1w"]),
        ({"t1w": {"session": "*", "acq": "1"}}, ["sub-01_ses-1_acq-1_T1w"]),
    ],
)
def test_filters_follow_the_grammar(tmp_path, filters, expected):
    root = make_dataset(tmp_path / "raw", [*SESSIONS, "sub-01/anat/sub-01_T1w.nii.gz"])
    assert stems(discover(config(root, filters=filters))) == expected


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (
            {"t1": {}},
            "the filter 't1' is unknown – --bids-filter-file – keys are t1w and t2w",
        ),
        (
            {"t1w": "mprage"},
            "the filter 't1w' holds 'mprage' – --bids-filter-file – write an object of entities: "
            '{"t1w": {"acquisition": "mprage"}}',
        ),
        (
            {"t1w": {"aquisition": "x"}},
            "the filters cannot be applied: 'aquisition' is not a recognized entity. Did you mean "
            "['acquisition']? – --bids-filter-file – keys are t1w and t2w, entities those of "
            "pybids (acquisition, ceagent, run, …)",
        ),
        (
            {"t1w": {"subject": "77"}},
            'the filters cannot be applied: Conflicting entities for "subject" found: 77 // '
            "['01'] – --bids-filter-file – keys are t1w and t2w, entities those of pybids "
            "(acquisition, ceagent, run, …)",
        ),
    ],
)
def test_a_filter_that_makes_no_sense_is_a_sentence(tmp_path, filters, message):
    root = make_dataset(tmp_path / "raw")
    with pytest.raises(UsageError) as error:
        discover(config(root, filters=filters))
    assert str(error.value) == message


def test_shards_share_the_participants_between_them(tmp_path):
    root = make_dataset(tmp_path / "raw", MANY)
    parts = [stems(discover(config(root, shard=(n, 3)))) for n in (1, 2, 3)]
    assert sorted({name[:6] for name in parts[0]}) == ["sub-01", "sub-04", "sub-07"]
    assert sorted(name for part in parts for name in part) == stems(discover(config(root)))


def test_a_shard_without_participants_is_empty_and_no_error(tmp_path):
    root = make_dataset(tmp_path / "raw")
    assert discover(config(root, shard=(2, 2))) == ((), ())
    with pytest.raises(NothingSelectedError):
        discover(config(root, shard=(2, 2), filters={"t1w": {"run": 9}, "t2w": {"run": 9}}))


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_that_does_not_exist_is_a_sentence(tmp_path, shard):
    root = make_dataset(tmp_path / "raw")
    with pytest.raises(UsageError) as error:
        discover(config(root, shard=shard))
    assert str(error.value) == (
        f"the shard {shard[0]}/{shard[1]} does not exist – --shard – write I/N with I from 1 to N"
    )


def test_metadata_is_inherited_nearest_last(tmp_path):
    texts = {
        "T1w.json": {"SkullStripped": True, "Manufacturer": "A", "MagneticFieldStrength": 3},
        "acq-2_T1w.json": {"Manufacturer": "B"},
        "T2w.json": {"Manufacturer": "wrong suffix"},
        "acq-7_T1w.json": {"Manufacturer": "wrong acq"},
        "sub-01/ses-2/anat/sub-01_ses-2_acq-2_T1w.json": {"SkullStripped": False},
    }
    root = make_dataset(tmp_path / "raw", SESSIONS, texts)
    first, second = discover(config(root))[0]
    assert first.sidecar == texts["T1w.json"]
    assert second.sidecar == {**texts["T1w.json"], "Manufacturer": "B", "SkullStripped": False}
    assert (first.skull_stripped, second.skull_stripped) == (True, False)


@pytest.mark.parametrize(
    ("sidecar", "name", "agent"),
    [
        ({"ContrastBolusIngredient": "GADOLINIUM"}, "sub-01_T1w", "gadolinium"),
        ({"ContrastBolusIngredient": "none"}, "sub-01_T1w", None),
        ({"ContrastBolusIngredient": ""}, "sub-01_T1w", None),
        ({"ContrastBolusIngredient": None}, "sub-01_T1w", None),
        ({}, "sub-01_ce-gd_T1w", "gd"),
        ({}, "sub-01_ce-none_T1w", None),
        ({}, "sub-01_ce-pre_T1w", None),
        ({}, "sub-01_T1w", None),
    ],
)
def test_the_contrast_agent_is_told(tmp_path, sidecar, name, agent):
    root = make_dataset(tmp_path / "raw", [f"sub-01/anat/{name}.nii.gz"], {"T1w.json": sidecar})
    assert discover(config(root))[0][0].contrast_agent == agent


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), ("true", True), ("maybe", None), (1, None)],
)
def test_skull_stripped_is_told(tmp_path, value, expected):
    root = make_dataset(tmp_path / "raw", texts={"T1w.json": {"SkullStripped": value}})
    assert discover(config(root))[0][0].skull_stripped is expected


def test_hostile_files_are_named_and_the_good_scan_is_found(tmp_path):
    root = make_hostile_dataset(tmp_path / "raw")
    scans, unusable = discover(config(root))
    assert [scan.path.name for scan in scans] == ["sub-01_T1w.nii.gz", "sub-01_acq-twin_T1w.nii"]
    rename = "give it a BIDS name, such as sub-01_T1w.nii.gz, or move it away"
    characters = "has characters other than letters and digits"
    here, name = f"in {root}", "sub-01/anat/sub-01_acq-{}_T1w.nii.gz".format
    not_here = "its content is not on this machine (DataLad, git-annex)"
    expected = {
        "sub-01_acq-a b_T1w.nii.gz": (f"the label 'a b' of 'acq-' {characters}", rename),
        "sub-01_acq-..\\up_T1w.nii.gz": (f"the label '..\\\\up' of 'acq-' {characters}", rename),
        'sub-01_acq-"<script>"_T1w.nii.gz': (
            f"the label '\"<script>\"' of 'acq-' {characters}",
            rename,
        ),
        "sub-01_acq-tab\there_T1w.nii.gz": (
            f"the label 'tab\\there' of 'acq-' {characters}",
            rename,
        ),
        os.fsdecode(b"sub-01_acq-\xff_T1w.nii.gz"): (
            f"the label '\\udcff' of 'acq-' {characters}",
            rename,
        ),
        "sub-01_T1.nii.gz": ("its suffix is 'T1', neither T1w nor T2w", rename),
        "sub-01_t2w.nii.gz": ("its suffix is 't2w', neither T1w nor T2w", rename),
        "sub-01_space-MNI_T1w.nii.gz": (
            "'space-' in its name belongs to derivatives, not to raw scans",
            rename,
        ),
        "sub-02_acq-other_T1w.nii.gz": ("its folder says 'sub-01', its name 'sub-02'", rename),
        "sub-01_ses-9_T1w.nii.gz": ("its folder says no ses-, its name 'ses-9'", rename),
        "sub-01_acq-twin_T1w.nii.gz": (
            "it has the same entities as sub-01_acq-twin_T1w.nii",
            "keep one of the two",
        ),
        "sub-..x_T1w.nii.gz": (f"the label '..x' of 'sub-' {characters}", rename),
        "sub-01_acq-json_T2w.nii.gz": (
            "its sidecar sub-01/anat/sub-01_acq-json_T2w.json is not valid JSON (line 2: "
            "Expecting value)",
            "mend the JSON file, or fetch it if it is a DataLad link",
        ),
        "sub-01_acq-annex_T1w.nii.gz": (not_here, f"run `datalad get {name('annex')}` {here}"),
        "sub-01_acq-unlocked_T1w.nii.gz": (
            not_here,
            f"run `datalad get {name('unlocked')}` {here}",
        ),
        "sub-01_acq-lfs_T1w.nii.gz": (
            "its content is not on this machine (Git LFS)",
            f"run `git lfs pull --include {name('lfs')}` {here}",
        ),
        "sub-01_acq-dangling_T1w.nii.gz": (
            "it is a link to '/nowhere/at/all.nii.gz', which does not exist",
            "fetch the file (DataLad: `datalad get`) or mend the link",
        ),
        "sub-01_acq-empty_T1w.nii.gz": ("the file is empty", "copy or convert the scan again"),
        "sub-01_acq-folder_T1w.nii.gz": (
            "it is not a file",
            "put the NIfTI file there, or remove it",
        ),
        "sub-01_acq-pipe_T1w.nii.gz": (
            "it is not a file",
            "put the NIfTI file there, or remove it",
        ),
    }
    assert {u.scan.path.name: (u.reason, u.hint) for u in unusable} == expected


def test_labels_of_broken_names_cannot_leave_a_folder(tmp_path):
    root = make_hostile_dataset(tmp_path / "raw")
    for broken in discover(config(root))[1]:
        assert all(label.replace("+", "a").isalnum() for label in broken.scan.entities.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sub-01_what_T1w.nii.gz", "the part 'what' of its name is no key-label pair"),
        ("sub-01_foo-1_T1w.nii.gz", "'foo-' in its name is no entity of a T1w or T2w scan"),
        ("sub-01_acq-1_acq-2_T1w.nii.gz", "'acq-' occurs twice in its name"),
        ("sub-01_run-x_T1w.nii.gz", "the label 'x' of 'run-' is not a number"),
        ("acq-1_T1w.nii.gz", "its name does not begin with 'sub-'"),
        ("sub-01_T1w.nii.nii", "its suffix is 'T1w.nii', neither T1w nor T2w"),
    ],
)
def test_every_way_to_break_a_name_has_its_sentence(tmp_path, name, reason):
    root = make_dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T2w.nii.gz"])
    (root / "sub-01" / "anat" / name).write_bytes(b"x")
    scans, unusable = discover(config(root))
    assert len(scans) == 1
    assert [u.reason for u in unusable] == [reason]


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "my raw")
    close(monkeypatch, root / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    (broken,) = discover(config(root))[1]
    assert broken.reason == "there is no permission to read it"
    assert broken.hint == f"run `chmod u+r sub-01/anat/sub-01_T1w.nii.gz` in '{root}'"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(NoInputError) as error:
        check_dataset(tmp_path / "none")
    assert str(error.value) == (
        f"there is no such folder – {tmp_path / 'none'} – check the path (and its mount)"
    )
    assert error.value.exit_code == 66


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "x.nii").touch()
    with pytest.raises(NoInputError) as error:
        check_dataset(tmp_path / "x.nii")
    assert str(error.value) == (
        f"this is a file, not a folder – {tmp_path / 'x.nii'} – name the BIDS folder itself"
    )


def test_a_folder_that_is_not_bids(tmp_path):
    (tmp_path / "raw" / "sub-01").mkdir(parents=True)
    with pytest.raises(NotBidsError) as error:
        discover(config(tmp_path / "raw"))
    assert str(error.value) == (
        f"dataset_description.json is missing – {tmp_path / 'raw'} – name the root folder of the "
        f"dataset, or add the file: {SMALLEST}"
    )
    assert error.value.exit_code == 16


@pytest.mark.parametrize("named", ["raw/sub-01/anat", "raw/sub-01", "."])
def test_a_dataset_above_or_below_is_proposed(tmp_path, named):
    root = make_dataset(tmp_path / "raw")
    with pytest.raises(NotBidsError) as error:
        check_dataset(tmp_path / named)
    assert error.value.hint == f"did you mean {root}?"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not valid JSON (line 1: Expecting property name enclosed in double quotes)"),
        ("[1]", "holds a JSON list where an object is needed"),
        ("[" * 100_000, "is not valid JSON (nested too deeply)"),
    ],
)
def test_a_broken_description_is_a_sentence(tmp_path, text, problem):
    root = make_dataset(tmp_path / "raw", texts={"dataset_description.json": text})
    with pytest.raises(NotBidsError) as error:
        discover(config(root))
    assert str(error.value) == (
        f"dataset_description.json {problem} – {root} – mend or fetch it; the smallest valid one "
        f"is {SMALLEST}"
    )


def test_a_dataset_without_participants_is_a_sentence(tmp_path):
    root = make_dataset(tmp_path / "raw", [])
    with pytest.raises(NotBidsError) as error:
        discover(config(root))
    assert str(error.value) == (
        f"there is no folder named sub-… – {root} – name the folder that holds the participants; "
        "if you use a container, check that the folder is mounted"
    )


def test_a_participant_that_is_not_there(tmp_path):
    root = make_dataset(tmp_path / "raw", MANY)
    with pytest.raises(NothingSelectedError) as error:
        discover(config(root, participants=("02", "77", "x; rm -rf /")))
    assert str(error.value) == (
        f"there is no participant '77', 'x; rm -rf /' – {root} – check --participant-label; "
        "similar are 07"
    )
    assert error.value.exit_code == 18


def test_an_unknown_participant_shows_what_there_is(tmp_path):
    root = make_dataset(tmp_path / "raw", MANY)
    with pytest.raises(NothingSelectedError) as error:
        discover(config(root, participants=("zz",)))
    assert error.value.hint == ("check --participant-label; the dataset has 01, 02, 03, 04, 05, …")


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            {"sessions": ("9",), "participants": ("01",)},
            "no T1w or T2w scan was found for participants '01', sessions '9'",
            "check --session-label; there are '1', '2'",
        ),
        (
            {"filters": {"t1w": {"run": 7}}},
            "no T1w or T2w scan was found for filters t1w: {'run': 7}",
            "check the --bids-filter-file; its keys are t1w and t2w",
        ),
    ],
)
def test_filters_that_match_nothing(tmp_path, options, what, hint):
    root = make_dataset(tmp_path / "raw", SESSIONS)
    with pytest.raises(NothingSelectedError) as error:
        discover(config(root, **options))
    assert str(error.value) == f"{what} – {root} – {hint}"


def test_a_dataset_without_scans(tmp_path):
    root = make_dataset(tmp_path / "raw", ["sub-01/func/sub-01_task-rest_bold.nii.gz"])
    with pytest.raises(NothingSelectedError) as error:
        discover(config(root))
    assert str(error.value) == (
        f"no T1w or T2w scan was found – {root} – check that the scans are named …_T1w.nii.gz or "
        "…_T2w.nii.gz and lie in anat folders"
    )


@pytest.mark.parametrize(
    ("closed", "left"),
    [
        ("sub-02", []),
        ("sub-02/ses-1", ["sub-02_ses-2"]),
        ("sub-02/ses-1/anat", ["sub-02_ses-2"]),
    ],
)
@pytest.mark.parametrize("database", [None, "made before", "made now"])
def test_a_folder_without_permission_is_a_failure_of_its_own(
    tmp_path, monkeypatch, closed, left, database
):
    scans = [f"sub-0{n}/ses-{m}/anat/sub-0{n}_ses-{m}_T1w.nii.gz" for n in (1, 2) for m in (1, 2)]
    root = make_dataset(tmp_path / "raw", scans)
    asked = config(root, database_dir=database and tmp_path / "kept")
    if database == "made before":
        discover(asked)
    close(monkeypatch, root / closed)
    found, (unusable,) = discover(asked)
    assert [scan.stem for scan in found] == ["sub-01_ses-1", "sub-01_ses-2", *left]
    assert (unusable.scan.path, unusable.scan.subject) == (root / closed, "02")
    assert unusable.reason == f"there is no permission to read the folder {closed}"
    assert unusable.hint == (
        "give the user who runs this read access to it, or leave the participant out"
    )


@pytest.mark.parametrize("lost", ["sub-02", "sub-02/ses-1", "sub-02/ses-1/anat", "sub-02/anat"])
@pytest.mark.parametrize("database", [None, "kept"])
def test_a_link_to_a_folder_that_is_not_there_is_a_failure_of_its_own(tmp_path, lost, database):
    root = make_dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T1w.nii.gz"])
    (root / "sub-02_scans.tsv").symlink_to(".git/annex/objects/x")
    (root / lost).parent.mkdir(parents=True, exist_ok=True)
    (root / lost).symlink_to("/not/mounted")
    asked = config(root, database_dir=database and tmp_path / database)
    for _ in range(2):
        (scan,), (unusable,) = discover(asked)
        assert (scan.subject, unusable.scan.path) == ("01", root / lost)
        assert (unusable.reason, unusable.hint) == (
            f"the folder {lost} is a link to '/not/mounted', which does not exist",
            "mend the link, or mount what it leads to if you use a container",
        )


@pytest.mark.parametrize("absent", ["sub-02", "sub-02/ses-1"])
def test_a_subdataset_that_is_not_installed_is_a_failure_of_its_own(tmp_path, absent):
    modules = f'[submodule "x"]\n\tpath = {absent}\n\turl = ./x\n[submodule "y"]\n\tpath = y\n'
    scans = ["sub-01/anat/sub-01_T1w.nii.gz"]
    root = make_dataset(tmp_path / "raw", scans, {".gitmodules": modules})
    (root / absent).mkdir(parents=True)
    (root / "sub-03").mkdir()  # a folder that is empty, but nobody says that it should not be
    (scan,), (unusable,) = discover(config(root))
    assert (scan.subject, unusable.scan.path) == ("01", root / absent)
    assert (unusable.reason, unusable.hint) == (
        f"the folder {absent} is a DataLad subdataset that is not installed",
        f"run `datalad get -n {absent}` in {root}",
    )
    assert not is_gone(root, absent)
    (root / absent / "anat").mkdir()
    assert discover(config(root)) == ((scan,), ())
    assert is_gone(root, absent)


def test_a_dataset_of_links_that_lead_nowhere_is_not_taken_for_another_folder(tmp_path):
    root = make_dataset(tmp_path / "raw", [])
    (root / "sub-01").symlink_to("/not/mounted")
    found, (unusable,) = discover(config(root))
    assert (found, unusable.scan.subject) == ((), "01")


def test_a_session_without_permission_is_no_failure_where_another_is_asked_for(
    tmp_path, monkeypatch
):
    root = make_dataset(tmp_path / "raw", SESSIONS)
    close(monkeypatch, root / "sub-01" / "ses-1")
    assert stems(discover(config(root, sessions=("2",)))) == ["sub-01_ses-2_acq-2_T1w"]
    assert discover(config(root, sessions=("2",)))[1] == ()
    assert len(discover(config(root, sessions=("1",)))[1]) == 1


def test_a_database_is_kept_and_used_again(tmp_path):
    root, kept = make_dataset(tmp_path / "raw", MANY), tmp_path / "db" / "here"
    first = discover(config(root, database_dir=kept, participants=("02",)))
    assert (kept / "layout_index.sqlite").exists()
    assert stems(first) == ["sub-02_T1w", "sub-02_T2w"]
    assert discover(config(root, database_dir=kept)) == discover(config(root))


def test_a_database_that_is_out_of_date_is_a_sentence(tmp_path):
    root, kept = make_dataset(tmp_path / "raw", MANY), tmp_path / "db"
    discover(config(root, database_dir=kept))
    make_dataset(root, ["sub-02/anat/sub-02_run-2_T1w.nii.gz"])
    with pytest.raises(DataError) as error:
        discover(config(root, database_dir=kept))
    assert str(error.value) == (
        "the database is out of date: sub-02/anat/sub-02_run-2_T1w.nii.gz was added since – "
        f"{kept} – delete the folder, or leave out --bids-database-dir"
    )
    (root / "sub-02" / "anat" / "sub-02_run-2_T1w.nii.gz").unlink()
    (root / "sub-03" / "anat" / "sub-03_T1w.nii.gz").unlink()
    with pytest.raises(DataError, match="sub-03_T1w.nii.gz was removed since"):
        discover(config(root, database_dir=kept))


def test_a_database_of_another_dataset_is_a_sentence(tmp_path):
    root, kept = make_dataset(tmp_path / "raw"), tmp_path / "db"
    discover(config(make_dataset(tmp_path / "other"), database_dir=kept))
    with pytest.raises(UsageError) as error:
        discover(config(root, database_dir=kept))
    assert str(error.value) == (
        f"the database is of another dataset, {tmp_path / 'other'} – {kept} – choose another "
        "--bids-database-dir"
    )


def test_a_damaged_database_is_a_sentence(tmp_path):
    root, kept = make_dataset(tmp_path / "raw"), tmp_path / "db"
    discover(config(root, database_dir=kept))
    (kept / "layout_index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError) as error:
        discover(config(root, database_dir=kept))
    assert str(error.value).startswith("the database cannot be used (DatabaseError: ")
    assert str(error.value).endswith(
        f" – {kept} – delete the folder, or leave out --bids-database-dir"
    )


def test_a_database_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    root = make_dataset(tmp_path / "raw")
    with pytest.raises(CannotCreateError) as error:
        discover(config(root, database_dir=root / "README.md" / "db"))
    assert str(error.value) == (
        f"the database folder cannot be made (Not a directory) – {root / 'README.md' / 'db'} – "
        "choose another --bids-database-dir"
    )


def test_the_dataset_is_not_touched(tmp_path):
    root = make_dataset(tmp_path / "raw", MANY, {"participants.tsv": table("participant_id|age")})
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    discover(config(root))
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


@pytest.mark.parametrize("name", ["my data (1)", "a#b%20c", "naïve ünï", "quote'\""])
def test_the_folder_of_the_dataset_may_have_any_name(tmp_path, name):
    root = make_dataset(tmp_path / name)
    (scan,), _ = discover(config(root))
    assert scan.path == root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    assert isinstance(scan.path, Path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count"), [("malc", 15), ("infant", 24), ("ms", 8), ("ages", 10), ("heads", 2)]
)
def test_real_datasets_are_found_whole(name, count):
    scans, unusable = discover(config(real_dataset(name), Path("/nowhere")))
    assert (len(scans), unusable) == (count, ())
    if name == "ages":
        assert sorted({round(scan.age.years * 12) for scan in scans}) == [0, 6, 9, 12, 24]
    if name == "malc":
        assert all(19 <= scan.age.years <= 34 and scan.skull_stripped for scan in scans)
    if name == "ms":
        agents = {scan.stem: scan.contrast_agent for scan in scans if scan.contrast_agent}
        assert agents == {"sub-gd07_ses-gd_ce-gadolinium": "gadolinium"}
        assert {scan.skull_stripped for scan in scans if scan.session != "gd"} == {None}


@pytest.mark.data
def test_a_real_dataset_of_labels_has_no_scan():
    with pytest.raises(NothingSelectedError, match="no T1w or T2w scan was found"):
        discover(config(real_dataset("labelmaps"), Path("/nowhere")))
