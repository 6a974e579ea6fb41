"""Model cards, their ranking, and weights that are checked before they are opened."""

from __future__ import annotations

import errno
import http.server
import json
import math
import os
import pickle
import signal
import threading
import time as clock
import tomllib
from dataclasses import fields, replace
from datetime import UTC, date, datetime, time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tomli_w
import torch
from cards import evidence, small_card, write_model

from tlseg_bids.bids.scan import Age, Scan
from tlseg_bids.cli import zoo as command
from tlseg_bids.errors import CannotCreateError, DataError, NoInputError, OutputError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.zoo import weights as weights_module
from tlseg_bids.zoo.card import Domain, Memory, Weights
from tlseg_bids.zoo.card_file import check_card, digest, read_card, to_toml, write_card
from tlseg_bids.zoo.evidence import counts
from tlseg_bids.zoo.licence import all_of
from tlseg_bids.zoo.registry import BUILTIN, find_card, load_cards, mean_score, most_robust, ranked
from tlseg_bids.zoo.settings import check_complete
from tlseg_bids.zoo.weights import cached_file, describe, fetch, load_weights, unavailable, verify


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TLSEG_CACHE", str(folder))
    return folder


def scan(suffix="T1w", **changes):
    return Scan(Path("/data/sub-01/anat/sub-01_T1w.nii.gz"), Path("/data"), {"sub": "01"}, suffix,
                **changes)  # fmt: skip


# --- the file ---------------------------------------------------------------------------------


def test_a_card_survives_writing_and_reading(tmp_path):
    card = small_card(
        domain=Domain(("T2w",), (0.0, 1.5), False, True, (0.5, 1.2)),
        evidence=(evidence(), evidence(dataset="infant", metric="hd95", mean=1.25)),
        known_failures=("lesions",),
        parent="any",
        training={"data": [{"name": "labelmaps", "n": 20}], "seed": 1},
        memory=Memory(1.5, 40.0, 3.0),
        heads=("aseg", "braincolor"),
        channels=("T1w", "T2w"),
        weights=Weights("a" * 64, 12, "MIT AND CC-BY-4.0", "x.safetensors", "https://x.org/a"),
    )
    path = tmp_path / "models" / "small.toml"
    write_card(card, path)
    again = read_card(path)
    assert again == replace(card, path=path)
    assert digest(again) == digest(card)
    assert [file.name for file in path.parent.iterdir()] == ["small.toml"]


def test_a_card_of_one_head_and_one_channel_says_nothing_of_them(tmp_path):
    card = write_model(tmp_path)
    assert (card.heads, card.channels) == (("aseg",), ())
    assert not {"heads", "channels"} & set(tomllib.loads(card.path.read_text()))


def test_numpy_numbers_are_written_as_numbers():
    card = small_card(strategy={"name": "sliding", "overlap": np.float32(0.5), "n": np.int64(3)})
    assert tomllib.loads(to_toml(card))["strategy"] == {"name": "sliding", "overlap": 0.5, "n": 3}


def test_the_digest_follows_the_meaning_and_not_the_layout(tmp_path):
    card = write_model(tmp_path)
    card.path.write_text("# a comment\n" + card.path.read_text())
    assert digest(read_card(card.path)) == digest(card)
    assert digest(replace(card, version="1.1")) != digest(card)


def broken_file(tmp_path, change):
    table = tomllib.loads(to_toml(small_card(evidence=(evidence(),))))
    change(table)
    path = tmp_path / "broken.toml"
    path.write_text(tomli_w.dumps(table))
    return path


BROKEN = [
    (lambda t: t.pop("summary"), ["missing: summary", "add it"]),
    (lambda t: t.update(colour="red"), ["unknown: colour", "known are name, version"]),
    (lambda t: t.update(version=1), ["1 is not text", "version", "write text"]),
    (lambda t: t["domain"].update(ages=[0, 1]), ["unknown: ages", "[domain]", "age_years"]),
    (lambda t: t["domain"].update(age_years=["0", "1"]), ["'0' is not a number", "age_years"]),
    (lambda t: t["domain"].update(age_years=[3, 1]), ["[3.0, 1.0] is not a range"]),
    (lambda t: t["domain"].update(voxel_mm=[1.0]), ["[1.0] is not a range", "voxel_mm"]),
    (lambda t: t["domain"].update(suffixes=[1]), ["1 is not text", "suffixes"]),
    (lambda t: t["domain"].update(skull_stripped=1), ["1 is not true or false", "skull_stripped"]),
    (lambda t: t["domain"].update(agents=["Gad"]), ["'Gad' cannot begin the name", "lower-case"]),
    (
        lambda t: t["domain"].update(agents=["gad"], contrast_agent=False),
        ["the agents gad are named and contrast_agent is false", "leave one of the two out"],
    ),
    (lambda t: t["evidence"][0].update(age_years=[9]), ["[9] is not a range", "entry 1, age_y"]),
    (lambda t: t["evidence"][0].update(suffixes=[1]), ["1 is not text", "entry 1, suffixes"]),
    (lambda t: t["evidence"][0].update(mean=81.5), ["a Dice of 81.5", "entry 1, mean", "per cent"]),
    (lambda t: t["evidence"][0].update(parent_mean=80), ["a Dice of 80", "1, parent_mean"]),
    (lambda t: t["evidence"][0].update(n=0), ["measured on 0 scans", "entry 1, n", "1 or more"]),
    (lambda t: t["evidence"][0].update(sd=-0.1), ["a spread of -0.1", "entry 1, sd", "deviation"]),
    (lambda t: t["evidence"][0].update(scanner="x"), ["unknown: scanner", "entry 1"]),
    (lambda t: t["weights"].pop("licence"), ["missing: licence", "[weights]"]),
    (lambda t: t["weights"].update(licence=" "), ["licence is empty", "SPDX"]),
    (lambda t: t["weights"].update(bytes=True), ["True is not an integer", "bytes"]),
    (lambda t: t["weights"].update(bytes=0), ["a size of 0 bytes", "write the size"]),
    (lambda t: t["weights"].update(sha256="ABC"), ["'ABC' is not a SHA-256", "64 lower-case"]),
    (lambda t: t["weights"].pop("file"), ["neither file nor url", "say where"]),
    (lambda t: t["weights"].update(file="x.pt"), ["'x.pt' is not a relative path of a"]),
    (lambda t: t["weights"].update(file="/x.safetensors"), ["'/x.safetensors' is not a relative"]),
    (lambda t: t["weights"].update(url="ftp://x"), ["'ftp://x' cannot be fetched", "use https"]),
    (lambda t: t["weights"].update(url="http://[::1"), ["'http://[::1' cannot be fetched", "url"]),
    (lambda t: t["weights"].update(url="https:///x"), ["'https:///x' cannot be fetched", "url"]),
    (lambda t: t.update(memory={"host": 1}), ["unknown: host", "[memory]", "host_gib"]),
    (lambda t: t.update(memory={"host_gib": -1.0}), ["-1 is no amount", "host_gib", "0.1 or more"]),
    (lambda t: t.update(memory={"device_gib": math.nan}), ["nan is no amount", "device_gib"]),
    (lambda t: t.update(memory={"host_gib": math.inf}), ["inf is no amount", "[memory], host_gib"]),
    (lambda t: t.update(training={"data": "malc"}), ["'malc' is not a list", "[training], data"]),
    (lambda t: t.update(training={"data": ["malc"]}), ["'malc' is not a table", "[training], da"]),
    (lambda t: t.update(status="good"), ["unknown status 'good'", "experimental, verified"]),
    (lambda t: t.update(status="verified", evidence=[]), ["'verified' and there is no evidence"]),
    (lambda t: t["evidence"][0].pop("n"), ["missing: n", "evidence entry 1"]),
    (lambda t: t["evidence"][0].update(mean="high"), ["'high' is not a number", "entry 1, mean"]),
    (lambda t: t.update(citations=[]), ["no citation is given", "name the papers"]),
    (lambda t: t.update(name="../x"), ["'../x' cannot name a model", "use letters"]),
    (lambda t: t.update(protocol="none"), ["no label protocol 'none'", "known are aseg"]),
    (lambda t: t.update(networks={}), ["no network has the role 'segmenter'", "[networks.seg"]),
    (lambda t: t["networks"]["segmenter"].pop("network"), ["the network has no name", "segmenter"]),
    (lambda t: t["strategy"].pop("name"), ["the strategy has no name", "[strategy]"]),
    (lambda t: t["strategy"].update(fuse="median"),
     ["'median' is no way to join tiles", "fuse", "write mean or vote"]),
    (lambda t: t["strategy"].update(axes=[0, 3]), ["3 is not a whole number from 0 to 2", "axes"]),
    (lambda t: t["strategy"].update(axes=[]), ["'[]' is not a list of numbers", "axes"]),
    (lambda t: t["strategy"].update(merged=1), ["'1' is not a list of numbers", "merged"]),
    (lambda t: t["strategy"].update(axes=[0, 1], weights=[1.0]),
     ["[1.0] cannot weigh 2 views", "weights", "for each view"]),
    (lambda t: t["strategy"].update(weights=[0, 0, 0]), ["[0, 0, 0] cannot weigh 3 views"]),
    (lambda t: t["strategy"].update(weights=[-1, 0, 2]), ["-1 is not a number from 0", "weights"]),
    (lambda t: t["strategy"].update(name="views", window=[8, 8, 8]),
     ["[8, 8, 8] is not a number of slices", "window", "write one whole number"]),
    (lambda t: t["strategy"].update(begins="x"), ["'x' does not say where tiles begin", "begins"]),
    (lambda t: t["strategy"].update(begins=[[0], [0], [0.5]]), ["0.5 is not a whole number"]),
    (lambda t: t.update(heads=[1]), ["1 is not text", "heads"]),
    (lambda t: t.update(heads=["aseg", "none"]), ["no label protocol 'none'", "known are aseg"]),
    (lambda t: t.update(heads=["infant"]), ["first head is 'infant'", "heads – name the protocol"]),
    (lambda t: t.update(heads=["aseg", "aseg"]), ["a head occurs twice: aseg, aseg", "each pro"]),
    (lambda t: t.update(channels=["T1w"]), ["the image channels are T1w", "channels", "two or"]),
    (lambda t: t.update(channels=["T1w", "T1w"]), ["channels are T1w, T1w", "different suffixes"]),
    (
        lambda t: t.update(channels=["T1w", "FLAIR"]),
        ["the domain holds T1w, T2w and the channels are T1w, FLAIR", "only suffixes that"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "parts"), BROKEN, ids=[parts[0] for _, parts in BROKEN])
def test_a_broken_card_is_refused_with_file_and_key(tmp_path, change, parts):
    path = broken_file(tmp_path, change)
    with pytest.raises(DataError) as caught:
        read_card(path)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert caught.value.hint
    assert str(path) in message or "protocol" in message


def test_dates_are_kept(tmp_path):
    when = {"day": date(2024, 5, 1), "begun": datetime(2024, 5, 1, 8, tzinfo=UTC), "hour": time(8)}
    write_card(small_card(path=None, training=when), tmp_path / "small.toml")
    card = read_card(tmp_path / "small.toml")
    assert card.training == when
    assert len(digest(card)) == 64


def test_a_measurement_that_could_not_be_made_does_not_break_a_card(tmp_path):
    card = small_card(path=None, evidence=(evidence(mean=math.nan, sd=math.nan),))
    write_card(card, tmp_path / "small.toml")
    assert not counts(read_card(tmp_path / "small.toml").evidence[0])


def test_what_is_no_toml_and_what_is_not_there(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("name = ")
    with pytest.raises(DataError, match=r"is not TOML \(.*x\.toml – see docs/cards\.md"):
        read_card(path)
    with pytest.raises(NoInputError, match=r"no such model card – .*y\.toml – correct the name"):
        read_card(tmp_path / "y.toml")


def test_what_toml_cannot_say_is_refused():
    with pytest.raises(DataError, match=r"None cannot be written.*training\.seed – use text"):
        to_toml(small_card(training={"seed": None}))


def test_a_card_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError, match=r"cannot be written \(.*card\.toml – choose a fol"):
        write_card(small_card(), tmp_path / "file" / "card.toml")


# --- the domain -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "changes", "reason"),
    [
        (Domain(), {}, None),
        (Domain(("T2w",)), {}, "meant for T2w, this is a T1w"),
        (Domain(age_years=(0, 2)), {"age": Age(days=30)}, None),
        (Domain(age_years=(0, 2)), {"age": Age(days=10957.5)}, "this scan was taken at 30.0 years"),
        (Domain(age_years=(2, 9)), {"age": Age(days=30.4375)}, "taken at 1.0 months"),
        (Domain(age_years=(0, 2)), {}, "the age at this scan is not known"),
        (Domain(age_years=(0, 0.1)), {"age": Age(pma_weeks=38)}, None),
        (Domain(age_years=(0, 0.1)), {"age": Age(pma_weeks=60)}, "taken at 4.6 months"),
        (Domain(contrast_agent=False), {}, None),
        (Domain(contrast_agent=False), {"contrast_agent": "gadolinium"}, "is after gadolinium"),
        (Domain(contrast_agent=True), {}, "meant for scans after contrast agent"),
        (Domain(skull_stripped=True), {"skull_stripped": True}, None),
        (Domain(skull_stripped=True), {"skull_stripped": False}, "this one shows the whole head"),
        (Domain(skull_stripped=False), {"skull_stripped": True}, "whole heads, this one is skull"),
        (Domain(skull_stripped=True), {}, "the sidecar has no SkullStripped"),
        (Domain(voxel_mm=(0.5, 1.5)), {}, "of 0.5 to 1.5 mm, these are 1 × 1 × 3"),
        (Domain(agents=("gad", "gd")), {"contrast_agent": "Gadobutrol"}, None),
        (Domain(agents=("gad", "gd")), {}, None),
        (Domain(agents=("gad",)), {"contrast_agent": "xenon"}, "gad…, this one is after xenon"),
        (Domain(contrast_agent=True, agents=("gad",)), {}, "meant for scans after contrast agent"),
    ],
)  # fmt: skip
def test_a_card_refuses_what_it_is_not_meant_for(domain, changes, reason):
    found = small_card(domain=domain).refuses(scan(**changes), (1.0, 1.0, 3.0))
    assert found is None if reason is None else reason in found


def test_every_reason_is_told():
    card = small_card(domain=Domain(("T2w",), (0, 2)))
    assert card.refuses(scan()).count("meant for") == 2


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [("MIT", True), ("CC-BY-4.0 AND Apache-2.0", True), ("CC BY 4.0", True),
     ("CC-BY-NC-3.0 AND MIT", False), ("CC BY-NC 4.0", False), ("LicenseRef-x", False),
     ("mit and cc by 4.0", True), ("Apache-2.0 AND BSD-3-Clause", True), ("CC0", True),
     ("MIT OR CC-BY-NC-4.0", True), ("CC-BY-NC-SA-4.0 OR (MIT AND CC BY-NC 3.0)", False),
     ("MIT OR CC-BY-NC-4.0 AND GPL-3.0", True), ("(MIT OR GPL-3.0) AND CC-BY-NC-4.0", False),
     ("CC BY-NC-ND 4.0", False), ("CC-BY-ND-4.0", False), ("Apache-2.0 WITH LLVM-exception", True),
     ("MIT AND", False), ("(MIT", False), ("MIT)", False), ("AND MIT", False), ("", False),
     ("MIT Apache-2.0", False)],
)  # fmt: skip
def test_permissive_licences(licence, permissive):
    assert Weights("", 1, licence).permissive is permissive


@pytest.mark.parametrize(
    ("licences", "parts"),
    [(["MIT", "MIT AND CC0"], ["MIT", "CC0"]),
     (["MIT OR GPL-3.0", "CC0"], ["(MIT OR GPL-3.0)", "CC0"]),
     (["MIT or GPL-3.0 AND CC0"], ["(MIT or GPL-3.0 AND CC0)"]),
     (["(MIT OR GPL-3.0) AND CC0 ", "MIT AND (CC0 OR (X AND Y))"],
      ["(MIT OR GPL-3.0)", "CC0", "MIT", "(CC0 OR (X AND Y))"]),
     (["for research and teaching", "ORCA AND SANDIA"],
      ["for research and teaching", "ORCA", "SANDIA"])],
)  # fmt: skip
def test_licences_that_hold_together(licences, parts):
    assert all_of(licences) == tuple(parts)
    assert all_of([" AND ".join(parts)]) == tuple(parts)


def test_what_cannot_be_read_is_not_permissive_together_either():
    for licence in ("MIT AND", "MIT OR", "(MIT", "MIT)", "OR MIT"):
        assert not Weights("", 1, " AND ".join(all_of([licence, "MIT"]))).permissive, licence


def test_memory_is_a_straight_line_in_the_voxels():
    assert Memory(1.0, 32.0).host(2**25) == pytest.approx(2.0)


# --- the order --------------------------------------------------------------------------------


def test_without_a_scan_ranking_prefers_verified_then_narrow_then_adapted_then_measured():
    wide = small_card("wide", status="verified", evidence=(evidence(mean=0.9),))
    young = small_card("young", status="verified", domain=Domain(age_years=(0, 2)),
                       evidence=(evidence(mean=0.5),))  # fmt: skip
    child = replace(wide, name="child", parent="wide", evidence=(evidence(mean=0.6),))
    bare = replace(wide, name="a-bare", evidence=(evidence(metric="hd95"),))
    trial = small_card("trial", domain=Domain(("T1w",), (0, 2)), evidence=(evidence(mean=1.0),))
    order = [card.name for card in ranked([trial, bare, wide, child, young])]
    assert order == ["young", "child", "wide", "a-bare", "trial"]
    assert most_robust([trial, bare, wide, child, young]).name == "wide"


def test_ranking_does_not_depend_on_the_order_given_nor_on_circular_parents():
    cards = [small_card("a", parent="b"), small_card("b", parent="a"), small_card("c")]
    assert [c.name for c in ranked(cards)] == [c.name for c in ranked(cards[::-1])]


def test_mean_score_weighs_by_n_and_reads_dice_only():
    card = small_card(
        evidence=(
            evidence(n=1, mean=0.5),
            evidence(n=3, mean=0.9),
            evidence(metric="hd95", mean=9.0),
            evidence(mean=float("nan")),
        )
    )
    assert mean_score(card) == pytest.approx(0.8)
    assert mean_score(small_card()) == 0


def test_cards_are_found_in_the_package_in_folders_and_in_the_output(tmp_path):
    write_model(tmp_path / "builtin", "one")
    write_model(tmp_path / "more", "two")
    nested = write_model(tmp_path / "out" / "models" / "three", "three")
    nested.path.rename(nested.path.with_name("card.toml"))
    (tmp_path / "out" / "models" / "three" / "recipe.toml").write_text("steps = 3\n")
    for hidden in ("._two.toml", ".trash/card.toml"):
        (tmp_path / "more" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "more" / hidden).write_bytes(b"\x00\x05\x16\x07")
    cards = load_cards([tmp_path / "more"], tmp_path / "out", builtin=tmp_path / "builtin")
    assert [card.name for card in cards] == ["one", "two", "three"]
    assert load_cards((), tmp_path / "no-output", builtin=tmp_path / "builtin") == cards[:1]


def test_the_same_card_twice_is_one_and_two_of_one_name_are_refused(tmp_path):
    first = write_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "small.toml").write_text(first.path.read_text())
    assert len(load_cards([tmp_path / "a", tmp_path / "b"], builtin=tmp_path / "none")) == 1
    write_model(tmp_path / "b", summary="Another one.")
    with pytest.raises(DataError, match=r"two different models are called 'small' – .* – rename"):
        load_cards([tmp_path / "a", tmp_path / "b"], builtin=tmp_path / "none")


def test_a_card_that_cannot_be_read(tmp_path, caplog):
    path = write_model(tmp_path / "models").path
    path.unlink()
    path.mkdir()
    with pytest.raises(NoInputError, match=r"cannot be read \(Is a directory\) – .*small\.toml"):
        load_cards([tmp_path / "models"])
    assert "small" not in {card.name for card in load_cards(out_dir=tmp_path)}
    assert "is left out: the model card cannot be read" in caplog.text


def test_folders_without_models(tmp_path):
    with pytest.raises(NoInputError, match=r"there is no such folder – --models – give a folder"):
        load_cards([tmp_path / "absent"])
    with pytest.raises(NoInputError, match=r"it holds no model card"):
        load_cards([tmp_path])


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UsageError, match=r"no model is called 'x' – --model – known are: a, b;"):
        find_card([small_card("b"), small_card("a")], "x")


# --- weights ----------------------------------------------------------------------------------


def test_weights_are_loaded(tmp_path):
    card = write_model(tmp_path)
    tensors = load_weights(card)
    assert torch.equal(tensors["template"], torch.zeros(len(load_protocol("aseg")), 3))
    assert tensors["segmenter.heads.0.weight"].shape == (len(load_protocol("aseg")), 2, 1, 1, 1)
    assert verify(card) == tmp_path / "small.safetensors"


def test_a_flipped_bit_is_refused_before_the_file_is_opened(tmp_path, monkeypatch):
    card = write_model(tmp_path)
    file = tmp_path / "small.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("safetensors.torch.load", lambda _: pytest.fail("it was opened"))
    for check in (load_weights, verify):
        with pytest.raises(DataError) as caught:
            check(card)
        assert f"the card says {card.weights.sha256}" in caught.value.what
        assert caught.value.where == str(file)
        assert "is not opened" in caught.value.hint


def test_truncated_weights_are_refused(tmp_path):
    card = write_model(tmp_path)
    file = tmp_path / "small.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"have {card.weights.bytes - 3} bytes, the card says"):
        load_weights(card)


def test_a_pickle_in_disguise_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    file = tmp_path / "small.safetensors"
    file.write_bytes(pickle.dumps(Trap()))
    card = small_card(path=tmp_path / "small.toml")
    card = replace(card, weights=describe(file, "MIT", card.path))
    with pytest.raises(DataError, match=r"'small' are not safetensors .* – no other format"):
        load_weights(card)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("read", [load_weights, verify])
def test_weights_that_cannot_be_read(tmp_path, monkeypatch, read):
    card = write_model(tmp_path)
    refused = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(Path, "read_bytes" if read is load_weights else "open", refused)
    message = r"weights cannot be read \(Permission denied\) – .*small\.safetensors – give the user"
    with pytest.raises(NoInputError, match=message):
        read(card)


def test_missing_weights_say_what_to_do(tmp_path):
    card = write_model(tmp_path)
    (tmp_path / "small.safetensors").unlink()
    assert unavailable(card) == "its weights file small.safetensors is missing"
    with pytest.raises(
        NoInputError, match=r"small.safetensors is missing – .*tlseg-zoo fetch small"
    ):
        load_weights(card)
    with pytest.raises(NoInputError, match=r"are not on this machine – .* – run `tlseg-zoo fetch"):
        verify(card)
    with pytest.raises(
        NoInputError, match=r"has no address to fetch its weights from – .*put them"
    ):
        fetch(card)


def remote(tmp_path, url=None, **changes):
    """A card whose weights lie at a URL alone."""
    card = write_model(tmp_path / "server")
    address = url or (tmp_path / "server" / "small.safetensors").as_uri()
    return replace(card, weights=replace(card.weights, file=None, url=address, **changes))


def leftovers(cache):
    return [file.name for file in cache.rglob("*") if file.is_file()]


def test_weights_are_fetched_once_and_then_cached(tmp_path, cache):
    card = remote(tmp_path)
    assert "--offline" in unavailable(card, offline=True)
    assert unavailable(card) is None
    with pytest.raises(NoInputError, match="not fetched yet, and --offline was given"):
        load_weights(card, offline=True)
    assert "template" in load_weights(card)
    assert leftovers(cache) == [f"{card.weights.sha256}.safetensors"]
    (tmp_path / "server" / "small.safetensors").unlink()
    assert "template" in load_weights(card, offline=True)
    assert fetch(card) == cached_file(card)


def test_a_damaged_cache_is_fetched_again(tmp_path):
    card = remote(tmp_path)
    fetch(card).write_bytes(b"rubbish")
    with pytest.raises(DataError, match="have 7 bytes"):
        verify(card)
    assert fetch(card) == verify(card)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine that serves tmp_path/server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "server"))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}"
        it.shutdown()


def test_weights_are_fetched_over_http(tmp_path, server):
    card = remote(tmp_path, f"{server}/small.safetensors")
    assert fetch(card).read_bytes() == (tmp_path / "server" / "small.safetensors").read_bytes()


def test_what_the_server_does_not_have(tmp_path, server, cache):
    with pytest.raises(NoInputError, match=r"cannot be fetched \(.*absent – check the network"):
        fetch(remote(tmp_path, f"{server}/absent"))
    assert leftovers(cache) == []


@pytest.mark.parametrize("change", ["truncate", "flip", "grow"])
def test_a_tampered_download_leaves_nothing_behind(tmp_path, cache, change):
    card = remote(tmp_path)
    file = tmp_path / "server" / "small.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"truncate": content[:-1], "flip": content[:-1] + b"!", "grow": content * 9}[change]
    )
    with pytest.raises(DataError, match="the card says"):
        fetch(card)
    assert leftovers(cache) == []


def test_what_a_killed_fetch_left_goes_with_the_next_one_a_day_later(tmp_path, cache):
    (cache / "weights").mkdir(parents=True)
    old, new = (cache / "weights" / f"{name}.part" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    day_before = clock.time() - 25 * 3600
    os.utime(old, (day_before, day_before))
    target = fetch(remote(tmp_path))
    assert {*(cache / "weights").iterdir()} == {target, new}


def test_an_endless_download_is_cut_off(tmp_path, monkeypatch):
    class Endless:
        read_bytes = 0

        def read(self, size):
            self.read_bytes += size
            return b"x" * size

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    source = Endless()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: source)
    with pytest.raises(DataError, match="bytes, the card says"):
        fetch(remote(tmp_path))
    assert source.read_bytes == weights_module.CHUNK_BYTES


def test_a_connection_that_breaks(tmp_path, monkeypatch, cache):
    class Broken:
        def read(self, _):
            raise ConnectionResetError("reset by peer")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Broken())
    with pytest.raises(
        NoInputError, match=r"broke after 0 of \d+ bytes \(reset by peer\) – .*again"
    ):
        fetch(remote(tmp_path))
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_made(tmp_path, cache):
    cache.write_text("a file in the way")
    with pytest.raises(CannotCreateError, match=r"cache folder cannot be written.*TLSEG_CACHE"):
        fetch(remote(tmp_path))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_a_shared_cache_is_up_to_the_umask(tmp_path, umask, mode):
    card = remote(tmp_path)
    before = os.umask(umask)
    try:
        assert fetch(card).stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_a_damaged_cache_that_cannot_be_written(tmp_path, monkeypatch):
    card = remote(tmp_path)
    fetch(card).write_bytes(b"rubbish")
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=refused))
    with pytest.raises(CannotCreateError, match=r"written \(Permission denied\) – .*TLSEG_CACHE"):
        fetch(card)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_told(tmp_path, monkeypatch):
    card = remote(tmp_path)
    cached_file(card).parent.mkdir(parents=True)
    monkeypatch.setattr(weights_module, "_new_file", lambda _: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left.*make room"):
        fetch(card)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    write_model(folder, "alpha", domain=Domain(("T1w",), (0, 2), False, True))
    write_model(folder, "beta", licence="CC-BY-NC-4.0")
    return folder


def test_list_shows_every_model(models, capsys):
    assert command.main(["list", "--models", str(models)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "version", "status"]
    row = next(line for line in lines if line.startswith("alpha"))
    assert "T1w, 0–2 y, skull-stripped, without contrast agent" in row
    assert row.split()[-2:] == ["here", "nothing"]
    assert any("CC-BY-NC-4.0" in line for line in lines)


def test_list_shows_a_line_for_each_row_of_evidence(tmp_path, capsys):
    rows = (evidence(suffixes=["T1w"], structures="all"), evidence(dataset="infant", mean=0.7))
    write_model(
        tmp_path, "gamma", domain=Domain(("T1w", "T2w"), None, None, False, (0.5, 2)),
        evidence=rows, heads=("aseg", "braincolor"), channels=("T1w", "T2w"),
    )  # fmt: skip
    assert command.main(["list", "--models", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("gamma"))
    assert "T1w+T2w, whole head, 0.5–2 mm" in lines[at]
    assert "aseg+braincolor" in lines[at]
    assert lines[at].endswith("T1w malc: dice (all) 0.800 ± 0.050, n = 15")
    assert lines[at + 1].strip() == "infant: dice 0.700 ± 0.050, n = 15"
    column = lines[0].index("measured")
    assert lines[at].index("T1w malc") == lines[at + 1].index("infant") == column


def test_list_as_json_holds_everything(models, capsys):
    assert command.main(["list", "--json", "--models", str(models)]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) >= {"alpha", "beta", "any"}
    assert found["alpha"]["domain"]["age_years"] == [0, 2]
    assert found["alpha"]["domain"]["skull_stripped"] is True
    assert (found["alpha"]["permissive"], found["beta"]["permissive"]) == (True, False)
    assert found["alpha"]["weights"] == "here"
    assert found["alpha"]["heads"] == ["aseg"]
    assert found["any"]["evidence"][0]["structures"] == "14 sub-cortical"


def test_show_prints_the_card(models, capsys):
    assert command.main(["show", "alpha", "--models", str(models)]) == 0
    out = capsys.readouterr().out
    assert f"# weights  {models / 'alpha.safetensors'}" in out
    assert tomllib.loads(out)["name"] == "alpha"


def test_verify_names_the_damaged_model_and_goes_on(models, capsys):
    assert command.main(["verify", "alpha", "--models", str(models)]) == 0
    (models / "alpha.safetensors").write_bytes(b"")
    assert command.main(["verify", "--models", str(models)]) == DataError.exit_code
    out, err = capsys.readouterr()
    assert "tlseg-zoo: alpha: the weights have 0 bytes" in err
    assert "beta 1.0: whole" in out


def test_verify_builds_the_networks(models, capsys):
    path = models / "alpha.toml"
    wrong = {"segmenter": {"network": "unet", "features": [2, 8]}}
    write_card(replace(read_card(path), networks=wrong), path)
    assert command.main(["verify", "alpha", "--models", str(models)]) == DataError.exit_code
    assert "the weights do not fit the network 'segmenter'" in capsys.readouterr().err


def test_fetch_downloads_and_a_second_fetch_needs_no_network(tmp_path, capsys):
    card = remote(tmp_path)
    folder = tmp_path / "models"
    write_card(card, folder / "small.toml")
    assert command.main(["list", "--models", str(folder)]) == 0
    assert "to be fetched" in capsys.readouterr().out
    assert command.main(["fetch", "small", "--models", str(folder)]) == 0
    assert str(cached_file(card)) in capsys.readouterr().out
    (tmp_path / "server" / "small.safetensors").unlink()
    assert command.main(["fetch", "small", "--models", str(folder)]) == 0


def test_fetch_of_a_model_that_is_here_only_checks_it(models, capsys, cache):
    assert command.main(["fetch", "alpha", "--models", str(models)]) == 0
    assert "alpha 1.0: whole" in capsys.readouterr().out
    assert not cache.exists()


def test_wrong_usage_of_the_command(models, capsys):
    assert command.main(["fetch", "gamma", "--models", str(models)]) == UsageError.exit_code
    assert "no model is called 'gamma' – NAME – known are:" in capsys.readouterr().err
    assert command.main([]) == UsageError.exit_code
    assert "see tlseg-zoo --help" in capsys.readouterr().err
    assert command.main(["--help"]) == 0


def test_every_card_of_the_package_is_in_order():
    for card in load_cards():
        check_card(card)
        verify(card)


def test_the_example_in_the_documentation_is_a_card(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "cards.md").read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    sentence = "64 lower-case hexadecimal digits"
    assert example.count(sentence) == 1
    path = tmp_path / "any.toml"
    path.write_text(example.replace(sentence, "a" * 64), encoding="utf-8")
    card = read_card(path)
    assert card.memory == Memory()
    check_complete({k: v for k, v in card.preprocess.items() if k != "placed_by"}, path)
    keys = set(tomllib.loads(to_toml(card)))
    assert keys == {field.name for field in fields(card)} - {"path", "training", "tables"}


@pytest.mark.parametrize("name", ["any", "infant", "adult-t1w"])
def test_a_card_says_what_its_description_says(name):
    """So that a model that is exported again does not lose what was set in its card by hand."""
    card, said = (
        tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
        for folder in (BUILTIN, BUILTIN.parents[1] / "train" / "models")
    )
    for table in ("version", "status", "summary", "domain", "strategy", "memory", "evidence"):
        assert card[table] == said[table], table


def test_a_fetch_that_is_told_to_end_leaves_nothing_behind(tmp_path, cache, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    card = replace(remote(tmp_path), path=None)
    write_card(card, tmp_path / "here" / "small.toml")

    def told(*_: object) -> None:
        assert len(list((cache / "weights").iterdir())) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)

    monkeypatch.setattr(weights_module, "_copy", told)
    assert command.main(["fetch", "small", "--models", str(tmp_path / "here")]) == 130
    assert capsys.readouterr().err.endswith(": stopped\n")
    assert list((cache / "weights").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_command_says_so(models, capsys, monkeypatch):
    monkeypatch.setattr("tlseg_bids.zoo.registry.load_cards", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", ["/usr/bin/tlseg-zoo"])
    assert command.main(["fetch", "small", "--models", str(models)]) == 130
    assert capsys.readouterr().err == "tlseg-zoo: stopped\n"
