"""The page of an adaptation: one self-contained HTML file, nothing is loaded from anywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import write_text
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.report.display import Display
from tlseg_bids.report.mosaic import mosaics
from tlseg_bids.report.subject import data_uri, environment
from tlseg_bids.report.viewer import colours_of

PLANES = ("axial", "coronal")


@dataclass(frozen=True, eq=False)
class Side:
    """One set of labels of a scan: its title and what is drawn."""

    title: str
    display: Display


def write_adaptation_page(path: Path, protocol: LabelProtocol, content: Mapping[str, Any]) -> Path:
    """Write the page.

    Parameters
    ----------
    path : Path
        The HTML file.
    protocol : LabelProtocol
        Of the labels in the pictures.
    content : mapping
        ``site``, ``kept``, ``earlier`` (there was a model of this name), ``reason``, ``parts`` and
        ``rows`` (Dice before and after), ``facts``, ``reasons``, ``scans``, ``refused``,
        ``unlabelled``, ``curves`` (a picture) and ``pictures``: pairs of a title and the
        `Side`s of one scan.

    Raises
    ------
    CannotCreateError, OutputError
        If the file cannot be written.
    """
    shown = [
        {"title": title, "planes": _pictures(title, sides, protocol)}
        for title, sides in content["pictures"]
    ]
    stream = io.BytesIO()
    curves: Image.Image = content["curves"]
    curves.save(stream, "PNG")
    page = environment().get_template("adaptation.html.jinja").render(
        **{k: v for k, v in content.items() if k not in ("pictures", "curves")},
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        curves=data_uri("image/png", stream.getvalue()),
        pictures=shown,
    )  # fmt: skip
    return write_text(path, page)


def _pictures(title: str, sides: Sequence[Side], protocol: LabelProtocol) -> list[dict[str, Any]]:
    """For every plane the same slices with each set of labels."""
    first, colours = sides[0].display, colours_of(protocol)
    planes: dict[str, list[dict[str, str]]] = {name: [] for name in PLANES}
    for side in sides:
        display = replace(side.display, core=first.core, box=first.box)
        for mosaic in mosaics(display, colours):
            if mosaic.plane.name in planes:
                planes[mosaic.plane.name].append({
                    "title": side.title,
                    "alt": f"{title}, {mosaic.plane.name} slices: {side.title}.",
                    "uri": data_uri("image/jpeg", mosaic.composed_jpeg()),
                })  # fmt: skip
    return [{"name": name, "sides": found} for name, found in planes.items()]
