"""A site's own protocol: the table beside the card, damaged, rewritten or exchanged."""

from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cards import SEGMENTER, small_card
from tlseg_bids.cli.zoo import main
from tlseg_bids.errors import DataError
from tlseg_bids.labels.protocol import COLUMNS, load_protocol
from tlseg_bids.networks import build
from tlseg_bids.zoo.bundle import export_model, import_model
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.registry import load_cards
from tlseg_bids.zoo.weights import describe

ROWS = (
    "0\tBackground\tBG\t#000000\tnone\t0\tbackground\t0",
    "1\tleft part\tL-P\t#ff0000\tleft\t2\tgrey\t0",
    "2\tright part\tR-P\t#00ff00\tright\t1\tgrey\t0",
)
TABLE = "seg-lab_dseg.tsv"


def table(*rows: str) -> bytes:
    return "\n".join(("\t".join(COLUMNS), *rows, "")).encode()


def write_lab(folder: Path, rows: tuple[str, ...] = ROWS, **changes) -> ModelCard:
    """A model in ``folder/lab`` whose first head answers in the protocol ``lab``."""
    folder = folder / "lab"
    folder.mkdir(parents=True)
    (folder / TABLE).write_bytes(table(*rows))
    sizes = [len(rows), len(load_protocol("aseg"))]
    network = build(**SEGMENTER, out_channels=sizes)
    tensors = {f"segmenter.{key}": value for key, value in network.state_dict().items()}
    file, path = folder / "lab.safetensors", folder / "card.toml"
    save_file({**tensors, "template": torch.zeros(sizes[1], 3)}, file)
    weights = describe(file, "MIT", path)
    heads = ("lab", "aseg")
    card = small_card("lab", protocol="lab", heads=heads, weights=weights, path=path, **changes)
    write_card(card, path)
    return read_card(path)


DAMAGED = [
    (b"", r"the table of the protocol 'lab' is damaged \(No columns.*restore the file"),
    (b"\xff\xfe\x00\x81\x00", r"the table of the protocol 'lab' is damaged \(.*restore the file"),
    (table(ROWS[0], '1\t"left part'), r"is damaged \(.*EOF inside string.*restore the file"),
    (table(), r"the table has no rows.*name background 0"),
    (table(ROWS[0], ROWS[1].replace("1\t", "one\t", 1)), "'one' in the column 'index' is no inte"),
    (table(ROWS[0], ROWS[1].replace("\t2\t", "\t-2\t")), "-2 in the column 'mirror' is no integer"),
]


@pytest.mark.parametrize(("content", "sentence"), DAMAGED)
def test_a_damaged_table_is_told_with_its_file(tmp_path, content, sentence):
    (tmp_path / TABLE).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        load_protocol("lab", tmp_path)
    assert caught.value.where == str(tmp_path / TABLE)
    assert caught.value.hint


def test_a_table_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    (tmp_path / TABLE).write_bytes(table(*ROWS))

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\) – .*dseg.tsv – lo"):
        load_protocol("lab", tmp_path)


def test_a_table_that_was_rewritten_is_read_anew(tmp_path):
    path = tmp_path / TABLE
    path.write_bytes(table(*ROWS))
    first = load_protocol("lab", tmp_path)
    assert load_protocol("lab", tmp_path) is first
    path.write_bytes(table(*ROWS, "3\tmiddle\tMID\t#0000ff\tnone\t3\tgrey\t0"))
    assert len(load_protocol("lab", tmp_path)) == 4


@pytest.mark.parametrize(("content", "sentence"), DAMAGED)
def test_a_model_with_a_damaged_table_is_not_imported(tmp_path, content, sentence):
    card = write_lab(tmp_path / "zoo")
    (card.path.parent / TABLE).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        import_model(export_model(card, tmp_path), tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_a_damaged_model_among_the_outputs_is_left_out_and_told(tmp_path, caplog):
    card = write_lab(tmp_path / "models")
    (card.path.parent / TABLE).write_bytes(b"")
    caplog.set_level(logging.WARNING)
    names = [card.name for card in load_cards((), tmp_path)]
    assert "any" in names and "lab" not in names
    assert f"the model of {card.path} is left out: the table of the protocol 'lab'" in caplog.text
    with pytest.raises(DataError, match="is damaged"):
        load_cards((tmp_path / "models",))
    shutil.rmtree(card.path.parent)
    write_lab(tmp_path / "models")
    assert "lab" in [card.name for card in load_cards((), tmp_path)]


# --- the hash of the table --------------------------------------------------------------------


def sealed(folder: Path) -> ModelCard:
    """A model whose card holds the hash of its table."""
    return write_lab(folder, tables={"lab": hashlib.sha256(table(*ROWS)).hexdigest()})


def exchanged(card: ModelCard) -> None:
    """Exchange left and right in the table."""
    path = card.path.parent / TABLE
    text = path.read_text().replace("left", "LEFT").replace("right", "left")
    path.write_text(text.replace("LEFT", "right"))


CHANGED = (
    r"the table of the protocol 'lab' has the SHA-256 [0-9a-f]{64}, the card says [0-9a-f]{64} "
    r"– .*seg-lab_dseg.tsv – the table was changed.*restore it, or install or adapt the model again"
)


def test_a_changed_table_is_refused_when_the_card_is_read_and_at_the_import(tmp_path):
    card = sealed(tmp_path / "zoo")
    whole = export_model(card, tmp_path / "whole.zip")
    exchanged(card)
    with pytest.raises(DataError, match=CHANGED):
        read_card(card.path)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "x.zip", "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            text = (card.path.parent / TABLE).read_bytes()
            changed.writestr(name, text if name == TABLE else content)
    with pytest.raises(DataError, match=CHANGED):
        import_model(tmp_path / "x.zip", tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())
    assert import_model(whole, tmp_path / "there").tables == card.tables


def test_a_changed_table_fails_the_verification(tmp_path, capsys):
    card = sealed(tmp_path)
    assert main(["verify", "lab", "--models", str(tmp_path)]) == 0
    assert "no hash" not in capsys.readouterr().out
    exchanged(card)
    assert main(["verify", "lab", "--models", str(tmp_path)]) == 65
    assert "the table of the protocol 'lab' has the SHA-256" in capsys.readouterr().err


def test_a_model_without_the_hash_is_loaded_and_told(tmp_path, capsys):
    write_lab(tmp_path)
    assert main(["verify", "lab", "--models", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "the card holds no hash of the table of 'lab', so it cannot be checked" in said


def test_a_hash_of_a_table_that_the_model_does_not_bring_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"'aseg' is no protocol of the site's own.*\[tables\] – na"
    ):
        write_lab(tmp_path, tables={"aseg": "0" * 64})
