"""Mappings between protocols: every refusal, and what the shipped ones say."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.labels.mapping import LEFT_OUT, LabelMapping, load_mapping
from tlseg_bids.labels.protocol import COLUMNS, LabelProtocol

DATA = Path(os.environ.get("TLSEG_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def protocol(name: str) -> LabelProtocol:
    rows = [
        (0, "Background", "BG", "#000000", "none", 0, "background", 0),
        (1, "Left thing", "L", "#ff0000", "left", 2, "other", 0),
        (2, "Right thing", "R", "#ff0000", "right", 1, "other", 0),
        (3, "Middle", "M", "#00ff00", "none", 3, "other", 0),
    ]
    return LabelProtocol(name, pd.DataFrame(rows, columns=list(COLUMNS)))


def mapping(*rows: tuple[str, str]) -> LabelMapping:
    table = pd.DataFrame([(*row, "") for row in rows], columns=["source", "target", "note"])
    return LabelMapping(protocol("here"), protocol("there"), table)


GOOD = (("0", "0"), ("1", "1"), ("2", "2"), ("3", "n/a"))


def test_labels_go_where_the_table_says() -> None:
    it = mapping(*GOOD)
    found = it.apply(np.array([[0, 1], [2, 3], [77, -5]]))
    np.testing.assert_array_equal(found, [[0, 1], [2, LEFT_OUT], [LEFT_OUT, LEFT_OUT]])
    assert found.dtype == np.int16
    assert it.left_out == (3,)
    assert it.unreached == (3,)
    assert it.merged == {}
    assert it.describe() == ("Left out: Middle.", "Never reached: Middle.")


def test_probabilities_fold_like_labels() -> None:
    it = load_mapping("aseg_to_infant")
    matrix = it.channel_matrix()
    labels = it.source.indices
    folded = it.target.indices[matrix.argmax(axis=0)]
    np.testing.assert_array_equal(folded, it.apply(labels))
    np.testing.assert_array_equal(matrix.sum(axis=0), np.ones(len(labels)))
    out = load_mapping("braincolor_to_aseg")
    kept = out.apply(out.source.indices) != LEFT_OUT
    np.testing.assert_array_equal(out.channel_matrix().sum(axis=0), kept)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:3], r"labels \[3\] of 'here' have no row – .* – a mapping is total"),
        ((*GOOD, ("3", "3")), r"sources \[3\] have two rows"),
        ((*GOOD[:3], ("3", "8")), r"labels \[8\] are not in protocol 'there'"),
        ((*GOOD, ("9", "3")), r"labels \[9\] are not in protocol 'here'"),
        ((("0", "3"), *GOOD[1:]), "background does not lead to background"),
        ((("0", "0"), ("1", "2"), ("2", "1"), ("3", "3")), "1 leads to 2, .* not on its side"),
        ((("0", "0"), ("1", "1"), ("2", "n/a"), ("3", "3")), "1 leads to 1, .* its mirror"),
    ],
)
def test_broken_tables_are_refused(rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mapping(*rows)


def test_missing_columns_are_named() -> None:
    table = pd.DataFrame({"source": ["0"]})
    with pytest.raises(DataError, match=r"columns \['target', 'note'\] are missing"):
        LabelMapping(protocol("here"), protocol("there"), table)


def test_unknown_mapping() -> None:
    with pytest.raises(UsageError, match="no label mapping 'a_to_b' – known are aseg_to_infant, "):
        load_mapping("a_to_b")


def test_an_intensity_image_is_refused() -> None:
    with pytest.raises(DataError, match="labels run from 0 to 5000000 – give a label image"):
        mapping(*GOOD).apply(np.array([0, 5_000_000]))


def test_infant_labels_say_what_they_hold() -> None:
    text = " ".join(load_mapping("aseg_to_infant").describe())
    assert "Left cerebellum holds Left cerebellum white matter, Left cerebellum cortex." in text
    assert "Background holds Background, Cerebrospinal fluid." in text
    assert "Never reached: Cerebellar vermis." in text


def test_braincolor_keeps_the_fourteen_structures() -> None:
    it = load_mapping("braincolor_to_aseg")
    deep = {int(it.source.indices[c]) for c in it.source.channels(subcortical14=1)}
    there = {int(it.target.indices[c]) for c in it.target.channels(subcortical14=1)}
    assert len(deep) == 14
    assert {it.pairs[label] for label in deep} == there
    assert "Right cerebral cortex holds 5" in " ".join(it.describe())


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans at {DATA}")
@pytest.mark.parametrize(
    ("pattern", "mapping_name", "of_source"),
    [
        ("malc/derivatives/manual/sub-100[01]/anat/*_dseg.nii.gz", "braincolor_to_aseg", True),
        ("infant/derivatives/jlf/sub-inf0[12]/anat/*_dseg.nii.gz", "aseg_to_infant", False),
    ],
)
def test_left_is_left_in_real_label_images(pattern, mapping_name, of_source) -> None:
    """Every left structure lies at smaller x than its right partner, and no label is unknown."""
    it = load_mapping(mapping_name)
    files = sorted(DATA.glob(pattern))
    assert files
    for file in files:
        image = nib.load(file)
        labels = np.asarray(image.dataobj)
        known = it.source.indices if of_source else it.target.indices
        assert np.isin(labels, known).all()
        labels = it.apply(labels) if of_source else labels
        for left, right in it.target.pairs():
            x = [
                nib.affines.apply_affine(image.affine, np.argwhere(labels == label))[:, 0].mean()
                for label in (left, right)
            ]
            assert x[0] < x[1]
