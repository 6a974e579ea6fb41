"""Whether a scan's file, or the folder that holds it, can be read at all.

It is told from the file system, without opening the image.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path

POINTER_BYTES = 64
SUBDATASET = re.compile(r"^\s*path\s*=\s*(.+?)\s*$", re.MULTILINE)
"""Where a subdataset of DataLad lies, in the file ``.gitmodules``."""


def closed_folders(root: Path, labels: Iterable[str]) -> list[Path]:
    """Folders that could hold scans of the participants, and that cannot be looked into.

    What lies in a closed folder is not listed.
    """
    found = []
    absent = not_installed(root)

    def is_shut(folder: Path) -> bool:
        closed = leads_nowhere(folder) or (folder.is_dir() and is_closed(folder))
        return closed or folder in absent

    for label in labels:
        subject = root / f"sub-{label}"
        visits = [subject] if is_shut(subject) else [subject, *sorted(subject.glob("ses-*"))]
        shut = (next(filter(is_shut, (visit, visit / "anat")), None) for visit in visits)
        found += [folder for folder in shut if folder is not None]
    return found


def not_installed(root: Path) -> set[Path]:
    """The folders of a dataset's DataLad subdatasets that hold nothing yet."""
    try:
        text = (root / ".gitmodules").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    folders = (root / path for path in SUBDATASET.findall(text))
    return {f for f in folders if f.is_dir() and not is_closed(f) and not any(f.iterdir())}


def why_closed(folder: Path, root: Path) -> tuple[str, str]:
    """Reason and hint for one of `closed_folders`."""
    name = folder.relative_to(root)
    if leads_nowhere(folder):
        reason = f"the folder {name} is a link to '{folder.readlink()}', which does not exist"
        return reason, "mend the link, or mount what it leads to if you use a container"
    if not is_closed(folder):
        reason = f"the folder {name} is a DataLad subdataset that is not installed"
        return reason, f"run `datalad get -n {name}` in {shlex.quote(str(root))}"
    reason = f"there is no permission to read the folder {name}"
    return reason, "give the user who runs this read access to it, or leave the participant out"


def is_closed(folder: Path) -> bool:
    """Whether there is no permission to list a folder or to reach what is in it."""
    return not os.access(folder, os.R_OK | os.X_OK)


def leads_nowhere(path: Path) -> bool:
    """Whether a link's end is not there, such as outside of what a container has mounted."""
    return path.is_symlink() and not path.exists()


def is_hidden(path: Path) -> bool:
    """Whether a file is no part of a dataset: a Mac leaves ``._NAME`` on other drives."""
    return path.name.startswith(".")


def why_unreadable(path: Path, root: Path) -> tuple[str, str] | None:
    """Reason and hint if `path` holds no image data here; None if it does.

    Tells apart a DataLad or git-annex file whose content was not fetched (a dangling link, or the
    pointer file of an unlocked one), a Git LFS pointer, any other dangling link, an empty file, a
    folder or pipe, and a file without read permission.
    """
    name = shlex.quote(path.relative_to(root).as_posix())
    in_root = f"in {shlex.quote(str(root))}"
    fetch = ("its content is not on this machine (DataLad, git-annex)",
             f"run `datalad get {name}` {in_root}")  # fmt: skip
    try:
        status = path.stat()
    except FileNotFoundError:
        target = path.readlink() if path.is_symlink() else ""
        if "annex/objects" in str(target):
            return fetch
        return (f"it is a link to '{target}', which does not exist",
                "fetch the file (DataLad: `datalad get`) or mend the link")  # fmt: skip
    except OSError as error:
        return f"it cannot be reached ({error.strerror})", "mend the link or the file system"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a file", "put the NIfTI file there, or remove it"
    if status.st_size == 0:
        return "the file is empty", "copy or convert the scan again"
    if not os.access(path, os.R_OK):
        return "there is no permission to read it", f"run `chmod u+r {name}` {in_root}"
    try:
        with path.open("rb") as stream:
            start = stream.read(POINTER_BYTES)
    except OSError as error:
        return f"it cannot be read ({error.strerror})", "check the disk or the network drive"
    if b"annex/objects/" in start:
        return fetch
    if start.startswith(b"version https://git-lfs"):
        return ("its content is not on this machine (Git LFS)",
                f"run `git lfs pull --include {name}` {in_root}")  # fmt: skip
    return None
