"""Readers of data that says where things are, field by field, on files in the true formats that are written here."""

import json
import os
import pickle
from pathlib import Path

import pytest

from commvlm.data.readers import READERS, Faults, arguments_of, is_file, read

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")


def put(path, value):
    """JSON of a value, JSON lines of a list for *.jsonl, or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def places(turn):
    return turn.question_boxes, turn.answer_boxes, turn.question_points, turn.answer_points


def ref(ref_id, ann_id, split, *sents, image_id=98304):
    sentences = [{"sent_id": k, "sent": s, "raw": s.upper(), "tokens": s.split()} for k, s in sents]
    return {
        "ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 18, "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg", "sent_ids": [k for k, _ in sents],
        "sentences": sentences,
    }  # fmt: skip


REFS = [
    ref(0, 3007, "val", (0, "the dog"), (1, "dog on the left")),
    ref(1, 3008, "train", (2, "a cat")),
    ref(2, 3008, "val", (3, "the {} cat")),
]
INSTANCES = {
    "images": [{"id": 98304, "file_name": "COCO_train2014_000000098304.jpg", "height": 424, "width": 640}],
    "annotations": [
        {"id": 3007, "image_id": 98304, "category_id": 18, "bbox": [263.87, 216.88, 21.13, 15.17]},
        {"id": 3008, "image_id": 98304, "category_id": 17, "bbox": [0, 10, 5, 6]},
    ],
}


@pytest.fixture
def refer(tmp_path):
    def reader(refs=REFS, instances=INSTANCES, *, content=None, faults=None, protocol=2, **options):
        path = tmp_path / "refs(unc).p"
        path.write_bytes(pickle.dumps(refs, protocol=protocol) if content is None else content)
        files = {"refs": path, "instances": put(tmp_path / "instances.json", instances)}
        return read("refer", images=tmp_path, faults=faults, **files, **{"split": "val"} | options)

    return reader


def test_refer_by_sentence(refer, tmp_path):
    first, second, third = refer()
    assert [e.id for e in (first, second, third)] == ["0", "1", "3"]
    assert first.task == "rec"
    assert first.image == tmp_path / "COCO_train2014_000000098304.jpg"  # not the reference's own name
    assert (first.turns[0].question, first.turns[0].answer) == ("the dog", "<boxes>")
    (box,) = first.turns[0].answer_boxes[0]
    assert box == pytest.approx((263.87, 216.88, 263.87 + 21.13, 216.88 + 15.17))  # xywh -> corners
    assert first.facts == {
        "ref_id": 0, "ann_id": 3007, "image_id": 98304, "category_id": 18, "split": "val", "sent_id": 0,
        "width": 640, "height": 424,
    }  # fmt: skip
    assert third.turns[0].question == "the {} cat"
    assert [e.id for e in refer(split="train")] == ["2"]
    assert [e.turns[0].answer for e in refer(task="reg", group="line")] == ["the dog", "dog on the left", "the {} cat"]


def test_refer_by_reference(refer):
    """REG is scored a reference at a time: two references to one object stay two."""
    first, other, second = refer([*REFS, ref(3, 3008, "val", (4, "it"))], task="reg")
    assert (other.id, other.references) == ("2", ("the {} cat",))
    assert (first.id, first.references) == ("0", ("the dog", "dog on the left"))
    assert first.turns[0].question == "<boxes>"
    assert (second.id, second.references) == ("3", ("it",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_every_age(refer, protocol):
    assert len(refer(protocol=protocol)) == 3


def test_a_pickle_of_python_2_is_read(refer):
    """Its texts are bytes, as opcode S and U write them."""
    text = (
        b"(lp0\n(dp1\nS'ref_id'\np2\nI7\nsS'ann_id'\np3\nI3007\nsS'image_id'\np4\nI98304\nsS'category_id'\np5\nI1\ns"
        b"S'split'\np6\nS'val'\np7\nsS'sentences'\np8\n(lp9\n(dp10\nS'sent_id'\np11\nI9\nsS'sent'\np12\nS'caf\\xe9'\np13\nsas"
        b"S'file_name'\np14\nS'x.jpg'\np15\nsa."
    )
    (example,) = refer(content=text)
    assert (example.id, example.turns[0].question) == ("9", "café")


class Evil:
    def __reduce__(self):
        return os.system, ("touch was-here",)


@pytest.mark.parametrize("value", [[Evil()], {"a": Evil}, [Path("x")], [1 + 2j]])
def test_a_pickle_that_calls_is_refused(refer, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: asks for \w+\.\w+.* to be called.*do not trust it"):
        refer(value)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", b"(lp0\n(dp1\nP7\n.", b"\x80\x02B\xff\xff\xff\x7fab."])
def test_broken_pickles(refer, content):
    with pytest.raises(ValueError, match=r"^refs\(unc\)\.p: (is no pickle|asks for)") as caught:
        refer(content=content)
    assert "\n" not in str(caught.value)


def test_refer_refusals(refer):
    with pytest.raises(ValueError, match=r"has no reference of split 'testA'; it has train, val"):
        refer(split="testA")
    with pytest.raises(ValueError, match="split is 'dev', it must be one of train"):
        refer(split="dev")
    with pytest.raises(ValueError, match="no task 'rec' by 'object'"):
        refer(group="object")
    with pytest.raises(ValueError, match=r"reference 0 has ann_id 1 and image_id 98304, which are not both"):
        refer([ref(0, 1, "val", (0, "x"))])
    with pytest.raises(ValueError, match=r"holds a dict, it must be a list"):
        refer({})
    with pytest.raises(ValueError, match="refer needs split: one of"):
        read("refer", images=".", refs="a", instances="b")
    faults = Faults()
    bad = [ref(5, 3007, "val", (9, "<boxes>")), 7, *REFS, ref(6, 3007, "val", (0, "the same id"))]
    assert len(refer(bad, faults=faults)) == 3
    assert faults.count == 3  # a reserved word, no object, and an id that was there before
    assert any("id '0' a second time" in place for found in faults.places.values() for place in found)


@samples
def test_the_real_reference(tmp_path):
    real = json.loads((SAMPLES / "refer" / "ref_and_instance_example.json").read_text())
    image, annotation = real["instances.images[0]"], real["instances.annotations[0]"]
    own = real["refs(unc).p[0] (refcoco)"] | {"image_id": image["id"], "ann_id": annotation["id"]}
    (tmp_path / "refs.p").write_bytes(pickle.dumps([own]))
    put(tmp_path / "instances.json", {"images": [image], "annotations": [annotation]})
    files = {"refs": tmp_path / "refs.p", "instances": tmp_path / "instances.json"}
    first, *_ = read("refer", images=tmp_path, split="train", **files)
    assert first.turns[0].question == "the lady with the blue shirt"
    assert first.turns[0].answer_boxes[0][0] == pytest.approx((263.87, 216.88, 285.0, 232.05))


@samples
def test_real_regions_of_visual_genome(tmp_path):
    regions = SAMPLES / "visual_genome" / "region_descriptions_example.json"
    first, second, third = read("visual-genome", images=tmp_path, regions=regions)
    assert (first.id, first.task, first.image) == ("1382", "gc", tmp_path / "1.jpg")
    assert first.turns[0].question_boxes == (((421, 57, 503, 196),),)
    assert second.turns[0].answer == "shade is along the street"  # its blank at the end is gone
    assert third.facts == {"region_id": 1384, "image_id": 1}
    (rec, *_) = read("visual-genome", images=tmp_path, regions=regions, task="rec")
    assert (rec.turns[0].question, rec.turns[0].answer) == ("the clock is green in colour", "<boxes>")


def test_visual_genomes_two_folders(tmp_path):
    region = {"region_id": 1, "image_id": 5, "x": 0, "y": 0, "width": 3, "height": 2, "phrase": "x"}
    data = [
        {"id": 5, "regions": [region, region | {"region_id": 2, "width": 0}]},
        {"id": 6, "regions": [region | {"region_id": 3, "image_id": 6}]},
        {"id": 7, "regions": []},
    ]
    url = "https://cs.stanford.edu/people/rak248/{}/{}.jpg"
    sizes = [
        {"image_id": 5, "width": 8, "height": 9, "url": url.format("VG_100K_2", 5)},
        {"image_id": 6, "width": 8, "height": 9, "url": url.format("VG_100K", 6)},
    ]
    files = {"regions": put(tmp_path / "r.json", data), "image_data": put(tmp_path / "image_data.json", sizes)}
    for folder in ("VG_100K", "VG_100K_2"):
        (tmp_path / folder).mkdir()
    faults = Faults()
    first, second = read("visual-genome", images=tmp_path, faults=faults, **files)
    assert first.image == tmp_path / "VG_100K_2" / "5.jpg"
    assert second.image == tmp_path / "VG_100K" / "6.jpg"
    assert first.facts == {"region_id": 1, "image_id": 5, "width": 8, "height": 9}
    assert faults.count == 1  # the region without width
    with pytest.raises(ValueError, match=r"image 0, region 1 has box .* is empty \(width and height above 0\)"):
        read("visual-genome", images=tmp_path, **files)
    (tmp_path / "VG_100K" / "5.jpg").touch()  # without image_data, the folder that has it
    first, second = read("visual-genome", images=tmp_path, regions=files["regions"], faults=faults)
    assert first.image == tmp_path / "VG_100K" / "5.jpg"
    assert second.image == tmp_path / "VG_100K_2" / "6.jpg"


V7W_BOXES = [
    {"box_id": n, "name": "thing", "x": x, "y": -2, "width": 10, "height": 20}
    for n, x in ((11, 0), (12, 20), (13, 40), (14, 60), (15, 80))
]


def v7w(*pairs, split="train"):
    image = {"image_id": 3, "filename": "v7w_3.jpg", "split": split, "qa_pairs": list(pairs)}
    return {"dataset": "v7w", "images": [image], "boxes": V7W_BOXES}


def pair(qa_id=100, answer=12, others=(11, 13, 14), **change):
    return {
        "qa_id": qa_id, "image_id": 3, "question": "Which thing is red?", "answer": answer, "type": "which",
        "multiple_choices": list(others),
    } | change  # fmt: skip


def test_visual7w_pointing(tmp_path):
    path = put(tmp_path / "v7w.json", v7w(pair(), pair(101, 15), pair(102)))
    examples = read("visual7w", images=tmp_path, questions=path, split="train")
    assert [(e.id, e.task, e.image.name) for e in examples] == [(str(n), "v7w", "v7w_3.jpg") for n in (100, 101, 102)]
    for example, answer in zip(examples, (12, 15, 12), strict=True):
        (turn,) = example.turns
        assert turn.question == "Which thing is red? Candidates: <boxes> <boxes> <boxes> <boxes>"
        assert turn.answer == "<boxes>"
        box = next(b for b in V7W_BOXES if b["box_id"] == answer)
        truth = (box["x"], -2, box["x"] + 10, 18)  # leaves the image above, as the real ones do
        assert turn.answer_boxes == ((truth,),)
        assert turn.question_boxes[example.facts["answer_index"]] == (truth,)
        ids = [int(i) for i in example.facts["box_ids"].split()]
        assert ids[example.facts["answer_index"]] == answer
        assert [b[0][0] for b in turn.question_boxes] == [(i - 11) * 20 for i in ids]
    point = read("visual7w", images=tmp_path, questions=path, split="train", by="point")[0].turns[0]
    assert (point.answer, point.answer_points) == ("<points>", (((25.0, 8.0),),))
    assert len(point.question_boxes) == 4
    assert read("visual7w", images=tmp_path, questions=path, split="test") == []


def test_the_place_of_the_right_candidate_says_nothing(tmp_path):
    path = put(tmp_path / "v7w.json", v7w(*(pair(n) for n in range(400))))
    places = [e.facts["answer_index"] for e in read("visual7w", images=tmp_path, questions=path, split="train")]
    assert all(abs(places.count(n) / 400 - 0.25) < 0.1 for n in range(4))


@pytest.mark.parametrize(
    "change",
    [{"multiple_choices": [[2], 3]}, {"answer": 99}, {"answer": 11}, {"multiple_choices": []}, {"question": ""}],
)
def test_broken_visual7w(tmp_path, change):
    path = put(tmp_path / "v7w.json", v7w(pair(), pair(101) | change))
    with pytest.raises(ValueError, match=r"^v7w\.json: image 0, question 1 has"):
        read("visual7w", images=tmp_path, questions=path, split="train")
    faults = Faults()
    assert len(read("visual7w", images=tmp_path, questions=path, split="train", faults=faults)) == 1
    assert faults.count == 1


LOCAL = {
    "2364674": [
        {
            "id": "2364674", "question": "What color is this shirt?", "all_ans": ["red", "blue"],
            "all_objs": [{"x": 10, "y": 20, "w": 30, "h": 40, "names": ["shirt"], "attributes": ["red"]},
                         {"x": 1, "y": 2, "w": 3, "h": 4, "names": ["shirt"]}],
            "points": [{"x": 25, "y": 40, "ans": "red"}, {"x": 2, "y": 4, "ans": "blue"}],
        }
    ],
    "5": [{"id": "5", "question": "q?", "all_ans": ["a"], "all_objs": [{"x": 0, "y": 0, "w": 1, "h": 1}],
           "points": [{"x": 0, "y": 0, "ans": "a"}]}],
}  # fmt: skip


def test_pointqa_local(tmp_path):
    path, split = put(tmp_path / "localqa.json", LOCAL), put(tmp_path / "imgs.json", ["2364674"])
    first, second = read("pointqa-local", images=tmp_path, questions=path, split=split)
    assert (first.id, first.task, first.image.name) == ("2364674:0:0", "pointqa", "2364674.jpg")
    assert (first.turns[0].question, first.turns[0].answer) == ("What color is this shirt? <boxes>", "red")
    assert first.turns[0].question_boxes == (((10, 20, 40, 60),),)
    assert first.references == ("red",)
    assert second.turns[0].answer == "blue"
    point = read("pointqa-local", images=tmp_path, questions=path, split=split, by="point")[1]
    assert point.turns[0].question == "What color is this shirt? <points>"
    assert point.turns[0].question_points == (((2, 4),),)
    assert point.facts == {"image_id": 2364674, "by": "point"}
    assert len(read("pointqa-local", images=tmp_path, questions=path)) == 3
    with pytest.raises(ValueError, match="by is 'boxes', it must be box, point or either"):
        read("pointqa-local", images=tmp_path, questions=path, by="boxes")


def test_pointqa_twice(tmp_path):
    row = {
        "id": "14", "obj_question": "How many cats are there?", "super_question": "How many animals are there?",
        "general_question": "How many of these are there?", "ans": "2", "point": {"x": 25, "y": 40, "ans": "2"},
        "bbox": {"x": 10, "y": 20, "w": 30, "h": 40, "names": ["cat"]}, "obj_type": "cats", "supercategory": "animal",
    }  # fmt: skip
    path = put(tmp_path / "looktwice.json", {"14": [row, row | {"ans": 3}]})
    split = put(tmp_path / "ids.txt", "14\n")
    for asked, word in (("obj", "cats"), ("super", "animals"), ("general", "of these")):
        first, second = read("pointqa-twice", images=tmp_path, questions=path, split=split, asked=asked)
        assert first.turns[0].question == f"How many {word} are there? <boxes>"
        assert first.turns[0].question_boxes == (((10, 20, 40, 60),),)
        assert (first.turns[0].answer, second.turns[0].answer) == ("2", "3")
    (example, _) = read("pointqa-twice", images=tmp_path, questions=path, by="point")
    assert example.turns[0].question_points == (((25, 40),),)
    for change in ({"bbox": {"x": 1, "y": 1, "w": 0, "h": 5}}, {"point": {"x": float("nan"), "y": 1}}, {"ans": None}):
        broken = put(tmp_path / "broken.json", {"14": [row | change], "15": 3})
        faults = Faults()
        assert read("pointqa-twice", images=tmp_path, questions=broken, faults=faults) == []
        assert faults.count == 2


def entities(tmp_path, sentences, xml, key="1000092795"):
    put(tmp_path / "Sentences" / f"{key}.txt", sentences)
    put(tmp_path / "Annotations" / f"{key}.xml", xml)
    split = put(tmp_path / "split.txt", f"{key}\n")
    folders = {"sentences": tmp_path / "Sentences", "annotations": tmp_path / "Annotations"}
    return lambda **kw: read("flickr30k-entities", images=tmp_path, split=split, **folders, **kw)


@samples
def test_real_entities(tmp_path):
    folder = SAMPLES / "flickr30k_entities"
    xml = (folder / "1000092795_TRUNCATED.xml").read_text()
    examples = entities(tmp_path, (folder / "1000092795.txt").read_text(), xml)()
    assert [e.id for e in examples] == [f"1000092795:{n}" for n in range(5)]
    first, second, _, fourth, fifth = examples
    assert first.task == "spotting"
    assert first.turns[0].answer == (
        "Two young guys <boxes> with shaggy hair look at their hands while hanging out in the yard ."
    )
    # One is taken off every coordinate; two people are one chain of two boxes.
    assert first.turns[0].answer_boxes == (((158, 124, 218, 334), (196, 109, 260, 372)),)
    assert second.turns[0].answer.endswith("are outside near many bushes <boxes> .")
    assert second.turns[0].answer_boxes[1] == ((0, 219, 210, 472), (275, 214, 331, 336))
    assert fourth.turns[0].answer.startswith("A man <boxes> in a blue shirt standing")  # shares its box with chain 1
    assert fifth.turns[0].answer_boxes == first.turns[0].answer_boxes  # chain 10 has none
    assert first.references == ("Two young guys with shaggy hair look at their hands while hanging out in the yard .",)
    assert first.facts == {"image_id": "1000092795", "sentence": 0, "width": 333, "height": 500}


XML = (
    "<annotation><size><width>9</width><height>8</height></size><object><name>1</name><bndbox><xmin>{}</xmin>"
    "<ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
)


@pytest.mark.parametrize(
    ("xml", "match"),
    [
        (XML.format(7), "empty or turned inside out"),
        (XML.format("x"), "is no annotation of Flickr30k Entities"),
        ("<annotation>", "is no annotation of Flickr30k Entities"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + XML.format(1), "declares a document type"),
    ],
)
def test_broken_entities(tmp_path, xml, match):
    reader = entities(tmp_path, "[/EN#1/people A man] .", xml)
    with pytest.raises(ValueError, match=match):
        reader()
    faults = Faults()
    assert reader(faults=faults) == []
    assert faults.count == 1
    (tmp_path / "split.txt").write_text("../../etc/passwd")
    with pytest.raises(ValueError, match="is no id of Flickr30k"):
        reader()


@pytest.mark.parametrize("format", READERS)
def test_every_reader_says_what_is_missing(format, tmp_path):
    """Files that are not there, and a folder of images that is not there, in one line each."""
    options = (
        {"split": "train"} if format in ("visual7w", "karpathy") else {"split": "val"} if format == "refer" else {}
    )
    files = {
        name: tmp_path / f"{name}.missing"
        for name, parameter in arguments_of(format).items()
        if is_file(parameter) and (parameter.default is parameter.empty or name in options)
    }
    for images in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"there is no such|has no folder of a subtask") as caught:
            read(format, images=images, **files, **options)
        assert "\n" not in str(caught.value)


def test_visual7w_with_its_boxes_in_another_file(tmp_path):
    whole = v7w(pair())
    questions = put(tmp_path / "q.json", {k: v for k, v in whole.items() if k != "boxes"})
    boxes = put(tmp_path / "b.json", {"boxes": whole["boxes"]})
    apart = read("visual7w", images=tmp_path, questions=questions, boxes=boxes, split="train")
    assert apart == read("visual7w", images=tmp_path, questions=put(tmp_path / "w.json", whole), split="train")
    with pytest.raises(ValueError, match=r"q\.json: has no boxes"):
        read("visual7w", images=tmp_path, questions=questions, split="train")
