"""Networks: torch in, torch out; nothing of brains, files or labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tlseg_bids.errors import DataError
from tlseg_bids.networks.members import Members
from tlseg_bids.networks.patches import Patches
from tlseg_bids.networks.quicknat import QuickNAT
from tlseg_bids.networks.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "quicknat": QuickNAT,
    "members": Members,
    "patches": Patches,
}


def build(network: str, **arguments: Any) -> nn.Module:
    """An untrained network from the table.

    Raises
    ------
    DataError
        If the table has no such network.
    """
    if network not in NETWORKS:
        raise DataError(f"no network '{network}'", "", f"known are {', '.join(NETWORKS)}")
    return NETWORKS[network](**arguments)


def channels_last(network: nn.Module) -> nn.Module:
    """The network itself, its 3-D kernels now with channels last.

    So its activations have channels last, too, and processors with matrix units convolve them
    without copying. Parameters are no longer contiguous; their values and names stay.
    """
    for parameter in network.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network
