"""Sentences of refusals that take a defect, a race or a broken machine to be met."""

from __future__ import annotations

import argparse
import contextlib
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nibabel.spatialimages import HeaderDataError

from tlseg_bids import volume
from tlseg_bids.adapt import inspect as adapt_inspect
from tlseg_bids.adapt import site
from tlseg_bids.adapt.choose import choose_recipe
from tlseg_bids.adapt.reading import Reading, _partial
from tlseg_bids.bids import age, layout
from tlseg_bids.bids.discover import _Reader
from tlseg_bids.bids.lock import hold
from tlseg_bids.bids.names import BrokenName
from tlseg_bids.cli import run, values
from tlseg_bids.config import Config
from tlseg_bids.errors import (
    CannotCreateError,
    DataError,
    NoInputError,
    ScanError,
    UsageError,
    amount,
)
from tlseg_bids.group import parameters
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol
from tlseg_bids.train import loop
from tlseg_bids.train.scans import load_dataset
from tlseg_bids.zoo import bundle
from tlseg_bids.zoo.licence import is_permissive

ASEG = load_protocol("aseg")


# Adaptation --------------------------------------------------------------------------------------


def test_a_recipe_that_keeps_the_head_refuses_labels_of_their_own() -> None:
    reading = SimpleNamespace(new_head=True, target=SimpleNamespace(name="lab"))
    with pytest.raises(
        UsageError, match=r"'lab', and recipe 'new-only' keeps the model's – --fine"
    ):
        choose_recipe("new-only", [], reading)


def test_labels_without_a_training_class(monkeypatch) -> None:
    monkeypatch.setattr(adapt_inspect, "load_classes", lambda _: SimpleNamespace(index=[0, 2]))
    with pytest.raises(DataError, match=r"labels \[3, .* have no training class – protocol 'aseg'"):
        adapt_inspect.sample_of(SimpleNamespace(), SimpleNamespace(target=ASEG), np.zeros((1, 3)))


def test_labels_that_show_no_structure_of_the_model() -> None:
    pairs = {int(index): number for number, index in enumerate(ASEG.indices)}
    reading = Reading(ASEG, ASEG, pairs, np.arange(len(ASEG)))
    with pytest.raises(DataError, match="no structure of the model is labelled – --labels – label"):
        _partial(reading, {})


def fine_tuning(tmp_path: Path) -> Config:
    return Config(
        tmp_path, tmp_path / "out", "participant", base="any", labels_dir=tmp_path / "labels",
        site="lab",
    )  # fmt: skip


def test_no_scan_with_labels_is_left(tmp_path) -> None:
    matched = SimpleNamespace(pairs=[], refused=[SimpleNamespace(name="sub-01", what="it is torn")])
    with pytest.raises(
        DataError, match=r"no labelled scan can be used; sub-01: it is torn – --lab"
    ):
        site.base_jobs(fine_tuning(tmp_path), matched)


def test_a_model_of_two_images_cannot_be_adapted(tmp_path, monkeypatch) -> None:
    card = SimpleNamespace(name="two", channels=("T1w", "T2w"))
    plan = SimpleNamespace(jobs=[SimpleNamespace(card=card)], skips=())
    monkeypatch.setattr(site, "make_plan", lambda *_: plan)
    with pytest.raises(UsageError, match="model 'two' wants T1w and T2w of a person together"):
        site.base_jobs(fine_tuning(tmp_path), SimpleNamespace(pairs=[], refused=[]))


# Input -------------------------------------------------------------------------------------------


def test_an_age_beyond_all_numbers() -> None:
    with pytest.raises(UsageError, match="9' is not an age – --age – write years"):
        age.parse_age("9" * 400)


def test_a_name_that_ends_otherwise() -> None:
    reader = _Reader.__new__(_Reader)
    with pytest.raises(BrokenName, match=r"ends neither in \.nii\.gz nor in \.nii"):
        reader._check_place(Path("sub-01_T1w.mgz"), {"sub": "01"}, "T1w")


def test_what_the_index_cannot_do_is_not_hidden(tmp_path, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("a defect of the index")

    monkeypatch.setattr(layout, "BIDSLayout", fails)
    with pytest.raises(KeyError, match="a defect of the index"):
        layout._build(tmp_path, "01")


def test_a_lock_whose_file_cannot_be_read_is_closed(tmp_path, monkeypatch) -> None:
    closed = []
    plain = os.close

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fails)
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), plain(handle)))
    with (
        pytest.raises(OSError, match="Input/output error"),
        hold(tmp_path / "x.lock", "x is being processed"),
    ):
        pytest.fail("the lock must not be held")
    assert closed


def test_the_address_of_a_scheduler() -> None:
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"'ftp://x' is neither an address such as"
    ):
        values.dask("ftp://x")


def test_dask_needs_both_of_its_options(tmp_path) -> None:
    given = {"bids_dir": tmp_path, "out_dir": tmp_path, "level": "participant", "executor": "dask"}
    with pytest.raises(UsageError, match="--executor dask and --dask belong together"):
        run.make_config(given)


def damaged(error: Exception) -> SimpleNamespace:
    def fails(**_: object) -> None:
        raise error

    header = SimpleNamespace(get_sform=fails, get_qform=fails)
    return SimpleNamespace(header=header, get_fdata=fails, shape=(9, 9, 9))


def test_an_orientation_that_cannot_be_read() -> None:
    with pytest.raises(ScanError, match=r"orientation in the header is damaged \(torn\) – a\.nii"):
        volume._check_affine(damaged(HeaderDataError("torn")), Path("a.nii"))


def test_a_scan_that_memory_does_not_hold() -> None:
    with pytest.raises(ScanError, match=r"729 voxels do not fit into memory – a\.nii – free"):
        volume._read(damaged(MemoryError()), Path("a.nii"))


# Tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "row", "value", "said"),
    [
        ("group", None, None, r"columns \['group'\] are missing – label protocol 'p' – add them"),
        ("index", 2, 2, r"indices \[2\] occur twice – label protocol 'p' – give each"),
        ("index", 0, 1, "the first row is not background 0 – label protocol 'p' – put index 0"),
        (
            "mirror",
            1,
            42,
            r"left/right partners of \[2, .*\] do not point at each other – .*mirror",
        ),
    ],
)
def test_a_broken_label_protocol(column, row, value, said) -> None:
    table = ASEG.table.copy()
    if row is None:
        table = table.drop(columns=column)
    else:
        table.loc[row, column] = value
    with pytest.raises(DataError, match=said):
        LabelProtocol("p", table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"Method": "guess"}, "HeadSize is 'guess' by 'icv'"),
        ({"MeanHeadSize": -1}, r"MeanHeadSize is -1\.0"),
    ],
)
def test_saved_head_sizes_that_are_none(change, said) -> None:
    entry = {"Method": next(iter(parameters.FORMULAS)), "Measure": "icv", "Slopes": [0.5],
             "MeanHeadSize": 1.0}  # fmt: skip
    assert parameters._read_head(entry, 1).method == entry["Method"]
    with pytest.raises(ValueError, match=said):
        parameters._read_head({**entry, **change}, 1)


def test_a_dataset_without_labels(tmp_path) -> None:
    with pytest.raises(NoInputError, match=r"no \*_dseg\.nii\.gz found – .* – check --data, and"):
        load_dataset(tmp_path, "nothing", {})


# Training ----------------------------------------------------------------------------------------


def test_processes_that_find_different_checkpoints(tmp_path, monkeypatch) -> None:
    import torch

    @contextlib.contextmanager
    def two(_device):
        yield SimpleNamespace(device="cpu", first=True, gather=lambda _: torch.tensor([[1], [2]]))

    monkeypatch.setattr(loop, "joined", two)
    monkeypatch.setattr(loop, "prepare", lambda *_: None)
    monkeypatch.setattr(loop, "Training", lambda *_: SimpleNamespace(step=1))
    recipe = SimpleNamespace(name="r", steps=3, deterministic=False, seed=0)
    with pytest.raises(
        UsageError, match="find different checkpoints – .*r.pt – give --out a folder"
    ):
        loop.train(recipe, tmp_path, tmp_path, lambda *_: None)


# Models ------------------------------------------------------------------------------------------


@pytest.fixture
def exportable(tmp_path, monkeypatch) -> SimpleNamespace:
    card, weights = tmp_path / "card.toml", tmp_path / "w.safetensors"
    card.write_text("name = 'm'")
    weights.write_bytes(b"w")
    monkeypatch.setattr(bundle, "verify", lambda _: weights)
    return SimpleNamespace(
        name="m", path=card, own_tables={}, weights=SimpleNamespace(file=weights.name)
    )


def test_a_card_that_is_not_on_disk_is_not_exported(exportable, tmp_path) -> None:
    exportable.path = None
    with pytest.raises(NoInputError, match="the card is not on disk – m – write it first"):
        bundle.export_model(exportable, tmp_path)


def test_where_nothing_can_be_written(exportable, tmp_path) -> None:
    there = tmp_path / "file"
    there.write_text("no folder")
    with pytest.raises(CannotCreateError, match=r"cannot be exported \(.*\) – .* – choose another"):
        bundle.export_model(exportable, there / "below" / "m.zip")
    made = bundle.export_model(exportable, tmp_path)
    with pytest.raises(
        CannotCreateError, match=r"cannot be installed \(.*\) – .* – choose a folder"
    ):
        bundle.import_model(made, there / "below")


def test_a_zip_that_unpacks_to_too_much(tmp_path) -> None:
    entry = zipfile.ZipInfo(bundle.CARD)
    entry.file_size = 10**15
    with pytest.raises(
        DataError, match=r"would have 1000000000000000 bytes unpacked – .* – at most"
    ):
        bundle._check_entry(entry, tmp_path / "m.zip")


def test_a_zip_whose_stream_is_torn(tmp_path, monkeypatch) -> None:
    def fails(_file):
        raise zipfile.zlib.error("torn")

    monkeypatch.setattr(bundle.zipfile, "ZipFile", fails)
    with pytest.raises(DataError, match=r"the file is damaged \(torn\) – .*m\.zip"):
        bundle._unpack(tmp_path / "m.zip", tmp_path)


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 scans"), (1, "1 scan"), (12, "12 scans"), (1.0, "1 scan")]
)
def test_amounts_are_told_as_people_say_them(number, said) -> None:
    assert amount(number, "scan") == said
    assert amount(number, "scan is", "scans are") == f"{said} {'is' if number == 1 else 'are'}"


def test_a_licence_with_a_bracket_too_many_is_not_permissive() -> None:
    assert is_permissive("(MIT)")
    assert not is_permissive("(MIT (MIT)")
