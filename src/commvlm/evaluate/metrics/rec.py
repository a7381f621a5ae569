"""REC acc@0.5: the share of expressions whose box overlaps the true one. No official tool exists; two named rules.

`standard`: float corners, IoU >= 0.5 in original pixels (MDETR, Qwen-VL, InternVL, lmms-eval and VLMEvalKit agree).
`shikra`: IoU > 0.5, taken on the padded square with three decimals (shikra's RECComputeMetrics).
Inclusive pixels (x2 - x1 + 1) as in MAttNet are not used by either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

THRESHOLD = 0.5
REC_RULES = ("standard", "shikra")


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


def rec_correct(iou: ArrayLike, *, rule: str = "standard") -> np.ndarray:
    """(n,) overlaps -> (n,) booleans. An answer without a box has overlap 0 and stays in the denominator."""
    overlap = np.asarray(iou, dtype=np.float64)
    if rule == "standard":
        return overlap >= THRESHOLD
    if rule == "shikra":
        return overlap > THRESHOLD
    raise ValueError(f"REC has no rule {rule!r}: choose one of {', '.join(REC_RULES)}")
