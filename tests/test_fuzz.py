"""Files that the fuzzer found, each with its sentence; and a few hundred inputs of the fuzzer."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests import toy
from tests.cards import write_model
from tests.datasets import config, make_dataset, table
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.tables import read_json
from tlseg_bids.cli.options import parser, read_config_file
from tlseg_bids.cli.values import filters
from tlseg_bids.errors import DataError, ScanError, TlsegError, UsageError
from tlseg_bids.executors.cluster import read_queue_file
from tlseg_bids.group.parameters import FORMAT, read_parameters
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.report.derivatives import all_failures, protocol_of
from tlseg_bids.report.display import load_display
from tlseg_bids.segment.model import load_model
from tlseg_bids.segment.place import locate
from tlseg_bids.train.recipe import load_recipe
from tlseg_bids.volume import load_scan
from tlseg_bids.zoo.assemble import assemble
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
DEEP = "a = " + "[" * 3000 + "]" * 3000
LONG = "9" * 5000


@pytest.mark.slow
def test_mutated_files_give_a_result_or_a_sentence():
    words = (sys.executable, ROOT / "benchmarks" / "fuzz.py", "150", "--seed", "7")
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "| all 1" in said.stdout


def test_an_offset_of_infinity(tmp_path):
    path = toy.write_scan(tmp_path / "x.nii")
    data = bytearray(path.read_bytes())
    data[108:112] = struct.pack("<f", np.inf)
    path.write_bytes(data)
    with pytest.raises(ScanError, match=r"cannot be read as NIfTI \(cannot convert .* – .* again"):
        load_scan(path)


def test_an_offset_beyond_every_disk(tmp_path):
    path = toy.write_scan(tmp_path / "x.nii")
    data = bytearray(path.read_bytes())
    data[108:112] = struct.pack("<f", 1e30)
    path.write_bytes(data)
    with pytest.raises(ScanError, match=r"the voxels cannot be read \(Python int too large"):
        load_scan(path)


def test_a_number_of_thousands_of_digits(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(f'{{"EchoTime": {LONG}}}')
    assert read_json(path)[1].startswith("is not valid JSON (Exceeds the limit")
    with pytest.raises(DataError, match="the filter file is not JSON .*Exceeds the limit"):
        filters(str(path))


@pytest.mark.parametrize("text", [DEEP, f"jobs = {LONG}", "a = '\udcff'"])
@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (lambda p: read_config_file(p, parser()), "the configuration file is not TOML"),
        (read_card, "the model card is not TOML"),
        (read_queue_file, "the cluster file is not TOML"),
        (load_recipe, "not valid TOML"),
    ],
)
def test_toml_that_is_too_deep_too_long_or_not_utf8(tmp_path, read, sentence, text):
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TlsegError, match=sentence):
        read(path)


def test_json_filters_that_are_too_deep(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{"a":' * 20_000)
    with pytest.raises(DataError, match=r"the filter file is not JSON \(maximum recursion"):
        filters(str(path))


@pytest.mark.parametrize("value", [{"a": 1}, 2**70, [["x"]]])
def test_a_filter_that_the_index_cannot_be_asked_for(tmp_path, value):
    asked = config(make_dataset(tmp_path / "raw"), filters={"t1w": {"session": value}})
    with pytest.raises(UsageError, match=r"the filter 't1w' asks for .* – ask for text, a number"):
        discover(asked)


def test_a_cluster_that_is_a_list(tmp_path):
    path = tmp_path / "q.toml"
    path.write_text('cluster = ["slurm"]\n')
    with pytest.raises(DataError, match=r"cluster = \['slurm'\] is not known"):
        read_queue_file(path)


def test_an_infinite_number_of_scans_in_saved_parameters(tmp_path):
    path = tmp_path / "p.json"
    head = {"Method": "ratio", "Measure": "icv", "MeanHeadSize": 1.0, "Slopes": [1.0],
            "Scans": float("inf")}  # fmt: skip
    strata = {"T1w": {"Structures": ["a"], "HeadSize": head}}
    content = {"Format": FORMAT, "FormatVersion": 1, "Volume": "hard", "Strata": strata}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="the file of parameters is damaged .*infinity"):
        read_parameters(path)


def test_entries_of_a_plan_that_are_no_objects(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    good = {"Scan": "sub-01/x", "Reason": "bad", "Hint": "mend"}
    (logs / "plan_20250101T000000Z-a.json").write_text(json.dumps({"Skipped": ["x", None, good]}))
    assert list(all_failures(tmp_path)) == ["sub-01/x"]


@pytest.mark.parametrize("index", ["n/a", "-3", "40000", LONG])
def test_a_site_protocol_with_an_index_that_is_none(tmp_path, index):
    (tmp_path / "seg-own_dseg.tsv").write_text(table("index|name", "0|none", f"{index}|x"))
    with pytest.raises(DataError, match="is not a whole number from 0 to 32767 – .*seg-own"):
        protocol_of("own", tmp_path)


@pytest.mark.parametrize(
    ("shape", "size"), [((9, 9, 9), 1e9), ((9, 9, 9), 1e-3), ((9, 9, 9, 2), 1), ((9, 9), 1)]
)
def test_a_label_map_with_an_impossible_geometry_is_not_drawn(tmp_path, shape, size):
    path = tmp_path / "x.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([size, 1, 1, 1])), path)
    with pytest.raises(
        DataError, match=r"(no label map of a head|not readable).* – .* – run the scan again"
    ):
        load_display(path, None, load_protocol("aseg"))


SETTINGS = [
    ("spacing_mm = 6.0", "spacing_mm = 0", "0 is not a number from 0.1 to 50 – .*spacing_mm"),
    ("rounds = 1", "rounds = 1.5", "1.5 is not a whole number from 0 to 100 – .*rounds"),
    ("[-72.0, 72.0], [-72.0, 72.0], [-72.0, 72.0]", "[-72.0, 72.0]", "is not a box – .*box_mm"),
    ("size = 24", 'size = "x"', "'x' is not a whole number from 1 to 1024 – .*locator, size"),
    ("window = 24", "window = true", "True is not a whole number from 1 to 1024 – .*window"),
    ("window = 24", "window = [24, 0, 24]", "0 is not a whole number from 1 to 1024 – .*window"),
    ("rounds = 1", "placed_by = 3", "3 is not the name of a model – .*placed_by"),
    ('name = "sliding"', 'name = "sliding"\nmirror = 3', "3 is not a truth value – .*mirror"),
    ('name = "sliding"', 'name = "sliding"\nhalves = 3', "3 is not a truth value – .*halves"),
    (
        'name = "sliding"',
        'name = "sliding"\nmirror = true\nhalves = true',
        "shows a half in the mirror without mirror = true – .*strategy",
    ),
    (
        'name = "sliding"',
        'name = "whole"\nhalves = true',
        "needs name = .sliding. and a window.* – .*strategy",
    ),
    ('name = "sliding"', 'name = "sliding"\ntrim = 8', "8 is not a trim – .*trim"),
    (
        'name = "sliding"',
        'name = "sliding"\ntrim = [0, -1, 0]',
        "-1 is not a whole number from 0 to 1024 – .*trim",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small model; the path of its card."""
    return toy.write_toy_model(tmp_path_factory.mktemp("models")).path


@pytest.mark.parametrize(("old", "new", "sentence"), SETTINGS)
def test_settings_of_a_card_that_nothing_could_be_labelled_with(model, old, new, sentence):
    text = model.read_text().replace("    [\n        -72.0,\n        72.0,\n    ],\n" * 3, "BOX")
    text = text.replace("BOX", "[-72.0, 72.0], [-72.0, 72.0], [-72.0, 72.0]")
    assert old in text
    path = model.with_name("changed.toml")
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=sentence):
        read_card(path)


def test_a_locator_that_is_no_table(model):
    text = model.read_text()
    start, end = text.index("[preprocess.locator]"), text.index("[weights]")
    path = model.with_name("changed.toml")
    path.write_text(text[:start].rstrip() + "\nlocator = 3\n\n" + text[end:])
    with pytest.raises(DataError, match="3 is not a table – .*locator"):
        read_card(path)


def test_a_card_that_cannot_find_the_brain(model):
    path = model.with_name("changed.toml")
    path.write_text(model.read_text().replace("looks = 1\n", "").replace("rounds = 1\n", ""))
    card = read_card(path)
    with pytest.raises(DataError, match=r"missing: rounds, locator.looks – .*preprocess"):
        locate(load_model(card, load_weights(card)))


def test_an_unknown_strategy(model):
    path = model.with_name("changed.toml")
    path.write_text(model.read_text().replace('"sliding"', '"jumping"'))
    card = read_card(path)
    with pytest.raises(DataError, match="no strategy 'jumping' – .* – known are sliding, whole"):
        load_model(card, load_weights(card))


def test_an_argument_that_the_strategy_does_not_take(model):
    path = model.with_name("changed.toml")
    path.write_text(model.read_text().replace("overlap = ", "overlop = "))
    card = read_card(path)
    message = r"'sliding' takes no overlop – .*\[strategy\] – known are name, .*, window, overlap$"
    with pytest.raises(DataError, match=message):
        load_model(card, load_weights(card))


def test_a_network_without_features(tmp_path):
    card = write_model(tmp_path, "small")
    path = card.path.with_name("changed.toml")
    text = card.path.read_text().replace("features = [\n    2,\n    4,\n]", "features = []")
    path.write_text(text)
    assert "features = []" in text
    card = read_card(path)
    with pytest.raises(DataError, match="the weights do not fit the network 'segmenter'"):
        assemble(card, load_weights(card))
