"""VQAv2 and OK-VQA: a file of questions, and a file of annotations with ten answers each.

questions:    {"data_subtype": "train2014", "questions": [{image_id, question, question_id}]}
annotations:  {"annotations": [{question_id, image_id, question_type, answer_type, multiple_choice_answer,
               answers: [{answer, answer_id, ...}]}]}
"""

from __future__ import annotations

from pathlib import Path

from ..example import BOXES, Example, Turn
from .files import Entry, image_folder, read_object


def read_vqa(*, images: Path, questions: Path, annotations: Path, image_name: str | None = None) -> list[Example]:
    """One example a question: `multiple_choice_answer` is its answer, the annotators' answers are its references.

    image_name: how the images are called, with `{image_id}` in it, e.g. "COCO_train2014_{image_id:012d}.jpg". None
    takes COCO's name with the questions' own `data_subtype`. Raises ValueError naming file and entry.
    """
    folder, asked = image_folder(images), read_object(questions)
    pattern = _coco_name(asked) if image_name is None else image_name
    answered: dict[int, Entry] = {}
    for entry in read_object(annotations).entries("annotations", "annotation"):
        key = entry.integer("question_id")
        if answered.setdefault(key, entry) is not entry:
            raise entry.error(f"has question_id {key} a second time")
    examples = []
    seen: set[int] = set()
    for entry in asked.entries("questions", "question"):
        key = entry.integer("question_id")
        if key not in answered:
            raise entry.error(f"(question_id {key}) has no annotation in {annotations.name}")
        if key in seen:
            raise entry.error(f"has question_id {key} a second time")
        seen.add(key)
        examples.append(_example(entry, answered[key], folder, pattern))
    return examples


def _example(question: Entry, annotation: Entry, folder: Path, pattern: str) -> Example:
    image_id = question.integer("image_id")
    if annotation.has("image_id") and annotation.integer("image_id") != image_id:
        raise annotation.error(f"has image_id {annotation.integer('image_id')}, its question has {image_id}")
    turn = Turn(_plain(question, "question"), _plain(annotation, "multiple_choice_answer"))
    return Example(
        str(question.integer("question_id")),
        "vqa",
        question.image(folder, _image_name(pattern, image_id)),
        (turn,),
        references=tuple(answer.string("answer") for answer in annotation.entries("answers", "answer")),
        facts={
            "question_type": annotation.text("question_type"),
            "answer_type": annotation.text("answer_type"),
            "question_id": question.integer("question_id"),
            "image_id": image_id,
        },
    )


def _plain(entry: Entry, field: str) -> str:
    text = entry.text(field)
    if BOXES in text:
        raise entry.error(f"has {BOXES} in its {field}, which is reserved")
    return text


def _coco_name(file: Entry) -> str:
    """test-dev2015 is a subset of test2015's images."""
    if not file.has("data_subtype"):
        raise file.error(
            "has no data_subtype to name the images by; give image_name, e.g. COCO_train2014_{image_id:012d}.jpg"
        )
    return f"COCO_{file.text('data_subtype').replace('test-dev', 'test')}_{{image_id:012d}}.jpg"


def _image_name(pattern: str, image_id: int) -> str:
    try:
        name = pattern.format(image_id=image_id)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(f"vqa: image_name {pattern!r} is no pattern with only {{image_id}} in it ({error})") from error
    if name == pattern:
        raise ValueError(f"vqa: image_name {pattern!r} names every image alike; put {{image_id}} in it")
    return name
