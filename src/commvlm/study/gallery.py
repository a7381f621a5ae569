"""Answers of COMM as the report shows them: drawn by lot, and its failures, the controls' answers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..app.showcase import Shown, choose, failures, show
from ..evaluate.predictions import read_predictions
from ..evaluate.tasks import Record
from .results import Results
from .rows import comm, pair, single_name
from .runs import Places
from .settings import Scale

FAILURES = {"rec": 6, "vqa": 3, "pope": 3}
"""How many of the failures are of each task; the others' answers are not right or wrong."""


@dataclass(frozen=True)
class Gallery:
    """by_lot: of all questions. failed: of those that were answered wrongly. wrong, asked: how many those are, and of how
    many."""

    by_lot: list[Shown]
    failed: list[Shown]
    wrong: int
    asked: int


def gallery(places: Places, results: Results, scale: Scale) -> Gallery:
    """Of the whole model's first seed; empty where its answers are not in this folder."""
    main, lasts = comm(scale).name, [single_name(given, given.last) for given in pair(scale)]
    beside = [name for name in results.rows if name != main and (name.startswith("COMM") or name in lasts)]
    answers = {name: _answers(places, results, name) for name in [main, *beside]}
    others = {name: found for name, found in answers.items() if name != main and found}
    wrong = failures({task: answers[main].get(task, []) for task in FAILURES})

    def shown(records: Sequence[Record]) -> list[Shown]:
        found = [show(record, others, images=places.root / "world" / "images") for record in records]
        return [picture for picture in found if picture is not None]

    return Gallery(
        by_lot=shown(choose(answers[main])),
        failed=shown(choose(wrong, shares=FAILURES)),
        wrong=sum(map(len, wrong.values())),
        asked=sum(len(answers[main].get(task, ())) for task in FAILURES),
    )


def _answers(places: Places, results: Results, name: str) -> dict[str, list[Record]]:
    """A row's answers by task, of its first seed. Their ids begin with their set, since two sets may share one."""
    runs = results.of_row(name) if name in results.rows else {}
    by_task: dict[str, list[Record]] = {}
    for path in sorted((places.run(runs[min(runs)]["key"]) / "predictions").glob("*.jsonl")) if runs else ():
        for record in read_predictions(path):
            by_task.setdefault(record.task, []).append(replace(record, id=f"{path.stem} {record.id}"))
    return by_task
