"""Visual7W's pointing questions: "which ..." among four boxes, answered with a box or a point; accuracy of the choice.

The official figure is the share of right choices among the four candidates
(https://github.com/yukezhu/visual7w-toolkit). A model that answers with a box or a point has chosen the candidate that it
overlaps most, or the one whose middle is nearest among those that hold the point.

Rules: `choice`, as just said; `box`, the answer itself must overlap the true box by at least 0.5, or lie in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from commvlm.data.boxes import box_iou, points_in_pixels
from commvlm.data.example import Box, Point

from ..metrics import bootstrap
from . import rec
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, Task, interval_in_percent, percent

INDEX = "answer_index"


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The one box of the answer, or the one point as a box without area, in pixels; None for neither."""
    box = rec.parse(text, size, facts)
    if box is not None or size is None:
        return box
    points = [p for group in points_in_pixels(text, rec.view_of(size, facts), rec.codec_named(facts)) for p in group]
    return (*points[0], *points[0]) if len(points) == 1 else None


def score(records: Sequence[Record], *, rule: str) -> Score:
    said = [_place(record) for record in records]
    right = [float(_right(record, place, rule)) for record, place in zip(records, said, strict=True)]
    error, interval = interval_in_percent(bootstrap(right, [record.cluster for record in records]))
    return Score(
        task="v7w",
        metric="accuracy",
        rule=rule,
        value=percent(sum(right) / len(right)),
        standard_error=error,
        interval=interval,
        n=len(records),
        unparsable=sum(place is None for place in said),
        marks={record.id: mark for record, mark in zip(records, right, strict=True)},
    )


def _place(record: Record) -> Box | None:
    if record.width is None or record.height is None:
        raise ValueError(f"{record.name}: Visual7W needs the image's width and height, this record has none")
    parsed = parse(record.text, (record.width, record.height), record.facts)
    assert not isinstance(parsed, str)
    return parsed


def _right(record: Record, place: Box | None, rule: str) -> bool:
    if INDEX not in record.facts or not 0 <= int(record.facts[INDEX]) < len(record.asked_boxes):
        raise ValueError(f"{record.name}: Visual7W needs the candidates' boxes and {INDEX}, one of them")
    true = int(record.facts[INDEX])
    if place is None:
        return False
    if rule == "box":
        box = record.asked_boxes[true]
        return _holds(box, place[:2]) if _is_point(place) else float(box_iou([place], [box])[0]) >= 0.5
    return _chosen(record.asked_boxes, place) == true


def _chosen(candidates: Sequence[Box], place: Box) -> int | None:
    """The candidate's number; None where none is touched. The first one among equals."""
    if _is_point(place):
        holding = [k for k, box in enumerate(candidates) if _holds(box, place[:2])]
        return min(holding, key=lambda k: _distance(candidates[k], place[:2])) if holding else None
    overlap = box_iou([place] * len(candidates), list(candidates))
    return int(overlap.argmax()) if overlap.max() > 0 else None


def _is_point(place: Box) -> bool:
    return place[:2] == place[2:]


def _holds(box: Box, point: Point) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _distance(box: Box, point: Point) -> float:
    return float(np.hypot((box[0] + box[2]) / 2 - point[0], (box[1] + box[3]) / 2 - point[1]))


V7W = Task(name="v7w", parse=parse, rules={rule: partial(score, rule=rule) for rule in ("choice", "box")})
