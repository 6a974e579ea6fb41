"""From checkpoints to a model: one safetensors file and its card.

``python -m tlseg_bids.train.export MODEL.toml --locator A.pt --segmenter B.pt \\
--data DIR --out DIR``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tlseg_bids.errors import TlsegError
from tlseg_bids.train.dataset import default_protocol
from tlseg_bids.train.recipe import Recipe, load_checkpoint
from tlseg_bids.zoo.card import Domain, Memory, ModelCard, Weights
from tlseg_bids.zoo.card_file import write_card

ROLES = ("locator", "segmenter")
CURVE_POINTS = 20


def _data(saved: dict[str, dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """A row per dataset: its licence, and the subjects with the hash of their files."""
    seen = {}
    for one in saved.values():
        for run in (*one["lineage"], one):
            seen |= run["data"]
    rows = []
    for name in sorted({key.split("/")[0] for key in seen}):
        description = json.loads((root / name / "dataset_description.json").read_text())
        subjects = {k.split("/")[1]: seen[k] for k in sorted(seen) if k.startswith(f"{name}/")}
        licence = description["License"]
        rows.append({"dataset": name, "licence": licence, "subjects": subjects})
    return rows


def _history(saved: dict[str, Any]) -> dict[str, Any]:
    """Recipe, steps, time and curve of a checkpoint."""
    recipe, curve = saved["recipe"], saved["curve"]
    every = max(len(curve) // CURVE_POINTS, 1)
    return {
        "recipe": recipe["name"], "seed": recipe["seed"], "steps": saved["step"],
        "learning_rate": recipe["learning_rate"], "seconds": round(saved["seconds"]),
        "started_from": [f"{one['recipe']} ({one['steps']} steps)" for one in saved["lineage"]],
        "code": saved["code"],
        "curve_step": [row[0] for row in curve[::every]],
        "curve_loss": [round(row[2], 3) for row in curve[::every]],
        "curve_soft_dice": [round(row[3], 3) for row in curve[::every]],
    }  # fmt: skip


def export(
    description: dict[str, Any], checkpoints: dict[str, Path], root: Path, out: Path
) -> ModelCard:
    """Write ``OUT/NAME.safetensors`` (fp16) and ``OUT/NAME.toml``.

    Parameters
    ----------
    description : dict
        What the checkpoints cannot know: name, version, status, summary, domain, strategy,
        preprocess, memory, evidence, citations, known_failures.
    checkpoints : dict
        Role to checkpoint.
    root : Path
        Folder of the datasets, for their licences.
    out : Path
        Folder of the model.
    """
    saved = {role: load_checkpoint(path) for role, path in checkpoints.items()}
    tensors = {
        f"{role}.{key}": value.half().contiguous()
        for role, one in saved.items()
        for key, value in one["average"].items()
    }
    last = saved["segmenter"]
    template = torch.as_tensor(last["template"]).float()
    # the fluid around the brain is no landmark: a skull-stripped scan has lost it
    template[default_protocol().channels(abbreviation="CSF")] = torch.nan
    tensors["template"] = template
    for protocol, prior in last["priors"].items():
        tensors[f"prior.{protocol}"] = (prior * 255).round().to(torch.uint8)
    name = description["name"]
    file = out / f"{name}.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    file.chmod(0o644)
    data = _data(saved, root)
    licences = sorted({row["licence"] for row in data})
    content = file.read_bytes()
    segmenter = Recipe(**last["recipe"])
    locator = Recipe(**saved["locator"]["recipe"])
    card = ModelCard(
        name=name,
        version=description["version"],
        status=description["status"],
        summary=description["summary"],
        domain=Domain(**{
            k: tuple(v) if isinstance(v, list) else v for k, v in description["domain"].items()
        }),
        protocol=segmenter.protocol,
        heads=segmenter.heads,
        networks={role: dict(saved[role]["recipe"]["network"]) for role in ROLES},
        strategy=description["strategy"],
        preprocess={
            "box_mm": segmenter.box_mm,
            "spacing_mm": segmenter.spacing_mm,
            "rounds": 6,
            "settled_mm": 1.5,
            "locator": {"size": locator.patch, "spacing_mm": locator.spacing_mm, "looks": 3},
        },
        weights=Weights(
            sha256=hashlib.sha256(content).hexdigest(), bytes=len(content),
            licence=" AND ".join(licences), file=file.name,
        ),
        training={
            "data": data,
            **{role: _history(saved[role]) for role in ROLES},
        },
        evidence=tuple(description.get("evidence", ())),
        citations=tuple(description["citations"]),
        known_failures=tuple(description.get("known_failures", ())),
        memory=Memory(**description.get("memory", {})),
    )  # fmt: skip
    write_card(card, out / f"{name}.toml")
    return card


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("description", type=Path, help="TOML file with what a card says")
    for role in ROLES:
        parser.add_argument(f"--{role}", type=Path, required=True, help="checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    options = parser.parse_args(argv)
    try:
        description = tomllib.loads(options.description.read_text(encoding="utf-8"))
        checkpoints = {role: getattr(options, role) for role in ROLES}
        card = export(description, checkpoints, options.data, options.out)
    except TlsegError as error:
        print(f"export: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{card.name} {card.version}: {card.weights.bytes / 2**20:.1f} MiB, "
          f"{card.weights.licence}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
