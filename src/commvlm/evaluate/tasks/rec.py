"""REC, referring expression comprehension: an expression is asked, one box is answered; acc@0.5.

An answer must hold exactly one box; none or several cannot be read, and count as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from commvlm.data.boxes import PadSquare, boxes_in_pixels, format_boxes, parse_boxes
from commvlm.data.example import Box

from ..metrics import REC_RULES, STRETCHED, bootstrap, only_box, rec_correct, rec_iou, stretched_box
from .task import Parsed, Record, Score, Size, Task, interval_in_percent, percent

NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)
BOXES_AS, PIXELS = "boxes_as", "pixels"
"""facts[BOXES_AS] == PIXELS: the answer's numbers are pixels of the original image; otherwise its box is Shikra's text."""


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
    iou = rec_iou([said or NOWHERE for said, _ in pairs], [true for _, true in pairs], rule=rule)
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
        marks={record.id: float(mark) for record, mark in zip(records, correct, strict=True)},
    )


def _pair(record: Record, *, rule: str) -> tuple[Box | None, Box]:
    """The answered box and the true one: in pixels, or for Shikra's rule both as their texts say, in the square."""
    if len(record.boxes) != 1:
        raise ValueError(f"{record.name}: REC needs one true box, this record has {len(record.boxes)}")
    if record.width is None or record.height is None:
        raise ValueError(f"{record.name}: REC needs the image's width and height, this record has none")
    geometry, true = PadSquare(record.width, record.height), record.boxes[0]
    pixels = record.facts[BOXES_AS] == PIXELS if BOXES_AS in record.facts else False
    said = only_box(record.text) if pixels else _only(boxes_in_pixels(record.text, geometry))
    if rule == "shikra":
        square = _only(parse_boxes(record.text)) if not pixels else said and _in_square(said, geometry)
        return square, _in_square(true, geometry)
    if rule in STRETCHED and not pixels:
        return stretched_box(record.text, record.width, record.height, rule=rule), true
    return said, true


def _in_square(box: Box, geometry: PadSquare) -> Box:
    """Pixels -> the square's shares with Shikra's three decimals."""
    return parse_boxes(format_boxes([box], geometry))[0][0]


REC = Task(name="rec", parse=parse, rules={rule: partial(score, rule=rule) for rule in REC_RULES})
