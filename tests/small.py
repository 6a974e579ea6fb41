"""Small scans and a small model, for tests of the whole program: two seconds a scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import save_file

from tests.datasets import make_dataset
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.zoo.card_file import write_card
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import describe, load_weights

NETWORK = {"network": "unet", "features": [2, 4], "stem": 2, "prior_channels": 33}


def small_scans(bids: Path, count: int) -> None:
    """The average brain that ships inside nilearn, at 2 mm, with noise of its own in every scan."""
    from nilearn.datasets import load_mni152_template

    brain = load_mni152_template(resolution=2)
    voxels = np.asarray(brain.dataobj, np.float32) * 1000
    make_dataset(bids, ())
    for number in range(1, count + 1):
        noise = np.random.default_rng(number).normal(0, 20, voxels.shape)
        image = nib.Nifti1Image((voxels + noise * (voxels > 0)).astype(np.int16), brain.affine)
        path = bids / f"sub-{number:02}" / "anat" / f"sub-{number:02}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(image, path)


def small_model(folder: Path) -> None:
    """The locator of `any`, and in place of its segmenter an untrained one that trusts the prior.

    Two seconds a scan; what is compared does not depend on how good the labels are.
    """
    card = find_card(load_cards(), "any")
    torch.manual_seed(0)
    network = build(**NETWORK, out_channels=[len(load_protocol(card.protocol))])
    tensors = {f"segmenter.{key}": value.half() for key, value in network.state_dict().items()}
    tensors["segmenter.prior_weight"] = torch.tensor(6.0).half()
    anew = ("segmenter.", "proof.")
    tensors |= {k: v for k, v in load_weights(card).items() if not k.startswith(anew)}
    file, path = folder / "small.safetensors", folder / "small.toml"
    save_file(tensors, file)
    preprocess = {**card.preprocess, "spacing_mm": 2.0, "rounds": 1, "settled_mm": 99.0}
    preprocess["locator"] = {**card.preprocess["locator"], "looks": 1}
    write_card(
        replace(
            card, name="small", path=None, networks={**card.networks, "segmenter": NETWORK},
            strategy={"name": "sliding", "window": 96, "overlap": 0.0},
            preprocess=preprocess, weights=describe(file, "MIT", path),
        ),
        path,
    )  # fmt: skip
