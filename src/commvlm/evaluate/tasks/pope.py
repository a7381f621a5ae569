"""POPE: yes/no questions about objects that are or are not in the image; accuracy in front, official rules.

Questions carry facts["set"] (random, popular, adversarial) where their files do. The sets are scored apart, as the
official code has it, and the figure in front is the mean of their accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from ..metrics import POPE_RULES, bootstrap, pope_answer, pope_scores, says_yes_or_no
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, Task, interval_in_percent, percent, unwrap_yes_or_no

SHARES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The official reading, "yes" or "no"; None where the answer says neither (officially that is a yes)."""
    bare = unwrap_yes_or_no(text)
    return pope_answer(bare) if says_yes_or_no(bare) else None


def score(records: Sequence[Record], *, rule: str) -> Score:
    sets = sorted({_set(record) for record in records})
    per_set = {name: _figures([record for record in records if _set(record) == name], rule) for name in sets}
    together = _figures(records, rule)
    value = sum(float(figures["accuracy"]) for figures in per_set.values()) / len(per_set)
    right = [float(POPE_RULES[rule](record.text) == record.answer) for record in records]
    error, interval = interval_in_percent(
        bootstrap(right, [record.cluster for record in records], groups=[_set(record) for record in records])
    )
    extra: dict[str, object] = {name: together[name] for name in SHARES}
    if sets != [""]:
        extra["per_set"] = per_set
    return Score(
        task="pope",
        metric="accuracy",
        rule=rule,
        value=value,
        standard_error=error,
        interval=interval,
        n=len(records),
        unparsable=int(together["unparsable"]),
        extra=extra,
        marks={record.id: mark for record, mark in zip(records, right, strict=True)},
    )


def _set(record: Record) -> str:
    return str(record.facts["set"]) if "set" in record.facts else ""


def _figures(records: Sequence[Record], rule: str) -> dict[str, float]:
    odd = next((record for record in records if record.answer not in ("yes", "no")), None)
    if odd is not None:
        raise ValueError(f"{odd.name}: the true answer is {odd.answer!r}, a POPE label must be yes or no")
    scores = pope_scores([record.text for record in records], [record.answer for record in records], rule=rule)
    return {name: percent(value) if name in SHARES else value for name, value in asdict(scores).items()}


POPE = Task(
    name="pope",
    parse=parse,
    rules={rule: partial(score, rule=rule) for rule in POPE_RULES},
    bare=unwrap_yes_or_no,
    wrapped=("shikra",),
    whole=True,
)
