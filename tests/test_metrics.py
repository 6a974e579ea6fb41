"""Agreement of label maps, checked against brute force and by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from phantom import PROTOCOL, Phantom, grid_over, rotation

from tlseg_bids.cli.evaluate import main
from tlseg_bids.errors import ScanError, UsageError
from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.metrics import (
    agreement,
    compare,
    dice,
    summary,
    surface_distances,
    surface_mm,
    volume_similarity,
    weighted_dice,
)
from tlseg_bids.report.agreement import write_agreement_page
from tlseg_bids.volume import Grid, Volume

LEFT, RIGHT = (int(i) for i in PROTOCOL.pairs()[0])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = rotation(20, -10, 30) @ np.diag([1.0, -1.5, 2.5])
OBLIQUE[:3, 3] = [100, -20, 7]


def box(shape, low, high) -> np.ndarray:
    out = np.zeros(shape, bool)
    out[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return out


def brute_surface(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    points = []
    for index in np.argwhere(mask):
        for axis, step in product(range(3), (1, -1)):
            other = index.copy()
            other[axis] += step
            if (other < 0).any() or (other >= mask.shape).any() or not mask[tuple(other)]:
                points.append(affine[:3, :3] @ index + affine[:3, 3])
                break
    return np.array(points)


def brute_distances(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    all_ = np.linalg.norm(one[:, None] - other[None], axis=2)
    there, back = all_.min(axis=1), all_.min(axis=0)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return hd95, np.concatenate([there, back]).mean()


@pytest.mark.parametrize("seed", range(5))
def test_surface_distances_agree_with_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.uniform(size=(2, 7, 6, 5)) < 0.5
    surfaces = [surface_mm(mask, OBLIQUE) for mask in (one, other)]
    for mask, surface in zip((one, other), surfaces, strict=True):
        expected = brute_surface(mask, OBLIQUE)
        np.testing.assert_allclose(np.sort(surface, axis=0), np.sort(expected, axis=0))
    np.testing.assert_allclose(surface_distances(*surfaces), brute_distances(*surfaces))


def test_distances_are_millimetres_of_an_oblique_anisotropic_grid() -> None:
    """A box moved by one voxel along K, 2.5 mm."""
    one, other = box((9, 9, 9), (2, 2, 2), (6, 6, 3)), box((9, 9, 9), (2, 2, 3), (6, 6, 4))
    hd95, assd = surface_distances(surface_mm(one, OBLIQUE), surface_mm(other, OBLIQUE))
    assert hd95 == pytest.approx(2.5)
    assert assd == pytest.approx(2.5)


def test_dice_and_volume_similarity_by_hand() -> None:
    one, other = box((4, 4, 4), (0, 0, 0), (2, 4, 4)), box((4, 4, 4), (1, 0, 0), (4, 4, 4))
    assert dice(one, other) == pytest.approx(2 * 16 / (32 + 48))
    assert volume_similarity(32, 48) == pytest.approx(1 - 16 / 80)
    assert np.isnan(dice(one & False, other & False))
    assert np.isnan(volume_similarity(0, 0))
    assert np.isnan(surface_distances(np.zeros((0, 3)), np.ones((2, 3)))).all()


def _pair() -> tuple[Volume, Volume]:
    true, found = np.zeros((2, 10, 10, 10), np.int16)
    true[1:5, 1:9, 1:9] = found[1:5, 1:9, 1:9] = LEFT
    true[6:8, 4:6, 4:6] = RIGHT
    found[7:9, 4:6, 4:6] = RIGHT
    grid = Grid((10, 10, 10), OBLIQUE)
    return Volume(found, grid), Volume(true, grid)


def test_compare_scores_each_structure() -> None:
    found, true = _pair()
    table = compare(found, true, PROTOCOL).set_index("index")
    assert len(table) == len(PROTOCOL) - 1
    assert table.loc[LEFT, "dice"] == 1
    assert table.loc[LEFT, "hd95_mm"] == 0
    assert table.loc[RIGHT, "dice"] == pytest.approx(0.5)
    assert table.loc[RIGHT, "assd_mm"] == pytest.approx(0.5)
    assert table.loc[RIGHT, "reference_mm3"] == pytest.approx(8 * 3.75)
    others = table.drop([LEFT, RIGHT])
    assert others["dice"].isna().all()


def test_weighted_dice_gives_small_structures_their_say() -> None:
    table = compare(*_pair(), PROTOCOL, distances=False)
    assert weighted_dice(table) == pytest.approx((1 / 256 + 0.5 / 8) / (1 / 256 + 1 / 8))
    assert summary(table)["dice"] == pytest.approx(0.75)
    assert np.isnan(weighted_dice(table.assign(reference_mm3=0)))


def test_a_structure_in_one_map_only_scores_zero() -> None:
    found, true = _pair()
    found.data[found.data == RIGHT] = 0
    row = compare(found, true, PROTOCOL).set_index("index").loc[RIGHT]
    assert row["dice"] == row["volume_similarity"] == 0
    assert np.isnan(row["hd95_mm"])


def test_other_grids_are_refused() -> None:
    found, true = _pair()
    other = "the reference lies on another grid than the prediction: "
    with pytest.raises(ScanError) as caught:
        compare(found, Volume(true.data[:5], Grid((5, 10, 10), OBLIQUE)), PROTOCOL)
    assert f"{other}(5, 10, 10) voxels, the prediction has (10, 10, 10)" in str(caught.value)
    assert "compare label images of the same scan" in str(caught.value)
    moved = OBLIQUE.copy()
    moved[0, 3] += 1
    with pytest.raises(ScanError) as caught:
        compare(found, Volume(true.data, Grid(true.grid.shape, moved)), PROTOCOL)
    assert f"{other}a corner lies 1.0 mm from that of the prediction" in str(caught.value)


def test_a_header_that_was_rounded_is_the_same_grid() -> None:
    found, true = _pair()
    rounded = OBLIQUE.copy()
    rounded[:3, 3] += 0.05
    table = compare(found, Volume(true.data, Grid(true.grid.shape, rounded)), PROTOCOL)
    pd.testing.assert_frame_equal(table, compare(found, true, PROTOCOL))


def test_a_reference_in_another_protocol_is_refused() -> None:
    found, true = _pair()
    with pytest.raises(UsageError, match="100% of the labelled voxels .* --mapping"):
        compare(found, Volume(np.where(true.data > 0, 199, 0), true.grid), PROTOCOL)
    with pytest.raises(UsageError, match="the prediction holds label 199"):
        compare(Volume(np.where(true.data > 0, 199, 0), true.grid), true, PROTOCOL)
    with pytest.raises(UsageError, match="neither starts nor ends at protocol 'infant'"):
        compare(found, true, load_protocol("infant"), load_mapping("braincolor_to_aseg"))


def test_single_strange_voxels_are_left_out_and_named() -> None:
    found, true = _pair()
    true.data[1, 1, 1] = 999
    table = compare(found, true, PROTOCOL)
    assert table.attrs["unknown"] == (999,)
    assert table.attrs["left_out_mm3"] == pytest.approx(3.75)
    assert table.set_index("index").loc[LEFT, "dice"] == 1


def test_the_infant_vermis_is_left_out_and_the_cerebellum_folded() -> None:
    infant = load_protocol("infant")

    def number(protocol, name: str) -> int:
        return int(protocol.table.set_index("name").loc[name, "index"])

    true, found = np.zeros((2, 10, 10, 10), np.int16)
    true[1:9, 1:9, 1:9] = number(infant, "Left cerebellum")
    true[1:3, 1:9, 1:9] = number(infant, "Cerebellar vermis")
    found[1:9, 1:9, 1:5] = number(PROTOCOL, "Left cerebellum cortex")
    found[1:9, 1:9, 5:9] = number(PROTOCOL, "Left cerebellum white matter")
    grid = Grid((10, 10, 10), np.eye(4))
    table = compare(Volume(found, grid), Volume(true, grid), PROTOCOL,
                    load_mapping("aseg_to_infant"))  # fmt: skip
    assert "Cerebellar vermis" not in set(table["name"])
    assert table.set_index("name").loc["Left cerebellum", "dice"] == 1
    assert table.attrs["left_out_mm3"] == 128


def test_braincolor_is_scored_as_aseg() -> None:
    brain = load_protocol("braincolor")

    def number(protocol, name: str) -> int:
        return int(protocol.table.set_index("name").loc[name, "index"])

    true, found = np.zeros((2, 6, 6, 6), np.int16)
    true[0], true[1] = number(brain, "Right precuneus"), number(brain, "Right cuneus")
    true[2] = number(brain, "Cerebellar vermal lobules I-V")
    true[3] = number(brain, "Left thalamus")
    found[0:2] = number(PROTOCOL, "Right cerebral cortex")
    found[2] = number(PROTOCOL, "Left cerebellum cortex")
    found[3] = number(PROTOCOL, "Left thalamus")
    grid = Grid((6, 6, 6), np.eye(4))
    table = compare(Volume(found, grid), Volume(true, grid), PROTOCOL,
                    load_mapping("braincolor_to_aseg")).set_index("name")  # fmt: skip
    assert table.loc["Right cerebral cortex", "dice"] == 1
    assert table.loc["Left thalamus", "dice"] == 1
    assert "Cerebrospinal fluid" not in table.index
    assert np.isnan(table.loc["Left cerebellum cortex", "dice"])


def _write(path: Path, data: np.ndarray, affine=OBLIQUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.int16), affine), path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    phantom = Phantom(0.4)
    grid = grid_over(phantom, (4, 4, 4))
    labels = phantom.labels(grid).data
    for subject in ("01", "02"):
        anat = f"sub-{subject}/anat/sub-{subject}"
        _write(tmp_path / f"pred/{anat}_space-T1w_seg-aseg_dseg.nii.gz", labels, grid.affine)
        _write(tmp_path / f"true/{anat}_seg-aseg_dseg.nii.gz", labels, grid.affine)
    return tmp_path / "pred", tmp_path / "true"


def test_evaluate_matches_folders_by_entities(folders, capsys: pytest.CaptureFixture) -> None:
    assert main([*map(str, folders), "--no-distances"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0][:2] == ["predicted", "reference"]
    assert {row[0] for row in rows[1:]} == {
        f"sub-{s}_space-T1w_seg-aseg_dseg.nii.gz" for s in ("01", "02")
    }
    assert all(row[0][:6] == row[1][:6] for row in rows[1:])
    assert "dice: 1.0000 ± 0.0000 (n = 2)" in err


def test_evaluate_writes_a_table(folders, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main([*map(str, folders), "-o", str(tmp_path / "scores.tsv")]) == 0
    text = (tmp_path / "scores.tsv").read_text()
    assert "n/a" in text
    assert text.count("\n") == 1 + 2 * (len(PROTOCOL) - 1)
    assert "weighted_dice: 1.0000" in capsys.readouterr().out


def test_evaluate_maps_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two parcels that are taken for each other are one cortex; what has no counterpart is not
    scored, and labels without a meaning are still named."""
    coarse = np.diag([6.0, 6.0, 6.0, 1.0])
    true = np.zeros((8, 8, 9), np.int16)
    true[0], true[1], true[2], true[3, 0, 0] = 103, 105, 23, 5000
    found = true.copy()
    found[0], found[1], found[2, :2], found[3] = 105, 103, 15, 0
    pair = [str(_write(tmp_path / f"sub-1_seg-braincolor_desc-{name}_dseg.nii.gz", labels, coarse))
            for name, labels in (("found", found), ("true", true))]  # fmt: skip
    words = [*pair, "--no-distances", "-o", str(tmp_path / "a.tsv")]
    assert main([*words, "--mapping", "braincolor_to_aseg", "--map-both"]) == 0
    table = pd.read_csv(tmp_path / "a.tsv", sep="\t").set_index("index")
    assert table["dice"].dropna().to_dict() == {3: 1.0, 58: 1.0}  # cortex; accumbens where asked
    assert "labels 5000 have no meaning, left out" in capsys.readouterr().err


def test_the_page_of_agreement_tells_no_home_folder(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*map(str, folders), "--no-distances", "-o", str(tmp_path / "scores.tsv")]) == 0
    page = (tmp_path / "scores.html").read_text(encoding="utf-8")
    assert "tlseg-evaluate" in page and "~/pred" in page
    assert str(tmp_path) not in page


def test_a_reader_that_has_enough_of_the_scores_is_no_error(folders) -> None:
    """As in ``tlseg-evaluate … | head``."""
    code = "import sys; from tlseg_bids.cli.evaluate import main; sys.exit(main(sys.argv[1:]))"
    asked = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, folders), "--no-distances"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    asked.stdout.close()
    said = asked.stderr.read()
    assert asked.wait() == 141
    assert "Traceback" not in said


def test_evaluate_goes_on_after_a_bad_pair(folders, capsys: pytest.CaptureFixture) -> None:
    bad = folders[0] / "sub-01/anat/sub-01_space-T1w_seg-aseg_dseg.nii.gz"
    bad.write_bytes(bad.read_bytes()[:200])
    assert main([*map(str, folders), "--no-distances"]) == 1
    out, err = capsys.readouterr()
    assert "cannot be read" in err
    assert "sub-02_space-T1w" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere", "{true}"], 66, "no such file or folder – /nowhere"),
        (["{pred}", "{true}", "--mapping", "x_to_y"], 64, "no label mapping 'x_to_y'"),
        (["{pred}", "{true}", "--protocol", "x"], 65, "no label protocol 'x'"),
        (["{pred}", "{true}/sub-01", "-o", "/nowhere/a.tsv"], 73, "the table cannot be written"),
        (
            ["{pred}", "{true}", "-o", "/nowhere/a.html"],
            64,
            "the table would be lost: the page of agreement has the same name – -o "
            "/nowhere/a.html – write -o a.tsv",
        ),
        (
            ["{pred}/sub-01", "{true}/sub-02"],
            18,
            "no prediction matches any reference, of which there is 1",
        ),
        (["{pred}"], 64, "required"),
        (
            ["{pred}", "{true}", "--map-both"],
            64,
            "both label images are in 'aseg', and no mapping is given – --map-both",
        ),
        (
            ["{pred}", "{true}", "--map-both", "--mapping", "braincolor_to_aseg"],
            64,
            "'braincolor_to_aseg' starts elsewhere – --map-both – give --mapping aseg_to_",
        ),
    ],
)
def test_evaluate_says_what_is_wrong(folders, capsys, arguments, code, message) -> None:
    names = dict(zip(("pred", "true"), folders, strict=True))
    assert main([a.format(**names) for a in arguments]) == code
    assert message in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_told_before_anything_is_scored(
    folders, tmp_path, capsys
) -> None:
    for place in (tmp_path, tmp_path / "gone" / "a.tsv"):
        assert main([*map(str, folders), "-o", str(place)]) == 73
        said = capsys.readouterr().err
        assert "the table cannot be written (" in said and f"{place} – choose another" in said
        assert said.count("\n") == 1, "nothing was scored"


def test_a_mistake_leaves_no_empty_table(folders, tmp_path) -> None:
    kept = tmp_path / "kept.tsv"
    kept.write_text("mine")
    for place in (kept, tmp_path / "new.tsv"):
        assert main([*map(str, folders), "--protocol", "x", "-o", str(place)]) == 65
    assert [file.read_text() for file in tmp_path.glob("*.tsv")] == ["mine"]


def test_evaluate_refuses_two_references(folders, capsys: pytest.CaptureFixture) -> None:
    grid = np.zeros((4, 4, 4))
    _write(folders[1] / "sub-01/anat/sub-01_seg-other_dseg.nii.gz", grid)
    assert main(list(map(str, folders))) == 64
    assert "2 references fit equally well" in capsys.readouterr().err


def test_evaluate_compares_two_outputs_of_the_same_scans(tmp_path: Path, capsys) -> None:
    """A T1w and a T2w of one name are told apart by space-, as the program writes it."""
    coarse = np.diag([6.0, 6.0, 6.0, 1.0])
    for out in ("a", "b"):
        for space, label in (("T1w", LEFT), ("T2w", RIGHT)):
            name = f"sub-01_space-{space}_seg-aseg_dseg.nii.gz"
            _write(tmp_path / out / "sub-01/anat" / name, np.full((8, 8, 9), label), coarse)
    words = [str(tmp_path / out) for out in ("a", "b")]
    assert main([*words, "--no-distances", "-o", str(tmp_path / "s.tsv")]) == 0
    assert "dice: 1.0000 ± 0.0000 (n = 2)" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "s.tsv", sep="\t")
    assert (table["predicted"] == table["reference"]).all()


def test_evaluate_needs_a_protocol(folders, capsys: pytest.CaptureFixture) -> None:
    file = next(folders[0].rglob("*.nii.gz"))
    plain = file.rename(file.with_name("labels.nii.gz"))
    reference = next(folders[1].rglob("*.nii.gz"))
    assert main([str(plain), str(reference)]) == 64
    assert "the name has no seg- entity" in capsys.readouterr().err
    assert main([str(plain), str(reference), "--protocol", "aseg", "--no-distances"]) == 0


def scored(predicted, reference, index=10, name="Left thalamus") -> pd.DataFrame:
    """Rows as `compare` gives them, of one structure in several scans."""
    return pd.DataFrame({
        "predicted": [f"sub-{n}" for n in range(len(predicted))], "index": index, "name": name,
        "dice": 0.8, "predicted_mm3": predicted, "reference_mm3": reference,
    })  # fmt: skip


def test_limits_of_agreement_are_those_of_bland_and_altman() -> None:
    predicted, reference = np.array([110.0, 205, 330, 0]), np.array([100.0, 200, 300, 0])
    row = agreement(scored(predicted, reference)).iloc[0]
    gap = np.array([10.0, 5, 30])
    assert row["scans"] == 3  # the fourth has the structure on neither side
    assert row["bias_mm3"] == pytest.approx(15)
    assert row["high_mm3"] - row["bias_mm3"] == pytest.approx(1.96 * gap.std(ddof=1))
    assert row["bias_mm3"] - row["low_mm3"] == pytest.approx(1.96 * gap.std(ddof=1))
    assert row["volume_r"] == pytest.approx(np.corrcoef(predicted[:3], reference[:3])[0, 1])
    assert row["bias_percent"] == pytest.approx(100 * 15 / 207.5)


def test_one_scan_has_a_bias_and_no_limits() -> None:
    row = agreement(scored([10.0], [8.0])).iloc[0]
    assert row["bias_mm3"] == 2
    assert np.isnan([row["low_mm3"], row["high_mm3"], row["volume_r"]]).all()
    assert agreement(scored([0.0], [0.0])).empty


def test_equal_volumes_have_no_correlation() -> None:
    """The standard deviation of three times 100.1 is 1e-14, not 0."""
    same, other = [100.1] * 3, [90.0, 100, 120]
    for predicted, reference in ((same, same), (same, other), (other, same)):
        assert np.isnan(agreement(scored(predicted, reference)).iloc[0]["volume_r"])


def test_an_agreement_without_structures_keeps_its_columns() -> None:
    nothing, some = agreement(scored([0.0], [0.0])), agreement(scored([10.0], [8.0]))
    assert nothing.empty
    assert list(nothing.columns) == list(some.columns)


def test_the_page_holds_every_structure_and_loads_nothing(tmp_path) -> None:
    two = [scored([110.0, 205, 330], [100.0, 200, 300]), scored([5.0], [5.0], 11, "<b>odd</b>")]
    page = write_agreement_page(tmp_path / "a.html", pd.concat(two), "tlseg-evaluate <x>")
    text = page.read_text()
    assert text.count("<circle") == 4
    assert "Left thalamus: bias 15 mm³ over 3 scans" in text
    assert "<b>odd</b>" not in text
    assert "tlseg-evaluate &lt;x&gt;" in text
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
