"""Real photos and real annotation lines through the commands: build, train, evaluate, ask.

The encoders have the true shapes of ViT-L/14 at 336 pixels (24 x 24 patches) from the shipped facts, with random weights;
the language model is the packaged tiny one, whose byte-level tokenizer takes any text. The real lines name photos that
are not all at hand, so they are put on two that are, of the same 640 x 480 pixels.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commvlm.cli import main

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")

FIRST, SECOND = "COCO_test2015_000000000001.jpg", "000000039769.png"
QUESTION = "What is in the image?"


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def coco(root: Path) -> None:
    """COCO captions of two real images, all five of each, on our two."""
    real = json.loads((SAMPLES / "coco_caption" / "captions_val2014_cut1000.json").read_text())
    images, annotations = [], []
    for new, (entry, name) in enumerate(zip(real["images"], (FIRST, SECOND), strict=False), start=1):
        images.append({**entry, "id": new, "file_name": name, "width": 640, "height": 480})
        annotations += [{**a, "image_id": new} for a in real["annotations"] if a["image_id"] == entry["id"]]
    (root / "captions.json").write_text(json.dumps({**real, "images": images, "annotations": annotations}))


def vqa(root: Path) -> None:
    """VQAv2's two files with four real questions, about COCO's test image 1 by COCO's own naming."""
    asked = json.loads((SAMPLES / "vqa_v2" / "questions_1000.json").read_text())["questions"][:4]
    answered = {
        a["question_id"]: a
        for a in json.loads((SAMPLES / "vqa_v2" / "annotations_1000.json").read_text())["annotations"]
    }
    questions = [{**q, "image_id": 1} for q in asked]
    annotations = [{**answered[q["question_id"]], "image_id": 1} for q in asked]
    (root / "questions.json").write_text(json.dumps({"data_subtype": "test2015", "questions": questions}))
    (root / "annotations.json").write_text(json.dumps({"annotations": annotations}))


def llava(root: Path) -> None:
    """LLaVA's pretraining and instruct entries, several turns among them."""
    real = json.loads((SAMPLES / "llava" / "llava_examples.json").read_text())
    rows = [{**entry, "image": (FIRST, SECOND)[k % 2]} for k, entry in enumerate(real.values())]
    (root / "llava.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("real")
    shutil.copytree(SAMPLES / "coco_images", root / "images")
    for name in (FIRST, SECOND):
        with Image.open(root / "images" / name) as image:
            assert image.size == (640, 480)
    (line,) = lines_of(SAMPLES / "shikra" / "REC_line_real.jsonl")
    write_lines(root / "rec.jsonl", [{**line, "img_path": name} for name in (FIRST, SECOND)])
    pope = lines_of(SAMPLES / "pope" / "coco_pope_adversarial.json")[:6]
    write_lines(root / "pope.json", [{**row, "image": (FIRST, SECOND)[k % 2]} for k, row in enumerate(pope)])
    coco(root), vqa(root), llava(root)
    return root


def source(name: str, format: str, /, **settings: Any) -> dict[str, Any]:
    return {"name": name, "format": format, "images": "images", **settings}


REC = {"annotations": "rec.jsonl"}
VQA = {"questions": "questions.json", "annotations": "annotations.json"}
TRAINED = [
    source("rec", "refer-jsonl", files=REC, options={"task": "rec"}),
    source("reg", "refer-jsonl", files=REC, options={"task": "reg", "group": "line"}),
    source("caption", "coco-captions", files={"annotations": "captions.json"}),
    source("vqa", "vqa", files=VQA),
    source("llava", "llava", files={"conversations": "llava.json"}),
]
ASKED = [
    source("rec", "refer-jsonl", files=REC, options={"task": "rec"}),
    source("reg", "refer-jsonl", files=REC, options={"task": "reg"}),
    source("caption", "coco-captions", files={"annotations": "captions.json"}, options={"per": "image"}),
    source("vqa", "vqa", files=VQA),
    source("pope", "pope", files={"questions": "pope.json"}, options={"set_name": "adversarial"}),
]
STAGE = {
    "name": "two-steps", "steps": 2, "batch": 4, "micro_batch": 2, "warmup": 0.0,
    "trains": {"merge": 1e-4, "align": 1e-4, "project": 1e-4, "language_model": 1e-4},
}  # fmt: skip


def options(data: Path, *more: str) -> list[str]:
    """comm-7b with what is at hand: encoders of its shapes with random weights, the tiny language model, our files."""
    return [
        "--data.root", str(data),
        "--model.language_model", "micro:lm",
        "--model.encoders.clip.weights", "random",
        "--model.encoders.dinov2.weights", "random",
        "--data.sources", json.dumps(TRAINED),
        "--data.held_out", "[]",
        "--data.faults", "refuse",
        "--evaluate.sources", json.dumps(ASKED),
        "--evaluate.max_new_tokens", "6",
        "--train.stages", json.dumps([STAGE]),
        "--train.log_every", "1",
        *more,
    ]  # fmt: skip


SHALLOW = [
    "--model.encoders.clip.layers", "[1, 2]",
    "--model.encoders.dinov2.layers", "2",
    "--model.encoders.dinov2.align", "{kind: mlp, hidden: 1, ratio: 1}",
    "--train.precision", "fp32",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    folder: Path
    log: list[dict[str, Any]]
    facts: dict[str, Any]


def trained(data: Path, out: Path, *more: str) -> Run:
    assert main(["train", "comm-7b", "--out", str(out), *options(data, *more)]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return Run(out, log, json.loads((out / "run.json").read_text()))


@pytest.fixture(scope="module")
def shallow(data, tmp_path_factory) -> Run:
    return trained(data, tmp_path_factory.mktemp("shallow") / "run", *SHALLOW)


def check_steps(run: Run) -> None:
    """Two steps with finite losses and gradients, after which the layer weights are no longer equal."""
    assert [row["step"] for row in run.log] == [1, 2]
    assert all(math.isfinite(row["loss"]) and 0.5 < row["loss"] < 20 for row in run.log)
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in run.log)
    assert len(set(run.facts["layer_weights"]["clip"].values())) > 1
    assert run.facts["parts"]["encoders"]["trained"] == 0


def check_evaluation(run: Run, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {name: score["n"] for name, score in scores.items()} == {
        "rec": 2,
        "reg": 2,
        "caption": 2,
        "vqa": 4,
        "pope": 6,
    }
    assert all(0 <= score["value"] <= 1000 for score in scores.values())
    records = {name: lines_of(run.folder / "predictions" / f"{name}.jsonl") for name in scores}
    assert all((row["width"], row["height"]) == (640, 480) for rows in records.values() for row in rows)
    (line,) = lines_of(SAMPLES / "shikra" / "REC_line_real.jsonl")
    for row in records["rec"]:
        assert line["expression"] in row["question"]
        assert row["boxes"] == [pytest.approx(line["bbox"])]
    for row in records["reg"]:
        assert row["asked_boxes"] == [pytest.approx(line["bbox"])]
        assert row["references"] == [line["expression"]]
    assert all(len(row["references"]) >= 5 for row in records["caption"])
    assert all(len(row["references"]) == 10 for row in records["vqa"])


def check_chat(run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (FIRST, SECOND):
        capsys.readouterr()
        image, drawn = data / "images" / name, tmp_path / f"{name}.answer.png"
        assert main(["chat", str(run.folder), "--image", str(image), "--out", str(drawn), QUESTION]) == 0
        said = capsys.readouterr().out
        assert said.strip()
        assert ("drawn in" in said) == drawn.exists()


def test_build_with_random_weights(data, tmp_path, capsys):
    out = tmp_path / "model"
    command = ["build", "comm-7b", "--weights", "random", "--out", str(out), *options(data, *SHALLOW)]
    assert main(command) == 0
    assert "576 visual tokens an image" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    vision = config["vision_config"]
    assert [(b["layers"], b["depth"], b["image_size"]) for b in vision["branches"]] == [
        ([1, 2], 24, 336),
        ([2], 24, 336),
    ]
    assert (vision["clip"]["hidden_size"], vision["dinov2"]["hidden_size"]) == (1024, 1024)
    processor = json.loads((out / "processor_config.json").read_text())
    means = [encoder["mean"] for encoder in processor["image_processor"]["encoders"]]
    assert means == [pytest.approx([0.48145466, 0.4578275, 0.40821073]), pytest.approx([0.485, 0.456, 0.406])]
    assert processor["num_image_tokens"] == 576


def test_two_training_steps(shallow):
    check_steps(shallow)


def test_evaluation(shallow, data, capsys):
    check_evaluation(shallow, data, capsys)


def test_chat(shallow, data, tmp_path, capsys):
    check_chat(shallow, data, tmp_path, capsys)


def test_a_box_beyond_the_photo_is_told_by_its_size(data, tmp_path, capsys):
    """The real line says 480 x 640; on a photo of another size its box would lie elsewhere."""
    root = shutil.copytree(data, tmp_path / "data")
    for name in (FIRST, SECOND):
        with Image.open(root / "images" / name) as image:
            image.resize((320, 240)).save(root / "images" / name)
    stage = {**STAGE, "weights": {"reg": 0, "caption": 0, "vqa": 0, "llava": 0}}
    more = [*SHALLOW, "--train.stages", json.dumps([stage])]
    assert main(["train", "comm-7b", "--out", str(tmp_path / "run"), *options(root, *more)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "its boxes are for an image of 640 x 480 pixels" in error
    assert "has 320 x 240" in error


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_full_depth_of_comm_7b(data, tmp_path, capsys):
    """CLIP's 24 layers, DINOv2's last six with its MLP, in bf16 as the recipe says; everything but the language model."""
    run = trained(data, tmp_path / "run")
    assert len(run.facts["layer_weights"]["clip"]) == 24
    assert list(run.facts["layer_weights"]["dinov2"]) == [str(layer) for layer in range(19, 25)]
    assert run.facts["parts"]["encoders"]["parameters"] == pytest.approx(303.5e6 + 304.4e6, rel=0.01)
    check_steps(run)
    check_evaluation(run, data, capsys)
    check_chat(run, data, tmp_path, capsys)
