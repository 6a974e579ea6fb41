"""Values of a card's ``[domain]``, ``[memory]``, ``[weights]`` and evidence that make no sense."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tlseg_bids.errors import DataError
from tlseg_bids.zoo.card import Domain, Memory, Weights

LEAST_MEMORY = {"host_gib": 0.1, "host_bytes_per_voxel": 0.0, "device_gib": 0.0}


def check_domain(domain: Domain, where: str) -> None:
    """Refuse, by a DataError, ranges that are none and contrast agents that contradict the rest."""
    _check_range(domain.age_years, f"{where}, age_years")
    _check_range(domain.voxel_mm, f"{where}, voxel_mm")
    strange = [agent for agent in domain.agents if not agent or agent != agent.lower()]
    if strange:
        raise DataError(
            f"{strange[0]!r} cannot begin the name of a contrast agent", f"{where}, agents",
            "write lower-case letters, gad for example",
        )  # fmt: skip
    if domain.agents and domain.contrast_agent is False:
        raise DataError(
            f"the agents {', '.join(domain.agents)} are named and contrast_agent is false",
            f"{where}, agents", "leave one of the two out",
        )  # fmt: skip


def check_measured(row: dict[str, Any], where: str) -> None:
    """Refuse, by a DataError, a row of evidence that no measurement can give.

    What could not be computed is NaN, and does not count.
    """
    _check_range(row.get("age_years"), f"{where}, age_years")
    if row["n"] < 1:
        raise DataError(
            f"measured on {row['n']} scans", f"{where}, n", "write the number of scans, 1 or more"
        )
    if row["sd"] < 0:
        raise DataError(
            f"a spread of {row['sd']:g}", f"{where}, sd", "write the standard deviation over scans"
        )
    for key in ("mean", "parent_mean"):
        value = row.get(key, math.nan)
        if row["metric"].lower() == "dice" and not (0 <= value <= 1 or math.isnan(value)):
            raise DataError(
                f"a Dice of {value:g}", f"{where}, {key}", "write a number from 0 to 1, no per cent"
            )


def check_memory(memory: Memory, where: str) -> None:
    """Refuse, by a DataError, what is no amount of memory."""
    for key, value in asdict(memory).items():
        if not LEAST_MEMORY[key] <= value < math.inf:
            raise DataError(
                f"{value:g} is no amount of memory", f"{where}, {key}",
                f"write a number of {LEAST_MEMORY[key]:g} or more, or leave the key out",
            )  # fmt: skip


def _check_range(limits: Sequence[float] | None, where: str) -> None:
    if limits is not None and (len(limits) != 2 or not 0 <= limits[0] < limits[1]):
        raise DataError(
            f"{list(limits)} is not a range", where,
            "write [lowest, highest], or leave the key out for any",
        )  # fmt: skip


def check_weights(weights: Weights, where: str) -> None:
    """Refuse, by a DataError, weights that can be neither found, fetched nor checked."""
    if not re.fullmatch(r"[0-9a-f]{64}", weights.sha256):
        raise DataError(
            f"'{weights.sha256}' is not a SHA-256", f"{where}, sha256",
            "write the 64 lower-case hexadecimal digits that sha256sum prints",
        )  # fmt: skip
    if weights.bytes <= 0:
        raise DataError(
            f"a size of {weights.bytes} bytes", f"{where}, bytes", "write the size of the file"
        )
    if not weights.licence.strip():
        raise DataError("the licence is empty", f"{where}, licence", "write its SPDX identifier")
    if weights.file is None and weights.url is None:
        raise DataError("neither file nor url is given", where, "say where the weights are")
    if weights.file is not None and (
        PurePosixPath(weights.file).is_absolute() or not weights.file.endswith(".safetensors")
    ):
        raise DataError(
            f"'{weights.file}' is not a relative path of a .safetensors file", f"{where}, file",
            "write the path from the card's folder; no other format is opened",
        )  # fmt: skip
    if weights.url is not None and not _can_be_fetched(weights.url):
        raise DataError(
            f"'{weights.url}' cannot be fetched", f"{where}, url", "use https, http or file"
        )


def _can_be_fetched(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:  # half an IPv6 address
        return False
    return parts.scheme == "file" or (parts.scheme in ("https", "http") and bool(parts.hostname))
