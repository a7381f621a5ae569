"""POPE: does the model see objects that are not there? Follows https://github.com/AoiDragon/POPE (evaluate.py).

The official reading of an answer, oddities included: the text before the first ".", commas removed, split at single
spaces; "No", "no" or "not" among the words means no, **anything else means yes**: "NO", "no" followed by a line break,
"nope", "There isn't one" and the empty answer all count as yes, and "Yes, no doubt" as no.
Unlike the official script, a precision, recall or F1 with nothing in its denominator is 0 instead of a crash, and the
answers that say neither yes nor no are counted beside the scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True)
class PopeScores:
    """Shares in [0, 1]; "yes" is the positive class. yes_ratio is that of the predictions, not of the labels."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    n: int
    unparsable: int


def pope_answer(text: str) -> str:
    """The official reading of an answer: "no" or, failing that, "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Whether a reader would find a yes, a no or a not anywhere in the answer, whatever its case and punctuation."""
    return bool({"yes", "no", "not"} & set(_WORD.findall(text.lower())))


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """Raw answers and their labels ("yes" or "no"), in the same order -> POPE's five figures.

    Raises ValueError when there are none, when the numbers differ, or for a label that is neither.
    """
    if len(answers) != len(labels):
        raise ValueError(f"POPE needs one answer per label, got {len(answers)} answers and {len(labels)} labels")
    if not answers:
        raise ValueError("POPE has nothing to score: no answers were given")
    odd = next((k for k, label in enumerate(labels) if label not in ("yes", "no")), None)
    if odd is not None:
        raise ValueError(f"POPE label {odd + 1} is {labels[odd]!r}, it must be yes or no")
    said = [pope_answer(text) == "yes" for text in answers]
    true = [label == "yes" for label in labels]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    right = sum(s == t for s, t in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    return PopeScores(
        accuracy=right / len(said),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=sum(said) / len(said),
        n=len(said),
        unparsable=sum(not says_yes_or_no(text) for text in answers),
    )
