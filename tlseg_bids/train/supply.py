"""Where a recipe's labelled scans come from: a folder of datasets, or one packed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.train.dataset import Sample
from tlseg_bids.train.pack import Packed, loading_rules, read_pack, write_pack
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.scans import load_dataset, subject_of
from tlseg_bids.train.subset import subset


def load_samples(recipe: Recipe, root: Path) -> dict[str, list[Sample]]:
    """The recipe's datasets under `root`, without the subjects of the held-out fold.

    Parameters
    ----------
    root : Path
        Folder that holds the datasets, or a file that `pack` wrote.

    Raises
    ------
    NoInputError
        If it is not there, or holds no label map of a dataset.
    DataError
        If a packed file was made by other rules, or is damaged.
    UsageError
        If the fold leaves out no subject, or all of a dataset.
    """
    packed = _packed(root)
    samples, held_out = {}, 0
    for name, rules in recipe.datasets.items():
        found = packed.samples(name, rules) if packed else load_dataset(root / name, name, rules)
        if recipe.fold and name in recipe.fold_datasets:
            subjects = len({subject_of(s.name) for s in found})
            found = _without_fold(found, recipe)
            held_out += subjects - len({subject_of(s.name) for s in found})
        samples[name] = subset(found, rules, recipe.channels)
    if recipe.fold and not held_out:
        named, there = (", ".join(names) or "none" for names in (recipe.fold_datasets, samples))
        raise UsageError(
            f"the fold {_as_typed(recipe.fold)} leaves out no subject: it counts in the datasets "
            f"{named}, and the recipe learns from {there}", f"recipe '{recipe.name}'",
            "name datasets of the recipe in fold_datasets, with more subjects than K, or leave "
            "out --fold",
        )  # fmt: skip
    return samples


def _without_fold(samples: list[Sample], recipe: Recipe) -> list[Sample]:
    """The scans of a dataset whose subjects are not held out."""
    k, n = recipe.fold
    held_out = sorted({subject_of(s.name) for s in samples})[k::n]
    kept = [s for s in samples if subject_of(s.name) not in held_out]
    if samples and not kept:
        raise UsageError(
            f"the fold {_as_typed(recipe.fold)} leaves out every subject of dataset "
            f"'{samples[0].dataset}'", f"recipe '{recipe.name}'", "take more folds: a larger N",
        )  # fmt: skip
    return kept


def _as_typed(fold: list[int]) -> str:
    return "/".join(map(str, fold))


def describe(root: Path, name: str) -> dict[str, Any]:
    """What ``dataset_description.json`` says of a dataset; empty where there is none.

    Raises
    ------
    DataError
        If it is not JSON.
    """
    packed = _packed(root)
    if packed:
        return packed.description(name)
    path = root / name / "dataset_description.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", path, "mend that line") from error
    return found if isinstance(found, dict) else {}


def licences(recipe: Recipe, root: Path) -> dict[str, str]:
    """The licence of each of the recipe's datasets that states one."""
    stated = {name: describe(root, name).get("License") for name in recipe.datasets}
    return {name: licence for name, licence in stated.items() if licence}


def _packed(root: Path) -> Packed | None:
    if root.is_dir():
        return None
    if not root.is_file():
        raise NoInputError(
            "no such folder or file", root, "name the folder of the datasets, or a packed .npz file"
        )
    return read_pack(root)


def pack(recipes: list[Recipe], root: Path, path: Path, limit_bytes: int) -> int:
    """Put all scans of some recipes' datasets into one file; returns its size in bytes.

    Folds play no part: they are taken when the file is read.

    Raises
    ------
    UsageError
        If two recipes read one dataset by other rules, or the file would be too large.
    NoInputError, DataError, CannotCreateError, OutputError
        If something cannot be read or written.
    """
    rules: dict[str, dict[str, Any]] = {}
    for recipe in recipes:
        for name, own in recipe.datasets.items():
            if loading_rules(rules.setdefault(name, own)) != loading_rules(own):
                raise UsageError(
                    f"dataset '{name}' is read in different ways", f"recipe '{recipe.name}'",
                    "pack these recipes into files of their own",
                )  # fmt: skip
    samples = {name: load_dataset(root / name, name, own) for name, own in rules.items()}
    descriptions = {name: describe(root, name) for name in rules}
    return write_pack(samples, rules, descriptions, path, limit_bytes)
