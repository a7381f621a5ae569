"""Referring expressions as JSON lines, Shikra's REC_* format, for REC, REG and GC.

    {"img_path": "a.jpg", "expression": "the red cup", "bbox": [x1, y1, x2, y2],
     "dataset_name": "refcoco", "height": 480, "width": 640}

bbox is in pixels of the original image, corners, not x, y, width, height.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ..example import BOXES, Box, Example, Turn
from .entry import Entry, EntryError, Read, made
from .files import image_folder, read_lines

Refer = Literal["rec", "reg", "gc"]
Group = Literal["line", "object"]


def read_refer(*, images: Path, annotations: Path, task: Refer = "rec", group: Group | None = None) -> Read:
    """rec: one example a line, the expression asked, its box answered. reg, gc: the box asked, an expression answered.

    group: what one REG example is. "object" (the default, for evaluation): all lines with the same image and box
    together, the first expression as the answer, all as references. "line" (for training): each line. REC and GC are
    always by line.
    """
    if task not in ("rec", "reg", "gc"):
        raise ValueError(f"refer-jsonl: task is {task!r}, it must be rec or reg or gc")
    if group not in (None, "line", "object") or (task != "reg" and group == "object"):
        raise ValueError(f"refer-jsonl: task {task} has no group {group!r}: reg takes line or object, rec and gc line")
    folder = image_folder(images)
    lines = made(read_lines(annotations), lambda entry: _example(entry, folder, task))
    yield from by_object(lines) if task == "reg" and group != "line" else lines


def by_object(examples: Iterable[Example | EntryError]) -> Read:
    """REG examples of one image and box as one, in order of their first: every expression is a reference."""
    first: dict[tuple[Path | None, Box], Example] = {}
    said: dict[tuple[Path | None, Box], list[str]] = {}
    for example in examples:
        if isinstance(example, EntryError):
            yield example
            continue
        key = (example.image, example.turns[0].question_boxes[0][0])
        first.setdefault(key, example)
        said.setdefault(key, []).append(example.turns[0].answer)
    for key, example in first.items():
        yield Example(
            example.id, example.task, example.image, example.turns, references=tuple(said[key]), facts=example.facts
        )


def _example(entry: Entry, folder: Path, task: Refer) -> Example:
    facts: dict[str, str | int | float] = {}
    if entry.has("dataset_name"):
        facts["dataset_name"] = entry.text("dataset_name")
    facts |= entry.size()
    expression, image = entry.plain("expression"), entry.image(folder, entry.text("img_path"))
    return referring(entry.id, image, expression, entry.box("bbox"), task=task, facts=facts)


def referring(
    id: str, image: Path, expression: str, box: Box, *, task: Refer, facts: dict[str, str | int | float]
) -> Example:
    """One expression and its box, asked one way or the other."""
    if task == "rec":
        return Example(id, "rec", image, (Turn(expression, BOXES, answer_boxes=((box,),)),), facts=facts)
    turn = Turn(BOXES, expression, question_boxes=((box,),))
    return Example(id, task, image, (turn,), references=(expression,), facts=facts)
