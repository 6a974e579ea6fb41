"""Scan × cards → jobs and skips, each with its reason, before a voxel is read."""

from tlseg_bids.plan.choice import Choice, choose
from tlseg_bids.plan.device import Machine, choose_device
from tlseg_bids.plan.key import content_key, facts
from tlseg_bids.plan.make import make_plan
from tlseg_bids.plan.text import describe

__all__ = [
    "Choice",
    "Machine",
    "choose",
    "choose_device",
    "content_key",
    "describe",
    "facts",
    "make_plan",
]
