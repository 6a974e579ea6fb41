"""A stored question with its answer: does a model still say what it said when it was exported?

Beside the networks' parameters the weights file holds

- ``proof.card``: what of the card decides over the answer (networks, heads, channels,
  preprocess), as UTF-8 JSON in bytes;
- ``proof.input``: an image, uint8 (channels, i, j, k);
- ``proof.<role>.<head>``: the network's logits at every few voxels, float16 (channels, …);
- ``proof.<role>.<head>.mean``: the mean probability of every channel, float32.

``python -m tlseg_bids.zoo.proof CARD.toml …`` writes them anew where a card was changed on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from tlseg_bids.errors import DataError, TlsegError
from tlseg_bids.zoo.assemble import AGAIN, PROOF, assemble, atlases, role_heads
from tlseg_bids.zoo.atlases import pack
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import SEGMENTER, read_card, write_card
from tlseg_bids.zoo.weights import describe, load_weights, local_file

if TYPE_CHECKING:
    from torch import Tensor, nn

SIDE = 32
"""Least voxels along each edge of the stored image."""

POINTS = 5
"""About how many voxels along each axis have their logits stored."""

ABSOLUTE, RELATIVE = 0.005, 2.0**-10
"""Logits agree within ``ABSOLUTE + RELATIVE · |stored|``. Half precision rounds by up to 2⁻¹¹ of
the value. The sums of float32 in another order (with and without oneDNN, one thread and two) moved
the logits of the embedded model by less than 0.00001 against float64, so there is room for other
processors; bfloat16, which must not be taken for float32, moves them by 0.1."""

MEAN = 1e-4
"""Mean probabilities, which are stored in float32, agree within this."""

FLAGS = ("networks", "heads", "channels", "preprocess")


def make_proof(card: ModelCard, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to store beside a model's own: question, answers and the flags of the card.

    Parameters
    ----------
    card : ModelCard
        Its `weights` are not looked at and may be made up.
    tensors : dict of str to Tensor
        Everything else that the file is going to hold.

    Raises
    ------
    DataError
        If card and tensors contradict each other.
    """
    own = {key: value for key, value in tensors.items() if not key.startswith(PROOF)}
    networks = assemble(card, own)
    divisor = max(network.divisor for network in networks.values())
    side = -(-SIDE // (2 * divisor)) * 2 * divisor
    image = _phantom(side, networks[SEGMENTER].image_channels)
    flags = json.dumps(_flags(card), sort_keys=True).encode()
    return {
        f"{PROOF}card": torch.frombuffer(bytearray(flags), dtype=torch.uint8).clone(),
        f"{PROOF}input": image,
        **_answers(card, networks, own, image),
    }


def has_proof(tensors: dict[str, Tensor]) -> bool:
    """Whether a file holds a stored question at all."""
    return f"{PROOF}input" in tensors


def check_proof(card: ModelCard, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Ask the networks the stored question and compare.

    Returns
    -------
    dict of str to float
        Largest difference of a logit for each ``<role>.<head>``.

    Raises
    ------
    DataError
        If there is no proof or a part is missing, if the card says something else than it did at
        the export, or if an answer is another one.
    """
    where = card.path or f"model card '{card.name}'"
    networks = assemble(card, tensors)
    if not has_proof(tensors):
        raise DataError(
            "the weights hold no stored question with its answer", where,
            f"write one with python -m tlseg_bids.zoo.proof {card.path or 'CARD.toml'}",
        )  # fmt: skip
    _check_question(tensors, networks, where)
    _check_flags(card, tensors, where)
    found = _answers(card, networks, tensors, tensors[f"{PROOF}input"])
    worst = {}
    for key, value in found.items():
        stored = tensors.get(key)
        if stored is None or stored.shape != value.shape:
            raise DataError(f"the stored answer '{key}' is missing or cut", where, AGAIN)
        gap = (value.float() - stored.float()).abs()
        mean = key.endswith(".mean")
        allowed = MEAN if mean else ABSOLUTE + RELATIVE * stored.float().abs()
        if not bool((gap <= allowed).all()):
            what = "mean probabilities" if mean else "logits"
            raise DataError(
                f"the {what} of '{key.removeprefix(PROOF).removesuffix('.mean')}' differ by up to "
                f"{float(gap.max()):.3g} from the answer stored at the export", where,
                f"these are not the weights that were exported, or not this code: {AGAIN}",
            )  # fmt: skip
        if not mean:
            worst[key.removeprefix(PROOF)] = float(gap.max())
    return worst


def renew(path: Path) -> ModelCard:
    """Write the proof of a card anew into its weights file, and the file's hash into the card.

    Raises
    ------
    DataError
        As `load_weights` and `assemble`; also if the weights do not lie beside the card.
    """
    from safetensors.torch import save_file

    card = read_card(path)
    file = local_file(card)
    if file is None or card.weights.file is None or file != path.parent / card.weights.file:
        raise DataError(
            "the weights do not lie beside the card", path, "put them where the card's file says"
        )
    tensors = load_weights(card, offline=True)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(PROOF)}
    partial = file.with_name(f".{file.name}.part")
    save_file(pack({**tensors, **make_proof(card, tensors)}), partial)
    partial.chmod(0o644)
    partial.replace(file)
    weights = replace(describe(file, card.weights.licence, path), url=card.weights.url)
    write_card(replace(card, weights=weights), path)
    return read_card(path)


def _flags(card: ModelCard) -> dict[str, Any]:
    """What of a card decides over its answers, in the types of JSON."""
    return json.loads(json.dumps({flag: getattr(card, flag) for flag in FLAGS}, default=_number))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value)


def _check_question(
    tensors: dict[str, Tensor], networks: dict[str, nn.Module], where: object
) -> None:
    """Refuse an image that `make_proof` would not store for these networks."""
    image = tensors[f"{PROOF}input"]
    divisor = max(network.divisor for network in networks.values())
    sides = image.shape[1:]
    if image.dim() != 4 or min(sides) < SIDE or any(side % (2 * divisor) for side in sides):
        raise DataError(
            f"the stored question has the shape {tuple(image.shape)}, and not (channels, i, j, k) "
            f"of {SIDE} voxels or more and multiples of {2 * divisor}", where, AGAIN,
        )  # fmt: skip


def _stored_flags(tensors: dict[str, Tensor], where: object) -> dict[str, Any]:
    try:
        stored = json.loads(bytes(tensors[f"{PROOF}card"].numpy()))
    except (KeyError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise DataError("what the card said at the export is missing or damaged", where, AGAIN)
    return stored


def _check_flags(card: ModelCard, tensors: dict[str, Tensor], where: object) -> None:
    stored, now = _stored_flags(tensors, where), _flags(card)
    for flag in FLAGS:
        if stored.get(flag) != now[flag]:
            raise DataError(
                f"'{flag}' is {_brief(now[flag])} in the card and was {_brief(stored.get(flag))} "
                "when the weights were exported", f"{where}, {flag}",
                "restore it; python -m tlseg_bids.zoo.proof CARD.toml accepts a change on purpose",
            )  # fmt: skip


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _answers(
    card: ModelCard, networks: dict[str, nn.Module], tensors: dict[str, Tensor], image: Tensor
) -> dict[str, Tensor]:
    """Sampled logits and mean probabilities of every head of every network."""
    found, atlas = {}, atlases(card, tensors)
    for role, network in networks.items():
        shown = image[None, : network.image_channels].float()
        prior = None
        known = [atlas[name] for name in role_heads(card, role) if name in atlas]
        if known and getattr(network, "prior_channels", 0):
            size = [n // network.stem for n in image.shape[1:]]
            prior = torch.cat([F.interpolate(one, size=size, mode="trilinear") for one in known], 1)
        for head in range(len(role_heads(card, role))):
            with torch.inference_mode():
                logits = network(shown, prior, head=head)[0]
            step = logits.shape[-1] // POINTS | 1  # odd, so that every kind of sub-voxel is asked
            key = f"{PROOF}{role}.{head}"
            found[key] = logits[:, ::step, ::step, ::step].half().contiguous()
            found[f"{key}.mean"] = logits.softmax(0).mean((1, 2, 3)).float()
    return found


def _phantom(side: int, channels: int) -> Tensor:
    """Nested ellipsoids off the centre, with ripples: uint8 (channels, side, side, side).

    Bright skin, dark skull and fluid, grey and white shells; each further channel turns the
    contrast of the one before around. No two mirror images of it agree.
    """
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side),) * 3, indexing="ij")
    radius = np.sqrt((x + 0.1) ** 2 / 0.8 + (y - 0.15) ** 2 + (z + 0.05 * x) ** 2 / 0.7)
    radius += 0.06 * np.sin(5 * x + 3 * y) * np.cos(4 * z - y)
    shells = np.select(
        [radius < 0.12, radius < 0.5, radius < 0.68, radius < 0.76, radius < 0.84, radius < 0.95],
        [30.0, 190.0, 130.0, 40.0, 20.0, 230.0], 5.0,
    )  # fmt: skip
    image = shells + 10 * np.sin(9 * x * y + 2 * z) + 8 * x
    turned = [image if channel % 2 == 0 else 240 - image for channel in range(channels)]
    return torch.from_numpy(np.stack(turned).clip(0, 255).round().astype(np.uint8))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tlseg_bids.zoo.proof CARD.toml …``; returns the exit code."""
    parser = argparse.ArgumentParser(description="Store question and answer in weights anew.")
    parser.add_argument("cards", nargs="+", type=Path, metavar="CARD.toml")
    try:
        for path in parser.parse_args(argv).cards:
            card = renew(path)
            print(f"{card.name} {card.version}: {card.weights.bytes} bytes, {card.weights.sha256}")
    except TlsegError as error:
        print(f"proof: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
