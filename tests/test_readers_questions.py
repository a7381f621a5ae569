"""Readers of questions and captions: OK-VQA, MME, Karpathy, Shikra's VQA files; long lists; faults that are counted."""

import json
from pathlib import Path

import pytest

from commvlm.data.readers import Faults, files, read, stream

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")
POPE = {"question_id": 1, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "yes"}


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_ok_vqa(tmp_path):
    """No multiple_choice_answer; `answer` is stemmed and scored, `raw_answer` is not."""
    answers = [
        {"answer_id": n, "answer": a, "raw_answer": a + "ing"} for n, a in enumerate(["race"] * 4 + ["ride"] * 6)
    ]
    annotation = {"image_id": 7, "question_id": 75, "question_type": "four", "answer_type": "other", "answers": answers}
    asked = {"data_subtype": "val2014", "questions": [{"image_id": 7, "question_id": 75, "question": "What sport?"}]}
    paths = {
        "questions": put(tmp_path / "OpenEnded_mscoco_val2014_questions.json", asked),
        "annotations": put(tmp_path / "mscoco_val2014_annotations.json", {"annotations": [annotation]}),
    }
    (example,) = read("ok-vqa", images=tmp_path, **paths)
    assert (example.turns[0].question, example.turns[0].answer) == ("What sport?", "ride")
    assert example.references == ("race",) * 4 + ("ride",) * 6
    assert example.facts == {"question_id": 75, "image_id": 7, "question_type": "four", "answer_type": "other"}
    assert example.image.name == "COCO_val2014_000000000007.jpg"


@samples
def test_the_real_ok_vqa_annotation(tmp_path):
    path = SAMPLES / "ok_vqa" / "annotation_partial_example.json"
    asked = {
        "data_subtype": "train2014",
        "questions": [{"image_id": 51606, "question_id": 516065, "question": "What?"}],
    }
    questions = put(tmp_path / "q.json", asked)
    (example,) = read("ok-vqa", images=tmp_path, questions=questions, annotations=path)
    assert (example.turns[0].answer, example.facts["question_type"]) == ("pony tail", "four")


def test_a_test_set_without_answers(tmp_path):
    asked = {"data_subtype": "test-dev2015", "questions": [{"image_id": 7, "question_id": 75, "question": "What?"}]}
    (example,) = read("vqa", images=tmp_path, questions=put(tmp_path / "q.json", asked))
    assert (example.turns[0].answer, example.references) == ("", ())
    assert example.image.name == "COCO_test2015_000000000007.jpg"


def mme(root, rows="Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n"):
    put(root / "color" / "000000006040.txt", rows)
    (root / "color" / "000000006040.jpg").touch()
    put(root / "artwork" / "questions_answers_YN" / "10.txt", rows)
    (root / "artwork" / "images").mkdir(parents=True)
    (root / "artwork" / "images" / "10.png").touch()
    return root


def test_mme_folders(tmp_path):
    """Both kinds of folder; the two questions of an image stand together; a question is kept to the letter."""
    examples = read("mme", images=mme(tmp_path))
    assert [e.id for e in examples] == ["color/000000006040:0", "color/000000006040:1", "artwork/10:0", "artwork/10:1"]
    first, second, third, _ = examples
    assert (first.task, first.image) == ("mme", tmp_path / "color" / "000000006040.jpg")
    assert third.image == tmp_path / "artwork" / "images" / "10.png"
    assert second.turns[0].question == "Is it blue?  Please answer yes or no."
    assert (first.turns[0].answer, second.references) == ("Yes", ("No",))
    assert first.facts == {"subtask": "color", "image_name": "000000006040.jpg", "question_number": 0}
    assert len(read("mme", images=tmp_path, subtasks=["artwork"])) == 2
    with pytest.raises(ValueError, match="there is no subtask 'colour'; subtasks: existence"):
        read("mme", images=tmp_path, subtasks=["colour"])
    with pytest.raises(ValueError, match="has no folder count"):
        read("mme", images=tmp_path, subtasks=["count"])


def test_broken_mme(tmp_path):
    root = mme(tmp_path)
    put(root / "color" / "1.txt", "Is it?\tYes\n")
    put(root / "color" / "2.txt", "Is it?\tYes\nIs it?\tYes\n")
    put(root / "color" / "3.txt", "Is it?\tYes\nIs it?\tMaybe\n")
    for name in ("1.png", "3.png"):
        (root / "color" / name).touch()
    faults = Faults()
    assert len(read("mme", images=root, faults=faults)) == 5
    places = sorted(place for found in faults.places.values() for place in found)
    assert [place.split()[0] for place in places] == ["color/1.txt", "color/2.txt", "color/3.txt:2:"]
    with pytest.raises(ValueError, match=r"color/1\.txt has 1 questions, an image has two"):
        read("mme", images=root)


@samples
def test_real_mme_questions_round_trip(tmp_path):
    """The official sample of results names images, questions and answers: rebuilt as folders, they come back."""
    expected = []
    for path in sorted((SAMPLES / "mme" / "LaVIN").glob("*.txt")):
        for line in path.read_text().splitlines():
            image, question, answer, _ = line.split("\t")
            stem = image.rsplit(".", 1)[0]
            with (
                (tmp_path / path.stem / f"{stem}.txt").open("a")
                if (tmp_path / path.stem).is_dir()
                else put(tmp_path / path.stem / f"{stem}.txt", "").open("a") as file
            ):
                file.write(f"{question}\t{answer}\n")
            (tmp_path / path.stem / f"{stem}.jpg").touch()
            expected.append((path.stem, stem, question.strip(), answer))
    examples = read("mme", images=tmp_path)
    assert len(examples) == len(expected) == 2374
    found = [(e.facts["subtask"], e.image.stem, e.turns[0].question, e.turns[0].answer) for e in examples]
    assert sorted(found) == sorted(expected)


def coco_karpathy():
    def image(n, split, folder):
        sentences = [{"raw": f"A cup {n}{k}, red. ", "tokens": ["a"], "sentid": k, "imgid": n} for k in range(5)]
        return {
            "filename": f"COCO_{folder}_{n}.jpg", "filepath": folder, "split": split, "imgid": n, "cocoid": 100 + n,
            "sentids": list(range(5)), "sentences": sentences,
        }  # fmt: skip

    return {"dataset": "coco", "images": [image(1, "test", "val2014"), image(2, "train", "train2014"),
                                          image(3, "restval", "val2014")]}  # fmt: skip


def test_karpathy(tmp_path):
    path = put(tmp_path / "dataset_coco.json", coco_karpathy())
    (example,) = read("karpathy", images=tmp_path, annotations=path, split="test")
    assert (example.id, example.image, example.task) == ("101", tmp_path / "COCO_val2014_1.jpg", "caption")
    assert example.references == tuple(f"A cup 1{k}, red." for k in range(5))
    assert example.facts == {"image_id": 101, "split": "test"}
    (tmp_path / "val2014").mkdir()
    both = read("karpathy", images=tmp_path, annotations=path, split="train+restval", per="caption")
    assert [e.id for e in both] == [f"{key}:{n}" for key in (102, 103) for n in range(5)]
    assert both[5].image == tmp_path / "val2014" / "COCO_val2014_3.jpg"
    with pytest.raises(ValueError, match="splits: train, val, test"):
        read("karpathy", images=tmp_path, annotations=path, split="dev")


@samples
def test_the_real_first_image_of_flickr30k(tmp_path):
    path = SAMPLES / "flickr30k_karpathy" / "dataset_flickr30k_first_image.json"
    real = json.loads(path.read_text())["images"][0]
    (example,) = read("karpathy", images=tmp_path, annotations=path, split=real["split"])
    assert example.references[1] == "Two young, White males are outside near many bushes."
    assert len(example.references) == 5
    assert (example.id, example.image.name) == ("0", real["filename"])


def test_shikras_questions(tmp_path):
    def lines(format, row):
        path = put(tmp_path / "lines.jsonl", json.dumps(row) + "\r\n")
        (example,) = read(format, images=tmp_path, annotations=path)
        return example

    caption = lines("shikra-caption", {"img_path": "a.jpg", "caption": " A cup. "})
    assert (caption.task, caption.turns[0].answer, caption.image) == ("caption", "A cup.", tmp_path / "a.jpg")
    row = {"file_path": "a.jpg", "question": "Why?", "explanation": ["It is red", 0.83], "multiple_answers": "red"}
    explained = lines("shikra-vqa-e", row)
    assert (explained.task, explained.turns[0].answer) == ("cot", "It is red. So the answer is red.")
    with pytest.raises(ValueError, match=r"lines.jsonl:1: has explanation 0.83, it must begin with a text"):
        lines("shikra-vqa-e", row | {"explanation": [0.83]})
    row = {"file_path": "a.jpg", "question": "Why?", "justification": ["red.", "hot."], "multiple_choice_answer": "no"}
    justified = lines("shikra-vqa-x", row)
    assert (justified.turns[0].answer, justified.references) == ("red. hot. So the answer is no.", ("no",))
    annotation = {
        "question_id": 7, "image_id": 1, "question_type": "what", "answer_type": "other", "multiple_choice_answer": "red",
        "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(["red", "blue"], 1)],
    }  # fmt: skip
    vqa = lines("shikra-vqa", {"image_path": "a.jpg", "question": "What?", "annotation": annotation})
    assert (vqa.task, vqa.turns[0].answer, vqa.references) == ("vqa", "red", ("red", "blue"))
    assert vqa.facts == {"question_id": 7, "image_id": 1, "question_type": "what", "answer_type": "other"}


@pytest.mark.parametrize("slot", ["<image>", "<boxes>", "<points>"])
def test_slots_in_a_users_text(tmp_path, slot):
    path = put(tmp_path / "pope.jsonl", json.dumps(POPE) + "\n" + json.dumps(POPE | {"text": f"Is {slot} it?"}) + "\n")
    with pytest.raises(ValueError, match=rf"^pope\.jsonl:2: has {slot} in its text, which is reserved"):
        read("pope", images=tmp_path, questions=path)
    faults = Faults()
    assert len(read("pope", images=tmp_path, questions=path, faults=faults)) == 1
    assert faults.count == 1


def test_faults_are_counted_by_kind_with_their_first_places(tmp_path):
    broken = [POPE | {"label": "maybe"}] * 5 + [{k: v for k, v in POPE.items() if k != "image"}]
    rows = [json.dumps(row) for row in [POPE, *broken]] + ["{not json", "[1]"]
    path = put(tmp_path / "pope.jsonl", "\ufeff" + "\r\n".join(rows))
    faults = Faults()
    assert len(read("pope", images=tmp_path, questions=path, faults=faults)) == 1
    assert faults.count == 8
    assert sorted(faults.kinds.values()) == [1, 1, 1, 5]
    assert max(len(found) for found in faults.places.values()) == 3
    assert any("pope.jsonl:2: has label 'maybe'" in found[0] for found in faults.places.values())


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("text", ["[1, 22, -3.5e1]", " [ ] ", '[{"a": "]"}, "x,y", [[]], null]', '["\\u00e9\\"", 12]'])
def test_long_lists_are_read_piece_by_piece(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = put(tmp_path / "list.json", text)
    if json.loads(text):
        assert list(files._items(path)) == json.loads(text)
    else:
        with pytest.raises(ValueError, match=r"is \[\]"):
            list(files._items(path))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("text", ["[1, 2", "[1 2]", "[1,]", "[,1]", "[1] 2", "[nope]", '["abc', "[", "{}"])
def test_broken_long_lists(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(files, "CHUNK", chunk)
    with pytest.raises(ValueError, match=r"^list\.json: (item \d: not JSON|begins with)"):
        list(files._items(put(tmp_path / "list.json", text)))


def test_a_stream_is_lazy(tmp_path):
    """The first example comes before the rest of the file is looked at."""
    path = put(tmp_path / "pope.jsonl", json.dumps(POPE) + "\n{broken\n")
    examples = stream("pope", images=tmp_path, questions=path)
    assert next(examples).turns[0].answer == "yes"
    with pytest.raises(ValueError, match=r"^pope\.jsonl:2: not JSON"):
        next(examples)
