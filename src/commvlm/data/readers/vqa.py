"""VQAv2 and OK-VQA: a file of questions, and a file of annotations with ten answers each.

questions:    {"data_subtype": "train2014", "questions": [{image_id, question, question_id}]}
annotations:  {"annotations": [{question_id, image_id, question_type, answer_type, multiple_choice_answer,
               answers: [{answer, answer_id, ...}]}]}
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..example import Example, Turn
from .entry import Entry, EntryError, Read, made
from .files import image_folder, read_object


def read_vqa(*, images: Path, questions: Path, annotations: Path | None = None, image_name: str | None = None) -> Read:
    """One example a question: `multiple_choice_answer` is its answer, the annotators' answers are its references.

    OK-VQA says no multiple_choice_answer: the answer given most often stands for it, the first of equals.
    annotations: None for a test set, whose answers nobody has: the answer is empty, and there is nothing to train on.
    image_name: how the images are called, with `{image_id}` in it, e.g. "COCO_train2014_{image_id:012d}.jpg". None
    takes COCO's name with the questions' own `data_subtype`.
    """
    folder, asked = image_folder(images), read_object(questions)
    pattern = _coco_name(asked) if image_name is None else image_name
    answered: dict[int, Entry] = {}
    if annotations is not None:
        for entry in read_object(annotations).each("annotations", "annotation"):
            try:
                _keep(entry, answered)
            except EntryError as error:
                yield error
    seen: set[int] = set()

    def make(entry: Entry) -> Example:
        key = entry.integer("question_id")
        if annotations is not None and key not in answered:
            raise entry.error(f"(question_id {key}) has no annotation in {annotations.name}")
        if key in seen:
            raise entry.error(f"has question_id {key} a second time")
        seen.add(key)
        return _example(entry, answered.get(key), folder, pattern)

    yield from made(asked.each("questions", "question"), make)


def _keep(entry: Entry | EntryError, answered: dict[int, Entry]) -> None:
    if isinstance(entry, EntryError):
        raise entry
    key = entry.integer("question_id")
    if answered.setdefault(key, entry) is not entry:
        raise entry.error(f"has question_id {key} a second time")


def _example(question: Entry, annotation: Entry | None, folder: Path, pattern: str) -> Example:
    image_id = question.integer("image_id")
    image = question.image(folder, image_name_of(pattern, image_id))
    facts: dict[str, str | int | float] = {"question_id": question.integer("question_id"), "image_id": image_id}
    if annotation is None:
        return Example(str(facts["question_id"]), "vqa", image, (Turn(question.plain("question"), ""),), facts=facts)
    if annotation.has("image_id") and annotation.integer("image_id") != image_id:
        raise annotation.error(f"has image_id {annotation.integer('image_id')}, its question has {image_id}")
    references = tuple(answer.string("answer") for answer in annotation.entries("answers", "answer"))
    facts |= {"question_type": annotation.text("question_type"), "answer_type": annotation.text("answer_type")}
    turn = Turn(question.plain("question"), _answer(annotation, references))
    return Example(str(facts["question_id"]), "vqa", image, (turn,), references=references, facts=facts)


def _answer(annotation: Entry, references: tuple[str, ...]) -> str:
    if annotation.has("multiple_choice_answer"):
        return annotation.plain("multiple_choice_answer")
    most = Counter(references).most_common(1)[0][0]
    if not most.strip():
        raise annotation.error("has a blank answer most often, there is none to train on")
    return annotation.without_slots(most, "answers")


def _coco_name(file: Entry) -> str:
    """test-dev2015 is a subset of test2015's images."""
    if not file.has("data_subtype"):
        raise file.error(
            "has no data_subtype to name the images by; give image_name, e.g. COCO_train2014_{image_id:012d}.jpg"
        )
    return f"COCO_{file.text('data_subtype').replace('test-dev', 'test')}_{{image_id:012d}}.jpg"


def image_name_of(pattern: str, image_id: int) -> str:
    try:
        name = pattern.format(image_id=image_id)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(f"vqa: image_name {pattern!r} is no pattern with only {{image_id}} in it ({error})") from error
    if name == pattern:
        raise ValueError(f"vqa: image_name {pattern!r} names every image alike; put {{image_id}} in it")
    return name
