"""What the shipped recipes ask on real data, from small files at the places that they name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from commvlm.app.questions import questions_of
from commvlm.cli import main
from commvlm.study.settings import load_scale, shipped_scales
from commvlm.train.recipe import load_recipe, shipped_recipes

SPLITS = [
    *(f"{name}-{split}" for name in ("refcoco", "refcoco+") for split in ("val", "testA", "testB")),
    "refcocog-val", "refcocog-test",
]  # fmt: skip
THREE = (1, 2, 3)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(path)


def put(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".p":
        path.write_bytes(pickle.dumps(value, protocol=2))
    elif path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value))


def refer(root: Path, files: dict) -> None:
    splits = ("val", "testA", "testB", "test")
    refs = [
        {"ref_id": k, "ann_id": k, "image_id": k % 3 + 1, "category_id": 1, "split": split, "file_name": "x.jpg",
         "sent_ids": [k], "sentences": [{"sent_id": k, "sent": "the cup", "raw": "the cup", "tokens": ["the", "cup"]}]}
        for k, split in enumerate([split for split in splits for _ in THREE])
    ]  # fmt: skip
    coco = [{"id": k, "file_name": f"COCO_train2014_{k:012d}.jpg", "width": 64, "height": 48} for k in THREE]
    things = [
        {"id": ref["ann_id"], "image_id": ref["image_id"], "category_id": 1, "bbox": [4, 6, 16, 24]} for ref in refs
    ]
    put(root / files["refs"], refs)
    put(root / files["instances"], {"images": coco, "annotations": things})


def vqa(root: Path, files: dict) -> None:
    keys = [{"question_id": k, "image_id": k} for k in THREE]
    asked = [{**key, "question": "What is it?"} for key in keys]
    put(root / files["questions"], {"data_subtype": "val2014", "questions": asked})
    answers = [{"answer": "cup", "answer_id": n} for n in range(1, 11)]
    put(root / files["annotations"], {"annotations": [
        {**key, "question_type": "what", "answer_type": "other", "answers": answers} for key in keys]})  # fmt: skip


def pope(root: Path, files: dict) -> None:
    put(root / files["questions"], [
        {"question_id": k, "image": f"COCO_val2014_{k:012d}.jpg", "text": "Is there a cup in the image?", "label": "yes"}
        for k in THREE])  # fmt: skip


def karpathy(root: Path, files: dict) -> None:
    put(root / files["annotations"], {"dataset": "coco", "images": [
        {"imgid": k, "filename": f"{k}.jpg", "split": "test", "sentids": [k],
         "sentences": [{"raw": "A cup.", "tokens": [], "imgid": k, "sentid": k}]} for k in THREE]})  # fmt: skip


def mme(root: Path, files: dict) -> None:
    (root / "mme" / "count").mkdir(parents=True)
    for k in THREE:
        (root / "mme" / "count" / f"{k}.txt").write_text("Is it one?\tYes\nIs it two?\tNo\n")
        picture(root / "mme" / "count" / f"{k}.jpg")


WRITERS = {"refer": refer, "vqa": vqa, "ok-vqa": vqa, "pope": pope, "karpathy": karpathy, "mme": mme}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Files at every place that comm-7b evaluates on, in their real formats, and empty ones where it learns."""
    root = tmp_path_factory.mktemp("real")
    for place in [path for source in load_recipe("comm-7b").data.sources for path in source.files.values()]:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).touch()
    for source in load_recipe("comm-7b").evaluate.sources:
        (root / source.images).mkdir(parents=True, exist_ok=True)
        places = [root / path for path in source.files.values()]
        if not places or not all(path.is_file() for path in places):
            WRITERS[source.format](root, source.files)
    return root


def asked(name: str, root: Path, tasks=()) -> dict[str, int]:
    recipe = load_recipe(name, ["--data.root", str(root)])
    return {one.name: len(one.examples) for one in questions_of(recipe, tasks)}


def test_comm_asks_every_benchmark_of_the_paper_split_by_split(root):
    assert asked("comm-7b", root) == {
        **{f"rec.{split}": 3 for split in SPLITS}, **{f"reg.{split}": 3 for split in SPLITS}, "pope": 9,
        "vqa.vqav2": 3, "vqa.okvqa": 3, "caption.coco": 3, "caption.flickr30k": 3, "mme": 6,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "micro"])
def test_every_recipe_on_real_data_asks_the_same(name, root):
    assert asked(name, root, ["rec.refcocog-test", "mme"]) == {"rec.refcocog-test": 3, "mme": 6}


def test_what_is_not_asked_need_not_be_there(root, tmp_path):
    """Its sets have the names that they have among all others; where one of a name is asked, and no other."""
    recipe = load_recipe("comm-7b", ["--data.root", str(tmp_path)])
    (source,) = [one for one in recipe.evaluate.sources if one.name == "refcocog-test"]
    shutil.copytree(root / source.images, tmp_path / source.images)
    for path in source.files.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, tmp_path / path)
    assert asked("comm-7b", tmp_path, ["rec.refcocog-test"]) == {"rec.refcocog-test": 3}
    with pytest.raises(ValueError, match="no such"):
        asked("comm-7b", tmp_path, ["rec"])
    with pytest.raises(ValueError, match=r"asks nothing of 'rec.refcocog'; it asks caption, .*rec.refcocog-test"):
        asked("comm-7b", tmp_path, ["rec.refcocog"])


@pytest.mark.parametrize("name", shipped_scales())
def test_a_scales_recipe_asks_what_the_scale_scores(name, root, world):
    scale = load_scale(name)
    found = asked(scale.recipe, root if scale.world is None else world, scale.tasks)
    assert {one.split(".")[0] for one in found} == {"rec", "reg", "pope", "vqa", "caption"}


def test_the_papers_own_scale_is_planned_whole(root, tmp_path, capsys):
    """Every row can be built at the published shapes, MAE's for DeiT, whose config the hub alone has; some are priced."""
    text = shipped_scales()["analysis"].read_text()
    timm = "timm/deit3_large_patch16_384.fb_in22k_ft_in1k"
    assert timm in text
    (tmp_path / "analysis.yaml").write_text(text.replace(timm, "facebook/vit-mae-large"))
    words = ["study", "all", "--scale", str(tmp_path / "analysis.yaml"), "--data", str(root), "--seeds", "1", "--list"]
    rows = ["COMM", "mae 22"]
    assert main([*words, "--out", str(tmp_path / "out"), "--rows", *rows]) == 0
    said = capsys.readouterr().out
    assert "\n2 runs, " in said
    assert "hours of 8 x h100; 69 questions about 63 images to each run" in said
    assert "it cannot be trained so" not in said
    assert "the models that stay take 0.06 TB" in said  # two of 7.4 billion numbers in fp32
    words[1] = "weights"
    assert main([*words, "--out", str(tmp_path / "out"), "--processes", "1"]) == 2
    assert "train.engine fsdp shares a model out: ask for several processes" in capsys.readouterr().err
