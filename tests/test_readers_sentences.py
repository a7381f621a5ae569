"""Readers of sentences with places: Shikra's own files, VCR."""

import json

import pytest
from test_readers_places import put

from commvlm.data.readers import read


def lines(tmp_path, format, rows, **options):
    return read(format, images=tmp_path, annotations=put(tmp_path / "lines.jsonl", rows), **options)


def test_shikras_sentences_without_a_marked_phrase(tmp_path):
    row = {"id": "1_0", "image_id": "1", "boxes": [], "boxes_seq": [], "sentence": "Nobody is there."}
    (example,) = lines(tmp_path, "shikra-spotting", [row])
    assert (example.turns[0].answer, example.turns[0].answer_boxes) == ("Nobody is there.", ())


def test_shikras_spotting(tmp_path):
    row = {
        "id": 1, "image_id": "1000092795", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 9, 9]],
        "sentence": "<ph_st>Two guys<ph_ed> with {} <ph_st>hair<ph_ed> .", "boxes_seq": [[0, 2], [1]],
    }  # fmt: skip
    (example,) = lines(tmp_path, "shikra-spotting", [row])
    (turn,) = example.turns
    assert turn.answer == "Two guys <boxes> with {} hair <boxes> ."
    assert turn.answer_boxes == (((1, 2, 3, 4), (0, 0, 9, 9)), ((5, 6, 7, 8),))
    assert example.references == ("Two guys with {} hair .",)
    assert example.image == tmp_path / "1000092795.jpg"
    for change in (
        {"boxes_seq": 3},
        {"boxes_seq": [[0]]},
        {"boxes_seq": [[0], [3]]},
        {"boxes_seq": [[0], []]},
        {"boxes": [[1, 2, 3]]},
    ):
        with pytest.raises(ValueError, match=r"^lines\.jsonl:2: has"):
            lines(tmp_path, "shikra-spotting", [row, row | change])


def test_shikra_rd(tmp_path):
    row = {
        "img_path": "a.jpg", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "question": "What is <ph_st>he<ph_ed> holding?",
        "question_boxes_seq": [[0]], "answer": "A cup.", "cot_with_ans": "<ph_st>He<ph_ed> holds <ph_st>a cup<ph_ed>.",
        "answer_boxes_seq": [[0], [1]],
    }  # fmt: skip
    (both,) = lines(tmp_path, "shikra-rd", [row])
    assert (both.task, both.turns[0].question) == ("grounded-cot", "What is he <boxes> holding?")
    assert both.turns[0].answer == "He <boxes> holds a cup <boxes>."
    assert both.turns[0].answer_boxes == (((1, 2, 3, 4),), ((5, 6, 7, 8),))
    (reason,) = lines(tmp_path, "shikra-rd", [row], answer="c")
    assert (reason.task, reason.turns[0].answer, reason.turns[0].answer_boxes) == ("cot", "He holds a cup.", ())
    (short,) = lines(tmp_path, "shikra-rd", [row], answer="a")
    assert (short.task, short.turns[0].answer) == ("vqa", "A cup.")
    plain = row | {"question": "What?", "question_boxes_seq": None}
    assert lines(tmp_path, "shikra-rd", [plain])[0].turns[0].question_boxes == ()


def test_shikras_places(tmp_path):
    row = {
        "file_path": "VG_100K/1.jpg",
        "question": "What is this?",
        "answer": "cup",
        "bbox": [1, 2, 3, 4],
        "point": [2, 3],
    }
    (box,) = lines(tmp_path, "shikra-pointqa-local", [row])
    (point,) = lines(tmp_path, "shikra-pointqa-local", [row], by="point")
    assert (box.turns[0].question, box.turns[0].question_boxes) == ("What is this? <boxes>", (((1, 2, 3, 4),),))
    assert (point.turns[0].question, point.turns[0].question_points) == ("What is this? <points>", (((2, 3),),))
    assert (box.image, box.references) == (tmp_path / "VG_100K" / "1.jpg", ("cup",))
    either = lines(tmp_path, "shikra-pointqa-local", [row] * 60, by="either")
    points = sum(example.facts["by"] == "point" for example in either)
    assert 15 < points < 45
    assert all(("<points>" in e.turns[0].question) == (e.facts["by"] == "point") for e in either)
    assert either == lines(tmp_path, "shikra-pointqa-local", [row] * 60, by="either")
    twice = row | {"obj_question": "o?", "super_question": "s?", "general_question": "g?", "answer": 2}
    asked = [lines(tmp_path, "shikra-pointqa-twice", [twice], asked=a)[0].turns[0] for a in ("obj", "super", "general")]
    assert [t.question for t in asked] == ["o? <boxes>", "s? <boxes>", "g? <boxes>"]
    assert asked[0].answer == "2"
    candidates = [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5], [6, 6, 8, 8]]
    v7w = {
        "file_path": "v7w_1.jpg",
        "question": "Which?",
        "candidates": candidates,
        "answer": [6, 6, 8, 8],
        "point": [7, 7],
    }
    (example,) = lines(tmp_path, "shikra-v7w", [v7w])
    assert example.turns[0].question_boxes[example.facts["answer_index"]] == ((6, 6, 8, 8),)
    assert sorted(b[0] for b in example.turns[0].question_boxes) == [tuple(c) for c in candidates]
    assert lines(tmp_path, "shikra-v7w", [v7w], by="point")[0].turns[0].answer_points == (((7, 7),),)
    with pytest.raises(ValueError, match="which is 0 of its candidates"):
        lines(tmp_path, "shikra-v7w", [v7w | {"answer": [6, 6, 8, 9]}])


def test_vcr(tmp_path):
    row = {
        "img_fn": "movie/a.jpg", "boxes": [[1, 2, 3, 4, 0.9], [5, 6, 7, 8, 0.8]],
        "question": ["Why", "is", [0], "sad", "?"],
        "answer_choices": [["no"], ["as", [0, 1], "fell"], ["x"], ["y"]],
        "rationale_choices": [["r0"], ["r1", [1]], ["r2"], ["r3"]], "answer_label": 1, "rationale_label": 1,
    }  # fmt: skip
    first, second = (1, 2, 3, 4), (5, 6, 7, 8)
    (plain,) = lines(tmp_path, "vcr", [row], view="q-ra")
    assert (plain.turns[0].question, plain.turns[0].answer) == ("Why is <boxes> sad ?", "r1 <boxes> as <boxes> fell")
    assert plain.turns[0].answer_boxes == ((second,), (first, second))
    (chosen,) = lines(tmp_path, "vcr", [row])
    assert chosen.turns[0].question == "Why is <boxes> sad ?\nOptions: (A) no (B) as <boxes> fell (C) x (D) y"
    assert chosen.turns[0].answer == "r1 <boxes> as <boxes> fell The answer is (B)."
    (reason,) = lines(tmp_path, "vcr", [row], view="qac-r")
    assert reason.turns[0].question == (
        "Why is <boxes> sad ?\nAnswer: as <boxes> fell\nReasons: (A) r0 (B) r1 <boxes> (C) r2 (D) r3"
    )
    assert reason.turns[0].answer == "The answer is (B)."
    assert (plain.task, reason.references, reason.image) == ("vcr", ("B",), tmp_path / "movie" / "a.jpg")
    own = {name: value for name, value in row.items() if name != "boxes"} | {"metadata_fn": "movie/a.json"}
    with pytest.raises(ValueError, match=r"lines.jsonl:1: has no boxes, and its metadata_fn movie/a.json is not among"):
        lines(tmp_path, "vcr", [own])
    (tmp_path / "movie").mkdir()
    (tmp_path / "movie" / "a.json").write_text(json.dumps({"boxes": row["boxes"], "names": ["person", "dog"]}))
    assert lines(tmp_path, "vcr", [own], view="q-ra")[0].turns == plain.turns
    with pytest.raises(ValueError, match="is not inside the folder of images"):
        lines(tmp_path, "vcr", [own | {"metadata_fn": "../a.json"}])
    for change in ({"answer_label": 4}, {"question": ["Why", [2]]}, {"question": "Why"}, {"boxes": [[1, 2, 3]]}):
        with pytest.raises(ValueError, match=r"^lines\.jsonl:1: has"):
            lines(tmp_path, "vcr", [row | change])
