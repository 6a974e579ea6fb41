"""How a model is adapted to a site's labelled scans, as data: `recipes/adapt/*.toml`.

The axes are those of transfer learning: what is shown (new scans, rehearsal by synthesis), what may
change (scope), what happens to the head, what the loss adds, and what is done afterwards. A paper's
method is a point in this space.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tlseg_bids.errors import NoInputError, UsageError
from tlseg_bids.train.descent import OPTIMISERS
from tlseg_bids.train.values import FACTOR, LARGE, SHARE, Limits, check_values, hints_of

FOLDER = Path(__file__).parent / "recipes" / "adapt"
SCOPES = (
    "classifier", "norm", "shallow", "medium", "deep", "decoder", "all", "two-stage", "adapters",
)  # fmt: skip
HEADS = ("keep", "reset", "new")
LIMITS: Limits = {
    "learning_rate": (1e-15, 10), "warmup": (0, LARGE), "weight_decay": FACTOR, "ema": SHARE,
    "dice_weight": FACTOR, "distillation": FACTOR, "division": FACTOR, "pull": FACTOR,
    "rank": (1, 1024), "max_steps": (1, LARGE),
}  # fmt: skip


@dataclass(frozen=True)
class Adaptation:
    """One way to adapt a segmenter.

    Parameters
    ----------
    name, summary : str
        What it is called and what it is for.
    rehearsal : float
        Share of the examples that are synthesised from the label maps that come with the program,
        so that the model keeps what it knows; 0 shows the new scans only.
    painted : float
        Share of the new scans' examples that are synthesised from their labels instead of shown.
    scope : str
        What may change: ``classifier`` (heads), ``norm`` (scale and shift of every norm),
        ``shallow`` (the bottleneck and its neighbours), ``medium`` and ``deep`` (one and three more
        blocks either side; the input block and the heads stay), ``decoder`` (up blocks and heads),
        ``all``, ``two-stage`` (a third of the steps the classifier, then all), ``adapters``
        (low-rank changes of every 3×3×3 convolution: Hu et al. 2022, arXiv 2106.09685).
    head : str
        ``keep``, ``reset`` (random values), or ``new``: a head of its own for the labels' protocol.
    optimiser : str
        See `tlseg_bids.train.descent.Descent`.
    learning_rate, warmup, weight_decay, ema, dice_weight
        Linear warm-up and cosine decay; weight of the parameters' moving average; weight of the
        soft Dice beside the cross-entropy.
    distillation : float
        Weight of the cross-entropy to the parent's answer on rehearsal examples (Li & Hoiem 2018,
        doi:10.1109/TPAMI.2017.2773081).
    division : float
        Weight of the cross-entropy to how the parent divides what the labels of the new scans
        merge: nothing else tells that.
    pull : float
        Strength of the pull toward the parent's weights (L2-SP: Li et al. 2018, arXiv 1802.01483).
    shares : tuple of float
        How far to go from the parent's weights to the child's (1 is the child); the best on held
        out scans is taken (Wortsman et al. 2022, doi:10.1109/CVPR52688.2022.00780).
    rank : int
        Of the adapters.
    max_steps : int
        Steps of a training run at most; the time budget may allow fewer.
    """

    name: str
    summary: str
    rehearsal: float = 0.3
    painted: float = 0.15
    scope: str = "all"
    head: str = "keep"
    optimiser: str = "adamw"
    learning_rate: float = 5e-4
    warmup: int = 20
    weight_decay: float = 1e-5
    ema: float = 0.98
    dice_weight: float = 0.3
    distillation: float = 0.0
    division: float = 1.0
    pull: float = 0.0
    shares: tuple[float, ...] = (1.0,)
    rank: int = 4
    max_steps: int = 1500

    def __post_init__(self) -> None:
        where = f"recipe '{self.name}'"
        for name, known in (("scope", SCOPES), ("head", HEADS), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"unknown {name} '{getattr(self, name)}'", where, f"use {', '.join(known)}"
                )
        if not (0 <= self.rehearsal < 1 and 0 <= self.painted <= 1):
            raise UsageError(
                f"the shares rehearsal {self.rehearsal:g} and painted {self.painted:g} are not "
                "from 0 to 1", where, "write 0.3 for 30 %; some new scans must be shown",
            )  # fmt: skip
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise UsageError(
                f"shares {list(self.shares)} are not above 0 and up to 1", where,
                "1 is the child, 0.5 half way from the parent",
            )  # fmt: skip


def presets() -> tuple[str, ...]:
    """Names of the recipes that come with the program."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))


def load_adaptation(name: str) -> Adaptation:
    """A preset by its name, or a TOML file by its path.

    Raises
    ------
    NoInputError
        If it is neither.
    UsageError
        If the file is not TOML, or a key is unknown, missing or makes no sense.
    """
    path = FOLDER / f"{name}.toml" if name in presets() else Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(("auto", *presets()))
        raise NoInputError(
            f"no recipe '{name}'", "--fine-tune", f"use {known}, or the path of a TOML file"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the recipe is not TOML ({error})", path, "mend that line") from error
    check_values(values, hints_of(Adaptation), LIMITS, str(path))
    if "shares" in values:
        values["shares"] = tuple(values["shares"])
    try:
        return Adaptation(**{"name": path.stem, **values})
    except TypeError as error:
        raise UsageError(f"keys do not fit: {error}", path, "give at least summary") from error
