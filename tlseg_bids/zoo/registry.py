"""Which models there are, and which of them comes first.

Cards are looked for in the package (`cards/*.toml`), in every folder given with ``--models`` and
in ``OUT_DIR/models``; in the latter two as ``NAME.toml`` or ``NAME/card.toml``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import DataError, NoInputError, TlsegError, UsageError
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import digest, read_card
from tlseg_bids.zoo.evidence import SCORE, Measured, compare, gain_on_parent, measured

LOG = logging.getLogger(__name__)
BUILTIN = Path(__file__).parent / "cards"


def load_cards(
    model_dirs: Sequence[Path] = (), out_dir: Path | None = None, builtin: Path = BUILTIN
) -> tuple[ModelCard, ...]:
    """Every card of the package, of the folders in `model_dirs` and of ``out_dir/models``.

    A damaged model in ``out_dir/models``, where nobody asked for it, is left out with a warning.

    Raises
    ------
    NoInputError
        If a folder of `model_dirs` does not exist or holds no card.
    DataError
        If a card of the package or of `model_dirs` is damaged, or two cards of one name differ.
    """
    files = sorted(builtin.glob("*.toml"))
    for folder in model_dirs:
        found = _card_files(folder)
        if not found:
            missing = "there is no such folder" if not folder.is_dir() else "it holds no model card"
            raise NoInputError(
                f"no model in '{folder}': {missing}", "--models",
                "give a folder with NAME.toml or NAME/card.toml",
            )  # fmt: skip
        files += found
    cards = [read_card(file) for file in files]
    if out_dir is not None:
        cards += _readable(_card_files(out_dir / "models"))
    return _without_duplicates(cards)


def find_card(cards: Iterable[ModelCard], name: str, where: str = "--model") -> ModelCard:
    """The card called `name`; `where` is the option or argument that named it.

    Raises
    ------
    UsageError
        If there is none; the message lists those there are.
    """
    by_name = {card.name: card for card in cards}
    if name not in by_name:
        known = ", ".join(sorted(by_name)) or "none"
        raise UsageError(
            f"no model is called '{name}'", where, f"known are: {known}; --models DIR adds a folder"
        )
    return by_name[name]


@cache
def finders() -> dict[str, ModelCard]:
    """The models of the program that find the brain themselves, by name; read once."""
    return {card.name: card for card in load_cards() if card.placed_by is None}


def placing_card(card: ModelCard) -> ModelCard | None:
    """The card of the model that finds the brain for another one, which comes with the program.

    Raises
    ------
    DataError
        If no such model comes with the program, or it does not find the brain itself.
    """
    if card.placed_by is None:
        return None
    able = finders()
    if card.placed_by not in able:
        raise DataError(
            f"no model of the program that finds the brain is called '{card.placed_by}'",
            f"{card.path or card.name}, [preprocess], placed_by", f"known are: {', '.join(able)}",
        )  # fmt: skip
    return able[card.placed_by]


def is_site_model(card: ModelCard) -> bool:
    """Whether a model was adapted by the user: it has a parent and is not the package's own."""
    return card.parent is not None and (card.path is None or card.path.parent != BUILTIN)


@dataclass(frozen=True)
class Standing:
    """Where a model stands among those whose domain holds a scan; a smaller `key` is better.

    Parameters
    ----------
    card : ModelCard
        The model.
    for_site : bool
        It was adapted by the user for such scans, was not measured to be worse than its parent, and
        none adapted from it was measured to be as good or better on the same scans.
    measured : Measured or None
        What it is compared by; None where it lacks the measurement, or there is none to compare.
    generation : int
        How many adaptations lie behind it.
    known : bool
        Whether anything was measured of it on such scans.
    """

    card: ModelCard
    for_site: bool = False
    measured: Measured | None = None
    generation: int = 0
    known: bool = False

    @property
    def key(self) -> tuple:
        """For the site, measured better, verified, narrower, adapted, measured at all, name."""
        return (
            not self.for_site,
            math.inf if self.measured is None else -self.measured.low,
            self.card.status != "verified",
            -self.card.specificity,
            -self.generation,
            not self.known,
            self.card.name,
        )


def standings(cards: Iterable[ModelCard], scan: Scan | None = None) -> list[Standing]:
    """Models, best first, for a scan that is in the domain of each.

    The order is that of `Standing.key`; it depends neither on the order given nor on the file
    system. Without a scan, nothing is compared by evidence and none is for the site.
    """
    cards = list(cards)
    by_name = {card.name: card for card in cards}
    found = {} if scan is None else compare(cards, scan)
    first = set() if scan is None else _for_site(cards, by_name, scan)
    return sorted(
        (
            Standing(
                card,
                card.name in first,
                found.get(card.name),
                generation(card, by_name),
                bool(measured(card, scan)),
            )
            for card in cards
        ),
        key=lambda standing: standing.key,
    )


def ranked(cards: Iterable[ModelCard]) -> list[ModelCard]:
    """The cards of `standings`, best first."""
    return [standing.card for standing in standings(cards)]


def most_robust(cards: Sequence[ModelCard], scan: Scan | None = None) -> ModelCard:
    """The card for a scan that is in nobody's domain.

    A model that was not adapted by the user; for the scan's suffix; for the most ages; the widest
    domain; verified; measured on the most scans; the highest mean Dice; the name.
    """
    suffix = None if scan is None else scan.suffix
    return min(
        cards,
        key=lambda card: (
            is_site_model(card),
            suffix not in (card.domain.suffixes or (suffix,)),
            card.domain.ages_left_out,
            card.specificity,
            card.status != "verified",
            -sum(row["n"] for row in card.evidence),
            -mean_score(card),
            card.name,
        ),
    )


def mean_score(card: ModelCard) -> float:
    """Mean Dice over the card's evidence, weighted by n; 0 where none was measured."""
    rows = [
        row
        for row in card.evidence
        if row["metric"].lower() == SCORE and math.isfinite(row["mean"]) and row["n"] > 0
    ]
    total = sum(row["n"] for row in rows)
    return sum(row["n"] * row["mean"] for row in rows) / total if total else 0.0


def generation(card: ModelCard, by_name: dict[str, ModelCard]) -> int:
    """How many adaptations lie between a card and its eldest known ancestor."""
    seen = [card.name]
    while card.parent in by_name and card.parent not in seen:
        card = by_name[card.parent]
        seen.append(card.name)
    return len(seen) - 1


def _for_site(cards: Iterable[ModelCard], by_name: dict[str, ModelCard], scan: Scan) -> set[str]:
    """Names of the models of `Standing.for_site`."""
    own = [card for card in cards if is_site_model(card) and not _worse(card, by_name, scan)]
    better = (card for card in own if gain_on_parent(card, scan) is not None)
    outdone = {card.parent for card in better if card.parent != card.name}
    return {card.name for card in own} - outdone


def _worse(card: ModelCard, by_name: dict[str, ModelCard], scan: Scan) -> bool:
    """Whether a model was measured to be worse than its parent.

    What the card says of both on the same scans decides, where it does; else what the two cards
    were measured on.
    """
    if card.parent not in by_name or card.parent == card.name:
        return False
    gain = gain_on_parent(card, scan)
    if gain is not None:
        return gain < 0
    found = compare([card, by_name[card.parent]], scan)
    return bool(found) and found[card.name].mean < found[card.parent].mean


def _card_files(folder: Path) -> list[Path]:
    """Cards of a folder, without what is hidden: a Mac leaves ``._NAME.toml`` on other drives."""
    found = sorted(folder.glob("*.toml")) + sorted(folder.glob("*/card.toml"))
    return [file for file in found if not file.relative_to(folder).parts[0].startswith(".")]


def _readable(files: Iterable[Path]) -> list[ModelCard]:
    """The cards that can be read; of each other one a warning says why not."""
    cards = []
    for file in files:
        try:
            cards.append(read_card(file))
        except TlsegError as error:
            LOG.warning("the model of %s is left out: %s", file, error)
    return cards


def _without_duplicates(cards: Iterable[ModelCard]) -> tuple[ModelCard, ...]:
    kept: dict[str, ModelCard] = {}
    for card in cards:
        first = kept.setdefault(card.name, card)
        if digest(first) != digest(card):
            raise DataError(
                f"two different models are called '{card.name}'", f"{first.path} and {card.path}",
                "rename one of them (the key name of its card)",
            )  # fmt: skip
    return tuple(kept.values())
