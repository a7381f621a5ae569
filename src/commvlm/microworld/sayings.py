"""Raw examples of a scene: what the writer puts into files and what the language model is pretrained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.example import BOXES, Turn
from . import language
from .scene import Scene, Thing


@dataclass(frozen=True)
class Saying:
    """One raw turn about a scene. task: rec | reg | pope | vqa | caption; kind: the question's type within its task;
    things: the objects that the answer depends on (none for an absent category)."""

    task: str
    kind: str
    turn: Turn
    things: tuple[Thing, ...]


def rec(scene: Scene, thing: Thing, expression: str) -> Saying:
    return Saying("rec", "rec", Turn(expression, BOXES, answer_boxes=((thing.box,),)), (thing,))


def reg(scene: Scene, thing: Thing, expression: str) -> Saying:
    return Saying("reg", "reg", Turn(BOXES, expression, question_boxes=((thing.box,),)), (thing,))


def asked(task: str, question: language.Question) -> Saying:
    return Saying(task, question.kind, Turn(question.text, question.answer), question.things)


def say(scene: Scene, kind: str, rng: np.random.Generator, difficulty: str = "easy") -> Saying | None:
    """One random saying of a kind: rec, reg, presence, color, count, relation, caption. None where the scene has none."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if kind in ("rec", "reg"):
        choice = language.expressions(scene, thing)
        expression = choice[int(rng.integers(len(choice)))] if kind == "rec" else choice[0]
        return rec(scene, thing, expression) if kind == "rec" else reg(scene, thing, expression)
    if kind == "presence":
        if rng.random() < 0.5:
            return asked("pope", language.presence(scene, thing.category))
        strategy = ("random", "popular", "adversarial")[int(rng.integers(3))]
        ranked = language.absent(scene, strategy, 3, rng, difficulty)
        return asked("pope", language.presence(scene, ranked[int(rng.integers(len(ranked)))]))
    if kind == "caption":
        text = language.captions(scene, rng)[int(rng.integers(len(language.CAPTION_FORMS)))]
        return Saying("caption", "caption", Turn("", text), scene.things)
    if kind == "count":
        return asked("vqa", language.count(scene, rng, difficulty))
    found = {"color": language.color, "relation": language.relation}[kind](scene, rng)
    return None if found is None else asked("vqa", found)
