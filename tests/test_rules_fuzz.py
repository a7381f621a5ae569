"""The yes/no and VQA rules on 10,000 odd strings, against a plain transcription of what the official rules say.

The transcriptions below are slow and literal on purpose: loops over characters and words, no shared code, no table made
by a formula.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache

import pytest

from commvlm.cli import main
from commvlm.evaluate.metrics import MME_RULES, POPE_RULES, SUBTASKS, vqa_accuracy

STRINGS = 10_000
WORDS = [
    "yes", "no", "Yes", "No", "NO", "YES", "not", "Not", "now", "know", "none", "nope", "eyes", "yesterday", "y", "n",
    "The answer is", "So the answer is", "the answer is", "Answer:", "a", "an", "the", "The", "two", "Ten", "zero", "one",
    "3", "3.", "3.5", ".5", "1,000", "1,2,3", "t-shirt", "dont", "isnt", "somebody'd", "Im", "Ive", "y'allll", "its", "it's",
    "man's", "'s", "red", "dark red", "and/or", "blue?", "(big)", "[0.1,0.2]", "e.g.", "U.S.A.", "...", "-", "--", ",", ".",
    "!", "?", ";", "`", "@", "\\", "\"", "{", "}", "<", ">", "=", "+", "_", "couldn'tve", "'ow's'at", "ow's'at", "oclock",
    "é", "不", "\u00a0", "\u2028", "<image>", "%",
]  # fmt: skip
GLUE = ["", " ", " ", " ", "  ", "\n", "\t", ". ", ", ", ".", ",", "-"]
TABLE = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't
hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm
Ive I've isnt isn't itd it'd itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't
mightnt've mightn't've mightn'tve mightn't've mightve might've mustnt mustn't mustve must've neednt needn't notve not've
oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've
she'dve she'd've she's she's shouldve should've shouldnt shouldn't shouldnt've shouldn't've shouldn'tve shouldn't've
somebody'd somebodyd somebodyd've somebody'd've somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's
someoned someone'd someoned've someone'd've someone'dve someone'd've someonell someone'll someones someone's
somethingd something'd somethingd've something'd've something'dve something'd've somethingll something'll thats that's
thered there'd thered've there'd've there'dve there'd've therere there're theres there's theyd they'd theyd've they'd've
they'dve they'd've theyll they'll theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve we'd've
weve we've werent weren't whatll what'll whatre what're whats what's whatve what've whens when's whered where'd
wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove who've
whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt wouldn't wouldnt've wouldn't've
wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've
y'all'dve y'all'd've youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve you've
"""
CONTRACTED = [word for line in TABLE.splitlines() for word in line.split()]
CONTRACTIONS = dict(zip(CONTRACTED[::2], CONTRACTED[1::2], strict=True))
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def odd_strings(number: int = STRINGS, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    made = ["", " ", "\n", "yes", "no", "Yes.", "No.", "no\n", ".", *CONTRACTIONS]
    while len(made) < number:
        words = [rng.choice(WORDS) if rng.random() < 0.85 else rng.choice(CONTRACTED) for _ in range(rng.randint(0, 6))]
        made.append("".join(word + rng.choice(GLUE) for word in words))
    return made[:number]


# --- POPE and MME by the letter of their rules ---


def pope_by_the_letter(text: str) -> str:
    dot = text.find(".")
    if dot >= 0:
        text = text[:dot]
    kept = "".join(letter for letter in text if letter != ",")
    words = kept.split(" ")
    for word in ("No", "not", "no"):
        if word in words:
            return "no"
    return "yes"


def mme_by_the_letter(text: str) -> str | None:
    text = text.lower()
    if text == "yes" or text == "no":
        return text
    start = text[0:4]
    if "yes" in start:
        return "yes"
    if "no" in start:
        return "no"
    return None


@pytest.mark.parametrize(("rules", "rule"), [(POPE_RULES, pope_by_the_letter), (MME_RULES, mme_by_the_letter)])
def test_yes_or_no(rules, rule):
    texts = odd_strings()
    said = [rules["official"](text) for text in texts]
    assert said == [rule(text) for text in texts]
    assert all(said.count(kind) > 100 for kind in set(said))


def test_pope_scores_of_odd_strings(tmp_path, capsys):
    """Through the command and its files: five figures counted one by one."""
    texts, rng = odd_strings(), random.Random(1)
    labels = [rng.choice(("yes", "no")) for _ in texts]
    asked, said = tmp_path / "asked.json", tmp_path / "said.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"question_id": k, "image": f"{k // 6}", "text": "?", "label": v}) + "\n"
            for k, v in enumerate(labels)
        )
    )
    said.write_text("".join(json.dumps({"question_id": k, "answer": text}) + "\n" for k, text in enumerate(texts)))
    assert main(["score", "pope", "--references", str(asked), "--predictions", str(said), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tp = fp = fn = tn = 0
    for text, label in zip(texts, labels, strict=True):
        answer = pope_by_the_letter(text)
        tp += answer == "yes" and label == "yes"
        fp += answer == "yes" and label == "no"
        fn += answer == "no" and label == "yes"
        tn += answer == "no" and label == "no"
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert found["accuracy"] == pytest.approx((tp + tn) / STRINGS, abs=1e-12)
    assert found["precision"] == pytest.approx(precision, abs=1e-12)
    assert found["recall"] == pytest.approx(recall, abs=1e-12)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)
    assert found["yes_ratio"] == pytest.approx((tp + fp) / STRINGS, abs=1e-12)
    assert found["n"] == STRINGS


def test_mme_scores_of_odd_strings(tmp_path, capsys):
    """14 files of result lines; pairs counted by hand."""
    texts = [text for text in odd_strings(17_000, seed=2) if "\t" not in text and "\n" not in text and "\r" not in text]
    texts = texts[: len(texts) // (2 * len(SUBTASKS)) * 2 * len(SUBTASKS)]
    assert len(texts) >= 10_000
    rng, per, totals = random.Random(3), len(texts) // len(SUBTASKS), {}
    for number, name in enumerate(SUBTASKS):
        rows, right = [], []
        for k, text in enumerate(texts[number * per : (number + 1) * per]):
            label = rng.choice(("Yes", "No"))
            rows.append(f"{k // 2}.jpg\tIs it so?\t{label}\t{text}\n")
            right.append(mme_by_the_letter(text + "\n") == label.lower())
        (tmp_path / f"{name}.txt").write_text("".join(rows), encoding="utf-8")
        both = [right[2 * k] and right[2 * k + 1] for k in range(per // 2)]
        totals[name] = 100 * sum(right) / per + 100 * sum(both) / (per // 2)
    assert main(["score", "mme", "--predictions", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perception"] == pytest.approx(sum(totals[name] for name in SUBTASKS[:10]), abs=1e-6)
    assert found["cognition"] == pytest.approx(sum(totals[name] for name in SUBTASKS[10:]), abs=1e-6)


# --- VQA by the letter of its rules ---

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]


@cache
def punctuation_by_the_letter(text: str) -> str:
    out = text
    for mark in MARKS:
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(\,)(\d)", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    kept, removed = "", 0
    for k, letter in enumerate(out):  # the broken lookbehind always holds; 32 is re.UNICODE, given as the count
        followed_by_digit = k + 1 < len(out) and re.match(r"\d", out[k + 1])
        if letter == "." and not followed_by_digit and removed < 32:
            removed += 1
        else:
            kept += letter
    return kept


@cache
def words_by_the_letter(text: str) -> str:
    kept = []
    for word in text.lower().split():
        if word in NUMBERS:
            word = NUMBERS[word]
        if word not in ("a", "an", "the"):
            kept.append(word)
    for k, word in enumerate(kept):
        if word in CONTRACTIONS:
            kept[k] = CONTRACTIONS[word]
    return " ".join(kept)


def line_by_the_letter(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@cache
def evalai_by_the_letter(text: str) -> str:
    text = text.lower()
    text = text.replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words_by_the_letter(punctuation_by_the_letter(line_by_the_letter(text)))


def accuracy_by_the_letter(said: str, truths: list[str]) -> float:
    each = []
    for i in range(len(truths)):
        matching = [j for j in range(len(truths)) if j != i and truths[j] == said]
        each.append(min(1, float(len(matching)) / 3))
    return float(sum(each)) / len(each)


def vqa_by_the_letter(said: str, answers: list[str], rule: str) -> float:
    said = line_by_the_letter(said) if rule != "evalai" else evalai_by_the_letter(said)
    if rule == "evalai":
        return accuracy_by_the_letter(said, [evalai_by_the_letter(answer) for answer in answers])
    if rule == "official":
        truths = [line_by_the_letter(answer) for answer in answers]
        if len(set(truths)) > 1:
            truths = [words_by_the_letter(punctuation_by_the_letter(truth)) for truth in truths]
            said = words_by_the_letter(punctuation_by_the_letter(said))
        return accuracy_by_the_letter(said, truths)
    said = words_by_the_letter(punctuation_by_the_letter(said))
    truths = list(answers)
    if len(set(truths)) > 1:
        truths = [punctuation_by_the_letter(truth) for truth in truths]
    return accuracy_by_the_letter(said, truths)


@pytest.mark.parametrize("rule", ["official", "pre2021", "evalai"])
def test_vqa(rule):
    """Annotators who say what was said, what it normalises to, and other things, in all proportions."""
    rng = random.Random(4)
    ours, theirs = [], []
    for text in odd_strings(seed=5):
        said = text if rng.random() < 0.5 else text.upper()
        same = [
            text,
            words_by_the_letter(punctuation_by_the_letter(text)),
            line_by_the_letter(text),
            evalai_by_the_letter(text),
        ]
        answers = [rng.choice(same) if rng.random() < 0.5 else rng.choice(WORDS) for _ in range(10)]
        if rng.random() < 0.3:
            answers = [rng.choice(same)] * 10
        ours.append(vqa_accuracy(said, answers, rule=rule))
        theirs.append(vqa_by_the_letter(said, answers, rule))
    assert ours == theirs
    assert 0.2 < sum(theirs) / len(theirs) < 0.97
    assert {round(value, 6) for value in theirs} == {0, 0.3, 0.6, 0.9, 1.0}
