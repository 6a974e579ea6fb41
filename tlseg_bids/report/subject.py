"""One page per subject: everything that is on disk about their scans, in a single HTML file."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import atomic, check_inside
from tlseg_bids.errors import DataError, TlsegError
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.report.changes import changes
from tlseg_bids.report.derivatives import (
    FailedScan,
    LabelledScan,
    labelled_scans,
    recorded_failures,
)
from tlseg_bids.report.display import Display, load_display
from tlseg_bids.report.methods import card_told, methods
from tlseg_bids.report.mosaic import COLUMNS, WIDTH_PX, Mosaic, mosaics, signed
from tlseg_bids.report.provenance import (
    calibration_of,
    command_of,
    facts_of,
    model_of,
    qc_rows,
    version_of,
    warnings_of,
)
from tlseg_bids.report.verdict import Verdict, totals, verdict, volume_rows
from tlseg_bids.report.viewer import (
    colours_of,
    hex_colour,
    label_colormap,
    niivue_licence,
    niivue_script,
    viewer_data,
)
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.registry import load_cards


def write_subject_report(
    out_dir: Path,
    subject: str,
    command: str,
    recorded: dict[str, FailedScan] | None = None,
) -> Path:
    """Make `sub-X.html` and the pictures in `sub-X/figures/` from the derivatives on disk.

    Parameters
    ----------
    out_dir : Path
        Root of the derivative dataset.
    subject : str
        Participant label without ``sub-``.
    command : str
        The command line of the run that makes the page; those of the scans are on disk.
    recorded : dict, optional
        Every scan that failed or was skipped, by its path, as
        `tlseg_bids.report.derivatives.all_failures` gives them: the logs are then not read again.

    Returns
    -------
    path : Path
        The HTML file.

    Raises
    ------
    DataError
        If `subject` could lead out of `out_dir`.
    CannotCreateError, OutputError
        If a file cannot be written.
    """
    if not subject or "/" in subject or "\\" in subject or "\0" in subject:
        raise DataError(
            f"the participant label '{subject}' cannot be part of a file name",
            out_dir,
            "rename the participant in the dataset",
        )
    scans, failed = labelled_scans(out_dir, subject)
    failed += recorded_failures(out_dir, subject, recorded)
    figures = out_dir / f"sub-{subject}" / "figures"
    check_inside(figures, out_dir)
    sections = []
    for scan in scans:
        try:
            sections.append(_section(scan, len(scans), figures, len(sections) + 1))
        except DataError as error:
            failed.append(FailedScan(scan.dseg.name, f"{error.what} ({error.where})", error.hint))
    page = _render(out_dir, subject, command, sections, failed)
    path = out_dir / f"sub-{subject}.html"
    _write(path, page.encode("utf-8"))
    return path


def _section(scan: LabelledScan, scans: int, figures: Path, number: int) -> dict[str, Any]:
    """Everything the template shows of one scan; its pictures are written on the way."""
    display = load_display(scan.dseg, scan.image, scan.protocol)
    rows = volume_rows(scan)
    judgement = verdict(scan, rows)
    data = viewer_data(display, scans)
    pictures = []
    for mosaic in mosaics(display, colours_of(scan.protocol)):
        file = figures / f"{scan.stem}_desc-{mosaic.plane.name}_dseg.jpg"
        _write(file, mosaic.composed_jpeg())
        pictures.append(_picture(scan, mosaic, file))
    return {
        "id": f"scan-{number}",
        "scan": scan,
        "verdict": judgement,
        "noted": warnings_of(scan),
        "pictures": pictures,
        "notes": _display_notes(scan, display),
        "viewer": data,
        "protocol": scan.protocol,
        "rows": rows,
        "with_dice": any(math.isfinite(row.dice) for row in rows),
        "with_interval": any(math.isfinite(row.low_mm3) for row in rows),
        "calibration": calibration_of(scan),
        "totals": totals(scan),
        "model": model_of(scan),
        "facts": facts_of(scan),
        "command": command_of(scan),
        "qc": qc_rows(scan),
    }


def _picture(scan: LabelledScan, mosaic: Mosaic, file: Path) -> dict[str, Any]:
    plane, places = mosaic.plane, mosaic.positions_mm
    height, width = mosaic.grey.shape
    where = (
        f"{len(places)} {plane.name} slices, {plane.letter} from {signed(places[0])} to "
        f"{signed(places[-1])} mm"
    )
    return {
        "plane": plane,
        "alt": f"{scan.title}: {where}; the scan in grey.",
        "overlay_alt": f"Structures of {scan.title} as coloured areas with outlines, same slices.",
        "caption": where,
        "scan_uri": data_uri("image/jpeg", mosaic.grey_jpeg()),
        "overlay_uri": data_uri("image/png", mosaic.overlay_png()),
        "file": f"{file.parent.parent.name}/{file.parent.name}/{file.name}",
        "width": width,
        "height": height,
        "percent": 100 * width / (COLUMNS * (WIDTH_PX // COLUMNS)),
    }


def _display_notes(scan: LabelledScan, display: Display) -> list[str]:
    notes = []
    if scan.image is None:
        notes.append(
            f"The scan ({scan.source or 'not named in the sidecar'}) is not where the sidecar "
            "says, so the labels are shown alone."
        )
    elif display.image is None:
        notes.append(
            f"The scan ({scan.source}) could not be read, or has another shape than the labels, "
            "so the labels are shown alone."
        )
    if display.oblique_degrees > 1:
        notes.append(
            f"The scan is tilted by {display.oblique_degrees:.0f}° against the scanner's axes; the "
            "slices follow the scan's own axes and are named after the closest anatomical plane."
        )
    if not display.channels.any():
        notes.append("Nothing was labelled in this scan.")
    return notes


def _render(
    out_dir: Path,
    subject: str,
    command: str,
    sections: list[dict[str, Any]],
    failed: Sequence[FailedScan],
) -> str:
    scans = [section["scan"] for section in sections]
    cards, versions = _cards_used(out_dir, scans), sorted({version_of(scan) for scan in scans})
    return (
        environment()
        .get_template("subject.html.jinja")
        .render(
            subject=subject,
            version=__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            command=command,
            sections=sections,
            changes=changes([(section["scan"], section["rows"]) for section in sections]),
            failed=failed,
            failed_verdict=Verdict("fail"),
            methods=methods(cards, " and ".join(versions) or __version__),
            niivue=niivue_script() if sections else "",
            niivue_licence=niivue_licence(),
            page_data=_page_data(subject, sections),
        )
    )


def _page_data(subject: str, sections: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script needs: colours by protocol, and for each scan its identity."""
    protocols: dict[str, LabelProtocol] = {s["protocol"].name: s["protocol"] for s in sections}
    return {
        "subject": subject,
        "version": __version__,
        "protocols": {
            name: {
                "colormap": label_colormap(protocol),
                "index": [int(i) for i in protocol.indices],
                "abbreviation": [str(a) for a in protocol.table["abbreviation"]],
            }
            for name, protocol in protocols.items()
        },
        "scans": [
            {
                "id": section["id"],
                "scan": section["scan"].stem,
                "session": section["scan"].entities.get("ses", ""),
                "key": str(section["scan"].sidecar.get("ContentKey", "")),
                "protocol": section["protocol"].name,
                "places": section["viewer"].places,
            }
            for section in sections
        ],
    }


def _cards_used(out_dir: Path, scans: Sequence[LabelledScan]) -> list[ModelCard]:
    """The card of every model that was used; where it is not at hand, what the sidecars tell."""
    try:
        at_hand = {(c.name, c.weights.sha256): c for c in load_cards(out_dir=out_dir)}
    except TlsegError:  # a damaged card elsewhere must not cost the report
        at_hand = {}
    used: dict[tuple[str, str], ModelCard] = {}
    for scan in scans:
        model = model_of(scan)
        key = (model["name"], model["sha256"])
        if model["name"] and key not in used:
            card = at_hand.get(key) or card_told(model, scan.protocol.name)
            used[key] = card.answering(scan.protocol.name)
    return list(used.values())


@lru_cache
def environment() -> Environment:
    """Templates of this package; everything that is put into them is escaped."""
    environment = Environment(
        loader=PackageLoader("tlseg_bids.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _formatted
    environment.filters["colour"] = hex_colour
    environment.globals["asset"] = _asset
    return environment


def _asset(name: str) -> str:
    """A style sheet or script of this package, to stand in the page as it is."""
    file = resources.files("tlseg_bids.report") / "templates" / name
    return file.read_text(encoding="utf-8")


def _formatted(value: float, digits: int = 0) -> str:
    """``12 345`` with thin spaces; a dash where the number is unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0  # + 0.0 turns −0 into 0
    return f"{rounded:,.{digits}f}".replace(",", "\u202f").replace("-", "\u2212")


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as stream:
        stream.write(content)
