"""A card's networks, ready to run on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.segment import STRATEGIES
from tlseg_bids.volume import Grid
from tlseg_bids.zoo.assemble import assemble, atlases
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.settings import check_complete
from tlseg_bids.zoo.weights import load_weights

_PLANES = 16


@dataclass(frozen=True, eq=False)
class Model:
    """Networks by role, template and atlases of a card.

    `heads`: protocols that the segmenter answers in, the primary one first; the last is that of
    the template and the locator. `template` (channels, 3): centroids in template mm, NaN where
    there is none; `priors` (1, channels, I, J, K) float32 each: probabilities over the card's box,
    for the heads that have them, in their order.
    """

    card: ModelCard
    heads: tuple[LabelProtocol, ...]
    networks: dict[str, nn.Module]
    template: np.ndarray
    priors: dict[str, Tensor]
    device: torch.device
    precision: torch.dtype

    @property
    def protocol(self) -> LabelProtocol:
        """Of the primary head: what the user gets."""
        return self.heads[0]


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


def load_model(card: ModelCard, tensors: dict[str, Tensor], device: str = "cpu") -> Model:
    """Build a card's networks and fill them.

    Parameters
    ----------
    card : ModelCard
        Names the networks by role.
    tensors : dict of str to Tensor
        ``<role>.<parameter>``, ``template`` and, where a network takes them, ``prior.<protocol>``.
    device : str
        A torch device.

    Raises
    ------
    DataError
        If the tensors do not fit the card's networks.
    """
    if card.strategy["name"] not in STRATEGIES:
        raise DataError(
            f"no strategy '{card.strategy['name']}'", f"{card.path or card.name}, [strategy]",
            f"known are {', '.join(STRATEGIES)}",
        )  # fmt: skip
    heads = tuple(card.protocol_of(name) for name in card.heads)
    place = torch.device(device)
    networks = {role: network.to(place) for role, network in assemble(card, tensors).items()}
    priors = {name: atlas.to(place) for name, atlas in atlases(card, tensors).items()}
    nowhere = torch.full((len(heads[-1]), 3), torch.nan)
    return Model(
        card, heads, networks, tensors.get("template", nowhere).double().numpy(), priors,
        place, fast_precision(place),
    )  # fmt: skip


class Models:
    """Models by card and device, each loaded once; may be asked from several threads."""

    def __init__(self, offline: bool = False) -> None:
        self._offline, self._lock = offline, Lock()
        self._loaded: dict[tuple[str, str], Model] = {}

    def get(self, card: ModelCard, device: str) -> Model:
        """The model of a card; raises as `load_weights` and `load_model`."""
        with self._lock:
            key = (card.weights.sha256, device)
            if key not in self._loaded:
                self._loaded[key] = load_model(card, load_weights(card, self._offline), device)
            return self._loaded[key]


def _logits(model: Model, role: str, image: Tensor, prior: Tensor | None, **ask: Any) -> Tensor:
    with (
        torch.inference_mode(),
        torch.autocast(model.device.type, model.precision, model.precision != torch.float32),
    ):
        return model.networks[role](image.to(model.device), prior, **ask)


def locate(model: Model) -> Callable[[np.ndarray], np.ndarray]:
    """The card's locator as a function: image (I, J, K) to probabilities (channels, i, j, k).

    Raises
    ------
    DataError
        If the card has no locator.
    """
    if "locator" not in model.networks:
        raise DataError(
            "the model has no locator, so the brain cannot be found",
            model.card.path or model.card.name, "choose another model with --model",
        )  # fmt: skip
    check_complete(model.card.preprocess, model.card.path or model.card.name)

    def run(image: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
        logits = _logits(model, "locator", tensor, None)
        return F.softmax(logits.float(), 1)[0].cpu().numpy()

    return run


def _prior_window(
    model: Model, corner: tuple[int, ...], side: list[int], shape: list[int]
) -> Tensor | None:
    """The atlases at the coarse voxels of a window, (1, channels, i, j, k)."""
    if not model.priors:
        return None
    stem = model.networks["segmenter"].stem
    theta = torch.zeros(1, 3, 4, device=model.device)
    for axis in range(3):
        row = 2 - axis
        theta[0, row, row] = side[axis] / shape[axis]
        theta[0, row, 3] = (2 * corner[axis] + side[axis]) / shape[axis] - 1
    size = (1, 1, *(n // stem for n in side))
    grid = F.affine_grid(theta, size, align_corners=False)
    return torch.cat([
        F.grid_sample(prior, grid, padding_mode="border", align_corners=False)
        for prior in model.priors.values()
    ], 1)  # fmt: skip


def _answer(model: Model, ask: Ask, image: Tensor, prior: Tensor | None) -> Tensor:
    """Probabilities of a window, float16 (1, channels, i, j, k), on the CPU.

    The card's temperature holds for the fine answer alone; the coarse one finds the frame.
    """
    parts = None if ask.fine else ()
    heat = model.card.calibration.of_head(model.heads[ask.head].name) if ask.fine else 1.0
    logits = _logits(model, "segmenter", image, prior, head=ask.head, parts=parts)
    out = torch.empty(logits.shape, dtype=torch.float16)
    for start in range(0, logits.shape[2], _PLANES):
        some = (slice(None), slice(None), slice(start, start + _PLANES))
        out[some] = F.softmax(logits[some].float() / heat, 1)
    return out


def _mirrored(model: Model, ask: Ask, image: Tensor, prior: Tensor | None) -> Tensor:
    """Probabilities found in the mirror, brought back."""
    if prior is not None:
        every = [p for p in model.heads if p.name in model.priors]
        starts = np.cumsum([0, *(len(p) for p in every)])
        swap = np.concatenate([p.mirror + n for p, n in zip(every, starts[:-1], strict=True)])
        prior = prior.flip(2)[:, torch.as_tensor(swap, device=prior.device)]
    found = _answer(model, ask, image.flip(2), prior)
    return found.flip(2)[:, torch.as_tensor(model.heads[ask.head].mirror)]


def segment(model: Model, prepared: Prepared, ask: Ask) -> Prediction:
    """Class probabilities of a prepared image, on the network's output grid.

    Parameters
    ----------
    prepared : Prepared
        Its image in the card's channels.
    ask : Ask
        Which head answers, how finely, with or without the mirror.
    """
    strategy = {k: v for k, v in model.card.strategy.items() if k not in ("name", "mirror")}
    walk = STRATEGIES[model.card.strategy["name"]]
    network = model.networks["segmenter"]
    factor = network.factor if ask.fine else network.stem
    image = torch.from_numpy(prepared.image)[None]
    shape = list(image.shape[2:])

    def predict(window: Tensor, corner: tuple[int, int, int]) -> Tensor:
        prior = _prior_window(model, corner, list(window.shape[2:]), shape)
        found = _answer(model, ask, window, prior)
        if ask.mirror:
            found = found.add_(_mirrored(model, ask, window, prior)).div_(2)
        return found

    probabilities = walk(predict, image, factor=factor, **strategy)
    step = np.diag([factor, factor, factor, 1.0])
    step[:3, 3] = (factor - 1) / 2
    grid = Grid(tuple(probabilities.shape[1:]), prepared.grid.affine @ step)
    return Prediction(probabilities.numpy(), grid)
