"""Made-up model cards with small weights, for tests of the zoo, the plan and the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.zoo.card import Domain, ModelCard, Weights
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.proof import renew
from tlseg_bids.zoo.weights import describe

SEGMENTER = {"network": "unet", "features": [2, 4]}
EVIDENCE = {
    "dataset": "malc",
    "n": 15,
    "metric": "dice",
    "mean": 0.8,
    "sd": 0.05,
    "how": "held out",
}


def evidence(**values: Any) -> dict[str, Any]:
    """An evidence row with some values changed."""
    return {**EVIDENCE, **values}


def small_card(name: str = "small", **changes: Any) -> ModelCard:
    """A card that is in order, not yet written anywhere; its weights exist nowhere."""
    card = ModelCard(
        name=name,
        version="1.0",
        status="experimental",
        summary="Made up for a test.",
        domain=Domain(),
        protocol="aseg",
        networks={"segmenter": SEGMENTER},
        strategy={"name": "sliding", "window": 32},
        preprocess={"spacing_mm": 1.0},
        weights=Weights("0" * 64, 1, "MIT", file=f"{name}.safetensors"),
        citations=("10.1000/made-up",),
    )
    return replace(card, **changes)


def write_model(
    folder: Path, name: str = "small", licence: str = "MIT", proven: bool = False, **changes: Any
) -> ModelCard:
    """Write ``folder/NAME.safetensors`` and ``folder/NAME.toml`` and read the card back.

    With `proven` the weights also hold a question and its answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, path = folder / f"{name}.safetensors", folder / f"{name}.toml"
    protocol = load_protocol("aseg")
    network = build(**SEGMENTER, out_channels=len(protocol))
    tensors = {f"segmenter.{key}": value for key, value in network.state_dict().items()}
    save_file({**tensors, "template": torch.zeros(len(protocol), 3)}, file)
    write_card(small_card(name, **{"weights": describe(file, licence, path), **changes}), path)
    return renew(path) if proven else read_card(path)
