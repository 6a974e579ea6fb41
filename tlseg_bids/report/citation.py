"""Whom to cite for all labels of an output folder, whichever run made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlseg_bids import __version__
from tlseg_bids.bids.root import made_by
from tlseg_bids.report.methods import card_told, methods_text
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.registry import load_cards

NOT_AT_HAND = "Its card is not at hand: cite what it names, too"


def citation(out_dir: Path, used: Sequence[ModelCard], model_dirs: Sequence[Path] = ()) -> str:
    """The methods text of every model that dataset_description.json names, for `CITATION.md`.

    Parameters
    ----------
    out_dir : Path
        Root of the derivative dataset, whose root files this run has written.
    used : sequence of ModelCard
        The models of this run.
    model_dirs : sequence of Path
        Folders with cards, beside those of the program and of `out_dir`. Of a model whose card is
        in none, what is told there is told; another version of it builds on the same work.

    Raises
    ------
    NoInputError, DataError
        As `tlseg_bids.zoo.registry.load_cards`.
    """
    known = load_cards(model_dirs, out_dir)
    versions, models = made_by(out_dir)
    exact = {(c.name, str(c.version), c.weights.sha256): c for c in (*known, *used)}
    by_name = {c.name: c for c in (*known, *used)}
    cards = []
    for model in models:
        card = exact.get((model["name"], model["version"], model["sha256"]))
        cards.append(card or _told(model, by_name.get(model["name"])))
    return methods_text(cards, " and ".join(versions) or __version__)


def _told(model: dict[str, str], namesake: ModelCard | None) -> ModelCard:
    model = {"status": "", **model}
    if namesake is None:
        return card_told(model, "", summary=NOT_AT_HAND)
    return card_told(model, namesake.protocol, citations=namesake.citations)
