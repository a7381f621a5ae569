"""The one piece of box arithmetic that the micro world's own scores need."""

from __future__ import annotations

from collections.abc import Sequence


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; 0 where either has no area."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    areas = [max(c[2] - c[0], 0) * max(c[3] - c[1], 0) for c in (a, b)]
    if w <= 0 or h <= 0 or min(areas) == 0:
        return 0.0
    return w * h / (sum(areas) - w * h)
