"""REC, referring expression comprehension: an expression is asked, one box is answered; acc@0.5.

An answer must hold exactly one box; none or several cannot be read, and count as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from commvlm.data.boxes import SHIKRA3, Codec, boxes_in_pixels, codec_of, format_boxes, parse_boxes
from commvlm.data.example import Box
from commvlm.data.geometry import GEOMETRIES, PadSquare, View

from ..metrics import REC_RULES, STRETCHED, bootstrap, only_box, rec_correct, rec_iou, stretched_box
from ..metrics.rec import shikra_box
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, Task, interval_in_percent, percent

NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)
MEAN_IOU = "mean_iou"
"""A reading: how far boxes overlap on average, which tells models apart that all pass 0.5."""
BOX_CODEC, GEOMETRY = "box_codec", "geometry"
"""Facts that say how a record's boxes are written and what of its image is shown; without them as in Shikra.

The codec "pixels" is taken by its word: nothing is clipped to the image.
"""


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The one box of the answer, in pixels of the original image; None without an image to place it in."""
    if size is None:
        return None
    codec = codec_named(facts)
    return only_box(text) if codec.top is None else _only(boxes_in_pixels(text, view_of(size, facts), codec))


def codec_named(facts: Facts) -> Codec:
    return codec_of(str(facts[BOX_CODEC])) if BOX_CODEC in facts else SHIKRA3


def view_of(size: Size, facts: Facts) -> View:
    if GEOMETRY not in facts:
        return PadSquare(*size)
    name = str(facts[GEOMETRY])
    if name not in GEOMETRIES:
        raise ValueError(f"there is no geometry {name!r}; geometries: {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name](*size)


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
        extra={MEAN_IOU: percent(float(iou.mean()))},
        marks=_by_id(records, correct),
        readings={MEAN_IOU: _by_id(records, iou)},
    )


def _by_id(records: Sequence[Record], marks: np.ndarray) -> dict[str, float]:
    return {record.id: float(mark) for record, mark in zip(records, marks, strict=True)}


def _pair(record: Record, *, rule: str) -> tuple[Box | None, Box]:
    """The answered box and the true one: in pixels, or for Shikra's rule both as their texts say, in the square."""
    if len(record.boxes) != 1:
        raise ValueError(f"{record.name}: REC needs one true box, this record has {len(record.boxes)}")
    if record.width is None or record.height is None:
        raise ValueError(f"{record.name}: REC needs the image's width and height, this record has none")
    size, true = (record.width, record.height), record.boxes[0]
    view = view_of(size, record.facts)
    ours = codec_named(record.facts) is SHIKRA3 and view.window == PadSquare(*size).window
    said = _box_or_none(parse(record.text, size, record.facts))
    if rule == "shikra":
        square = PadSquare(*size)
        rounded = said and parse_boxes(format_boxes([said], square))[0][0]
        return shikra_box(record.text) if ours else rounded, parse_boxes(format_boxes([true], square))[0][0]
    if rule in STRETCHED and ours:
        return stretched_box(record.text, *size, rule=rule), true
    return said, true


def _box_or_none(parsed: Parsed) -> Box | None:
    assert not isinstance(parsed, str)
    return parsed


REC = Task(name="rec", parse=parse, rules={rule: partial(score, rule=rule) for rule in REC_RULES})
