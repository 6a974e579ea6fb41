"""What an adaptation leaves behind: `OUT/models/SITE/` with card, weights, curves, page and record.

Everything is written in a folder beside it, which takes its place at the end. The record
(``adaptation.json``) holds the content key by which a second run knows that there is nothing left
to do. Where the base stays there is no card, so no later run picks the child by mistake; where an
earlier adaptation of the name stays, page and record lie in ``not-kept`` beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save

from tlseg_bids import __version__
from tlseg_bids.adapt.judge import Verdict, mean
from tlseg_bids.adapt.labels import LabelledScan
from tlseg_bids.adapt.reading import Reading
from tlseg_bids.bids.atomic import atomic, write_json, write_text
from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.tables import read_json
from tlseg_bids.errors import amount
from tlseg_bids.labels.protocol import table_name
from tlseg_bids.train.adaptation import Adaptation
from tlseg_bids.train.recipe import code_version
from tlseg_bids.zoo.assemble import PROOF
from tlseg_bids.zoo.calibration import Calibration
from tlseg_bids.zoo.card import Domain, ModelCard, age_in_years
from tlseg_bids.zoo.card_file import file_sha256, read_card, write_card
from tlseg_bids.zoo.licence import all_of
from tlseg_bids.zoo.proof import make_proof
from tlseg_bids.zoo.weights import describe

RECORD = "adaptation.json"
CARD = "card.toml"
PAGE = "adaptation.html"
CURVES = "curves"
NOT_KEPT = "not-kept"
KEY = "ContentKey"
SITE_LICENCE = "not stated: for use at the site"
AGE_MARGIN = 0.15
PICTURE = (720, 400)
MARGIN_PX = 48


@dataclass(frozen=True, eq=False)
class Tested:
    """One held-out part: Dice per channel of parent and child, and the labels for the page.

    It shows a labelled structure at least; parts that show none are not judged.
    `earlier` is that of an earlier adaptation of the same name that did not learn from the scan.
    """

    scan: LabelledScan
    part: str
    base: dict[int, float]
    child: dict[int, float]
    base_channels: np.ndarray
    child_channels: np.ndarray
    earlier: dict[int, float] | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything that is recorded of an adaptation."""

    site: str
    key: str
    base: ModelCard
    reading: Reading
    how: Adaptation
    scans: tuple[LabelledScan, ...]
    refused: tuple[Any, ...]
    unlabelled: tuple[str, ...]
    reasons: tuple[str, ...]
    tested: tuple[Tested, ...]
    verdict: Verdict
    steps: int
    seconds: float
    seed: int
    curves: dict[str, list[tuple[float, ...]]]
    heads: tuple[str, ...]
    segmenter: dict[str, Any]
    earlier: ModelCard | None = None


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of an earlier run with the same key whose files are all there; else None."""
    for place in (folder, folder / NOT_KEPT):
        record, problem = read_json(place / RECORD)
        files = [place / name for name in record.get("Files", [])] if not problem else []
        if files and record.get(KEY) == key and all(file.is_file() for file in files):
            return record
    return None


def write_model(
    folder: Path,
    outcome: Outcome,
    base: Mapping[str, torch.Tensor],
    child: Mapping[str, torch.Tensor],
) -> ModelCard:
    """Write weights and card of a child that is kept.

    Parameters
    ----------
    folder : Path
        What becomes ``OUT/models/SITE``.
    base : mapping
        The parent's tensors, and the atlas of a new head; all but the segmenter is taken over.
    child : mapping
        Parameters of the child's segmenter.
    """
    anew = ("segmenter.", PROOF)
    tensors = {k: v.contiguous() for k, v in base.items() if not k.startswith(anew)}
    kind = next(value.dtype for key, value in base.items() if key.startswith("segmenter."))
    tensors |= {f"segmenter.{k}": v.to(kind).contiguous() for k, v in child.items()}
    tables = _write_tables(folder, outcome)
    licence = joined_licence(outcome.base.weights.licence, site_licences(outcome.scans))
    version = _version(outcome.earlier)
    draft = _card(outcome, outcome.base.weights, version)
    draft = replace(draft, tables=tables, path=folder / CARD)
    tensors |= make_proof(draft, tensors)
    file = folder / f"{outcome.site}.safetensors"
    with atomic(file) as stream:
        stream.write(save(dict(sorted(tensors.items()))))
    write_card(replace(draft, weights=describe(file, licence, folder / CARD)), folder / CARD)
    return read_card(folder / CARD)


def _write_tables(folder: Path, outcome: Outcome) -> dict[str, str]:
    """Write the tables of heads in a site's own protocol; their SHA-256 by the protocol's name."""
    target = outcome.reading.target
    texts = {name: file.read_text("utf-8") for name, file in outcome.base.own_tables.items()}
    if outcome.reading.new_head:
        texts[target.name] = target.table.to_csv(sep="\t", index=False)
    files = {name: write_text(folder / table_name(name), text) for name, text in texts.items()}
    return {name: file_sha256(file) for name, file in files.items()}


def write_record(folder: Path, outcome: Outcome, files: Sequence[Path]) -> Path:
    """Write curves and, last of all, the record."""
    made = [*files, *_write_curves(folder, outcome.curves)]
    names = _names(outcome.reading)
    content = {
        "Site": outcome.site, "Base": f"{outcome.base.name} {outcome.base.version}",
        "Kept": outcome.verdict.kept, "Reason": outcome.verdict.reason,
        "Share": outcome.verdict.share, "JudgedShare": outcome.verdict.judged,
        "Gain": outcome.verdict.gain, "Forgotten": outcome.verdict.forgotten,
        "Earlier": _earlier(outcome),
        "Recipe": outcome.how.name, "Reasons": outcome.reasons, "Steps": outcome.steps,
        "Seconds": round(outcome.seconds, 1), "Version": __version__,
        "Made": datetime.now(UTC).isoformat(timespec="seconds"),
        "Labels": outcome.reading.notes,
        "Scans": [
            {"Scan": one.name, "Labels": one.file.name, "SHA256": one.sha256, "Notes": one.notes}
            for one in outcome.scans
        ],
        "Refused": [
            {"Name": one.name, "What": one.what, "Hint": one.hint} for one in outcome.refused
        ],
        "Unlabelled": outcome.unlabelled,
        "HeldOut": [
            {
                "Scan": one.scan.name, "Part": one.part, "DiceBefore": mean(one.base),
                "DiceAfter": mean(one.child),
                "Structures": {
                    names[c]: [round(one.base[c], 4), round(one.child[c], 4)] for c in one.base
                },
            }
            for one in outcome.tested
        ],
        "Files": [file.relative_to(folder).as_posix() for file in made],
        KEY: outcome.key,
    }  # fmt: skip
    return write_json(folder / RECORD, content)


def _earlier(outcome: Outcome) -> dict[str, Any] | None:
    """What became of the earlier model of the name, and both figures where they were compared."""
    if outcome.earlier is None:
        return None
    both = [one for one in outcome.tested if one.earlier]
    return {
        "Version": outcome.earlier.version, "Stays": not outcome.verdict.kept, "HeldOut": len(both),
        "DiceEarlier": float(np.mean([mean(one.earlier) for one in both])) if both else None,
        "DiceNow": float(np.mean([mean(one.child) for one in both])) if both else None,
    }  # fmt: skip


def per_structure(outcome: Outcome) -> list[dict[str, Any]]:
    """A row per structure: mean Dice before and after over the held-out parts, and how many."""
    names, rows = _names(outcome.reading), []
    for channel in sorted({c for one in outcome.tested for c in one.base}):
        parts = [one for one in outcome.tested if channel in one.base]
        before = float(np.mean([one.base[channel] for one in parts]))
        after = float(np.mean([one.child[channel] for one in parts]))
        rows.append({"name": names[channel], "before": before, "after": after, "n": len(parts)})
    return rows


def site_licences(scans: Sequence[LabelledScan]) -> list[str]:
    """Licences that the datasets of images and labels state; `SITE_LICENCE` where one does not."""
    found = set()
    for root in {folder for one in scans for folder in (one.scan.bids_dir, _root(one.file))}:
        content, _ = read_json(root / "dataset_description.json")
        stated = " ".join(str(content.get("License", "")).split())
        found.add(stated or SITE_LICENCE)
    return sorted(found)


def dataset_name(scans: Sequence[LabelledScan], site: str) -> str:
    """Name of the scans' dataset; the site's where it has none."""
    content, _ = read_json(scans[0].scan.bids_dir / "dataset_description.json")
    return str(content.get("Name", site))


def joined_licence(parent: str, site: Sequence[str]) -> str:
    """Every licence of parent and site once, joined with AND; alternatives stand in brackets."""
    parts = all_of([parent, *site])
    plain = [part for part in parts if part != SITE_LICENCE]
    return " AND ".join([*plain, *([SITE_LICENCE] if SITE_LICENCE in parts else [])])


def domain_of(scans: Sequence[Scan], base: Domain) -> Domain:
    """The scans that the child is meant for: those like the labelled ones.

    Suffixes and contrast agent are theirs, the ages reach `AGE_MARGIN` of the oldest (at least a
    month) beyond theirs where all are known; the rest is the parent's.
    """
    suffixes = tuple(sorted({scan.suffix for scan in scans}))
    agents = {bool(scan.contrast_agent) for scan in scans}
    agent = next(iter(agents)) if len(agents) == 1 else None
    if base.contrast_agent is None and agent is False:
        agent = None
    stripped = {scan.skull_stripped for scan in scans}
    years = [age_in_years(scan.age) for scan in scans]
    limits = base.age_years
    if all(age is not None for age in years):
        margin = max(AGE_MARGIN * max(years), 1 / 12)
        limits = (max(0.0, round(min(years) - margin, 2)), round(max(years) + margin, 2))
    return replace(
        base, suffixes=suffixes, contrast_agent=agent, age_years=limits,
        skull_stripped=next(iter(stripped)) if len(stripped) == 1 else base.skull_stripped,
    )  # fmt: skip


def asked_as_child(card: ModelCard, mirrored: bool) -> ModelCard:
    """The card with the strategy that a child is asked by.

    A child learns in patches that lie anywhere, so it is not asked with halves, and it is shown
    the mirror image of all instead; never where its labels do not hold there (`mirrored`).
    """
    strategy = {key: value for key, value in card.strategy.items() if key != "halves"}
    turned = bool(strategy.get("mirror", False) or card.strategy.get("halves", False))
    if turned or "mirror" in strategy:
        strategy["mirror"] = turned and mirrored
    return replace(card, strategy=strategy)


def _card(outcome: Outcome, weights: Any, version: str) -> ModelCard:
    """The child's card."""
    base = asked_as_child(outcome.base, outcome.reading.mirrored)
    verdict, count = outcome.verdict, len(outcome.scans)
    after = [mean(one.child) for one in outcome.tested]
    before = float(np.mean([mean(one.base) for one in outcome.tested]))
    spread = float(np.std(after, ddof=1)) if len(after) > 1 else 0.0
    persons = len({one.scan.subject for one in outcome.scans})
    how = (
        "halves of one brain, each held out once" if persons == 1
        else "held-out persons in cross-validation"
    )  # fmt: skip
    dataset = dataset_name(outcome.scans, outcome.site)
    row = {
        "dataset": f"{outcome.site}: {dataset}",
        "licence": " AND ".join(all_of(site_licences(outcome.scans))),
        "subjects": {one.name: one.sha256 for one in outcome.scans},
    }
    segmenter = {
        "recipe": outcome.how.name, "seed": outcome.seed, "steps": outcome.steps,
        "learning_rate": outcome.how.learning_rate, "seconds": round(outcome.seconds),
        "started_from": [f"{base.name} {base.version}"], "code": code_version(),
        "share_of_the_way_from_the_parent": verdict.share, "gain": round(verdict.gain, 4),
        "forgotten": round(verdict.forgotten, 4), "reasons": list(outcome.reasons),
        "per_structure": per_structure(outcome), "parent_sha256": base.weights.sha256,
        "folds": [f"{one.part}: {mean(one.base):.4f} to {mean(one.child):.4f}"
                  for one in outcome.tested],
    }  # fmt: skip
    return replace(
        base,
        name=outcome.site,
        version=version,
        summary=(
            f"Adapted from {base.name} {base.version} to "
            f"{amount(count, 'labelled scan')} of {dataset}."
        ),
        domain=domain_of([one.scan for one in outcome.scans], base.domain),
        protocol=outcome.heads[0],
        heads=outcome.heads,
        networks={**base.networks, "segmenter": outcome.segmenter},
        weights=weights,
        training={
            **base.training,
            "data": [*base.training.get("data", []), row],
            "segmenter": segmenter,
        },
        evidence=({
            "dataset": dataset, "n": len(after), "metric": "dice", "mean": float(np.mean(after)),
            "sd": spread, "how": f"{how}; the base has {before:.3f} on the same",
            "suffixes": sorted({one.scan.suffix for one in outcome.scans}), "parent_mean": before,
        },),
        parent=base.name,
        calibration=Calibration(),
        path=None,
    )  # fmt: skip


def _version(earlier: ModelCard | None) -> str:
    """One more than the version of the model that is replaced."""
    known = earlier is not None and earlier.version.isdecimal()
    return str(int(earlier.version) + 1) if known else "1"


def _names(reading: Reading) -> list[str]:
    return [str(name) for name in reading.target.table["name"]]


def _root(file: Path) -> Path:
    """Root of the dataset that holds a file: the nearest folder with a description."""
    for folder in file.parents:
        if (folder / "dataset_description.json").is_file():
            return folder
    return file.parent


def _write_curves(folder: Path, curves: Mapping[str, Sequence[tuple[float, ...]]]) -> list[Path]:
    """Loss and soft Dice against the step as a table and a picture."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(("run", "step", "seconds", "loss", "soft_dice"))
    for name, rows in curves.items():
        for step, seconds, loss, soft_dice in rows:
            table.writerow((name, step, f"{seconds:.1f}", f"{loss:.5f}", f"{soft_dice:.5f}"))
    tsv = write_text(folder / f"{CURVES}.tsv", text.getvalue())
    picture = curve_picture(curves)
    with atomic(folder / f"{CURVES}.png") as stream:
        picture.save(stream, "PNG")
    return [tsv, folder / f"{CURVES}.png"]


def curve_picture(curves: Mapping[str, Sequence[tuple[float, ...]]]) -> Image.Image:
    """Soft Dice of every run against its step; the final run is drawn bold."""
    picture = Image.new("RGB", PICTURE, "white")
    draw = ImageDraw.Draw(picture)
    width, height = (side - 2 * MARGIN_PX for side in PICTURE)
    steps = max((row[0] for rows in curves.values() for row in rows), default=1)
    for tenth in range(0, 11, 2):
        y = MARGIN_PX + height * (1 - tenth / 10)
        draw.line([(MARGIN_PX, y), (MARGIN_PX + width, y)], fill="#d9dee5")
        draw.text((12, y - 6), f"{tenth / 10:.1f}", fill="#5a6675")
    draw.text((MARGIN_PX, 16), "soft Dice of the examples against the step", fill="#1c2430")
    draw.text((MARGIN_PX + width - 24, MARGIN_PX + height + 8), str(int(steps)), fill="#5a6675")
    for name, rows in curves.items():
        points = [
            (MARGIN_PX + width * row[0] / steps, MARGIN_PX + height * (1 - min(row[3], 1)))
            for row in rows
        ]
        final = name == "final"
        if len(points) > 1:
            colour = "#0b5cad" if final else "#9db8d6"
            draw.line(points, fill=colour, width=3 if final else 1)
    return picture
