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


def rec_correct(iou: ArrayLike, *, rule: str = "standard") -> np.ndarray:
    """(n,) overlaps -> (n,) booleans. An answer without a box has overlap 0 and stays in the denominator."""
    overlap = np.asarray(iou, dtype=np.float64)
    if rule == "standard":
        return overlap >= THRESHOLD
    if rule == "shikra":
        return overlap > THRESHOLD
    raise ValueError(f"REC has no rule {rule!r}: choose one of {', '.join(REC_RULES)}")
