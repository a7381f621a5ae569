"""Boxes and points between pixels of the original image and text, there and back, and their overlap.

A codec says which numbers stand in the text. shikra3: [0, 1] of the view with three decimals, Shikra's and COMM's. 0-999,
0-1000: the same as whole numbers (Qwen-VL's and InternVL's). pixels: whole pixels of the original image, whatever the view.
A group is `[x1,y1,x2,y2;...]`, of points `[x,y;...]`. In 0-999 and 0-1000 a box may also stand as `(x1,y1),(x2,y2)`, which is
how Qwen-VL and Qwen2-VL answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from .example import Box, Point
from .geometry import PadSquare, View

DECIMALS = 3
"""One quantum of Shikra's text is 10**-3 of the view's side."""


@dataclass(frozen=True)
class Codec:
    """name; top: the number that the far edge of the view becomes, None for pixels of the image; decimals: of a number."""

    name: str
    top: int | None
    decimals: int

    def quantum(self, view: View) -> tuple[float, float]:
        """Pixels of the image between two neighbouring numbers, in x and in y: rounding moves by at most half of it."""
        step = 10.0**-self.decimals
        width, height = (1.0, 1.0) if self.top is None else (side / self.top for side in view.size)
        return step * width, step * height

    def written(self, values: tuple[float, ...], view: View) -> str:
        """x, y, x, y, ... in pixels -> the text's numbers. Raises ValueError for values that are not finite."""
        numbers: list[float] = []
        for point in zip(values[::2], values[1::2], strict=True):
            shown = view.forward_point(point)
            if self.top is None:
                shown = min(max(point[0], 0.0), view.width), min(max(point[1], 0.0), view.height)
            numbers += [value * (self.top or 1) for value in shown]
        return ",".join(f"{round(number, self.decimals):.{self.decimals}f}" for number in numbers)

    def read(self, text: str) -> tuple[float, ...] | None:
        """The numbers between commas, in [0, 1] of the view (or pixels); None where one is too large."""
        numbers = tuple(float(number) for number in text.split(","))
        if self.top is None:
            return numbers
        return None if max(numbers) > self.top else tuple(number / self.top for number in numbers)

    def in_pixels(self, values: tuple[float, ...], view: View) -> tuple[float, ...]:
        """What `read` gives, in pixels of the image and clipped to it."""
        points = zip(values[::2], values[1::2], strict=True)
        if self.top is None:
            return tuple(v for x, y in points for v in (min(x, float(view.width)), min(y, float(view.height))))
        return tuple(value for point in points for value in view.inverse_point(point))

    def groups(self, text: str, length: int) -> list[tuple[tuple[float, ...], ...]]:
        """Every bracket that holds groups of `length` numbers, and every box that Qwen-VL writes, `read`."""
        found = []
        for match in _pattern(self.top, length).finditer(text):
            values = [self.read(one) for one in _FRAME.sub("", match.group()).split(";")]
            if all(value is not None for value in values):
                found.append(tuple(values))
        return found


SHIKRA3 = Codec("shikra3", 1, DECIMALS)
CODECS = {
    codec.name: codec for codec in (SHIKRA3, Codec("0-999", 999, 0), Codec("0-1000", 1000, 0), Codec("pixels", None, 0))
}


_FRAME = re.compile(r"[\[\]()]")


@cache
def _pattern(top: int | None, length: int) -> re.Pattern[str]:
    """Groups of `length` numbers of a codec with that top."""
    number = r"(?:0(?:\.[0-9]*)?|1(?:\.0*)?)" if top == 1 else r"[0-9]{1,6}(?:\.[0-9]*)?"
    one = rf"{number}(?:\s*,\s*{number}){{{length - 1}}}"
    group, corner = rf"\[\s*{one}(?:\s*;\s*{one})*\s*\]", rf"\(\s*{number}\s*,\s*{number}\s*\)"
    corners = rf"|{corner}\s*,\s*{corner}" if top in (999, 1000) and length == 4 else ""
    return re.compile(group + corners)


def codec_of(name: str) -> Codec:
    """A codec by its name; ValueError names all."""
    if name not in CODECS:
        raise ValueError(f"there is no box text {name!r}; codecs: {', '.join(CODECS)}")
    return CODECS[name]


def format_boxes(boxes: Iterable[Box], geometry: View, codec: Codec = SHIKRA3) -> str:
    """One group of boxes in pixels -> `[x1,y1,x2,y2;...]`, no spaces.

    Raises ValueError for an empty group, which has no text, and for a box that is not finite.
    """
    return _formatted(boxes, geometry, codec, "boxes")


def format_points(points: Iterable[Point], geometry: View, codec: Codec = SHIKRA3) -> str:
    """One group of points in pixels -> `[x,y;...]`, as `format_boxes`."""
    return _formatted(points, geometry, codec, "points")


def _formatted(group: Iterable[tuple[float, ...]], view: View, codec: Codec, what: str) -> str:
    texts = [codec.written(tuple(values), view) for values in group]
    if not texts:
        raise ValueError(f"a group of {what} is empty: a <{what}> slot takes at least one")
    return f"[{';'.join(texts)}]"


def parse_boxes(text: str, codec: Codec = SHIKRA3) -> list[tuple[Box, ...]]:
    """Every `[x1,y1,x2,y2;...]` of a text as a group of boxes in [0, 1] of the view, in order; none gives an empty list.

    All that `format_boxes` writes is read back, and spaces around the numbers are forgiven; of 0-999 and 0-1000 also
    `(x1,y1),(x2,y2)`. Brackets with another number of values, or with a value that the codec cannot write, are no boxes.
    Nothing is repaired: swapped corners stay so. With codec "pixels" they are pixels of the image.
    """
    return codec.groups(text, 4)  # type: ignore[return-value]


def parse_points(text: str, codec: Codec = SHIKRA3) -> list[tuple[Point, ...]]:
    """Every `[x,y;...]` of a text, as `parse_boxes`."""
    return codec.groups(text, 2)  # type: ignore[return-value]


def boxes_in_pixels(text: str, geometry: View, codec: Codec = SHIKRA3) -> list[tuple[Box, ...]]:
    """`parse_boxes`, with every box in pixels of the original image and clipped to it."""
    return [tuple(codec.in_pixels(box, geometry) for box in group) for group in codec.groups(text, 4)]  # type: ignore[misc]


def points_in_pixels(text: str, geometry: View, codec: Codec = SHIKRA3) -> list[tuple[Point, ...]]:
    """`parse_points`, in pixels of the original image and clipped to it."""
    return [tuple(codec.in_pixels(p, geometry) for p in group) for group in codec.groups(text, 2)]  # type: ignore[misc]


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


__all__ = [
    "CODECS", "DECIMALS", "SHIKRA3", "Codec", "PadSquare", "View", "box_iou", "boxes_in_pixels", "codec_of", "format_boxes",
    "format_points", "parse_boxes", "parse_points", "points_in_pixels",
]  # fmt: skip
