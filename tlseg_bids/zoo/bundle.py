"""A model as one file: a zip of its card, its weights and, where it has its own, look-up tables.

Nothing in it is run or unpickled when it is opened. Names, sizes and the hashes of weights and
tables are checked before anything is written, and the model appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from tlseg_bids.errors import CannotCreateError, DataError, NoInputError, UsageError
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import digest, read_card, to_toml
from tlseg_bids.zoo.weights import load_weights, verify

CARD = "card.toml"
SUFFIXES = (".safetensors", ".tsv")
MOST_FILES = 16
MOST_CARD_BYTES = 2**22
MOST_BYTES = 2**32
EPOCH = (1980, 1, 1, 0, 0, 0)
DAMAGED = "ask for the file again; nothing of it was installed"


def export_model(card: ModelCard, target: Path) -> Path:
    """Write a model to one zip file; the same model gives the same bytes.

    Parameters
    ----------
    card : ModelCard
        A model whose weights are on this machine.
    target : Path
        The file, or a folder for ``NAME.zip``.

    Raises
    ------
    NoInputError, DataError
        If the weights are not here, or are not what the card says.
    CannotCreateError
        If the file cannot be written.
    """
    weights = verify(card)
    if card.path is None:
        raise NoInputError("the card is not on disk", card.name, "write it first")
    if target.is_dir():
        target = target / f"{card.name}.zip"
    name = Path(card.weights.file or weights.name).name
    if name.startswith("."):  # no hidden file is imported
        name = f"{card.name}.safetensors"
    if card.weights.file == name:
        text = card.path.read_text(encoding="utf-8")
    else:  # fetched, or in a folder below the card's: in the zip the two lie side by side
        text = to_toml(replace(card, weights=replace(card.weights, file=name)))
    files = {CARD: text.encode(), name: weights}
    files |= {table.name: table for table in sorted(card.own_tables.values())}
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for filename, content in files.items():
                entry = zipfile.ZipInfo(filename, EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                data = content if isinstance(content, bytes) else content.read_bytes()
                archive.writestr(entry, data)
        partial.replace(target)
    except OSError as error:
        raise CannotCreateError(
            f"the model cannot be exported ({error.strerror})", target, "choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or there is nothing to remove
            partial.unlink()
    return target


def import_model(file: Path, models: Path) -> ModelCard:
    """Unpack a model into ``models/NAME/``, after everything about it was checked.

    Parameters
    ----------
    file : Path
        What `export_model` wrote, here or elsewhere.
    models : Path
        A folder for ``--models``, or ``OUT_DIR/models``.

    Raises
    ------
    NoInputError
        If there is no such file.
    DataError
        If it is no zip, damaged, holds anything but a card, safetensors and tables, or weights or
        tables are not what the card says.
    UsageError
        If another model of that name is there already.
    CannotCreateError
        If the folder cannot be written.
    """
    if not file.is_file():
        raise NoInputError("there is no such file", file, "name a .zip that was exported")
    try:
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".import-", dir=models) as place:
            folder = Path(place) / "model"
            folder.mkdir()
            _unpack(file, folder)
            card = _checked(folder, file)
            return _install(card, folder, models / card.name)
    except OSError as error:
        raise CannotCreateError(
            f"the model cannot be installed ({error.strerror or error})", models,
            "choose a folder that you may write to",
        ) from error  # fmt: skip


def _unpack(file: Path, folder: Path) -> None:
    """Write the zip's files into `folder`, if their names and sizes are harmless."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            for entry in entries:
                _check_entry(entry, file)
            names = [entry.filename for entry in entries]
            if len(names) > MOST_FILES or len(set(names)) < len(names) or CARD not in names:
                raise DataError(
                    f"the file holds {', '.join(names[:4]) or 'nothing'}, and not one {CARD} with "
                    "its weights", file, "it is no exported model",
                )  # fmt: skip
            for entry in entries:
                with archive.open(entry) as source, (folder / entry.filename).open("xb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DataError(f"the file is damaged or no zip ({error})", file, DAMAGED) from error
    except zipfile.zlib.error as error:
        raise DataError(f"the file is damaged ({error})", file, DAMAGED) from error


def _check_entry(entry: zipfile.ZipInfo, file: Path) -> None:
    name = entry.filename
    plain = name == Path(name).name and not name.startswith(".") and "\\" not in name
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if not plain or link or not (name == CARD or name.endswith(SUFFIXES)):
        raise DataError(
            f"the file holds '{name}', which is neither {CARD} nor weights nor a table", file,
            "it was tampered with or is no exported model; nothing of it was installed",
        )  # fmt: skip
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"'{name}' is compressed in another way than an export is", file,
            "it is no exported model; nothing of it was installed",
        )  # fmt: skip
    most = MOST_BYTES if name.endswith(SUFFIXES[0]) else MOST_CARD_BYTES
    if entry.file_size > most:
        raise DataError(
            f"'{name}' would have {entry.file_size} bytes unpacked", file,
            f"at most {most} are expected; nothing of it was installed",
        )  # fmt: skip


def _checked(folder: Path, file: Path) -> ModelCard:
    """The unpacked card, once its weights are found to be a plain file of the zip, and whole."""
    try:
        card = read_card(folder / CARD)
        name = card.weights.file
        if name is None or Path(name).name != name or not (folder / name).is_file():
            raise DataError(
                f"the card's weights, '{name}', are not in the file", file,
                "it was tampered with or is no exported model; nothing of it was installed",
            )  # fmt: skip
        verify(card)
        load_weights(card, offline=True)
    except DataError as error:  # the folder is about to vanish
        where = error.where.replace(f"{folder}{os.sep}", f"{file}, ")
        raise DataError(error.what, where, error.hint) from None
    return card


def _install(card: ModelCard, folder: Path, target: Path) -> ModelCard:
    """Rename the checked folder to its place; the same model twice is no error."""
    if (target / CARD).is_file():
        there = read_card(target / CARD)
        if digest(there) != digest(card):
            raise UsageError(
                f"another model named '{card.name}' is there already", target,
                "remove it first, or choose another folder with --to",
            )  # fmt: skip
        verify(there)
        return there
    if target.exists():
        raise UsageError(
            f"'{target.name}' is there already and is no model", target, "choose another folder"
        )
    folder.replace(target)
    return read_card(target / CARD)
