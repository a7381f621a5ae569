"""Which convention does a file of boxes use? Told from the numbers and the images' sizes, with the evidence, or refused.

A convention says which four numbers a box is (corners, or a corner and a size, or a middle and a size) and in which unit.
Under the right one, every box lies in its image; under a wrong one many do not. Of several that fit, the one whose images
leave the least room beside the boxes explains them best (the size principle: boxes that could lie anywhere in a region
have the density 1 / region). Both are one number, the log-likelihood of the boxes:

    log p(box) = log((1 - e) * valid(box) / room + e / anywhere),    room = (X^2 / 2) * (Y^2 / 2)

X, Y being the image's extent in the numbers' unit, and e the share of slips that an annotation may have. It is refused
when the best is not ahead of the next by MARGIN, or leaves too many boxes outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .example import Box

SLIPS = 0.01
MARGIN = math.log(1000)
"""Nats by which the best must be ahead: a thousand to one."""
OUTSIDE = 0.03
"""The largest share of boxes that may not fit the convention that is told."""
Layout = Literal["xyxy", "xywh", "cxcywh"]
Unit = Literal["pixels", "0-1", "0-999", "0-1000"]


@dataclass(frozen=True)
class Convention:
    """layout: of the four numbers. unit: of the numbers. square: in the padded square's frame, not in the image's own."""

    layout: Layout
    unit: Unit
    square: bool = False

    @property
    def name(self) -> str:
        return f"{self.layout}-{self.unit}{'-square' if self.square else ''}"

    def pixels(self, numbers: Sequence[float], width: int, height: int) -> Box:
        """Four numbers of this convention -> corners in pixels of the image of that size. Nothing is clipped."""
        x1, y1, x2, y2 = self.corners(np.array([numbers], dtype=np.float64), np.array([[width, height]]))[0].tolist()
        return x1, y1, x2, y2

    def corners(self, numbers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(n, 4) numbers and (n, 2) widths and heights -> (n, 4) corners in pixels of the images."""
        low, high = numbers[:, :2], numbers[:, 2:]
        if self.layout == "xywh":
            high = low + high
        elif self.layout == "cxcywh":
            low, high = low - high / 2, low + high / 2
        scale = 1 / self.extent(sizes) * sizes
        offset = -self._offset(sizes)
        return np.concatenate([low * scale + offset, high * scale + offset], axis=1)

    def extent(self, sizes: np.ndarray) -> np.ndarray:
        """(n, 2): the image's width and height in the numbers' unit."""
        if self.unit == "pixels":
            return sizes.astype(np.float64)
        frame = sizes.max(axis=1, keepdims=True) if self.square else sizes
        return {"0-1": 1.0, "0-999": 999.0, "0-1000": 1000.0}[self.unit] * sizes / frame

    def _offset(self, sizes: np.ndarray) -> np.ndarray:
        """(n, 2): pixels of padding left of and above the image."""
        return (sizes.max(axis=1, keepdims=True) - sizes) // 2 if self.square else np.zeros_like(sizes)


_LAYOUTS: tuple[Layout, ...] = ("xyxy", "xywh", "cxcywh")
_UNITS: tuple[tuple[Unit, bool], ...] = (
    ("pixels", False), ("0-1", False), ("0-1", True), ("0-999", False), ("0-999", True), ("0-1000", False),
    ("0-1000", True),
)  # fmt: skip
CONVENTIONS = {
    convention.name: convention
    for unit, square in _UNITS
    for layout in _LAYOUTS
    for convention in [Convention(layout, unit, square)]
}


@dataclass(frozen=True)
class Evidence:
    """For one convention. behind: nats behind the best one, over all boxes. outside: share of boxes that do not fit.
    example: the number of one that does not, None when all do."""

    name: str
    behind: float
    outside: float
    example: int | None


@dataclass(frozen=True)
class Verdict:
    convention: Convention
    evidence: tuple[Evidence, ...]


class Unsure(ValueError):
    """No convention is far enough ahead. evidence: of all of them, the best first."""

    def __init__(self, text: str, evidence: tuple[Evidence, ...]) -> None:
        super().__init__(text)
        self.evidence = evidence


def convention_of(name: str) -> Convention:
    """A convention by its name; ValueError names all."""
    if name not in CONVENTIONS:
        raise ValueError(f"there is no box convention {name!r}; conventions: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def detect(boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]) -> Verdict:
    """boxes: four numbers each, as they stand in the file. sizes: width and height of each one's image, in pixels.

    Raises Unsure, whose text names the conventions that are left and what would tell them apart.
    """
    numbers, frames = np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(sizes).reshape(-1, 2)
    if len(numbers) != len(frames):
        raise ValueError(f"{len(numbers)} boxes and {len(frames)} sizes: give one size for each box")
    if not len(numbers) or not np.isfinite(numbers).all():
        raise Unsure("there are no boxes to tell a convention by, or some are not finite", ())
    evidence = _weighed(numbers, frames)
    best, second = evidence[0], evidence[1]
    if best.outside > OUTSIDE:
        raise Unsure(
            f"no convention fits: under the best, {best.name}, {best.outside:.0%} of {len(numbers)} boxes leave "
            f"their image, box {best.example} first",
            evidence,
        )
    # Where rounding blurs the edge, only a number 1000 tells 0-1000 from 0-999; without one they are the same evidence.
    blurred = _twins(best.name, second.name) and _rounds_over(CONVENTIONS[best.name]) and numbers.max() < 1000
    if second.behind < MARGIN or blurred:
        left = [item.name for item in evidence if item.behind < MARGIN or (blurred and item is second)]
        raise Unsure(
            f"{len(numbers)} boxes fit {' and '.join(left)}: they cannot be told apart by {MARGIN:.0f} nats "
            f"({second.behind:.1f}); give more boxes, or name the convention",
            evidence,
        )
    return Verdict(CONVENTIONS[best.name], evidence)


def _weighed(numbers: np.ndarray, sizes: np.ndarray) -> tuple[Evidence, ...]:
    """Every convention, the most likely first."""
    whole = bool((numbers == np.round(numbers)).all())
    anywhere = 4 * np.log(4 * max(1000.0, float(sizes.max()), float(np.abs(numbers).max())))
    found = []
    for name, convention in CONVENTIONS.items():
        valid = _valid(convention, numbers, sizes)
        if convention.unit in ("0-999", "0-1000") and not whole:
            valid = np.zeros_like(valid)
        room = 2 * np.log(convention.extent(sizes)).sum(axis=1) - 2 * math.log(2)
        inside = np.where(valid, math.log(1 - SLIPS) - room, -np.inf)
        total = float(np.logaddexp(inside, math.log(SLIPS) - anywhere).sum())
        wrong = np.flatnonzero(~valid)
        found.append((total, name, len(wrong) / len(valid), int(wrong[0]) if len(wrong) else None))
    found.sort(key=lambda row: -row[0])
    return tuple(Evidence(name, found[0][0] - total, outside, first) for total, name, outside, first in found)


def _valid(convention: Convention, numbers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,): whether each box is one, in its image, up to the rounding of its unit (a pixel for pixels)."""
    if convention.unit == "0-999" and numbers.max() > 999:
        return np.zeros(len(numbers), dtype=bool)
    corners = convention.corners(numbers, sizes)
    steps = {"pixels": 1.0, "0-1": 0.002, "0-999": 0.0, "0-1000": 0.0}[convention.unit]
    if _rounds_over(convention):
        steps = max(steps, 1.0)
    slack = steps * sizes / convention.extent(sizes) + 1e-6 * sizes
    inside = (corners[:, :2] >= -slack).all(axis=1) & (corners[:, 2:] <= sizes + slack).all(axis=1)
    return np.asarray(inside & (corners[:, 2:] > corners[:, :2]).all(axis=1))


def _rounds_over(convention: Convention) -> bool:
    """Whether rounding to whole numbers may push a box over the image's edge: where an edge is a sum of two of them, or no
    whole number of the square's frame."""
    return convention.unit in ("0-999", "0-1000") and (convention.layout != "xyxy" or convention.square)


def _twins(one: str, other: str) -> bool:
    return one.replace("0-1000", "0-999") == other.replace("0-1000", "0-999")


__all__ = ["CONVENTIONS", "Convention", "Evidence", "Unsure", "Verdict", "convention_of", "detect"]
