"""A model as one file: what comes out goes in again, and nothing else does."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.cards import write_model
from tlseg_bids.cli.zoo import main
from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.zoo.bundle import export_model, import_model
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.registry import load_cards
from tlseg_bids.zoo.weights import fetch, load_weights


@pytest.fixture
def bundle(tmp_path) -> Path:
    card = write_model(tmp_path / "zoo", "lab", parent="any")
    return export_model(card, tmp_path)


def entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(file: Path, content: dict[str, bytes]) -> Path:
    out = file.with_name("other.zip")
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return out


def test_a_model_goes_out_and_in(bundle, tmp_path):
    assert bundle.name == "lab.zip"
    first = bundle.read_bytes()
    card = import_model(bundle, tmp_path / "there")
    assert card.path == tmp_path / "there" / "lab" / "card.toml"
    assert load_weights(card)
    assert "lab" in {c.name for c in load_cards((tmp_path / "there",))}
    assert import_model(bundle, tmp_path / "there").name == "lab"
    assert export_model(card, tmp_path / "again.zip").read_bytes() == first
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["lab"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o2755), (0o002, 0o2775), (0o077, 0o2700)])
def test_who_may_use_a_model_is_up_to_the_umask_and_the_folders_group(
    bundle, tmp_path, umask, mode
):
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o2775)
    before = os.umask(umask)
    try:
        card = import_model(bundle, tmp_path / "there")
    finally:
        os.umask(before)
    assert card.path.parent.stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize("fetched", [False, True])
def test_weights_that_lie_elsewhere_than_the_card_go_out_and_in(tmp_path, monkeypatch, fetched):
    monkeypatch.setenv("TLSEG_CACHE", str(tmp_path / "cache"))
    card = write_model(tmp_path / "zoo", "lab")
    beside = tmp_path / "zoo" / card.weights.file
    below = beside.parent / "weights" / "x.safetensors"
    below.parent.mkdir()
    beside.rename(below)
    where = {"file": None, "url": below.as_uri()} if fetched else {"file": "weights/x.safetensors"}
    write_card(replace(card, weights=replace(card.weights, **where)), card.path)
    card = read_card(card.path)
    if fetched:
        fetch(card)
    file = export_model(card, tmp_path)
    assert export_model(card, tmp_path / "again.zip").read_bytes() == file.read_bytes()
    got = import_model(file, tmp_path / "there")
    assert got.weights == replace(card.weights, file=got.weights.file)
    assert replace(got, weights=card.weights, path=card.path) == card
    assert (got.path.parent / got.weights.file).read_bytes() == below.read_bytes()
    assert export_model(got, tmp_path / "third.zip").read_bytes() == file.read_bytes()


def test_weights_whose_name_is_hidden_go_out_and_in(tmp_path):
    card = write_model(tmp_path / "zoo", "lab")
    beside = tmp_path / "zoo" / card.weights.file
    beside.rename(beside.with_name(".w.safetensors"))
    write_card(replace(card, weights=replace(card.weights, file=".w.safetensors")), card.path)
    file = export_model(read_card(card.path), tmp_path)
    got = import_model(file, tmp_path / "there")
    assert got.weights == replace(card.weights, file="lab.safetensors")
    assert load_weights(got)


def test_it_works_from_the_command_line(bundle, tmp_path, capsys):
    assert main(["import", str(bundle), "--to", str(tmp_path / "m")]) == 0
    assert "lab 1.0" in capsys.readouterr().out
    assert main(["export", "lab", str(tmp_path / "x.zip"), "--models", str(tmp_path / "m")]) == 0
    assert (tmp_path / "x.zip").read_bytes() == bundle.read_bytes()
    assert main(["import", str(tmp_path / "none.zip"), "--to", str(tmp_path / "m")]) == 66


def nothing_installed(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../evil.tsv", "holds '../evil.tsv'"),
        ("/etc/evil.tsv", "holds '/etc/evil.tsv'"),
        ("deep/evil.tsv", "holds 'deep/evil.tsv'"),
        ("model.pkl", "holds 'model.pkl'"),
        ("code.py", "holds 'code.py'"),
        (".hidden.tsv", "holds '.hidden.tsv'"),
    ],
)
def test_nothing_but_a_model_is_unpacked(bundle, tmp_path, name, sentence):
    file = rewritten(bundle, {**entries(bundle), name: b"x"})
    with pytest.raises(DataError, match="neither card.toml nor weights nor a table") as caught:
        import_model(file, tmp_path / "there")
    assert sentence in str(caught.value)
    assert nothing_installed(tmp_path / "there")
    assert not (tmp_path / "evil.tsv").exists()


def test_a_link_is_refused(bundle, tmp_path):
    file = tmp_path / "link.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries(bundle).items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("more.tsv")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="'more.tsv'"):
        import_model(file, tmp_path / "there")


def test_changed_weights_are_refused(bundle, tmp_path):
    content = entries(bundle)
    weights = bytearray(content["lab.safetensors"])
    weights[-1] ^= 1
    file = rewritten(bundle, {**content, "lab.safetensors": bytes(weights)})
    with pytest.raises(DataError, match="SHA-256") as caught:
        import_model(file, tmp_path / "there")
    assert caught.value.where == f"{file}, lab.safetensors"
    assert nothing_installed(tmp_path / "there")


def test_a_card_that_points_elsewhere_is_refused(bundle, tmp_path):
    content = entries(bundle)
    card = content["card.toml"].replace(b'"lab.safetensors"', b'"../lab.safetensors"')
    with pytest.raises(DataError, match="are not in the file"):
        import_model(rewritten(bundle, {**content, "card.toml": card}), tmp_path / "there")


def test_a_card_with_a_mistake_is_named_by_the_zip_that_holds_it(bundle, tmp_path):
    content = entries(bundle)
    card = content["card.toml"].replace(b'name = "lab"', b'name = "../lab"')
    file = rewritten(bundle, {**content, "card.toml": card})
    with pytest.raises(DataError, match="'../lab' cannot name a model") as caught:
        import_model(file, tmp_path / "there")
    assert caught.value.where == f"{file}, card.toml, name"
    assert nothing_installed(tmp_path / "there")


def test_a_damaged_file_is_refused(bundle, tmp_path):
    whole = bundle.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a zip"):
        bundle.write_bytes(content)
        with pytest.raises(DataError, match="damaged or no zip"):
            import_model(bundle, tmp_path / "there")
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    bundle.write_bytes(bytes(broken))
    with pytest.raises(DataError):
        import_model(bundle, tmp_path / "there")
    assert nothing_installed(tmp_path / "there")
    with pytest.raises(NoInputError, match="there is no such file"):
        import_model(tmp_path / "none.zip", tmp_path / "there")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_what_is_damaged_and_compressed_otherwise_is_refused(bundle, tmp_path, method):
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w", method) as archive:
        for name, data in entries(bundle).items():
            archive.writestr(name, data)
    content = bytearray(other.read_bytes())
    content[60:400] = b"x" * 340
    other.write_bytes(content)
    with pytest.raises(DataError, match=r"compressed in another way .*other\.zip – it is no exp"):
        import_model(other, tmp_path / "there")


def test_an_export_that_is_interrupted_leaves_nothing(bundle, tmp_path, monkeypatch):
    card = import_model(bundle, tmp_path / "there")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_model(card, tmp_path / "out" / "lab.zip")
    with pytest.raises(KeyboardInterrupt):
        write_card(card, tmp_path / "out" / "card.toml")
    assert not list((tmp_path / "out").iterdir())


def test_a_zip_without_a_card_is_refused(bundle, tmp_path):
    content = entries(bundle)
    del content["card.toml"]
    with pytest.raises(DataError, match="it is no exported model"):
        import_model(rewritten(bundle, content), tmp_path / "there")


def test_another_model_of_that_name_is_not_replaced(bundle, tmp_path):
    import_model(bundle, tmp_path / "there")
    other = export_model(write_model(tmp_path / "b", "lab", version="2.0"), tmp_path / "b")
    with pytest.raises(UsageError, match="another model named 'lab' is there already"):
        import_model(other, tmp_path / "there")
    (tmp_path / "full" / "lab").mkdir(parents=True)
    with pytest.raises(UsageError, match="is no model"):
        import_model(bundle, tmp_path / "full")
