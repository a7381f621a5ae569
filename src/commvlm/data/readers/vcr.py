"""Visual Commonsense Reasoning, its own JSON lines (Shikra's vcr_* are the same fields, and boxes).

{img_fn, metadata_fn, question: ["Why", "is", [0, 1], ...], answer_choices, rationale_choices, answer_label, rationale_label},
a list in a sentence being objects by their boxes' numbers. metadata_fn, beside the image: {boxes: [[x1, y1, x2, y2, score]]}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ..example import BOXES, Box, Example, Turn
from .entry import Entry, Read, made
from .files import image_folder, read_lines
from .shikra import Groups, numbered_groups

View = Literal["q-ra", "qc-rac", "qac-r"]
LETTERS = "ABCDEFG"
Said = tuple[str, Groups]


def read_vcr(*, images: Path, annotations: Path, view: View = "qc-rac") -> Read:
    """view, by Shikra's names: "q-ra" question -> reason and answer; "qc-rac" question and choices -> reason, answer and
    its letter; "qac-r" question, answer and the reasons to choose from -> the letter."""
    if view not in ("q-ra", "qc-rac", "qac-r"):
        raise ValueError(f"vcr: view is {view!r}, it must be q-ra, qc-rac or qac-r")
    folder = image_folder(images)
    yield from made(read_lines(annotations), lambda entry: _example(entry, folder, view))


def _example(entry: Entry, folder: Path, view: View) -> Example:
    told = entry if entry.has("boxes") else _metadata(entry, folder)
    boxes = [told.corners(told.floats(box, "boxes")[:4], "boxes") for box in told.list("boxes")]
    question = _sentence(entry, entry.list("question"), boxes)
    answers, answer = _choices(entry, "answer", boxes)
    reasons, reason = _choices(entry, "rationale", boxes)
    if view == "q-ra":
        asked, said = question, _joined(reasons[reason], answers[answer])
    elif view == "qc-rac":
        asked = _joined(question, ("\nOptions:", ()), *_lettered(answers))
        said = _joined(reasons[reason], answers[answer], _letter(answer))
    else:
        asked = _joined(question, ("\nAnswer:", ()), answers[answer], ("\nReasons:", ()), *_lettered(reasons))
        said = _letter(reason)
    turn = Turn(asked[0], said[0], question_boxes=asked[1], answer_boxes=said[1])
    right = LETTERS[reason if view == "qac-r" else answer]
    image = entry.image(folder, entry.text("img_fn"))
    return Example(entry.id, "vcr", image, (turn,), references=(right,), facts={"view": view})


def _metadata(entry: Entry, folder: Path) -> Entry:
    """What the file beside the image says of it."""
    name = entry.text("metadata_fn")
    try:
        content = json.loads(entry.image(folder, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise entry.error(f"has no boxes, and its metadata_fn {name} is not among the images") from None
    except (OSError, ValueError, RecursionError) as error:
        raise entry.error(f"has the metadata_fn {name}, which is no JSON ({error})"[:200]) from None
    return Entry(content, f"{entry.where} {name}")


def _choices(entry: Entry, what: str, boxes: list[Box]) -> tuple[list[Said], int]:
    choices = [_sentence(entry, words, boxes) for words in entry.list(f"{what}_choices")]
    label = entry.integer(f"{what}_label")
    if not 0 <= label < len(choices) <= len(LETTERS):
        raise entry.error(f"has {what}_label {label} for {len(choices)} choices")
    return choices, label


def _sentence(entry: Entry, words: Any, boxes: list[Box]) -> Said:
    if not isinstance(words, list) or not all(isinstance(word, str | list) for word in words):
        raise entry.error(f"has the sentence {words!r:.60}, it must be a list of words and lists of numbers")
    text = " ".join(BOXES if isinstance(word, list) else entry.without_slots(word, "words") for word in words)
    return text, numbered_groups(entry, [word for word in words if isinstance(word, list)], boxes)


def _joined(*parts: Said) -> Said:
    return " ".join(text for text, _ in parts).replace(" \n", "\n"), tuple(g for _, groups in parts for g in groups)


def _lettered(choices: list[Said]) -> list[Said]:
    return [(f"({letter}) {text}", groups) for letter, (text, groups) in zip(LETTERS, choices, strict=False)]


def _letter(number: int) -> Said:
    return f"The answer is ({LETTERS[number]}).", ()
