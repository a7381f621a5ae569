"""VQA: short answers against those of ten annotators; VQAv2 and OK-VQA share the rule and the file format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..metrics import VQA_RULES, bootstrap, vqa_accuracy
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, Task, interval_in_percent, percent, unwrap

GROUPINGS = ("answer_type", "question_type")


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The answer without its wrapper; None when nothing is left."""
    return unwrap(text).strip() or None


def score(records: Sequence[Record], *, rule: str) -> Score:
    accuracy = np.array([_accuracy(record, rule=rule) for record in records])
    error, interval = interval_in_percent(bootstrap(accuracy, [record.cluster for record in records]))
    extra: dict[str, object] = {
        f"per_{grouping}": _per_group(records, accuracy, grouping)
        for grouping in GROUPINGS
        if any(grouping in record.facts for record in records)
    }
    return Score(
        task="vqa",
        metric="accuracy",
        rule=rule,
        value=percent(float(accuracy.mean())),
        standard_error=error,
        interval=interval,
        n=len(records),
        unparsable=sum(not record.text.strip() for record in records),
        extra=extra,
        marks={record.id: float(mark) for record, mark in zip(records, accuracy, strict=True)},
    )


def _accuracy(record: Record, *, rule: str) -> float:
    try:
        return vqa_accuracy(record.text, record.references, rule=rule)
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from error


def _per_group(records: Sequence[Record], accuracy: np.ndarray, grouping: str) -> dict[str, dict[str, float]]:
    """Mean accuracy in percent and number of questions of each type, in the types' order."""
    kinds = np.array([str(record.facts[grouping]) if grouping in record.facts else "" for record in records])
    return {
        str(kind): {"accuracy": percent(float(accuracy[kinds == kind].mean())), "n": int((kinds == kind).sum())}
        for kind in np.unique(kinds)
    }


VQA = Task(name="vqa", parse=parse, rules={rule: partial(score, rule=rule) for rule in VQA_RULES}, bare=unwrap)
