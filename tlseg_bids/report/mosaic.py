"""Mosaics in three planes: the scan in grey, and a transparent layer of labels to lay over it.

Pictures are composed as arrays and saved by Pillow. Every slice is a stored slice of the scan;
in the plane, pixels are stretched to equal millimetres, so thick slices keep their shape.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tlseg_bids.report.display import Box, Display

COLUMNS, ROWS = 6, 2
WIDTH_PX = 1860
FILL_ALPHA, LINE_ALPHA = 70, 255
INK, HALO, RULE = 255, 0, 60
FONT_PX = 22
PNG_LEVEL = 6
"""Level 9, which Pillow takes to optimise, takes nine times as long for a seventh of the bytes."""


@dataclass(frozen=True)
class Plane:
    """How one anatomical plane lies on the page: axes into, across and up the picture."""

    name: str
    normal: int
    across: int
    up: int
    left: str
    right: str

    @property
    def letter(self) -> str:
        """World axis along which the slices are stacked."""
        return "xyz"[self.normal]


PLANES = (
    Plane("axial", normal=2, across=0, up=1, left="L", right="R"),
    Plane("coronal", normal=1, across=0, up=2, left="L", right="R"),
    Plane("sagittal", normal=0, across=1, up=2, left="P", right="A"),
)


@dataclass(frozen=True, eq=False)
class Mosaic:
    """One plane's pictures.

    Parameters
    ----------
    plane : Plane
        Which way the slices are cut.
    positions_mm : tuple of float
        World coordinate of each slice, at the middle of the labelled region.
    grey : ndarray, shape (H, W), uint8
        The scan with its marks.
    overlay : ndarray, shape (H, W), uint8
        Fill or outline of a colour: 0 is clear, 1…n are fills, n+1…2n the outlines of the same.
    colours : ndarray, shape (n, 3), uint8
        Colour of each fill.
    """

    plane: Plane
    positions_mm: tuple[float, ...]
    grey: np.ndarray
    overlay: np.ndarray
    colours: np.ndarray

    @property
    def palette(self) -> np.ndarray:
        """Red, green, blue and alpha of every value of `overlay`, shape (2n + 1, 4), uint8."""
        n = len(self.colours)
        palette = np.zeros((2 * n + 1, 4), np.uint8)
        palette[1 : n + 1, :3] = palette[n + 1 :, :3] = self.colours
        palette[1 : n + 1, 3], palette[n + 1 :, 3] = FILL_ALPHA, LINE_ALPHA
        return palette

    def grey_jpeg(self) -> bytes:
        """The scan as JPEG."""
        return _encoded(Image.fromarray(self.grey), "JPEG", quality=82, optimize=True)

    def overlay_png(self) -> bytes:
        """The labels as PNG with transparency."""
        palette = self.palette
        if len(palette) > 256:
            return _encoded(Image.fromarray(palette[self.overlay]), "PNG", compress_level=PNG_LEVEL)
        picture = Image.fromarray(self.overlay.astype(np.uint8))
        picture.putpalette(palette[:, :3].tobytes())
        clear = palette[:, 3].tobytes()
        return _encoded(picture, "PNG", transparency=clear, compress_level=PNG_LEVEL)

    def composed_jpeg(self) -> bytes:
        """Scan and labels in one picture, as JPEG."""
        layer = self.palette[self.overlay]
        alpha = layer[..., 3:].astype(np.uint16)
        mixed = (self.grey[..., None] * (255 - alpha) + layer[..., :3] * alpha) // 255
        picture = Image.fromarray(mixed.astype(np.uint8))
        return _encoded(picture, "JPEG", quality=90, subsampling=0)


def mosaics(display: Display, colours: np.ndarray) -> list[Mosaic]:
    """Axial, coronal and sagittal mosaics through the labelled region.

    Parameters
    ----------
    display : Display
        Scan and labels in RAS+ order.
    colours : ndarray, shape (channels, 3), uint8
        Colour of each row of the protocol.
    """
    return [_mosaic(display, plane, colours) for plane in PLANES]


def _mosaic(display: Display, plane: Plane, colours: np.ndarray) -> Mosaic:
    indices = _slices(display.core[plane.normal], COLUMNS * ROWS)
    extent = [
        (s.stop - s.start) * mm for s, mm in zip(display.box, display.spacing_mm, strict=True)
    ]
    columns = min(COLUMNS, len(indices))
    tile_w = WIDTH_PX // COLUMNS
    tile_h = max(1, round(tile_w * extent[plane.up] / extent[plane.across]))
    rows = -(-len(indices) // columns)
    grey = np.zeros((rows * tile_h, columns * tile_w), np.uint8)
    labels = np.zeros(grey.shape, display.channels.dtype)
    for tile, index in enumerate(indices):
        top, left = tile // columns * tile_h, tile % columns * tile_w
        where = np.s_[top : top + tile_h, left : left + tile_w]
        if display.image is not None:
            flat = display.grey(_cut(display.image, display.box, plane, index))
            picture = Image.fromarray(np.ascontiguousarray(flat))
            grey[where] = picture.resize((tile_w, tile_h), Image.Resampling.BILINEAR)
        labels[where] = _nearest(_cut(display.channels, display.box, plane, index), tile_h, tile_w)
    positions = tuple(_position(display, plane, index) for index in indices)
    overlay, shades = _overlay(labels, colours)
    return Mosaic(
        plane, positions, _marked(grey, plane, positions, (tile_w, tile_h)), overlay, shades
    )


def _slices(span: slice, count: int) -> list[int]:
    """Evenly spread slices of `span`, a little inside of its ends, each at most once."""
    places = np.linspace(0.04, 0.96, count)
    chosen = np.round(span.start + places * (span.stop - span.start - 1)).astype(int)
    return sorted(set(chosen.tolist()))


def _cut(data: np.ndarray, box: Box, plane: Plane, index: int) -> np.ndarray:
    """A slice as a picture: rows from the top down, columns from left to right."""
    where: list[slice | int] = list(box)
    where[plane.normal] = index
    return data[tuple(where)].T[::-1]


def _nearest(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = ((np.arange(height) + 0.5) * picture.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * picture.shape[1] / width).astype(int)
    return picture[np.ix_(rows, columns)]


def _position(display: Display, plane: Plane, index: int) -> float:
    centre = [(s.start + s.stop - 1) / 2 for s in display.box]
    centre[plane.normal] = index
    return float((display.affine @ [*centre, 1.0])[plane.normal])


def _overlay(labels: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill and outline codes, and the colours that occur (the two sides share theirs)."""
    present = np.unique(labels)
    present = present[present > 0]
    shades, shade_of = np.unique(colours[present], axis=0, return_inverse=True)
    kind = np.uint8 if 2 * len(shades) + 1 <= 256 else np.uint16
    table = np.zeros(int(labels.max(initial=0)) + 1, kind)
    table[present] = shade_of.reshape(-1) + 1
    codes = table[labels]
    edge = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, :-1] |= across
    edge[:, 1:] |= across & (labels[:, :-1] == 0)
    edge[:-1] |= down
    edge[1:] |= down & (labels[:-1] == 0)
    codes[edge & (codes > 0)] += len(shades)
    return codes, shades.reshape(-1, 3)


def _marked(
    grey: np.ndarray, plane: Plane, positions: tuple[float, ...], tile: tuple[int, int]
) -> np.ndarray:
    """Side letters and the slice's coordinate on every tile."""
    picture = Image.fromarray(grey)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_PX)
    columns = grey.shape[1] // tile[0]
    for number, position in enumerate(positions):
        left, top = number % columns * tile[0], number // columns * tile[1]
        middle = top + tile[1] // 2
        draw.line([(left, top), (left, top + tile[1])], fill=RULE)
        draw.line([(left, top), (left + tile[0], top)], fill=RULE)
        for text, at, anchor in (
            (plane.left, (left + 5, middle), "lm"),
            (plane.right, (left + tile[0] - 6, middle), "rm"),
            (f"{plane.letter} = {round(position)}", (left + 6, top + tile[1] - 5), "ls"),
        ):
            draw.text(
                at, text, fill=INK, font=font, anchor=anchor, stroke_width=2, stroke_fill=HALO
            )
    return np.asarray(picture)


def signed(millimetres: float) -> str:
    """Rounded, with a true minus sign (which the font of the pictures lacks)."""
    return f"{round(millimetres):d}".replace("-", "\u2212")


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
