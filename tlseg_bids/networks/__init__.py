"""Networks: torch in, torch out; nothing of brains, files or labels."""

from __future__ import annotations

from typing import Any

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
