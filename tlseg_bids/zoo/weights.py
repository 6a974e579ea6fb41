"""Weights: found, fetched once, and checked by hash before they are opened.

Only safetensors is opened, never a pickle, and what was hashed is what is opened: the file is
read once into memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from tlseg_bids.errors import CannotCreateError, DataError, NoInputError, OutputError
from tlseg_bids.zoo.card import ModelCard, Weights

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 2**20
TIMEOUT_S = 60
CACHE_VARIABLE = "TLSEG_CACHE"
PARTIAL = ".part"
FORGOTTEN_S = 24 * 3600
"""What nobody has written to for so long, a process left that was killed."""


def cache_dir() -> Path:
    """Folder of fetched weights: the variable TLSEG_CACHE, else the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("tlseg")


def cached_file(card: ModelCard) -> Path:
    """Where the fetched weights of `card` lie, or would lie; the name is their hash."""
    return cache_dir() / "weights" / f"{card.weights.sha256}.safetensors"


def local_file(card: ModelCard) -> Path | None:
    """The weights of `card` on this machine: beside the card, else in the cache, else None."""
    if card.weights.file is not None and card.path is not None:
        beside = card.path.parent / card.weights.file
        if beside.is_file():
            return beside
    cached = cached_file(card)
    return cached if cached.is_file() else None


def unavailable(card: ModelCard, offline: bool = False) -> str | None:
    """Why the weights of `card` cannot be had; None if they are here or can be fetched."""
    if local_file(card) is not None:
        return None
    if card.weights.url is None:
        return f"its weights file {card.weights.file} is missing"
    return "its weights were not fetched yet, and --offline was given" if offline else None


def load_weights(card: ModelCard, offline: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a model, on the CPU; fetched first where they are not on this machine.

    Parameters
    ----------
    card : ModelCard
        The model.
    offline : bool
        Never fetch.

    Returns
    -------
    dict of str to Tensor
        As the safetensors file names them; atlases whole, see `tlseg_bids.zoo.atlases`.

    Raises
    ------
    NoInputError
        If the weights are nowhere, or cannot be fetched or read.
    DataError
        If size, hash or format are not what the card says.
    """
    import safetensors
    import safetensors.torch

    from tlseg_bids.zoo.atlases import unpack

    path = local_file(card)
    if path is None:
        why = unavailable(card, offline)
        if why is not None:
            raise _absent(card, why)
        path = fetch(card)
    content = _read_verified(path, card.weights)
    try:
        return unpack(safetensors.torch.load(content), path)
    except safetensors.SafetensorError as error:
        raise DataError(
            f"the weights of model '{card.name}' are not safetensors ({error})", path,
            "no other format is opened; ask whoever made the model for a .safetensors file",
        ) from error  # fmt: skip


def verify(card: ModelCard) -> Path:
    """Check size and hash of a model's weights without opening them.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    NoInputError
        If the weights are not on this machine, or cannot be read.
    DataError
        If size or hash are not what the card says.
    """
    path = local_file(card)
    if path is None:
        raise NoInputError(
            f"the weights of model '{card.name}' are not on this machine",
            card.weights.url or card.path or "", f"run `tlseg-zoo fetch {card.name}`",
        )  # fmt: skip
    return verify_file(path, card.weights)


def _absent(card: ModelCard, why: str) -> NoInputError:
    """The error that the weights of `card` are not here and are not fetched."""
    return NoInputError(
        f"model '{card.name}' cannot be used: {why}", card.weights.url or card.path or "",
        f"run `tlseg-zoo fetch {card.name}` where there is a network, or reinstall",
    )  # fmt: skip


def fetch(card: ModelCard, offline: bool = False) -> Path:
    """Download the weights of `card` into the cache, unless they are there and whole.

    Nothing is left behind unless size and hash are right.

    Raises
    ------
    NoInputError
        If the card has no URL, or the URL cannot be reached, or `offline` forbids to try.
    DataError
        If what came is not what the card says.
    CannotCreateError, OutputError
        If the cache cannot be created or written.
    """
    target, url = cached_file(card), card.weights.url
    if target.is_file():
        try:
            return verify_file(target, card.weights)
        except DataError:
            with _writing(target.parent):
                target.unlink(missing_ok=True)
    if url is None:
        raise NoInputError(
            f"model '{card.name}' has no address to fetch its weights from", card.path or "",
            "its weights come with the card; put them where the card says",
        )  # fmt: skip
    if why := unavailable(card, offline):
        raise _absent(card, why)
    partial = _new_file(target)
    try:
        _download(url, partial, card.weights)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def verify_file(path: Path, weights: Weights) -> Path:
    """Check size and hash of a file against a card's entry; the file is not opened as tensors.

    Raises
    ------
    NoInputError
        If the file cannot be read.
    DataError
        If they differ.
    """
    with _reading(path), path.open("rb") as stream:
        _check_size(path, os.fstat(stream.fileno()).st_size, weights)
        _check_hash(path, hashlib.file_digest(stream, "sha256").hexdigest(), weights)
    return path


def describe(file: Path, licence: str, card_path: Path) -> Weights:
    """The card's entry for a weights file that was just written.

    Parameters
    ----------
    file : Path
        The safetensors file.
    licence : str
        SPDX expression.
    card_path : Path
        Where the card will be written; the entry's path is relative to its folder.
    """
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    relative = os.path.relpath(file, card_path.parent).replace(os.sep, "/")
    return Weights(sha256, file.stat().st_size, licence, file=relative)


def _read_verified(path: Path, weights: Weights) -> bytes:
    with _reading(path):
        _check_size(path, path.stat().st_size, weights)
        content = path.read_bytes()
    _check_hash(path, hashlib.sha256(content).hexdigest(), weights)
    return content


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A block whose OSError says that the weights cannot be read."""
    try:
        yield
    except OSError as error:
        raise NoInputError(
            f"the weights cannot be read ({error.strerror or error})", path,
            "give the user who runs this access to the file, or check the disk",
        ) from error  # fmt: skip


def _check_size(path: object, found: int, weights: Weights) -> None:
    if found != weights.bytes:
        raise DataError(
            f"the weights have {found} bytes, the card says {weights.bytes}", path,
            "the file is truncated or another one; remove it and fetch or install it again",
        )  # fmt: skip


def _check_hash(path: object, found: str, weights: Weights) -> None:
    if found != weights.sha256:
        raise DataError(
            f"the weights have the SHA-256 {found}, the card says {weights.sha256}", path,
            "the file was changed and is not opened; remove it and fetch or install it again",
        )  # fmt: skip


def _new_file(target: Path) -> Path:
    """A new file beside `target`, which whoever the umask allows may read: caches are shared."""
    partial = target.with_name(f"{secrets.token_hex(8)}{PARTIAL}")
    with _writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
    for other in target.parent.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if time.time() - other.stat().st_mtime > FORGOTTEN_S:
                other.unlink()
    return partial


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A block whose OSError says that the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise CannotCreateError(
            f"the cache folder cannot be written ({error.strerror})", folder,
            f"set the variable {CACHE_VARIABLE} to a folder that you may write to",
        ) from error  # fmt: skip


def _download(url: str, partial: Path, weights: Weights) -> None:
    """Stream `url` into `partial`, checking size and hash on the way."""
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NoInputError(
            f"the weights cannot be fetched ({reason})", url,
            "check the network and the proxy variables, or fetch them on another machine and "
            f"copy its cache folder ({CACHE_VARIABLE})",
        ) from error  # fmt: skip
    try:
        with response, partial.open("wb") as stream:
            size, sha256 = _copy(response, stream, weights.bytes, url)
    except OSError as error:
        free = shutil.disk_usage(cache_dir()).free
        raise OutputError(
            f"the weights cannot be written ({error.strerror}; {free} bytes are free)",
            cache_dir(), f"make room, or set the variable {CACHE_VARIABLE} to another folder",
        ) from error  # fmt: skip
    _check_size(url, size, weights)
    _check_hash(url, sha256, weights)


def _copy(source: BinaryIO, target: BinaryIO, limit: int, url: str) -> tuple[int, str]:
    """Copy at most one chunk more than `limit` bytes; return their number and SHA-256."""
    size, digest = 0, hashlib.sha256()
    while size <= limit:
        try:
            chunk = source.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise NoInputError(
                f"the connection broke after {size} of {limit} bytes ({error})", url, "try again"
            ) from error
        if not chunk:
            break
        target.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()
