"""Visual7W's pointing questions: "which ..." answered by one of four boxes.

{"images": [{image_id, filename, split, qa_pairs: [{qa_id, question, answer: box_id, multiple_choices: [3 box_ids]}]}],
 "boxes": [{box_id, name, x, y, width, height}]}

x and y can be negative: a box may leave its image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..example import BOXES, POINTS, Box, Example, Point, Turn
from .entry import Entry, EntryError, Read, made
from .files import image_folder, read_object

By = Literal["box", "point"]
SPLITS = ("train", "val", "test")


def read_visual7w(*, images: Path, questions: Path, split: str, boxes: Path | None = None, by: By = "box") -> Read:
    """One example a question: the question, then four `<boxes>`, answered with one of them; by = "point": with its middle.

    boxes: the file with the boxes, where the questions' own does not have them (dataset_v7w_grounding_annotations.json).
    The candidates stand in an order drawn from the question's id, the same in every run, so that their place says nothing.
    ids are the questions'. facts: qa_id, image_id, answer_index (from 0, among the candidates), box_ids (in their order).
    """
    if split not in SPLITS:
        raise ValueError(f"visual7w: split is {split!r}, it must be one of {', '.join(SPLITS)}")
    check_by(by)
    folder, file = image_folder(images), read_object(questions)
    listed = (file if boxes is None else read_object(boxes)).entries("boxes", "box")
    known = {entry.integer("box_id"): entry for entry in listed}
    chosen = (e for e in file.each("images", "image") if isinstance(e, EntryError) or e.value.get("split") == split)

    def of_image(entry: Entry) -> list[Example | EntryError]:
        image = entry.image(folder, entry.text("filename"))
        facts = {"image_id": entry.integer("image_id")}
        return list(made(entry.each("qa_pairs", "question"), lambda pair: _example(pair, image, known, by, facts)))

    yield from made(chosen, of_image)


def _example(pair: Entry, image: Path, boxes: dict[int, Entry], by: By, facts: dict[str, Any]) -> Example:
    qa_id, answer, others = pair.integer("qa_id"), pair.integer("answer"), pair.list("multiple_choices")
    ids = [answer, *others]
    if not all(type(i) is int and i in boxes for i in ids) or len(set(ids)) != len(ids):
        raise pair.error(f"has the candidates {ids}, which are not different boxes of the file")
    ids = in_keyed_order(ids, str(qa_id))
    candidates = [boxes[i].named_box() for i in ids]
    facts = {**facts, "qa_id": qa_id, "box_ids": " ".join(map(str, ids)), "answer_index": ids.index(answer)}
    turn = pointing(pair.plain("question"), candidates, ids.index(answer), by=by)
    return Example(str(qa_id), "v7w", image, (turn,), facts=facts)


def pointing(question: str, candidates: Sequence[Box], answer: int, *, by: By, point: Point | None = None) -> Turn:
    """The question with its candidates behind it, and the place of the right one. point: of the answer; its middle."""
    asked = f"{question} Candidates: {' '.join([BOXES] * len(candidates))}"
    groups = tuple((box,) for box in candidates)
    if by == "box":
        return Turn(asked, BOXES, question_boxes=groups, answer_boxes=(groups[answer],))
    return Turn(asked, POINTS, question_boxes=groups, answer_points=((point or middle(candidates[answer]),),))


def middle(box: Box) -> Point:
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, (y1 + y2) / 2


def in_keyed_order(items: Sequence[Any], key: str) -> list[Any]:
    """The items in an order that the key alone decides."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{key}:{item}".encode()).digest())


def check_by(by: str) -> None:
    if by not in ("box", "point"):
        raise ValueError(f"by is {by!r}, it must be box or point")
