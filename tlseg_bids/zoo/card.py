"""What a model is, for whom it is meant, and what is known about it.

A card is data: `tlseg_bids.zoo.card_file` reads it from TOML and writes it. Here is what it
means: which scans it refuses, how narrow its domain is, whether its licence is permissive.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tlseg_bids.bids.scan import Age, Scan
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol, own_table
from tlseg_bids.zoo.calibration import Calibration
from tlseg_bids.zoo.licence import is_permissive

DAYS_PER_YEAR = 365.25
TERM_WEEKS = 40.0
AGE_SPAN_YEARS = 100.0
VOXEL_SPAN_MM = 5.0
GIB = 2.0**30


@dataclass(frozen=True)
class Domain:
    """The scans a model is meant for. Empty tuples and None mean "any".

    `agents` are the beginnings of the names of the contrast agents it knows, in lower case:
    ``gad`` holds gadolinium and gadobutrol.
    """

    suffixes: tuple[str, ...] = ("T1w", "T2w")
    age_years: tuple[float, float] | None = None
    contrast_agent: bool | None = None
    skull_stripped: bool | None = None
    voxel_mm: tuple[float, float] | None = None
    agents: tuple[str, ...] = ()

    @property
    def ages_left_out(self) -> float:
        """Share of `AGE_SPAN_YEARS` that does not belong to the domain."""
        return _left_out(self.age_years, AGE_SPAN_YEARS)


@dataclass(frozen=True)
class Weights:
    """Where the weights are: a file beside the card, or a URL that is fetched once and cached.

    Parameters
    ----------
    sha256 : str
        Hash of the file, 64 hexadecimal digits.
    bytes : int
        Size of the file.
    licence : str
        SPDX expression, e.g. ``Apache-2.0`` or ``CC-BY-4.0 AND Apache-2.0``.
    file : str or None
        Path relative to the card's folder.
    url : str or None
        ``https://``, ``http://`` or ``file://``.
    """

    sha256: str
    bytes: int
    licence: str
    file: str | None = None
    url: str | None = None

    @property
    def permissive(self) -> bool:
        """Whether the expression allows every use; see `tlseg_bids.zoo.licence`."""
        return is_permissive(self.licence)


@dataclass(frozen=True)
class Memory:
    """What a scan costs. Without a ``[memory]`` table these cautious values hold.

    Parameters
    ----------
    host_gib : float
        Resident memory that does not depend on the scan: libraries, weights, the model's own
        grid and the network's activations on the CPU; in GiB.
    host_bytes_per_voxel : float
        Resident memory per voxel of the scan's own grid.
    device_gib : float
        Memory that must be free on a GPU, in GiB.
    """

    host_gib: float = 2.0
    host_bytes_per_voxel: float = 64.0
    device_gib: float = 4.0

    def host(self, voxels: int) -> float:
        """Resident memory in GiB for a scan of so many voxels.

        ``host_gib + host_bytes_per_voxel · voxels / 2³⁰``
        """
        return self.host_gib + self.host_bytes_per_voxel * voxels / GIB


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
        Label protocol of its output, e.g. ``aseg``; channel order is the protocol's order. That of
        the first head, unless it is asked for another (`answering`).
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
    memory : Memory
        What a scan costs.
    heads : tuple of str
        Label protocols of the segmenter's heads, in the order of its parameters
        ``segmenter.heads.<n>``; where nothing is said, `protocol` alone.
    channels : tuple of str
        Suffixes of the image's channels, e.g. ``("T1w", "T2w")``; empty for a model of one
        channel, which takes any suffix of its domain.
    calibration : Calibration
        How its probabilities become confidence, predicted Dice and volume intervals.
    frame : str
        Protocol of the template and of the locator, where it is not that of the last head; the
        segmenter cannot check the frame then.
    tables : dict of str to str
        SHA-256 of the table of every protocol of a site's own, by the protocol's name.
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
    memory: Memory = Memory()
    heads: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    frame: str = ""
    tables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.heads:
            object.__setattr__(self, "heads", (self.protocol,))

    def answering(self, protocol: str) -> ModelCard:
        """The card of the same model where it is asked for the protocol of one of its heads.

        Evidence, and what is calibrated structure by structure, is of the first head: the card for
        another one has none.
        """
        if protocol == self.protocol:
            return self
        told = self.calibration
        kept = Calibration(told.how, told.temperature) if protocol in told.temperature else None
        return replace(self, protocol=protocol, evidence=(), calibration=kept or Calibration())

    @property
    def placed_by(self) -> str | None:
        """Name of the model that finds the brain for this one; None if it does so itself."""
        return self.preprocess.get("placed_by")

    @property
    def located_in(self) -> str:
        """Protocol of the template and of the locator."""
        return self.frame or self.heads[-1]

    def protocol_of(self, head: str) -> LabelProtocol:
        """The protocol of one of the heads; a site's own lies beside the card."""
        return load_protocol(head, None if self.path is None else self.path.parent)

    @property
    def own_tables(self) -> dict[str, Path]:
        """The tables beside the card, of protocols that do not come with the program, by name."""
        folder = None if self.path is None else self.path.parent
        found = {name: own_table(name, folder) for name in (*self.heads, self.located_in)}
        return {name: file for name, file in found.items() if file is not None}

    @property
    def permissive(self) -> bool:
        """Whether the weights, and all data that they were trained with, allow every use."""
        return not self.restrictions

    @property
    def restrictions(self) -> tuple[str, ...]:
        """What keeps the model from being permissive: licences of the weights and of the data."""
        found = [] if self.weights.permissive else [f"its licence {self.weights.licence}"]
        found += [
            f"the licence {row['licence']} of the training data '{row.get('dataset', '?')}'"
            for row in _training_data(self)
            if not is_permissive(str(row["licence"]))
        ]
        return tuple(found)

    def refuses(
        self,
        scan: Scan,
        spacing_mm: Sequence[float] | None = None,
        companions: Collection[str] = (),
    ) -> str | None:
        """Why this model is not meant for `scan`; None if it is.

        What the dataset leaves open (age, skull-stripped or not) is refused by a model that needs
        to know it, so that only a model for every age meets a scan of unknown age.

        Parameters
        ----------
        scan : Scan
            The scan.
        spacing_mm : sequence of 3 floats, optional
            Its voxel size in mm; not checked where it is not given.
        companions : collection of str
            Suffixes of the scans beside it that can be further image channels.

        Returns
        -------
        str or None
            All reasons, separated by semicolons.
        """
        reasons = (
            _suffix(self.domain, scan),
            _age(self.domain, scan.age),
            _contrast_agent(self.domain, scan),
            _skull(self.domain, scan),
            _spacing(self.domain, spacing_mm),
            self.lacks(scan, companions),
        )
        return "; ".join(reason for reason in reasons if reason) or None

    def lacks(self, scan: Scan, companions: Collection[str] = ()) -> str | None:
        """Which image channels are missing, without which the model cannot run; None if none."""
        if not self.channels:
            return None
        if scan.suffix not in self.channels:
            return f"it sees {' and '.join(self.channels)} together, this is a {scan.suffix}"
        missing = [s for s in self.channels if s != scan.suffix and s not in companions]
        if not missing:
            return None
        together = " and ".join(self.channels)
        return f"it sees {together} together, there is no {' and '.join(missing)} beside this scan"

    @property
    def specificity(self) -> float:
        """How narrow the domain is: 0 for every scan, one more for each axis it pins down.

        Ages count by the part of `AGE_SPAN_YEARS` they leave out, voxel sizes by the part of
        `VOXEL_SPAN_MM`, one suffix out of two as a half.
        """
        domain = self.domain
        total = 1.0 - min(len(domain.suffixes), 2) / 2 if domain.suffixes else 0.0
        total += domain.ages_left_out
        total += _left_out(domain.voxel_mm, VOXEL_SPAN_MM)
        return total + (domain.contrast_agent is not None) + (domain.skull_stripped is not None)


def age_in_years(age: Age) -> float | None:
    """Age since birth in years; from the post-menstrual age where only that is known.

    A post-menstrual age is corrected by 40 weeks and never falls below 0.
    """
    if age.days is not None:
        return age.days / DAYS_PER_YEAR
    if age.pma_weeks is not None:
        return max(0.0, (age.pma_weeks - TERM_WEEKS) * 7 / DAYS_PER_YEAR)
    return None


def age_text(years: float) -> str:
    """An age as people say it: months below two years."""
    return f"{years * 12:.1f} months" if years < 2 else f"{years:.1f} years"


def _left_out(limits: tuple[float, float] | None, span: float) -> float:
    return 0.0 if limits is None else max(0.0, 1.0 - (limits[1] - limits[0]) / span)


def _suffix(domain: Domain, scan: Scan) -> str | None:
    if domain.suffixes and scan.suffix not in domain.suffixes:
        return f"meant for {' and '.join(domain.suffixes)}, this is a {scan.suffix}"
    return None


def _age(domain: Domain, age: Age) -> str | None:
    if domain.age_years is None:
        return None
    low, high = domain.age_years
    meant, years = f"meant for ages of {low:g} to {high:g} years", age_in_years(age)
    if years is None:
        return f"{meant}, the age at this scan is not known"
    if not low <= years <= high:
        return f"{meant}, this scan was taken at {age_text(years)}"
    return None


def _training_data(card: ModelCard) -> list[dict[str, Any]]:
    rows = card.training.get("data", ())
    return [row for row in rows if isinstance(row, dict) and "licence" in row]


def _contrast_agent(domain: Domain, scan: Scan) -> str | None:
    if scan.contrast_agent and domain.agents and domain.contrast_agent is not False:
        if scan.contrast_agent.lower().startswith(domain.agents):
            return None
        known = ", ".join(f"{agent}…" for agent in domain.agents)
        return f"meant for the contrast agents {known}, this one is after {scan.contrast_agent}"
    if domain.contrast_agent is None or domain.contrast_agent == bool(scan.contrast_agent):
        return None
    if domain.contrast_agent:
        return "meant for scans after contrast agent, this one is without"
    return f"meant for scans without contrast agent, this one is after {scan.contrast_agent}"


def _skull(domain: Domain, scan: Scan) -> str | None:
    if domain.skull_stripped is None or domain.skull_stripped == scan.skull_stripped:
        return None
    meant = "skull-stripped scans" if domain.skull_stripped else "whole heads"
    if scan.skull_stripped is None:
        return f"meant for {meant}, the sidecar has no SkullStripped that says so"
    this = "is skull-stripped" if scan.skull_stripped else "shows the whole head"
    return f"meant for {meant}, this one {this}"


def _spacing(domain: Domain, spacing_mm: Sequence[float] | None) -> str | None:
    if domain.voxel_mm is None or spacing_mm is None:
        return None
    low, high = domain.voxel_mm
    if low <= min(spacing_mm) and max(spacing_mm) <= high:
        return None
    size = " × ".join(f"{edge:.2g}" for edge in spacing_mm)
    return f"meant for voxels of {low:g} to {high:g} mm, these are {size} mm"
