"""Referring expressions as JSON lines, Shikra's REC_* format, for REC and REG.

    {"img_path": "a.jpg", "expression": "the red cup", "bbox": [x1, y1, x2, y2],
     "dataset_name": "refcoco", "height": 480, "width": 640}

bbox is in pixels of the original image, corners, not x, y, width, height.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from ..example import BOXES, Box, Example, Turn
from .files import Entry, image_folder, read_lines


def read_refer(
    *,
    images: Path,
    annotations: Path,
    task: Literal["rec", "reg"] = "rec",
    group: Literal["line", "object"] | None = None,
) -> list[Example]:
    """rec: one example a line, the expression asked, its box answered. reg: the box asked, an expression answered.

    group: what one REG example is. "object" (the default, for evaluation): all lines with the same image and box
    together, the first expression as the answer, all as references. "line" (for training): each line. REC is always by
    line. Raises ValueError naming the file and the line.
    """
    if task not in ("rec", "reg"):
        raise ValueError(f"refer-jsonl: task is {task!r}, it must be rec or reg")
    if group not in (None, "line", "object") or (task, group) == ("rec", "object"):
        raise ValueError(f"refer-jsonl: task {task} has no group {group!r}: reg takes line or object, rec line")
    folder = image_folder(images)
    lines = [(f"{annotations.stem}:{number}", *_line(entry, folder)) for number, entry in read_lines(annotations)]
    if task == "rec":
        return [
            Example(id, "rec", image, (Turn(expression, BOXES, answer_boxes=((box,),)),), facts=facts)
            for id, image, expression, box, facts in lines
        ]
    objects: dict[tuple[Path, Box] | str, list[str]] = {}
    for id, image, expression, box, _ in lines:
        objects.setdefault(id if group == "line" else (image, box), []).append(expression)
    examples = []
    for id, image, _, box, facts in lines:
        expressions = objects.pop(id if group == "line" else (image, box), None)
        if expressions is not None:
            turn = Turn(BOXES, expressions[0], question_boxes=((box,),))
            examples.append(Example(id, "reg", image, (turn,), references=tuple(expressions), facts=facts))
    return examples


def _line(entry: Entry, folder: Path) -> tuple[Path, str, Box, dict[str, str | int | float]]:
    expression = entry.text("expression")
    if BOXES in expression:
        raise entry.error(f"has {BOXES} in its expression, which is reserved")
    facts: dict[str, str | int | float] = {}
    if entry.has("dataset_name"):
        facts["dataset_name"] = entry.text("dataset_name")
    if entry.has("width") or entry.has("height"):
        facts["width"], facts["height"] = entry.integer("width"), entry.integer("height")
    return entry.image(folder, entry.text("img_path")), expression, _box(entry), facts


def _box(entry: Entry) -> Box:
    values = entry.numbers("bbox")
    if len(values) != 4:
        raise entry.error(f"has a bbox of {len(values)} numbers, it must be x1, y1, x2, y2")
    x1, y1, x2, y2 = values
    if not all(math.isfinite(value) for value in values):
        raise entry.error(f"has bbox {values}, its numbers must be finite")
    if x2 <= x1 or y2 <= y1:
        raise entry.error(f"has bbox {values}, its corners are swapped or it is empty (x1 < x2 and y1 < y2, in pixels)")
    return x1, y1, x2, y2
