"""Files at the root of the derivatives: what the dataset is, how to read it, who made it."""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import (
    as_json,
    check_inside,
    clean_cell,
    update_text,
    write_text,
    writing_failed,
)
from tlseg_bids.bids.lock import hold
from tlseg_bids.bids.source import (
    TITLE,
    holds_none_of,
    identity_of,
    recorded_identity,
    source_dataset,
)
from tlseg_bids.bids.tables import read_json
from tlseg_bids.errors import CannotCreateError, UsageError

PROGRAM = "tlseg"
MODEL = "model "
WEIGHTS_TOLD = re.compile(r"weights with sha256 (?P<sha256>\S+), (?P<licence>.+)")
Mark = tuple[str, str, str]
BIDS_VERSION = "1.10.0"
CONTAINER_VARIABLE = "TLSEG_CONTAINER"
IGNORED = ("*.html", "figures", "group_*", "models", "logs", "compat", "*_xfm.*")
DESCRIPTIONS = {
    "brain": "Mask of the brain: every voxel that carries a label, and the holes among them",
    "uncertainty": "Entropy of labels and background over its largest value, 0 to 1",
    "volumes": "Volume and confidence of every label, one row each",
}
README = """# Structures of the brain, labelled by tlseg

Each scan has its own results on its own voxel grid:

- `*_space-T1w_seg-PROTOCOL_dseg.nii.gz` (`space-T2w` for a T2w scan): the labels; what each number
  means is in `seg-PROTOCOL_dseg.tsv`. The JSON beside it says which model made it and why, what
  was checked, and what to be careful about.
- `*_desc-volumes_dseg.tsv`: volume and confidence of every label.
- `*_desc-brain_mask.nii.gz`: the brain mask.
- `sub-*.html`: a report per participant; open it in a browser.
- `logs/`: what was planned, what was done, and how to cite it (`CITATION.md`).

`bids:raw:` in the JSON files is the dataset that `DatasetLinks` in `dataset_description.json`
names. A scan counts as finished when the JSON beside its labels is there; start the same command
again after an interruption, and only what is missing is done.
"""


def write_root_files(
    out_dir: Path, bids_dir: Path, cards: tuple[Any, ...], protocols: Mapping[str, pd.DataFrame]
) -> None:
    """Write or update dataset_description.json, the tables, README.md and .bidsignore.

    What another run wrote is kept: models, and this version of the program where there are any, are
    added to ``GeneratedBy``, lines to .bidsignore, and an existing README.md is left alone.

    Raises
    ------
    UsageError
        If the output folder is the BIDS folder itself.
    CannotCreateError
        If it holds another program's dataset or results of another dataset, or cannot be made.
    LockedError
        If another run writes these files for more than a minute.
    """
    if out_dir.resolve() == bids_dir.resolve():
        raise UsageError(
            "the output folder is the BIDS folder itself", out_dir,
            f"choose another, such as {bids_dir / 'derivatives' / PROGRAM}",
        )  # fmt: skip
    with hold_root(out_dir):
        old = check_root(out_dir, bids_dir)
        description = _description(out_dir, bids_dir, cards, old)
        update_text(out_dir / "dataset_description.json", as_json(description))
        if not (out_dir / "README.md").exists():
            write_text(out_dir / "README.md", README)
        rows = [("desc_id", "description")]
        rows += [(f"desc-{name}", text) for name, text in DESCRIPTIONS.items()]
        update_text(out_dir / "descriptions.tsv", _tsv(rows))
        for name, table in protocols.items():
            update_text(out_dir / f"seg-{name}_dseg.tsv", label_table(table))
        _write_bidsignore(out_dir / ".bidsignore")


def check_root(out_dir: Path, bids_dir: Path) -> dict[str, Any]:
    """The dataset_description.json that is there, empty if none is; nothing is written.

    Raises
    ------
    CannotCreateError
        If the folder holds another program's dataset or results of another dataset.
    """
    old = _existing(out_dir)
    _check_source(out_dir, bids_dir)
    return old


def hold_root(out_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Hold this around writing what all runs of an output folder share.

    Entering it raises `LockedError` if another run does so for more than a minute.
    """
    check_inside(out_dir / "logs" / "locks", out_dir)
    return hold(out_dir / "logs" / "locks" / "root.lock", "the root files are being written", 60)


def made_by(out_dir: Path) -> tuple[list[str], list[dict[str, str]]]:
    """What dataset_description.json says of all runs that labelled scans.

    Returns
    -------
    versions : list of str
        Of the program, the latest first.
    models : list of dict
        ``name``, ``version``, ``sha256`` and ``licence`` of each model, the earliest first.
    """
    makers = _makers(read_json(out_dir / "dataset_description.json")[0])
    own = [maker for maker in makers if maker.get("Name") == PROGRAM]
    versions = dict.fromkeys(str(maker["Version"]) for maker in own if "Version" in maker)
    models = []
    for maker in makers:
        name = str(maker.get("Name", ""))
        weights = WEIGHTS_TOLD.fullmatch(str(maker.get("Description", "")))
        if name.startswith(MODEL) and weights:
            version = str(maker.get("Version", ""))
            models.append({"name": name[len(MODEL) :], "version": version, **weights.groupdict()})
    return list(versions), models


def forget_replaced(out_dir: Path, bids_dir: Path, cards: tuple[Any, ...]) -> None:
    """Take out of ``GeneratedBy`` the models and versions whose labels have all been replaced.

    Those of this run (`cards`) stay, and all do where a sidecar that may name them cannot be read.
    To be called with `hold_root` held, when the run has labelled what it could.

    Raises
    ------
    CannotCreateError, OutputError
        If the file cannot be written.
    """
    description = _description(out_dir, bids_dir, cards, _existing(out_dir))
    makers = description["GeneratedBy"]
    own = {(PROGRAM, __version__, "")}
    own |= {(f"{MODEL}{c.name}", str(c.version), c.weights.sha256) for c in cards}
    doubtful = {_mark(one) for one in makers} - own
    left = doubtful - _named_by_labels(out_dir, doubtful)
    description["GeneratedBy"] = [one for one in makers if _mark(one) not in left]
    update_text(out_dir / "dataset_description.json", as_json(description))


def _mark(maker: dict[str, Any]) -> Mark:
    """What tells a maker from others: name, version and, of a model, the hash of its weights."""
    weights = WEIGHTS_TOLD.fullmatch(str(maker.get("Description", "")))
    sha256 = weights["sha256"] if weights else ""
    return str(maker.get("Name")), str(maker.get("Version")), sha256


def _named_by_labels(out_dir: Path, wanted: set[Mark]) -> set[Mark]:
    """Those of some makers that the sidecar of a label image names; read until all are found."""
    found: set[Mark] = set()
    for sidecar in out_dir.glob("sub-*/**/*_dseg.json"):
        if wanted <= found:
            break
        content, problem = read_json(sidecar)
        if problem:
            return wanted
        found.add((PROGRAM, str(content.get("ProgramVersion")), ""))
        if isinstance(model := content.get("Model"), dict):
            name, version = f"{MODEL}{model.get('Name')}", str(model.get("Version"))
            found.add((name, version, str(model.get("Sha256"))))
    return wanted & found


def _existing(out_dir: Path) -> dict[str, Any]:
    """The description that is there; refused if it is another program's."""
    path = out_dir / "dataset_description.json"
    if not path.exists():
        return {}
    old, problem = read_json(path)
    makers = [maker.get("Name") for maker in _makers(old)]
    if problem or PROGRAM not in makers:
        who = ", ".join(str(name) for name in makers) or problem or "not by this program"
        raise CannotCreateError(
            f"the output folder holds another dataset ({who})", out_dir,
            "choose an empty folder, so that its files are not mixed with these",
        )  # fmt: skip
    return old


def _check_source(out_dir: Path, bids_dir: Path) -> None:
    """Refuse results of another dataset, whose sidecars would be led astray.

    One that was moved or is a copy is another only if its description says so. At the same path, or
    where the one before is gone, another description may be an edited one: it is another dataset
    if none of the labelled scans is there, as in a container that calls each of them /bids.
    """
    before, new = source_dataset(out_dir), identity_of(bids_dir)
    here = before is None or before.samefile(bids_dir)
    old = recorded_identity(out_dir) if here else identity_of(before)
    if old.may_be(new) or (here and not holds_none_of(bids_dir, out_dir)):
        return
    where = "" if here else f" in {before.resolve()}"
    raise CannotCreateError(
        f"the output folder holds results of another dataset, '{old.name}'{where}",
        out_dir,
        f"choose another folder for '{new.name}', so that scans of one name do not replace each "
        "other; if both are the same dataset, give them the same Name and DatasetDOI",
    )


def _makers(description: dict[str, Any]) -> list[dict[str, Any]]:
    makers = description.get("GeneratedBy")
    return [m for m in makers if isinstance(m, dict)] if isinstance(makers, list) else []


def _description(out_dir: Path, bids_dir: Path, cards, old: dict[str, Any]) -> dict[str, Any]:
    raw, _ = read_json(bids_dir / "dataset_description.json")
    program: dict[str, Any] = {
        "Name": PROGRAM, "Version": __version__,
        "Description": "Labels the structures of the brain in T1w and T2w scans",
    }  # fmt: skip
    container = _container()
    if container:
        program["Container"] = container
    programs = [maker for maker in _makers(old) if maker.get("Name") == PROGRAM]
    if cards or not programs:  # without cards nothing is labelled
        programs = [program, *(maker for maker in programs if maker != program)]
    models = [maker for maker in _makers(old) if str(maker.get("Name", "")).startswith(MODEL)]
    for card in cards:
        entry = {
            "Name": f"{MODEL}{card.name}", "Version": str(card.version),
            "Description": f"weights with sha256 {card.weights.sha256}, {card.weights.licence}",
        }  # fmt: skip
        if entry not in models:
            models.append(entry)
    return {
        "Name": TITLE.format(raw.get("Name", bids_dir.name)),
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [*programs, *models],
        **source_of(out_dir, bids_dir),
        "HowToAcknowledge": "See logs/CITATION.md",
    }


def source_of(out_dir: Path, bids_dir: Path) -> dict[str, Any]:
    """``SourceDatasets`` and ``DatasetLinks`` of a dataset in `out_dir` made of `bids_dir`.

    The link is relative, so that both can be moved together.
    """
    raw, _ = read_json(bids_dir / "dataset_description.json")
    # The system leaves a linked folder by where it really lies, so the way up begins there.
    link = quote(Path(os.path.relpath(bids_dir, out_dir.resolve())).as_posix())
    source = {"URL": link}
    for key, field in (("DOI", "DatasetDOI"), ("Version", "DatasetVersion")):
        if isinstance(raw.get(field), str):
            source[key] = raw[field]
    return {"SourceDatasets": [source], "DatasetLinks": {"raw": link}}


def _container() -> dict[str, str]:
    """Type, tag and URI of the image, from ``TLSEG_CONTAINER=docker:registry/name:tag``."""
    value = os.environ.get(CONTAINER_VARIABLE, "").strip()
    if not value:
        return {}
    kind, colon, tag = value.partition(":")
    if not colon or "/" in kind:
        kind, tag = "docker", value
    return {"Type": kind, "Tag": tag, "URI": f"{kind}://{tag}"}


def label_table(table: pd.DataFrame) -> str:
    """The look-up table of a protocol's labels, as text.

    Parameters
    ----------
    table : DataFrame
        `LabelProtocol.table`.

    Returns
    -------
    str
        ``index name abbreviation color mapping``, a line per label; `mapping` is the index in the
        standard's own small label list.
    """
    text = (resources.files("tlseg_bids.bids") / "tissues.tsv").read_text(encoding="utf-8")
    mapping = {
        row["group"]: row["mapping"] for row in csv.DictReader(text.splitlines(), delimiter="\t")
    }
    rows: list[tuple[Any, ...]] = [("index", "name", "abbreviation", "color", "mapping")]
    for _, row in table.iterrows():
        tissue = mapping.get(row["group"], "n/a")
        rows.append((row["index"], row["name"], row["abbreviation"], row["color"], tissue))
    return _tsv(rows)


def _tsv(rows) -> str:
    return "".join("\t".join(clean_cell(cell) for cell in row) + "\n" for row in rows)


def _write_bidsignore(path: Path) -> None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            raise writing_failed(error, path) from error
        lines = []
    missing = [line for line in IGNORED if line not in lines]
    if missing:
        write_text(path, "\n".join([*lines, *missing]) + "\n")
