"""The content key: equal keys, equal results, so that a finished scan need not run again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tlseg_bids.bids.scan import Scan
from tlseg_bids.config import Config
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import digest
from tlseg_bids.zoo.registry import placing_card

OUTPUT_OPTIONS = ("compat", "output_spaces", "probabilities", "random_seed")
"""Options that change what is written for a scan."""


def content_key(
    scan: Scan,
    card: ModelCard,
    config: Config,
    version: str,
    companions: tuple[Scan, ...] = (),
) -> str:
    """SHA-256, 64 hexadecimal digits, over everything that goes into a scan's derivatives.

    That is: the bytes of the scan's file and of those of its further image channels, what the
    dataset says of it (sidecar, age, contrast agent, skull-stripped), the card with the hash of
    its weights and the card of the model that it is placed by, the options in `OUTPUT_OPTIONS` and
    the program's version. The device, the other models, threads, folders and the file's time do
    not count.

    Raises
    ------
    OSError
        If the file cannot be read to its end.
    """
    parts = {
        "scan": _content(scan),
        **facts(scan),
        "card": digest(card),
        "options": {name: getattr(config, name) for name in OUTPUT_OPTIONS},
        "version": version,
    }
    finder = placing_card(card)
    if finder is not None:
        parts["placed_by"] = digest(finder)
    if companions:
        parts["companions"] = [[one.suffix, one.entities, _content(one)] for one in companions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def facts(scan: Scan) -> dict[str, Any]:
    """What the dataset says of a scan and its derivatives depend on; voxels not included."""
    return {
        "suffix": scan.suffix,
        "entities": scan.entities,
        "sidecar": scan.sidecar,
        "age": [scan.age.days, scan.age.pma_weeks],
        "contrast_agent": scan.contrast_agent,
        "skull_stripped": scan.skull_stripped,
    }


def _content(scan: Scan) -> str:
    with scan.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
