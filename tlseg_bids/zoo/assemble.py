"""A card's networks, built and filled from its tensors, and every contradiction between the two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tlseg_bids.errors import DataError, amount
from tlseg_bids.networks import build
from tlseg_bids.networks.unet import UNet
from tlseg_bids.zoo.atlases import PRIOR
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import SEGMENTER
from tlseg_bids.zoo.settings import VIEWS

if TYPE_CHECKING:
    from torch import Tensor, nn

TEMPLATE, PROOF = "template", "proof."
LOCATOR, SETTLER = "locator", "settler"
UNBUILDABLE = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What PyTorch raises for arguments that make no network, or for weights of another one."""
AGAIN = "fetch or export the model again"
CORRECT = "correct the card, or export the model again"


def role_heads(card: ModelCard, role: str) -> tuple[str, ...]:
    """Protocols in which a network answers: the segmenter in all, the others in the frame's."""
    return card.heads if role == SEGMENTER else (card.located_in,)


def assemble(card: ModelCard, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The networks of a card by role, on the CPU in float32, ready to answer.

    Every head must have the channels of its protocol, every tensor must belong to something, the
    atlases and the template must fit the heads, the image channels and sizes the networks.

    Raises
    ------
    DataError
        If card and tensors contradict each other; the message names both values.
    """
    where = card.path or f"model card '{card.name}'"
    _check_tensors(card, tensors, where)
    networks = {}
    for role, arguments in card.networks.items():
        heads = role_heads(card, role)
        sizes = [len(card.protocol_of(name)) for name in heads]
        _check_heads(role, dict(zip(heads, sizes, strict=True)), tensors, where)
        prefix = f"{role}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            network = build(**arguments, out_channels=sizes)
            network.load_state_dict({key: value.float() for key, value in state.items()})
        except DataError as error:
            raise DataError(error.what, f"{where}, [networks.{role}]", error.hint) from None
        except UNBUILDABLE as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"the weights do not fit the network '{role}' of the card", where,
                f"{AGAIN} ({reason})",
            ) from error  # fmt: skip
        networks[role] = network.eval()
    _check_atlases(card, networks[SEGMENTER], tensors, where)
    _check_settler(card, networks.get(SETTLER), tensors, where)
    _check_sizes(card, networks, where)
    _check_members(card, networks[SEGMENTER], where)
    _check_tiles(card, where)
    return networks


def atlases(card: ModelCard, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities (1, channels, i, j, k) over the card's box, by protocol in the heads' order.

    Only of the heads that have an atlas; each may have voxels of its own size.
    """
    return {
        name: tensors[PRIOR + name][None].float().div(255)
        for name in card.heads
        if PRIOR + name in tensors
    }


def stored_atlases(priors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities (1, channels, i, j, k) by protocol to the tensors that `atlases` reads."""
    return {
        PRIOR + name: (prior[0] * 255).round().to(torch.uint8).cpu()
        for name, prior in priors.items()
    }


def _check_tensors(card: ModelCard, tensors: dict[str, Tensor], where: object) -> None:
    """Refuse what belongs to nothing, mixed precisions and numbers that are none."""
    known = (*(f"{role}." for role in card.networks), PROOF)
    extra = {TEMPLATE, *(PRIOR + name for name in card.heads)}
    foreign = sorted(key for key in tensors if not key.startswith(known) and key not in extra)
    if foreign:
        raise DataError(
            f"the tensor '{foreign[0]}' belongs to no network or head of the card", where, CORRECT
        )
    types: dict[torch.dtype, str] = {}
    for role in card.networks:
        for key, value in tensors.items():
            if key.startswith(f"{role}."):
                types.setdefault(value.dtype, key)
                if not value.is_floating_point() or not bool(value.float().isfinite().all()):
                    raise DataError(f"'{key}' holds what is no finite number", where, AGAIN)
    if len(types) > 1:
        told = " and ".join(f"'{key}' in {_short(kind)}" for kind, key in types.items())
        raise DataError(f"the weights mix precisions: {told}", where, AGAIN)


def precision(card: ModelCard, tensors: dict[str, Tensor]) -> str:
    """In which type the networks' parameters are stored, ``float16`` for example."""
    prefix = tuple(f"{role}." for role in card.networks)
    return _short(next(value.dtype for key, value in tensors.items() if key.startswith(prefix)))


def _check_heads(
    role: str, heads: dict[str, int], tensors: dict[str, Tensor], where: object
) -> None:
    """Refuse a number of heads, or of a head's channels, that is not the card's."""
    members = any(key.startswith(f"{role}.members.") for key in tensors)
    prefix = f"{role}.members.0.heads." if members else f"{role}.heads."
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    if len(numbers) != len(heads):
        raise DataError(
            f"the {role} has {amount(len(numbers), 'head')} in its weights and {len(heads)} in "
            "the card "
            f"({', '.join(heads)})", where, CORRECT,
        )  # fmt: skip
    for number, (name, wanted) in enumerate(heads.items()):
        weight = tensors.get(f"{prefix}{number}.weight")
        found = len(weight) if weight is not None and weight.dim() else 0
        if found != wanted:
            raise DataError(
                f"head {number} of the {role} has {amount(found, 'channel')} and the protocol "
                f"'{name}' "
                f"{wanted}", where, CORRECT,
            )  # fmt: skip


def _check_atlases(
    card: ModelCard, segmenter: nn.Module, tensors: dict[str, Tensor], where: object
) -> None:
    channels = 0
    for name in card.heads:
        atlas = tensors.get(PRIOR + name)
        if atlas is None:
            continue
        if atlas.dim() != 4 or not atlas.numel() or atlas.dtype != torch.uint8:
            raise DataError(
                f"the atlas of '{name}' has the shape {tuple(atlas.shape)} and the type "
                f"{_short(atlas.dtype)}, and not (channels, I, J, K) and uint8", where, AGAIN,
            )  # fmt: skip
        channels += len(atlas)
        if len(atlas) != len(card.protocol_of(name)):
            raise DataError(
                f"the atlas of '{name}' has {amount(len(atlas), 'channel')} and the protocol "
                f"{len(card.protocol_of(name))}", where, CORRECT,
            )  # fmt: skip
        _check_box(card, name, atlas.shape[1:], where)
    if channels and channels != segmenter.prior_channels:
        raise DataError(
            f"the atlases have {channels} channels and the segmenter takes "
            f"{segmenter.prior_channels}", where, CORRECT,
        )  # fmt: skip
    template, protocol = tensors.get(TEMPLATE), card.protocol_of(card.located_in)
    if template is None and LOCATOR in card.networks:
        raise DataError("the weights hold no template for the locator", where, AGAIN)
    if template is not None and template.shape != (len(protocol), 3):
        raise DataError(
            f"the template has the shape {tuple(template.shape)} and the protocol "
            f"'{protocol.name}' {len(protocol)} structures", where, CORRECT,
        )  # fmt: skip


def _check_settler(
    card: ModelCard, settler: nn.Module | None, tensors: dict[str, Tensor], where: object
) -> None:
    """Refuse a settler that wants another atlas than that of the template's protocol, or that is
    no U-Net: of others it is not known what they make of the atlas alone."""
    if settler is not None and not isinstance(settler, UNet):
        raise DataError(
            f"the settler is of the kind '{card.networks[SETTLER]['network']}' and can only be a "
            "'unet'", where, CORRECT,
        )  # fmt: skip
    taken = getattr(settler, "prior_channels", 0)
    given = len(tensors.get(PRIOR + card.located_in, ()))
    if taken and taken != given:
        raise DataError(
            f"the settler takes an atlas of {taken} channels and that of '{card.located_in}' has "
            f"{given}", where, CORRECT,
        )  # fmt: skip


def _check_box(card: ModelCard, name: str, shape: tuple[int, ...], where: object) -> None:
    """Refuse a box of other proportions than the atlas, whose voxels are cubes."""
    box = card.preprocess.get("box_mm")
    if box is None:
        return
    edges = np.diff(np.asarray(box, float))[:, 0] / np.asarray(shape)
    if np.ptp(edges) > 0.01 * edges.mean():
        size = " × ".join(f"{edge:.3g}" for edge in edges)
        raise DataError(
            f"box_mm gives the atlas of '{name}' voxels of {size} mm, which are no cubes",
            f"{where}, [preprocess]", CORRECT,
        )  # fmt: skip


def _check_sizes(card: ModelCard, networks: dict[str, nn.Module], where: object) -> None:
    """Refuse image channels that the segmenter does not take, and windows it cannot halve."""
    segmenter, channels = networks[SEGMENTER], max(len(card.channels), 1)
    if segmenter.image_channels != channels:
        raise DataError(
            f"the segmenter takes {segmenter.image_channels} image channels and the card has "
            f"{channels}", f"{where}, channels", CORRECT,
        )  # fmt: skip
    sizes: list[tuple[str, Any]] = [(SEGMENTER, card.strategy.get("window"))]
    if SETTLER in networks:
        if (sides := _settler_sides(card)) is None:
            raise DataError(
                "missing: box_mm or settler.spacing_mm, so the settler's voxels are not known",
                f"{where}, [preprocess]", CORRECT,
            )  # fmt: skip
        sizes.append((SETTLER, sides))
    if LOCATOR in networks:
        sizes.append((LOCATOR, card.preprocess.get(LOCATOR, {}).get("size")))
    _check_shown(card, segmenter, where)
    for role, size in sizes:
        divisor = networks[role].divisor
        if size is not None and np.any(np.asarray(size) % divisor):
            raise DataError(
                f"the {role} is shown {size} voxels and can only halve multiples of {divisor}",
                where, CORRECT,
            )  # fmt: skip


def _check_shown(card: ModelCard, segmenter: nn.Module, where: object) -> None:
    """Refuse halves and trims that a segmenter cannot be shown, or that leave the middle out."""
    size = _sides(card.preprocess.get("box_mm"), card.preprocess.get("spacing_mm"))
    halves, trim = card.strategy.get("halves", False), card.strategy.get("trim", (0, 0, 0))
    if not halves and not any(trim):
        return
    if getattr(segmenter, "coarse_only", True):
        raise DataError(
            "halves and trim are for a segmenter with sub-voxel answers (detail), which this one "
            "has not", f"{where}, [strategy]", CORRECT,
        )  # fmt: skip
    if size is None:
        return
    left = [n - 2 * t for n, t in zip(size, trim, strict=True)]
    window = np.broadcast_to(card.strategy.get("window", max(size)), 3)
    shown = np.minimum(window, left)
    if min(left) <= 0 or np.any(shown % segmenter.divisor) or np.any(np.mod(trim, segmenter.stem)):
        raise DataError(
            f"trim {list(trim)} leaves {left} of {size} voxels: the segmenter is shown "
            f"{shown.tolist()} of them and can only halve multiples of {segmenter.divisor}",
            f"{where}, [strategy], trim", CORRECT,
        )  # fmt: skip
    if halves and 2 * window[0] < left[0]:
        raise DataError(
            f"a half of {window[0]} voxels does not reach the middle of {left[0]}",
            f"{where}, [strategy], window", CORRECT,
        )  # fmt: skip


def _check_members(card: ModelCard, segmenter: nn.Module, where: object) -> None:
    """Refuse to ask another number of networks than share the volume."""
    strategy, own = card.strategy, len(getattr(segmenter, "members", ()))
    if not own:
        return
    asked = 1
    if strategy["name"] == "views":
        asked = len(strategy.get("axes", range(VIEWS)))
    elif strategy["name"] == "tiles":
        asked = math.prod(map(len, strategy["begins"])) if "begins" in strategy else own
    if asked != own:
        raise DataError(
            f"the strategy '{strategy['name']}' asks {amount(asked, 'network')} and the segmenter "
            f"has {own}", f"{where}, [strategy]", CORRECT,
        )  # fmt: skip
    if (last := max(strategy.get("merged", ()), default=0)) >= own:
        raise DataError(
            f"merged holds {last} and the networks are 0 to {own - 1}",
            f"{where}, [strategy], merged", CORRECT,
        )  # fmt: skip


def _check_tiles(card: ModelCard, where: object) -> None:
    """Refuse tiles that leave voxels of the box out, or reach beyond it."""
    begins = card.strategy.get("begins")
    box = _sides(card.preprocess.get("box_mm"), card.preprocess.get("spacing_mm"))
    if begins is None or box is None or "window" not in card.strategy:
        return
    tile = np.minimum(np.broadcast_to(card.strategy["window"], 3), box)
    for axis, (n, side, firsts) in enumerate(zip(box, tile, begins, strict=True)):
        if {voxel for first in firsts for voxel in range(first, first + side)} != set(range(n)):
            raise DataError(
                f"tiles of {side} voxels that begin at {list(firsts)} do not cover the {n} of "
                f"axis {axis}", f"{where}, [strategy], begins", CORRECT,
            )  # fmt: skip


def _settler_sides(card: ModelCard) -> list[int] | None:
    """Voxels that the settler is shown along each axis; None where the card does not say."""
    return _sides(card.preprocess.get("box_mm"), card.preprocess.get(SETTLER, {}).get("spacing_mm"))


def _sides(box_mm: Any, spacing_mm: float | None) -> list[int] | None:
    """Voxels along each axis of a box; None where box or voxels are not known."""
    if box_mm is None or spacing_mm is None:
        return None
    return [round((high - low) / spacing_mm) for low, high in box_mm]


def _short(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
