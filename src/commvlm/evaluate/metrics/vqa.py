"""VQA accuracy, bugs included. Follows https://github.com/GT-Vision-Lab/VQA (PythonEvaluationTools, vqaEval.py).

An answer's accuracy is the mean over the ten annotators of min(1, matches among the other nine / 3): 0, .3, .6, .9, 1
for 0, 1, 2, 3 and at least 4 matches. What the official code does on the way, and we with it:

- unanimous questions (about a third of VQAv2) skip all normalisation: there "Yes" or "yes." scores 0 against "yes";
- a punctuation mark is deleted when it stands beside a space anywhere in the text, or when the text has a comma between
  digits; otherwise it becomes a space ("t-shirt" -> "t shirt");
- the pattern for full stops has a broken lookbehind that always holds, so "3." loses its stop and only a stop before
  a digit stays ("3.5"); and since a flag is passed in the place of a count, only the first 32 stops go;
- the table of contractions maps "somebody'd" to "somebodyd", the wrong way round; its entries with a capital I can
  never match, the text being in lower case by then (they are left out here).

Rules:

official    the code since 2021 (commit a013f00).
pre2021     the code before (a4f1afd): the prediction always normalised, of the annotators' answers only the punctuation,
            when they are not unanimous.
evalai      the processor of mmf, which LLaVA's scripts took over: everything always normalised, in lower case, with "," and
            "?" deleted and "'s" parted from its word first.
lmms-eval   that processor on the prediction, but the official unanimous shortcut on the annotators' answers.
vlmevalkit  everything always normalised, with a lookbehind that works: "3." keeps its stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

FEWEST = 4
"""With fewer annotators than this no answer could reach accuracy 1."""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_STOP_WITH_LOOKBEHIND = re.compile(r"(?<!\d)\.(?!\d)")
_STOPS_REMOVED = 32
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(k) for k, word in enumerate(_DIGITS.split())}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))
_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each form that lacks one of its apostrophes -> the whole form."""
    table = {}
    for whole in _APOSTROPHES.split():
        for at, letter in enumerate(whole):
            if letter == "'":
                table[whole[:at] + whole[at + 1 :]] = whole
    table["somebody'd"] = "somebodyd"
    return table


CONTRACTIONS = _contractions()


def _punctuation(text: str, stop: re.Pattern[str] = _STOP) -> str:
    result = text
    for mark in _MARKS:
        lone = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        result = result.replace(mark, "" if lone else " ")
    return stop.sub("", result, count=_STOPS_REMOVED)


def punctuation_with_lookbehind(text: str) -> str:
    """VLMEvalKit's punctuation: as officially, but a full stop behind a digit stays."""
    return _punctuation(text, _STOP_WITH_LOOKBEHIND)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """The official normal form: one line, punctuation, then digits, articles and contractions in lower case."""
    return _words(_punctuation(_one_line(text)))


def evalai_answer(text: str) -> str:
    """mmf's normal form (EvalAIAnswerProcessor)."""
    bare = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_one_line(bare)))


def _official(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    truths, said = [_one_line(answer) for answer in answers], _one_line(prediction)
    if len(set(truths)) == 1:
        return said, truths
    return _words(_punctuation(said)), [_words(_punctuation(truth)) for truth in truths]


def _pre2021(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    unanimous = len(set(answers)) == 1
    return normalise_answer(prediction), [answer if unanimous else _punctuation(answer) for answer in answers]


def _lmms_eval(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    truths, said = [_one_line(answer) for answer in answers], evalai_answer(prediction)
    if len(set(truths)) == 1:
        return said, truths
    return _words(_punctuation(said)), [_words(_punctuation(truth)) for truth in truths]


def _always(normal: Callable[[str], str]) -> Callable[[str, Sequence[str]], tuple[str, list[str]]]:
    return lambda prediction, answers: (normal(prediction), [normal(answer) for answer in answers])


VQA_RULES: dict[str, Callable[[str, Sequence[str]], tuple[str, list[str]]]] = {
    "official": _official,
    "pre2021": _pre2021,
    "evalai": _always(evalai_answer),
    "lmms-eval": _lmms_eval,
    "vlmevalkit": _always(lambda text: _words(punctuation_with_lookbehind(_one_line(text)))),
}
"""Prediction and annotators' answers -> both as the rule compares them."""


def vqa_accuracy(prediction: str, answers: Sequence[str], *, rule: str = "official") -> float:
    """One prediction against its annotators' answers (ten in VQAv2 and OK-VQA) -> accuracy in [0, 1].

    Raises ValueError for an unknown rule, or for fewer than four answers, where nothing could score 1.
    """
    if len(answers) < FEWEST:
        raise ValueError(f"VQA accuracy needs the annotators' ten answers (at least {FEWEST}), got {len(answers)}")
    if rule not in VQA_RULES:
        raise ValueError(f"VQA has no rule {rule!r}: choose one of {', '.join(VQA_RULES)}")
    said, truths = VQA_RULES[rule](prediction, answers)
    matches = [truth == said for truth in truths]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(matches)
