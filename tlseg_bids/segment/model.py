"""A card's networks, ready to run on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prediction, Prepared, SharedRows
from tlseg_bids.labels.landmarks import BoxAtlas, Landmarks
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.networks import channels_last
from tlseg_bids.segment import STRATEGIES
from tlseg_bids.segment.fine import both_sides, likely, refine
from tlseg_bids.zoo.assemble import assemble, atlases
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import SEGMENTER, digest
from tlseg_bids.zoo.registry import placing_card
from tlseg_bids.zoo.settings import check_complete
from tlseg_bids.zoo.weights import load_weights

_PLANES = 16


@dataclass(frozen=True, eq=False)
class Model:
    """Networks by role, template and atlases of a card.

    `heads`: protocols that the segmenter answers in, the primary one first. `template`
    (channels, 3): centroids in template mm, NaN where there is none; `priors` (1, channels, I, J,
    K) float32 each: probabilities over the card's box, for the heads that have them, in their
    order; `atlas` and `seen` keep them, and what the network makes of them, at the sizes that were
    asked for. `placer` finds the brain where the card leaves that to another model. `crew` shares
    out the windows of a scan, and whatever else is done to it.
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

    @property
    def protocol(self) -> LabelProtocol:
        """Of the primary head: what the user gets."""
        return self.heads[0]

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

    @property
    def windows(self) -> Crew:
        """Who shares out windows: on a GPU they go one after the other."""
        return self.crew if self.device.type == "cpu" else ALONE

    @property
    def frame_head(self) -> int | None:
        """The head that answers in the template's protocol; None if there is none."""
        found = self.card.located_in
        heads = [protocol.name for protocol in self.heads]
        return heads.index(found) if found in heads else None


@dataclass(frozen=True)
class Ask:
    """What a segmenter is asked for.

    `head` is a number in the model's heads; `fine` wants the finest answer that it has instead of
    the one at the stem's resolution; `mirror` shows it every window in the mirror, too, and takes
    the mean.
    """

    head: int = 0
    fine: bool = True
    mirror: bool = False


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
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
        The threads for a scan.
    placer : Model, optional
        The model that the card is placed by; loaded if it is not given.

    Raises
    ------
    DataError
        If the tensors do not fit the card's networks, or there is no such `placer`.
    """
    if card.strategy["name"] not in STRATEGIES:
        raise DataError(
            f"no strategy '{card.strategy['name']}'", f"{card.path or card.name}, [strategy]",
            f"known are {', '.join(STRATEGIES)}",
        )  # fmt: skip
    heads = tuple(card.protocol_of(name) for name in card.heads)
    place = torch.device(device)
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


class Models:
    """Models by card and device, each loaded once; may be asked from several threads."""

    def __init__(self, offline: bool = False, crew: Crew = ALONE) -> None:
        self._offline, self._crew, self._lock = offline, crew, Lock()
        self._loaded: dict[tuple[str, Path | None, str], Model] = {}

    def get(self, card: ModelCard, device: str) -> Model:
        """The model of a card; raises as `load_weights` and `load_model`."""
        with self._lock:
            return self._get(card, device)

    def _get(self, card: ModelCard, device: str) -> Model:
        key = (digest(card), card.path, device)  # cards may share a file of weights
        if key not in self._loaded:
            tensors, finder = load_weights(card, self._offline), placing_card(card)
            placer = None if finder is None else self._get(finder, device)
            self._loaded[key] = load_model(card, tensors, device, self._crew, placer)
        return self._loaded[key]


@contextlib.contextmanager
def _fast(model: Model) -> Iterator[None]:
    """Without gradients, in the precision that the device multiplies natively."""
    low = model.precision != torch.float32
    with torch.inference_mode(), torch.autocast(model.device.type, model.precision, low):
        yield


def logits_of(model: Model, role: str, image: Tensor, prior: Tensor | None, **ask: Any) -> Tensor:
    """What one of a model's networks answers, on its device.

    Those that find the brain compute in float32 everywhere, so that every machine sees the scan in
    the same place; they are small.
    """
    with _fast(model) if role == SEGMENTER else torch.inference_mode():
        return model.networks[role](image.to(model.device), prior, **ask)


def _at(model: Model, shape: Sequence[int]) -> Tensor:
    """The atlases side by side at the coarse voxels of the card's box, (1, channels, i, j, k)."""
    with torch.inference_mode():
        return torch.cat([
            F.interpolate(prior, tuple(shape), mode="trilinear", align_corners=False)
            for prior in model.priors.values()
        ], 1)  # fmt: skip


def _atlas(model: Model, shape: list[int]) -> Tensor | None:
    """`_at` for an image of some shape, float16, found once for each."""
    if not model.priors:
        return None
    size = tuple(n // model.networks[SEGMENTER].stem for n in shape)
    if size not in model.atlas:
        model.atlas[size] = _at(model, size).half()
    return model.atlas[size]


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network makes of the atlases, whatever the image, at the coarse voxels of the box.

    `features` (1, features, i, j, k), of the atlases and of the atlases in the mirror; `logits`
    float16 (i, j, k, channels) for each head, None where it has no atlas.
    """

    features: tuple[Tensor, Tensor]
    logits: tuple[Tensor | None, ...]


def _seen(model: Model, shape: list[int]) -> Seen | None:
    """Found once for every size (i, j, k) of the box; None without an atlas."""
    if not model.priors:
        return None
    if (size := tuple(shape)) not in model.seen:
        network, prior = model.networks[SEGMENTER], _at(model, shape)
        turned = _mirror(model, prior)
        with _fast(model):
            features = [network.prior_features(one) for one in (prior, turned)]
            features = [f.contiguous(memory_format=torch.channels_last_3d) for f in features]
            logits = [network.prior_logits(prior, head) for head in range(len(model.heads))]
        rows = [None if one is None else one[0].permute(1, 2, 3, 0).half() for one in logits]
        rows = [None if one is None else one.contiguous() for one in rows]
        model.seen[size] = Seen(tuple(features), tuple(rows))
    return model.seen[size]


def _part(atlas: Tensor | None, corner: Sequence[int], window: Tensor, stem: int) -> Tensor | None:
    """What lies at the coarse voxels of a window of (1, channels, i, j, k)."""
    if atlas is None:
        return None
    ends = zip(corner, window.shape[2:], strict=True)
    some = [slice(c // stem, (c + n) // stem) for c, n in ends]
    return atlas[(slice(None), slice(None), *some)]


def _answer(
    model: Model, ask: Ask, image: Tensor, prior: Tensor | None, member: int | None = None
) -> Tensor:
    """Probabilities of a window, float16 (1, channels, i, j, k), on the CPU.

    The card's temperature holds for the fine answer alone; the coarse one finds the frame.
    """
    parts = None if ask.fine else ()
    heat = _heat(model, ask.head) if ask.fine else 1.0
    who = {} if member is None else {"member": member}
    logits = logits_of(model, SEGMENTER, image, prior, head=ask.head, parts=parts, **who)
    out = torch.empty(logits.shape, dtype=torch.float16)
    for start in range(0, logits.shape[2], _PLANES):
        some = (slice(None), slice(None), slice(start, start + _PLANES))
        out[some] = F.softmax(logits[some].float() / heat, 1)
    return out


def _heat(model: Model, head: int) -> float:
    """The temperature of a head's answer."""
    return model.card.calibration.of_head(model.heads[head].name)


def _mirror(model: Model, prior: Tensor | None) -> Tensor | None:
    """The atlases of a window turned over along the first axis."""
    if prior is None:
        return None
    every = [p for p in model.heads if p.name in model.priors]
    starts = np.cumsum([0, *(len(p) for p in every)])
    swap = np.concatenate([p.mirror + n for p, n in zip(every, starts[:-1], strict=True)])
    return prior.flip(2)[:, torch.as_tensor(swap, device=prior.device)]


def _mirrored(
    model: Model, ask: Ask, image: Tensor, prior: Tensor | None, member: int | None = None
) -> Tensor:
    """Probabilities found in the mirror, brought back."""
    found = _answer(model, ask, image.flip(2), _mirror(model, prior), member)
    return found.flip(2)[:, torch.as_tensor(model.heads[ask.head].mirror)]


def segment(model: Model, prepared: Prepared, ask: Ask) -> Prediction:
    """Class probabilities of a prepared image, on the network's output grid.

    Parameters
    ----------
    prepared : Prepared
        Its image in the card's channels.
    ask : Ask
        Which head answers, how finely, with or without the mirror.

    Notes
    -----
    ``merged`` in the card's strategy numbers the networks that cannot tell left from right (those
    of sagittal slices): what they find is shared out evenly between the sides. A network with an
    age head is asked with every window of the fine answer; the mean is the scan's age.
    """
    own = ("name", "mirror", "merged")
    strategy = {k: v for k, v in model.card.strategy.items() if k not in own}
    if "overlap" in strategy and not ask.fine:
        strategy["overlap"] = 0.0  # finding the frame needs no smooth seams
    walk = partial(STRATEGIES[model.card.strategy["name"]], **strategy, each=model.windows.map)
    network = model.networks[SEGMENTER]
    factor = network.factor if ask.fine else network.stem
    image = torch.from_numpy(prepared.image)[None]
    ages: list[float] = []
    if ask.fine and getattr(getattr(network, "design", None), "age", 0):
        walk = partial(_hearing_ages, model, walk, ages)
    blends = hasattr(network, "body") and not network.coarse_only
    probabilities = (_blended if blends else _plain)(model, ask, image, walk)
    age = float(np.mean(sorted(ages))) if ages else None  # windows may end in any order
    return Prediction(probabilities, prepared.grid.coarser(factor, probabilities.shape[1:]), age)


def _hearing_ages(
    model: Model, walk: Callable[..., Tensor], ages: list[float], predict: Callable[..., Tensor],
    image: Tensor, **options: Any,
) -> Tensor:  # fmt: skip
    """A walk that also notes the age, in years, that the segmenter reads from each window."""

    def heard(window: Tensor, *place: Any) -> Tensor:
        with torch.inference_mode():
            ages.extend(model.networks[SEGMENTER].predicted_age(window.to(model.device)).tolist())
        return predict(window, *place)

    return walk(heard, image, **options)


def _plain(model: Model, ask: Ask, image: Tensor, walk: Callable[..., Tensor]) -> np.ndarray:
    """Probabilities (channels, i, j, k) at the resolution that the network itself answers in."""
    network, atlas = model.networks[SEGMENTER], _atlas(model, list(image.shape[2:]))
    several, merged = hasattr(network, "members"), model.card.strategy.get("merged", ())

    def predict(window: Tensor, corner: tuple[int, int, int], number: int = 0) -> Tensor:
        prior = _part(atlas, corner, window, network.stem)
        prior = None if prior is None else prior.float()
        member = number if several else None
        found = _answer(model, ask, window, prior, member)
        if ask.mirror:
            found = found.add_(_mirrored(model, ask, window, prior, member)).div_(2)
        if number in merged:
            found = (found + found[:, torch.as_tensor(model.heads[ask.head].mirror)]) / 2
        return found

    return walk(predict, image, factor=network.factor if ask.fine else network.stem).numpy()


def one_window(model: Model, image: Tensor) -> bool:
    """Whether one window of the card's strategy covers an image (1, C, I, J, K)."""
    window = model.card.strategy.get("window", np.inf)
    return bool(np.all(np.asarray(window) >= np.asarray(image.shape[2:])))


def _blended(
    model: Model, ask: Ask, image: Tensor, walk: Callable[..., Tensor]
) -> np.ndarray | SharedRows:
    """Probabilities (channels, i, j, k) of a network whose logits and features can be blended."""
    network = model.networks[SEGMENTER]
    prior = _seen(model, [n // network.stem for n in image.shape[2:]])
    # Seams are blended in half floats, which are finer than the bfloat16 that comes in.
    kept = torch.float32 if model.precision == torch.float32 else torch.float16

    def side(turned: bool) -> Tensor:
        def predict(window: Tensor, corner: tuple[int, int, int]) -> Tensor:
            seen = None if prior is None else prior.features[int(turned)]
            part = _part(seen, corner, window, network.stem)
            with _fast(model):
                return network.body(window.to(model.device), part, ask.head, ask.fine).to(kept)

        return walk(predict, image.flip(2) if turned else image, factor=network.stem)

    swap = torch.as_tensor(model.heads[ask.head].mirror, device=model.device)
    # Windows go side by side; where one sees all, the two sides of the mirror do.
    once = one_window(model, image)
    sides = (model.windows.map if once else map)(side, (False, True)[: 1 + ask.mirror])
    straight, mirrored = (*sides, None)[:2]
    with torch.inference_mode():
        added = None if prior is None else prior.logits[ask.head]
        corrections = network.corrections(ask.head) if ask.fine else None
        coarse, sub = both_sides(straight, mirrored, swap, added, corrections)
        if sub is not None:
            return refine(coarse, sub, _heat(model, ask.head), model.windows)
        return likely(coarse).cpu().permute(3, 0, 1, 2).numpy()
