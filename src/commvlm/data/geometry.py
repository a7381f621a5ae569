"""One object follows an image through padding, cropping, stretching and tiling, and maps boxes and points there and back.

All of these show a window of the plane that the image lies in, at some scale. In pixels of the original image:

    stretch        the image itself; both sides are scaled to the encoder's, each by its own factor
    pad-square     a square around the image, as wide as its longer side; what is not the image is padding, of any colour
    center-crop    the square in its middle, as wide as its shorter side
    crop, tiles    any part

so a box's place is always (pixel - window's corner) / window's size, and windows of windows are windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .example import Box, Point


@dataclass(frozen=True)
class View:
    """width, height: of the original image in pixels. window: the part of its plane that is shown, in its pixels."""

    width: int
    height: int
    window: Box

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image of {self.width} x {self.height} pixels has no geometry: both must be >= 1")
        x1, y1, x2, y2 = self.window
        if not (all(map(math.isfinite, self.window)) and x1 < x2 and y1 < y2):
            raise ValueError(f"a view of {self.window} shows nothing: give x1 < x2 and y1 < y2 in pixels")

    @classmethod
    def whole(cls, width: int, height: int) -> View:
        """The image itself; resized to a square it is stretched."""
        return cls(width, height, (0, 0, width, height))

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the window in pixels of the original image."""
        x1, y1, x2, y2 = self.window
        return x2 - x1, y2 - y1

    def pad_square(self) -> View:
        """A square around the window, padded by (long - short) // 2 in front of the shorter side and by the rest behind."""
        x1, y1, x2, y2 = self.window
        side = max(self.size)
        left, top = x1 - (side - (x2 - x1)) // 2, y1 - (side - (y2 - y1)) // 2
        return View(self.width, self.height, (left, top, left + side, top + side))

    def center_crop(self) -> View:
        """The square in the window's middle, as CLIP crops."""
        x1, y1, x2, y2 = self.window
        side = min(self.size)
        left, top = x1 + (x2 - x1 - side) // 2, y1 + (y2 - y1 - side) // 2
        return View(self.width, self.height, (left, top, left + side, top + side))

    def crop(self, box: Box) -> View:
        """A part of the window, in pixels of the original image. Raises ValueError for one that leaves it."""
        x1, y1, x2, y2 = self.window
        if not (x1 <= box[0] and y1 <= box[1] and box[2] <= x2 and box[3] <= y2):
            raise ValueError(f"crop {box} leaves the view's window {self.window}")
        return View(self.width, self.height, box)

    def tiles(self, columns: int, rows: int) -> list[View]:
        """The window cut into columns x rows equal parts, row by row."""
        if columns < 1 or rows < 1:
            raise ValueError(f"a window is cut into at least 1 x 1 tiles, not {columns} x {rows}")
        left, top, right, bottom = self.window
        xs = [left + (right - left) * k / columns for k in range(columns)] + [right]
        ys = [top + (bottom - top) * k / rows for k in range(rows)] + [bottom]
        return [
            View(self.width, self.height, (xs[c], ys[r], xs[c + 1], ys[r + 1]))
            for r in range(rows)
            for c in range(columns)
        ]

    def shows(self, box: Box) -> float:
        """Share of a box's area within the window, 0 to 1: what a crop or a tile keeps of it."""
        x1, y1, x2, y2 = self.window
        width = max(0.0, min(box[2], x2) - max(box[0], x1))
        height = max(0.0, min(box[3], y2) - max(box[1], y1))
        area = (box[2] - box[0]) * (box[3] - box[1])
        return width * height / area if area > 0 else 0.0

    def forward(self, box: Box) -> Box:
        """Pixels of the image -> [0, 1] of the window. What lies beyond the window is clamped to it; beyond the image, but
        within padding, it is not (Shikra's behaviour). Raises ValueError for nan and infinity."""
        x1, y1, x2, y2 = box
        return (*self.forward_point((x1, y1)), *self.forward_point((x2, y2)))

    def inverse(self, box: Box) -> Box:
        """[0, 1] of the window -> pixels of the image, clipped to the image."""
        x1, y1, x2, y2 = box
        return (*self.inverse_point((x1, y1)), *self.inverse_point((x2, y2)))

    def forward_point(self, point: Point) -> Point:
        """As `forward`."""
        if not all(math.isfinite(value) for value in point):
            raise ValueError(f"{tuple(point)} is not finite: give numbers in pixels")
        left, top, _, _ = self.window
        width, height = self.size
        return _clamped((point[0] - left) / width, 1.0), _clamped((point[1] - top) / height, 1.0)

    def inverse_point(self, point: Point) -> Point:
        """As `inverse`."""
        left, top, _, _ = self.window
        width, height = self.size
        x, y = point[0] * width + left, point[1] * height + top
        return _clamped(x, float(self.width)), _clamped(y, float(self.height))


class PadSquare(View):
    """An image of width x height pixels in the middle of a square as wide as its longer side.

    The shorter side is padded by (long - short) // 2 in front and by the rest behind, as Shikra's `Expand2square` does;
    an odd difference therefore sits half a pixel off the middle.
    """

    def __init__(self, width: int, height: int) -> None:
        side = max(width, height)
        left, top = -((side - width) // 2), -((side - height) // 2)
        super().__init__(width, height, (left, top, left + side, top + side))

    @property
    def side(self) -> int:
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """Pixels of padding left of and above the image."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2


GEOMETRIES: dict[str, Callable[[int, int], View]] = {
    "pad-square": PadSquare,
    "stretch": View.whole,
    "center-crop": lambda width, height: View.whole(width, height).center_crop(),
}
"""What becomes of a whole image, by the names that the model's config uses."""


def _clamped(value: float, high: float) -> float:
    return min(max(value, 0.0), high)
