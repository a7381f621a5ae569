"""Sources drawn by weight: which examples stand at which place of a training run, known from (seed, index) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .example import Example
from .templates import instruct


@dataclass(frozen=True)
class Source:
    """Raw examples of one file, as a reader gives them. weight: this source's share of the draws, in any unit."""

    name: str
    examples: Sequence[Example]
    weight: float = 1.0


class Mixture(Dataset[list[Example]]):
    """Map-style: `mixture[index]` is a group of instructed examples, a pure function of (seed, index).

    So a run resumes at any step, on any number of workers, by counting; nothing but the count needs to be saved.

    group = 1: one example, drawn on its own: a source by weight, then one of its examples.
    group = k: an image drawn evenly among all images, then k examples about it: a source by weight among those that
        have some left for this image, then one of those. Only when all are used up do they come again, so a group is
        always k long. (The collator packs a group behind one shared image.)
    length: how many groups there are to ask for, steps x groups per step.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, length: int, group: int = 1) -> None:
        _check(sources, seed, length, group)
        self.sources = [source for source in sources if source.weight > 0]
        self.seed = seed
        self.length = length
        self.group = group
        weights = np.array([source.weight for source in self.sources], dtype=np.float64)
        self._weights = [float(weight) for weight in weights / weights.sum()]
        self._cumulative = np.cumsum(weights / weights.sum())
        self._images = _ImageIndex(self.sources) if group > 1 else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Example]:
        """The group at a global index in [0, length); IndexError outside."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of a mixture of {self.length} groups")
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        drawn = [self._independent(rng)] if self._images is None else self._about_one_image(self._images, rng)
        return [instruct(example, rng) for example in drawn]

    def _independent(self, rng: np.random.Generator) -> Example:
        place = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        examples = self.sources[min(place, len(self.sources) - 1)].examples
        return examples[int(rng.integers(len(examples)))]

    def _about_one_image(self, images: _ImageIndex, rng: np.random.Generator) -> list[Example]:
        everything = images.examples_of(int(rng.integers(len(images))))
        remaining: dict[int, list[int]] = {}
        drawn = []
        for which, among in rng.random((self.group, 2)).tolist():
            if not remaining:
                remaining = {source: list(places) for source, places in everything.items()}
            source = self._source_among(remaining, which)
            places = remaining[source]
            drawn.append(self.sources[source].examples[places.pop(int(among * len(places)))])
            if not places:
                del remaining[source]
        return drawn

    def _source_among(self, remaining: dict[int, list[int]], which: float) -> int:
        """The source at the share `which` in [0, 1) of the weights of those that remain."""
        left = which * sum(self._weights[source] for source in remaining)
        chosen = next(iter(remaining))
        for source in remaining:
            chosen = source
            left -= self._weights[source]
            if left < 0:
                break
        return chosen


class _ImageIndex:
    """Where every image's examples are: three flat arrays, which pickle and fork cheaply.

    The rows (source, place) lie sorted by image, in order of the images' first appearance, then by source.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        numbers: dict[Path, int] = {}
        images, owners, places = [], [], []
        for owner, source in enumerate(sources):
            for place, example in enumerate(source.examples):
                if example.image is None:
                    raise ValueError(
                        f"source {source.name}: example {example.id} has no image, but group > 1 gathers examples "
                        "about one image; use group = 1 for this mixture or leave the source out"
                    )
                images.append(numbers.setdefault(example.image, len(numbers)))
                owners.append(owner)
                places.append(place)
        order = np.argsort(images, kind="stable")
        self._owners = np.asarray(owners, dtype=np.int32)[order]
        self._places = np.asarray(places, dtype=np.int64)[order]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(images))])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def examples_of(self, image: int) -> dict[int, list[int]]:
        """source -> places of its examples about the image."""
        start, end = int(self._bounds[image]), int(self._bounds[image + 1])
        found: dict[int, list[int]] = {}
        for owner, place in zip(self._owners[start:end].tolist(), self._places[start:end].tolist(), strict=True):
            found.setdefault(owner, []).append(place)
        return found


def _check(sources: Sequence[Source], seed: int, length: int, group: int) -> None:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"two sources have the same name: {', '.join(names)}; name them apart")
    for source in sources:
        if not math.isfinite(source.weight) or source.weight < 0:
            raise ValueError(f"source {source.name}: weight {source.weight} must be a finite number, at least 0")
        if source.weight > 0 and len(source.examples) == 0:
            raise ValueError(f"source {source.name}: has no examples; give it some or weight 0")
    if not any(source.weight > 0 for source in sources):
        raise ValueError(f"a mixture needs a source with a weight above 0, it got {names or 'none at all'}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must be in [0, 2**64)")
    if length < 0 or group < 1:
        raise ValueError(f"a mixture of {length} groups of {group} examples: length must be >= 0 and group >= 1")
