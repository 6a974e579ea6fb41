"""The page of ``tlseg-evaluate``: scores and Bland–Altman plots of every structure, self-contained.

Bland & Altman 1986, doi:10.1016/S0140-6736(86)90837-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import write_text
from tlseg_bids.metrics import agreement
from tlseg_bids.report.subject import environment

WIDTH, HEIGHT, MARGIN = 260.0, 150.0, 14.0
MOST_POINTS = 500


@dataclass(frozen=True)
class Plot:
    """A Bland–Altman plot in pixels: dots (x, y), and heights of zero, bias and both limits.

    `low`, `high` and `bias` are None where there is no such number; `ends` are the means at the
    left and right end and the differences at the lower and upper end, mm³.
    """

    dots: tuple[tuple[float, float], ...]
    zero: float
    bias: float
    low: float | None
    high: float | None
    ends: tuple[float, float, float, float]


def plot(predicted: np.ndarray, reference: np.ndarray, row: pd.Series) -> Plot:
    """Difference against mean of two volumes (n,), mm³, with the row of `agreement`."""
    step = max(1, math.ceil(len(predicted) / MOST_POINTS))
    mean, gap = (predicted + reference) / 2, predicted - reference
    limits = [value for value in (row["low_mm3"], row["high_mm3"]) if math.isfinite(value)]
    low_x, high_x = _wider(mean.min(), mean.max())
    low_y, high_y = _wider(min(0.0, gap.min(), *limits), max(0.0, gap.max(), *limits))

    def down(value: float) -> float:
        share = (value - low_y) / (high_y - low_y)
        return round(HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN), 1)

    across = MARGIN + (mean - low_x) / (high_x - low_x) * (WIDTH - 2 * MARGIN)
    dots = zip(across[::step].round(1), map(down, gap[::step]), strict=True)
    low, high = (down(limit) for limit in limits) if limits else (None, None)
    return Plot(
        tuple((float(x), y) for x, y in dots), down(0.0), down(row["bias_mm3"]), low, high,
        (low_x, high_x, low_y, high_y),
    )  # fmt: skip


def write_agreement_page(path: Path, table: pd.DataFrame, command: str) -> Path:
    """Write the page.

    Parameters
    ----------
    path : Path
        The HTML file.
    table : DataFrame
        Rows of `tlseg_bids.metrics.compare`, with a column ``predicted`` that names the scan.
    command : str
        The command line.

    Raises
    ------
    CannotCreateError, OutputError
        If the file cannot be written.
    """
    found = agreement(table)
    figures = []
    for _, row in found.iterrows():
        part = table[table["index"] == row["index"]]
        part = part[(part["predicted_mm3"] > 0) | (part["reference_mm3"] > 0)]
        volumes = (part[name].to_numpy(float) for name in ("predicted_mm3", "reference_mm3"))
        figures.append(plot(*volumes, row))
    page = environment().get_template("agreement.html.jinja").render(
        version=__version__, made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", command=command,
        scans=table["predicted"].nunique(), width=WIDTH, height=HEIGHT, margin=MARGIN,
        rows=list(zip(found.to_dict("records"), figures, strict=True)),
    )  # fmt: skip
    return write_text(path, page)


def _wider(low: float, high: float) -> tuple[float, float]:
    """Ends that are apart, also for one value."""
    return (low, high) if high > low else (low - 1, high + 1)
