"""What is wrong with data, before anything is trained on it: every problem has a name, a count and its first places."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .convention import Unsure, detect
from .example import Box, Example
from .image_keys import image_key
from .images import open_image

PROBLEMS = {
    "left out": "entries that make no example",
    "missing": "images that are not there",
    "broken": "images that cannot be decoded, or are refused",
    "other size": "images of another size than their annotation says",
    "outside": "boxes or points that reach more than a pixel out of their image",
    "nowhere": "boxes that do not touch their image at all",
    "empty": "examples with an answer that is empty",
    "too long": "examples of more tokens than train.max_length",
    "in a test": "examples for training whose image is also in a test, and which data.held_out does not leave out",
}
_N = r"\s*-?\d+(?:\.\d+)?\s*"
LIKE_A_BOX = re.compile(rf"\[(?:{_N},){{3}}{_N}\]|\({_N},{_N}\)\s*,\s*\({_N},{_N}\)")
"""Four numbers in brackets, or two pairs of them."""
SHOWN = 5
"""Places kept of every problem."""
TOLERANCE = 1.0
"""Pixels that a box may reach out of its image, by rounding."""
TOLD_BY = (20, 2000)
"""Boxes of a source that its convention is told by, at least and at most."""
Size = tuple[int, int]


@dataclass
class Problem:
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        self.count += count
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass
class SourceCheck:
    """What was found in one source. files: name -> path and bytes (None where it is missing). seen: images that were opened.
    held: examples for training whose image is held out, and which are not trained on, therefore.
    convention: what the boxes look like, where it is not what they were read as, or that they are read as text; note: about
    the number of examples; error: why the source could not be read at all."""

    name: str
    role: str
    format: str
    files: dict[str, tuple[str, int | None]]
    examples: int = 0
    images: int = 0
    seen: int = 0
    boxes: int = 0
    held: int = 0
    problems: dict[str, Problem] = field(default_factory=lambda: {name: Problem() for name in PROBLEMS})
    note: str | None = None
    convention: str | None = None
    error: str | None = None

    @property
    def bad(self) -> int:
        return sum(problem.count for problem in self.problems.values()) + (self.error is not None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def look_at_images(
    paths: Sequence[Path], *, workers: int | None = None, advance: Callable[[], None] = lambda: None
) -> dict[Path, Size | str]:
    """Every image decoded whole, many at once: its width and height, or why it cannot be used. advance: after each."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found: dict[Path, Size | str] = {}
        for path, seen in zip(paths, pool.map(_look, paths, chunksize=1), strict=True):
            found[path] = seen
            advance()
    return found


def _look(path: Path) -> Size | str:
    try:
        return open_image(path).size
    except ValueError as error:
        return str(error)


def check_examples(
    check: SourceCheck,
    examples: Iterable[Example],
    seen: Mapping[Path, Size | str],
    *,
    asked: Mapping[str, str] | None = None,
    held: Container[str] = (),
    lengths: Callable[[Sequence[Example]], list[int]] | None = None,
    longest: int | None = None,
) -> None:
    """Fills a source's check. seen: what `look_at_images` said of its images (those that were not opened are left alone).

    For training sources: asked: key of every image that evaluation asks about -> the source that does; held: those of images
    that are held out. lengths: tokens of
    examples, None where no tokenizer is at hand; longest: how many are allowed.
    """
    images: set[Path] = set()
    boxes: list[tuple[Box, Size]] = []
    written = 0
    for batch in _batches(examples):
        for example in batch:
            check.examples += 1
            if example.image is not None:
                images.add(example.image)
            written += any(LIKE_A_BOX.search(text) for turn in example.turns for text in (turn.question, turn.answer))
            _check_one(check, example, seen, asked or {}, held, boxes)
        if lengths is not None and longest is not None:
            for example, length in zip(batch, lengths(batch), strict=True):
                if length > longest:
                    check.problems["too long"].add(f"{example.id}: {length} tokens")
    check.images, check.seen = len(images), sum(1 for image in images if image in seen)
    for image in sorted(images):
        if isinstance(said := seen.get(image), str):
            check.problems["missing" if not image.is_file() else "broken"].add(said)
    check.convention = _convention(boxes)
    if written and not check.boxes:
        check.convention = (
            f"{written:,} examples have numbers like a box in their text, which are trained on as they stand; format "
            "sharegpt reads them, told what they mean: `boxes: xyxy-0-1000` (docs/data.md)"
        )


def _check_one(
    check: SourceCheck,
    example: Example,
    seen: Mapping[Path, Size | str],
    asked: Mapping[str, str],
    held: Container[str],
    boxes: list[tuple[Box, Size]],
) -> None:
    if check.role != "held out" and any(not turn.answer.strip() for turn in example.turns):
        check.problems["empty"].add(example.id)
    key = "" if example.image is None or not (asked or held) else image_key(example.image)
    if key in held:
        check.held += 1
    elif key in asked:
        check.problems["in a test"].add(f"{example.id}: {example.image.name} is asked by {asked[key]}")  # type: ignore[union-attr]
    places = [place for turn in example.turns for place in (*turn.boxes, *turn.points)]
    check.boxes += sum(len(place) == 4 for place in places)
    size = seen.get(example.image) if example.image is not None else None
    if not places or not isinstance(size, tuple):
        return
    said = (example.facts.get("width", size[0]), example.facts.get("height", size[1]))
    if said != size:
        check.problems["other size"].add(
            f"{example.id}: {said[0]} x {said[1]} said, {example.image} has {size[0]} x {size[1]}"  # type: ignore[union-attr]
        )
        return
    for place in places:
        if len(place) == 4 and len(boxes) < TOLD_BY[1]:
            boxes.append((place, size))
        if _outside(place, size):
            nowhere = len(place) == 4 and (place[2] <= 0 or place[3] <= 0 or place[0] >= size[0] or place[1] >= size[1])
            numbers = ", ".join(f"{value:g}" for value in place)
            where = f"{example.id}: ({numbers}) in {size[0]} x {size[1]}"
            check.problems["nowhere" if nowhere else "outside"].add(where)


def _outside(place: tuple[float, ...], size: Size) -> bool:
    xs, ys = place[::2], place[1::2]
    low, high = min(*xs, *ys), max(max(xs) - size[0], max(ys) - size[1])
    return low < -TOLERANCE or high > TOLERANCE


def _convention(boxes: list[tuple[Box, Size]]) -> str | None:
    """A word on boxes that look as if their reader had been told the wrong convention."""
    if len(boxes) < TOLD_BY[0]:
        return None
    try:
        verdict = detect([box for box, _ in boxes], [size for _, size in boxes])
    except Unsure as unsure:
        own = next((item for item in unsure.evidence if item.name == "xyxy-pixels"), None)
        return None if own is None or own.outside < 0.03 else str(unsure)
    name = verdict.convention.name
    if name == "xyxy-pixels":
        return None
    behind = next(item.behind for item in verdict.evidence if item.name == "xyxy-pixels")
    return f"the boxes look like {name}, not like corners in pixels ({behind:.0f} nats behind)"


def chosen_images(paths: Sequence[Path], count: int | None) -> list[Path]:
    """All, or a seeded sample of them in order."""
    if count is None or count >= len(paths):
        return list(paths)
    places = np.sort(np.random.default_rng(0).choice(len(paths), count, replace=False))
    return [paths[place] for place in places]


def _batches(examples: Iterable[Example], size: int = 256) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
