"""POPE: references as in output/coco/*.json, predictions as JSON lines {"question_id", "answer"} (LLaVA: "text").

Files are paired by question_id, so the order of lines is free. Where no prediction has one they are paired by line, as the
official script does with its own format, {"question", "answer"}; each question must then be its reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from commvlm.data.readers.entry import Entry, short

from ..metrics import pope_scores
from ..tasks import POPE, Record, as_it_is
from .result import Official, by_id, check_same_ids, rows, sorted_ids

ID = "question_id"


def score_pope(references: Path, predictions: Path, *, rule: str = "official") -> Official:
    """Figures: accuracy, precision, recall, f1, yes_ratio (of the predictions) in [0, 1], n, unparsable.

    Raises ValueError naming file, place and question_id for what cannot be paired or read.
    """
    asked = by_id(rows(references), _question, id=ID)
    entries, names = rows(predictions), (references.name, predictions.name)
    ids = any(entry.has(ID) for entry in entries)
    said = by_id(entries, _answer, id=ID) if ids else _by_line(asked, entries, names)
    check_same_ids(asked, said, what=ID, names=names)
    records = [_record(key, *asked[key], said[key]) for key in sorted_ids(asked)]
    score = POPE.score(records, rule=rule, bare=as_it_is)
    figures = pope_scores([record.text for record in records], [record.answer for record in records], rule=rule)
    return Official(score, asdict(figures), {"references": references, "predictions": predictions})


def _question(entry: Entry) -> tuple[str, str, str]:
    label = entry.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise entry.error(f"has label {label!r}, it must be yes or no")
    return (
        entry.text("imange" if entry.has("imange") and not entry.has("image") else "image"),
        entry.text("text"),
        label,
    )


def _by_line(
    asked: Mapping[str, tuple[str, str, str]], entries: Sequence[Entry], names: tuple[str, str]
) -> dict[str, str]:
    """Answers by the question_id of the reference in the same place. names: of the files of references, predictions."""
    if len(entries) != len(asked):
        raise ValueError(
            f"{names[1]}: has {len(entries)} answers and no {ID}, {names[0]} has {len(asked)} questions; "
            f"without {ID} each needs its line"
        )
    for entry, (_, question, _) in zip(entries, asked.values(), strict=True):
        if entry.has("question") and entry.string("question") != question:
            said = short(entry.raw("question"))
            raise entry.error(f"answers {said} where {names[0]} asks {short(question)}; keep its order or give {ID}")
    return dict(zip(asked, map(_answer, entries), strict=True))


def _answer(entry: Entry) -> str:
    return entry.string("text" if entry.has("text") and not entry.has("answer") else "answer")


def _record(key: str, image: str, question: str, label: str, text: str) -> Record:
    return Record(
        id=key, task="pope", image=image, width=None, height=None, question=question, text=text,
        parsed=POPE.parse(text, None, {}), answer=label,
    )  # fmt: skip
