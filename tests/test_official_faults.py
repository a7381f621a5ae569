"""What is wrong with answers in the official formats: one line, and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_official import REFS, lines, refer_files, whole

from commvlm.evaluate.metrics import cider_d
from commvlm.evaluate.official import write_official
from commvlm.evaluate.tasks import Record

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
def test_faults_of_pope_predictions(refused_score, tmp_path, damage, said):
    references = lines(tmp_path / "refs.jsonl", QUESTIONS)
    line = refused_score(
        "pope", "--references", references, "--predictions", lines(tmp_path / "said.jsonl", damage(ANSWERS))
    )
    assert re.search(said, line), line


def test_pope_answers_without_ids_are_paired_by_line(figures, refused_score, tmp_path):
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
        assert text in refused_score(*argv, lines(tmp_path / "said.jsonl", answers))


def test_faults_of_pope_references(refused_score, tmp_path):
    predictions = lines(tmp_path / "said.jsonl", ANSWERS)
    argv = ["--predictions", predictions, "--references"]
    assert "there is no such annotation file" in refused_score("pope", *argv, tmp_path / "gone.jsonl")
    assert "has no label" in refused_score("pope", *argv, predictions)
    doubled = lines(tmp_path / "refs.jsonl", [*QUESTIONS, QUESTIONS[1]])
    assert "refs.jsonl:4: has question_id 12 a second time" in refused_score("pope", *argv, doubled)
    odd = lines(tmp_path / "refs.jsonl", [QUESTIONS[0] | {"label": "maybe"}])
    assert "has label 'maybe'" in refused_score("pope", *argv, odd)
    assert "no rule 'lenient': choose one of official, strict" in refused_score(
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
def test_faults_of_vqa_results(refused_score, tmp_path, rows, said):
    assert said in refused_score(*vqa_files(tmp_path), whole(tmp_path / "r.json", rows))


def test_vqa_files_must_belong_together(refused_score, tmp_path):
    argv = vqa_files(tmp_path)
    whole(tmp_path / "q.json", {"questions": [{"question_id": 7, "question": "?"}]})
    results = whole(tmp_path / "r.json", [{"question_id": 1, "answer": "red"}])
    assert "a.json: question_id 1 (and 1 more) is not in q.json" in refused_score(*argv, results)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"image_id": 1, "caption": "a cat"}], "has no prediction for image_id 2 of refs.json"),
        ([{"image_id": k, "caption": "a cat"} for k in (1, 2, 1)], "entry 2 has image_id 1 a second time"),
        ([{"image_id": k, "caption": "a cat"} for k in (1, 2, 5)], "image_id 5 is not in refs.json"),
        ([{"image_id": 1}], "entry 0 has no caption"),
    ],
)
def test_faults_of_captions(refused_score, tmp_path, rows, said):
    annotations = [{"id": k, "image_id": 1 + k % 2, "caption": "a cat on a mat"} for k in range(4)]
    references = whole(tmp_path / "refs.json", {"images": [{"id": 1}, {"id": 2}], "annotations": annotations})
    argv = ["caption", "--rule", "approximate", "--references", references, "--predictions"]
    assert said in refused_score(*argv, whole(tmp_path / "r.json", rows))


def test_a_caption_of_an_unknown_image_in_the_references(refused_score, tmp_path):
    references = whole(
        tmp_path / "refs.json", {"images": [{"id": 1}], "annotations": [{"image_id": 9, "caption": "a"}]}
    )
    results = whole(tmp_path / "r.json", [{"image_id": 1, "caption": "a"}])
    assert "has image_id 9, which is not among" in refused_score(
        "caption", "--references", references, "--predictions", results
    )


def test_captions_of_a_subset(figures, refused_score, tmp_path):
    annotations = [{"id": k, "image_id": k % 3, "caption": f"a cat on mat {k}"} for k in range(6)]
    references = whole(tmp_path / "refs.json", {"annotations": annotations})
    results = whole(tmp_path / "r.json", [{"image_id": k, "caption": f"a cat on mat {k}"} for k in (0, 2)])
    argv = ["caption", "--rule", "approximate", "--references", references, "--predictions", results]
    assert "has no prediction for image_id 1" in refused_score(*argv)
    found = figures(*argv, "--subset")
    assert found["n"] == 2
    assert (found["bleu4"], found["rouge_l"]) == (None, None)
    expected = cider_d(
        ["a cat on mat 0", "a cat on mat 2"],
        [["a cat on mat 0", "a cat on mat 3"], ["a cat on mat 2", "a cat on mat 5"]],
    )
    assert found["cider"] == pytest.approx(expected.corpus)


def test_captions_without_the_extra(refused_score, tmp_path, monkeypatch):
    from commvlm.evaluate.metrics import tokenizers

    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    references = whole(tmp_path / "refs.json", {"annotations": [{"image_id": 1, "caption": "a"}]})
    results = whole(tmp_path / "r.json", [{"image_id": 1, "caption": "a"}])
    assert "commvlm[caption]" in refused_score("caption", "--references", references, "--predictions", results)


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
def test_faults_of_mme_files(refused_score, tmp_path, text, said):
    assert said in refused_score("mme", "--predictions", mme_folder(tmp_path / "r", count=text))


def test_a_missing_mme_file(refused_score, tmp_path):
    folder = mme_folder(tmp_path / "r")
    (folder / "OCR.txt").unlink()
    assert "has no OCR.txt; MME needs all 14 files" in refused_score("mme", "--predictions", folder)
    assert "no such folder" in refused_score("mme", "--predictions", tmp_path / "gone")


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
def test_faults_of_rec_predictions(refused_score, tmp_path, rows, said):
    references = lines(tmp_path / "refs.jsonl", REFS)
    assert said in refused_score(
        "rec", "--references", references, "--predictions", lines(tmp_path / "said.jsonl", rows)
    )


def test_images_without_a_size(refused_score, tmp_path):
    argv = ["rec", *refer_files(tmp_path), "--instances", tmp_path / "instances.json"]
    argv += ["--predictions", lines(tmp_path / "said.jsonl", [{"id": 0, "box": [0, 0, 1, 1]}])]
    content = json.loads((tmp_path / "instances.json").read_text())
    for size, said in (({}, "(None, None)"), ({"width": 640, "height": 0}, "(640, 0)")):
        content["images"] = [{"id": 1, "file_name": "a.jpg", **size}]
        whole(tmp_path / "instances.json", content)
        assert f"instances.json: image 1 has width and height {said}; REC needs both" in refused_score(*argv)
    references = lines(tmp_path / "refs.jsonl", [REFS[0] | {"width": 10**400}])
    argv = ["rec", "--references", references, "--predictions", tmp_path / "said.jsonl"]
    assert "refs.jsonl:1: has width and height (1000000" in refused_score(*argv)


def test_two_expressions_for_one_object(refused_score, tmp_path):
    references = whole(tmp_path / "refs.json", [{"ref_id": 5, "sentences": [{"sent": "a cup"}]}])
    said = whole(tmp_path / "r.json", {"predictions": [{"ref_id": 5, "sent": "a cup"}, {"ref_id": 5, "sent": "cups"}]})
    line = refused_score("reg", "--references", references, "--predictions", said)
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
