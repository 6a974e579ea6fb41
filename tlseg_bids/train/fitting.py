"""Whether the parts of a recipe fit each other, told before a scan is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import nn

from tlseg_bids.bids.discover import SUFFIXES
from tlseg_bids.errors import TlsegError, UsageError, amount
from tlseg_bids.labels.mapping import known_mappings
from tlseg_bids.labels.protocol import known_protocols, load_protocol
from tlseg_bids.networks import NETWORKS, build
from tlseg_bids.networks.blocks import Design
from tlseg_bids.train.dataset import default_protocol, load_classes
from tlseg_bids.train.synth import Mix
from tlseg_bids.train.values import (
    BUDGET,
    DATASET,
    DATASET_LIMITS,
    FACTOR,
    LIMITS,
    SHARE,
    Limits,
    check_values,
    hints_of,
)

if TYPE_CHECKING:
    from tlseg_bids.train.recipe import Recipe

DESIGN: Limits = {"slope": SHARE, "supervised": (0, 16), "age": (0, 65_536), "gain": FACTOR}
WIDTHS = (1, 65_536)
ARGUMENTS: Limits = {
    "features": WIDTHS, "widths": WIDTHS, "dense": WIDTHS, "stem": (1, 2), "kernel": (1, 31),
    "prior_channels": (0, 65_536), "detail": (0, 65_536), "image_channels": (1, 16),
    "reach": (0, 128), "dropout": SHARE,
}  # fmt: skip
"""Of the numbers among the arguments of networks."""


def check_datasets(datasets: Any, where: str) -> None:
    """Refuse a recipe that learns from nothing, and rules of a dataset that cannot be.

    Parameters
    ----------
    datasets : object
        What the file has as its table ``datasets``.
    where : str
        The file.

    Raises
    ------
    UsageError
        If there is none, a rule is unknown or of the wrong kind, or names labels that the dataset's
        protocol does not have.
    """
    if not isinstance(datasets, dict) or not datasets:
        raise UsageError("the recipe names no dataset", where, "add a table [datasets.NAME]")
    for name, rules in datasets.items():
        if not isinstance(rules, dict):
            raise UsageError(
                f"dataset '{name}' is {rules!r} and no table", where, f"write [datasets.{name}]"
            )
        unknown = sorted(set(rules) - set(DATASET))
        if unknown:
            raise UsageError(
                f"unknown keys {unknown} of dataset '{name}'", where,
                f"known are {', '.join(DATASET)}",
            )  # fmt: skip
        _check_rules(rules, f"{where}, [datasets.{name}]")


def _check_rules(rules: Mapping[str, Any], table: str) -> None:
    """Values of a dataset's rules, its protocol and head, and the labels that they name."""
    check_values(rules, DATASET, DATASET_LIMITS, table)
    check_values(rules.get("mix", {}), hints_of(Mix), LIMITS["mix"], f"{table}, mix")
    check_shown(rules.get("mix", {}), f"{table}, mix")
    check_values(rules.get("budget", {}), BUDGET, {"share": SHARE}, f"{table}, budget")
    protocol, head = _taught(rules)
    for one in (protocol, head):
        _check_protocol(one, table)
    for target in {head, default_protocol().name} - {protocol}:
        if f"{protocol}_to_{target}" not in known_mappings():
            raise UsageError(
                f"no mapping leads from '{protocol}' to '{target}'", table,
                f"known are {', '.join(known_mappings())}",
            )  # fmt: skip
    own = load_protocol(protocol)
    labels = [label for pair in rules.get("merge", []) for label in pair]
    _check_labels("merge", labels, set(own.indices.tolist()), f"{table}, protocol '{protocol}'")
    if "fill" in rules:
        if not rules.get("images"):
            raise UsageError(
                "fill labels what is brighter than 0 in the images, and the dataset names none",
                f"{table}, fill", 'add images, such as images = ["T1w"], or leave fill out',
            )  # fmt: skip
        known = set(load_classes(own).index.tolist())
        _check_labels("fill", [rules["fill"]], known, f"{table}, protocol '{protocol}'")


def check_shown(mix: Mapping[str, Any], where: str) -> None:
    """Refuse a share of real images among the effects: each dataset has one of its own.

    Raises
    ------
    UsageError
        With the share.
    """
    if mix.get("real"):
        raise UsageError(
            f"real is {mix['real']:g} in a table of effects, where nobody reads it", where,
            "write real in the table of the dataset whose images are shown",
        )  # fmt: skip


def _taught(rules: Mapping[str, Any]) -> tuple[str, str]:
    """The protocol of a dataset's labels, and that of the head which they teach."""
    protocol = rules.get("protocol", default_protocol().name)
    return protocol, rules.get("head", protocol)


def _check_labels(key: str, labels: list[int], known: set[int], where: str) -> None:
    strange = sorted(set(labels) - known)
    if strange:
        raise UsageError(
            f"{key} names {', '.join(map(str, strange))}, which is no label there", where,
            "write labels of the protocol, or name the protocol of this dataset's labels",
        )  # fmt: skip


def _check_protocol(name: str, where: str) -> None:
    if name not in known_protocols():
        raise UsageError(
            f"no label protocol '{name}'", where, f"known are {', '.join(known_protocols())}"
        )


def check_fit(recipe: Recipe, where: str) -> None:
    """Refuse a recipe that could not be trained by, as far as it shows without data.

    Raises
    ------
    UsageError
        With the value, the file, and what would be right.
    """
    if not recipe.name.strip(".") or set(recipe.name) & set("/\\\0"):
        raise UsageError(
            f"name is {recipe.name!r}", where, "write a name that a file can have, without '/'"
        )
    if recipe.fold and not (len(recipe.fold) == 2 and recipe.fold[0] < recipe.fold[1]):
        raise UsageError(f"fold is {recipe.fold}", where, "write [K, N] with K from 0 to N-1")
    _check_heads(recipe, where)
    _check_arguments(recipe.network, f"{where}, [network]")
    _check_box(recipe, where)
    _check_channels(recipe, where)
    network = _built(recipe, where)
    _check_network(recipe, network, where)
    _check_places(recipe, network, where)


def _check_heads(recipe: Recipe, where: str) -> None:
    for name in recipe.heads:
        _check_protocol(name, where)
    heads = ", ".join(recipe.heads)
    if len(set(recipe.heads)) < len(recipe.heads):
        raise UsageError(
            f"a head occurs twice: {heads}", where,
            "name each protocol once in protocol and more_heads",
        )  # fmt: skip
    for name, rules in recipe.datasets.items():
        head = _taught(rules)[1]
        if head not in recipe.heads:
            raise UsageError(
                f"dataset '{name}' teaches '{head}', and the heads are {heads}", where,
                "name it in protocol or more_heads, or give the dataset another head",
            )  # fmt: skip
    if not any(rules.get("weight", 1.0) > 0 for rules in recipe.datasets.values()):
        raise UsageError(
            "the weight of every dataset is 0", where, "give one a weight above 0"
        )  # fmt: skip
    strange = sorted(set(recipe.prior_mm) - set(recipe.heads))
    if strange:
        raise UsageError(
            f"prior_mm names {', '.join(strange)}, and the heads are {heads}", where,
            "name protocols of heads",
        )  # fmt: skip


def _check_box(recipe: Recipe, where: str) -> None:
    """A box of three axes that holds a voxel of each atlas, and a patch of three sides."""
    ends = recipe.box_mm
    if len(ends) != 3 or not all(len(pair) == 2 and pair[0] < pair[1] for pair in ends):
        raise UsageError(
            f"box_mm is {ends}", where, "write [[left, right], [back, front], [low, high]] in mm"
        )
    coarsest = max([recipe.spacing_mm, *(recipe.prior_mm.get(n, 4.0) for n in recipe.prior_heads)])
    if min(high - low for low, high in ends) < coarsest:
        raise UsageError(
            f"box_mm is {ends}, thinner than a voxel of {coarsest:g} mm", where,
            "make the box larger, or spacing_mm and prior_mm smaller",
        )  # fmt: skip
    if len(recipe.sides) != 3:
        raise UsageError(
            f"patch is {recipe.patch}", where, "write a whole number, or three for the three axes"
        )


def _check_channels(recipe: Recipe, where: str) -> None:
    """Image channels that a scan can have: a model of others could never see one."""
    named = recipe.channels
    twice = len(set(named)) < len(named)
    if named and (len(named) < 2 or twice or set(named) - set(SUFFIXES)):
        raise UsageError(
            f"channels is {named}", where,
            f"name {' and '.join(SUFFIXES)}, or leave the key out for a network of one image, "
            "which takes any of them",
        )  # fmt: skip


def _built(recipe: Recipe, where: str) -> nn.Module:
    """The network without memory for its parameters."""
    table = f"{where}, [network]"
    try:
        with torch.device("meta"):
            return build(**recipe.network, out_channels=recipe.head_sizes)
    except TlsegError as error:
        raise UsageError(error.what, table, error.hint) from error
    except Exception as error:  # whatever a layer raises of sizes that it cannot have
        raise UsageError(
            f"the network cannot be built ({str(error).partition(chr(10))[0]})", table,
            "see the docstrings in tlseg_bids/networks",
        ) from error  # fmt: skip


def _check_arguments(given: Mapping[str, Any], where: str) -> None:
    """Arguments of a network, of its design and of its members."""
    name = given.get("network")
    if not isinstance(name, str) or name not in NETWORKS:
        raise UsageError(
            f"network is {name!r}" if "network" in given else "the network has no name", where,
            f'write network = "…", one of {", ".join(NETWORKS)}',
        )  # fmt: skip
    hints = get_type_hints(NETWORKS[name].__init__)
    hints = {key: hint for key, hint in hints.items() if key not in ("return", "out_channels")}
    check_values(given, {"network": str, **hints}, ARGUMENTS, where)
    empty = [key for key, value in given.items() if isinstance(value, list) and not value]
    if empty:
        raise UsageError(f"{empty[0]} is []", where, "write at least one")
    if given.get("kernel", 1) % 2 == 0:
        raise UsageError(f"kernel is {given['kernel']}", where, "write an odd number")
    check_values(given.get("design", {}), hints_of(Design), DESIGN, f"{where}, design")
    for extra in given.get("each", []):
        _check_arguments({**given.get("of", {}), **extra}, f"{where}, of and each")


def _check_network(recipe: Recipe, network: nn.Module, where: str) -> None:
    """Patch, image channels and atlases are those that the network takes."""
    step = max(network.divisor, network.stem)
    sides = _sides(recipe)
    if any(side % step for one in sides for side in one):
        raise UsageError(
            f"patch is {recipe.patch}, and the network needs sides that {step} divides", where,
            f"write multiples of {step}, or give the network fewer levels",
        )  # fmt: skip
    images = max(len(recipe.channels), 1)
    if network.image_channels != images:
        raise UsageError(
            f"image_channels is {network.image_channels}, and the recipe shows {images} at a time",
            f"{where}, [network]", f"write image_channels = {images}, or other channels",
        )  # fmt: skip
    sizes = dict(zip(recipe.heads, recipe.head_sizes, strict=True))
    asked, taken = recipe.network.get("prior_channels", 0), recipe.prior_heads
    if asked != sum(sizes[name] for name in taken):
        last = [sum(recipe.head_sizes[n:]) for n in range(len(sizes))]
        raise UsageError(
            f"prior_channels is {asked}", f"{where}, [network]",
            f"write 0, or the channels of the last heads: {' or '.join(map(str, last[::-1]))}",
        )  # fmt: skip


def _sides(recipe: Recipe) -> list[tuple[int, ...]]:
    """The voxels along each axis of all examples that are drawn."""
    if recipe.places.kind != "views":
        return [recipe.sides]
    slabs = [list(recipe.sides) for _ in recipe.places.axes]
    for slab, axis in zip(slabs, recipe.places.axes, strict=True):
        slab[axis] = recipe.places.slices
    return [tuple(slab) for slab in slabs]


def _check_places(recipe: Recipe, network: nn.Module, where: str) -> None:
    """Where patches lie is something that the network can be asked for."""
    places, table = recipe.places, f"{where}, [places]"
    listed = places.kind in ("windows", "tiles")
    if listed and (len(places.begins) != 3 or not all(places.begins)):
        raise UsageError(
            f"begins is {places.begins}", table,
            "write three lists, of the first voxels along each axis",
        )  # fmt: skip
    members = len(getattr(network, "members", ()))
    if places.count and members != places.count:
        raise UsageError(
            f"{places.kind} share the volume among {amount(places.count, 'network')}, and the "
            f"recipe has {members or 'one'}", table,
            'take network = "members" with as many entries in each',
        )  # fmt: skip
    designs = [getattr(member, "design", None) for member in getattr(network, "members", ())]
    if any(one and (one.supervised or one.age) for one in designs):
        raise UsageError(
            "the design of a member has coarser answers or an age, which members do not learn",
            f"{where}, [network]", "leave out supervised and age, or take the network unet alone",
        )  # fmt: skip
    strange = [number for number in places.merged if number >= places.count]
    if strange:
        raise UsageError(
            f"merged names network {strange[0]} of {places.count}", table,
            "number the networks from 0",
        )  # fmt: skip
    if places.kind == "voxels" and "voxels" not in inspect.signature(network.forward).parameters:
        raise UsageError(
            f"the network '{recipe.network['network']}' does not answer voxel by voxel", table,
            'take network = "patches", or another kind',
        )  # fmt: skip
