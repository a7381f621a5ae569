"""A probe's questions from referring expressions, as they are distributed: refer's pickles, or Shikra's JSON lines."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.example import Box, Example
from ..data.images import open_image
from ..data.readers import read
from ..data.readers.files import read_object
from .problem import Picture, Problem, Thing

VOCABULARY = 300
"""Most words that heads learn: the most frequent ones of the training expressions."""
OFTEN = 2
"""Training objects that a word must be said of to be learnt."""
HELD = 0.25
"""Share of images that are asked about, where the files have no split."""
NOTHING: Mapping[int, Sequence[int]] = {}
PLAIN = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "is", "are", "that", "it", "by", "from", "for")
)
_WORD = re.compile(r"[a-z0-9]+")


def refer_problem(data: Path, *, images: Path | None = None, train: int, test: int) -> Problem:
    """The problem of a folder or file.

    data: a folder with `refs(*).p` and `instances.json` (split train is fitted on, val asked; objects have categories; of
    several splits umd's, or unc's; the pickle itself for another), or with JSON lines (`refer-jsonl`): train*.jsonl and
    test*.jsonl or val*.jsonl, or any one file, of whose images a quarter is asked about, drawn by a hash of their names.
    images: their folder; DATA/images by default. train, test: images at most.
    Raises ValueError for a folder with neither, and what the readers find wrong.
    """
    folder = data if data.is_dir() else data.parent
    if images is None:
        images = folder / "images" if (folder / "images").is_dir() else folder
    pickles = sorted(folder.glob("refs(*).p"), key=_as_the_field_splits) if data.is_dir() else []
    if pickles or data.suffix == ".p":
        files: dict[str, Any] = {"refs": pickles[0] if pickles else data, "instances": folder / "instances.json"}
        kinds = _kinds(files["instances"])
        fitted, held = (
            _pictures(read("refer", images=images, split=split, **files), kinds) for split in ("train", "val")
        )
    else:
        fitted, held = _lines(data, images)
    fitted, held = fitted[:train], held[:test]
    categories = _categories((*fitted, *held))
    words = _vocabulary(fitted, categories)
    known = {*categories, *words}
    asked = [tuple(_known(picture, known) for picture in split) for split in (fitted, held)]
    return Problem(data.name, (*categories, *words), len(categories), train=asked[0], test=asked[1])


def _as_the_field_splits(refs: Path) -> tuple[int, str]:
    """UMD's split of RefCOCOg, UNC's of the others; Google's shares images between training and val."""
    known = ("refs(umd).p", "refs(unc).p")
    return known.index(refs.name) if refs.name in known else len(known), refs.name


def _lines(data: Path, images: Path) -> tuple[list[Picture], list[Picture]]:
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise ValueError(f"{data}: has no refs(*).p and no *.jsonl of referring expressions; see docs/probes.md")
    first = [file for file in files if file.name.startswith("train")]
    second = [file for file in files if file.name.startswith(("test", "val"))]
    if first and second:
        return tuple(_pictures(read("refer-jsonl", images=images, annotations=f)) for f in (first[0], second[0]))  # type: ignore[return-value]
    if len(files) > 1:
        raise ValueError(
            f"{data}: has {', '.join(f.name for f in files)}; call them train.jsonl and test.jsonl, or give one"
        )
    every = _pictures(read("refer-jsonl", images=images, annotations=files[0]))
    ranked = sorted(every, key=lambda picture: hashlib.sha256(Path(picture.identity).name.encode()).digest())
    count = max(1, round(HELD * len(ranked)))
    return ranked[count:], ranked[:count]


def _kinds(instances: Path) -> dict[int, list[int]]:
    """Image -> categories of all that is annotated in it, also of what no expression speaks of."""
    found: dict[int, set[int]] = {}
    for entry in read_object(instances).entries("annotations", "annotation"):
        if entry.has("category_id"):
            found.setdefault(entry.integer("image_id"), set()).add(entry.integer("category_id"))
    return {image: sorted(kinds) for image, kinds in found.items()}


def _pictures(examples: Iterable[Example], kinds: Mapping[int, Sequence[int]] = NOTHING) -> list[Picture]:
    """Examples of one image together, expressions of one box as one object, in order of their first. kinds: see `_kinds`."""
    found: dict[Path, dict[Box, list[Example]]] = {}
    for example in examples:
        assert example.image is not None
        found.setdefault(example.image, {}).setdefault(example.turns[0].answer_boxes[0][0], []).append(example)
    return [_picture(path, objects, kinds) for path, objects in found.items()]


def _picture(path: Path, objects: dict[Box, list[Example]], kinds: Mapping[int, Sequence[int]]) -> Picture:
    facts = next(iter(objects.values()))[0].facts
    size = (int(facts["width"]), int(facts["height"])) if {"width", "height"} <= facts.keys() else open_image(path).size
    things = []
    for box, examples in objects.items():
        asked = tuple(dict.fromkeys(words_of(example.turns[0].question) for example in examples))
        kind = examples[0].facts.get("category_id")
        named = dict.fromkeys(word for words in asked for word in words)
        things.append(Thing(box, (*(() if kind is None else (category(kind),)), *named), asked))
    state = path.stat()
    identity = f"{path}:{state.st_size}:{state.st_mtime_ns}"
    seen = tuple(category(kind) for kind in kinds.get(int(facts.get("image_id", -1)), ()))
    return Picture(identity, size, partial(_open, path, size), tuple(things), seen)


def _open(path: Path, size: tuple[int, int]) -> Image.Image:
    image = open_image(path)
    if image.size != size:
        raise ValueError(
            f"{path}: is {image.width} x {image.height} pixels, its boxes are for {size[0]} x {size[1]}; "
            "use the images that were annotated"
        )
    return image


def category(number: object) -> str:
    """COCO's category by its number, as a word that no expression holds."""
    return f"#{number}"


def words_of(expression: str) -> tuple[str, ...]:
    """The words of an expression, lower case, once each, without the plainest."""
    return tuple(dict.fromkeys(word for word in _WORD.findall(expression.lower()) if word not in PLAIN))


def _categories(pictures: Sequence[Picture]) -> list[str]:
    found = {word for picture in pictures for thing in picture.things for word in thing.words if word.startswith("#")}
    return sorted(found, key=lambda word: int(word[1:]))


def _vocabulary(pictures: Sequence[Picture], categories: Sequence[str]) -> list[str]:
    said = Counter(
        word for picture in pictures for thing in picture.things for word in set(thing.words) - set(categories)
    )
    frequent = [word for word, count in sorted(said.items(), key=lambda pair: (-pair[1], pair[0])) if count >= OFTEN]
    if not frequent:
        raise ValueError(f"no word is said of {OFTEN} training objects; give more expressions")
    return frequent[:VOCABULARY]


def _known(picture: Picture, words: set[str]) -> Picture:
    """The picture with the vocabulary's words alone, and the questions that hold any."""
    things = tuple(
        Thing(
            t.box,
            tuple(w for w in t.words if w in words),
            tuple(known for asked in t.asked if (known := tuple(w for w in asked if w in words))),
        )
        for t in picture.things
    )
    return replace(picture, things=things, seen=tuple(w for w in picture.seen if w in words))
