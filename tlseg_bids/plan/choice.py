"""Which model serves a scan, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from tlseg_bids.bids.age import OLDEST_YEARS
from tlseg_bids.bids.scan import Age, Scan
from tlseg_bids.config import Config
from tlseg_bids.errors import DataError, ScanError, UsageError
from tlseg_bids.flow import Refusal
from tlseg_bids.labels.protocol import DEFAULT_PROTOCOL
from tlseg_bids.zoo.card import ModelCard, age_in_years, age_text
from tlseg_bids.zoo.evidence import WEAK_DICE, reached
from tlseg_bids.zoo.registry import (
    BUILTIN,
    Standing,
    find_card,
    is_site_model,
    most_robust,
    standings,
)
from tlseg_bids.zoo.weights import unavailable

OUTSIDE = "outside the domain of every model"


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
    """Cards this run may use, and those it may not whatever the scan: licence, protocol, weights.

    Raises
    ------
    UsageError
        If ``--model`` names an unknown model or one that ``--licence`` or ``--protocol`` excludes,
        or if one of these excludes every model.
    DataError
        If the weights of the forced model, or of every model, can be had nowhere.
    """
    forced = find_card(cards, config.model) if config.model else None
    if forced is not None and config.protocol in _answers(forced, config):
        cards = [card.answering(config.protocol) if card is forced else card for card in cards]
        forced = find_card(cards, forced.name)
    bound = _bound(cards) if config.licence == "permissive" else {}
    if forced is not None and forced.name in bound:
        raise UsageError(
            f"model '{forced.name}' may not be used for everything: {bound[forced.name]}",
            f"--model {forced.name} --licence permissive",
            "drop one of the two options, or name another model",
        )  # fmt: skip
    if cards and len(bound) == len(cards):
        raise UsageError(
            "no model has a permissive licence", "--licence permissive",
            "drop the option, or add a model with --models DIR",
        )  # fmt: skip
    foreign = _foreign(cards, forced, config)
    allowed = [card for card in cards if card.name not in bound | foreign]
    excluded = foreign | {name: f"{why} (--licence permissive)" for name, why in bound.items()}
    without = {card.name: why for card in allowed if (why := unavailable(card, config.offline))}
    usable = tuple(card for card in allowed if card.name not in without)
    if not usable or (forced is not None and forced.name in without):
        wanted = f"model '{forced.name}' cannot be used" if forced else "no model can be used"
        reasons = "; ".join(f"{name}: {why}" for name, why in (excluded | without).items())
        raise DataError(
            f"{wanted}: {reasons or 'there is none'}", BUILTIN if forced is None else "--model",
            "fetch weights with tlseg-zoo fetch NAME, add a model with --models DIR, or reinstall",
        )  # fmt: skip
    return usable, tuple(Refusal(name, why) for name, why in (excluded | without).items())


def _answers(forced: ModelCard, config: Config) -> tuple[str, ...]:
    """Protocols that a forced model can label in; in an adaptation that of its first head."""
    return forced.heads if config.labels_dir is None else forced.heads[:1]


def _foreign(
    cards: Sequence[ModelCard], forced: ModelCard | None, config: Config
) -> dict[str, str]:
    """Models that label in another protocol than the run does, and why they are left out.

    Without ``--protocol`` the run's protocol is the default one, so that a study is not labelled in
    two; a model that is forced, or that the user adapted, is taken in its own. Only a forced model
    is asked for that of another head than its first, of which no evidence tells.
    """
    protocol = config.protocol
    wanted = protocol or DEFAULT_PROTOCOL
    free = () if protocol else (forced,)
    foreign = {
        card.name: _why_foreign(card, wanted)
        for card in cards
        if card.protocol != wanted
        and card not in free
        and not (protocol is None and is_site_model(card))
    }  # fmt: skip
    if forced is not None and forced.name in foreign:
        raise UsageError(
            f"model '{forced.name}' labels in {' and '.join(map(repr, _answers(forced, config)))}",
            f"--model {forced.name} --protocol {wanted}", "drop one of the two options",
        )  # fmt: skip
    if cards and len(foreign) == len(cards):
        known = ", ".join(sorted({card.protocol for card in cards}))
        raise UsageError(
            f"no model labels in the protocol '{wanted}'", "--protocol", f"models label in {known}"
        )
    return foreign


def _why_foreign(card: ModelCard, wanted: str) -> str:
    first = f"it labels in the protocol '{card.protocol}'"
    if wanted in card.heads:
        return f"{first}, and in '{wanted}' only with --model {card.name} --protocol {wanted}"
    return f"{first}, and '{wanted}' is wanted (--protocol)"


def _bound(cards: Sequence[ModelCard]) -> dict[str, str]:
    """Models that are not permissive, themselves or by what they were adapted from, and why."""
    by_name = {card.name: card for card in cards}
    bound = {}
    for card in cards:
        line = [card]
        while line[-1].parent in by_name and by_name[line[-1].parent] not in line:
            line.append(by_name[line[-1].parent])
        for one in line:
            if one.restrictions:
                why = f"{' and '.join(one.restrictions)} not permissive"
                why = why.replace(" not", " are not" if len(one.restrictions) > 1 else " is not")
                bound[card.name] = why if one is card else f"adapted from '{one.name}': {why}"
                break
    return bound


def choose(
    cards: Sequence[ModelCard],
    scan: Scan,
    spacing_mm: Sequence[float] | None = None,
    forced: str | None = None,
    companions: Collection[str] = (),
) -> Choice:
    """Choose the model for one scan.

    In the domain of several models, the first of `tlseg_bids.zoo.registry.standings` is taken; in
    the domain of none, `most_robust`, with a warning. A forced model is taken whatever its
    domain, with a warning where it refuses the scan. A model that needs image channels which are
    not there is never taken.

    Parameters
    ----------
    cards : sequence of ModelCard
        At least one.
    scan : Scan
        The scan. An age that nobody reaches counts as unknown, with a warning.
    spacing_mm : sequence of 3 floats, optional
        Its voxel size in mm.
    forced : str, optional
        Name of the model asked for with ``--model``.
    companions : collection of str
        Suffixes of the scans that can be image channels beside this one.

    Raises
    ------
    ScanError
        If the forced model, or every model, lacks an image channel.
    """
    scan, doubts = _believed(scan)
    why = {card.name: card.refuses(scan, spacing_mm, companions) for card in cards}
    if forced is not None:
        choice = _forced(find_card(cards, forced), cards, why)
        _check_channels([choice.card], scan, companions)
    else:
        able = [card for card in cards if card.lacks(scan, companions) is None]
        _check_channels(able or cards, scan, companions)
        willing = standings((card for card in able if why[card.name] is None), scan)
        choice = _best(cards, willing, why, scan) if willing else _robust(able, cards, why, scan)
    return replace(choice, warnings=(*doubts, *choice.warnings))


def _believed(scan: Scan) -> tuple[Scan, tuple[str, ...]]:
    """The scan without an age that cannot be."""
    years = age_in_years(scan.age)
    if years is None or years <= OLDEST_YEARS:
        return scan, ()
    source = f"{scan.age.source} says {age_text(years)}, more than {OLDEST_YEARS:g}"
    doubt = f"the age is not believed and counts as unknown: {source}"
    return replace(scan, age=Age(source=source)), (doubt,)


def _check_channels(cards: Sequence[ModelCard], scan: Scan, companions: Collection[str]) -> None:
    """Refuse a scan if none of the cards can run on it."""
    lacks = {card.name: card.lacks(scan, companions) for card in cards}
    if all(lacks.values()):
        reasons = "; ".join(f"model '{name}': {reason}" for name, reason in lacks.items())
        raise ScanError(
            f"no model can label this scan – {reasons}", scan.path,
            "add the missing scan to the session, or choose another model with --model",
        )  # fmt: skip


def outside(warnings: Iterable[str]) -> tuple[str, ...]:
    """Of a job's warnings those that say that the scan is in no model's domain."""
    return tuple(warning for warning in warnings if warning.startswith(OUTSIDE))


def _forced(card: ModelCard, cards: Sequence[ModelCard], why: dict[str, str | None]) -> Choice:
    refused = _others(cards, card, why, f"--model {card.name} was given")
    reason, weak = why[card.name], _weakness(card)
    if reason is None:
        return Choice(card, "asked for with --model; the scan is in its domain", refused, weak)
    warning = f"model '{card.name}' was forced and is {reason}"
    return Choice(card, f"asked for with --model although {reason}", refused, (warning, *weak))


def _weakness(card: ModelCard) -> tuple[str, ...]:
    """What to say of a model that was measured to be bad."""
    found = reached(card)
    if found is None or found >= WEAK_DICE:
        return ()
    return (
        f"model '{card.name}' reached a mean Dice of {found:.2f} where it was measured: "
        "do not rely on its labels",
    )


def _robust(
    able: Sequence[ModelCard], cards: Sequence[ModelCard], why: dict[str, str | None], scan: Scan
) -> Choice:
    card = most_robust(able, scan)
    warning = f"{OUTSIDE}; model '{card.name}' is {why[card.name]}"
    reason = "the most robust model, as the scan is in no model's domain"
    return Choice(card, reason, _others(cards, card, why, ""), (warning,))


def _best(
    cards: Sequence[ModelCard], willing: Sequence[Standing], why: dict[str, str | None], scan: Scan
) -> Choice:
    first = willing[0]
    reason = "the only model whose domain holds the scan"
    if len(willing) > 1:
        reason = _advantage(first, willing[1], f" of '{willing[1].card.name}'")
    if age_in_years(scan.age) is None and any(
        card.domain.age_years is not None and why[card.name] for card in cards
    ):
        reason += "; the age at the scan is not known, so no model for certain ages was taken"
    if not first.known:
        reason += "; nothing was measured on such scans"
    behind = {
        other.card.name: f"'{first.card.name}' is preferred: {_advantage(first, other, '')}"
        for other in willing[1:]
    }
    refused = tuple(
        Refusal(card.name, why[card.name] or behind[card.name])
        for card in cards
        if card is not first.card
    )
    return Choice(first.card, reason, refused)


def _advantage(first: Standing, second: Standing, whose: str) -> str:
    """Why a model comes before another one: what `Standing.key` differs in first."""
    it = f"that{whose}" if whose else "this one"
    name = f"'{second.card.name}'"
    if first.for_site != second.for_site:
        return f"adapted from '{first.card.parent}' for such scans"
    if first.measured is not None and second.measured is None:
        return f"measured on such scans, Dice {first.measured}, and {name} is not"
    if first.measured is not None and first.measured.low != second.measured.low:
        return f"measured better on such scans, Dice {first.measured} against {second.measured}" + (
            f" of {name}" if whose else ""
        )
    if first.card.status != second.card.status:
        return f"verified, and {name} is not"
    if first.card.specificity != second.card.specificity:
        return f"the scan is in its domain, which is narrower than {it}"
    if first.card.parent == second.card.name:
        return f"adapted from {name}"
    if first.known != second.known:
        return f"it was measured on such scans, and {name} was not"
    return f"nothing known speaks for {name} rather than it, and its name comes first"


def _others(
    cards: Sequence[ModelCard], chosen: ModelCard, why: dict[str, str | None], willing: str
) -> tuple[Refusal, ...]:
    return tuple(
        Refusal(card.name, why[card.name] or willing) for card in cards if card is not chosen
    )
