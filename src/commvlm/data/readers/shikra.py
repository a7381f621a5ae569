"""Shikra's own JSON lines, where they are not another format: captions, spotting, Shikra-RD, VQA with reasons.

CAP_*                      {img_path, caption}
CWB_flickr30k_*            {image_id, boxes: [corners], sentence: "<ph_st>a man<ph_ed> ...", boxes_seq: [[0, 2], ...]}
GPT4GEN_*                  {img_path, boxes, question, question_boxes_seq, answer, cot_with_ans, answer_boxes_seq}
v2_OpenEnded_*             {image_path, question, annotation: VQAv2's own}
vqa_E_*                    {file_path, question, explanation: [text, how much it tells], multiple_answers}
vqa_X_*                    {file_path, question, justification: [...], multiple_choice_answer}

REC_*, GC_* are `refer-jsonl`, the LLaVA files `llava`, coco_pope_* `pope`. Boxes are corners in pixels of the original image.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from ..example import BOXES, Box, Example, Turn
from .entry import Entry, Read, made, short
from .files import image_folder, read_lines

_MARKS = re.compile(r"<ph_st>|\s*<ph_ed>")
Groups = tuple[tuple[Box, ...], ...]


def read_shikra_caption(*, images: Path, annotations: Path) -> Read:
    """One caption a line."""
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        turn = Turn("", entry.plain("caption").strip())
        return Example(entry.id, "caption", entry.image(folder, entry.text("img_path")), (turn,))

    yield from made(read_lines(annotations), make)


def read_shikra_spotting(*, images: Path, annotations: Path) -> Read:
    """One sentence a line: `<boxes>` behind every marked phrase."""
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        boxes = _boxes(entry)
        text, groups = _marked(entry, "sentence", boxes, "boxes_seq")
        image_id = entry.key("image_id")
        turn = Turn("", text, answer_boxes=groups)
        image, facts = entry.image(folder, f"{image_id}.jpg"), {"image_id": image_id}
        return Example(entry.id, "spotting", image, (turn,), references=(_bare(text),), facts=facts)

    yield from made(read_lines(annotations), make)


def read_shikra_rd(*, images: Path, annotations: Path, answer: Literal["a", "c", "bc"] = "bc") -> Read:
    """Shikra-RD (GPT4GEN). answer: "a" the answer alone, "c" reason and answer, "bc" the same with its boxes."""
    if answer not in ("a", "c", "bc"):
        raise ValueError(f"shikra-rd: answer is {answer!r}, it must be a, c or bc")
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        boxes = _boxes(entry)
        question, asked = _marked(entry, "question", boxes, "question_boxes_seq")
        said: Groups = ()
        if answer == "a":
            text = entry.plain("answer")
        else:
            text, said = _marked(entry, "cot_with_ans", boxes, "answer_boxes_seq")
            if answer == "c":
                text, said = _bare(text), ()
        task = {"a": "vqa", "c": "cot", "bc": "grounded-cot"}[answer]
        turn = Turn(question, text, question_boxes=asked, answer_boxes=said)
        return Example(entry.id, task, entry.image(folder, entry.text("img_path")), (turn,), references=(text,))

    yield from made(read_lines(annotations), make)


def read_shikra_vqa(*, images: Path, annotations: Path) -> Read:
    """VQAv2 as Shikra joined it: a question and its official annotation a line."""
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        said = entry.entry("annotation")
        references = tuple(answer.string("answer") for answer in said.entries("answers", "answer"))
        facts = {name: said.key(name) for name in ("question_id", "image_id", "question_type", "answer_type")}
        turn = Turn(entry.plain("question"), said.plain("multiple_choice_answer"))
        image = entry.image(folder, entry.text("image_path"))
        return Example(entry.id, "vqa", image, (turn,), references=references, facts=facts)

    yield from made(read_lines(annotations), make)


def read_shikra_vqa_e(*, images: Path, annotations: Path) -> Read:
    """VQA-E: the question, then the explanation and the answer."""
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        reason = entry.list("explanation")[0]
        if not isinstance(reason, str) or not reason.strip():
            raise entry.error(f"has explanation {short(reason)}, it must begin with a text that is not blank")
        reason = entry.without_slots(reason, "explanation")
        return _reasoned(entry, folder, reason, entry.plain("multiple_answers"))

    yield from made(read_lines(annotations), make)


def read_shikra_vqa_x(*, images: Path, annotations: Path) -> Read:
    """VQA-X: the question, then its justifications and the answer."""
    folder = image_folder(images)

    def make(entry: Entry) -> Example:
        reason = entry.without_slots(" ".join(text.strip() for text in entry.texts("justification")), "justification")
        return _reasoned(entry, folder, reason, entry.plain("multiple_choice_answer"))

    yield from made(read_lines(annotations), make)


def _reasoned(entry: Entry, folder: Path, reason: str, answer: str) -> Example:
    reason = reason.strip()
    stop = "" if reason.endswith((".", "!", "?")) else "."
    turn = Turn(entry.plain("question"), f"{reason}{stop} So the answer is {answer}.")
    return Example(entry.id, "cot", entry.image(folder, entry.text("file_path")), (turn,), references=(answer,))


def _boxes(entry: Entry) -> list[Box]:
    """None of a sentence in which nothing is marked."""
    found = [] if entry.value.get("boxes") == [] else entry.list("boxes")
    return [entry.corners(entry.floats(box, "boxes"), "boxes") for box in found]


def _marked(entry: Entry, field: str, boxes: list[Box], sequence: str) -> tuple[str, Groups]:
    """A text with `<boxes>` behind each marked phrase, and the boxes that `sequence` gives them."""
    text = entry.plain(field)
    groups = numbered_groups(entry, entry.value.get(sequence) or [], boxes)
    if text.count("<ph_ed>") != len(groups) or text.count("<ph_st>") != len(groups):
        raise entry.error(f"has {len(groups)} groups in {sequence} for {text.count('<ph_ed>')} phrases in its {field}")
    return _MARKS.sub(lambda mark: "" if mark[0] == "<ph_st>" else f" {BOXES}", text), groups


def numbered_groups(entry: Entry, sequence: Any, boxes: list[Box]) -> Groups:
    """Lists of numbers of boxes -> those boxes."""
    groups = []
    if not isinstance(sequence, list):
        raise entry.error(f"has {short(sequence)} where lists of boxes' numbers must be")
    for numbers in sequence:
        if not isinstance(numbers, list) or not numbers:
            raise entry.error(f"has the group {numbers!r}, it must be a list of boxes' numbers")
        if not all(type(n) is int and 0 <= n < len(boxes) for n in numbers):
            raise entry.error(f"has the group {numbers}, but boxes from 0 to {len(boxes) - 1}")
        groups.append(tuple(boxes[n] for n in numbers))
    return tuple(groups)


def _bare(text: str) -> str:
    return text.replace(f" {BOXES}", "")
