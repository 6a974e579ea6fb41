"""A card's networks, ready to run on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.errors import DataError
from tlseg_bids.labels.landmarks import BoxAtlas, Landmarks
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.networks import channels_last
from tlseg_bids.segment import HOW_ASKED, STRATEGIES, arguments_of
from tlseg_bids.zoo.assemble import assemble, atlases
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import SEGMENTER, digest
from tlseg_bids.zoo.registry import placing_card
from tlseg_bids.zoo.settings import check_complete
from tlseg_bids.zoo.weights import load_weights

MOST_AIR = 0.1
"""Share of heads in which a voxel is no brain, below which the atlas counts it as one."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network makes of the atlases, whatever the image, at the coarse voxels of the box.

    `features` (1, features, i, j, k), of the atlases and of the atlases in the mirror; `logits`
    float16 (i, j, k, channels) for each head, None where it has no atlas.
    """

    features: tuple[Tensor, Tensor]
    logits: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """Networks by role, template and atlases of a card.

    `heads`: protocols that the segmenter answers in, in the order of its heads. `template`
    (channels, 3): centroids in template mm, NaN where there is none; `priors` (1, channels, I, J,
    K) float32 each: probabilities over the card's box, for the heads that have them, in their
    order; `atlas` keeps them, `seen` and `surveyed` what segmenter and settler make of them, at the
    sizes that were asked for. `placer` finds the brain where the card leaves that to another model.
    `crew` shares out the windows of a scan, and whatever else is done to it, on `device`.
    """

    card: ModelCard
    heads: tuple[LabelProtocol, ...]
    networks: dict[str, nn.Module]
    template: np.ndarray
    priors: dict[str, Tensor]
    device: torch.device
    precision: torch.dtype
    crew: Crew = ALONE
    placer: Model | None = None
    atlas: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    seen: dict[tuple[int, ...], Seen] = field(default_factory=dict, init=False, repr=False)
    surveyed: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def protocol(self) -> LabelProtocol:
        """Of the head that the card asks: what the user gets."""
        return self.heads[self.head]

    @property
    def head(self) -> int:
        """Number of the head that the card asks."""
        return self.card.heads.index(self.card.protocol)

    @cached_property
    def landmarks(self) -> Landmarks:
        """The template's structures, with their atlas where the card has it."""
        return Landmarks(self.template, self.box_atlases.get(self.card.located_in))

    @cached_property
    def box_atlases(self) -> dict[str, BoxAtlas]:
        """The atlases of `priors` over the card's box, by protocol."""
        return {
            name: BoxAtlas(prior[0].float().cpu().numpy(), self.card.preprocess["box_mm"])
            for name, prior in self.priors.items()
        }

    @cached_property
    def brain(self) -> Tensor | None:
        """Where the card's grid shows brain in hardly any head not: bool (I, J, K), on `device`.

        None where the card has no atlas of the template's protocol.
        """
        if (atlas := self.priors.get(self.card.located_in)) is None:
            return None
        options = self.card.preprocess
        size = np.round(np.diff(options["box_mm"])[:, 0] / options["spacing_mm"]).astype(int)
        air = F.interpolate(atlas[:, :1].float(), tuple(size.tolist()), mode="trilinear")[0, 0]
        return air < MOST_AIR

    @property
    def frame_head(self) -> int | None:
        """The head that answers in the template's protocol; None if there is none."""
        found = self.card.located_in
        heads = [protocol.name for protocol in self.heads]
        return heads.index(found) if found in heads else None


def fast_precision(device: torch.device) -> torch.dtype:
    """What is multiplied is rounded to this: on a CPU bfloat16, if it multiplies that natively.

    On a GPU float16, which every one with matrix units multiplies, and which rounds eight times
    less; what lies beyond its range is noticed (`tlseg_bids.segment.answer.segment`).
    """
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return torch.bfloat16 if native() or tiles() else torch.float32
    return torch.float32


def load_model(
    card: ModelCard, tensors: dict[str, Tensor], device: str = "cpu", crew: Crew = ALONE,
    placer: Model | None = None,
) -> Model:  # fmt: skip
    """Build a card's networks and fill them.

    Parameters
    ----------
    card : ModelCard
        Names the networks by role.
    tensors : dict of str to Tensor
        ``<role>.<parameter>``, ``template`` and, where a network takes them, ``prior.<protocol>``.
    device : str
        A torch device.
    crew : Crew
        The threads for a scan; on another device than the CPU it is one.
    placer : Model, optional
        The model that the card is placed by; loaded if it is not given.

    Raises
    ------
    DataError
        If the tensors do not fit the card's networks, or there is no such `placer` or strategy.
    """
    _check_strategy(card)
    heads = tuple(card.protocol_of(name) for name in card.heads)
    place = torch.device(device)
    crew = crew if place == crew.device else Crew(device=place)
    finder = placing_card(card)
    if finder is not None:
        check_complete(card.preprocess, card.path or card.name)
        placer = placer or load_model(finder, load_weights(finder), device, crew)
    networks = {
        role: channels_last(network.to(place)) for role, network in assemble(card, tensors).items()
    }
    priors = {name: atlas.to(place) for name, atlas in atlases(card, tensors).items()}
    nowhere = torch.full((len(card.protocol_of(card.located_in)), 3), torch.nan)
    return Model(
        card, heads, networks, tensors.get("template", nowhere).double().numpy(), priors,
        place, fast_precision(place), crew, placer,
    )  # fmt: skip


def _check_strategy(card: ModelCard) -> None:
    """Refuse a strategy that is not known, and arguments that it does not take."""
    name, where = card.strategy["name"], f"{card.path or card.name}, [strategy]"
    if name not in STRATEGIES:
        raise DataError(f"no strategy '{name}'", where, f"known are {', '.join(STRATEGIES)}")
    known = (*HOW_ASKED, *arguments_of(name))
    if unknown := [key for key in card.strategy if key not in known]:
        raise DataError(
            f"the strategy '{name}' takes no {' and no '.join(unknown)}", where,
            f"known are {', '.join(known)}",
        )  # fmt: skip


class Models:
    """Models by card and device, each loaded once; may be asked from several threads.

    Scans side by side take turns on a GPU (`turn`), so that it holds what one of them needs, and
    are read, judged and written meanwhile.
    """

    def __init__(self, offline: bool = False, crew: Crew = ALONE) -> None:
        self._offline, self._crew, self._lock = offline, crew, Lock()
        self._loaded: dict[tuple[str, Path | None, str], Model] = {}
        self._turns: dict[str, Lock] = {}

    def get(self, card: ModelCard, device: str) -> Model:
        """The model of a card; raises as `load_weights` and `load_model`."""
        with self._lock:
            return self._get(card, device)

    @contextlib.contextmanager
    def turn(self, device: str) -> Iterator[None]:
        """While it lasts a GPU is the caller's alone; the CPU is everyone's."""
        with self._lock:
            own = self._turns.setdefault(device, Lock())
        with contextlib.nullcontext() if device == "cpu" else own:
            yield

    def _get(self, card: ModelCard, device: str) -> Model:
        key = (digest(card), card.path, device)  # cards may share a file of weights
        if key not in self._loaded:
            tensors, finder = load_weights(card, self._offline), placing_card(card)
            placer = None if finder is None else self._get(finder, device)
            self._loaded[key] = load_model(card, tensors, device, self._crew, placer)
        return self._loaded[key]


def learning_precision(model: Model) -> torch.dtype:
    """In which a model's child learns: gradients are too small for float16."""
    return torch.bfloat16 if model.precision == torch.float16 else model.precision


@contextlib.contextmanager
def fast(model: Model) -> Iterator[None]:
    """Without gradients, in the precision that the device multiplies natively."""
    low = model.precision != torch.float32
    with torch.inference_mode(), torch.autocast(model.device.type, model.precision, low):
        yield


@contextlib.contextmanager
def exact(model: Model) -> Iterator[None]:
    """Without gradients, in float32: in convolutions a GPU would round to TF32, unless told not to.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html.
    """
    whole = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.inference_mode(), contextlib.nullcontext() if model.device.type == "cpu" else whole:
        yield


def logits_of(model: Model, role: str, image: Tensor, prior: Tensor | None, **ask: Any) -> Tensor:
    """What one of a model's networks answers, on its device.

    Those that find the brain compute in float32 everywhere, so that every machine sees the scan in
    the same place; they are small.
    """
    with fast(model) if role == SEGMENTER else exact(model):
        return model.networks[role](image.to(model.device), prior, **ask)
