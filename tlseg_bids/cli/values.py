"""What the command line's words mean: each function reads one and refuses it with a sentence."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tlseg_bids.errors import DataError, NoInputError

MIN_MEMORY_GIB = 0.5
MIN_BUDGET_MINUTES = 0.5
UNITS = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}


def absolute(text: str) -> Path:
    """An absolute path; links keep their names, so that a DataLad dataset stays as it is."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"there is no home folder {Path(text).parts[0]}; write the path in full"
        ) from None


def participant(text: str) -> str:
    """A participant label without ``sub-``."""
    return _label(text, "sub-")


def session(text: str) -> str:
    """A session label without ``ses-``."""
    return _label(text, "ses-")


def _label(text: str, prefix: str) -> str:
    label = text.removeprefix(prefix)
    if not re.fullmatch(r"[0-9A-Za-z+]+", label):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no BIDS label; labels are letters and digits, separated by spaces"
        )
    return label


def condition(text: str) -> str:
    """``COLUMN=VALUE``, as it stands."""
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=VALUE, such as group=control")
    return text


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def minutes(text: str) -> float:
    """A time in minutes."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) < MIN_BUDGET_MINUTES:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of minutes of at least {MIN_BUDGET_MINUTES:g}"
        )
    return float(text)


def time_limit(text: str) -> float:
    """A time in minutes, above 0."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of minutes above 0")
    return float(text)


def model_name(text: str) -> str:
    """A name that a model card and its folder can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot name a model; use letters, digits, '.', '_' and '-'"
        )
    return text


def seed(text: str) -> int:
    """A whole number from 0 to 2³² − 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """``I/N`` as (I, N), 1 ≤ I ≤ N."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 1 ≤ I ≤ N, such as 2/8")
    return int(match[1]), int(match[2])


def device(text: str) -> str:
    """A device as PyTorch names it, or ``auto``."""
    if not re.fullmatch(r"auto|cpu|mps|cuda|cuda:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"'{text}' is none of auto, cpu, cuda, cuda:N, mps")
    return text


def dask(text: str) -> str:
    """The address of a scheduler, or the absolute path of a .json or .toml file."""
    if re.fullmatch(r"(tcp|tls|ws|wss|ucx)://\S+", text):
        return text
    if not text.endswith((".json", ".toml")):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither an address such as tcp://host:8786 nor a .json or .toml file"
        )
    return str(absolute(text))


def memory(text: str) -> float:
    """An amount of memory in GiB: ``8G``, ``8000M``, ``8000`` (megabytes). K, M, G, T are 2¹⁰ᵏ."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of memory, such as 8G")
    gib = float(match[1]) * UNITS[match[2] or "M"]
    if gib < MIN_MEMORY_GIB:
        raise argparse.ArgumentTypeError(
            f"'{text}' is {gib:.3g} GiB, less than the {MIN_MEMORY_GIB} GiB the program needs to "
            "start; a bare number is megabytes, so write 8G for 8 GiB"
        )
    return gib


def filters(text: str) -> dict[str, dict[str, Any]]:
    """The content of a filter file: a JSON object of objects."""
    path = absolute(text)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoInputError(
            f"the filter file cannot be read ({error.strerror})", path, "correct the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the filter file is not JSON ({error})", path, "correct it") from error
    return checked_filters(content, path)


def checked_filters(content: Any, where: object) -> dict[str, dict[str, Any]]:
    """Refuse filters that are not an object of objects.

    Raises
    ------
    DataError
        If they are something else.
    """
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise DataError(
            "the filters are not an object of objects", where,
            'write for example {"t1w": {"session": "01", "acquisition": "mprage"}}',
        )  # fmt: skip
    return content
