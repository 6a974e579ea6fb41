"""From checkpoints to a model: one safetensors file and its card."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tlseg_bids.bids.atomic import atomic
from tlseg_bids.errors import DataError, NoInputError, UsageError, amount
from tlseg_bids.train.dataset import default_protocol
from tlseg_bids.train.recipe import ROLES, Recipe, load_checkpoint, recipe_of
from tlseg_bids.train.start import load_start
from tlseg_bids.train.supply import describe
from tlseg_bids.zoo.atlases import pack
from tlseg_bids.zoo.calibration import Calibration
from tlseg_bids.zoo.card import Domain, Memory, ModelCard, Weights
from tlseg_bids.zoo.card_file import (
    CARD,
    CARD_OPTIONAL,
    SEGMENTER,
    check_card,
    check_keys,
    check_kinds,
    read_card,
    write_card,
)
from tlseg_bids.zoo.licence import all_of
from tlseg_bids.zoo.proof import make_proof
from tlseg_bids.zoo.weights import describe as file_entry

CURVE_POINTS = 20
DESCRIBED = {
    key: CARD[key]
    for key in ("name", "version", "status", "summary", "domain", "strategy", "citations")
}
ALSO_DESCRIBED = {
    key: (CARD | CARD_OPTIONAL)[key]
    for key in ("preprocess", "memory", "evidence", "known_failures", "parent", "calibration")
}
"""What a description may hold; the rest of a card is what its checkpoints know."""


@dataclass(frozen=True)
class Part:
    """One network of a model: what its run, or the card it was taken from, says of it.

    `window` holds the size in voxels and the spacing in mm of what it looks at; `data` maps
    ``dataset/subject`` to a hash, `licences` the datasets that state one.
    """

    average: dict[str, torch.Tensor]
    network: dict[str, Any]
    window: dict[str, Any]
    data: dict[str, str]
    licences: dict[str, str]
    history: dict[str, Any]


def data_seen(saved: dict[str, Any]) -> dict[str, str]:
    """``dataset/scan`` to the hash of its files, of a checkpoint's run and all before it."""
    data = {}
    for run in (*saved["lineage"], saved):
        data |= run["data"]
    return data


def _from_checkpoint(saved: dict[str, Any]) -> Part:
    recipe = Recipe(**saved["recipe"])
    return Part(
        saved["average"], dict(recipe.network),
        {"size": recipe.patch, "spacing_mm": recipe.spacing_mm},
        data_seen(saved), saved.get("licences", {}), _history(saved),
    )  # fmt: skip


def _from_card(path: Path, role: str) -> Part:
    """A network of a model, kept as it is."""
    start, card = load_start(path, role), read_card(path)
    where = card.preprocess.get(role, {})
    return Part(
        start["average"], dict(card.networks[role]),
        {key: where[key] for key in ("size", "spacing_mm") if key in where},
        start["data"], start["licences"],
        {**card.training[role], "taken_from": f"{card.name} {card.version}"},
    )  # fmt: skip


def read_part(path: Path, role: str) -> Part:
    """A network from a checkpoint or from a model's card.

    Raises
    ------
    NoInputError, DataError
        If the file is not there, is damaged, or is the card of a model without such a network.
    UsageError
        If it is the checkpoint of another role.
    """
    if path.suffix == ".toml":
        return _from_card(path, role)
    return _from_checkpoint(_checkpoint(path, role))


def _checkpoint(path: Path, role: str) -> dict[str, Any]:
    """A checkpoint that was trained for this role."""
    saved = load_checkpoint(path)
    own = saved["recipe"]["role"]
    if own != role:
        raise UsageError(
            f"this is the checkpoint of a {own}, and a {role} is asked for", path,
            f"name it with --{own}, and with --{role} the checkpoint of a {role}",
        )  # fmt: skip
    return saved


def _basis(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """What the segmenter was trained by, and the template, atlases and scale it was trained with.

    Raises
    ------
    DataError
        If a card does not hold the settings of its run.
    UsageError
        If it is the checkpoint of another role.
    """
    if path.suffix != ".toml":
        saved = _checkpoint(path, SEGMENTER)
        return Recipe(**saved["recipe"]), saved
    settings = read_card(path).training.get("segmenter", {}).get("settings")
    if settings is None:
        raise DataError(
            "the card does not hold the settings of its segmenter's run", path,
            "name the checkpoint of that run",
        )  # fmt: skip
    return recipe_of(settings), load_start(path, "segmenter")


def _data(parts: dict[str, Part], root: Path | None) -> list[dict[str, Any]]:
    """A row per dataset: its licence, and the subjects with the hash of their files."""
    seen, stated = {}, {}
    for part in parts.values():
        seen |= part.data
        stated |= part.licences
    rows = []
    for name in sorted({key.split("/")[0] for key in seen}):
        licence = stated.get(name) or (describe(root, name).get("License") if root else None)
        if not licence:
            raise DataError(
                f"dataset '{name}' states no licence", "dataset_description.json",
                "write its License there and name the folder with --data",
            )  # fmt: skip
        subjects = {k.split("/")[1]: seen[k] for k in sorted(seen) if k.startswith(f"{name}/")}
        rows.append({"dataset": name, "licence": licence, "subjects": subjects})
    return rows


def _history(saved: dict[str, Any]) -> dict[str, Any]:
    """Recipe, steps, time, machine and curve of a checkpoint."""
    recipe, curve = asdict(Recipe(**saved["recipe"])), saved["curve"]
    recipe["start"] = Path(recipe["start"]).name
    count = min(CURVE_POINTS, len(curve))
    points = [curve[round(i * (len(curve) - 1) / max(count - 1, 1))] for i in range(count)]
    packed = {"packed_data_sha256": saved["packed"]} if saved.get("packed") else {}
    return {
        "recipe": recipe["name"], "seed": recipe["seed"], "steps": saved["step"],
        "learning_rate": recipe["learning_rate"], "seconds": round(saved["seconds"]),
        **{f"{part}_seconds": round(value) for part, value in saved.get("laps", {}).items()},
        "device": saved.get("device", "cpu"), "processes": saved.get("processes", 1), **packed,
        "started_from": [
            f"{one['recipe']} ({amount(one['steps'], 'step')})" for one in saved["lineage"]
        ],
        "code": saved["code"],
        "curve_step": [row[0] for row in points],
        "curve_loss": [round(row[2], 3) for row in points],
        "curve_soft_dice": [round(row[3], 3) for row in points],
        "settings": recipe,
    }  # fmt: skip


def export(
    description: dict[str, Any], checkpoints: dict[str, Path], root: Path | None, out: Path
) -> ModelCard:
    """Write ``OUT/NAME.safetensors`` (fp16) and ``OUT/NAME.toml``.

    Parameters
    ----------
    description : dict
        What the checkpoints cannot know: name, version, status, summary, domain, strategy,
        preprocess, memory, evidence, citations, known_failures, parent, calibration.
    checkpoints : dict
        Role to checkpoint, or to the card of a model whose network is kept. The settler may be
        left out, and the locator where the description's preprocess says which model of the
        program finds the brain (`placed_by`); where it is there, it finds it.
    root : Path or None
        Folder of the datasets, or their packed file: for licences that checkpoints do not hold.
    out : Path
        Folder of the model.

    Raises
    ------
    NoInputError
        If a checkpoint is not there.
    DataError
        If a dataset states no licence, nothing finds the brain, or the description makes no card;
        what lies in OUT stays as it was.
    UsageError
        If a checkpoint was trained for another role.
    CannotCreateError, OutputError
        If the model cannot be written.
    """
    segmenter, last = _basis(checkpoints["segmenter"])
    parts = {role: read_part(checkpoints[role], role) for role in ROLES if checkpoints.get(role)}
    standard = {"standard": last["standard"]} if last.get("standard") else {}
    preprocess = {
        "box_mm": segmenter.box_mm, "spacing_mm": segmenter.spacing_mm, **standard,
        **_finding(dict(description.get("preprocess", {})), parts),
    }  # fmt: skip
    card = _card(description, segmenter, parts, preprocess, _data(parts, root))
    check_card(card)
    tensors = _tensors(parts, last)
    tensors |= make_proof(card, tensors)
    file, there = out / card.weights.file, out / f"{card.name}.toml"
    with atomic(file) as stream:
        stream.write(save(pack(tensors)))
    file.chmod(0o644)
    card = replace(card, weights=file_entry(file, card.weights.licence, there))
    write_card(card, there)
    return card


def _finding(asked: dict[str, Any], parts: dict[str, Part]) -> dict[str, Any]:
    """How the brain is found: what the description asks for, with what the networks look at."""
    if "locator" in parts:
        asked.pop("placed_by", None)
        looks = {**parts["locator"].window, "looks": 3}
        asked = {"rounds": 6, "settled_mm": 1.5, "locator": looks, **asked}
        if "settler" in parts:
            spacing_mm = parts["settler"].window["spacing_mm"]
            asked["settler"] = {"spacing_mm": spacing_mm, **asked.get("settler", {})}
        return asked
    if "settler" in parts:
        raise DataError(
            "a settler corrects what a locator found, and there is none", "the card's description",
            "name a locator, too, or leave the settler out",
        )  # fmt: skip
    if "placed_by" not in asked:
        raise DataError(
            "nothing finds the brain", "the card's description", "name a locator, or in "
            "[preprocess] with placed_by a model of the program",
        )  # fmt: skip
    return asked


def _card(
    description: dict[str, Any], segmenter: Recipe, parts: dict[str, Part],
    preprocess: dict[str, Any], data: list[dict[str, Any]],
) -> ModelCard:  # fmt: skip
    """The card before its weights are written, whose size and hash are not known yet."""
    domain = {k: tuple(v) if isinstance(v, list) else v for k, v in description["domain"].items()}
    licence = " AND ".join(all_of(sorted({row["licence"] for row in data})))
    template = default_protocol().name
    return ModelCard(
        name=description["name"],
        version=description["version"],
        status=description["status"],
        summary=description["summary"],
        domain=Domain(**domain),
        protocol=segmenter.protocol,
        heads=segmenter.heads,
        channels=tuple(segmenter.channels),
        frame="" if segmenter.heads[-1] == template else template,
        networks={role: part.network for role, part in parts.items()},
        strategy=description["strategy"],
        preprocess=preprocess,
        weights=Weights("0" * 64, 1, licence, file=f"{description['name']}.safetensors"),
        training={"data": data, **{role: part.history for role, part in parts.items()}},
        evidence=tuple(description.get("evidence", ())),
        citations=tuple(description["citations"]),
        known_failures=tuple(description.get("known_failures", ())),
        memory=Memory(**description.get("memory", {})),
        parent=description.get("parent"),
        calibration=Calibration(**description.get("calibration", {})),
    )


def _tensors(parts: dict[str, Part], last: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All networks in half precision, the template, and the atlases in 8 bits.

    The segmenter's kernels are rounded to what bfloat16 tells apart, in which most machines
    multiply them: those that compute in float32 then have the same ones.
    """
    tensors = {}
    for role, part in parts.items():
        for key, value in part.average.items():
            exact = role != SEGMENTER or value.dim() < 5
            kept = value if exact else value.to(torch.bfloat16)
            tensors[f"{role}.{key}"] = kept.half().contiguous()
    template = torch.as_tensor(last["template"]).float()
    # the fluid around the brain is no landmark: a skull-stripped scan has lost it
    template[default_protocol().channels(abbreviation="CSF")] = torch.nan
    tensors["template"] = template
    for protocol, prior in last["priors"].items():
        tensors[f"prior.{protocol}"] = (prior * 255).round().to(torch.uint8)
    return tensors


def read_description(path: Path) -> dict[str, Any]:
    """What a card says that checkpoints do not know.

    Raises
    ------
    NoInputError
        If there is no such file.
    DataError
        If it is not TOML, a key that every card needs is missing, or one is unknown or of the wrong
        kind.
    """
    if not path.is_file():
        raise NoInputError("no such file", path, "see tlseg_bids/train/models")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid TOML: {error}", path, "mend that line") from error
    check_keys(found, path, DESCRIBED, ALSO_DESCRIBED)
    check_kinds(found, path)
    return found
