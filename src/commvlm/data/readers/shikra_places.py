"""Shikra's JSON lines whose questions hold places: PointQA and Visual7W.

pointQA_local_*     {file_path, question, answer, bbox: [x1, y1, x2, y2], point: [x, y]}
pointQA_twice_*     {file_path, obj_question, super_question, general_question, answer, bbox, point}
v7w_pointing_*      {file_path, question, candidates: [4 boxes], answer: one of them, point}
"""

from __future__ import annotations

from pathlib import Path

from ..example import Example
from . import pointqa
from .entry import Entry, Read, made
from .files import image_folder, read_lines
from .pointqa import Asked, pointed, settled
from .visual7w import By, check_by, in_keyed_order, pointing


def read_shikra_pointqa_local(*, images: Path, annotations: Path, by: pointqa.By = "box") -> Read:
    """by: whether the question ends in the object's box or in its point, or in either, as the line decides."""
    return _pointqa(images, annotations, "question", by)


def read_shikra_pointqa_twice(
    *, images: Path, annotations: Path, asked: Asked = "general", by: pointqa.By = "box"
) -> Read:
    """asked: "obj" names the object's kind, "super" a wider one, "general" none."""
    if asked not in ("obj", "super", "general"):
        raise ValueError(f"shikra-pointqa-twice: asked is {asked!r}, it must be obj, super or general")
    return _pointqa(images, annotations, f"{asked}_question", by)


def _pointqa(images: Path, annotations: Path, field: str, by: pointqa.By) -> Read:
    pointqa.check_by(by)
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        value = entry.raw("answer")
        answer = str(value) if type(value) is int else entry.plain("answer").strip()
        way = settled(by, entry.id)
        turn = pointed(entry.plain(field), answer, box=entry.box("bbox"), point=entry.point("point"), by=way)
        image = entry.image(folder, entry.text("file_path"))
        return Example(entry.id, "pointqa", image, (turn,), references=(answer,), facts={"by": way})

    yield from made(read_lines(annotations), make)


def read_shikra_v7w(*, images: Path, annotations: Path, by: By = "box") -> Read:
    """The candidates stand in an order drawn from the line's number, the same in every run."""
    check_by(by)
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        boxes = [entry.corners(entry.floats(box, "candidates"), "candidates") for box in entry.list("candidates")]
        right = entry.box("answer")
        if boxes.count(right) != 1:
            raise entry.error(f"has the answer {list(right)}, which is {boxes.count(right)} of its candidates")
        boxes = in_keyed_order(boxes, entry.id)
        point = entry.point("point") if entry.has("point") else None
        turn = pointing(entry.plain("question"), boxes, boxes.index(right), by=by, point=point)
        image, facts = entry.image(folder, entry.text("file_path")), {"answer_index": boxes.index(right)}
        return Example(entry.id, "v7w", image, (turn,), facts=facts)

    yield from made(read_lines(annotations), make)
