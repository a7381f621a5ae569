"""MME: two yes/no questions an image, 14 subtasks. Follows the official eval_tool (calculation.py).

The official reading: in lower case, exactly yes or no; failing that, the first four characters hold "yes" (first) or "no";
failing that it is "other", which is wrong. So "not ", "now", "know" and "none" are no, "eyes" is yes, and a wrapper
("The answer is yes.") is other: it must be taken off before. A subtask scores 100 accuracy + 100 acc+, where acc+ is the
share of images with both answers right; 200 at most. Perception sums ten subtasks, cognition four.

Rules: `official`; `lmms-eval` first strips blanks and every full stop, and takes a lone y or n; `vlmevalkit` looks for yes
or no among the words, not both; `strict` as for POPE.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from .pope import yes_or_no_among_words, yes_or_no_exactly

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)


@dataclass(frozen=True)
class MmeScores:
    """acc, acc_plus in percent; score is their sum, 0 to 200. n questions; other: answers read as neither yes nor no."""

    acc: float
    acc_plus: float
    score: float
    n: int
    other: int


def mme_answer(text: str) -> str | None:
    """The official reading: "yes", "no", or None for "other"."""
    said = text.lower()
    return said if said in ("yes", "no") else _beginning(said)


def _lmms_answer(text: str) -> str | None:
    said = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(said) if len(said) == 1 else mme_answer(said)


def _beginning(said: str) -> str | None:
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


MME_RULES: dict[str, Callable[[str], str | None]] = {
    "official": mme_answer,
    "lmms-eval": _lmms_answer,
    "vlmevalkit": yes_or_no_among_words,
    "strict": yes_or_no_exactly,
}


def mme_scores(
    answers: Sequence[str], labels: Sequence[str], images: Sequence[Hashable], *, rule: str = "official"
) -> MmeScores:
    """One subtask: answers, labels ("yes" or "no") and the image of each question.

    Raises ValueError for an unknown rule, when there are none, or when their numbers differ.
    """
    if rule not in MME_RULES:
        raise ValueError(f"MME has no rule {rule!r}: choose one of {', '.join(MME_RULES)}")
    if not answers or not len(answers) == len(labels) == len(images):
        raise ValueError(
            f"MME needs an answer, a label and an image for every question, got {len(answers)}, {len(labels)}, {len(images)}"
        )
    said = [MME_RULES[rule](text) for text in answers]
    right = [s == label for s, label in zip(said, labels, strict=True)]
    whole: dict[Hashable, bool] = {}
    for image, correct in zip(images, right, strict=True):
        whole[image] = whole.get(image, True) and correct
    acc, acc_plus = 100 * sum(right) / len(right), 100 * sum(whole.values()) / len(whole)
    return MmeScores(acc=acc, acc_plus=acc_plus, score=acc + acc_plus, n=len(right), other=said.count(None))
