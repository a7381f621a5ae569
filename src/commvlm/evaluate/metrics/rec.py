"""REC acc@0.5: the share of expressions whose box overlaps the true one. No official tool exists; the rules are named.

standard    float corners, IoU >= 0.5 in original pixels (MDETR, Qwen-VL, InternVL, lmms-eval and VLMEvalKit agree). Boxes in
            text are clipped to the image, those in pixels are taken as they are.
shikra      IoU > 0.5, taken on the padded square with three decimals; its text is read by Shikra's own pattern, which has no
            blanks and any numbers of one leading digit (shikra's RECComputeMetrics).
mattnet     the same, but none where the overlap is a pixel wide or high at most (computeIoU of MAttNet, UNITER, ALBEF).
lmms-eval   the first four bracketed numbers as shares of the image's width and height, without padding; IoU >= 0.5.
vlmevalkit  InternVL's reading, which VLMEvalKit took over: the same, but divided by 1000 when their sum is 4 or more.

The last two say what a padded-square answer is worth to a harness that stretches: nothing is lost on square images only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from commvlm.data.boxes import box_iou
from commvlm.data.example import Box

THRESHOLD = 0.5
REC_RULES = ("standard", "shikra", "mattnet", "lmms-eval", "vlmevalkit")
STRETCHED = ("lmms-eval", "vlmevalkit")
"""Rules that read numbers as shares of width and height."""

_QUADRUPLE = r"\d(?:\.\d*)?(?:,\d(?:\.\d*)?){3}"
_SHIKRA = re.compile(rf"\[{_QUADRUPLE}(?:;{_QUADRUPLE})*\]")
PLACES = 24
"""Decimals at most of a number that is read."""
_NUMBER = rf"\s*(-?\d{{1,9}}(?:\.\d{{0,{PLACES}}})?)\s*"
_FOUR = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def rec_iou(said: Sequence[Box], true: Sequence[Box], *, rule: str = "standard") -> np.ndarray:
    """Pairs of boxes, corners in one unit -> (n,) overlaps as the rule measures them."""
    overlap = box_iou(said, true)
    if rule != "mattnet":
        return overlap
    one, other = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (said, true))
    spans = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    return np.where((spans > 1).all(axis=1), overlap, 0.0)


def rec_correct(iou: ArrayLike, *, rule: str = "standard") -> np.ndarray:
    """(n,) overlaps -> (n,) booleans. An answer without a box has overlap 0 and stays in the denominator."""
    overlap = np.asarray(iou, dtype=np.float64)
    if rule not in REC_RULES:
        raise ValueError(f"REC has no rule {rule!r}: choose one of {', '.join(REC_RULES)}")
    return overlap > THRESHOLD if rule == "shikra" else overlap >= THRESHOLD


def shikra_box(text: str) -> Box | None:
    """The box of an answer in Shikra's text as Shikra reads it, in its numbers: of exactly one match that holds one."""
    found = _SHIKRA.findall(text)
    if len(found) != 1 or ";" in found[0]:
        return None
    x1, y1, x2, y2 = (float(number) for number in found[0][1:-1].split(","))
    return x1, y1, x2, y2


def stretched_box(text: str, width: int, height: int, *, rule: str) -> Box | None:
    """The first four bracketed numbers of an answer as a harness that stretches images reads them, in pixels."""
    found = _FOUR.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    scale = 1000.0 if rule == "vlmevalkit" and x1 + y1 + x2 + y2 >= 4 else 1.0
    return x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height


def only_box(text: str) -> Box | None:
    """The bracketed four numbers of an answer as they are, when there is exactly one such box."""
    found = _FOUR.findall(text)
    if len(found) != 1:
        return None
    x1, y1, x2, y2 = (float(number) for number in found[0])
    return x1, y1, x2, y2
