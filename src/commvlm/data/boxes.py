"""Boxes between pixels of the original image and Shikra's text: pad to a square, [0, 1], three decimals, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .example import Box

DECIMALS = 3
"""One quantum of the text is 10**-3 of the padded square's side."""

_NUMBER = r"(?:0(?:\.[0-9]*)?|1(?:\.0*)?)"
_BOX = rf"{_NUMBER}(?:\s*,\s*{_NUMBER}){{3}}"
_GROUP = re.compile(rf"\[\s*({_BOX}(?:\s*;\s*{_BOX})*)\s*\]")


@dataclass(frozen=True)
class PadSquare:
    """An image of width x height pixels in the middle of a square as wide as its longer side.

    The shorter side is padded by (long - short) // 2 in front and by the rest behind, as Shikra's `Expand2square` does;
    an odd difference therefore sits half a pixel off the middle.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image of {self.width} x {self.height} pixels has no geometry: both must be >= 1")

    @property
    def side(self) -> int:
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """Pixels of padding left of and above the image."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def forward(self, box: Box) -> Box:
        """Pixels of the image -> [0, 1] of the square. What lies beyond the square is clamped to it, so a box that
        leaves the image may reach into the padding (Shikra's behaviour). Raises ValueError for nan and infinity."""
        if not all(math.isfinite(value) for value in box):
            raise ValueError(f"box {tuple(box)} is not finite: give x1, y1, x2, y2 in pixels")
        dx, dy = self.offset
        x1, y1, x2, y2 = box
        return self._clamped(x1 + dx), self._clamped(y1 + dy), self._clamped(x2 + dx), self._clamped(y2 + dy)

    def inverse(self, box: Box) -> Box:
        """[0, 1] of the square -> pixels of the image, clipped to the image."""
        dx, dy = self.offset
        x1, y1, x2, y2 = (value * self.side for value in box)
        return (
            min(max(x1 - dx, 0.0), float(self.width)),
            min(max(y1 - dy, 0.0), float(self.height)),
            min(max(x2 - dx, 0.0), float(self.width)),
            min(max(y2 - dy, 0.0), float(self.height)),
        )

    def _clamped(self, pixels: float) -> float:
        return min(max(pixels / self.side, 0.0), 1.0)


def box_iou(boxes: ArrayLike, others: ArrayLike) -> np.ndarray:
    """Intersection over union, row by row: (n, 4) and (n, 4) corners x1, y1, x2, y2 in one unit -> (n,).

    A box turned inside out (x2 < x1) has no area. Two boxes without area overlap by 0, not by 0/0.
    """
    a = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    b = np.asarray(others, dtype=np.float64).reshape(-1, 4)
    if len(a) != len(b):
        raise ValueError(f"IoU pairs boxes row by row, got {len(a)} and {len(b)} of them")
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = _area(low, high)
    union = _area(a[:, :2], a[:, 2:]) + _area(b[:, :2], b[:, 2:]) - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(n, 2) and (n, 2) opposite corners -> (n,)."""
    return np.clip(high - low, 0.0, None).prod(axis=1)


def format_boxes(boxes: Iterable[Box], geometry: PadSquare) -> str:
    """One group of boxes in pixels -> `[x1,y1,x2,y2;...]` of the padded square, three decimals, no spaces.

    Raises ValueError for an empty group, which has no text, and for a box that is not finite.
    """
    texts = [",".join(f"{round(value, DECIMALS):.{DECIMALS}f}" for value in geometry.forward(box)) for box in boxes]
    if not texts:
        raise ValueError("a group of boxes is empty: a <boxes> slot takes at least one box")
    return f"[{';'.join(texts)}]"


def parse_boxes(text: str) -> list[tuple[Box, ...]]:
    """Every `[x1,y1,x2,y2;...]` of a text as a group of normalised boxes, in order; none gives an empty list.

    All that `format_boxes` writes is read back, and spaces around the numbers are forgiven. Brackets with another
    number of values, or with a value outside [0, 1], are no boxes. Nothing is repaired: swapped corners stay so.
    """
    return [tuple(_quadruple(box.split(",")) for box in match.group(1).split(";")) for match in _GROUP.finditer(text)]


def boxes_in_pixels(text: str, geometry: PadSquare) -> list[tuple[Box, ...]]:
    """`parse_boxes`, with every box in pixels of the original image and clipped to it."""
    return [tuple(geometry.inverse(box) for box in group) for group in parse_boxes(text)]


def _quadruple(numbers: Sequence[str]) -> Box:
    x1, y1, x2, y2 = (float(number) for number in numbers)
    return x1, y1, x2, y2
