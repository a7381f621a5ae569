"""Stores: what was read comes back, to the letter; made once, whole or not at all; nothing is held in memory."""

import json
import os
import pickle
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commvlm.data import prepare, store
from commvlm.data.example import Example, Turn
from commvlm.data.prepare import fingerprint, prepare_source
from commvlm.data.sizes import size_note
from commvlm.data.store import Stored, image_codes, write_store

WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: text.replace("<", "("))
NUMBER = st.floats(-1e6, 1e6, allow_nan=False)
GROUP = st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), min_size=1, max_size=3).map(tuple)
POINTS = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=2).map(tuple)
FACTS = st.dictionaries(WORDS, st.one_of(st.integers(-(2**53), 2**53), NUMBER, WORDS), max_size=3)


@st.composite
def turns(draw):
    boxes, points = draw(st.lists(GROUP, max_size=2)), draw(st.lists(POINTS, max_size=1))
    question = draw(WORDS) + " <boxes>" * len(boxes)
    answer = draw(WORDS) + " <points>" * len(points)
    return Turn(question, answer, question_boxes=tuple(boxes), answer_points=tuple(points))


@given(
    st.lists(st.tuples(st.lists(turns(), min_size=1, max_size=3), st.integers(-1, 5), FACTS), max_size=12), st.data()
)
@settings(max_examples=25, deadline=None)
def test_examples_come_back_to_the_letter(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("store")
    images = folder / "images"
    made = [
        Example(str(n), "vqa", None if image < 0 else images / f"a/{image}.jpg", tuple(t), ("x", "ü\n"), facts)
        for n, (t, image, facts) in enumerate(rows)
    ]
    assert write_store(folder / "s", made, images, {}) == len(made)
    stored = Stored(folder / "s", images)
    assert list(stored) == made
    assert [stored[n] for n in range(len(made))] == made
    assert len(stored) == len(made)
    if made:
        n = data.draw(st.integers(0, len(made) - 1))
        assert pickle.loads(pickle.dumps(stored))[n] == made[n]
        assert stored[-1] == made[-1]
    names, codes = image_codes(stored)
    same_names, same_codes = image_codes(made)
    assert names == same_names
    assert codes.tolist() == same_codes.tolist()


def example(n, images):
    return Example(str(n), "caption", images / f"{n % 7}.jpg", (Turn("", f"number {n}"),))


def test_rows_across_batches(tmp_path):
    write_store(tmp_path / "s", (example(n, tmp_path) for n in range(1000)), tmp_path, {})
    stored = Stored(tmp_path / "s", tmp_path)
    for n in (0, store.BATCH - 1, store.BATCH, 999):
        assert stored[n] == example(n, tmp_path)
    for n in (1000, -1001):
        with pytest.raises(IndexError, match="of a store of 1000"):
            stored[n]


def test_a_store_is_whole_or_not_there(tmp_path):
    def broken():
        yield example(0, tmp_path)
        raise ValueError("the reader found something")

    with pytest.raises(ValueError, match="found something"):
        write_store(tmp_path / "s", broken(), tmp_path, {})
    assert not (tmp_path / "s").exists()
    write_store(tmp_path / "s", [example(0, tmp_path)], tmp_path, {})
    assert not (tmp_path / "s.part").exists()


@pytest.mark.parametrize("name", ["meta.json", "examples.arrow", "images.arrow"])
def test_damaged_stores(tmp_path, name):
    write_store(tmp_path / "s", [example(n, tmp_path) for n in range(3)], tmp_path, {})
    (tmp_path / "s" / name).write_bytes(b"{")
    with pytest.raises(ValueError, match="is no store of examples, or a damaged one; prepare it again"):
        Stored(tmp_path / "s", tmp_path)


@pytest.fixture
def source(tmp_path):
    row = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}
    path = tmp_path / "pope.json"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, row | {"label": "maybe"}, row | {"text": "Is he?"})))
    return {"format": "pope", "images": tmp_path, "files": {"questions": path}, "options": {"set_name": "random"}}


def test_preparing_counts_what_it_leaves_out(tmp_path, source):
    stored = prepare_source(tmp_path / "s", **source)
    assert [e.turns[0].question for e in stored] == ["Is it?", "Is he?"]
    assert stored[0].facts["set"] == "random"
    assert stored.meta["skipped"]["count"] == 1
    (places,) = stored.meta["skipped"]["places"].values()
    assert places == ["pope.json:2: has label 'maybe', it must be yes or no"]


def test_preparing_again_reads_nothing(tmp_path, source, monkeypatch):
    prepare_source(tmp_path / "s", **source)
    monkeypatch.setattr(prepare, "stream", lambda *a, **kw: pytest.fail("the files were read again"))
    assert len(prepare_source(tmp_path / "s", **source)) == 2


@pytest.mark.parametrize("change", ["options", "content", "time"])
def test_a_store_of_other_files_is_made_anew(tmp_path, source, change):
    first = prepare_source(tmp_path / "s", **source)
    path = source["files"]["questions"]
    if change == "options":
        source["options"] = {"set_name": "popular"}
    elif change == "content":
        path.write_text(path.read_text() * 2)
    else:
        os.utime(path, (1, 1))
    second = prepare_source(tmp_path / "s", **source)
    assert second.meta["source"] != first.meta["source"]


def test_a_folder_of_folders_is_known_by_the_files_in_them(tmp_path):
    """A set of the hub keeps its Parquet in data/: one that is written anew changes nothing of the folder above."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    marks = []
    for content in (b"1", b"22"):
        file.write_bytes(content)
        marks.append(fingerprint("datasets", tmp_path, {"dataset": tmp_path / "set"}, {}))
    assert marks[0] != marks[1]
    assert marks[1] == fingerprint("datasets", tmp_path, {"dataset": tmp_path / "set"}, {})


def test_a_vanished_file(tmp_path, source):
    prepare_source(tmp_path / "s", **source)
    source["files"]["questions"].unlink()
    with pytest.raises(ValueError, match="there is no such annotation file"):
        prepare_source(tmp_path / "s", **source)
    shutil.rmtree(tmp_path / "s")


REFCOCO = {"refs": "refer/refcoco/refs(unc).p", "instances": "refer/refcoco/instances.json"}


@pytest.mark.parametrize(
    ("format", "files", "options", "count", "said"),
    [
        ("refer", REFCOCO, {"split": "val"}, 10_834, None),
        ("refer", REFCOCO, {"split": "val"}, 8_811, "RefCOCO val, expressions has 10,834 examples, here are 8,811"),
        ("refer", REFCOCO, {"split": "testA", "task": "reg"}, 1_975, None),
        (
            "refer",
            REFCOCO,
            {"split": "testA", "task": "reg", "group": "object"},
            5_657,
            "RefCOCO testA, objects has 1,975",
        ),
        ("refer", REFCOCO, {"split": "testA", "task": "reg", "group": "line"}, 5_657, None),
        ("refer", {"refs": "refcoco+/refs(unc).p"}, {"split": "testB"}, 4_888, "RefCOCO+ testB, expressions has 4,889"),
        ("refer", {"refs": "refcocog/refs(google).p"}, {"split": "val"}, 7_573, None),
        ("pope", {"questions": "coco_pope_random.json"}, {}, 2910, "POPE random: 2,910, the 2023 file"),
        ("pope", {"questions": "coco_pope_random.json"}, {}, 3000, "since October 2023"),
        ("pope", {"questions": "coco_pope_popular.json"}, {}, 3000, None),
        ("pope", {"questions": "coco_pope_popular.json"}, {}, 2999, "POPE popular has 3,000 examples, here are 2,999"),
        ("mme", {}, {}, 2374, None),
        ("mme", {}, {}, 2373, "MME has 2,374"),
        ("mme", {}, {"subtasks": ["color"]}, 60, None),
        (
            "karpathy",
            {"annotations": "dataset_coco.json"},
            {"split": "test"},
            25_010,
            "COCO Karpathy test, images has 5,000",
        ),
        ("vqa", {"questions": "my_questions.json"}, {}, 5, None),
    ],
)
def test_known_sizes(format, files, options, count, said):
    note = size_note(format, files, options, count)
    assert note is None if said is None else said in note
