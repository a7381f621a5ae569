"""What can be said of a scene, with exact truth: expressions, captions, presence, colour, count, relation.

All text is lower case but for the first letter of a question. Every function is a pure function of its arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .scene import DIFFICULTIES, LARGE, Scene, Thing, sample_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = {"fish": "fish", "cross": "crosses", "hourglass": "hourglasses"}
MARGIN = 6.0
"""Pixels by which an object's centre must lie beyond the others' before a position word may be used."""


@dataclass(frozen=True)
class Question:
    """A question with its one right answer and the objects that it is about (for the LM's attention hints)."""

    kind: str  # color | count | relation | presence
    text: str
    answer: str
    things: tuple[Thing, ...]


def plural(category: str) -> str:
    return PLURALS.get(category, f"{category}s")


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def expressions(scene: Scene, thing: Thing) -> tuple[str, ...]:
    """Every referring expression of the grammar that holds for this object and for no other; at least one."""
    others = [t for t in scene.things if t is not thing]
    same = [t for t in others if t.category == thing.category]
    found = [f"the {thing.color} {thing.category}"]
    if not same:
        found.append(f"the {thing.category}")
    if all(t.color != thing.color for t in others):
        found.append(f"the {thing.color} object")
    if same:
        x, y = thing.center
        xs, ys = [t.center[0] for t in same], [t.center[1] for t in same]
        for holds, words in (
            (x < min(xs) - MARGIN, "on the left"),
            (x > max(xs) + MARGIN, "on the right"),
            (y < min(ys) - MARGIN, "at the top"),
            (y > max(ys) + MARGIN, "at the bottom"),
        ):
            if holds:
                found.append(f"the {thing.category} {words}")
        sizes = [t.side >= LARGE for t in same]
        if thing.side >= LARGE and not any(sizes):
            found.append(f"the large {thing.category}")
        if thing.side < LARGE and all(sizes):
            found.append(f"the small {thing.category}")
    return tuple(found)


def listing(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """ "a red star, a blue house and an orange cup": every thing with its colour, in random order."""
    order = [things[i] for i in rng.permutation(len(things))]
    parts = [f"{article(t.color)} {t.color} {t.category}" for t in order]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


CAPTION_FORMS = ("{}", "a picture of {}", "an image with {}", "{} on a dark background", "there is {}")


def captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Five captions, global and without positions, as alt text is: every object named with its colour, any order."""
    return tuple(form.replace("{}", listing(scene.things, rng)) for form in CAPTION_FORMS)


@lru_cache(maxsize=4)
def co_occurrence(difficulty: str = "easy") -> tuple[Counter[str], dict[str, Counter[str]]]:
    """How often each category, and each pair of categories, occurs in 2,000 training scenes (POPE ranks by these)."""
    single: Counter[str] = Counter()
    pairs: dict[str, Counter[str]] = {c: Counter() for c in DIFFICULTIES[difficulty].categories}
    for index in range(2000):
        present = sorted({t.category for t in sample_scene("train", index, difficulty).things})
        single.update(present)
        for a in present:
            pairs[a].update(b for b in present if b != a)
    return single, pairs


def absent(scene: Scene, strategy: str, count: int, rng: np.random.Generator, difficulty: str = "easy") -> list[str]:
    """POPE's negatives: `random`, `popular` (most frequent first), `adversarial` (most co-occurring first).

    Source of the three strategies: Li et al., "Evaluating Object Hallucination in LVLMs" (arXiv 2305.10355).
    """
    present = {t.category for t in scene.things}
    candidates = [c for c in DIFFICULTIES[difficulty].categories if c not in present]
    candidates = [candidates[i] for i in rng.permutation(len(candidates))]
    single, pairs = co_occurrence(difficulty)
    if strategy == "popular":
        candidates.sort(key=lambda c: -single[c])
    elif strategy == "adversarial":
        candidates.sort(key=lambda c: -sum(pairs[p][c] for p in present))
    elif strategy != "random":
        raise ValueError(f"unknown strategy {strategy!r}; valid: random, popular, adversarial")
    return candidates[:count]


def presence(scene: Scene, category: str) -> Question:
    things = tuple(t for t in scene.things if t.category == category)
    text = f"Is there {article(category)} {category} in the image?"
    return Question("presence", text, "yes" if things else "no", things)


def color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The colour of an object whose category occurs once; None where no category does."""
    counts = Counter(t.category for t in scene.things)
    unique = [t for t in scene.things if counts[t.category] == 1]
    if not unique:
        return None
    thing = unique[int(rng.integers(len(unique)))]
    return Question("color", f"What color is the {thing.category}?", thing.color, (thing,))


def count(scene: Scene, rng: np.random.Generator, difficulty: str = "easy") -> Question:
    """How many of a category: the number is drawn evenly from those that the scene offers, none included."""
    counts = Counter(t.category for t in scene.things)
    offered = sorted({0, *counts.values()})
    number = offered[int(rng.integers(len(offered)))]
    names = [c for c in DIFFICULTIES[difficulty].categories if counts[c] == number]
    name = names[int(rng.integers(len(names)))]
    things = tuple(t for t in scene.things if t.category == name)
    return Question("count", f"How many {plural(name)} are there?", str(number), things)


RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is A left of / right of / above / below B? None where no two objects are `MARGIN` apart on the axis drawn."""
    word = tuple(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    axis, sign = RELATIONS[word]
    wanted = bool(rng.random() < 0.5)
    order = rng.permutation(len(scene.things))
    for i in order:
        for j in order:
            a, b = scene.things[i], scene.things[j]
            apart = (a.center[axis] - b.center[axis]) * sign
            if i != j and abs(apart) > MARGIN and (apart > 0) == wanted:
                text = f"Is the {a.color} {a.category} {word} the {b.color} {b.category}?"
                return Question("relation", text, "yes" if wanted else "no", (a, b))
    return None
