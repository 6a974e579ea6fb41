"""Model cards as TOML files, as `docs/cards.md` describes them: read, checked and written.

Every refusal names the file and the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tomllib
from dataclasses import asdict, fields
from datetime import date, time
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from tlseg_bids.errors import CannotCreateError, DataError, NoInputError
from tlseg_bids.zoo.calibration import KEYS as CALIBRATION
from tlseg_bids.zoo.calibration import Calibration, check_calibration
from tlseg_bids.zoo.card import Domain, Memory, ModelCard, Weights
from tlseg_bids.zoo.settings import check_settings
from tlseg_bids.zoo.values import check_domain, check_measured, check_memory, check_weights

STATUSES = ("experimental", "verified")
SEGMENTER = "segmenter"
SEE = "see docs/cards.md"

WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false",
         list: "a list", dict: "a table"}  # fmt: skip

Keys = dict[str, type]
NOTHING: Keys = {}
CARD: Keys = {
    "name": str, "version": str, "status": str, "summary": str, "protocol": str, "domain": dict,
    "networks": dict, "strategy": dict, "preprocess": dict, "weights": dict, "citations": list,
}  # fmt: skip
CARD_OPTIONAL: Keys = {
    "training": dict, "evidence": list, "known_failures": list, "parent": str, "memory": dict,
    "heads": list, "channels": list, "calibration": dict, "frame": str,
    "tables": dict,
}  # fmt: skip
DOMAIN: Keys = {
    "suffixes": list, "age_years": list, "contrast_agent": bool, "skull_stripped": bool,
    "voxel_mm": list, "agents": list,
}  # fmt: skip
DOMAIN_LISTS: Keys = {"suffixes": str, "agents": str, "age_years": float, "voxel_mm": float}
WEIGHTS: Keys = {"sha256": str, "bytes": int, "licence": str}
WEIGHTS_OPTIONAL: Keys = {"file": str, "url": str}
MEMORY: Keys = {field.name: float for field in fields(Memory)}
EVIDENCE: Keys = {
    "dataset": str, "n": int, "metric": str, "mean": float, "sd": float, "how": str,
}  # fmt: skip
EVIDENCE_OPTIONAL: Keys = {
    "suffixes": list, "age_years": list, "contrast_agent": bool, "skull_stripped": bool,
    "structures": str, "parent_mean": float,
}  # fmt: skip


def read_card(path: Path) -> ModelCard:
    """Read a card and check it.

    Raises
    ------
    NoInputError
        If there is no such file, or it cannot be read.
    DataError
        If the file is not TOML, a key is missing, unknown or of the wrong kind, or a value makes
        no sense; the message names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoInputError(
            "there is no such model card", path, "correct the name or the folder"
        ) from None
    except OSError as error:
        raise NoInputError(
            f"the model card cannot be read ({error.strerror})", path,
            "give the user who runs this access to the file, or move it away",
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise DataError(f"the model card is not TOML ({error})", path, SEE) from error
    check_keys(table, path, CARD, CARD_OPTIONAL)
    check_keys(table["weights"], f"{path}, [weights]", WEIGHTS, WEIGHTS_OPTIONAL)
    check_kinds(table, path)
    card = _card(table, path)
    check_card(card)
    return card


def check_kinds(table: dict[str, Any], path: Path) -> None:
    """Refuse, by a DataError, keys unknown and values of a wrong kind in what people write."""
    for name, keys in (("domain", DOMAIN), ("memory", MEMORY), ("calibration", CALIBRATION)):
        check_keys(table.get(name, {}), f"{path}, [{name}]", NOTHING, keys)
    for key in ("citations", "known_failures", "heads", "channels"):
        check_list(table.get(key, []), f"{path}, {key}", str)
    check_list(table.get("evidence", []), f"{path}, evidence", dict)
    data, where = table.get("training", {}).get("data", []), f"{path}, [training], data"
    _check_kind(data, list, where)
    check_list(data, where, dict)
    for key, kind in DOMAIN_LISTS.items():
        check_list(table["domain"].get(key, []), f"{path}, [domain], {key}", kind)


def check_card(card: ModelCard) -> None:
    """Refuse a card whose values make no sense, wherever it comes from.

    Raises
    ------
    DataError
        With the value, the file and key, and what would be right.
    """
    where = card.path or f"model card '{card.name}'"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", card.name):
        raise DataError(
            f"'{card.name}' cannot name a model", f"{where}, name",
            "use letters, digits, '.', '_' and '-'",
        )  # fmt: skip
    if card.status not in STATUSES:
        raise DataError(
            f"unknown status '{card.status}'", f"{where}, status",
            f"use one of {', '.join(STATUSES)}",
        )  # fmt: skip
    if card.status == "verified" and not card.evidence:
        raise DataError(
            "the status is 'verified' and there is no evidence", f"{where}, evidence",
            "add [[evidence]] with what was measured, or use the status 'experimental'",
        )  # fmt: skip
    if not card.citations:
        raise DataError(
            "no citation is given", f"{where}, citations", "name the papers the model builds on"
        )
    for number, row in enumerate(card.evidence, start=1):
        entry = f"{where}, evidence entry {number}"
        check_keys(_plain(row, entry), entry, EVIDENCE, EVIDENCE_OPTIONAL)
        check_list(row.get("suffixes", []), f"{entry}, suffixes", str)
        check_list(row.get("age_years", []), f"{entry}, age_years", float)
        check_measured(row, entry)
    _check_heads(card, where)
    _check_tables(card, where)
    _check_channels(card, where)
    _check_networks(card, where)
    check_settings(card.preprocess, card.strategy, where)
    check_domain(card.domain, f"{where}, [domain]")
    check_memory(card.memory, f"{where}, [memory]")
    heads = [card.protocol_of(name) for name in card.heads]
    check_calibration(card.calibration, heads, f"{where}, [calibration]")
    check_weights(card.weights, f"{where}, [weights]")


def to_toml(card: ModelCard) -> str:
    """The card as TOML; empty optional parts are left out, `path` is not part of it.

    Raises
    ------
    DataError
        If a value has no counterpart in TOML (None, for one).
    """
    table = {field.name: getattr(card, field.name) for field in fields(card)}
    table["domain"] = {
        k: v for k, v in asdict(card.domain).items() if v is not None and (v or k != "agents")
    }
    table["weights"] = {k: v for k, v in asdict(card.weights).items() if v is not None}
    table["memory"] = asdict(card.memory)
    table["calibration"] = card.calibration.to_table() if card.calibration else {}
    for key in ("training", "evidence", "known_failures", "parent", "channels",
                "calibration", "frame", "tables"):  # fmt: skip
        if not table[key]:
            del table[key]
    if card.heads == (card.protocol,):
        del table["heads"]
    del table["path"]
    where = card.path or f"model card '{card.name}'"
    return tomli_w.dumps({key: _plain(value, f"{where}, {key}") for key, value in table.items()})


def write_card(card: ModelCard, path: Path) -> None:
    """Check a card and write it as TOML, at once or not at all.

    Raises
    ------
    DataError
        As `check_card` and `to_toml`.
    CannotCreateError
        If the file cannot be written.
    """
    check_card(card)
    text = to_toml(card)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise CannotCreateError(
            f"the model card cannot be written ({error.strerror})", path,
            "choose a folder that you may write to",
        ) from error  # fmt: skip
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or there is nothing to remove
            partial.unlink()


def digest(card: ModelCard) -> str:
    """SHA-256 of what the card says, 64 hexadecimal digits; layout and comments do not count."""
    return hashlib.sha256(to_toml(card).encode()).hexdigest()


def check_keys(table: dict[str, Any], where: object, required: Keys, optional: Keys) -> None:
    """Refuse missing keys, unknown keys and values of the wrong kind.

    Raises
    ------
    DataError
        Naming `where` and the keys.
    """
    missing = [key for key in required if key not in table]
    if missing:
        raise DataError(f"missing: {', '.join(missing)}", where, f"add it; {SEE}")
    known = required | optional
    unknown = [key for key in table if key not in known]
    if unknown:
        raise DataError(
            f"unknown: {', '.join(unknown)}", where, f"known are {', '.join(known)}; {SEE}"
        )
    for key, value in table.items():
        _check_kind(value, known[key], f"{where}, {key}")


def check_list(values: list[Any], where: str, kind: type) -> None:
    """Refuse a list with an entry of another kind than `kind`."""
    for value in values:
        _check_kind(value, kind, where)


def _check_kind(value: Any, kind: type, where: str) -> None:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise DataError(f"{value!r} is not {WORDS[kind]}", where, f"write {WORDS[kind]}")


def _card(table: dict[str, Any], path: Path) -> ModelCard:
    domain = dict(table["domain"])
    for key, kind in DOMAIN_LISTS.items():
        if key in domain:
            domain[key] = tuple(kind(one) for one in domain[key])
    return ModelCard(
        **{
            **table,
            "domain": Domain(**domain),
            "weights": Weights(**table["weights"]),
            "memory": Memory(**table.get("memory", {})),
            "evidence": tuple(table.get("evidence", ())),
            "citations": tuple(table["citations"]),
            "known_failures": tuple(table.get("known_failures", ())),
            "heads": tuple(table.get("heads", ())),
            "channels": tuple(table.get("channels", ())),
            "calibration": Calibration(**table.get("calibration", {})),
            "path": path,
        }
    )


def _check_heads(card: ModelCard, where: object) -> None:
    for protocol in (*card.heads, card.located_in):
        card.protocol_of(protocol)
    heads = ", ".join(card.heads)
    if card.heads[0] != card.protocol:
        raise DataError(
            f"the first head is '{card.heads[0]}' and the protocol '{card.protocol}'",
            f"{where}, heads", "name the protocol first, or leave heads out where it is the only",
        )  # fmt: skip
    if len(set(card.heads)) < len(card.heads):
        raise DataError(
            f"a head occurs twice: {heads}", f"{where}, heads", "name each protocol once"
        )


def _check_tables(card: ModelCard, where: object) -> None:
    """Refuse a table of a site's own protocol that is not the one the card was written with."""
    if card.path is None:
        return
    there = card.own_tables
    for name, stored in card.tables.items():
        if name not in there:
            raise DataError(
                f"'{name}' is no protocol of the site's own in this model", f"{where}, [tables]",
                "name protocols of heads whose table lies beside the card",
            )  # fmt: skip
        found = file_sha256(there[name])
        if found != stored:
            raise DataError(
                f"the table of the protocol '{name}' has the SHA-256 {found}, the card says "
                f"{stored}", there[name],
                "the table was changed, so its labels may mean something else; restore it, or "
                "install or adapt the model again",
            )  # fmt: skip


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_channels(card: ModelCard, where: object) -> None:
    if not card.channels:
        return
    named = ", ".join(card.channels)
    if len(card.channels) < 2 or len(set(card.channels)) < len(card.channels):
        raise DataError(
            f"the image channels are {named}", f"{where}, channels",
            "name two or more different suffixes, or leave the key out for one channel",
        )  # fmt: skip
    if not card.domain.suffixes or set(card.domain.suffixes) - set(card.channels):
        raise DataError(
            f"the domain holds {', '.join(card.domain.suffixes) or 'any suffix'} and the channels "
            f"are {named}", f"{where}, channels",
            "name in the domain only suffixes that are a channel",
        )  # fmt: skip


def _check_networks(card: ModelCard, where: object) -> None:
    if SEGMENTER not in card.networks:
        raise DataError(
            f"no network has the role '{SEGMENTER}'", f"{where}, [networks]",
            f"add [networks.{SEGMENTER}]",
        )  # fmt: skip
    for role, arguments in card.networks.items():
        if not isinstance(arguments, dict) or not isinstance(arguments.get("network"), str):
            raise DataError(
                "the network has no name", f"{where}, [networks.{role}]",
                'add network = "…", a name of the network table',
            )  # fmt: skip
    if not isinstance(card.strategy.get("name"), str):
        raise DataError(
            "the strategy has no name", f"{where}, [strategy]",
            'add name = "…", a name of the strategy table',
        )  # fmt: skip


def _plain(value: Any, where: str) -> Any:
    """`value` in the types TOML knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | bool | int | float | date | time):
        return value
    raise DataError(
        f"{value!r} cannot be written to a card", where, "use text, numbers, lists and tables"
    )
