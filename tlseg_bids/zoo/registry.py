"""Which models there are, and which of them comes first.

Cards are looked for in the package (`cards/*.toml`), in every folder given with ``--models`` and
in ``OUT_DIR/models``; in the latter two as ``NAME.toml`` or ``NAME/card.toml``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import digest, read_card

BUILTIN = Path(__file__).parent / "cards"
SCORE = "dice"


def load_cards(
    model_dirs: Sequence[Path] = (), out_dir: Path | None = None, builtin: Path = BUILTIN
) -> tuple[ModelCard, ...]:
    """Every card of the package, of the folders in `model_dirs` and of ``out_dir/models``.

    Raises
    ------
    NoInputError
        If a folder of `model_dirs` does not exist or holds no card.
    DataError
        If a card is damaged, or two cards of one name differ.
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
    if out_dir is not None:
        files += _card_files(out_dir / "models")
    return _without_duplicates(read_card(file) for file in files)


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


def ranked(cards: Iterable[ModelCard]) -> list[ModelCard]:
    """Cards, best first, for a scan that is in the domain of each.

    Verified before experimental; then the narrower domain (`ModelCard.specificity`); then an
    adapted model before the one it was adapted from; then the higher mean Dice of its evidence,
    weighted by its n; then the name, so that the order never depends on the file system.
    """
    cards = list(cards)
    by_name = {card.name: card for card in cards}
    return sorted(
        cards,
        key=lambda card: (
            card.status != "verified",
            -card.specificity,
            -generation(card, by_name),
            -mean_score(card),
            card.name,
        ),
    )


def most_robust(cards: Sequence[ModelCard]) -> ModelCard:
    """The card for a scan that is in nobody's domain: the widest domain, then the most evidence."""
    return min(
        cards,
        key=lambda card: (
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


def _card_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml")) + sorted(folder.glob("*/card.toml"))


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
