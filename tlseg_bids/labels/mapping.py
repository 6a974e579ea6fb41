"""From one label protocol to another: tables in `mappings/*.tsv`.

A mapping is total: every index of the source protocol has a row. Its target is an index of the
target protocol, or ``n/a``: then nobody can say what the voxel would be there, and it is left out
of scoring and training. A target that no source leads to cannot be scored either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources

import numpy as np
import pandas as pd

from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol

COLUMNS = ("source", "target", "note")
NOT_APPLICABLE = "n/a"
LEFT_OUT = -1


@dataclass(frozen=True, eq=False)
class LabelMapping:
    """A checked table from the indices of `source` to those of `target`.

    Parameters
    ----------
    source, target : LabelProtocol
        From and to.
    table : DataFrame
        Columns `COLUMNS`, as text: index, index or ``n/a``, why it is not one to one.
    """

    source: LabelProtocol
    target: LabelProtocol
    table: pd.DataFrame

    def __post_init__(self) -> None:
        where = f"label mapping '{self.name}'"
        missing = [column for column in COLUMNS if column not in self.table]
        if missing:
            raise DataError(f"columns {missing} are missing", where, "add them to the TSV")
        sources = self.table["source"].astype(int)
        if sources.duplicated().any():
            twice = sorted(set(sources[sources.duplicated()]))
            raise DataError(f"sources {twice} have two rows", where, "keep one")
        absent = sorted(set(map(int, self.source.indices)) - set(sources))
        if absent:
            raise DataError(
                f"labels {absent} of '{self.source.name}' have no row", where, "a mapping is total"
            )
        self._check_known(where)
        self._check_sides(where)

    def _check_known(self, where: str) -> None:
        for protocol, labels in ((self.source, self.pairs), (self.target, self.pairs.values())):
            known = set(map(int, protocol.indices)) | {LEFT_OUT}
            strange = sorted(set(labels) - known)
            if strange:
                raise DataError(
                    f"labels {strange} are not in protocol '{protocol.name}'", where,
                    "correct the TSV",
                )  # fmt: skip
        if self.pairs[int(self.source.indices[0])] != int(self.target.indices[0]):
            raise DataError("background does not lead to background", where, "correct the TSV")

    def _check_sides(self, where: str) -> None:
        """Mirroring and mapping may be swapped: left never leads to right."""
        here = dict(zip(self.source.table["index"], self.source.table["mirror"], strict=True))
        there = dict(zip(self.target.table["index"], self.target.table["mirror"], strict=True))
        there[LEFT_OUT] = LEFT_OUT
        sides = {**dict(zip(self.target.table["index"], self.target.table["hemisphere"],
                            strict=True)), LEFT_OUT: "none"}  # fmt: skip
        own = dict(zip(self.source.table["index"], self.source.table["hemisphere"], strict=True))
        for label, target in self.pairs.items():
            crossed = {own[label], sides[target]} == {"left", "right"}
            if crossed or self.pairs[here[label]] != there[target]:
                raise DataError(
                    f"{label} leads to {target}, which is not on its side", where,
                    "correct the TSV: left leads to left, and its mirror to the mirror",
                )  # fmt: skip

    @property
    def name(self) -> str:
        """``<source>_to_<target>``."""
        return f"{self.source.name}_to_{self.target.name}"

    @cached_property
    def pairs(self) -> dict[int, int]:
        """Source index → target index, `LEFT_OUT` where there is none."""
        targets = [
            LEFT_OUT if text == NOT_APPLICABLE else int(text) for text in self.table["target"]
        ]
        return dict(zip(self.table["source"].astype(int), targets, strict=True))

    @property
    def left_out(self) -> tuple[int, ...]:
        """Source labels without a target."""
        return tuple(label for label, target in self.pairs.items() if target == LEFT_OUT)

    @property
    def unreached(self) -> tuple[int, ...]:
        """Target labels that no source leads to."""
        reached = set(self.pairs.values())
        return tuple(int(label) for label in self.target.indices if int(label) not in reached)

    @property
    def merged(self) -> dict[int, tuple[int, ...]]:
        """Target label → the several source labels that it holds: where detail is lost."""
        sources: dict[int, list[int]] = {}
        for label, target in self.pairs.items():
            if target != LEFT_OUT:
                sources.setdefault(target, []).append(label)
        return {target: tuple(labels) for target, labels in sources.items() if len(labels) > 1}

    def describe(self) -> tuple[str, ...]:
        """Sentences: what is merged, left out and never reached."""
        here = dict(zip(self.source.table["index"], self.source.table["name"], strict=True))
        there = dict(zip(self.target.table["index"], self.target.table["name"], strict=True))
        out = [
            f"{there[target]} holds {_names([here[label] for label in labels])}."
            for target, labels in self.merged.items()
        ]
        if self.left_out:
            out.append(f"Left out: {', '.join(here[label] for label in self.left_out)}.")
        if self.unreached:
            out.append(f"Never reached: {', '.join(there[label] for label in self.unreached)}.")
        return tuple(out)

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Map an array of source labels.

        Parameters
        ----------
        labels : ndarray of int
            Any shape.

        Returns
        -------
        ndarray of int16
            Target labels; `LEFT_OUT` where there is none, and for labels that the source protocol
            does not know.
        """
        return look_up(labels, self.pairs)

    def channel_matrix(self) -> np.ndarray:
        """Fold probabilities: float32 (target channels, source channels), 1 where source → target.

        ``matrix @ probabilities`` are probabilities in the target protocol. Columns of left-out
        sources are 0, so the sum over the target's channels is the share that can be scored.
        """
        row = {int(label): c for c, label in enumerate(self.target.indices)}
        matrix = np.zeros((len(self.target), len(self.source)), np.float32)
        for column, label in enumerate(self.source.indices):
            target = self.pairs[int(label)]
            if target != LEFT_OUT:
                matrix[row[target], column] = 1
        return matrix


def _names(names: list[str], most: int = 6) -> str:
    """The names, or how many they are."""
    return ", ".join(names) if len(names) <= most else f"{len(names)} structures"


def look_up(labels: np.ndarray, pairs: dict[int, int]) -> np.ndarray:
    """Replace labels by a table; int16, `LEFT_OUT` for what the table does not know."""
    labels = np.asarray(labels)
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if high - low > 1_000_000:
        raise DataError(f"labels run from {low} to {high}", "", "give a label image")
    table = np.full(high - low + 1, LEFT_OUT, np.int16)
    for label, target in pairs.items():
        if low <= label <= high:
            table[label - low] = target
    return table[labels - low] if low else table[labels]


@lru_cache
def load_mapping(name: str) -> LabelMapping:
    """Read `mappings/<source>_to_<target>.tsv`.

    Raises
    ------
    UsageError
        If there is no such mapping.
    """
    folder = resources.files("tlseg_bids.labels") / "mappings"
    file = folder / f"{name}.tsv"
    if name not in known_mappings():
        known = ", ".join(known_mappings())
        raise UsageError(f"no label mapping '{name}'", "", f"known are {known}")
    source, target = name.split("_to_")
    with file.open(encoding="utf-8") as stream:
        table = pd.read_csv(stream, sep="\t", dtype=str, keep_default_na=False)
    return LabelMapping(load_protocol(source), load_protocol(target), table)


def known_mappings() -> tuple[str, ...]:
    """Names of the mappings that come with the program."""
    folder = resources.files("tlseg_bids.labels") / "mappings"
    return tuple(
        sorted(f.name.removesuffix(".tsv") for f in folder.iterdir() if f.name.endswith(".tsv"))
    )
