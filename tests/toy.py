"""A head of a few structures, and a model that finds and labels it within a second, untrained.

Every structure has a brightness of its own. The locator tells classes by brightness (a linear
discriminant, written into the weights); where it sees them in the toy head is the template. The
segmenter answers with its atlas. So the way from file to file is the program's own, and fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import save_file
from scipy import ndimage

from tests.cards import small_card
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.preprocess.geometry import interpolated, resample
from tlseg_bids.preprocess.prepare import cube, foreground_centre
from tlseg_bids.preprocess.register import centroids, counted
from tlseg_bids.segment.model import load_model
from tlseg_bids.segment.place import locate
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.card import Memory, ModelCard
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.weights import describe

PROTOCOL = load_protocol("aseg")
SIDE, SPACING_MM = 24, 6.0
BOX_MM = [[-72.0, 72.0]] * 3
SHARPNESS = 400.0
STRUCTURES = {
    "Left cerebral white matter": ((-30, 0, 8), (28, 58, 46), 40),
    "Right cerebral white matter": ((30, 0, 8), (28, 58, 46), 52),
    "Left thalamus": ((-22, -18, 0), (14, 14, 14), 64),
    "Right thalamus": ((22, -18, 0), (14, 14, 14), 76),
    "Left putamen": ((-34, 24, 10), (13, 14, 13), 88),
    "Right putamen": ((34, 24, 10), (13, 14, 13), 100),
    "Brain stem": ((0, -20, -50), (16, 16, 18), 112),
    "Left lateral ventricle": ((-26, 4, 34), (13, 14, 13), 124),
    "Right lateral ventricle": ((26, 4, 34), (13, 14, 13), 136),
}
"""Centre and half-axes in mm (RAS+), and brightness."""


def grid(spacing_mm: float = SPACING_MM, side: int = SIDE) -> Grid:
    """Cubic voxels around the origin."""
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -(side - 1) / 2 * spacing_mm
    return Grid((side,) * 3, affine)


def index_of(name: str) -> int:
    """A structure's label."""
    return int(PROTOCOL.table["index"][PROTOCOL.table["name"] == name].iloc[0])


def draw(on: Grid, brightness: bool = True) -> np.ndarray:
    """The head on a grid: brightness, or labels; int16."""
    voxels = np.moveaxis(np.indices(on.shape), 0, -1)
    places = nib.affines.apply_affine(on.affine, voxels)
    out = np.zeros(on.shape, np.int16)
    for name, (centre, radii, value) in STRUCTURES.items():
        inside = (((places - centre) / radii) ** 2).sum(-1) <= 1
        out[inside] = value if brightness else index_of(name)
    return out


def write_scan(path: Path, seed: int = 0, spacing_mm: float = SPACING_MM) -> Path:
    """The head as a scan with a little noise; `seed` makes each one's bytes its own."""
    side = round(SIDE * SPACING_MM / spacing_mm)
    on = grid(spacing_mm, side)
    image = draw(on) + np.random.default_rng(seed).integers(0, 2, on.shape)
    image[draw(on) == 0] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    scan = nib.Nifti1Image(image.astype(np.int16), on.affine)
    scan.set_sform(on.affine, 1)
    scan.set_qform(on.affine, 1)
    scan.header.set_xyzt_units("mm", "sec")
    nib.save(scan, path)
    return path


def write_toy_model(folder: Path, name: str = "toy") -> ModelCard:
    """Write ``folder/NAME.toml`` and its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    file, path = folder / f"{name}.safetensors", folder / f"{name}.toml"
    networks = {
        "locator": {"network": "unet", "features": [2], "stem": 1},
        "segmenter": {
            "network": "unet", "features": [2], "stem": 1, "prior_channels": len(PROTOCOL),
        },
    }  # fmt: skip
    options: dict[str, Any] = {
        "box_mm": BOX_MM, "spacing_mm": SPACING_MM, "rounds": 1, "settled_mm": 50.0,
        "locator": {"size": SIDE, "spacing_mm": SPACING_MM, "looks": 1},
    }  # fmt: skip
    tensors = {**_discriminant(), **_atlas()}
    tensors["template"] = torch.zeros(len(PROTOCOL), 3)
    card = small_card(
        name, networks=networks, preprocess=options, memory=Memory(0.4, 8.0, 0.5),
        strategy={"name": "sliding", "window": SIDE, "overlap": 0.0},
    )  # fmt: skip
    tensors["template"] = torch.from_numpy(_template(card, tensors)).float()
    save_file(tensors, file)
    write_card(small_card(name, **{
        "networks": networks, "preprocess": options, "memory": card.memory,
        "strategy": card.strategy, "weights": describe(file, "MIT", path),
    }), path)  # fmt: skip
    return read_card(path)


def _seen() -> np.ndarray:
    """The head as the locator's network sees it: standardised."""
    volume = Volume(draw(grid()).astype(np.float32), grid())
    frame = np.eye(4)
    frame[:3, 3] = -foreground_centre(volume)
    image = resample(volume, cube(frame, SIDE, SPACING_MM))
    return (image - image.mean()) / image.std()


def _discriminant() -> dict[str, torch.Tensor]:
    """A locator that answers with the class of the nearest brightness.

    The block passes x as leaky(x) and leaky(-x), whose difference is x. The head's logits are
    SHARPNESS · (2·m·x − m²), m being the class's brightness; other classes are never taken.
    """
    network = build("unet", out_channels=len(PROTOCOL), features=[2], stem=1)
    state = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    for row, sign in enumerate((1.0, -1.0)):
        state["down.0.conv1.weight"][row, 0, 1, 1, 1] = sign
    state["down.0.norm1.weight"][:] = 1
    seen, labels = _seen(), draw(grid(), brightness=False)
    weight, bias = state["heads.0.weight"], state["heads.0.bias"]
    bias[:] = -1e4
    for name in ("", *STRUCTURES):
        index = index_of(name) if name else 0
        channel = int(np.flatnonzero(PROTOCOL.indices == index)[0])
        mean = float(np.median(seen[ndimage.binary_erosion(labels == index)]))
        weight[channel, 0], weight[channel, 1] = 2 * mean * SHARPNESS, -2 * mean * SHARPNESS
        bias[channel] = -(mean**2) * SHARPNESS
    return {f"locator.{key}": value for key, value in state.items()}


def _atlas() -> dict[str, torch.Tensor]:
    """A segmenter whose answer is its atlas, the head itself."""
    network = build(
        "unet", out_channels=len(PROTOCOL), features=[2], stem=1, prior_channels=len(PROTOCOL)
    )
    state = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    state["prior_weight"] = torch.tensor(2.0)
    box = grid()
    labels = draw(box, brightness=False)
    atlas = np.stack([labels == index for index in PROTOCOL.indices]).astype(np.uint8) * 255
    return {
        **{f"segmenter.{key}": value for key, value in state.items()},
        "prior.aseg": torch.from_numpy(atlas),
    }


def _template(card: ModelCard, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """Where the locator sees the structures of the toy head, mm."""
    see = locate(load_model(card, tensors))
    volume = Volume(draw(grid()).astype(np.float32), grid())
    frame = np.eye(4)
    frame[:3, 3] = -foreground_centre(volume)
    on = cube(frame, SIDE, SPACING_MM)
    found = see(interpolated(volume, on))
    return centroids(counted(found), on.affine)[0]
