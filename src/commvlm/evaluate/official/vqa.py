"""VQAv2 and OK-VQA: the two official files, and results as [{"question_id", "answer"}]."""

from __future__ import annotations

from pathlib import Path

from commvlm.data.readers.entry import Entry
from commvlm.data.readers.files import read_object

from ..tasks import VQA, Record, as_it_is
from .result import Official, by_id, check_same_ids, rows, sorted_ids

ID = "question_id"
DECIMALS = 2
"""The official code rounds its percentages."""


def score_vqa(questions: Path, annotations: Path, predictions: Path, *, rule: str = "official") -> Official:
    """Figures: accuracy in percent, per_answer_type the same, both rounded as officially to two decimals; n.

    Raises ValueError naming file, place and question_id for what cannot be paired or read.
    """
    asked = by_id(read_object(questions).entries("questions", "question"), lambda entry: entry.text("question"), id=ID)
    truths = by_id(read_object(annotations).entries("annotations", "annotation"), _truth, id=ID)
    said = by_id(rows(predictions), lambda entry: entry.string("answer"), id=ID)
    check_same_ids(asked, truths, what=ID, names=(questions.name, annotations.name))
    check_same_ids(truths, said, what=ID, names=(annotations.name, predictions.name))
    records = [_record(key, asked[key], *truths[key], said[key]) for key in sorted_ids(truths)]
    score = VQA.score(records, rule=rule, bare=as_it_is)
    kinds: dict[str, list[float]] = {}
    for record in records:
        kinds.setdefault(str(record.facts["answer_type"]), []).append(score.marks[record.id])
    figures = {
        "accuracy": _rounded(list(score.marks.values())),
        "per_answer_type": {kind: _rounded(marks) for kind, marks in kinds.items()},
        "n": score.n,
    }
    return Official(score, figures, {"questions": questions, "annotations": annotations, "predictions": predictions})


def _rounded(marks: list[float]) -> float:
    return round(100 * sum(marks) / len(marks), DECIMALS)


def _truth(entry: Entry) -> tuple[str, str, str, tuple[str, ...]]:
    image, answers = str(entry.key("image_id")), entry.entries("answers", "answer")
    return image, entry.text("answer_type"), entry.text("question_type"), tuple(a.string("answer") for a in answers)


def _record(
    key: str, question: str, image: str, answer_type: str, question_type: str, answers: tuple[str, ...], text: str
) -> Record:
    return Record(
        id=key, task="vqa", image=image, width=None, height=None, question=question, text=text,
        parsed=VQA.parse(text, None, {}), answer="", references=answers,
        facts={"answer_type": answer_type, "question_type": question_type},
    )  # fmt: skip
