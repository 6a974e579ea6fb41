"""Which model serves a scan, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlseg_bids.bids.scan import Scan
from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.flow import Refusal
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.registry import BUILTIN, find_card, most_robust, ranked
from tlseg_bids.zoo.weights import unavailable


@dataclass(frozen=True)
class Choice:
    """The model of a scan, why it was chosen, every other model with why not, and warnings."""

    card: ModelCard
    reason: str
    refused: tuple[Refusal, ...]
    warnings: tuple[str, ...] = ()


def usable_cards(
    cards: Sequence[ModelCard], config: Config
) -> tuple[tuple[ModelCard, ...], tuple[Refusal, ...]]:
    """Cards this run may use, and those it may not whatever the scan: licence, weights.

    Raises
    ------
    UsageError
        If ``--model`` names an unknown model or one that ``--licence`` excludes, or
        ``--licence`` excludes every model.
    DataError
        If the weights of the forced model, or of every model, can be had nowhere.
    """
    forced = find_card(cards, config.model) if config.model else None
    allowed = [card for card in cards if config.licence != "permissive" or card.weights.permissive]
    if forced is not None and forced not in allowed:
        raise UsageError(
            f"model '{forced.name}' has the licence {forced.weights.licence}, which is not "
            "permissive", f"--model {forced.name} --licence permissive",
            "drop one of the two options, or name another model",
        )  # fmt: skip
    if cards and not allowed:
        raise UsageError(
            "no model has a permissive licence", "--licence permissive",
            "drop the option, or add a model with --models DIR",
        )  # fmt: skip
    excluded = {
        card.name: f"its licence {card.weights.licence} is not permissive (--licence permissive)"
        for card in cards
        if card not in allowed
    }
    without = {card.name: why for card in allowed if (why := unavailable(card, config.offline))}
    usable = tuple(card for card in allowed if card.name not in without)
    if not usable or (forced is not None and forced.name in without):
        wanted = f"model '{forced.name}' cannot be used" if forced else "no model can be used"
        reasons = "; ".join(f"{name}: {why}" for name, why in without.items())
        raise DataError(
            f"{wanted}: {reasons or 'there is none'}", BUILTIN if forced is None else "--model",
            "fetch weights with tlseg-zoo fetch NAME, add a model with --models DIR, or reinstall",
        )  # fmt: skip
    return usable, tuple(Refusal(name, why) for name, why in (excluded | without).items())


def choose(
    cards: Sequence[ModelCard],
    scan: Scan,
    spacing_mm: Sequence[float] | None = None,
    forced: str | None = None,
) -> Choice:
    """Choose the model for one scan.

    In the domain of several models, the first of `tlseg_bids.zoo.registry.ranked` is taken; in
    the domain of none, `most_robust`, with a warning. A forced model is taken whatever its
    domain, with a warning where it refuses the scan.

    Parameters
    ----------
    cards : sequence of ModelCard
        At least one.
    scan : Scan
        The scan.
    spacing_mm : sequence of 3 floats, optional
        Its voxel size in mm.
    forced : str, optional
        Name of the model asked for with ``--model``.
    """
    why = {card.name: card.refuses(scan, spacing_mm) for card in cards}
    if forced is not None:
        card = find_card(cards, forced)
        refused = _others(cards, card, why, f"--model {forced} was given")
        if why[forced] is None:
            return Choice(card, "asked for with --model; the scan is in its domain", refused)
        warning = f"model '{forced}' was forced and is {why[forced]}"
        return Choice(card, f"asked for with --model although {why[forced]}", refused, (warning,))
    willing = ranked(card for card in cards if why[card.name] is None)
    if not willing:
        card = most_robust(cards)
        warning = f"outside the domain of every model; model '{card.name}' is {why[card.name]}"
        refused = _others(cards, card, why, "")
        return Choice(
            card, "the most robust model, as the scan is in no model's domain", refused, (warning,)
        )
    card = willing[0]
    reason = _advantage(card, willing)
    return Choice(card, reason, _others(cards, card, why, f"'{card.name}' is preferred: {reason}"))


def _advantage(card: ModelCard, willing: Sequence[ModelCard]) -> str:
    """Why the first of several willing models is first."""
    if len(willing) == 1:
        return "the only model whose domain holds the scan"
    second = willing[1]
    if card.status != second.status:
        return f"verified, and '{second.name}' is not"
    if card.specificity != second.specificity:
        return f"the scan is in its domain, which is narrower than that of '{second.name}'"
    if card.parent == second.name:
        return f"adapted from '{second.name}' for such scans"
    return f"the scan is in its domain, and its evidence is no worse than that of '{second.name}'"


def _others(
    cards: Sequence[ModelCard], chosen: ModelCard, why: dict[str, str | None], willing: str
) -> tuple[Refusal, ...]:
    return tuple(
        Refusal(card.name, why[card.name] or willing) for card in cards if card is not chosen
    )
