"""Write a page for every model of the package, from its card.

Usage: ``python docs/models/make.py [--check] [--scan NAME=PATH[,PATH] [--caption TEXT]]``

Without an option the pages are written anew and the pictures stay. ``--scan`` labels a scan with
the model NAME and draws the picture of its page: PATH is a BIDS file, two of them for a model of
two image channels, or ``demo`` for the MNI152 template that `make demo` uses. ``--check`` writes
nothing and fails where a page is not what its card says.
"""

from __future__ import annotations

import argparse
import io
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tlseg_bids.errors import TlsegError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.report.display import load_display
from tlseg_bids.report.mosaic import mosaics
from tlseg_bids.report.viewer import colours_of
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.page import index, page
from tlseg_bids.zoo.registry import BUILTIN, find_card, load_cards, ranked

HERE = Path(__file__).resolve().parent
LARGEST_BYTES = 300_000
WIDTHS_PX = (1240, 1116, 992, 868, 744, 620)
COLOURS = 96
PLANES = ("axial", "coronal")
DEMO = "demo"
DEMO_NAME = (
    "the MNI152 T1w template, an average of 152 adults (doi:10.1016/j.neuroimage.2010.07.033)"
)


def pages(cards: Sequence[ModelCard], folder: Path = HERE) -> dict[str, str]:
    """Text of every page by file name; pictures that lie in `folder` are shown."""
    found = {"README.md": index(ranked(cards))}
    for card in cards:
        picture = folder / f"{card.name}.png"
        shown = (picture.name, caption_of(picture)) if picture.is_file() else (None, "")
        found[f"{card.name}.md"] = page(card, *shown)
    return found


def stale(cards: Sequence[ModelCard], folder: Path = HERE) -> list[str]:
    """Names of pages that are missing, differ from what the card says, or have no card."""
    wanted = pages(cards, folder)
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    names = sorted(wanted.keys() | there.keys())
    orphans = {p.name for p in folder.glob("*.png")} - {f"{card.name}.png" for card in cards}
    return [name for name in names if wanted.get(name) != there.get(name)] + sorted(orphans)


def caption_of(picture: Path) -> str:
    """What a picture says of itself."""
    with Image.open(picture) as image:
        return str(image.info.get("Description", ""))


def label(card: ModelCard, scans: Sequence[Path], folder: Path) -> tuple[Path, Path]:
    """Label copies of the scans under `folder`; return the first one and its labels."""
    bids, out = folder / "bids", folder / "out"
    anat = bids / "sub-picture" / "anat"
    anat.mkdir(parents=True)
    (bids / "dataset_description.json").write_text('{"Name": "picture", "BIDSVersion": "1.10.0"}')
    copies = []
    for scan in scans:
        stem, dot, rest = scan.name.partition(".nii")
        copies.append(anat / f"sub-picture_{stem.split('_')[-1]}{dot}{rest}")
        shutil.copy(scan, copies[-1])
        sidecar = scan.with_name(f"{stem}.json")
        if sidecar.is_file():
            shutil.copy(sidecar, anat / f"{copies[-1].name.partition('.nii')[0]}.json")
    program = (sys.executable, "-m", "tlseg_bids.cli.run")
    subprocess.run(
        (*program, bids, out, "participant", "--model", card.name, "--skip-bids-validation"),
        check=True,
    )
    space = copies[0].name.partition(".nii")[0].split("_")[-1]
    name = f"sub-picture_space-{space}_seg-{card.protocol}_dseg.nii.gz"
    return copies[0], out / "sub-picture" / "anat" / name


def draw(card: ModelCard, scan: Path, dseg: Path, caption: str) -> bytes:
    """The report's own mosaics, one plane above the other, as a PNG of at most `LARGEST_BYTES`."""
    protocol = load_protocol(card.protocol)
    display = load_display(dseg, scan, protocol)
    shown = [m for m in mosaics(display, colours_of(protocol)) if m.plane.name in PLANES]
    rows = [Image.open(io.BytesIO(mosaic.composed_jpeg())) for mosaic in shown]
    whole = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)))
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    about = PngInfo()
    about.add_text("Description", caption)
    for width in WIDTHS_PX:
        small = whole.resize((width, round(whole.height * width / whole.width)))
        stream = io.BytesIO()
        small.quantize(COLOURS, dither=Image.Dither.NONE).save(
            stream, "PNG", pnginfo=about, optimize=True
        )
        if stream.tell() <= LARGEST_BYTES:
            return stream.getvalue()
    raise SystemExit(f"the picture of '{card.name}' stays above {LARGEST_BYTES} bytes")


def picture(card: ModelCard, scans: list[str], caption: str, folder: Path = HERE) -> None:
    """Label a scan with a model and draw its page's picture."""
    with tempfile.TemporaryDirectory() as temporary:
        if scans == [DEMO]:
            demo = runpy.run_path(str(HERE.parent / "demo.py"))
            paths = [demo["write_dataset"](Path(temporary) / "demo")]
        else:
            paths = [Path(scan) for scan in scans]
        what = DEMO_NAME if scans == [DEMO] else " and ".join(path.name for path in paths)
        scan, dseg = label(card, paths, Path(temporary))
        caption = caption or f"{card.name} {card.version} on {what}, axial and coronal"
        content = draw(card, scan, dseg, caption)
    (folder / f"{card.name}.png").write_bytes(content)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if not current")
    parser.add_argument("--scan", metavar="NAME=PATH[,PATH]", help="label a scan and draw it")
    parser.add_argument("--caption", default="", help="what --scan shows")
    given = parser.parse_args(argv)
    try:
        cards = [card for card in load_cards() if card.path and card.path.parent == BUILTIN]
        if given.scan:
            name, _, paths = given.scan.partition("=")
            picture(find_card(cards, name, "--scan"), paths.split(","), given.caption)
    except TlsegError as error:
        print(f"make.py: {error}", file=sys.stderr)
        return error.exit_code
    old = stale(cards)
    if given.check:
        print("\n".join(f"not what the card says: {name}" for name in old) or "all current")
        return 1 if old else 0
    for name, text in pages(cards).items():
        (HERE / name).write_text(text, encoding="utf-8")
    print(f"written: {', '.join(old) or 'nothing, all were current'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
