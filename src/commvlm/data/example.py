"""What every reader yields and every task consumes: one image, one dialogue, boxes in original pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the original image, x to the right, y down, floats."""

Point = tuple[float, float]
"""x, y in pixels of the original image."""

IMAGE = "<image>"
"""Slot of the image in a question's text."""
BOXES = "<boxes>"
"""Slot of one group of boxes in a text; the k-th slot of a text takes the k-th group."""
POINTS = "<points>"
"""Slot of one group of points, in the same way."""
RESERVED = (IMAGE, BOXES, POINTS)
"""What no annotation's own text may say."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer. Boxes and points stay numbers until the image's geometry is known.

    Raw turns (from a reader) hold the bare content of their task: the expression for REC, `<boxes>` for REG, the
    question for VQA and POPE, nothing for captions. `templates.instruct` wraps them into an instruction with the
    `<image>` slot. Turns of task "dialogue" are complete as they are.
    """

    question: str
    answer: str
    question_boxes: tuple[tuple[Box, ...], ...] = ()
    answer_boxes: tuple[tuple[Box, ...], ...] = ()
    question_points: tuple[tuple[Point, ...], ...] = ()
    answer_points: tuple[tuple[Point, ...], ...] = ()

    def __post_init__(self) -> None:
        for side, text, slot, groups in (
            ("question", self.question, BOXES, self.question_boxes),
            ("answer", self.answer, BOXES, self.answer_boxes),
            ("question", self.question, POINTS, self.question_points),
            ("answer", self.answer, POINTS, self.answer_points),
        ):
            if text.count(slot) != len(groups):
                raise ValueError(
                    f"{side} has {text.count(slot)} {slot} slots but {len(groups)} groups of {slot[1:-1]}: {text!r}"
                )

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Every box of both sides, in order."""
        return tuple(box for group in (*self.question_boxes, *self.answer_boxes) for box in group)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every point of both sides, in order."""
        return tuple(point for group in (*self.question_points, *self.answer_points) for point in group)


@dataclass(frozen=True)
class Example:
    """One dialogue about one image (or about none).

    id: unique within its source.
    task: a row of `templates.TEMPLATES`, or "dialogue". Its raw turn, where it is not plain from the name:
        gc: `<boxes>` -> what is there; boxes of Visual Genome, where REG's phrases are to be told from other objects.
        spotting: nothing -> a caption with `<boxes>` behind each phrase.
        cot, grounded-cot: a question -> the reason and the answer, without and with `<boxes>`.
        pointqa: a question that ends in `<boxes>` or `<points>` -> a word.
        v7w: "which ..." with four `<boxes>` (or `<points>`), one candidate each -> `<boxes>` (or `<points>`) of one.
        mme: a yes/no question as its file asks it; facts "subtask" and "image_name".
    references: every accepted text of the last answer (REG sentences, captions, the ten VQA answers).
    facts: what a metric or a table groups by, e.g. {"question_type": "color", "answer_type": "other"}.
    """

    id: str
    task: str
    image: Path | None
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
