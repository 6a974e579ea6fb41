"""Files and folders that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tlseg_bids.errors import CannotCreateError, OutputError, TlsegError

NOT_CREATABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""What a file system says that locks no file, or none that is open as this one (NFS)."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of `renameat2` in Linux: paths from the current folder; both names change their files at once."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content becomes `path` when the block ends without an error.

    The temporary name lies in the same folder, begins with a dot and is removed on failure; one
    that a killed run left behind is removed the next time the same file is written. A lock tells
    it from one that another run is writing at the moment.

    Raises
    ------
    CannotCreateError
        If the folder or the file cannot be made.
    OutputError
        If writing fails on the way, for example because the disk is full.
    """
    mark = hashlib.sha1(path.name.encode(errors="surrogateescape")).hexdigest()[:12]
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(path.parent, mark)
        partial, stream = _open_own(path, mark)
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            partial.replace(path)
    except OSError as error:
        raise writing_failed(error, path) from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder whose content becomes `path`, in place of what is there, at the end of the block.

    Until then, and after an error, `path` stays as it was. Only one run at a time may do this for a
    path. Where the system cannot exchange two folders at once, a run that is killed between two
    renames leaves the earlier folder beside `path`, and `settle` puts it back.

    Raises
    ------
    CannotCreateError
        If the folder cannot be made.
    OutputError
        If it cannot be put in its place.
    """
    place = _beside(path)
    new = place / "new"
    try:
        settle(path)
        new.mkdir(parents=True)
        yield new
        if not path.exists():
            new.rename(path)
        elif not _exchange(new, path):
            path.rename(place / "old")
            new.rename(path)
    except OSError as error:
        raise writing_failed(error, path) from error
    finally:
        settle(path)


def settle(path: Path) -> None:
    """Put back what `atomic_folder` had to move away, and remove what it left, after a kill."""
    place = _beside(path)
    with contextlib.suppress(OSError):
        if (place / "old").exists() and not path.exists():
            (place / "old").rename(path)
        if path.exists() or not (place / "old").exists():
            shutil.rmtree(place, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders at once; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return call(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _open_own(path: Path, mark: str) -> tuple[Path, BinaryIO]:
    """A new temporary file for `path`, locked before anybody could take it for a left one."""
    while True:
        partial = path.with_name(f".{mark}-{secrets.token_hex(4)}.part")
        stream = partial.open("xb")
        if try_lock(stream.fileno()) is not False and os.fstat(stream.fileno()).st_nlink:
            return partial, stream
        stream.close()


def _remove_left(folder: Path, mark: str) -> None:
    """Remove temporary files that a killed run left; one that is being written is locked.

    They are opened for writing, without which NFS locks no file; another user's stay.
    """
    for partial in folder.glob(f".{mark}-*.part"):
        gone = contextlib.suppress(FileNotFoundError, PermissionError)
        with gone, partial.open("r+b") as stream:
            if try_lock(stream.fileno()):
                partial.unlink()


def try_lock(handle: int) -> bool | None:
    """Lock an open file (`flock`) until it is closed.

    Returns
    -------
    bool or None
        False if another process holds it, None if the file system knows no locks.

    Raises
    ------
    OSError
        If the disk fails.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def writing_failed(error: OSError, path: Path) -> TlsegError:
    """The sentence for a failed write: `CannotCreateError` or `OutputError`."""
    if error.errno in NOT_CREATABLE:
        return CannotCreateError(
            f"the file cannot be made ({error.strerror})", path,
            "check that the output folder may be written to",
        )  # fmt: skip
    if error.errno in FULL:
        return OutputError(
            f"there is no space left to write ({error.strerror})", path,
            "free some space or choose another output folder, then start again; finished scans "
            "are reused",
        )  # fmt: skip
    return OutputError(
        f"writing failed ({error.strerror or error})", path,
        "check the disk or the network drive, then start again; finished scans are reused",
    )  # fmt: skip


def check_inside(folder: Path, root: Path) -> None:
    """Refuse a folder that a link leads out of the output folder.

    Raises
    ------
    CannotCreateError
        If `folder`, links followed, is not below `root`.
    """
    if not folder.resolve().is_relative_to(root.resolve()):
        raise CannotCreateError(
            f"a link leads out of the output folder, to {folder.resolve()}", folder,
            "remove the link, or choose another output folder",
        )  # fmt: skip


def write_text(path: Path, text: str) -> Path:
    """Write `text` in UTF-8, whole or not at all (errors as in `atomic`)."""
    with atomic(path) as stream:
        stream.write(text.encode("utf-8", errors="replace"))
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write an object as JSON, whole or not at all (errors as in `atomic`)."""
    return write_text(path, as_json(content))


def as_json(content: Mapping[str, Any]) -> str:
    """An object as `write_json` writes it."""
    return json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n"


def update_text(path: Path, text: str) -> Path:
    """Write `text` unless the file has it already: many runs that start together then only read."""
    try:
        if path.read_bytes() == text.encode("utf-8", errors="replace"):
            return path
    except OSError:
        pass
    return write_text(path, text)


def plain(value: Any) -> Any:
    """`value` in the types of JSON: paths as text, arrays as lists, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def clean_cell(value: Any) -> str:
    """A value as one cell of a TSV file: no tab, no line break, ``n/a`` where there is nothing."""
    if isinstance(value, float):
        value = "n/a" if math.isnan(value) else f"{value:.10g}"
    text = "" if value is None else str(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text or "n/a"
