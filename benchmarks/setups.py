"""What `systems.py` compares: the published systems and our engine, as far as two cores get.

Networks are narrower than in the recipes; the table of results tells the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlseg_bids.train.places import Places

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "tlseg_bids" / "train"
START = ROOT / "benchmarks" / "start" / "any-1.toml"
OURS = "ours"


@dataclass(frozen=True)
class Setup:
    """A system in the comparison: recipe, description of its card, what is narrowed.

    `before` is a stage that takes a third of the minutes first; `suffixes` the infants' images it
    is shown; `start` the weights that it begins from; `network` what of our network is another;
    `own` what of the dataset's rules is another; `follows` whether our engine's voxels follow
    ``--spacing`` as the others' do; `coarsest_mm` the largest voxels of a system that gains nothing
    by larger ones.
    """

    recipe: str
    card: str
    features: list[int] = field(default_factory=list)
    before: str = ""
    suffixes: tuple[str, ...] = ("T1w", "T2w")
    protocol: str = ""
    start: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    follows: bool = False
    coarsest_mm: float = 4.0

    @property
    def ours(self) -> bool:
        """Whether this is our engine."""
        return not self.recipe.startswith("systems/")


PATCHES_MM = 2.0  # a step of the 2.5-D network costs the same on voxels of any size
MONET = [16, 32, 64, 128]  # as in the recipe
SLANT8 = [16, 32, 64, 128]
NEONATAL = [16, 32, 64, 128, 128]
QUICKNAT = [32] * 5
FASTER: dict[str, Any] = {"learning_rate": 1e-3}
FULL = {"stem": 1, "detail": 0, "features": [16, 32, 64, 96, 128], "design": {"shortcut": "input"}}
SYSTEMS = {
    OURS: Setup("infant", "any", start=str(START)),
    "ours-scratch": Setup("infant", "any", follows=True),
    "neonatal": Setup("systems/neonatal", "systems/neonatal", NEONATAL),
    "quicknat-views": Setup(
        "systems/quicknat-views", "systems/quicknat-views", QUICKNAT, suffixes=("T2w",),
        changes=FASTER,
    ),
    "monet": Setup("systems/monet-joint", "systems/monet", MONET, before="systems/monet-partial"),
    "unet-tuned": Setup(
        "systems/monet-fine-tuned", "systems/monet", MONET, before="systems/monet-partial"
    ),
    "unet-scratch": Setup("systems/monet-fine-tuned", "systems/monet", MONET),
    "subcortical-25d": Setup(
        "systems/subcortical-25d", "systems/subcortical-25d", suffixes=("T2w",),
        protocol="subcortical", changes={**FASTER, "places": Places("voxels", voxels=128)},
        coarsest_mm=PATCHES_MM,
    ),
    "slant8": Setup("systems/slant8", "systems/slant8", SLANT8, changes=FASTER),
    "slant27": Setup("systems/slant27", "systems/slant27", [8, 16, 32, 64], changes=FASTER),
}  # fmt: skip
NETWORKS = {
    "stem": Setup("infant", "any"),
    "coarse": Setup("infant", "any", network={"detail": 0}),
    "full": Setup("infant", "any", network=FULL),
}
"""Other networks for our engine, all from random weights: a stem that folds 2 mm into channels and
answers in sub-voxels; the same without the sub-voxels; a residual encoder at 1 mm throughout. They
run where they are asked for (``--systems stem coarse full``) and are compared with ``stem``."""
BUDGETS = {
    f"budget-{name}": Setup("infant", "any", start=str(START), own=own)
    for name, own in {
        "whole": {"first": 3},
        **{a: {"budget": {"axis": a, "share": 0.33}} for a in
           ("random", "sagittal", "coronal", "axial")},
    }.items()
}  # fmt: skip
"""Label budgets of the neonatal paper for our engine, from the same start as ``ours``: whole labels
of three scans, or a third of the slices of nine. Asked for like `NETWORKS`."""
MORE = {**SYSTEMS, **NETWORKS, **BUDGETS}
DATASETS: dict[str, dict[str, Any]] = {
    "malc": {"folds": 5, "labels": "derivatives/manual", "protocol": "braincolor",
             "mapping": {"aseg": "braincolor_to_aseg", "subcortical": "braincolor_to_subcortical"},
             "suffix": "T1w"},
    "infant": {"folds": 4, "labels": "derivatives/jlf", "protocol": "aseg",
               "mapping": {"aseg": "aseg_to_infant", "subcortical": "aseg_to_subcortical"},
               "suffix": "T2w"},
}  # fmt: skip
