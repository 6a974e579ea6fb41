"""Asks the BIDS validator about the selected participants, without writing in the dataset.

The validator (PyPI ``bids-validator-deno``, https://github.com/bids-standard/bids-validator) has
no option to select participants, so it is shown a temporary folder of links: the files at the root
and the folders of the selected participants. It needs no network.

Only an error in dataset_description.json stops the run. Errors in other files are reported, one
sentence each: a damaged scan must not keep the good ones from being done (it is named again when
it is read), and a fault in a functional run does not concern a T1w.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlseg_bids.bids.files import leads_nowhere
from tlseg_bids.errors import CannotCreateError, NotBidsError, amount

PROGRAM = "bids-validator-deno"
TIMEOUT_S = 900
LINKED_FOLDERS = ("stimuli",)
DESCRIPTION = "/dataset_description.json"
SKIP = "mend it, or leave the check out with --skip-bids-validation"


@dataclass(frozen=True)
class Finding:
    """One error of the validator.

    Parameters
    ----------
    code : str
        The validator's name for it, e.g. ``NIFTI_HEADER_UNREADABLE``.
    file : str
        Path below the BIDS folder.
    sentence : str
        What is wrong.
    more : int
        In how many further files the same was found.
    """

    code: str
    file: str
    sentence: str
    more: int = 0

    def __str__(self) -> str:
        others = f" (and in {amount(self.more, 'more file')})" if self.more else ""
        return f"{self.file}: {self.sentence} [{self.code}]{others}"


@dataclass(frozen=True)
class Validation:
    """What the validator said; `warning` is not empty if it could not be asked."""

    findings: tuple[Finding, ...] = ()
    warning: str = ""


def validate(bids_dir: Path, subjects: Iterable[str], work_dir: Path | None = None) -> Validation:
    """Check the selected participants of a dataset.

    Parameters
    ----------
    bids_dir : Path
        Root of the dataset; nothing in it is changed.
    subjects : iterable of str
        Labels without ``sub-``.
    work_dir : Path or None
        Where the temporary folder of links is made; the system's folder if None.

    Returns
    -------
    Validation
        Errors that do not stop the run, or why the validator could not be asked.

    Raises
    ------
    NotBidsError
        If dataset_description.json is not valid.
    CannotCreateError
        If the temporary folder cannot be made.
    """
    program = find_validator()
    if program is None:
        return Validation(
            warning=f"the dataset was not validated: {PROGRAM} is not installed "
            f"(pip install {PROGRAM})"
        )
    try:
        if work_dir is not None:
            work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="validate-", dir=work_dir) as folder:
            _link(bids_dir, sorted(set(subjects)), Path(folder))
            report, warning = _run(program, Path(folder))
    except OSError as error:
        raise CannotCreateError(
            f"the folder for validation cannot be made ({error.strerror})",
            work_dir or tempfile.gettempdir(),
            "choose another --work-dir, or leave the check out with --skip-bids-validation",
        ) from error
    if warning:
        return Validation(warning=warning)
    findings = _findings(report)
    serious = [finding for finding in findings if finding.file == DESCRIPTION.lstrip("/")]
    if serious:
        what = "; ".join(f"{finding.sentence} [{finding.code}]" for finding in serious)
        raise NotBidsError(what, bids_dir / serious[0].file, SKIP)
    return Validation(findings)


def find_validator() -> str | None:
    """Path of the validator: on PATH, or beside the Python that runs this; None if absent."""
    return shutil.which(PROGRAM) or shutil.which(PROGRAM, path=str(Path(sys.executable).parent))


def _link(bids_dir: Path, subjects: list[str], folder: Path) -> None:
    """Fill `folder` with links to the root files and the participants' folders that are there."""
    for entry in bids_dir.iterdir():
        lost = entry.name.startswith("sub-") and leads_nowhere(entry)
        if entry.name in LINKED_FOLDERS or not (entry.is_dir() or lost):
            (folder / entry.name).symlink_to(entry)
    for subject in subjects:
        source = bids_dir / f"sub-{subject}"
        if source.is_dir():
            (folder / source.name).symlink_to(source)


def _run(program: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The validator's JSON report, or a warning that there is none."""
    failed = "the dataset was not validated: the validator "
    try:
        done = subprocess.run(
            [program, str(folder), "--json", "--ignoreWarnings"],
            capture_output=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "NO_COLOR": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {}, f"{failed}did not end within {TIMEOUT_S} seconds"
    except OSError as error:
        return {}, f"{failed}cannot be started ({error.strerror})"
    try:
        report = json.loads(done.stdout)
        if not isinstance(report["issues"]["issues"], list):
            raise ValueError("no list of issues")
    except (ValueError, KeyError, TypeError):
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        return {}, f"{failed}ended with code {done.returncode}: {said[0] if said else 'no output'}"
    return report, ""


def _findings(report: dict[str, Any]) -> tuple[Finding, ...]:
    """Errors, those with the same code and detail as one, in the order of the files."""
    messages = report["issues"].get("codeMessages", {})
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for issue in report["issues"]["issues"]:
        if issue.get("severity") == "error":
            places = [issue["location"]] if issue.get("location") else issue.get("affects", ["/"])
            key = (str(issue.get("code", "")), str(issue.get("subCode", "")))
            groups.setdefault(key, []).extend((str(place), issue) for place in places)
    findings = []
    for (code, sub_code), places in groups.items():
        files = sorted({place for place, _ in places})
        issue = min(places, key=lambda entry: entry[0])[1]
        general = _first_sentence(messages.get(code, code.replace("_", " ").lower()))
        detail = _first_sentence(issue.get("issueMessage", ""))
        sentence = " – ".join(part for part in (general, sub_code, detail) if part)
        findings.append(Finding(code, files[0].lstrip("/"), sentence, len(files) - 1))
    return tuple(sorted(findings, key=lambda finding: (finding.file, finding.code)))


def _first_sentence(text: str) -> str:
    """The first sentence of the validator's text on one line, without the full stop."""
    line = " ".join(str(text).split())
    return line.partition(". ")[0].rstrip(".")
