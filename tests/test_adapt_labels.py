"""Labels of a site: which scan they belong to, what they mean, and whether they can be its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.stats import rankdata

from tests.datasets import config, real_dataset
from tests.test_adapt import PROTOCOL, affine, head, paint, save_nifti, write_site
from tlseg_bids.adapt.corrected import changed_channels, corrected_only
from tlseg_bids.adapt.evidence import Evidence, explained, measure, ranks_of, why_wrong
from tlseg_bids.adapt.labels import collect, unknown_slices
from tlseg_bids.adapt.matching import match
from tlseg_bids.adapt.reading import IGNORE, own_protocol, read_as
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.adaptation import Adaptation, load_adaptation, presets
from tlseg_bids.volume import Grid, Volume


def scans_of(bids: Path) -> list[Scan]:
    return [
        Scan(path, bids, {"sub": path.name[4:6]}, path.name[7:10])
        for path in sorted(bids.glob("sub-*/anat/*_T?w.nii.gz"))
    ]


def collected(bids: Path, derivative: Path, **options):
    return collect(match(derivative, scans_of(bids)), PROTOCOL, **options)


def test_labels_in_the_models_protocol_are_partial_by_what_they_show(tmp_path):
    found = collected(*write_site(tmp_path, {"sub-00": head(0)}))
    assert [one.name for one in found.usable] == ["sub-00_T1w"]
    assert found.unlabelled == ("sub-01_T1w", "sub-02_T1w")
    reading = found.reading
    assert not reading.new_head
    assert len(reading.labelled()) == 10
    assert "Not labelled, and merged into the background" in " ".join(reading.notes)
    assert (reading.indices(found.usable[0].channels) == head(0)).all()
    absent = PROTOCOL.channels(name="Brain stem")
    assert (reading.group[absent] == 0).all()


def test_finer_and_coarser_protocols_are_read_by_their_mapping():
    braincolor, infant = load_protocol("braincolor"), load_protocol("infant")
    fine = {int(i): 100 for i in braincolor.indices if i}
    names = dict(zip(fine, braincolor.table["name"][1:], strict=True))
    reading = read_as(fine, names, "braincolor", PROTOCOL)
    assert (reading.source.name, reading.target.name) == ("braincolor", "aseg")
    left_out = braincolor.table["index"][braincolor.table["name"] == "Fifth ventricle"].iloc[0]
    assert reading.pairs[int(left_out)] == IGNORE
    coarse = {int(i): 100 for i in infant.indices if i}
    names = dict(zip(coarse, infant.table["name"][1:], strict=True))
    reading = read_as(coarse, names, "aseg", PROTOCOL)
    assert reading.source.name == "infant"
    cortex, white = (
        PROTOCOL.channels(name=f"Left cerebellum {part}")[0] for part in ("cortex", "white matter")
    )
    assert reading.group[white] == reading.group[cortex] == reading.pairs[8]
    vermis = int(infant.table["index"][infant.table["name"] == "Cerebellar vermis"].iloc[0])
    assert reading.pairs[vermis] == IGNORE
    kept = read_as(fine, None, "braincolor", PROTOCOL, new_head=True)
    assert kept.new_head and kept.target.name == "braincolor"


def test_a_sites_own_protocol_has_sides_and_partners():
    names = {0: "Background", 1: "lh-tumour bed", 2: "rh-tumour bed", 5: "Cyst", 9: "never"}
    reading = read_as({0: 9, 1: 50, 2: 60, 5: 7}, names, "lesions", PROTOCOL)
    assert reading.new_head and reading.target.name == "lesions"
    table = reading.target.table
    assert table["index"].tolist() == [0, 1, 2, 5]
    assert table["hemisphere"].tolist() == ["none", "left", "right", "none"]
    assert reading.target.mirror.tolist() == [0, 2, 1, 3]
    assert reading.channels(np.array([0, 1, 9, 77])).tolist() == [0, 1, 0, IGNORE]
    with pytest.raises(DataError, match="nothing says what the labels mean.*seg-lesions_dseg.tsv"):
        read_as({0: 9, 1: 50, 255: 5}, None, "lesions", PROTOCOL)
    with pytest.raises(DataError, match="no label image shows any structure"):
        read_as({0: 9}, names, "lesions", PROTOCOL)
    with pytest.raises(DataError, match="name 300 structures"):
        own_protocol("many", {n: str(n) for n in range(301)}, range(301))


def test_names_that_contradict_a_known_protocol_make_it_the_sites_own():
    swapped = {0: "Background", 10: "Left vessel", 49: "Right vessel"}
    assert read_as({10: 50, 49: 50}, swapped, "aseg", PROTOCOL).target.name == "asegsite"


def test_labels_on_another_grid_are_refused(tmp_path):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0), "sub-01": head(1)[:-1]})
    moved = nib.load(derivative / "sub-00/anat/sub-00_space-T1w_seg-aseg_dseg.nii.gz")
    shifted = affine()
    shifted[0, 3] += 3
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), shifted), moved.get_filename())
    with pytest.raises(DataError, match="on another grid than the scan: a corner lies 3.0 mm"):
        collected(bids, derivative)
    save_nifti(derivative / "sub-02/anat/sub-02_space-T1w_seg-aseg_dseg.nii.gz", head(2))
    found = collected(bids, derivative)
    assert [one.name for one in found.usable] == ["sub-02_T1w"]
    whats = {one.name: one.what for one in found.refused}
    assert "(39, 40, 40) voxels, the scan has (40, 40, 40)" in whats["sub-01_T1w"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (head(0) + 0.5, "64000 voxels are not whole numbers"),
        (np.stack([head(0)] * 2, -1), "the image has 4 dimensions"),
        (None, "cannot be read as NIfTI"),
    ],
)
def test_what_is_wrong_with_a_label_image_is_said_of_it_and_not_of_the_scan(
    tmp_path, data, sentence
):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0), "sub-01": head(1)})
    file = derivative / "sub-00/anat/sub-00_space-T1w_seg-aseg_dseg.nii.gz"
    file.write_bytes(b"") if data is None else save_nifti(file, data.astype(np.float32))
    (one,) = collected(bids, derivative).refused
    assert one.name == "sub-00_T1w"
    assert one.what.startswith(f"the label image {file.name} cannot be used: {sentence}")


def test_an_unknown_index_is_refused_for_its_scan_alone(tmp_path):
    strange = head(1)
    strange[strange == 10] = 999
    found = collected(*write_site(tmp_path, {"sub-00": head(0), "sub-01": strange}))
    assert [one.name for one in found.usable] == ["sub-00_T1w"]
    (one,) = found.refused
    assert "index 999 is not in the look-up table" in one.what
    assert "labelled voxels" in one.what and "add the row" in one.hint


@pytest.mark.parametrize(
    ("index", "sentence", "hint"),
    [
        (-1, r"1 voxel of sub-00_.*_dseg.nii.gz with a negative label, down to -1", "write 0"),
        (40000, r"index 40000 of sub-00_.* is above 32767, the largest", "a smaller index"),
    ],
)
@pytest.mark.parametrize("with_table", [True, False])
def test_an_index_that_cannot_be_held_is_refused(tmp_path, index, sentence, hint, with_table):
    labels = head(0).astype(np.int32)
    labels[0, 0, 0] = index
    bids, derivative = write_site(tmp_path, {"sub-00": labels, "sub-01": head(1)})
    names = derivative / "seg-aseg_dseg.tsv"
    if with_table:
        names.write_text(f"{names.read_text()}{index}\tmine\n")
    else:
        names.unlink()
        for file in derivative.glob("sub-*/anat/*"):
            file.rename(file.with_name(file.name.replace("_seg-aseg", "")))
    found = collected(bids, derivative)
    assert [one.name for one in found.usable] == ["sub-01_T1w"]
    (one,) = found.refused
    assert re.search(sentence, one.what) and hint in one.hint


def test_a_row_below_zero_leaves_the_other_labels_alone():
    names = {-1: "outside", 1: "one", 2: "two"}
    reading = read_as({1: 5, 2: 5}, names, "lab", PROTOCOL)
    assert reading.channels(np.array([-1, 0, 1, 2, 3])).tolist() == [0, 0, 1, 2, IGNORE]


def test_no_labels_at_all_is_said(tmp_path):
    bids, derivative = write_site(tmp_path, {})
    with pytest.raises(NoInputError, match="there are no labels: no sub-"):
        match(derivative, scans_of(bids))
    with pytest.raises(NoInputError, match="there is no such folder – --labels"):
        match(tmp_path / "nowhere", scans_of(bids))
    save_nifti(derivative / "sub-77/anat/sub-77_seg-aseg_dseg.nii.gz", head(0))
    with pytest.raises(NoInputError, match="of 1 label image none belongs to a selected scan"):
        match(derivative, scans_of(bids))
    save_nifti(derivative / "sub-00/anat/sub-00_seg-aseg_dseg.nii.gz", head(0) * 0)
    with pytest.raises(DataError, match="no labelled scan can be used.*shows no structure"):
        collected(bids, derivative)


def test_two_label_images_of_a_scan_are_refused(tmp_path):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    save_nifti(derivative / "sub-00/anat/sub-00_space-T1w_seg-aseg_desc-b_dseg.nii.gz", head(0))
    (one,) = match(derivative, scans_of(bids)).refused
    assert "there are two label images of this scan" in one.what


def test_a_label_image_without_space_belongs_to_the_scans_on_its_grid(tmp_path):
    bids, derivative = write_site(tmp_path, {})
    save_nifti(bids / "sub-00/anat/sub-00_T2w.nii.gz", paint(head(0), 5)[:-2])
    save_nifti(derivative / "sub-00/anat/sub-00_seg-aseg_dseg.nii.gz", head(0))
    pairs = match(derivative, scans_of(bids)).pairs
    assert [scan.suffix for scan, _ in pairs] == ["T1w"]
    save_nifti(derivative / "sub-00/anat/sub-00_seg-aseg_dseg.nii.gz", head(0)[:-5])
    (one,) = match(derivative, scans_of(bids)).refused
    assert "fits 2 scans by its name" in one.what and "space-T1w" in one.hint


def test_two_protocols_at_once_are_refused(tmp_path):
    bids, derivative = write_site(tmp_path, {"sub-00": head(0)})
    save_nifti(derivative / "sub-01/anat/sub-01_seg-other_dseg.nii.gz", head(1))
    with pytest.raises(DataError, match="in 2 protocols: aseg, other"):
        collected(bids, derivative)


def test_a_broken_look_up_table_is_said(tmp_path):
    with pytest.raises(DataError, match="lacks the columns index and name"):
        collected(*write_site(tmp_path / "a", {"sub-00": head(0)}, rows="a\tb\n1\t2\n"))
    with pytest.raises(DataError, match="the index 'x' is not a whole number"):
        collected(*write_site(tmp_path / "b", {"sub-00": head(0)}, rows="index\tname\nx\ty\n"))


def test_an_index_with_two_names_is_refused_and_one_written_twice_is_not(tmp_path):
    rows = PROTOCOL.table[["index", "name"]].to_csv(sep="\t", index=False)
    bids, derivative = write_site(
        tmp_path, {"sub-00": head(0)}, rows=f"{rows}10\tLeft thalamus\n10\tRight thalamus\n"
    )
    sentence = r"index 10 has two names, 'Left thalamus' and 'Right thalamus'.*dseg.tsv – keep the"
    with pytest.raises(DataError, match=sentence):
        collected(bids, derivative)
    (derivative / "seg-aseg_dseg.tsv").write_text(f"{rows}10\tLeft thalamus\n")
    assert len(collected(bids, derivative).usable) == 1


ISOTROPIC = (1.0, 1.0, 1.0)
THICK = (0.9, 0.9, 5.0)


def test_slices_that_nobody_labelled_are_unknown():
    full = np.zeros((20, 20, 20), bool)
    full[4:16, 4:16, 4:16] = True
    assert unknown_slices(full, ISOTROPIC) == (pytest.approx(np.zeros_like(full)), "")
    some = full.copy()
    some[:, :, np.arange(20) % 3 != 0] = False
    unknown, note = unknown_slices(some, ISOTROPIC)
    assert unknown[:, :, np.arange(20) % 3 != 0].all()
    assert not unknown[:, :, [6, 9, 12, 15]].any()
    assert unknown[:, :, 0].all(), "beyond the outermost labelled slice nothing is known either"
    assert "slices along axis K" in note
    gap = full.copy()
    gap[:, 8:10] = False
    unknown, note = unknown_slices(gap, ISOTROPIC)
    assert unknown[:, 8:10].all() and not unknown[:, :8].any()
    stray = full.copy()
    stray[0, 10, 10] = True
    assert not unknown_slices(stray, ISOTROPIC)[0].any()


def nuclei(left: int, right: int) -> np.ndarray:
    """A nucleus on either side, 5 mm wide and 7 mm long, in two slices of 5 mm."""
    labels = np.zeros((80, 90, 30), np.int16)
    labels[20:26, 40:48, 14:16], labels[54:60, 40:48, 14:16] = left, right
    return labels


def test_a_whole_structure_in_two_thick_slices_leaves_background_around_it():
    unknown, note = unknown_slices(nuclei(1, 2), THICK)
    assert not unknown.any() and not note
    assert unknown_slices(nuclei(1, 2), ISOTROPIC)[0][:, :, :14].all(), "2 mm are no structure"


def test_a_gap_is_unknown_only_within_a_structure():
    unknown, note = unknown_slices(nuclei(1, 1), THICK)
    assert unknown[26:54].all() and not unknown[:26].any() and not unknown[54:].any()
    assert note == "Without any label, and taken as unknown: 28 of 80 slices along axis I."
    between = nuclei(1, 2)
    between[38:42, 40:48, 14:16] = 3
    assert not unknown_slices(between, THICK)[0].any()


@pytest.mark.parametrize("count", [1, 2])
def test_thick_slices_that_were_labelled_alone_say_nothing_of_the_others(count):
    labels = np.zeros((80, 90, 30), np.int16)
    labels[10:70, 10:80, 14 : 14 + count] = 1
    unknown, note = unknown_slices(labels, THICK)
    assert unknown[:, :, :14].all() and unknown[:, :, 14 + count :].all()
    assert f"{30 - count} of 30 slices along axis K" in note
    assert not unknown[:, :, 14].any()
    one = np.where(np.arange(30) == 14, nuclei(1, 2), 0)
    assert unknown_slices(one, THICK)[0][:, :, 15].all()


# --- evidence -----------------------------------------------------------------------------------


def evidence_of(labels: np.ndarray, truth: np.ndarray) -> Evidence:
    table = np.zeros(256, np.uint8)
    table[PROTOCOL.indices] = np.arange(len(PROTOCOL))
    reading = read_as({int(i): 100 for i in np.unique(truth)}, None, "aseg", PROTOCOL)
    image = Volume(paint(truth, 1), Grid(truth.shape, affine()))
    return measure(image, table[labels], table[truth], reading, np.eye(4))


def test_labels_of_the_scan_itself_are_believed():
    found = evidence_of(head(0), head(0))
    assert found.pairs == 5 and found.crossed == 0
    assert found.agreement == 1 and found.shift_mm == 0
    assert found.explained > 0.6
    assert why_wrong("x", found, []) is None


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (head(0, flip=True), "left and right are swapped: in 5 of 5 pairs of x.nii.gz"),
        (np.roll(head(0), 10, 1), "are shifted against the scan by about 20 mm"),
        (np.roll(head(9), (3, -4, 3), (0, 1, 2)), "do not belong to this scan"),
    ],
)
def test_labels_that_are_not_the_scans_own_are_refused(labels, sentence):
    what, hint = why_wrong("x.nii.gz", evidence_of(labels, head(0)), [])
    assert sentence in what
    assert hint


def test_a_base_that_is_lost_refuses_nothing():
    lost = replace(evidence_of(head(0), head(0)), agreement=0.1, explained_by_base=0.3, shift_mm=25)
    assert why_wrong("x", lost, []) is None


def test_the_explained_share_is_that_of_the_variance():
    values = np.array([1.0, 1, 3, 3, 100])
    classes = np.array([0, 0, 1, 1, IGNORE])
    assert explained(values, classes) == 1
    assert explained(values, np.array([0, 1, 0, 1, IGNORE])) == 0


def test_equal_intensities_explain_nothing():
    labels = head(0)
    table = np.zeros(256, np.uint8)
    table[PROTOCOL.indices] = np.arange(len(PROTOCOL))
    reading = read_as({int(i): 100 for i in np.unique(labels)}, None, "aseg", PROTOCOL)
    image = Volume(np.ones(labels.shape, np.float32), Grid(labels.shape, affine()))
    found = measure(image, table[labels], table[labels], reading, np.eye(4))
    assert found.explained == found.explained_by_base == found.explained_moved == 0


def test_intensities_are_ranked_as_statisticians_do():
    values = np.random.default_rng(0).integers(0, 9, 500)
    np.testing.assert_allclose(ranks_of(values), rankdata(values))


@pytest.mark.data
def test_real_labels_are_read_as_what_they_are():
    for name, folder, protocol in (
        ("infant", "jlf", "infant"), ("malc", "manual", "braincolor"),
    ):  # fmt: skip
        root = real_dataset(name)
        labels = {"infant": "inf01", "malc": "1000"}[name]
        scans, _ = discover(config(root, participants=(labels,)))
        found = collect(match(root / "derivatives" / folder, scans), PROTOCOL)
        assert found.reading.source.name == protocol
        assert not found.refused and found.usable


# --- corrections --------------------------------------------------------------------------------


OUTPUT = "sub-00/anat/sub-00_space-T1w_seg-aseg_dseg"
MINE = OUTPUT.replace("_dseg", "_desc-mine_dseg")


def write_output(out: Path, labels: np.ndarray, key: str) -> None:
    """What a run of the program leaves of sub-00."""
    save_nifti(out / f"{OUTPUT}.nii.gz", labels)
    (out / f"{OUTPUT}.json").write_text(json.dumps({"ContentKey": key}))


def with_output(tmp_path, changed: np.ndarray, image=f"{OUTPUT}.nii.gz", sidecar=f"{OUTPUT}.json"):
    """A site that corrected the program's own output of `head(0)`."""
    bids, derivative = write_site(tmp_path, {})
    save_nifti(derivative / image, changed)
    (derivative / sidecar).write_text(json.dumps({"ContentKey": "k"}))
    write_output(tmp_path / "out", head(0), "k")
    return collected(bids, derivative), tmp_path / "out"


def corrected_head() -> np.ndarray:
    """`head(0)` with a larger left thalamus."""
    changed = head(0)
    changed[np.roll(changed, 1, 1) == 10] = 10
    return changed


def counted(one) -> set[str]:
    """Names of the structures that count."""
    channels = set(np.flatnonzero(one.group == np.arange(len(one.group)))) - {0}
    return set(PROTOCOL.table["name"].iloc[list(channels)])


def check_only_the_thalamus_counts(one) -> None:
    assert "Left thalamus" in counted(one)
    assert "Right putamen" not in counted(one)
    assert "Corrected by hand, and alone counted: " in one.notes[-1]


def test_only_corrected_structures_count(tmp_path):
    found, out = with_output(tmp_path, corrected_head())
    (one,) = corrected_only(found, out).usable
    check_only_the_thalamus_counts(one)
    assert not (out / "models").exists(), "nothing is kept where nothing was asked for"


@pytest.mark.parametrize(
    ("image", "sidecar"),
    [
        (f"{OUTPUT}.nii", f"{OUTPUT}.json"),
        (f"{MINE}.nii.gz", f"{OUTPUT}.json"),
        (f"{MINE}.nii", f"{MINE}.json"),
        ("sub-00/anat/sub-00_seg-aseg_dseg.nii.gz", "sub-00/anat/sub-00_seg-aseg_dseg.json"),
    ],
)
def test_a_correction_under_another_name_is_compared_too(tmp_path, image, sidecar):
    found, out = with_output(tmp_path, corrected_head(), image, sidecar)
    (one,) = corrected_only(found, out).usable
    check_only_the_thalamus_counts(one)


def test_a_correction_is_compared_with_what_was_corrected_though_the_output_is_new(tmp_path):
    found, out = with_output(tmp_path, corrected_head())
    corrected_only(found, out, keep=True)
    write_output(out, head(5), "of the adapted model")
    (one,) = corrected_only(found, out).usable
    check_only_the_thalamus_counts(one)


def test_a_structure_that_was_deleted_counts(tmp_path):
    changed = corrected_head()
    changed[changed == 12] = 0
    (one,) = corrected_only(*with_output(tmp_path, changed)).usable
    check_only_the_thalamus_counts(one)
    assert "Left putamen" in counted(one)
    assert one.notes[-1].endswith("Of these, deleted altogether: Left putamen.")


def test_a_correction_that_only_deletes_cannot_be_judged(tmp_path):
    changed = head(0)
    changed[changed == 12] = 0
    found, out = with_output(tmp_path, changed)
    with pytest.raises(DataError, match=r"delete structures and change no other \(the first"):
        corrected_only(found, out)
    save_nifti(tmp_path / "labels/sub-01/anat/sub-01_space-T1w_seg-aseg_dseg.nii.gz", head(1))
    both = corrected_only(collected(tmp_path / "bids", tmp_path / "labels"), out).usable
    assert counted(both[0]) == {"Left putamen"}
    assert len(counted(both[1])) == 10


def test_unchanged_output_teaches_nothing(tmp_path):
    found, out = with_output(tmp_path, head(0))
    with pytest.raises(DataError, match="no label image can be used; sub-00_T1w: .*unchanged"):
        corrected_only(found, out)


def test_a_correction_of_an_output_that_is_gone_is_refused_and_the_others_go_on(tmp_path):
    with_output(tmp_path, corrected_head())
    bids, derivative, out = (tmp_path / name for name in ("bids", "labels", "out"))
    save_nifti(derivative / "sub-01/anat/sub-01_space-T1w_seg-aseg_dseg.nii.gz", head(1))
    write_output(out, head(5), "of the adapted model")
    found = corrected_only(collected(bids, derivative), out)
    assert [one.name for one in found.usable] == ["sub-01_T1w"]
    (one,) = found.refused
    assert one.name == "sub-00_T1w"
    assert one.what == (
        f"sub-00_space-T1w_seg-aseg_dseg.nii.gz is a correction of an output of this program that "
        f"is not in {out} any more, so what was corrected is unknown"
    )
    assert one.hint == (
        "correct the present output, or put the original and its JSON back there; if every "
        "structure was checked by hand, remove the JSON of the correction"
    )
    (derivative / f"{OUTPUT}.json").unlink()
    both = corrected_only(collected(bids, derivative), out).usable
    assert [len(counted(one)) for one in both] == [10, 10]


def test_a_correction_on_another_grid_is_refused(tmp_path):
    found, out = with_output(tmp_path, head(0))
    save_nifti(out / "sub-00/anat/sub-00_space-T1w_seg-aseg_dseg.nii.gz", head(0)[:-3])
    with pytest.raises(DataError, match=r"corrected labels have the shape \(40, 40, 40\)"):
        corrected_only(found, out)


def test_a_few_voxels_are_no_correction():
    before = np.zeros(100, np.uint8)
    after = before.copy()
    after[:4] = 3
    assert not len(changed_channels(before, after))
    after[:5] = 3
    assert changed_channels(before, after).tolist() == [3]


# --- recipes ------------------------------------------------------------------------------------


def test_every_preset_can_be_read_and_says_what_it_is_for():
    assert len(presets()) >= 10
    for name in presets():
        how = load_adaptation(name)
        assert how.name == name and how.summary


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("summary = 'x'\nscoop = 1", r"unknown keys \['scoop'\]"),
        ("summary = 'x'\nscope = 'most'", "unknown scope 'most'"),
        ("summary = 'x'\noptimiser = 'sg'", "unknown optimiser 'sg'.*adamw, adam, sgd, muon"),
        ("summary = 'x'\nrehearsal = 1.0", "shares rehearsal 1"),
        ("summary = 'x'\nrehearsal = 'a'", "rehearsal is 'a' .*write a number"),
        (
            "summary = 'x'\nlearning_rate = 0",
            "learning_rate is 0 .*write a number from 1e-15",
        ),
        ("summary = 'x'\nmax_steps = 0", "max_steps is 0 .*write a whole number from 1"),
        ("summary = 'x'\nrank = true", "rank is True .*write a whole number"),
        ("summary = 'x'\nshares = 0.5", "shares is 0.5 .*write a list of numbers"),
        ("summary = 'x'\nshares = [0.0]", "are not above 0 and up to 1"),
        ("rank = 4", "keys do not fit"),
        ("rank = ", "the recipe is not TOML"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path, text, sentence):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_adaptation(str(path))


def test_a_recipe_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("summary = 'x'\n")
    assert load_adaptation("~/mine.toml").name == "mine"


def test_a_recipe_that_is_nowhere_is_said():
    with pytest.raises(NoInputError, match=r"no recipe 'x' – --fine-tune – use auto, adapters"):
        load_adaptation("x")
    assert Adaptation("a", "b").scope == "all"
