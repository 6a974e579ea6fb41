"""What a model is, for whom it is meant, and what is known about it: a TOML card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlseg_bids.bids.scan import Scan


@dataclass(frozen=True)
class Domain:
    """The scans a model is meant for. Empty tuples and None mean "any"."""

    suffixes: tuple[str, ...] = ("T1w", "T2w")
    age_years: tuple[float, float] | None = None
    contrast_agent: bool | None = None
    skull_stripped: bool | None = None
    voxel_mm: tuple[float, float] | None = None


@dataclass(frozen=True)
class Weights:
    """Where the weights are: a file in the package, or a URL that is fetched once and cached."""

    sha256: str
    bytes: int
    licence: str
    file: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """One model: domain, networks, strategy, input, protocol, weights, training data, evidence.

    Parameters
    ----------
    name, version, status : str
        Status is ``experimental`` or ``verified`` (which needs evidence).
    domain : Domain
        The scans it is meant for.
    protocol : str
        Label protocol of its output, e.g. ``aseg``; channel order is the protocol's order.
    networks : dict of str to dict
        Role (``locator``, ``segmenter``) to ``{"network": name, **arguments}``.
    strategy : dict
        How the segmenter walks the volume: ``{"name": "sliding", **arguments}``.
    preprocess : dict
        What the card asks of the image: the geometry and the intensity steps.
    weights : Weights
        The safetensors file, hash, size, licence.
    training : dict
        Data (with hashes and licences), recipe, seed, code version, steps.
    evidence : tuple of dict
        ``dataset, n, metric, mean, sd, how`` each.
    citations : tuple of str
        DOIs or URLs of what the model builds on.
    known_failures : tuple of str
        What it is known to get wrong.
    parent : str or None
        Name of the card it was adapted from.
    path : Path or None
        The TOML file it was read from.
    """

    name: str
    version: str
    status: str
    summary: str
    domain: Domain
    protocol: str
    networks: dict[str, dict[str, Any]]
    strategy: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Weights
    training: dict[str, Any] = field(default_factory=dict)
    evidence: tuple[dict[str, Any], ...] = ()
    citations: tuple[str, ...] = ()
    known_failures: tuple[str, ...] = ()
    parent: str | None = None
    path: Path | None = None

    def refuses(self, scan: Scan) -> str | None:
        """Why this model is not meant for `scan`; None if it is."""
        raise NotImplementedError
