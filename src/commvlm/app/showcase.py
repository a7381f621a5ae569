"""A few test images with what was asked, answered and true: drawn by lot, from all questions or from the failures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.boxes import PadSquare, box_iou, boxes_in_pixels
from ..data.example import BOXES, IMAGE
from ..data.images import open_image
from ..evaluate.metrics import pope_answer, rec_correct, vqa_accuracy
from ..evaluate.tasks import POPE, Record, unwrap
from .drawing import Mark, asked_mark, draw_boxes, predicted_marks, true_mark

SHARES = {"rec": 5, "reg": 2, "vqa": 2, "pope": 2, "caption": 1}
"""How many of the dozen are of each task."""
SHOWN = 512
"""Pixels of a picture's longer side in the report, at least."""

Records = Mapping[str, Sequence[Record]]
"""A task's predictions, by task."""


@dataclass(frozen=True)
class Shown:
    """One picture of the report. verdict: "right", "wrong", or "" where the metric gives no such answer. others: what
    the other runs answered, by label."""

    picture: str
    alt: str
    task: str
    question: str
    answer: str
    truth: str
    verdict: str
    detail: str
    others: tuple[tuple[str, str], ...]


def choose(records: Records, *, shares: Mapping[str, int] = SHARES, seed: int = 0) -> list[Record]:
    """Records of different images by lot, so many of each task as `shares` says; a function of the seed and the ids alone."""
    rng = np.random.default_rng(seed)
    chosen: list[Record] = []
    for task, share in shares.items():
        found = sorted(records.get(task, ()), key=lambda record: record.id)
        order = (found[int(k)] for k in rng.permutation(len(found)))
        taken = {record.image for record in chosen}
        for record in order:
            if share and record.image is not None and record.image not in taken:
                chosen.append(record)
                taken.add(record.image)
                share -= 1
    return chosen


def failures(records: Records) -> dict[str, list[Record]]:
    """Of each task's records, those that are wrong by its own rule; none of tasks whose answers are not right or wrong."""
    return {task: [one for one in found if _verdict(one)[0] == "wrong"] for task, found in records.items()}


def show(record: Record, others: Mapping[str, Records], *, images: Path) -> Shown | None:
    """The record as the report shows it; None where its image is gone.

    others: the other runs' predictions by label. images: where an image is looked for that has moved with its folder.
    """
    path = _image(record, images)
    if path is None or record.width is None or record.height is None:
        return None
    said = [box for group in boxes_in_pixels(record.text, PadSquare(record.width, record.height)) for box in group]
    marks: list[Mark] = [*map(asked_mark, record.asked_boxes), *predicted_marks(said), *map(true_mark, record.boxes)]
    verdict, detail = _verdict(record)
    drawn = [f"{len(said)} answered (solid)"] * bool(said) + ["the true one (dashed)"] * bool(record.boxes)
    alt = f"test image {path.name}" + (f" with boxes: {', '.join(drawn)}" if drawn else "")
    return Shown(
        picture=_data_url(path, marks),
        alt=alt,
        task=record.task,
        question=record.question.replace(IMAGE, "").replace(BOXES, "[the yellow box]").strip(),
        answer=record.text or "(no answer)",
        truth=_truth(record),
        verdict=verdict,
        detail=detail,
        others=tuple((label, _answer_of(record, by_task)) for label, by_task in others.items()),
    )


def _answer_of(record: Record, by_task: Records) -> str:
    found = next((other for other in by_task.get(record.task, ()) if other.id == record.id), None)
    return "–" if found is None else found.text or "(no answer)"


def _image(record: Record, images: Path) -> Path | None:
    if record.image is None:
        return None
    places = (Path(record.image), images / Path(record.image).name)
    return next((place for place in places if place.is_file()), None)


def _data_url(path: Path, marks: Sequence[Mark]) -> str:
    file = io.BytesIO()
    draw_boxes(open_image(path), marks, shortest=SHOWN).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _truth(record: Record) -> str:
    if record.task == "rec":
        return "the dashed box"
    texts = list(dict.fromkeys(record.references or (record.answer,)))
    return texts[0] if len(texts) == 1 else f"{texts[0]} (or {len(texts) - 1} more)"


def _verdict(record: Record) -> tuple[str, str]:
    """Right or wrong by the task's own rule, and a figure beside it. Sentences have no right and wrong but exactness."""
    if record.task == "rec":
        if not isinstance(record.parsed, tuple):
            return "wrong", "no single box"
        overlap = box_iou([record.parsed], [record.boxes[0]])
        return _named(bool(rec_correct(overlap)[0])), f"overlap (IoU) {overlap[0]:.2f}"
    if record.task == "pope":
        return _named(
            pope_answer(POPE.bare(record.text)) == record.answer
        ), f"{record.facts.get('set', '')} set".strip()
    if record.task == "vqa":
        return _named(vqa_accuracy(unwrap(record.text), record.references) >= 0.5), str(
            record.facts.get("question_type", "")
        )
    exact = record.text.strip() in (record.references or (record.answer,))
    return ("right", "word for word") if exact else ("", "scored by CIDEr")


def _named(right: bool) -> str:
    return "right" if right else "wrong"
