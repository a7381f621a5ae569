"""Writes the micro world as users have their data: PNG images and annotation files in the real formats.

DIR/images/micro_{split}_{id}.png
DIR/{split}/rec.jsonl                        Shikra's referring expressions (bbox in pixels, corners)
DIR/{split}/captions.json                    COCO captions, five an image
DIR/{split}/questions.json, annotations.json VQAv2, ten answers a question
DIR/{split}/pope_{random,popular,adversarial}.json   POPE's JSON lines
DIR/test/mme/{existence,count,position,color}        MME's release, a folder a subtask
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from . import language
from .mme import write_mme
from .scene import SIDE, Scene, generator, render, sample_scene, world_of

POPE_SETS = ("random", "popular", "adversarial")
INFO = {"description": "commvlm micro world", "version": "1.1", "year": 2026}


def write_world(folder: Path, *, train: int = 6000, test: int = 1000, difficulty: str = "easy") -> Path:
    """Writes `train` and `test` scenes into `folder` and returns it. What is already there with the same settings stays.

    The annotation files of a split come last and whole, so an interrupted call is simply repeated. Raises ValueError
    where the folder holds a world of other settings or something else.
    """
    world_of(difficulty)
    settings = {"world": INFO, "side": SIDE, "difficulty": difficulty, "train": train, "test": test}
    made, begun = folder / "world.json", folder / "world.part"
    for kept in (made, begun):
        if kept.exists() and json.loads(kept.read_text()) != settings:
            raise ValueError(f"{kept} describes another world than asked for: remove the folder or choose another")
    if made.exists():
        return folder
    temporary = folder / "world.tmp"
    if not begun.exists() and folder.exists() and any(p != temporary for p in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no micro world: choose another folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(settings, indent=1))
    os.replace(temporary, begun)
    for split, size in (("train", train), ("test", test)):
        scenes = [sample_scene(split, index, difficulty) for index in range(size)]
        for scene in track(scenes, description=f"drawing {split}", console=Console(stderr=True)):
            _write_image(folder / "images" / scene.name, render(scene, difficulty))
        _write_split(folder / split, scenes, difficulty, images=folder / "images")
    os.replace(begun, made)
    return folder


def _write_image(path: Path, pixels: np.ndarray) -> None:
    if path.exists():
        return
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG", compress_level=1)
    part = path.with_suffix(".part")
    part.write_bytes(data.getvalue())
    os.replace(part, path)


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_split(folder: Path, scenes: list[Scene], difficulty: str, *, images: Path) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / "rec.jsonl").write_text(_lines([row for scene in scenes for row in refer_lines(scene)]))
    (part / "captions.json").write_text(json.dumps(coco_captions(scenes)))
    questions, annotations = vqa_files(scenes, difficulty)
    (part / "questions.json").write_text(json.dumps(questions))
    (part / "annotations.json").write_text(json.dumps(annotations))
    for name in POPE_SETS:
        (part / f"pope_{name}.json").write_text(_lines(pope_lines(scenes, name, difficulty)))
    if folder.name == "test":
        write_mme(part / "mme", scenes, images, difficulty)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def refer_lines(scene: Scene) -> list[dict[str, Any]]:
    """Shikra's lines: at most three expressions an object, each true of it alone."""
    rng = generator(scene.split, scene.index, 10)
    rows = []
    for thing in scene.things:
        found = language.expressions(scene, thing)
        for k in sorted(rng.permutation(len(found))[:3]):
            rows.append(
                {
                    "img_path": scene.name, "expression": found[k], "bbox": [float(v) for v in thing.box],
                    "dataset_name": "micro", "height": SIDE, "width": SIDE,
                }
            )  # fmt: skip
    return rows


def coco_captions(scenes: list[Scene]) -> dict[str, Any]:
    images = [{"id": s.index, "file_name": s.name, "height": SIDE, "width": SIDE} for s in scenes]
    texts = [(s, text) for s in scenes for text in language.captions(s, generator(s.split, s.index, 11))]
    annotations = [{"id": k, "image_id": s.index, "caption": text} for k, (s, text) in enumerate(texts)]
    return {"info": INFO, "licenses": [], "images": images, "annotations": annotations}


ANSWER_TYPES = {"color": "other", "count": "number", "relation": "yes/no"}


def vqa_files(scenes: list[Scene], difficulty: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """VQAv2's two files: a colour, a count and a relation question an image, where it offers them; ten equal answers."""
    questions, annotations = [], []
    for scene in scenes:
        rng = generator(scene.split, scene.index, 12)
        found = (language.color(scene, rng), language.count(scene, rng, difficulty), language.relation(scene, rng))
        for k, question in enumerate(found):
            if question is None:
                continue
            key = {"image_id": scene.index, "question_id": 10 * scene.index + k}
            questions.append({**key, "question": question.text})
            answer = {"answer": question.answer, "answer_confidence": "yes"}
            annotations.append(
                {
                    **key, "question_type": question.kind, "answer_type": ANSWER_TYPES[question.kind],
                    "multiple_choice_answer": question.answer,
                    "answers": [{**answer, "answer_id": i} for i in range(1, 11)],
                }
            )  # fmt: skip
    header = {"info": INFO, "license": {}, "data_type": "micro", "data_subtype": scenes[0].split}
    return {**header, "task_type": "Open-Ended", "questions": questions}, {**header, "annotations": annotations}


def pope_lines(scenes: list[Scene], strategy: str, difficulty: str) -> list[dict[str, Any]]:
    """POPE: for each image at most three present categories and as many absent ones, drawn by the set's strategy."""
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        rng = generator(scene.split, scene.index, 13)
        present = sorted({t.category for t in scene.things})
        present = [present[i] for i in rng.permutation(len(present))[:3]]
        for category in [*present, *language.absent(scene, strategy, len(present), rng, difficulty)]:
            question = language.presence(scene, category)
            rows.append(
                {"question_id": len(rows) + 1, "image": scene.name, "text": question.text, "label": question.answer}
            )
    return rows
