"""What a card knows about the trustworthiness of its own probabilities.

The table ``[calibration]`` of a card is fitted on scans that the fold's model never saw
(`benchmarks/calibrate.py`). Structures are named by their abbreviation without the side, so that
left and right share a number.

Temperature: logits are divided by it before the softmax. Guo et al. 2017, arXiv:1706.04599.
Prediction interval of a volume: Geisser 1993, Predictive Inference, doi:10.1201/9780203742310.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tlseg_bids.errors import DataError
from tlseg_bids.labels.protocol import LabelProtocol

TEMPERATURES = (0.2, 5.0)
SEE = "fit it with benchmarks/calibrate.py; see docs/cards.md"


@dataclass(frozen=True)
class Calibration:
    """Numbers fitted on held-out scans; everything left out means "not calibrated".

    Parameters
    ----------
    how : str
        On which scans, with which command.
    temperature : dict of str to float
        Label protocol of a head to its temperature; 1 where it is left out.
    dice_offset : dict of str to float
        By structure: predicted Dice = expected Dice + offset, held between 0 and 1; empty: the
        expected Dice is given as it is.
    level : float
        Probability, 0 to 1, with which the volume interval is meant to hold the volume that the
        reference of the calibration would give.
    volume_low, volume_high : dict of str to float
        By structure: ends of that interval ÷ soft volume.
    """

    how: str = ""
    temperature: dict[str, float] = field(default_factory=dict)
    dice_offset: dict[str, float] = field(default_factory=dict)
    level: float = 0.9
    volume_low: dict[str, float] = field(default_factory=dict)
    volume_high: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self != Calibration()

    def of_head(self, protocol: str) -> float:
        """Temperature of the head that answers in `protocol`."""
        return self.temperature.get(protocol, 1.0)

    def to_table(self) -> dict[str, Any]:
        """As the card writes it: empty parts left out."""
        default = asdict(Calibration())
        return {k: v for k, v in asdict(self).items() if v != default[k] or k == "level"}


KEYS: dict[str, type] = {
    one.name: {"how": str, "level": float}.get(one.name, dict) for one in fields(Calibration)
}


def structures(protocol: LabelProtocol) -> list[str]:
    """Abbreviation of every channel without its side: left and right share one."""
    sides = {"left": "L-", "right": "R-"}
    table = protocol.table
    return [
        str(short).removeprefix(sides.get(side, ""))
        for short, side in zip(table["abbreviation"], table["hemisphere"], strict=True)
    ]


def check_calibration(given: Calibration, heads: Sequence[LabelProtocol], where: str) -> None:
    """Refuse a calibration that does not fit the card.

    Parameters
    ----------
    given : Calibration
        From the card.
    heads : sequence of LabelProtocol
        Those of the card, the primary first; structures are the primary's.
    where : str
        File and table, for the message.

    Raises
    ------
    DataError
        With the value, the file and key, and what would be right.
    """
    low, high = TEMPERATURES
    for protocol, value in given.temperature.items():
        names = [head.name for head in heads]
        if protocol not in names:
            raise DataError(
                f"a temperature for '{protocol}', and the heads are {', '.join(names)}",
                f"{where}, temperature", SEE,
            )  # fmt: skip
        _check_number(value, low, high, f"{where}, temperature.{protocol}")
    _check_number(given.level, 0.5, 0.999, f"{where}, level")
    known = set(structures(heads[0])[1:])
    for key, bounds in (("dice_offset", (-1, 1)), ("volume_low", (0, 100)),
                        ("volume_high", (0, 100))):  # fmt: skip
        for structure, value in getattr(given, key).items():
            if structure not in known:
                raise DataError(
                    f"protocol '{heads[0].name}' has no structure '{structure}'", f"{where}, {key}",
                    "name structures by their abbreviation without the side",
                )  # fmt: skip
            _check_number(value, *bounds, f"{where}, {key}.{structure}")
    _check_ends(given, where)
    if given and not given.how.strip():
        raise DataError("nothing says how it was fitted", f"{where}, how", SEE)


def _check_number(value: Any, low: float, high: float, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise DataError(f"{value!r} is not between {low:g} and {high:g}", where, SEE)


def _check_ends(given: Calibration, where: str) -> None:
    """Every interval has two ends, the lower one first."""
    one_sided = given.volume_low.keys() ^ given.volume_high.keys()
    if one_sided:
        raise DataError(
            f"only one end is given for {', '.join(sorted(one_sided))}",
            f"{where}, volume_low and volume_high", SEE,
        )  # fmt: skip
    for structure, low in given.volume_low.items():
        if low > (high := given.volume_high[structure]):
            raise DataError(
                f"the interval of '{structure}' runs from {low:g} to {high:g}",
                f"{where}, volume_low", "put the smaller number into volume_low",
            )  # fmt: skip
