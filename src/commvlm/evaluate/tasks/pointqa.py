"""PointQA: a question about the object that is pointed at, answered with a word; accuracy.

Rules: `exact`, the words are the same, whatever their case, blanks around them or a closing full stop; `shikra`, what stands
between "The answer is " and the next full stop is the truth, to the letter (its PointQA metric).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from ..metrics import bootstrap
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, Task, interval_in_percent, percent, unwrap

_WRAPPED = re.compile(r"The answer is (.+?)\.")


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The bare answer; None when nothing is left."""
    return unwrap(text).strip() or None


def score(records: Sequence[Record], *, rule: str) -> Score:
    right = [float(_right(record, rule)) for record in records]
    error, interval = interval_in_percent(bootstrap(right, [record.cluster for record in records]))
    return Score(
        task="pointqa",
        metric="accuracy",
        rule=rule,
        value=percent(sum(right) / len(right)),
        standard_error=error,
        interval=interval,
        n=len(records),
        unparsable=sum(not record.text.strip() for record in records),
        marks={record.id: mark for record, mark in zip(records, right, strict=True)},
    )


def _right(record: Record, rule: str) -> bool:
    if not record.answer.strip():
        raise ValueError(f"{record.name}: PointQA needs a true answer, this record has none")
    if rule == "shikra":
        found = _WRAPPED.findall(record.text)
        return len(found) == 1 and found[0].strip() == record.answer
    return _plain(record.text) in {_plain(truth) for truth in (record.references or (record.answer,))}


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()


POINTQA = Task(
    name="pointqa",
    parse=parse,
    rules={rule: partial(score, rule=rule) for rule in ("exact", "shikra")},
    bare=unwrap,
    wrapped=("shikra",),
)
