"""PointQA: questions about the object that is pointed at, in images of Visual Genome.

localqa_dataset.json:     {image: [{id, question, all_ans: [answer], all_objs: [{x, y, w, h}], points: [{x, y, ans}]}]}
looktwiceqa_dataset.json: {image: [{id, obj_question, super_question, general_question, ans, bbox: {x, y, w, h},
                           point: {x, y}}]}
*_imgs.json:              [image, ...], the images of a split
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..example import BOXES, POINTS, Box, Example, Point, Turn
from .entry import Entry, EntryError, Read, made, numbered
from .files import image_folder, read_ids, read_object
from .genome import Places
from .visual7w import in_keyed_order

Asked = Literal["obj", "super", "general"]
By = Literal["box", "point", "either"]
"""How the object is pointed at; "either": by its box or its point, as the example's id decides."""


def read_pointqa_local(
    *, images: Path, questions: Path, split: Path | None = None, image_data: Path | None = None, by: By = "box"
) -> Read:
    """One example an object of a question: the question and its box (by = "point": its point), answered for it.

    split: the file with the images of a split; all without it. references: the one answer; facts: image_id, by.
    """
    check_by(by)
    places = Places(image_folder(images), image_data)

    def objects(entry: Entry) -> Iterator[Example]:
        points = entry.entries("points", "point")
        boxes = entry.entries("all_objs", "object")
        if len(points) != len(boxes):
            raise entry.error(f"has {len(points)} points for {len(boxes)} objects")
        question = entry.plain("question")
        for number, (point, box) in enumerate(zip(points, boxes, strict=True)):
            yield _pointed(
                entry, f"{entry.id}:{number}", question, _word(point, "ans"),
                box=box.named_box(), point=_xy(point), by=by, places=places,
            )  # fmt: skip

    yield from made(_questions(questions, split), objects)


def read_pointqa_twice(
    *, images: Path, questions: Path, split: Path | None = None, image_data: Path | None = None,
    asked: Asked = "general", by: By = "box",
) -> Read:  # fmt: skip
    """One example a question. asked: "obj" names the object's kind, "super" a wider one, "general" none ("these")."""
    check_by(by)
    if asked not in ("obj", "super", "general"):
        raise ValueError(f"pointqa-twice: asked is {asked!r}, it must be obj, super or general")
    places = Places(image_folder(images), image_data)

    def make(entry: Entry) -> Example:
        return _pointed(
            entry, entry.id, entry.plain(f"{asked}_question"), _word(entry, "ans"),
            box=entry.named_box("bbox"), point=entry.point("point"), by=by, places=places,
        )  # fmt: skip

    yield from made(_questions(questions, split), make)


def _questions(path: Path, split: Path | None) -> Iterator[Entry | EntryError]:
    """Every question of the split, its image's number kept beside it; ids are image:place."""
    file, wanted = read_object(path), None if split is None else read_ids(split)
    for image, asked in file.value.items():
        if wanted is not None and image not in wanted:
            continue
        if not isinstance(asked, list):
            yield file.error(f"image {image} has no list of questions")
            continue
        for entry in numbered(asked, f"{path.name}: image {image}, question", image):
            if isinstance(entry, Entry):
                entry.value = {**entry.value, "image": image}
            yield entry


def _pointed(
    entry: Entry, id: str, question: str, answer: str, *, box: Box, point: Point, by: By, places: Places
) -> Example:
    if not entry.text("image").isdigit():
        raise entry.error(f"is about image {entry.text('image')!r}, which is no number of Visual Genome")
    image_id = int(entry.text("image"))
    image, size = places.of(entry, image_id)
    by = settled(by, id)
    turn = pointed(question, answer, box=box, point=point, by=by)
    return Example(id, "pointqa", image, (turn,), references=(answer,), facts={"image_id": image_id, "by": by, **size})


def settled(by: By, id: str) -> By:
    return by if by != "either" else in_keyed_order(("box", "point"), id)[0]


def check_by(by: str) -> None:
    if by not in ("box", "point", "either"):
        raise ValueError(f"by is {by!r}, it must be box, point or either")


def pointed(question: str, answer: str, *, box: Box, point: Point, by: By) -> Turn:
    """The question with the place that it is about behind it."""
    if by == "box":
        return Turn(f"{question} {BOXES}", answer, question_boxes=((box,),))
    return Turn(f"{question} {POINTS}", answer, question_points=((point,),))


def _word(entry: Entry, field: str) -> str:
    """An answer; counts may stand there as numbers."""
    value = entry.raw(field)
    if type(value) is int:
        return str(value)
    return entry.plain(field).strip()


def _xy(entry: Entry) -> Point:
    x, y = entry.floats([entry.raw("x"), entry.raw("y")], "point")
    return x, y
