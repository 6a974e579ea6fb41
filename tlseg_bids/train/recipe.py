"""A training run as data: a TOML file."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tlseg_bids import __version__
from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.descent import Descent
from tlseg_bids.train.fitting import check_datasets, check_fit, check_shown
from tlseg_bids.train.places import Places
from tlseg_bids.train.synth import Ageing, Mix, Shape
from tlseg_bids.train.teach import Loss
from tlseg_bids.train.values import LIMITS, check_values, hints_of

TABLES = {
    "shape": Shape, "ageing": Ageing, "mix": Mix, "descent": Descent, "loss": Loss,
    "places": Places,
}  # fmt: skip
ROLES = ("locator", "settler", "segmenter")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run; lengths in mm.

    Parameters
    ----------
    name, role : str
        Role is ``locator``, ``settler`` or ``segmenter``.
    protocol : str
        Label protocol of the output.
    more_heads : list of str
        Protocols of further heads on the same encoder. The last head is the template's: it says
        where the brain lies.
    network : dict
        Name and arguments for `tlseg_bids.networks.build`; `out_channels` is added.
    prior_mm : dict of str to float
        Voxel size of the atlas of each protocol that has one; 4 mm if not named. Whole voxels fill
        the box, so that they may be a little larger or smaller.
    parts, coarse
        For a sub-voxel answer: how many of the 8 sub-voxels a step learns from, and the share of
        steps that learn from the coarse answer.
    patch : int or list of 3 int
        Voxels along the sides of a training patch.
    mirror : bool
        Show every scan in the mirror, too, and make atlases of both.
    standard : bool
        Bring every image to the mean histogram of the training scans (Nyúl), or of the start's.
    places : Places
        How patches are placed; where networks share the volume, which one learns.
    spacing_mm : float
        Voxel size of the patch.
    box_mm : list of [low, high]
        Template region from which patches are drawn.
    shape, ageing, mix
        Deformation, heads made older or younger, and how often each effect of the synthesis occurs.
    centred : float
        Share of patches around the template's origin instead of anywhere in the box.
    datasets : dict
        Name to rules (see `scans.load_dataset` and `subset.subset`) with ``weight`` (share of the
        draws), ``real`` (share of its draws that show the real image) and ``mix`` (values of `Mix`
        that hold for this dataset in place of the recipe's).
    channels : list of str
        Suffixes of the images that the network sees together; empty for one image of any suffix.
    fold : [k, n] or empty
        Leave out every n-th subject, starting from k, of the datasets named in `fold_datasets`.
    steps, learning_rate, weight_decay, warmup, ema, accumulate, seed
        The optimisation; `accumulate` examples a step and process.
    batch : int
        Examples of a step that go through the network together, as far as they ask for the same
        head and sub-voxels; each keeps its own loss, so that only speed and memory change.
    checkpoint_every, checkpoint_minutes
        A checkpoint is written after so many steps and, if not 0, so many minutes.
    compile : bool
        Let `torch.compile` build the network: a slow start, then faster steps.
    deterministic : bool
        On a GPU, take only algorithms that give the same numbers every time.
    start : str
        Checkpoint, or card of a model, whose weights the run starts from.
    descent : Descent
        Optimiser, its schedule, and what may change when.
    loss : Loss
        What the loss is made of.
    """

    name: str
    role: str
    protocol: str
    network: dict[str, Any]
    patch: int | list[int]
    spacing_mm: float
    box_mm: list[list[float]]
    datasets: dict[str, dict[str, Any]]
    centred: float = 0.0
    shape: Shape = Shape()
    ageing: Ageing = Ageing()
    mix: Mix = Mix()
    fold: list[int] = field(default_factory=list)
    fold_datasets: list[str] = field(default_factory=list)
    steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    warmup: int = 100
    ema: float = 0.998
    seed: int = 0
    start: str = ""
    dice_weight: float = 1.0
    checkpoint_every: int = 250
    more_heads: list[str] = field(default_factory=list)
    prior_mm: dict[str, float] = field(default_factory=dict)
    parts: int = 1
    coarse: float = 0.15
    accumulate: int = 1
    batch: int = 1
    checkpoint_minutes: float = 5.0
    compile: bool = False
    deterministic: bool = True
    channels: list[str] = field(default_factory=list)
    descent: Descent = Descent()
    loss: Loss = Loss()
    places: Places = Places()
    standard: bool = False
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(
                f"role is {self.role!r}", f"recipe '{self.name}'", f"use {', '.join(ROLES)}"
            )
        for key in ("steps", "accumulate", "batch", "checkpoint_every"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UsageError(
                    f"{key} is {value!r}", f"recipe '{self.name}'", "write a whole number above 0"
                )

    @property
    def sides(self) -> tuple[int, int, int]:
        """Voxels of a patch along each axis."""
        return (self.patch,) * 3 if isinstance(self.patch, int) else tuple(self.patch)

    @property
    def heads(self) -> tuple[str, ...]:
        """Protocols of all heads, the primary one first."""
        return (self.protocol, *self.more_heads)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Channels of all heads."""
        return tuple(len(load_protocol(name)) for name in self.heads)

    @property
    def prior_heads(self) -> tuple[str, ...]:
        """Protocols of the heads that are handed an atlas: the last ones."""
        left, found = self.network.get("prior_channels", 0), []
        for name, size in zip(self.heads[::-1], self.head_sizes[::-1], strict=True):
            if size <= left:
                found.append(name)
            left -= size
        return tuple(found[::-1])


def load_recipe(
    path: Path, overrides: dict[str, Any] | None = None, to_train: bool = True
) -> Recipe:  # fmt: skip
    """Read a recipe; `overrides` win over the file, and the file over the one it names as `base`.

    Tables of a base are completed key by key; ``datasets`` is taken whole. Whether its parts fit
    each other is not checked where it is not read `to_train`: datasets alone are packed.

    Raises
    ------
    NoInputError
        If the file does not exist.
    UsageError
        If it is not TOML, a key is unknown or missing, there is no dataset, a value is of the wrong
        kind or not possible, or the parts do not fit each other.
    """
    values = _read(path)
    values.update(overrides or {})
    unknown = sorted(set(values) - {f.name for f in fields(Recipe)})
    if unknown:
        raise UsageError(f"unknown keys {unknown}", path, "see the docstring of Recipe")
    if "datasets" in values:
        check_datasets(values["datasets"], str(path))
    check_values(values, hints_of(Recipe), LIMITS[""], str(path))
    for key in sorted(TABLES.keys() & values.keys()):
        table = f"{path}, [{key}]"
        check_values(values[key], hints_of(TABLES[key]), LIMITS.get(key, {}), table)
    check_shown(values.get("mix", {}), f"{path}, [mix]")
    try:
        recipe = recipe_of(values)
    except TypeError as error:
        raise UsageError(
            f"keys do not fit: {error}", path, "see the docstring of Recipe"
        ) from error
    if to_train:
        check_fit(recipe, str(path))
    return recipe


def recipe_of(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values, its tables as in TOML."""
    return Recipe(**{
        key: TABLES[key](**value) if key in TABLES else value for key, value in values.items()
    })  # fmt: skip


def _read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file and its bases; `children` are the files that build on it."""
    if not path.is_file():
        raise NoInputError("no such recipe", path, "name a TOML file, see tlseg_bids/train/recipes")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid TOML: {error}", path, "mend that line") from error
    base = values.pop("base", None)
    if base is None:
        return values
    line = (*children, path.resolve())
    if not isinstance(base, str) or (path.parent / base).resolve() in line:
        raise UsageError(
            f"base is {base!r}", path, "name the file of another recipe that does not build on it"
        )
    return completed(values, _read(path.parent / base, line))


def completed(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`values` with what `base` has besides, table by table; ``datasets`` is one value."""
    found = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "datasets"
        found[key] = completed(value, base[key]) if both else value
    return found


def code_version() -> str:
    """Program version and the hash of the sources that decide a training run."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("networks", "train"):
        for file in sorted((package / folder).rglob("*.*")):
            if file.suffix in (".py", ".tsv"):
                digest.update(file.read_bytes())
    return f"{__version__}+sources.{digest.hexdigest()[:12]}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `tlseg_bids.train.loop.train`, on the CPU.

    It holds tensors and plain values only: nothing in it is run when it is opened.

    Raises
    ------
    NoInputError
        If the file does not exist.
    DataError
        If it is none, or damaged.
    """
    if not path.is_file():
        raise NoInputError("no such checkpoint", path, "name the .pt file of a training run")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        recipe = saved["recipe"]
        recipe |= {key: TABLES[key](**value) for key, value in recipe.items() if key in TABLES}
        saved["template"] = saved["template"].numpy()
    except Exception as error:  # whatever torch raises on a file that is none
        raise DataError(
            f"this is no checkpoint of tlseg-train, or a damaged one ({_first_line(error)})",
            path, "copy it again, or remove it to start anew",
        ) from error  # fmt: skip
    return saved


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
