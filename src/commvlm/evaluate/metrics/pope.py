"""POPE: does the model see objects that are not there? Follows https://github.com/AoiDragon/POPE (evaluate.py).

Rules are readings of an answer:

official    the text before the first ".", commas removed, split at single spaces; "No", "no" or "not" among the words means
            no, **anything else means yes**: "NO", "no" followed by a line break, "nope", "There isn't one" and the empty
            answer all count as yes, and "Yes, no doubt" as no. LLaVA's script reads the same.
strict      exactly yes or no, in any case, spaces around it and one closing full stop forgiven; anything else is wrong.
shikra      the wrapper "The answer is X." or "Answer: X" exactly once, and X exactly yes or no.
lmms-eval   exactly yes or no, in any case. Its recall leaves answers that say neither out of its denominator, and its
            yes-ratio is that of the labels: a bug, followed and named.
vlmevalkit  yes or no among the words without punctuation, and not both.

Unlike the official script, a precision, recall or F1 with nothing in its denominator is 0 instead of a crash, and the
answers that say neither yes nor no are counted beside the scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .vqa import punctuation_with_lookbehind

_WORD = re.compile(r"[a-z']+")
_WRAPPED = re.compile(r"(?:(?:So t|T|t)he answer is|Answer:) (.+)")


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


def yes_or_no_exactly(text: str) -> str | None:
    """The strict reading; None for anything but a yes or a no."""
    return _plain(text.strip().removesuffix("."))


def yes_or_no_among_words(text: str) -> str | None:
    """VLMEvalKit's reading (YOrN_Extraction); None where the words hold neither or both."""
    found = {"yes", "no"} & set(punctuation_with_lookbehind(text.lower()).split())
    return found.pop() if len(found) == 1 else None


def _wrapped(text: str) -> str | None:
    found = _WRAPPED.findall(text)
    bare = found[0].strip().rstrip(".").strip() if len(found) == 1 else ""
    return bare if bare in ("yes", "no") else None


def _plain(text: str) -> str | None:
    word = text.strip().lower()
    return word if word in ("yes", "no") else None


POPE_RULES: dict[str, Callable[[str], str | None]] = {
    "official": pope_answer,
    "strict": yes_or_no_exactly,
    "shikra": _wrapped,
    "lmms-eval": _plain,
    "vlmevalkit": yes_or_no_among_words,
}


def says_yes_or_no(text: str) -> bool:
    """Whether a reader would find a yes, a no or a not anywhere in the answer, whatever its case and punctuation."""
    return bool({"yes", "no", "not"} & set(_WORD.findall(text.lower())))


def readable(text: str, *, rule: str = "official") -> bool:
    """Whether the answer says yes or no at all: what its rule reads, or, officially (where silence is a yes), a reader."""
    return says_yes_or_no(text) if rule == "official" else POPE_RULES[rule](text) is not None


def pope_scores(answers: Sequence[str], labels: Sequence[str], *, rule: str = "official") -> PopeScores:
    """Raw answers and their labels ("yes" or "no"), in the same order -> POPE's five figures.

    Raises ValueError for an unknown rule, when there are none, when the numbers differ, or for a label that is neither.
    """
    if rule not in POPE_RULES:
        raise ValueError(f"POPE has no rule {rule!r}: choose one of {', '.join(POPE_RULES)}")
    if len(answers) != len(labels):
        raise ValueError(f"POPE needs one answer per label, got {len(answers)} answers and {len(labels)} labels")
    if not answers:
        raise ValueError("POPE has nothing to score: no answers were given")
    odd = next((k for k, label in enumerate(labels) if label not in ("yes", "no")), None)
    if odd is not None:
        raise ValueError(f"POPE label {odd + 1} is {labels[odd]!r}, it must be yes or no")
    said = [POPE_RULES[rule](text) for text in answers]
    pairs = list(zip(said, labels, strict=True))
    hits, alarms = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    positives = hits + pairs.count(("no", "yes")) if rule == "lmms-eval" else labels.count("yes")  # type: ignore[attr-defined]
    precision, recall = _share(hits, hits + alarms), _share(hits, positives)
    return PopeScores(
        accuracy=sum(s == t for s, t in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=(labels if rule == "lmms-eval" else said).count("yes") / len(pairs),  # type: ignore[attr-defined]
        n=len(pairs),
        unparsable=sum(not readable(text, rule=rule) for text in answers),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
