"""Locks between runs that share an output folder: one run with several shards, or two by mistake.

A lock is `flock` on a small file. The system releases it when the process ends, however it ends,
so a run that was killed never blocks the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tlseg_bids.bids.atomic import try_lock
from tlseg_bids.errors import CannotCreateError, LockedError

POLL_S = 0.05


@contextlib.contextmanager
def hold(path: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; it is removed afterwards.

    On a file system that knows no locks the block runs without one.

    Parameters
    ----------
    path : Path
        The lock file; its folder is made.
    what : str
        Clause for the message: ``sub-01_T1w is being processed``.
    wait_s : float
        Seconds to wait for another holder.

    Raises
    ------
    LockedError
        If another process, or another thread, holds it longer than that.
    CannotCreateError
        If the file cannot be made.
    """
    handle = _acquire(path, what, time.monotonic() + wait_s)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, what: str, deadline: float) -> int:
    """An open, locked descriptor of `path` as it lies in the folder now."""
    while True:
        handle = _open(path)
        try:
            locked = try_lock(handle) is not False
            if locked and _is_current(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
            holder = os.pread(handle, 200, 0).decode(errors="replace")
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if locked:  # the holder before us has just removed the file
            continue
        if time.monotonic() >= deadline:
            raise LockedError(
                f"{what} by another run" + (f" ({holder})" if holder else ""), path,
                "wait until it ends, then start again; what it finished is reused",
            )  # fmt: skip
        time.sleep(POLL_S)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CannotCreateError(
            f"the lock file cannot be made ({error.strerror})", path,
            "check the permissions of the folder and the space on the disk",
        ) from error  # fmt: skip


def _is_current(handle: int, path: Path) -> bool:
    """False if the holder before us removed the file that we had opened."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
