"""What the report tells beside scores: learned weights, the inside of alignments, answers by lot and failures."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from commvlm.evaluate.predictions import append_records
from commvlm.evaluate.tasks import Record
from commvlm.study.controls import translated
from commvlm.study.experiments import collapse, table_7, weights
from commvlm.study.gallery import gallery
from commvlm.study.inside import alignments, alignments_table, as_facts, layer_weights, weights_table
from commvlm.study.results import Results
from commvlm.study.runs import Places
from commvlm.study.settings import load_scale
from commvlm.train.assemble import located
from commvlm.train.recipe import Encoder


def linear(gradient_norm):
    return {"gradient_norm": gradient_norm, "spread": 2.0, "rank": 3.0}


def results_of(row, *runs):
    keys = {str(seed): f"k{seed}" for seed in range(len(runs))}
    return Results({"rows": {row: {"runs": keys}}}, dict(zip(keys.values(), runs, strict=True)))


def test_learned_weights_are_told_layer_by_layer_over_seeds():
    rows = weights(load_scale("micro"))
    told = [{"layer_weights": {"clip": {"1": low, "10": 0.5}, "mae": {"5": 1.0}}} for low in (0.25, 0.75)]
    results = results_of("COMM", *told)
    assert layer_weights(rows, results) == {
        "COMM": {"clip": {"1": [0.25, 0.75], "10": [0.5, 0.5]}, "mae": {"5": [1.0, 1.0]}}
    }
    table = weights_table(layer_weights(rows, results))
    assert table.head == ["row", "encoder", "1", "5", "10"]
    assert table.rows == [
        ["COMM", "clip", "0.5 (0.25 to 0.75)", "–", "0.5 (0.5 to 0.5)"], ["COMM", "mae", "–", "1 (1 to 1)", "–"],
    ]  # fmt: skip
    assert weights_table(layer_weights(rows, results_of("COMM", told[0]))).rows[0][2] == "0.25"


def test_alignments_are_told_before_and_after_training_over_seeds():
    rows = collapse(load_scale("micro"))
    deep = next(row.name for row in rows if "8 MLP" in row.name)
    told = [
        {"alignments": {"mae": {"start": [linear(norm), linear(0.5)], "end": [linear(1.0), linear(1.0)]}}}
        for norm in (1e-5, 3e-5)
    ]
    results = results_of(deep, *told)
    table = alignments_table(alignments(rows, results))
    assert table.head[4:] == ["linear layer 1", "linear layer 2"]
    first = ["gradient norm / weight norm", "2e-05 (1e-05 to 3e-05)", "0.5 (0.5 to 0.5)"]
    assert table.rows[0] == [deep, "mae", "before training", *first]
    assert len(table.rows) == 6
    facts = as_facts([], rows, results)
    assert facts["layer_weights"] == {}
    assert facts["alignments"][deep]["mae"]["start"]["gradient_norm"] == [[1e-5, 0.5], [3e-5, 0.5]]
    assert alignments(rows, results_of(deep, {"alignments": {}})) == {}  # of a linear alignment


def test_failures_are_drawn_from_what_was_answered_wrongly(tmp_path):
    """REC: one right, one wrong, one without a box. POPE: one right, one wrong. A caption is neither."""
    folder = Places(tmp_path).run("k0") / "predictions"
    folder.mkdir(parents=True)
    asked = {  # boxes in the padded square: the left half of the image, and a corner of it
        "rec": [
            ("right", "[0.000,0.250,0.500,0.750]", ""),
            ("wrong", "[0.800,0.500,1.000,0.750]", ""),
            ("none", "here", ""),
        ],
        "pope": [("yes", "yes", "yes"), ("no", "no", "yes")],
        "caption": [("dog", "a dog", "a cat")],
    }
    for task, answers in asked.items():
        records = []
        for name, text, truth in answers:
            picture = tmp_path / f"{task} {name}.png"
            Image.new("RGB", (20, 10)).save(picture)
            boxes = ((0.0, 0.0, 10.0, 10.0),) if task == "rec" else ()
            records.append(Record(name, task, str(picture), 20, 10, f"{name}?", text, None, truth, boxes))
        with (folder / f"{task}.jsonl").open("wb") as file:
            append_records(file, records)
    results = Results({"rows": {"COMM": {"runs": {"0": "k0"}}}}, {"k0": {"key": "k0"}})
    found = gallery(Places(tmp_path), results, load_scale("micro"))
    assert {picture.question for picture in found.failed} == {"wrong?", "none?", "no?"}
    assert {picture.verdict for picture in found.failed} == {"wrong"}
    assert (found.wrong, found.asked) == (3, 5)
    assert {picture.question for picture in found.by_lot} == {"right?", "wrong?", "none?", "yes?", "no?", "dog?"}


def test_the_papers_other_encoders_are_in_table_7_where_one_of_them_is_of_the_pair():
    assert [row.name for row in table_7(load_scale("micro"))][2:] == ["mae 6", "mae 8", "deit 6", "deit 8"]
    names = [row.name for row in table_7(load_scale("analysis"))]
    assert not any(name.startswith(("clip 2", "dinov2 2")) for name in names)


@pytest.mark.parametrize(("weights", "called", "ours"), [("dinov2", "vit", "mae"), ("clip", "dino", "clip")])
def test_a_peers_encoder_is_known_by_its_family_and_not_by_its_folder(tmp_path, weights, called, ours):
    scale = load_scale("micro")
    folder = shutil.copytree(Path(located(f"micro:{weights}")), tmp_path / called)
    theirs = scale.model(Encoder(name="one", checkpoint=str(folder), layers=-1))
    assert [branch.name for branch in translated(scale, theirs).encoders] == [ours]
