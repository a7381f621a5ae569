"""The report's figures beyond scores.json: scores of subsets, the constant answer, and what may be said of a difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import hypot
from statistics import mean

from ..data.boxes import DECIMALS, PadSquare
from ..evaluate.scores import cell
from ..evaluate.tasks import Record, Score, task_named

DETAILS = {"pope": ("set", "POPE"), "vqa": ("question_type", "VQA")}
"""task -> the fact that its questions are grouped by, and the task's name in a heading."""
POPE_SETS = ("random", "popular", "adversarial")
"""In POPE's own order, from the easiest."""
BLIND = "blind"

Records = Mapping[str, Sequence[Record]]
"""A task's predictions, by task."""


def detail_scores(records: Records) -> dict[str, Score]:
    """Heading -> score of one group of questions: POPE's sets and VQA's types, each by its task's own rule."""
    scores = {}
    for task, (fact, title) in DETAILS.items():
        groups: dict[str, list[Record]] = {}
        for record in records.get(task, ()):
            if fact in record.facts:
                groups.setdefault(str(record.facts[fact]), []).append(record)
        for name in sorted(groups, key=lambda name: (POPE_SETS.index(name) if name in POPE_SETS else 0, name)):
            scores[f"{title} {name}"] = task_named(task).score(groups[name])
    return scores


def constant_answers(records: Records) -> dict[str, list[Record]]:
    """The same questions with one answer to all of a kind, taken from their own truths: the best of the constants for
    POPE (the more frequent label) and VQA (the most frequent answer of each question type), the mean true box for REC.
    No such answer is defined for sentences."""
    chosen = {task: list(records[task]) for task in ("rec", "pope", "vqa") if records.get(task)}
    return {task: [replace(r, text=_constant(found)[_kind(r)]) for r in found] for task, found in chosen.items()}


def chance_scores(records: Records) -> dict[str, Score]:
    """The scores of `constant_answers`."""
    return {task: task_named(task).score(found) for task, found in constant_answers(records).items()}


def _kind(record: Record) -> str:
    return str(record.facts.get("question_type", "")) if record.task == "vqa" else ""


def _constant(records: Sequence[Record]) -> dict[str, str]:
    """Kind of question -> its answer."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_kind(record), []).append(record)
    if records[0].task == "rec":
        return {kind: _mean_box(found) for kind, found in groups.items()}
    return {kind: Counter(record.answer for record in found).most_common(1)[0][0] for kind, found in groups.items()}


def _mean_box(records: Sequence[Record]) -> str:
    """The mean of each corner over the true boxes, in the padded square, as an answer's text."""
    boxes = [PadSquare(r.width, r.height).forward(box) for r in records if r.width and r.height for box in r.boxes]
    return f"[{','.join(f'{mean(corner):.{DECIMALS}f}' for corner in zip(*boxes, strict=True))}]"


def sentences(scores: Mapping[str, Mapping[str, Score]], *, main: str, titles: Mapping[str, str]) -> list[str]:
    """One sentence a task on `main` against blind, and one on it against every other run; worded by the numbers."""
    texts = []
    for task, title in titles.items():
        own = scores[main].get(task)
        if own is None:
            continue
        parts = []
        blind = scores.get(BLIND, {}).get(task)
        if blind is not None:
            parts.append(_against_blind(main, title, own, blind))
        rivals = [(label, s[task]) for label, s in scores.items() if label not in (main, BLIND) and task in s]
        parts += [_against(main, own, label, rival) for label, rival in rivals]
        texts.append(" ".join(parts))
    return texts


def apart(a: Score, b: Score) -> float | None:
    """How many standard errors of their difference a lies above b; None where a score has no standard error.

    The runs answered the same questions, so the true error of the difference is, if anything, smaller.
    """
    if a.standard_error is None or b.standard_error is None:
        return None
    error = hypot(a.standard_error, b.standard_error)
    if error == 0:
        return 0.0 if a.value == b.value else float("inf") * (1 if a.value > b.value else -1)
    return (a.value - b.value) / error


def _against_blind(main: str, title: str, own: Score, blind: Score) -> str:
    distance = apart(own, blind)
    figures = f"{cell(own)} on {title} against {cell(blind)} blind"
    if distance is None:
        return f"{main} is at {figures}; with fewer than two images there is no standard error to judge that by."
    if distance > 2:
        return f"{main} is at {figures}."
    if distance < -2:
        return f"{main} is below blind: {figures}."
    return f"{main} stays at blind level: {figures}, within two standard errors."


def _against(main: str, own: Score, label: str, rival: Score) -> str:
    distance = apart(own, rival)
    if distance is None or abs(distance) <= 2:
        return f"{main} and {label} ({cell(rival)}) do not differ by more than two standard errors."
    side = "above" if distance > 0 else "below"
    return f"{main} is {abs(own.value - rival.value):.1f} {side} {label} ({cell(rival)})."
