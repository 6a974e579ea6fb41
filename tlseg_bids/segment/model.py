"""A card's networks, ready to run on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol
from tlseg_bids.networks import build
from tlseg_bids.segment import STRATEGIES
from tlseg_bids.volume import Grid
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.weights import load_weights


@dataclass(frozen=True, eq=False)
class Model:
    """Networks by role, template and prior of a card.

    `template` (channels, 3): centroids in template mm, NaN where there is none; `prior`
    (1, channels, I, J, K) float32: atlas probabilities over the card's box, or None.
    """

    card: ModelCard
    protocol: LabelProtocol
    networks: dict[str, nn.Module]
    template: np.ndarray
    prior: Tensor | None
    device: torch.device
    precision: torch.dtype


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
        ``<role>.<parameter>``, ``template`` and, where a network takes one, ``prior``.
    device : str
        A torch device.

    Raises
    ------
    DataError
        If the tensors do not fit the card's networks.
    """
    protocol = load_protocol(card.protocol)
    place = torch.device(device)
    networks = {}
    for role, arguments in card.networks.items():
        network = build(**arguments, out_channels=len(protocol))
        prefix = f"{role}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            network.load_state_dict({k: v.float() for k, v in state.items()})
        except RuntimeError as error:
            raise DataError(
                f"the weights do not fit the network '{role}' of the card",
                card.path or card.name,
                f"fetch or export the model again ({str(error).splitlines()[0]})",
            ) from error
        networks[role] = network.to(place).eval()
    if "locator" in networks and "template" not in tensors:
        raise DataError(
            "the weights hold no template for the locator", card.path or card.name,
            "fetch or export the model again",
        )  # fmt: skip
    nowhere = torch.full((len(protocol), 3), torch.nan)
    prior = tensors.get("prior")
    return Model(
        card, protocol, networks, tensors.get("template", nowhere).double().numpy(),
        None if prior is None else prior[None].float().div(255).to(place),
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


def _probabilities(model: Model, role: str, image: Tensor, prior: Tensor | None) -> Tensor:
    with (
        torch.inference_mode(),
        torch.autocast(model.device.type, model.precision, model.precision != torch.float32),
    ):
        logits = model.networks[role](image.to(model.device), prior)
    return F.softmax(logits.float(), 1)


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

    def run(image: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
        return _probabilities(model, "locator", tensor, None)[0].cpu().numpy()

    return run


def _prior_window(model: Model, corner: tuple[int, ...], side: list[int], shape: list[int]):
    """The atlas at the output voxels of a window, (1, channels, i, j, k)."""
    if model.prior is None:
        return None
    stem = model.networks["segmenter"].stem
    theta = torch.zeros(1, 3, 4, device=model.device)
    for axis in range(3):
        row = 2 - axis
        theta[0, row, row] = side[axis] / shape[axis]
        theta[0, row, 3] = (2 * corner[axis] + side[axis]) / shape[axis] - 1
    size = (1, 1, *(n // stem for n in side))
    grid = F.affine_grid(theta, size, align_corners=False)
    return F.grid_sample(model.prior, grid, padding_mode="border", align_corners=False)


def _straight(model: Model, image: Tensor, prior: Tensor | None) -> Tensor:
    return _probabilities(model, "segmenter", image, prior)


def _mirrored(model: Model, image: Tensor, prior: Tensor | None) -> Tensor:
    """Probabilities found in the mirror, brought back."""
    swap = torch.as_tensor(model.protocol.mirror, device=model.device)
    turned = None if prior is None else prior.flip(2)[:, swap]
    return _probabilities(model, "segmenter", image.flip(2), turned).flip(2)[:, swap]


def segment(model: Model, prepared: Prepared, mirrored: bool = False) -> Prediction:
    """Class probabilities of a prepared image, on the network's output grid.

    Parameters
    ----------
    mirrored : bool
        Show the network every window in the mirror, and mirror its answer back.
    """
    strategy = dict(model.card.strategy)
    walk = STRATEGIES[strategy.pop("name")]
    strategy.pop("mirror", None)
    stem = model.networks["segmenter"].stem
    image = torch.from_numpy(prepared.image)[None]
    shape = list(image.shape[2:])
    answer = _mirrored if mirrored else _straight

    def predict(window: Tensor, corner: tuple[int, int, int]) -> Tensor:
        prior = _prior_window(model, corner, list(window.shape[2:]), shape)
        return answer(model, window, prior).cpu()

    probabilities = walk(predict, image, factor=stem, **strategy)
    coarse = np.diag([stem, stem, stem, 1.0])
    coarse[:3, 3] = (stem - 1) / 2
    grid = Grid(tuple(probabilities.shape[1:]), prepared.grid.affine @ coarse)
    return Prediction(probabilities.half().numpy(), grid)


def with_mirror(model: Model, prepared: Prepared, straight: Prediction) -> Prediction:
    """The mean of an answer and the one from the mirror, where the card asks for it."""
    if not model.card.strategy.get("mirror", False):
        return straight
    other = segment(model, prepared, mirrored=True)
    both = straight.probabilities + other.probabilities
    return Prediction(both / np.float16(2), straight.grid)
