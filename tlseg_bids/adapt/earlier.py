"""An earlier adaptation of the same name: it is replaced only by one that is not worse.

The two are compared on those held-out parts of scans that the earlier one did not learn from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tlseg_bids.adapt.inspect import Answer, Inspected
from tlseg_bids.adapt.judge import Fold, Verdict, held_out_dice, mean, program_labels
from tlseg_bids.adapt.labels import LabelledScan
from tlseg_bids.adapt.reading import Reading
from tlseg_bids.adapt.record import CARD, RECORD, Tested
from tlseg_bids.bids.tables import read_json
from tlseg_bids.errors import TlsegError, UsageError, amount, listed
from tlseg_bids.flow import Job
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.weights import load_weights

LOG = logging.getLogger(__name__)


def check_own(folder: Path, cards: Iterable[ModelCard]) -> None:
    """Refuse a name that belongs to a model which no adaptation wrote.

    Parameters
    ----------
    folder : Path
        ``OUT/models/SITE``.
    cards : iterable of ModelCard
        The models there are.

    Raises
    ------
    UsageError
        If a model has the name and lies elsewhere, or in the folder without the record of an
        adaptation that was kept.
    """
    record, problem = read_json(folder / RECORD)
    ours = not problem and record.get("Kept") is True
    found = [c.path for c in cards if c.name == folder.name and c.path != folder / CARD]
    if (folder / CARD).is_file() and not ours:
        found.append(folder / CARD)
    if found:
        raise UsageError(
            f"a model named '{folder.name}' is there already, and no adaptation here wrote it",
            found[0], "it would be replaced; choose another --name",
        )  # fmt: skip


def earlier_model(folder: Path) -> ModelCard | None:
    """The card of the earlier adaptation of a name; None if there is none that can be read."""
    try:
        return read_card(folder / CARD)
    except TlsegError:
        return None


def comparable(earlier: ModelCard, reading: Reading) -> bool:
    """Whether a model answers in the protocol that the labels are read in."""
    own, target = earlier.protocol_of(earlier.protocol), reading.target
    return own.table[["index", "name"]].equals(target.table[["index", "name"]])


def learned(card: ModelCard, scan: LabelledScan) -> bool:
    """Whether a model learned from a scan, by name or by the hash of scan and labels."""
    rows = (row.get("subjects", {}) for row in card.training.get("data", ()))
    known = [row for row in rows if isinstance(row, dict)]
    return any(scan.name in row or scan.sha256 in row.values() for row in known)


def known_to_base(base: ModelCard, scans: Iterable[LabelledScan]) -> tuple[str, ...]:
    """A sentence where the base learned from scans that are held out, by its card."""
    names = [one.name for one in scans if learned(base, one)]
    if not names:
        return ()
    better = f"'{base.parent}'" if base.parent else "a model that has not seen them"
    return (
        f"The card of '{base.name}' names {listed(names)} among the scans that it learned from: "
        "if these are the same persons, their Dice before and after is too kind, and "
        f"{better} is the better --base.",
    )


@dataclass(frozen=True, eq=False)
class Rival:
    """The earlier model at work."""

    card: ModelCard
    model: Model
    answer: Answer

    def dice(self, one: Inspected, job: Job, fold: Fold) -> dict[int, float] | None:
        """Dice of a held-out part as `judge.held_out_dice`; None if it learned from the scan."""
        if learned(self.card, one.labelled):
            return None
        labels = program_labels(self.model, one, replace(job, card=self.card), self.answer)
        return held_out_dice(labels, one, fold)


def find_rival(
    earlier: ModelCard | None, job: Job, reading: Reading, answer: Answer
) -> Rival | None:
    """The earlier model, on the job's device, where it can be loaded and labels the same."""
    if earlier is None or not comparable(earlier, reading):
        return None
    try:
        tensors = load_weights(earlier, offline=True)
        return Rival(earlier, load_model(earlier, tensors, job.device), answer)
    except TlsegError as error:
        LOG.warning("the earlier model cannot be loaded, so it is not compared: %s", error)
        return None


def against_earlier(
    verdict: Verdict, earlier: ModelCard | None, tested: Sequence[Tested]
) -> Verdict:
    """The verdict where there is an earlier adaptation of the same name.

    Parameters
    ----------
    verdict : Verdict
        On base and child.
    earlier : ModelCard or None
        The earlier adaptation.
    tested : sequence of Tested
        The held-out parts.
    """
    if earlier is None:
        return verdict
    name = f"the earlier model '{earlier.name}' {earlier.version}"
    if not verdict.kept:
        return replace(verdict, reason=f"{verdict.reason} T{name[1:]} stays as it was.")
    both = [one for one in tested if one.earlier]
    if not both:
        why = (
            "they cannot be compared, as it learned from every held-out scan, labels other "
            "structures or cannot be loaded"
        )
        return replace(verdict, reason=f"{verdict.reason} It replaces {name}: {why}.")
    now = float(np.mean([mean(one.child) for one in both]))
    before = float(np.mean([mean(one.earlier) for one in both]))
    parts = amount(len(both), "held-out part")
    figures = (
        f"on {parts} that the earlier one did not learn from it has "
        f"{before:.3f} mean Dice, the newly adapted model {now:.3f}"
    )
    if now >= before:
        return replace(verdict, reason=f"{verdict.reason} It replaces {name}: {figures}.")
    gain = f"The newly adapted model gains {verdict.gain:+.3f} mean Dice on the base"
    reason = f"T{name[1:]} stays as it was: {figures}. {gain}."
    return replace(verdict, kept=False, share=0.0, reason=reason)
