"""A model adapted again under the same name: the better one stays, and whole at every moment."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests import test_adapt
from tests.cards import small_card, write_model
from tests.test_adapt import PROTOCOL, Told, answer, asked, head, recipe, save_nifti, write_site
from tlseg_bids.adapt import work
from tlseg_bids.adapt.earlier import against_earlier, comparable, find_rival, learned
from tlseg_bids.adapt.judge import Verdict
from tlseg_bids.adapt.site import fine_tune
from tlseg_bids.bids import atomic
from tlseg_bids.errors import OutputError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.segment.model import load_model
from tlseg_bids.zoo.bundle import export_model, import_model
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.proof import check_proof
from tlseg_bids.zoo.weights import load_weights

base, _clock = test_adapt.base, test_adapt._clock


def content(folder) -> dict[str, str]:
    """Hash of every file in a folder but those of an adaptation that was not kept."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and "not-kept" not in file.parts
    }


def add_label(derivative, number: int) -> None:
    name = f"sub-0{number}"
    path = derivative / name / "anat" / f"{name}_space-T1w_seg-aseg_dseg.nii.gz"
    save_nifti(path, head(number))


def test_an_earlier_model_stays_until_a_better_one_comes(tmp_path, base, monkeypatch, capsys):
    site = write_site(tmp_path, {f"sub-0{n}": head(n) for n in range(2)})
    what = asked(*site, base)
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    before = content(folder)
    capsys.readouterr()

    lame = replace(what, fine_tune=recipe(tmp_path, learning_rate=1e-12, max_steps=10))
    assert fine_tune(lame, answer, Told()) == 0
    assert content(folder) == before
    record = json.loads((folder / "not-kept" / "adaptation.json").read_text())
    sentence = "The earlier model 'lab' 1 stays as it was."
    assert record["Reason"].startswith("The base stays") and record["Reason"].endswith(sentence)
    assert record["Earlier"]["Stays"] and not record["Kept"]
    page = (folder / "not-kept" / "adaptation.html").read_text()
    assert "earlier model stays" in page and "stays as it was" in page
    assert str(folder / "not-kept") in capsys.readouterr().out
    again = Told()
    assert fine_tune(lame, answer, again) == 0 and again.lines == []

    add_label(site[1], 2)
    more = replace(what, fine_tune=recipe(tmp_path, max_steps=20))
    monkeypatch.setattr(work.Rival, "dice", better_than_any)
    assert fine_tune(more, answer, Told()) == 0
    assert content(folder) == before
    record = json.loads((folder / "not-kept" / "adaptation.json").read_text())
    assert record["Reason"].startswith("The earlier model 'lab' 1 stays as it was: on 1 held-out")
    assert record["Earlier"]["DiceEarlier"] == 1.0 > record["Earlier"]["DiceNow"]
    monkeypatch.undo()


def better_than_any(self, one, _job, _fold):
    return None if learned(self.card, one.labelled) else {1: 1.0}


def test_a_model_that_is_not_worse_replaces_the_earlier_one(tmp_path, base):
    site = write_site(tmp_path, {f"sub-0{n}": head(n) for n in range(2)})
    what = asked(*site, base)
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    add_label(site[1], 2)
    assert fine_tune(what, answer, Told()) == 0
    place = folder if read_card(folder / "card.toml").version == "2" else folder / "not-kept"
    record = json.loads((place / "adaptation.json").read_text())
    earlier = record["Earlier"]
    assert earlier["Version"] == "1" and earlier["HeldOut"] == 1
    assert 0 < earlier["DiceEarlier"] <= 1 and 0 < earlier["DiceNow"] <= 1
    assert earlier["Stays"] == (earlier["DiceNow"] < earlier["DiceEarlier"])
    assert [p.name for p in folder.parent.iterdir() if p.name != ".work"] == ["lab"]


def own_site(tmp_path):
    """Labels in a protocol of the site's own; a function that adds a structure to it."""
    rows = "index\tname\n0\tBackground\n1\tleft white\n2\tright white\n11\tleft nuclei\n"
    rows += "12\tright nuclei\n"
    site = write_site(tmp_path, {}, rows=rows)
    table = site[1] / "seg-lab_dseg.tsv"
    (site[1] / "seg-aseg_dseg.tsv").rename(table)
    names = PROTOCOL.table.set_index("index")["name"].str.lower()

    def write(caudate: int) -> None:
        for number in range(2):
            labels, found = head(number), np.zeros((40,) * 3, np.int16)
            for index in np.unique(labels)[1:]:
                offset = 0 if "white" in names[index] else 10
                offset = caudate if "caudate" in names[index] else offset
                side = 2 if names[index].startswith("right") else 1
                found[labels == index] = side + offset
            name = f"sub-0{number}"
            path = site[1] / name / "anat" / f"{name}_space-T1w_seg-lab_dseg.nii.gz"
            save_nifti(path, found)

    def extend() -> None:
        table.write_text(f"{rows}21\tleft caudate\n22\tright caudate\n")
        write(caudate=20)

    write(caudate=10)
    return site, extend


def test_a_base_that_learned_from_the_scans_is_told(tmp_path, base, caplog):
    site = write_site(tmp_path, {f"sub-0{n}": head(n) for n in range(2)})
    what = asked(*site, base)
    assert fine_tune(what, answer, Told()) == 0
    assert "too kind" not in caplog.text
    again = replace(what, base="lab", site="next", fine_tune=recipe(tmp_path, max_steps=10))
    assert fine_tune(again, answer, Told()) == 0
    sentence = (
        "The card of 'lab' names sub-00_T1w, sub-01_T1w among the scans that it learned from: if "
        "these are the same persons, their Dice before and after is too kind, and 'atlas' is "
        "the better --base."
    )
    assert sentence in caplog.text
    record = json.loads((what.out_dir / "models/next/adaptation.json").read_text())
    assert sentence in record["Reasons"]


def test_a_changed_list_of_structures_gives_a_whole_model(tmp_path, base, monkeypatch):
    site, extend = own_site(tmp_path)
    how = recipe(tmp_path, head="new", scope="two-stage", shares=[1.0, 0.6, 0.3])
    what = asked(*site, base, fine_tune=how)
    assert fine_tune(what, answer, Told()) == 0
    folder = what.out_dir / "models" / "lab"
    before = content(folder)
    assert len(read_card(folder / "card.toml").protocol_of("lab")) == 5
    extend()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "decide", lambda *_: KEPT)
    with monkeypatch.context() as patch:
        patch.setattr(work, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(what, answer, Told())
    assert content(folder) == before
    whole(folder, 5)
    assert fine_tune(what, answer, Told()) == 0
    whole(folder, 7)
    record = json.loads((folder / "adaptation.json").read_text())
    assert "It replaces the earlier model 'lab' 1: they cannot be compared" in record["Reason"]
    assert read_card(folder / "card.toml").version == "2"


def whole(folder, structures: int) -> None:
    card = read_card(folder / "card.toml")
    weights = load_weights(card)
    check_proof(card, weights)
    assert len(load_model(card, weights).heads[0]) == structures


def test_a_model_that_no_adaptation_wrote_is_not_replaced(tmp_path, base):
    site = write_site(tmp_path, {"sub-00": head(0)})
    what = asked(*site, base)
    models = what.out_dir / "models"
    import_model(export_model(write_model(tmp_path / "z", "lab", parent="any"), tmp_path), models)
    before = content(models / "lab")
    sentence = (
        r"a model named 'lab' is there already, and no adaptation here wrote it – .*lab/card.toml "
        r"– it would be replaced; choose another --name"
    )
    for written in ("", '{"Kept": false}', "torn"):
        if written:
            (models / "lab" / "adaptation.json").write_text(written)
        with pytest.raises(UsageError, match=sentence):
            fine_tune(what, answer, Told())
    (models / "lab" / "adaptation.json").unlink()
    assert content(models / "lab") == before
    (models / "lab").rename(models / "other")
    with pytest.raises(
        UsageError, match=r"no adaptation here wrote it – .*other/card.toml – it wo"
    ):
        fine_tune(what, answer, Told())


# --- the verdict --------------------------------------------------------------------------------

KEPT = Verdict(True, 1.0, 0.05, 0.0, "The adapted model is kept.")
EARLIER = small_card("lab", version="3")


def part(child: float, earlier: float | None) -> SimpleNamespace:
    return SimpleNamespace(child={1: child}, earlier=None if earlier is None else {1: earlier})


def test_the_verdict_says_both_figures():
    assert against_earlier(KEPT, None, []) is KEPT
    better = against_earlier(KEPT, EARLIER, [part(0.8, 0.8), part(0.7, 0.6), part(0.1, None)])
    assert better.kept and better.share == 1.0
    assert better.reason == (
        "The adapted model is kept. It replaces the earlier model 'lab' 3: on 2 held-out parts "
        "that the earlier one did not learn from it has 0.700 mean Dice, the newly adapted model "
        "0.750."
    )
    worse = against_earlier(KEPT, EARLIER, [part(0.8, 0.9), part(1.0, None)])
    assert not worse.kept and worse.share == 0
    assert worse.reason == (
        "The earlier model 'lab' 3 stays as it was: on 1 held-out part that the earlier one did "
        "not learn from it has 0.900 mean Dice, the newly adapted model 0.800. The newly adapted "
        "model gains +0.050 mean Dice on the base."
    )
    blind = against_earlier(KEPT, EARLIER, [part(0.8, None)])
    assert (
        blind.kept and "they cannot be compared, as it learned from every held-out" in blind.reason
    )


def test_what_a_model_learned_from_is_known_by_name_and_hash():
    data = [{"dataset": "x"}, {"subjects": ["sub-01_T1w"]}, {"subjects": {"sub-02_T1w": "a" * 64}}]
    card = small_card(training={"data": data})
    for name, sha256, known in (
        ("sub-02_T1w", "b", True), ("sub-03_T1w", "a" * 64, True), ("sub-03_T1w", "b", False)
    ):  # fmt: skip
        assert learned(card, SimpleNamespace(name=name, sha256=sha256)) is known


def test_an_earlier_model_that_cannot_be_loaded_is_not_compared(tmp_path, caplog):
    card = write_model(tmp_path, "lab")
    job, reading = SimpleNamespace(device="cpu"), SimpleNamespace(target=PROTOCOL)
    (tmp_path / "lab.safetensors").write_bytes(b"torn")
    assert find_rival(card, job, reading, answer) is None
    assert "the earlier model cannot be loaded, so it is not compared: the weights" in caplog.text


def test_models_of_other_structures_are_not_compared():
    assert find_rival(None, None, None, answer) is None
    assert comparable(small_card(), SimpleNamespace(target=PROTOCOL))
    assert not comparable(small_card(), SimpleNamespace(target=load_protocol("infant")))


# --- the folder ---------------------------------------------------------------------------------


def write_torn(path) -> None:
    with atomic.atomic_folder(path) as new:
        (new / "three").write_text("three")
        raise ValueError("torn")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    path = tmp_path / "lab"
    for text in ("one", "two"):
        with atomic.atomic_folder(path) as new:
            (new / text).write_text(text)
    assert [file.name for file in path.iterdir()] == ["two"]
    with pytest.raises(ValueError, match="torn"):
        write_torn(path)
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == ["lab"]


def test_a_folder_that_was_moved_away_by_a_killed_run_is_put_back(tmp_path):
    path, place = tmp_path / "lab", tmp_path / ".lab.part"
    (place / "old").mkdir(parents=True)
    (place / "old" / "card.toml").write_text("whole")
    (place / "new").mkdir()
    atomic.settle(path)
    assert (path / "card.toml").read_text() == "whole" and not place.exists()


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    path = tmp_path / "lab"
    path.mkdir()
    (path / "card.toml").write_text("whole")
    sentence = r"no space left.*lab – free some space"
    with pytest.raises(OutputError, match=sentence), atomic.atomic_folder(path):
        raise OSError(28, "No space left on device")
    assert (path / "card.toml").read_text() == "whole"
