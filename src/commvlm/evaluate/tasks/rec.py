"""REC, referring expression comprehension: an expression is asked, one box is answered; acc@0.5.

An answer must hold exactly one box; none or several cannot be read, and count as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from commvlm.data.boxes import PadSquare, box_iou, boxes_in_pixels, format_boxes, parse_boxes
from commvlm.data.example import Box

from ..metrics import REC_RULES, bootstrap, rec_correct
from .task import Parsed, Record, Score, Size, Task, interval_in_percent, percent

NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)


def parse(text: str, size: Size | None) -> Parsed:
    """The one box of the answer, in pixels of the original image; None without an image to place it in."""
    if size is None:
        return None
    return _only(boxes_in_pixels(text, PadSquare(*size)))


def _only(groups: Sequence[tuple[Box, ...]]) -> Box | None:
    """The box, when there is exactly one in all groups together."""
    boxes = [box for group in groups for box in group]
    return boxes[0] if len(boxes) == 1 else None


def score(records: Sequence[Record], *, rule: str) -> Score:
    pairs = [_pair(record, rule=rule) for record in records]
    iou = box_iou([said or NOWHERE for said, _ in pairs], [true for _, true in pairs])
    correct = rec_correct(iou, rule=rule).astype(np.float64)
    error, interval = interval_in_percent(bootstrap(correct, [record.cluster for record in records]))
    return Score(
        task="rec",
        metric="acc@0.5",
        rule=rule,
        value=percent(float(correct.mean())),
        standard_error=error,
        interval=interval,
        n=len(records),
        unparsable=sum(said is None for said, _ in pairs),
        extra={"mean_iou": percent(float(iou.mean()))},
    )


def _pair(record: Record, *, rule: str) -> tuple[Box | None, Box]:
    """The answered box and the true one: in pixels, or for Shikra's rule both as their texts say, in the square."""
    if len(record.boxes) != 1:
        raise ValueError(f"{record.name}: REC needs one true box, this record has {len(record.boxes)}")
    if record.width is None or record.height is None:
        raise ValueError(f"{record.name}: REC needs the image's width and height, this record has none")
    geometry = PadSquare(record.width, record.height)
    if rule == "shikra":
        return _only(parse_boxes(record.text)), parse_boxes(format_boxes(record.boxes, geometry))[0][0]
    return _only(boxes_in_pixels(record.text, geometry)), record.boxes[0]


REC = Task(name="rec", parse=parse, rules={rule: partial(score, rule=rule) for rule in REC_RULES})
