"""One file of predictions under every rule, and where the points go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .predictions import read_predictions
from .tasks import Record, Score, Task, as_it_is, task_named

EXAMPLES = 3
WRAPPED = "wrappers kept"
"""The default rule on the answers as they were given: what forgetting to take the wrapper off costs."""


@dataclass(frozen=True)
class Rescored:
    """A task under one rule. gained, lost: (id, answer, truth) of items that earn more or less than by the default rule.

    score is None where the rule cannot run here; `why` then says what it lacks.
    """

    task: str
    rule: str
    score: Score | None
    gained: tuple[tuple[str, str, str], ...] = ()
    lost: tuple[tuple[str, str, str], ...] = ()
    why: str = ""


def rescore(path: Path) -> list[Rescored]:
    """Every task of the file under all its rules, the default one first. Raises ValueError for a broken file."""
    records = sorted(read_predictions(path), key=lambda record: (record.task, record.id))
    if not records:
        raise ValueError(f"{path} holds no predictions: predict first")
    found: list[Rescored] = []
    for name in sorted({record.task for record in records}):
        found += _task(task_named(name), [record for record in records if record.task == name])
    return found


def _task(task: Task, records: Sequence[Record]) -> list[Rescored]:
    base = task.score(records)
    found = [Rescored(task.name, base.rule, base)]
    by_id = {record.id: record for record in records}
    for rule in [name for name in task.rules if name != base.rule]:
        try:
            score = task.score(records, rule=rule)
        except ValueError as error:
            found.append(Rescored(task.name, rule, None, why=str(error)))
            continue
        found.append(_compared(task, rule, base, score, by_id))
    if base.extra.get("unwrapped"):
        kept = task.score(records, bare=as_it_is)
        found.append(_compared(task, f"{base.rule}, {WRAPPED}", base, kept, by_id))
    return found


def _compared(task: Task, rule: str, base: Score, score: Score, records: Mapping[str, Record]) -> Rescored:
    shared = [id for id in score.marks if id in base.marks and id in records]
    gained = [id for id in shared if score.marks[id] > base.marks[id] + 1e-9]
    lost = [id for id in shared if score.marks[id] < base.marks[id] - 1e-9]
    shown = [tuple(_shown(records[id]) for id in ids) for ids in (gained, lost)]
    return Rescored(task.name, rule, score, gained=shown[0], lost=shown[1])


def _shown(record: Record) -> tuple[str, str, str]:
    truth = " / ".join(dict.fromkeys(record.references)) or record.answer
    return record.id, record.text, str(list(record.boxes[0])) if record.task == "rec" and record.boxes else truth


def rescored_table(rescored: Sequence[Rescored]) -> str:
    """Plain text: a line a rule, and below it some of the answers that it reads otherwise."""
    lines: list[str] = []
    base = 0.0
    for entry in rescored:
        if not lines or not any(line.startswith(f"{entry.task} ") for line in lines):
            lines.append(f"{entry.task} {'rule':<24} {'score':>9} {'change':>9}   items that earn more, less")
            base = entry.score.value if entry.score is not None else 0.0
        if entry.score is None:
            lines.append(f"  {entry.rule:<26} {'-':>9}             {entry.why}")
            continue
        change = entry.score.value - base
        lines.append(
            f"  {entry.rule:<26} {entry.score.value:>9.2f} {change:>+9.2f}   {len(entry.gained)}, {len(entry.lost)}"
        )
        for word, items in (("more", entry.gained), ("less", entry.lost)):
            for id, text, truth in items[:EXAMPLES]:
                lines.append(f"      {word}: {id}: {_short(text)} (true: {_short(truth)})")
    return "\n".join(lines)


def _short(text: str) -> str:
    line = repr(" ".join(text.split()))
    return line if len(line) <= 60 else f"{line[:57]}..."
