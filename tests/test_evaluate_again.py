"""Answers that are there already: by whom they were made, and the truth that they are held against."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from PIL import Image

from commvlm.data.example import BOXES, Example, Turn
from commvlm.evaluate.predictions import partial_path, read_predictions
from commvlm.evaluate.run import _made_alike, predict, score
from commvlm.evaluate.shards import Shard

MADE = {"model": "a", "images": "given", "knock_out": ""}


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    said = {"a": ("red",) * 10, "b": ("blue",) * 10}
    return [Example(k, "vqa", tmp_path / "a.png", (Turn(f"{k}?", v[0]),), v) for k, v in said.items()]


def saying(*texts: str):
    return lambda batch: list(texts)[: len(batch)]


def test_answers_of_another_model_are_not_taken(examples, tmp_path):
    path = predict(saying("red", "blue"), examples, tmp_path / "p.jsonl", progress=None, made=MADE)
    before = path.read_bytes()
    predict(saying(), examples, path, progress=None, made=MADE)
    for name, value in (("model", "b"), ("knock_out", "dinov2"), ("precision", "bf16")):
        with pytest.raises(ValueError, match=f"p.jsonl holds answers of another {name} .* choose another folder"):
            predict(saying(), examples, path, progress=None, made={**MADE, name: value})
    assert path.read_bytes() == before


def test_a_run_that_was_stopped_is_not_finished_by_another_model(examples, tmp_path):
    path, begun = tmp_path / "p.jsonl", []

    def dies(batch):
        if begun:
            raise KeyboardInterrupt
        begun.append(batch)
        return ["red"]

    with pytest.raises(KeyboardInterrupt):
        predict(dies, examples, path, batch_size=1, progress=None, made=MADE)
    with pytest.raises(ValueError, match="another model"):
        predict(saying("blue"), examples, path, progress=None, made={**MADE, "model": "b"})
    predict(saying("blue"), examples, path, progress=None, made=MADE)
    assert [record.text for record in read_predictions(path)] == ["red", "blue"]
    partial_path(path).with_suffix("").unlink()
    predict(saying("no", "no"), examples, path, progress=None, made={**MADE, "model": "b"})  # it begins anew
    assert json.loads((tmp_path / "p.made.json").read_text())["model"] == "b"


def test_corrected_annotations_count(examples, tmp_path):
    path = predict(saying("red", "blue"), examples, tmp_path / "p.jsonl", progress=None)
    assert score(path)["vqa"].value == 100
    corrected = [replace(e, turns=(replace(e.turns[0], answer="zebra"),), references=("zebra",) * 10) for e in examples]
    predict(saying(), corrected, path, progress=None)
    assert score(path)["vqa"].value == 0
    again = replace(examples[0], facts={"question_type": "which"})
    predict(saying(), [again, examples[1]], path, progress=None, notes={"codec": "own"})
    assert score(path)["vqa"].value == 100
    assert read_predictions(path)[0].facts == {"question_type": "which", "codec": "own"}


def test_a_box_that_was_asked_about_is_part_of_the_question(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")

    def asked(*box: float) -> list[Example]:
        return [Example("0", "reg", tmp_path / "a.png", (Turn(BOXES, "a cup", ((box,),)),), ("a cup",))]  # type: ignore[arg-type]

    path = predict(saying("a cup"), asked(1.0, 2.0, 3.0, 4.0), tmp_path / "p.jsonl", progress=None)
    with pytest.raises(ValueError, match="asked reg 0 in other words"):
        predict(saying("a cup"), asked(1.0, 2.0, 3.0, 5.0), path, progress=None)


def test_an_image_of_another_size_than_annotated_is_refused(examples, tmp_path):
    odd = replace(examples[0], facts={"width": 640, "height": 480})
    with pytest.raises(ValueError, match=r"vqa a: .*a.png is 40 x 30 pixels, but annotated as 640 x 480"):
        predict(saying("red"), [odd], tmp_path / "p.jsonl", progress=None)


def test_scores_and_images_of_a_saved_model_are_no_part_of_it(tmp_path):
    from commvlm.app.evaluation import _model_files
    from commvlm.evaluate.receipts import fingerprint

    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path, _model_files(tmp_path))
    assert before == fingerprint(tmp_path)
    for name in ("scores.json", "predictions/rec.jsonl", "receipts/rec.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Path(tmp_path / name).write_text("[]")
    assert fingerprint(tmp_path, _model_files(tmp_path)) == before


def test_ranks_may_note_the_maker_at_once(tmp_path):
    def rank(number: int, path: Path, ready: Barrier) -> None:
        ready.wait()
        _made_alike(path, MADE, begun=False, shard=Shard(number, 4))

    with ThreadPoolExecutor(4) as pool:
        for k in range(50):
            (tmp_path / str(k)).mkdir()
            ready = Barrier(4)
            for done in [pool.submit(rank, n, tmp_path / str(k) / "p.jsonl", ready) for n in range(4)]:
                done.result()
            assert [p.name for p in (tmp_path / str(k)).iterdir()] == ["p.made.json"]
