"""Boxes on a picture: true ones green and dashed, others solid, told apart without colour vision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..data.example import Box

TRUE = "#009E73"
PREDICTED = ("#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, safe for colour-blind readers; boxes of one answer take them in turn."""
ASKED = "#F0E442"
SHORTEST, LONGEST = 512, 2048
"""Pixels of the drawn picture's longer side: small pictures are enlarged by a whole factor, huge ones reduced."""
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Mark:
    """A box in pixels of the picture, and how it is drawn. label: a short text at its corner, "" for none."""

    box: Box
    color: str
    label: str = ""
    dashed: bool = False


def true_mark(box: Box, label: str = "true") -> Mark:
    return Mark(box, TRUE, label, dashed=True)


def predicted_marks(boxes: Sequence[Box], label: str = "answer") -> list[Mark]:
    """One mark a box; several are numbered from 1."""
    names = [label] if len(boxes) == 1 else [f"{label} {k}" for k in range(1, len(boxes) + 1)]
    return [Mark(box, PREDICTED[k % len(PREDICTED)], names[k]) for k, box in enumerate(boxes)]


def asked_mark(box: Box, label: str = "asked") -> Mark:
    return Mark(box, ASKED, label)


def draw_boxes(image: Image.Image, marks: Sequence[Mark], *, shortest: int = SHORTEST) -> Image.Image:
    """A copy of the picture, scaled to be legible, with the marks in order of their list, the last on top.

    shortest: pixels that the longer side has at least.
    """
    longer = max(image.size)
    if longer < shortest:
        factor: float = ceil(shortest / longer)
        picture = image.convert("RGB").resize([int(v * factor) for v in image.size], Image.Resampling.NEAREST)
    else:
        factor = min(1.0, LONGEST / longer)
        size = [max(1, round(v * factor)) for v in image.size]
        picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 150))
    font = ImageFont.load_default(size=max(12, round(max(picture.size) / 30)))
    for mark in marks:
        _draw_box(draw, mark, factor, width)
    for mark in marks:  # labels above all boxes
        if mark.label:
            _draw_label(draw, mark, factor, picture.size, font)
    return picture


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Writes the picture whole or not at all.

    Raises ValueError for a name that is no picture's, OSError when the disk is full.
    """
    check_picture_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        picture.save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def check_picture_name(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise ValueError(f"{path} is no name for a picture: give a file that ends in {', '.join(SUFFIXES)}")


def _scaled(mark: Mark, factor: float) -> tuple[float, float, float, float]:
    """Corners in the drawn picture; swapped ones are put in order."""
    x1, y1, x2, y2 = (value * factor for value in mark.box)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _draw_box(draw: ImageDraw.ImageDraw, mark: Mark, factor: float, width: int) -> None:
    """A dark rim under the coloured line, so that it shows on any background."""
    x1, y1, x2, y2 = _scaled(mark, factor)
    for color, thickness in (("black", width + 2), (mark.color, width)):
        for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
            for a, b in _dashes(start, end, dash=5.0 * width) if mark.dashed else ((start, end),):
                draw.line((*a, *b), fill=color, width=thickness)


Point = tuple[float, float]


def _dashes(start: Point, end: Point, *, dash: float) -> list[tuple[Point, Point]]:
    """The line from start to end as dashes with gaps of 0.6 dash; it begins and ends with a dash, so corners close."""
    length = abs(end[0] - start[0]) + abs(end[1] - start[1])
    count = max(1, round((length + 0.6 * dash) / (1.6 * dash)))
    period = length / max(count - 0.375, 1e-9)

    def at(distance: float) -> tuple[float, float]:
        share = min(distance / length, 1.0) if length else 0.0
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    return [(at(k * period), at((k + 0.625) * period)) for k in range(count)]


def _draw_label(draw: ImageDraw.ImageDraw, mark: Mark, factor: float, size: tuple[int, int], font: Font) -> None:
    """Above the box's left corner; a dashed one's below its right corner. Always inside the picture."""
    x1, y1, x2, y2 = _scaled(mark, factor)
    left, top, right, bottom = draw.textbbox((0, 0), mark.label, font=font)
    w, h = right - left + 8, bottom - top + 6
    x, y = (x2 - w, y2 + 2) if mark.dashed else (x1, y1 - h - 2)
    x, y = min(max(x, 0), max(size[0] - w, 0)), min(max(y, 0), max(size[1] - h, 0))
    draw.rectangle((x, y, x + w, y + h), fill=mark.color, outline="black")
    draw.text((x + 4 - left, y + 3 - top), mark.label, fill=_ink(mark.color), font=font)


def _ink(color: str) -> str:
    """Black or white, whichever reads better on the colour."""
    r, g, b = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return "black" if 0.299 * r + 0.587 * g + 0.114 * b > 125 else "white"
