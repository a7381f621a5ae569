"""Dialogues with boxes in their text, and folders of the datasets library."""

import io
import json

import datasets
import pytest
from PIL import Image

from commvlm.data.readers import Faults, read


def talk(answer, question="<image>\nWhere is <ref>the cup</ref>?", **more):
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "t", "image": "a.png", "width": 200, "height": 100, "conversations": messages} | more


@pytest.fixture
def sharegpt(tmp_path):
    def reader(rows, boxes=None, lines=False, **options):
        path = tmp_path / ("talk.jsonl" if lines else "talk.json")
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
        return read("sharegpt", images=tmp_path, conversations=path, boxes=boxes, **options)

    return reader


@pytest.mark.parametrize(
    ("answer", "boxes", "groups"),
    [
        ("It is at <box>[[100, 200, 300, 400]]</box>.", "xyxy-0-1000", (((20, 20, 60, 40),),)),
        ("It is at [[100,200,300,400],[0,0,1000,1000]].", "xyxy-0-1000", (((20, 20, 60, 40), (0, 0, 200, 100)),)),
        ("It is at <|box_start|>(111,222),(333,444)<|box_end|>.", "xyxy-0-999",
         (((111 / 999 * 200, 222 / 999 * 100, 333 / 999 * 200, 444 / 999 * 100),),)),
        ("It is at [0.25,0.35,0.75,0.55].", "xyxy-0-1-square", (((50, 20, 150, 60),),)),
        ("It is at [0.25, 0.2, 0.75, 0.6].", "xyxy-0-1", (((50, 20, 150, 60),),)),
        ("It is at [50,20,100,40;0,0,10,10].", "xywh-pixels", (((50, 20, 150, 60), (0, 0, 10, 10)),)),
    ],
)  # fmt: skip
def test_boxes_in_text_become_pixels(sharegpt, tmp_path, answer, boxes, groups):
    for lines in (False, True):
        (example,) = sharegpt([talk(answer)], boxes, lines=lines)
        (turn,) = example.turns
        assert (turn.question, turn.answer) == ("<image>\nWhere is the cup?", "It is at <boxes>.")
        assert len(turn.answer_boxes) == len(groups)
        for found, expected in zip(turn.answer_boxes, groups, strict=True):
            for box, right in zip(found, expected, strict=True):
                assert box == pytest.approx(right)
        assert (example.image, example.task) == (tmp_path / "a.png", "dialogue")
        assert example.facts == {"entry_id": "t", "width": 200, "height": 100}


def test_without_a_convention_text_stays(sharegpt):
    (example,) = sharegpt(
        [
            talk("At [0.1,0.2,0.3,0.4]."),
        ]
    )
    assert example.turns[0].answer == "At [0.1,0.2,0.3,0.4]."
    assert example.turns[0].answer_boxes == ()


def test_qwens_entries_name_their_image_in_the_text(sharegpt, tmp_path):
    asked = "Picture 1: <img>photos/a.png</img>\nWhere is <ref>the cup</ref>?"
    row = talk("<box>(100,200),(300,400)</box>", asked)
    del row["image"]
    (example,) = sharegpt([row], "xyxy-0-1000")
    assert example.image == tmp_path / "photos" / "a.png"
    assert example.turns[0].question == "<image>\nWhere is the cup?"
    assert example.turns[0].answer_boxes == (((20, 20, 60, 40),),)
    row["conversations"][0]["value"] = f"{asked} And <img>photos/b.png</img>?"
    with pytest.raises(ValueError, match="shows 2 images; one is read"):
        sharegpt([row])
    row["conversations"][0]["value"] = "Where is it? <img>../a.png</img>"
    with pytest.raises(ValueError, match="not inside the folder"):
        sharegpt([row])


def test_sizes_come_from_the_image_where_the_entry_says_none(sharegpt, tmp_path):
    row = talk("[0,0,500,500]")
    del row["width"], row["height"]
    with pytest.raises(ValueError, match=r"entry 0 says no width and height, and a\.png cannot tell them"):
        sharegpt([row], "xyxy-0-1000")
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    assert sharegpt([row], "xyxy-0-1000")[0].turns[0].answer_boxes == (((0, 0, 20, 10),),)


def test_roles_and_systems(sharegpt):
    messages = [{"role": "system", "content": "You see."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello {}."}]  # fmt: skip
    (example,) = sharegpt([{"messages": messages}], "xyxy-pixels")
    assert (example.image, example.turns[0].question, example.turns[0].answer) == (None, "Hi", "Hello {}.")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (talk("[5,5,5,9]"), "entry 1, message 1 has box .* is empty"),
        (talk("<boxes>"), "message 1 says <boxes>"),
        (talk("x", "<image><image>"), "says <image> 2 times"),
        (talk("x", image="../a.png"), "not inside"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "has 1 messages"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}]}, "is from 'gpt'"),
    ],
)
def test_broken_dialogues(sharegpt, row, match):
    with pytest.raises(ValueError, match=match):
        sharegpt([talk("fine"), row], "xyxy-pixels")


def test_conventions_are_named(sharegpt):
    with pytest.raises(ValueError, match="no box convention '0-1000'; conventions: xyxy-pixels"):
        sharegpt([talk("x")], "0-1000")


def png(color):
    content = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(content, format="PNG")
    return content.getvalue()


ROWS = {
    "image": [{"bytes": png(c), "path": f"{c}.png"} for c in ("red", "blue", "red")],
    "question": ["What color?", "What color?", "Which?"],
    "answers": [["red", "rot", "red"], ["blue"], ["red"]],
    "width": [8, 8, 8],
    "height": [6, 6, 6],
    "bbox": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 8.0, 6.0], [1.0, 1.0, 0.0, 2.0]],
}


@pytest.fixture(params=["parquet", "arrow", "saved"])
def folder(request, tmp_path):
    """The same rows as Parquet, as Arrow files, and as save_to_disk writes them."""
    made = datasets.Dataset.from_dict(ROWS).cast_column("image", datasets.Image())
    path = tmp_path / "set"
    if request.param == "saved":
        made.save_to_disk(str(path))
    else:
        path.mkdir()
        if request.param == "parquet":
            made.to_parquet(str(path / "validation-00000-of-00001.parquet"))
        else:
            made.save_to_disk(str(tmp_path / "whole"))
            (tmp_path / "whole" / "data-00000-of-00001.arrow").rename(path / "validation-00000-of-00001.arrow")
    return path


def test_datasets_of_questions(folder, tmp_path):
    images = tmp_path / "unpacked"
    first, second, third = read("datasets", images=images, dataset=folder, task="vqa")
    assert (first.id, first.task, first.turns[0].question, first.turns[0].answer) == (
        "set:0",
        "vqa",
        "What color?",
        "red",
    )
    assert first.references == ("red", "rot", "red")
    assert first.image.read_bytes() == png("red")
    assert first.image == third.image != second.image
    assert len(list(images.iterdir())) == 2
    written = [path.stat().st_mtime_ns for path in sorted(images.iterdir())]
    read("datasets", images=images, dataset=folder, task="vqa")
    assert [path.stat().st_mtime_ns for path in sorted(images.iterdir())] == written


def test_datasets_of_boxes(folder, tmp_path):
    columns = {"box": "bbox", "answer": "question"}
    options = {"columns": columns, "task": "rec", "boxes": "xywh-pixels"}
    faults = Faults()
    first, second = read("datasets", images=tmp_path, dataset=folder, faults=faults, **options)
    assert faults.count == 1  # a box without width
    assert first.turns[0].question == "What color?"
    assert first.turns[0].answer_boxes == (((1, 2, 4, 6),),)
    assert second.facts == {"width": 8, "height": 6}
    middle = read("datasets", images=tmp_path, dataset=folder, **options | {"boxes": "cxcywh-pixels"}, faults=Faults())
    assert middle[0].turns[0].answer_boxes == (((1 - 3 / 2, 2 - 4 / 2, 1 + 3 / 2, 2 + 4 / 2),),)
    several = options | {"columns": {"box": "bbox", "answer": "answers"}, "faults": Faults()}
    asked = read("datasets", images=tmp_path, dataset=folder, **several)
    assert [(e.id, e.turns[0].question) for e in asked] == [("set:0:0", "red"), ("set:0:1", "rot"), ("set:1", "blue")]
    reg, _ = read("datasets", images=tmp_path, dataset=folder, **several | {"task": "reg"})
    assert (reg.turns[0].answer, reg.references) == ("red", ("red", "rot", "red"))
    with pytest.raises(ValueError, match="there is no role 'boxes'"):
        read("datasets", images=tmp_path, dataset=folder, **options | {"columns": {"boxes": "bbox"}})
    with pytest.raises(ValueError, match="there is no task 'recc'"):
        read("datasets", images=tmp_path, dataset=folder, task="recc")


def test_vqav2_as_the_hub_has_it(tmp_path):
    """Ten objects a question, each with an annotator's answer."""
    said = ["red"] * 7 + ["pink"] * 3
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(said, 1)]
    rows = {"image": ["a.png"], "question": ["What color?"], "answers": [answers], "question_id": [4]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    columns = {"id": "question_id"}
    (example,) = read("datasets", images=tmp_path, dataset=tmp_path / "set", task="vqa", columns=columns)
    assert (example.id, example.turns[0].answer, example.references) == ("4", "red", tuple(said))


def test_datasets_of_dialogues_and_named_images(tmp_path):
    made = datasets.Dataset.from_dict({"image": ["a.png"], "conversations": [talk("[0,0,4,3]")["conversations"]]})
    (tmp_path / "set").mkdir()
    made.to_parquet(str(tmp_path / "set" / "train.parquet"))
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (example,) = read("datasets", images=tmp_path, dataset=tmp_path / "set", split="train")
    assert example.image == tmp_path / "a.png"
    assert example.turns[0].answer_boxes == (((0, 0, 4, 3),),)
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        read("datasets", images=tmp_path, dataset=tmp_path / "set", split="test")


def test_ids_of_dialogues_may_repeat_and_images_keep_their_names(tmp_path):
    rows = {
        "id": ["7", "7"], "conversations": [talk("x")["conversations"]] * 2,
        "image": [{"bytes": png(color), "path": "COCO_train2014_000000000042.png"} for color in ("red", "blue")],
    }  # fmt: skip
    made = datasets.Dataset.from_dict(rows, features=None).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "set"))
    first, second = read("datasets", images=tmp_path / "images", dataset=tmp_path / "set")
    assert (first.id, second.id, first.facts["entry_id"]) == ("set:0", "set:1", "7")
    assert first.image.name.startswith("COCO_train2014_000000000042-")
    assert first.image != second.image
    assert first.image.read_bytes() == png("red")


def test_splits_and_configurations_are_not_mixed(tmp_path):
    """Each file says its own name; one of an older set has a hash, one of a converted set a number only."""
    files = ["data/test-00000-of-00002", "data/test-00001-of-00002", "data/test-dev-00000-of-00001-0a1b2c3d4e5f6789",
             "data/train", "other/val/0000", "other/val/0001", "more/val/0000"]  # fmt: skip
    for name in files:
        path = tmp_path / "set" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"image": ["a.png"], "question": [name], "answer": ["x"]}
        datasets.Dataset.from_dict(row).to_parquet(str(path))

    def asked(dataset, split):
        found = read("datasets", images=tmp_path, dataset=tmp_path / dataset, task="vqa", split=split)
        return [example.turns[0].question for example in found]

    assert asked("set", "test") == files[:2]
    assert asked("set", "test-dev") == files[2:3]
    assert asked("set", "train") == files[3:4]
    assert asked("set/other", None) == asked("set/other", "val") == files[4:6]
    with pytest.raises(ValueError, match=r"set/data: has the splits test, test-dev, train; name one$"):
        asked("set/data", None)
    with pytest.raises(
        ValueError, match=r"set: has files of one split in the folders more/val, other/val; name one as"
    ):
        asked("set", "val")
    with pytest.raises(ValueError, match=r"has no split 'tes'; it has test, test-dev, train, val"):
        asked("set", "tes")


def test_folders_that_are_no_datasets(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no Parquet or Arrow file"):
        read("datasets", images=tmp_path, dataset=tmp_path / "empty")
    (tmp_path / "empty" / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is no folder of datasets, or a damaged one"):
        read("datasets", images=tmp_path, dataset=tmp_path / "empty")
