"""MME's release on the micro world: a folder a subtask, two yes/no questions an image, in a text file of the image's name.

DIR/test/mme/{existence,count,position,color}/{micro_test_*.png, micro_test_*.txt}, 30 images a subtask as in the original.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import language
from .scene import Scene, generator

IMAGES = 30
ENDING = "Please answer yes or no."
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Pair = tuple[str, str]
"""A question whose answer is yes, and one whose answer is no."""


def write_mme(folder: Path, scenes: Sequence[Scene], images: Path, difficulty: str) -> None:
    """images: the folder of the scenes' pictures. An image that a subtask has no pair of questions for is passed over."""
    for number, (name, ask) in enumerate(SUBTASKS.items()):
        (folder / name).mkdir(parents=True)
        written = 0
        for scene in scenes:
            pair = ask(scene, generator(scene.split, scene.index, 14 + number), difficulty)
            if pair is None or written == IMAGES:
                continue
            lines = [f"{text} {ENDING}\t{label}\n" for text, label in zip(pair, ("Yes", "No"), strict=True)]
            (folder / name / scene.name).with_suffix(".txt").write_text("".join(lines))
            _share(images / scene.name, folder / name / scene.name)
            written += 1


def _share(source: Path, target: Path) -> None:
    """The same bytes under a second name, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _existence(scene: Scene, rng: np.random.Generator, difficulty: str) -> Pair | None:
    present = sorted({thing.category for thing in scene.things})
    missing = language.absent(scene, "random", 1, rng, difficulty)
    if not missing:
        return None
    there = present[int(rng.integers(len(present)))]
    return language.presence(scene, there).text, language.presence(scene, missing[0]).text


def _count(scene: Scene, rng: np.random.Generator, difficulty: str) -> Pair | None:
    counts = sorted(Counter(thing.category for thing in scene.things).items())
    name, number = counts[int(rng.integers(len(counts)))]
    other = [k for k in range(1, 5) if k != number][int(rng.integers(3))]
    yes, no = (_how_many(k, name) for k in (number, other))
    return yes, no


def _how_many(number: int, name: str) -> str:
    return f"Are there {number} {language.plural(name)}?" if number > 1 else f"Is there only 1 {name}?"


def _position(scene: Scene, rng: np.random.Generator, difficulty: str) -> Pair | None:
    question = language.relation(scene, rng)
    if question is None:
        return None
    word = next(word for word in OPPOSITE if f" {word} " in question.text)
    turned = question.text.replace(f" {word} ", f" {OPPOSITE[word]} ")
    return (question.text, turned) if question.answer == "yes" else (turned, question.text)


def _color(scene: Scene, rng: np.random.Generator, difficulty: str) -> Pair | None:
    question = language.color(scene, rng)
    if question is None:
        return None
    (thing,) = question.things
    others = sorted({t.color for t in scene.things} - {thing.color}) or None
    if others is None:
        return None
    other = others[int(rng.integers(len(others)))]
    return f"Is the {thing.category} {thing.color}?", f"Is the {thing.category} {other}?"


SUBTASKS: dict[str, Callable[[Scene, np.random.Generator, str], Pair | None]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
}
