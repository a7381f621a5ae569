"""Readers: the real formats, on real samples and on files written here; and what is wrong with a file, in one line."""

import json
from pathlib import Path

import pytest

from commvlm.data.readers import read

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")

REFER = {
    "img_path": "a.jpg",
    "expression": "the cup",
    "bbox": [1, 2, 3.5, 4],
    "dataset_name": "x",
    "height": 9,
    "width": 8,
}
POPE = {"question_id": 1, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "yes"}
IMAGES = [{"id": 5, "file_name": "a.jpg", "width": 8, "height": 9}, {"id": 6, "file_name": "b.jpg"}]
CAPTIONS = [{"id": n, "image_id": i, "caption": c} for n, i, c in ((0, 5, "one "), (1, 6, "two"), (2, 5, "three"))]
QUESTION = {"image_id": 7, "question": "What color?", "question_id": 70}
ANNOTATION = {
    "question_id": 70,
    "image_id": 7,
    "question_type": "what color",
    "answer_type": "other",
    "multiple_choice_answer": "red",
    "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(["red"] * 7 + ["blue"] * 2 + [""], 1)],
}
TALK = {
    "id": "t",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cup."}],
}


@pytest.fixture
def write(tmp_path):
    """Writes a file of JSON (a value), JSON lines (a list of lines) or raw text; returns its path."""

    def writer(name, value):
        path = tmp_path / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif name.endswith(".jsonl"):
            path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in value))
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return writer


@pytest.fixture
def refer(write, tmp_path):
    return lambda lines, **kw: read("refer-jsonl", images=tmp_path, annotations=write("rec.jsonl", lines), **kw)


@pytest.fixture
def pope(write, tmp_path):
    return lambda lines, **kw: read("pope", images=tmp_path, questions=write("pope.jsonl", lines), **kw)


@pytest.fixture
def captions(write, tmp_path):
    return lambda value, **kw: read("coco-captions", images=tmp_path, annotations=write("captions.json", value), **kw)


@pytest.fixture
def vqa(write, tmp_path):
    def reader(questions, annotations, **kw):
        paths = {"questions": write("questions.json", questions), "annotations": write("annotations.json", annotations)}
        return read("vqa", images=tmp_path, **paths, **kw)

    return reader


@pytest.fixture
def llava(write, tmp_path):
    return lambda value, **kw: read("llava", images=tmp_path, conversations=write("chat.json", value), **kw)


def test_refer_as_rec(refer, tmp_path):
    first, second = refer([REFER, "\n", REFER | {"expression": "a mug"}])
    assert (first.id, second.id) == ("rec:1", "rec:3")
    assert first.task == "rec"
    assert first.image == tmp_path / "a.jpg"
    assert (first.turns[0].question, first.turns[0].answer) == ("the cup", "<boxes>")
    assert first.turns[0].answer_boxes == (((1.0, 2.0, 3.5, 4.0),),)
    assert first.facts == {"dataset_name": "x", "width": 8, "height": 9}
    assert first.references == ()


def test_refer_as_reg_gathers_an_objects_expressions(refer):
    lines = [REFER, REFER | {"bbox": [0, 0, 1, 1]}, REFER | {"expression": "a mug"}, REFER | {"img_path": "b.jpg"}]
    cup, other, elsewhere = refer(lines, task="reg")
    assert cup.references == ("the cup", "a mug")
    assert (cup.turns[0].question, cup.turns[0].answer) == ("<boxes>", "the cup")
    assert cup.turns[0].question_boxes == (((1.0, 2.0, 3.5, 4.0),),)
    assert [e.id for e in (cup, other, elsewhere)] == ["rec:1", "rec:2", "rec:4"]
    by_line = refer(lines, task="reg", group="line")
    assert [e.turns[0].answer for e in by_line] == ["the cup", "the cup", "a mug", "the cup"]
    assert [e.references for e in by_line] == [("the cup",), ("the cup",), ("a mug",), ("the cup",)]
    assert refer(lines, task="reg", group="object") == [cup, other, elsewhere]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bbox": [1, 2, 3]}, "bbox of 3 numbers"),
        ({"bbox": [5, 2, 3, 4]}, "swapped"),
        ({"bbox": [1, 4, 3, 2]}, "swapped"),
        ({"bbox": [1, 2, 1, 4]}, "empty"),
        ({"bbox": [1, 2, float("nan"), 4]}, "finite"),
        ({"bbox": [1, 2, float("inf"), 4]}, "finite"),
        ({"bbox": [1, 2, 10**400, 4]}, "too large"),
        ({"bbox": "1,2,3,4"}, "list of numbers"),
        ({"bbox": [1, 2, True, 4]}, "list of numbers"),
        ({"bbox": None}, "list of numbers"),
        ({"expression": " "}, "not blank"),
        ({"expression": "a <boxes>"}, "reserved"),
        ({"img_path": "../a.jpg"}, "not inside"),
        ({"img_path": "b/../../a.jpg"}, "not inside"),
        ({"img_path": "/etc/passwd"}, "not inside"),
        ({"img_path": "a\0.jpg"}, "not inside"),
        ({"img_path": 5}, "must be a text"),
        ({"width": "8"}, "width '8', it must be an integer"),
    ],
)
def test_broken_refer_lines(refer, change, match):
    with pytest.raises(ValueError, match=match) as caught:
        refer([REFER, REFER | change])
    assert str(caught.value).startswith("rec.jsonl:2: ")
    assert "\n" not in str(caught.value)


def test_refer_needs_its_fields(refer):
    for field in ("img_path", "expression", "bbox"):
        with pytest.raises(ValueError, match=rf"^rec\.jsonl:1: has no {field}$"):
            refer([{k: v for k, v in REFER.items() if k != field}])


def test_lines_that_are_no_objects(refer):
    with pytest.raises(ValueError, match=r"^rec\.jsonl:12: not JSON"):
        refer([REFER] * 11 + ['{"img_path": "a.jpg", \n'])
    with pytest.raises(ValueError, match=r"^rec\.jsonl:2: is a list"):
        refer([REFER, "[1]\n"])
    with pytest.raises(ValueError, match=r"^rec\.jsonl:1: nested too deeply|^rec\.jsonl:1: not JSON"):
        refer(["[" * 100_000 + "\n"])


def test_choices_of_refer(refer):
    with pytest.raises(ValueError, match="rec or reg"):
        refer([REFER], task="caption")
    with pytest.raises(ValueError, match="no group 'object'"):
        refer([REFER], task="rec", group="object")
    with pytest.raises(ValueError, match="no group 'image'"):
        refer([REFER], task="reg", group="image")


@samples
def test_the_real_shikra_line(tmp_path):
    (example,) = read("refer-jsonl", images=tmp_path, annotations=SAMPLES / "shikra" / "REC_line_real.jsonl")
    assert example.turns[0].answer_boxes == (((334.72, 298.08, 522.88, 450.23999999999995),),)
    assert example.facts == {"dataset_name": "refcocog", "width": 640, "height": 480}


def test_captions(captions, tmp_path):
    value = {"images": [*IMAGES, {"id": 9, "file_name": "without.jpg"}], "annotations": CAPTIONS}
    each = captions(value)
    assert [(e.id, e.image.name, e.turns[0].answer) for e in each] == [
        ("5:0", "a.jpg", "one"),
        ("5:1", "a.jpg", "three"),
        ("6:0", "b.jpg", "two"),
    ]
    assert {e.turns[0].question for e in each} == {""}
    first, second = captions(value, per="image")
    assert (first.id, first.references, first.turns[0].answer) == ("5", ("one", "three"), "one")
    assert first.facts == {"image_id": 5, "width": 8, "height": 9}
    assert second.references == ("two",)


@pytest.mark.parametrize(
    ("images", "annotations", "match"),
    [
        (IMAGES, [*CAPTIONS, {"caption": "x"}], "annotation 3 has no image_id"),
        (IMAGES, [CAPTIONS[0], {"image_id": 5}], "annotation 1 has no caption"),
        (IMAGES, [{"image_id": 8, "caption": "x"}], "annotation 0 has image_id 8, which is not among"),
        (IMAGES, [{"image_id": [5], "caption": "x"}], r"annotation 0 has image_id \[5\]"),
        (IMAGES, [{"image_id": 5, "caption": "<boxes>"}], "annotation 0 has <boxes>"),
        (IMAGES, [3], "annotation 0 is a int"),
        (IMAGES, [], r"has annotations \[\], it must be a list that is not empty"),
        ([IMAGES[0], IMAGES[0]], CAPTIONS, "image 1 has id 5 a second time"),
        ([{"id": 5, "file_name": "../a.jpg"}], CAPTIONS, "image 0 names the image"),
        ([{"id": 5}], CAPTIONS, "image 0 has no file_name"),
    ],
)
def test_broken_captions(captions, images, annotations, match):
    with pytest.raises(ValueError, match=rf"^captions\.json: {match}"):
        captions({"images": images, "annotations": annotations})


def test_other_files_for_captions(captions):
    with pytest.raises(ValueError, match=r"^captions\.json: has no images$"):
        captions({"annotations": CAPTIONS})
    with pytest.raises(ValueError, match=r"^captions\.json: is a list, it must be a JSON object"):
        captions([1])
    with pytest.raises(ValueError, match=r"^captions\.json:2: not JSON"):
        captions('{\n"images": [}')
    with pytest.raises(ValueError, match="caption or image"):
        captions({"images": IMAGES, "annotations": CAPTIONS}, per="word")


@samples
def test_real_captions(tmp_path):
    path = SAMPLES / "coco_caption" / "captions_val2014_cut1000.json"
    each = read("coco-captions", images=tmp_path, annotations=path)
    assert len(each) == len({e.id for e in each}) == 5005
    per_image = read("coco-captions", images=tmp_path, annotations=path, per="image")
    assert len(per_image) == 1000
    assert sum(len(e.references) for e in per_image) == 5005
    assert sum(len(e.references) == 6 for e in per_image) == 5


def test_vqa(vqa):
    (example,) = vqa({"data_subtype": "train2014", "questions": [QUESTION]}, {"annotations": [ANNOTATION]})
    assert example.image.name == "COCO_train2014_000000000007.jpg"
    assert (example.id, example.task) == ("70", "vqa")
    assert (example.turns[0].question, example.turns[0].answer) == ("What color?", "red")
    assert example.references == ("red",) * 7 + ("blue",) * 2 + ("",)
    assert example.facts == {"question_type": "what color", "answer_type": "other", "question_id": 70, "image_id": 7}
    files = {"questions": [QUESTION]}, {"annotations": [ANNOTATION]}
    assert vqa(*files, image_name="x/{image_id}.png")[0].image.parts[-2:] == ("x", "7.png")
    dev, _ = {"data_subtype": "test-dev2015", "questions": [QUESTION]}, None
    assert vqa(dev, files[1])[0].image.name == "COCO_test2015_000000000007.jpg"


@pytest.mark.parametrize(
    ("question", "annotation", "match"),
    [
        (
            {"question_id": 71},
            {},
            r"questions\.json: question 0 \(question_id 71\) has no annotation in annotations",
        ),
        ({"question_id": "70"}, {}, r"questions\.json: question 0 has question_id '70', it must be an integer"),
        ({"question": None}, {}, r"questions\.json: question 0 has question None"),
        ({}, {"image_id": 8}, r"annotations\.json: annotation 0 has image_id 8, its question has 7"),
        ({}, {"answers": []}, r"annotations\.json: annotation 0 has answers \[\]"),
        (
            {},
            {"answers": [{"answer": 3}]},
            r"annotations\.json: annotation 0, answer 0 has answer 3, it must be",
        ),
        ({}, {"multiple_choice_answer": ""}, r"annotations\.json: annotation 0 has multiple_choice_answer ''"),
        ({}, {"answer_type": None}, r"annotations\.json: annotation 0 has answer_type None"),
    ],
)
def test_broken_vqa(vqa, question, annotation, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        vqa(
            {"data_subtype": "train2014", "questions": [QUESTION | question]},
            {"annotations": [ANNOTATION | annotation]},
        )


def test_vqa_ids_and_names(vqa):
    asked, answered = {"questions": [QUESTION]}, {"annotations": [ANNOTATION]}
    with pytest.raises(ValueError, match=r"^questions\.json: has no data_subtype .* give image_name"):
        vqa(asked, answered)
    with pytest.raises(ValueError, match=r"question 1 has question_id 70 a second time"):
        vqa({"questions": [QUESTION] * 2}, answered, image_name="{image_id}")
    with pytest.raises(ValueError, match=r"annotation 1 has question_id 70 a second time"):
        vqa(asked, {"annotations": [ANNOTATION] * 2}, image_name="{image_id}")
    for pattern in ("{id}.jpg", "{image_id", "{}", "{image_id.x}", "{image_id:z}"):
        with pytest.raises(ValueError, match="is no pattern"):
            vqa(asked, answered, image_name=pattern)
    with pytest.raises(ValueError, match="names every image alike"):
        vqa(asked, answered, image_name="a.jpg")
    with pytest.raises(ValueError, match="not inside"):
        vqa(asked, answered, image_name="../{image_id}.jpg")


@samples
def test_real_vqa(tmp_path):
    folder = SAMPLES / "vqa_v2"
    files = {"questions": folder / "questions_1000.json", "annotations": folder / "annotations_1000.json"}
    examples = read("vqa", images=tmp_path, image_name="COCO_train2014_{image_id:012d}.jpg", **files)
    assert len(examples) == len({e.id for e in examples}) == 1000
    assert {len(e.references) for e in examples} == {10}
    truth = {a["question_id"]: a for a in json.loads(files["annotations"].read_text())["annotations"]}
    for example in examples:
        assert example.turns[0].answer == truth[example.facts["question_id"]]["multiple_choice_answer"]
        assert list(example.references) == [a["answer"] for a in truth[example.facts["question_id"]]["answers"]]


def test_pope(pope, tmp_path):
    slip = {"question_id": 2, "imange": "b.jpg", "text": "Is there an egg in the imange?", "label": "No"}
    first, second = pope([POPE, slip], set_name="popular")
    assert (first.id, first.task, first.image) == ("pope:1", "pope", tmp_path / "a.jpg")
    assert (first.turns[0].question, first.turns[0].answer) == (POPE["text"], "yes")
    assert first.references == ("yes",)
    assert first.facts == {"question_id": 1, "set": "popular"}
    assert (second.image, second.turns[0].answer) == (tmp_path / "b.jpg", "no")
    assert second.turns[0].question == "Is there an egg in the imange?"
    assert "set" not in pope([POPE])[0].facts


@pytest.mark.parametrize(
    ("change", "match"),
    [({"label": "maybe"}, "yes or no"), ({"text": ""}, "not blank"), ({"image": ".."}, "not inside")],
)
def test_broken_pope(pope, change, match):
    with pytest.raises(ValueError, match=rf"^pope\.jsonl:3: .*{match}"):
        pope([POPE, POPE, POPE | change])


@samples
@pytest.mark.parametrize(
    ("name", "yes", "no", "slips"),
    [
        ("random", 1500, 1500, 0),
        ("popular", 1500, 1500, 0),
        ("adversarial", 1500, 1500, 0),
        ("random_2910_commit_e3e3926", 1500, 1410, 144),
    ],
)
def test_real_pope(tmp_path, name, yes, no, slips):
    examples = read("pope", images=tmp_path, questions=SAMPLES / "pope" / f"coco_pope_{name}.json")
    answers = [e.turns[0].answer for e in examples]
    assert (answers.count("yes"), answers.count("no")) == (yes, no)
    assert len({e.id for e in examples}) == yes + no
    assert len({e.image for e in examples}) == 500
    assert sum("imange" in e.turns[0].question for e in examples) == slips


def test_llava(llava, tmp_path):
    later = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}]
    front = TALK | {"conversations": [{"from": "human", "value": "<image>\nWho?"}, *TALK["conversations"][1:], *later]}
    bare = {"conversations": [{"from": "human", "value": "Hi\n\nyou"}, {"from": "gpt", "value": "Hello."}]}
    left_out = {"image": "a.jpg", **bare}
    first, second, third, fourth = llava([TALK, front, bare, left_out])
    assert first.turns[0].question == "<image>\nWhat?"
    assert first.turns[0].answer == "A cup."
    assert (first.id, first.task, first.image) == ("chat:0", "dialogue", tmp_path / "a.jpg")
    assert first.facts == {"entry_id": "t"}
    assert [(t.question, t.answer) for t in second.turns] == [("<image>\nWho?", "A cup."), ("And?", "No.")]
    assert (third.image, third.turns[0].question, third.facts) == (None, "Hi\n\nyou", {})
    assert fourth.turns[0].question == "<image>\nHi\n\nyou"
    assert llava([TALK], image_name="COCO_{image}")[0].image == tmp_path / "COCO_a.jpg"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"conversations": TALK["conversations"][:1]}, "entry 1 has 1 messages"),
        ({"conversations": TALK["conversations"][::-1]}, "entry 1, message 0 is from 'gpt'"),
        ({"conversations": []}, r"entry 1 has conversations \[\]"),
        (
            {"conversations": [{"from": "human", "value": "<image><image>"}, TALK["conversations"][1]]},
            "<image> 2 times",
        ),
        (
            {"conversations": [TALK["conversations"][0], {"from": "gpt", "value": "<image>"}]},
            "message 1 says <image> 1",
        ),
        ({"conversations": [TALK["conversations"][0], {"from": "gpt", "value": "<boxes>"}]}, "message 1 says <boxes>"),
        ({"image": "../x.jpg"}, "not inside"),
    ],
)
def test_broken_llava(llava, change, match):
    with pytest.raises(ValueError, match=match) as caught:
        llava([TALK, TALK | change])
    assert str(caught.value).startswith("chat.json: entry 1")


def test_llava_without_the_image_it_shows(llava):
    with pytest.raises(ValueError, match="entry 0 says <image> but has no image"):
        llava([{k: v for k, v in TALK.items() if k != "image"}])
    with pytest.raises(ValueError, match="alike"):
        llava([TALK], image_name="a.jpg")


@samples
def test_real_llava(llava):
    real = list(json.loads((SAMPLES / "llava" / "llava_examples.json").read_text()).values())
    examples = llava(real)
    assert [len(e.turns) for e in examples] == [1, 1, 3, 1]
    for example, entry in zip(examples, real, strict=True):
        texts = [side for turn in example.turns for side in (turn.question, turn.answer)]
        assert texts[0] == "<image>\n" + entry["conversations"][0]["value"].removesuffix("\n<image>")
        assert texts[1:] == [message["value"] for message in entry["conversations"][1:]]


FILES = {
    "refer-jsonl": ["annotations"],
    "coco-captions": ["annotations"],
    "vqa": ["questions", "annotations"],
    "pope": ["questions"],
    "llava": ["conversations"],
}


@pytest.mark.parametrize("format", FILES)
def test_files_that_cannot_be_read(format, write, tmp_path):
    """Missing, empty, binary: every format says the same."""
    for name, content, match in (
        ("missing.json", None, "no such annotation file"),
        ("empty.json", "", "is empty"),
        ("blank.json", " \n\n", "is empty"),
        ("picture.json", b"\x89PNG\xff\xfe", "not UTF-8"),
    ):
        path = tmp_path / name if content is None else write(name, content)
        with pytest.raises(ValueError, match=match) as caught:
            read(format, images=tmp_path, **dict.fromkeys(FILES[format], path))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such folder of images"):
        read(format, images=tmp_path / "nowhere", **dict.fromkeys(FILES[format], write("x.json", "{}")))
    with pytest.raises(ValueError, match=f"{format} needs {FILES[format][0]}"):
        read(format, images=tmp_path)


def test_names_that_nearly_fit(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'coco-captions'"):
        read("coco-caption", images=tmp_path)
    with pytest.raises(ValueError, match="no format 'zzz'; formats: refer, refer-jsonl"):
        read("zzz", images=tmp_path)
    with pytest.raises(ValueError, match=r"pope takes no 'question' \(did you mean 'questions'\?\)"):
        read("pope", images=tmp_path, question="x")


@pytest.mark.parametrize(
    ("format", "given", "said"),
    [
        ("llava", {"conversations": "a.json", "image_name": 5}, "llava: image_name is 5, it must be str"),
        ("sharegpt", {"conversations": "a.json", "boxes": ["a"]}, r"sharegpt: boxes is \['a'\], it must be str"),
        ("mme", {"subtasks": 3}, "mme: subtasks is 3, it must be list"),
        ("datasets", {"dataset": "d", "columns": "x"}, "datasets: columns is 'x', it must be dict"),
        ("datasets", {"dataset": "d", "columns": {"image": 1}}, "datasets: columns is"),
        ("pope", {"questions": 7}, "pope: questions is 7, it must be Path"),
        ("refer-jsonl", {"annotations": "a.jsonl", "task": True}, "refer-jsonl: task is True"),
    ],
)
def test_options_of_another_type(tmp_path, format, given, said):
    with pytest.raises(ValueError, match=said):
        read(format, images=tmp_path, **given)


def test_a_mark_of_byte_order_is_no_matter(write, tmp_path):
    path = write("pope.json", b"\xef\xbb\xbf" + json.dumps(POPE).encode())
    assert len(read("pope", images=str(tmp_path), questions=str(path))) == 1
