"""THE DATA MODEL ON ONE PAGE: what a scan is at each door of the house.

``Scan → Job → Prepared → Prediction → Segmentation → Outcome``. Every one is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.spaces import Space
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.card import ModelCard

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Refusal:
    """A model that was not chosen, and why."""

    model: str
    reason: str


@dataclass(frozen=True)
class Job:
    """A scan and the model that will label it, decided before a voxel is read.

    `key` is the content key: a hash of the input file, its sidecar, the card, the weights and the
    program's version. A finished scan with the same key is reused. `companions` are the scans of
    the card's other image channels, in their order; empty for a model of one channel.
    `precomputed` wants it under the names of other programs too (`tlseg_bids.bids.compat`), and
    `spaces` in those standard spaces (`tlseg_bids.bids.spaces`).
    """

    scan: Scan
    card: ModelCard
    reason: str
    refused: tuple[Refusal, ...]
    warnings: tuple[str, ...]
    key: str
    device: str
    memory_gib: float
    companions: tuple[Scan, ...] = ()
    precomputed: bool = False
    spaces: tuple[Space, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A scan that will not be processed, and why (for example a dangling link).

    `wanted` is true where an option asked for it (``--multi-run first``): then it is no failure.
    """

    scan: Scan
    reason: str
    hint: str
    wanted: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything the run is going to do; written to `logs/` before a voxel is read."""

    jobs: tuple[Job, ...]
    skips: tuple[Skip, ...] = ()


@dataclass(frozen=True, eq=False)
class Prepared:
    """The image as the model wants it.

    `image` is float32 (C, I, J, K) on `grid`, on the model's device; `grid.affine` lies in the
    native world, so `native.index_from(grid)` is the 4×4 from model voxels to native voxels.
    `template_from_native` is the 4×4 from native millimetres to template millimetres.
    `skull_stripped` is None where nobody has asked.
    """

    image: Tensor
    grid: Grid
    native: Volume
    template_from_native: np.ndarray
    skull_stripped: bool | None
    steps: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Class probabilities of a volume in which many voxels have the same ones.

    `rows` float16 (n, channels); `index` int32 (I, J, K): each voxel's row; on the device that
    found them. As an array, float16 (channels, I, J, K), they are several times as large.
    """

    rows: Tensor
    index: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the array."""
        return (self.rows.shape[1], *self.index.shape)

    def __len__(self) -> int:
        return self.rows.shape[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("shared rows become an array only by being copied")
        found = np.moveaxis(self.rows.cpu().numpy()[self.index.cpu().numpy()], 3, 0)
        return found if dtype is None else found.astype(dtype)

    def argmax(self) -> np.ndarray:
        """Each voxel's likeliest channel, (I, J, K)."""
        return self.rows.argmax(1)[self.index].cpu().numpy()


@dataclass(frozen=True, eq=False)
class Prediction:
    """Class probabilities on the model's output grid: float16 (channels, I, J, K).

    `age` is what a network with an age head reads from the image, in years; `precision` what was
    multiplied was rounded to.
    """

    probabilities: np.ndarray | SharedRows
    grid: Grid
    age: float | None = None
    precision: str = "float32"

    @property
    def is_finite(self) -> bool:
        """Whether all probabilities are numbers."""
        known = self.probabilities
        if isinstance(known, SharedRows):
            return bool(known.rows.isfinite().all())
        return bool(np.isfinite(known).all())

    def on_cpu(self) -> Prediction:
        """The same where no GPU is needed to read it."""
        known = self.probabilities
        if not isinstance(known, SharedRows) or known.rows.device.type == "cpu":
            return self
        return replace(self, probabilities=SharedRows(known.rows.cpu(), known.index.cpu()))

    @property
    def channel(self) -> np.ndarray:
        """Each voxel's likeliest channel, (I, J, K)."""
        known = self.probabilities
        return known.argmax() if isinstance(known, SharedRows) else known.argmax(0)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Labels on the native grid.

    `labels` int16; `confidence` uint8 (255 = certain), both on the native grid. `volumes` has a
    row per label of the protocol: index, name, hard_mm3, soft_mm3, voxels, mean_confidence.
    `unmeasured` says why a score of `qc` is missing. `verdict` is ``use``, ``look`` or ``exclude``
    (`tlseg_bids.postprocess.judgement`), for `reasons`.
    """

    labels: Volume
    confidence: np.ndarray
    brain_mask: np.ndarray
    volumes: pd.DataFrame
    qc: dict[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    unmeasured: dict[str, str] = field(default_factory=dict)
    verdict: str = "use"
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a scan: `status` is ``done``, ``reused`` or ``failed``."""

    scan: Scan
    status: str
    files: tuple[Path, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float = 0.0
    error: str = ""
    hint: str = ""
