"""Every benchmark from small files in its real format: an oracle scores all there is, a model goes the whole way."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commvlm.app.questions import questions_of
from commvlm.cli import main
from commvlm.data.example import BOXES, Example, Turn
from commvlm.evaluate.answerers import mute, oracle
from commvlm.evaluate.run import predict, score
from commvlm.evaluate.tasks import MME, POINTQA, TASKS, V7W, Record
from commvlm.train.assemble import assemble
from commvlm.train.keys import RecipeError
from commvlm.train.recipe import Source, load_recipe
from commvlm.train.sources import named_examples
from commvlm.train.whole import save_whole

SIZES = {1: (64, 48), 2: (40, 60), 3: (50, 50)}
THINGS = {1: "the red cup on the left", 2: "a tall blue door", 3: "one small green star"}


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".p":
        path.write_bytes(pickle.dumps(value, protocol=2))
    elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    rng = np.random.default_rng(0)
    names = {
        **{f"train2014/COCO_train2014_{k:012d}.jpg": SIZES[k] for k in SIZES},
        **{f"flickr/100{k}.jpg": SIZES[k] for k in SIZES},
        **{f"vg/{k}.jpg": SIZES[k] for k in SIZES},
        **{f"vg/v7w_{k}.jpg": SIZES[k] for k in SIZES},
        **{f"mme/count/{k}.jpg": SIZES[k] for k in SIZES},
        **{f"mme/artwork/images/{k}.jpg": SIZES[k] for k in SIZES},
    }
    for name, (width, height) in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(root / name, quality=95)
    boxes = {k: [4.0, 6.0, 20.0 + k, 30.0] for k in SIZES}
    refs = [
        {
            "ref_id": k, "ann_id": 10 + k, "image_id": k, "category_id": 1, "split": "testA", "file_name": "x.jpg",
            "sent_ids": [2 * k, 2 * k + 1],
            "sentences": [{"sent_id": 2 * k + n, "sent": s, "raw": s, "tokens": s.split()}
                          for n, s in enumerate((THINGS[k], f"{THINGS[k]} here"))],
        }
        for k in SIZES
    ]  # fmt: skip
    put(root / "refer/refs(unc).p", refs)
    coco = [
        {"id": k, "file_name": f"COCO_train2014_{k:012d}.jpg", "width": w, "height": h} for k, (w, h) in SIZES.items()
    ]
    things = [{"id": 10 + k, "image_id": k, "category_id": 1, "bbox": [4, 6, 16 + k, 24]} for k in SIZES]
    put(root / "refer/instances.json", {"images": coco, "annotations": things})
    put(root / "shikra.jsonl", [
        {"img_path": f"COCO_train2014_{k:012d}.jpg", "expression": THINGS[k], "bbox": boxes[k], "dataset_name": "refcoco",
         "width": SIZES[k][0], "height": SIZES[k][1]} for k in SIZES
    ])  # fmt: skip
    for name in ("random", "popular"):
        put(root / f"coco_pope_{name}.json", [
            {"question_id": 2 * k + n, "image": f"COCO_train2014_{k:012d}.jpg", "text": f"Is there a {what} in the image?",
             "label": label} for k in SIZES for n, (what, label) in enumerate((("cup", "yes"), ("car", "no")))
        ])  # fmt: skip
    for name, type_ in (("v2", "what color is"), ("okvqa", "four")):
        put(root / f"{name}/questions.json", {"data_subtype": "train2014", "questions": [
            {"question_id": k, "image_id": k, "question": "What color is it?"} for k in SIZES]})  # fmt: skip
        put(root / f"{name}/annotations.json", {"annotations": [
            {"question_id": k, "image_id": k, "question_type": type_, "answer_type": "other",
             "multiple_choice_answer": "red", **({"confidence": 3} if name == "okvqa" else {}),
             "answers": [{"answer": "red" if i < 7 else "dark red", "raw_answer": "reddish", "answer_id": i + 1}
                         for i in range(10)]} for k in SIZES]})  # fmt: skip
    captions = [
        {"id": 10 * k + n, "image_id": k, "caption": f"{THINGS[k]}, view {n}."} for k in SIZES for n in range(5)
    ]
    put(root / "captions.json", {"images": coco, "annotations": captions})
    for name, at in (("coco", lambda k: {"filepath": "train2014", "filename": coco[k - 1]["file_name"], "cocoid": k}),
                     ("flickr30k", lambda k: {"filename": f"100{k}.jpg"})):  # fmt: skip
        put(root / f"dataset_{name}.json", {"dataset": name, "images": [
            {**at(k), "imgid": k, "sentids": list(range(5)), "split": "test",
             "sentences": [{"raw": f"{THINGS[k]}, seen {n}.", "tokens": [], "imgid": k, "sentid": n} for n in range(5)]}
            for k in SIZES]})  # fmt: skip
    for subtask in ("count", "artwork/questions_answers_YN"):
        for k in SIZES:
            lines = [f"Is it {k}?  Please answer yes or no.\tYes\n", f"Is it {k + 1}? Please answer yes or no.\tNo\n"]
            (root / "mme" / subtask).mkdir(parents=True, exist_ok=True)
            (root / "mme" / subtask / f"{k}.txt").write_text("".join(lines))
    put(root / "localqa.json", {str(k): [{
        "id": 1, "question": "What color is this?", "all_ans": ["red"], "points": [{"x": 9, "y": 9, "ans": "Red"}],
        "all_objs": [{"x": 4, "y": 6, "w": 16, "h": 24, "names": ["cup"], "attributes": []}]}] for k in SIZES})  # fmt: skip
    put(root / "v7w.json", {
        "images": [{"image_id": k, "filename": f"v7w_{k}.jpg", "split": "test", "qa_pairs": [
            {"qa_id": 100 + k, "question": "Which is the cup?", "answer": 4 * k, "type": "which",
             "multiple_choices": [4 * k + 1, 4 * k + 2, 4 * k + 3]}]} for k in SIZES],
        "boxes": [{"box_id": 4 * k + n, "name": "cup", "x": 8 * n - 2, "y": 6 * n, "width": 14, "height": 12}
                  for k in SIZES for n in range(4)],
    })  # fmt: skip
    return root


SOURCES: list[dict[str, Any]] = [
    {"name": "rec", "format": "refer", "images": "train2014", "options": {"split": "testA"},
     "files": {"refs": "refer/refs(unc).p", "instances": "refer/instances.json"}},
    {"name": "reg", "format": "refer", "images": "train2014", "options": {"split": "testA", "task": "reg"},
     "files": {"refs": "refer/refs(unc).p", "instances": "refer/instances.json"}},
    {"name": "rec-shikra", "format": "refer-jsonl", "images": "train2014", "files": {"annotations": "shikra.jsonl"}},
    *({"name": f"pope-{name}", "format": "pope", "images": "train2014", "options": {"set_name": name},
       "files": {"questions": f"coco_pope_{name}.json"}} for name in ("random", "popular")),
    {"name": "vqa", "format": "vqa", "images": "train2014",
     "files": {"questions": "v2/questions.json", "annotations": "v2/annotations.json"}},
    {"name": "caption", "format": "coco-captions", "images": "train2014", "files": {"annotations": "captions.json"},
     "options": {"per": "image"}},
    {"name": "mme", "format": "mme", "images": "mme", "files": {}, "options": {"subtasks": ["count", "artwork"]}},
    {"name": "pointqa", "format": "pointqa-local", "images": "vg", "files": {"questions": "localqa.json"}},
    {"name": "v7w", "format": "visual7w", "images": "vg", "files": {"questions": "v7w.json"}, "options": {"split": "test"}},
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {"name": "okvqa", "format": "ok-vqa", "images": "train2014",
     "files": {"questions": "okvqa/questions.json", "annotations": "okvqa/annotations.json"}},
    {"name": "coco-karpathy", "format": "karpathy", "images": ".", "files": {"annotations": "dataset_coco.json"},
     "options": {"split": "test"}},
    {"name": "flickr", "format": "karpathy", "images": "flickr", "files": {"annotations": "dataset_flickr30k.json"},
     "options": {"split": "test"}},
    {"name": "v7w-points", "format": "visual7w", "images": "vg", "files": {"questions": "v7w.json"},
     "options": {"split": "test", "by": "point"}},
    {"name": "pointqa-points", "format": "pointqa-local", "images": "vg", "files": {"questions": "localqa.json"},
     "options": {"by": "point"}},
]  # fmt: skip
FULL = {"rec": 100, "pope": 100, "vqa": 100, "mme": 400, "pointqa": 100, "v7w": 100}


@pytest.mark.parametrize("source", [*SOURCES, *OTHERS], ids=lambda source: source["name"])
def test_the_oracle_has_full_marks_and_the_mute_one_none(source, folder, tmp_path):
    (examples,) = named_examples([Source(**source)], folder).values()
    (found,) = score(predict(oracle(examples), examples, tmp_path / "oracle.jsonl", progress=None)).values()
    assert found.n == len({e.id for e in examples}) >= 3
    assert found.unparsable == 0
    if found.task in FULL:
        assert found.value == pytest.approx(FULL[found.task])
    else:
        assert found.value > 100
    (nothing,) = score(predict(mute, examples, tmp_path / "mute.jsonl", progress=None)).values()
    assert nothing.value == (50 if found.task == "pope" else 0)
    assert nothing.unparsable == found.n


def test_a_model_goes_the_whole_way(folder, tmp_path, capsys):
    model, processor = assemble(load_recipe("micro").model)
    with torch.no_grad():
        model.model.multi_modal_projector.weight.mul_(30)
    save_whole(tmp_path / "model", model, processor)
    argv = ["evaluate", str(tmp_path / "model"), "--recipe", "micro", "--data.root", str(folder), "--json"]
    argv += ["--evaluate.sources", json.dumps([*SOURCES, *OTHERS[:3]]), "--evaluate.max_new_tokens", "8"]
    argv += ["--out", str(tmp_path / "out")]
    assert main(argv) == 0
    scores = json.loads(capsys.readouterr().out)
    asked = {
        "rec.rec": 6, "rec.shikra": 3, "reg": 3, "pope": 12, "vqa.vqa": 3, "vqa.okvqa": 3, "caption.caption": 3,
        "caption.coco-karpathy": 3, "caption.flickr": 3, "mme": 12, "pointqa": 3, "v7w": 3,
    }  # fmt: skip
    assert {name: found["n"] for name, found in scores.items()} == asked
    assert {found["task"] for found in scores.values()} == set(TASKS)
    assert {path.stem for path in (tmp_path / "out" / "receipts").iterdir()} == set(asked)
    files = json.loads((tmp_path / "out" / "receipts" / "mme.json").read_text())["files"]
    assert files["mme.images"]["bytes"] > 0
    split = json.loads((tmp_path / "out" / "receipts" / "vqa.okvqa.json").read_text())["split"]
    assert split == "okvqa"
    official = {path.name for path in (tmp_path / "out" / "official").iterdir()}
    assert {"vqa.vqa.json", "vqa.okvqa.json", "rec.shikra.jsonl", "pope_random.jsonl", "mme"} <= official
    assert main([*argv, "--tasks", "vqa.okvqa,rec"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"vqa.okvqa", "rec.rec", "rec.shikra"}
    assert main([*argv, "--tasks", "vqa.gqa"]) == 2
    there = "caption, mme, pointqa, pope, rec, reg, v7w, vqa.okvqa, vqa.vqa"
    assert f"the recipe asks nothing of 'vqa.gqa'; it asks {there}\n" in capsys.readouterr().err


def test_one_set_of_a_task_is_called_by_the_task_and_pope_is_one_whatever_its_sources(folder):
    recipe = load_recipe("micro", ["--data.root", str(folder), "--evaluate.sources", json.dumps(SOURCES[3:6])])
    sets = {one.name: one for one in questions_of(recipe)}
    assert {name: len(one.examples) for name, one in sets.items()} == {"pope": 12, "vqa": 3}
    assert [source.name for source in sets["pope"].sources] == ["pope-random", "pope-popular"]
    (only,) = questions_of(recipe, ["vqa"])
    assert only.examples == sets["vqa"].examples


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x"])
def test_a_sources_name_can_be_a_files(name, folder):
    said = json.dumps([{**SOURCES[5], "name": name}])
    with pytest.raises(RecipeError, match="a name is of letters"):
        questions_of(load_recipe("micro", ["--data.root", str(folder), "--evaluate.sources", said]))


# --- scores by hand ---


def record(task: str, id: str, text: str, **fields: Any) -> Record:
    values = {"width": 100, "height": 100, "question": "?", "answer": "", "parsed": None, "image": "a.png"}
    return Record(id=id, task=task, text=text, **{**values, **fields})


def test_mme_by_hand():
    """Two images of existence, one of code: 3 of 4 right, one image whole; both right, by a wrapper and a word."""
    said = [("existence", "a", "yes", "yes"), ("existence", "a", "No, never", "no"), ("existence", "b", "other", "yes"),
            ("existence", "b", "not", "no"), ("code_reasoning", "c", "The answer is yes.", "Yes"),
            ("code_reasoning", "c", "nope", "No")]  # fmt: skip
    records = [
        record("mme", str(k), text, answer=label, image=image, facts={"subtask": subtask})
        for k, (subtask, image, text, label) in enumerate(said)
    ]
    found = MME.score(records)
    assert found.extra["perception"] == 75 + 50
    assert found.extra["cognition"] == 200
    assert found.value == 325
    assert (found.unparsable, found.extra["unwrapped"]) == (1, 1)
    assert "position" in found.extra["not_asked"]  # type: ignore[operator]
    assert found.interval is not None
    assert found.interval[0] <= 325 <= found.interval[1]
    with pytest.raises(ValueError, match=r"mme 9: subtask 'colour' is none of MME's"):
        MME.score([record("mme", "9", "yes", answer="yes", facts={"subtask": "colour"})])
    with pytest.raises(ValueError, match="mme 9: the true answer is 'maybe'"):
        MME.score([record("mme", "9", "yes", answer="maybe", facts={"subtask": "count"})])


def test_visual7w_chooses_the_candidate_that_is_touched_most():
    boxes = ((0.0, 0.0, 40.0, 40.0), (30.0, 0.0, 90.0, 40.0), (0.0, 50.0, 40.0, 90.0), (50.0, 50.0, 90.0, 90.0))
    fields = {"asked_boxes": boxes, "facts": {"answer_index": 1}}
    texts = {
        "[0.350,0.000,0.600,0.400]": (True, False),  # 25 wide of 60: chosen, but an overlap below one half
        "[0.300,0.000,0.900,0.400]": (True, True),
        "[0.000,0.000,0.350,0.400]": (False, False),
        "[0.420,0.200]": (True, True),  # a point that only one candidate holds
        "[0.390,0.200]": (False, True),  # in both: nearer the other's middle
        "[0.950,0.950]": (False, False),
        "[0.910,0.000,0.950,0.050]": (False, False),
        "the second": (False, False),
    }
    for text, (choice, box) in texts.items():
        assert V7W.score([record("v7w", "1", text, **fields)]).value == 100 * choice, text
        assert V7W.score([record("v7w", "1", text, **fields)], rule="box").value == 100 * box, text
    assert V7W.score([record("v7w", "1", "the second", **fields)]).unparsable == 1
    with pytest.raises(ValueError, match="v7w 1: Visual7W needs the candidates' boxes"):
        V7W.score([record("v7w", "1", "[0.1,0.1]", facts={"answer_index": 4}, asked_boxes=boxes)])


def test_pointqa_by_both_rules():
    texts = {"The answer is Red.": (1, 1), "red": (1, 0), " Red. ": (1, 0), "The answer is red.": (1, 0), "blue": (0, 0),
             "The answer is dark Red.": (0, 0)}  # fmt: skip
    for text, (exact, shikra) in texts.items():
        asked = [record("pointqa", "1", text, answer="Red", references=("Red",))]
        assert POINTQA.score(asked).value == 100 * exact, text
        assert POINTQA.score(asked, rule="shikra").value == 100 * shikra, text
    with pytest.raises(ValueError, match="pointqa 1: PointQA needs a true answer"):
        POINTQA.score([record("pointqa", "1", "red")])


def test_reg_of_refer_is_per_ref(folder, tmp_path):
    """Two refs may have one box: refer's ids tell them apart."""
    image = folder / "vg" / "1.jpg"
    asked = [
        Example(str(k), "reg", image, (Turn(BOXES, text, (((1.0, 1.0, 9.0, 9.0),),)),), (text,), {"ref_id": k})
        for k, text in enumerate(("a red cup", "the blue door", "one star"))
    ]
    assert score(predict(oracle(asked), asked, tmp_path / "p.jsonl", progress=None))["reg"].n == 3
