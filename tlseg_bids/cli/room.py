"""Whether this machine has room for a run: memory and disk, asked before a container starts."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from tlseg_bids.config import Config
from tlseg_bids.errors import CannotCreateError, UsageError, amount
from tlseg_bids.resources import available_memory_gib

CARDS = Path(__file__).resolve().parents[1] / "zoo" / "cards"
MODEL_GIB, IMAGE_GIB = 2.0, 0.5
"""Memory set aside for one scan: of a model whose card says nothing, and of the image itself."""
SCAN_MIB, SCAN_MIB_PROBABILITIES = 20, 500
"""Disk set aside for the results of one scan; docs/explanation/scale.md has what was measured."""


def check_memory(config: Config) -> None:
    """Refuse to start with less free memory than the scans at once take.

    Raises
    ------
    UsageError
        With both figures.
    """
    each = scan_gib(config)
    at_once = config.at_once(each)
    free_gib = available_memory_gib()
    if free_gib is not None and free_gib < each * at_once:
        raise UsageError(
            f"{free_gib:.1f} GiB of memory are free and "
            f"{amount(at_once, 'scan takes', 'scans at once take')} about "
            f"{each * at_once:.1f} GiB", "--nprocs",
            "lower --nprocs, or raise --omp-nthreads, or give --no-checks",
        )  # fmt: skip


def scan_gib(config: Config) -> float:
    """Memory to set aside for one scan, in GiB: what the cards of the package say.

    Of the models that the command line allows, by name or protocol, the largest counts.
    """
    cards = [tomllib.loads(path.read_text(encoding="utf-8")) for path in CARDS.glob("*.toml")]
    protocol = config.protocol or "aseg"
    allowed = [
        card.get("memory", {}).get("host_gib", MODEL_GIB) for card in cards
        if (card["name"] == config.model if config.model else card["protocol"] == protocol)
    ]  # fmt: skip
    return max(allowed, default=MODEL_GIB) + IMAGE_GIB


def check_disk(config: Config) -> None:
    """Refuse to start with less free space than the results will take.

    Raises
    ------
    CannotCreateError
        With both figures.
    """
    wanted = [f"sub-{label}" for label in config.participants] or ["sub-*"]
    scans = sum(1 for name in wanted for _ in config.bids_dir.glob(f"{name}/**/anat/*_T[12]w.nii*"))
    each = SCAN_MIB_PROBABILITIES if config.probabilities else SCAN_MIB
    needed_gib = -(-scans // config.shard[1]) * each / 2**10
    place = next(p for p in (config.out_dir, *config.out_dir.parents) if p.exists())
    free_gib = shutil.disk_usage(place).free / 2**30
    if free_gib < needed_gib:
        raise CannotCreateError(
            f"{free_gib:.1f} GiB of disk are free and "
            f"{amount(scans, 'scan takes', 'scans take')} about {needed_gib:.1f} GiB",
            config.out_dir,
            "free some space, choose another OUT_DIR, or give --no-checks",
        )  # fmt: skip
