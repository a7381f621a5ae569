"""What every reader yields and every task consumes: one image, one dialogue, boxes in original pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the original image, x to the right, y down, floats."""

IMAGE = "<image>"
"""Slot of the image in a question's text."""
BOXES = "<boxes>"
"""Slot of one group of boxes in a text; the k-th slot of a text takes the k-th group."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer. Boxes stay numbers until the image's geometry is known.

    Raw turns (from a reader) hold the bare content of their task: the expression for REC, `<boxes>` for REG, the
    question for VQA and POPE, nothing for captions. `templates.instruct` wraps them into an instruction with the
    `<image>` slot. Turns of task "dialogue" are complete as they are.
    """

    question: str
    answer: str
    question_boxes: tuple[tuple[Box, ...], ...] = ()
    answer_boxes: tuple[tuple[Box, ...], ...] = ()

    def __post_init__(self) -> None:
        for side, text, boxes in (
            ("question", self.question, self.question_boxes),
            ("answer", self.answer, self.answer_boxes),
        ):
            if text.count(BOXES) != len(boxes):
                raise ValueError(
                    f"{side} has {text.count(BOXES)} {BOXES} slots but {len(boxes)} groups of boxes: {text!r}"
                )


@dataclass(frozen=True)
class Example:
    """One dialogue about one image (or about none).

    id: unique within its source. task: rec | reg | pope | vqa | caption | dialogue.
    references: every accepted text of the last answer (REG sentences, captions, the ten VQA answers).
    facts: what a metric or a table groups by, e.g. {"question_type": "color", "answer_type": "other"}.
    """

    id: str
    task: str
    image: Path | None
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
