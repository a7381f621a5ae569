"""One image under several names: what is held out is known under all of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from commvlm.data.image_keys import IMAGE_DATA, image_key, nameless, written_name
from commvlm.train.recipe import Data, Source
from commvlm.train.sources import training_examples


def test_one_image_under_several_names():
    train, instruct = Path("a/COCO_train2014_000000123456.jpg"), Path("b/000000123456.jpg")
    assert image_key(train) == image_key(instruct) == "coco:123456"
    assert image_key(Path("a/1.png")) != image_key(Path("b/1.png"))
    assert image_key(Path("micro_train_000000000001.png")).endswith("micro_train_000000000001.png")


def test_an_image_out_of_a_row_keeps_its_name():
    named = Path("rows") / written_name(b"x", "train2014/COCO_train2014_000000123456.jpg", ".jpg")
    assert image_key(named) == "coco:123456"
    assert (
        Path(written_name(b"x", "../../e vil.jpg", ".png")).name == f"e_vil-{hashlib.sha256(b'x').hexdigest()[:32]}.png"
    )
    bare = Path("rows") / written_name(b"x", None, ".jpg")
    assert image_key(bare).endswith(str(bare))
    assert nameless([named, bare, Path("a/COCO_train2014_000000123456.jpg")]) == 1


def genome(root: Path, rows: list[dict[str, Any]]) -> None:
    (root / "vg").mkdir(parents=True)
    (root / "vg" / IMAGE_DATA).write_text(json.dumps(rows))


def test_cocos_images_are_known_under_visual_genomes_names(tmp_path):
    genome(tmp_path, [{"image_id": 2363870, "coco_id": 123456}, {"image_id": 7, "coco_id": None}])
    coco = image_key(Path("a/COCO_train2014_000000123456.jpg"))
    for place in ("vg/VG_100K", "vg/images/VG_100K", "vg/images2/VG_100K_2"):
        assert image_key(tmp_path / place / "2363870.jpg") == coco
        assert image_key(tmp_path / place / "7.jpg") == "vg:7"
    assert image_key(tmp_path / "visual7w" / "images" / "v7w_2363870.jpg") == coco
    assert image_key(tmp_path / "gqa" / "images" / "2363870.jpg") == coco
    assert image_key(tmp_path / "vg" / "other" / "2363870.jpg").endswith(
        "2363870.jpg"
    )  # a number is no image of theirs
    genome(tmp_path / "broken", [{"id": 1}])
    with pytest.raises(ValueError, match=r"image_data.json: is no list of Visual Genome's images"):
        image_key(tmp_path / "broken" / "vg" / "VG_100K" / "1.jpg")


@pytest.mark.parametrize("known", [True, False])
def test_held_out_images_are_left_out_under_visual_genomes_names(known, tmp_path, capsys):
    """An image of a test is image 5 of Visual Genome's; without its list nobody can know, and that is said."""
    if known:
        genome(tmp_path, [{"image_id": 5, "coco_id": 42}, {"image_id": 6, "coco_id": 43}])
    lines = {
        "gc.jsonl": ["VG_100K/5.jpg", "VG_100K/6.jpg"],
        "test.jsonl": ["COCO_train2014_000000000042.jpg"],
    }
    box = {"expression": "a cup", "bbox": [0, 0, 9, 9], "width": 64, "height": 48}
    for name, images in lines.items():
        (tmp_path / name).write_text("".join(json.dumps({"img_path": image, **box}) + "\n" for image in images))
    source = {"format": "refer-jsonl", "images": "vg"}
    (tmp_path / "vg").mkdir(exist_ok=True)
    data = Data(
        root=str(tmp_path),
        sources=[Source(name="gc", files={"annotations": "gc.jsonl"}, options={"task": "gc"}, **source)],
        held_out=[Source(name="test", files={"annotations": "test.jsonl"}, **source)],
    )
    found = [example.image.name for example in training_examples(data)["gc"]]
    said = capsys.readouterr().err
    assert found == (["6.jpg"] if known else ["5.jpg", "6.jpg"])
    assert ("1 examples about held-out images left out" in said) == known
    assert ("2 images of Visual Genome's, of which held-out ones cannot be told" in said) != known
