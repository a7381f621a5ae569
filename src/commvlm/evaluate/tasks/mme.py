"""MME: two yes/no questions an image, 14 subtasks; the figure in front is perception plus cognition, in points.

facts["subtask"] names each question's subtask. Perception sums ten subtasks (2000 points at most), cognition four (800);
those that were not asked are named in the score, since a sum over fewer is no MME score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from ..metrics import COGNITION, MME_RULES, PERCEPTION, SUBTASKS, Interval, MmeScores, bootstrap, mme_answer, mme_scores
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, Task, unwrap_yes_or_no


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The official reading, "yes" or "no"; None for "other"."""
    return mme_answer(unwrap_yes_or_no(text))


def score(records: Sequence[Record], *, rule: str) -> Score:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_subtask(record), []).append(record)
    scores = {name: _figures(groups[name], rule) for name in SUBTASKS if name in groups}
    perception, cognition = (_total(scores, names) for names in (PERCEPTION, COGNITION))
    interval = _interval(groups, rule)
    return Score(
        task="mme",
        metric="perception + cognition",
        rule=rule,
        value=perception + cognition,
        standard_error=None if interval is None else round(interval.standard_error, 6),
        interval=None if interval is None else (round(interval.low, 6), round(interval.high, 6)),
        n=len(records),
        unparsable=sum(figures.other for figures in scores.values()),
        extra={
            "perception": perception,
            "cognition": cognition,
            "subtasks": {name: asdict(figures) for name, figures in scores.items()},
            "not_asked": [name for name in SUBTASKS if name not in groups],
        },
        marks={record.id: float(_right(record, rule)) for record in records},
    )


def _subtask(record: Record) -> str:
    name = str(record.facts["subtask"]) if "subtask" in record.facts else ""
    if name not in SUBTASKS:
        raise ValueError(f"{record.name}: subtask {name!r} is none of MME's: {', '.join(SUBTASKS)}")
    if record.answer.lower() not in ("yes", "no"):
        raise ValueError(f"{record.name}: the true answer is {record.answer!r}, an MME label must be yes or no")
    return name


def _figures(records: Sequence[Record], rule: str) -> MmeScores:
    return mme_scores(
        [r.text for r in records], [r.answer.lower() for r in records], [r.cluster for r in records], rule=rule
    )  # fmt: skip


def _right(record: Record, rule: str) -> bool:
    return MME_RULES[rule](record.text) == record.answer.lower()


def _total(scores: dict[str, MmeScores], names: Sequence[str]) -> float:
    return sum(scores[name].score for name in names if name in scores)


def _interval(groups: dict[str, list[Record]], rule: str) -> Interval | None:
    """Of the sum over subtasks: each image earns 100 for both answers right, and 100 times its share of right ones."""
    points, clusters, names = [], [], []
    for name, records in groups.items():
        images: dict[str, list[bool]] = {}
        for record in records:
            images.setdefault(record.cluster, []).append(_right(record, rule))
        points += [100.0 * (sum(right) / len(right) + all(right)) for right in images.values()]
        clusters += [f"{name}/{image}" for image in images]
        names += [name] * len(images)
    found = bootstrap(points, clusters, groups=names)
    return None if found is None else Interval(*(len(groups) * figure for figure in found))


MME = Task(
    name="mme", parse=parse, rules={rule: partial(score, rule=rule) for rule in MME_RULES}, bare=unwrap_yes_or_no
)
