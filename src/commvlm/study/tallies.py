"""Tallies: what a run earned on each image, so that any two runs can be compared on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

import numpy as np

from ..evaluate.tasks import Record, Score


@dataclass(frozen=True)
class Tally:
    """Of one task: images (c,), groups (g,) of questions whose means are averaged (POPE's three sets), and the sum and the
    number of marks of every image and group, (c, g) each."""

    images: tuple[str, ...]
    groups: tuple[str, ...]
    sums: np.ndarray
    counts: np.ndarray

    def values(self, weights: np.ndarray) -> np.ndarray:
        """weights (draws, c): how often each image was drawn -> the figure of each draw (draws,), in percent."""
        return 100.0 * ((weights @ self.sums) / np.maximum(weights @ self.counts, 1e-12)).mean(axis=1)

    def value(self) -> float:
        return float(self.values(np.ones((1, len(self.images))))[0])

    def as_json(self) -> dict[str, Any]:
        return {
            "images": list(self.images), "groups": list(self.groups),
            "sums": np.round(self.sums, 6).tolist(), "counts": self.counts.astype(int).tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Tally:
        sums, counts = (np.asarray(said[name], dtype=np.float64) for name in ("sums", "counts"))
        return cls(tuple(said["images"]), tuple(said["groups"]), sums, counts)


def joined(parts: Mapping[str, Tally]) -> Tally:
    """Sets of one task as one tally: each set is a group, so that the figure is the mean of theirs (the paper's "avg REC").

    Raises ValueError for a set that has groups of its own.
    """
    odd = next((name for name, part in parts.items() if len(part.groups) > 1), None)
    if odd is not None:
        raise ValueError(f"{odd} is a mean of groups already: it cannot be one of several sets")
    images = sorted({image for part in parts.values() for image in part.images})
    row = {image: k for k, image in enumerate(images)}
    sums, counts = np.zeros((len(images), len(parts))), np.zeros((len(images), len(parts)))
    for column, part in enumerate(parts.values()):
        places = [row[image] for image in part.images]
        sums[places, column], counts[places, column] = part.sums[:, 0], part.counts[:, 0]
    return Tally(tuple(images), tuple(parts), sums, counts)


def tallies_of(score: Score, records: Sequence[Record]) -> dict[str, Tally]:
    """Of a score, by its task, and of each of its readings, by "task reading".

    Raises ValueError where a figure is no mean of its marks.
    """
    found = {score.task: tally(score.marks, records, of=score.value, name=score.task)}
    for reading, marks in score.readings.items():
        name = f"{score.task} {reading}"
        found[name] = tally(marks, records, of=cast(float, score.extra[reading]), name=name)
    return found


def tally(marks: Mapping[str, float], records: Sequence[Record], *, of: float, name: str) -> Tally:
    """Marks by the ids of their records, or "id#k" where a rule marks each of a record's sentences. Raises ValueError where
    their mean is not the figure that they are `of`."""
    by_id = {record.id: record for record in records}
    kept = [(by_id.get(key) or by_id[key.rpartition("#")[0]], mark) for key, mark in marks.items()]
    images = sorted({_image(record) for record, _ in kept})
    groups = sorted({_group(record) for record, _ in kept})
    row, column = ({name: k for k, name in enumerate(names)} for names in (images, groups))
    sums, counts = np.zeros((len(images), len(groups))), np.zeros((len(images), len(groups)))
    for record, mark in kept:
        sums[row[_image(record)], column[_group(record)]] += mark
        counts[row[_image(record)], column[_group(record)]] += 1
    made = Tally(tuple(images), tuple(groups), sums, counts)
    if abs(made.value() - of) > 1e-6 * max(1.0, abs(of)):
        raise ValueError(f"{name} is {of}, its marks' mean is {made.value()}: it cannot be compared so")
    return made


def _image(record: Record) -> str:
    return PurePath(record.cluster).name


def _group(record: Record) -> str:
    return str(record.facts.get("set", "")) if record.task == "pope" else ""
