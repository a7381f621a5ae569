"""The categories of the micro world, as drawings in the unit square that touch all four of its sides.

A drawing is a list of (shade, kind, points): shade 1 is the object's colour, lower is darker; kind is "polygon" (list of
x, y) or "ellipse" (x1, y1, x2, y2). Because every drawing fills its square, the square's box is the object's exact box.
"""

from __future__ import annotations

import math

Part = tuple[float, str, tuple[tuple[float, float], ...]]


def _star() -> tuple[tuple[float, float], ...]:
    raw = []
    for k in range(10):
        radius = 1.0 if k % 2 == 0 else 0.42
        angle = -math.pi / 2 + k * math.pi / 5
        raw.append((radius * math.cos(angle), radius * math.sin(angle)))
    xs, ys = [p[0] for p in raw], [p[1] for p in raw]
    return tuple(((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in raw)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 24):
    return tuple(
        (cx + rx * math.cos(start + (end - start) * k / steps), cy + ry * math.sin(start + (end - start) * k / steps))
        for k in range(steps + 1)
    )


def _heart() -> tuple[tuple[float, float], ...]:
    raw = []
    for k in range(48):
        t = 2 * math.pi * k / 48
        x = 16 * math.sin(t) ** 3
        y = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        raw.append((x, y))
    xs, ys = [p[0] for p in raw], [p[1] for p in raw]
    return tuple(((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in raw)


def _moon() -> tuple[tuple[float, float], ...]:
    outer = _arc(1.0, 0.5, 1.0, 0.5, math.pi / 2, 3 * math.pi / 2)
    inner = _arc(1.0, 0.5, 0.5, 0.5, 3 * math.pi / 2, math.pi / 2)
    return outer + inner


def _rect(x1: float, y1: float, x2: float, y2: float) -> tuple[tuple[float, float], ...]:
    return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))


DARK = 0.45

SHAPES: dict[str, tuple[Part, ...]] = {
    "star": ((1.0, "polygon", _star()),),
    "ball": ((1.0, "ellipse", ((0, 0), (1, 1))), (DARK, "polygon", _rect(0.06, 0.4, 0.94, 0.6))),
    "house": (
        (1.0, "polygon", _rect(0.1, 0.42, 0.9, 1)),
        (0.7, "polygon", ((0, 0.45), (0.5, 0), (1, 0.45))),
        (DARK, "polygon", _rect(0.4, 0.62, 0.62, 1)),
    ),
    "tree": (
        (DARK, "polygon", _rect(0.4, 0.6, 0.6, 1)),
        (1.0, "polygon", ((0, 0.72), (0.5, 0), (1, 0.72))),
    ),
    "fish": (
        (1.0, "ellipse", ((0, 0), (0.74, 1))),
        (0.8, "polygon", ((0.6, 0.5), (1, 0.05), (1, 0.95))),
        (0.15, "ellipse", ((0.14, 0.26), (0.3, 0.46))),
    ),
    "cup": (
        (0.7, "ellipse", ((0.5, 0.2), (1, 0.75))),
        (0.15, "ellipse", ((0.62, 0.34), (0.87, 0.6))),
        (1.0, "polygon", ((0, 0), (0.74, 0), (0.64, 1), (0.1, 1))),
    ),
    "key": (
        (1.0, "ellipse", ((0, 0), (0.5, 1))),
        (0.15, "ellipse", ((0.14, 0.28), (0.36, 0.72))),
        (1.0, "polygon", _rect(0.45, 0.4, 1, 0.6)),
        (1.0, "polygon", _rect(0.68, 0.5, 0.78, 0.9)),
        (1.0, "polygon", _rect(0.9, 0.5, 1, 0.9)),
    ),
    "heart": ((1.0, "polygon", _heart()),),
    "moon": ((1.0, "polygon", _moon()),),
    "arrow": (
        (1.0, "polygon", _rect(0, 0.34, 0.6, 0.66)),
        (1.0, "polygon", ((0.5, 0), (1, 0.5), (0.5, 1))),
    ),
    "cross": ((1.0, "polygon", _rect(0.34, 0, 0.66, 1)), (1.0, "polygon", _rect(0, 0.34, 1, 0.66))),
    "ring": ((1.0, "ellipse", ((0, 0), (1, 1))), (0.15, "ellipse", ((0.28, 0.28), (0.72, 0.72)))),
    "flag": ((DARK, "polygon", _rect(0, 0, 0.16, 1)), (1.0, "polygon", ((0.16, 0), (1, 0.3), (0.16, 0.6)))),
    "mushroom": (
        (0.6, "polygon", _rect(0.36, 0.45, 0.64, 1)),
        (1.0, "polygon", _arc(0.5, 0.55, 0.5, 0.55, math.pi, 2 * math.pi)),
        (0.3, "ellipse", ((0.3, 0.15), (0.46, 0.33))),
    ),
    "bell": (
        (1.0, "polygon", ((0.5, 0), (0.74, 0.22), (0.82, 0.66), (1, 0.84), (0, 0.84), (0.18, 0.66), (0.26, 0.22))),
        (DARK, "ellipse", ((0.38, 0.76), (0.62, 1))),
    ),
    "hourglass": ((1.0, "polygon", ((0, 0), (1, 0), (0, 1), (1, 1))), (DARK, "polygon", _rect(0, 0.88, 1, 1))),
}

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 42, 42),
    "green": (48, 176, 62),
    "blue": (52, 92, 232),
    "yellow": (240, 216, 48),
    "purple": (150, 58, 190),
    "orange": (244, 140, 30),
    "cyan": (64, 206, 220),
    "white": (244, 244, 244),
}
