"""Sources put together: which examples stand at which place of a training run, known from (seed, index) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from .example import Example
from .mix import Leaf, Node, Weighted
from .order import mixed
from .store import image_codes
from .templates import SETS, instruct

SPARES = 1 << 62
"""Places from here on are never part of a run: they are drawn for what cannot be used."""


@dataclass(frozen=True)
class Source:
    """Raw examples of one file, as a reader gives them. weight: this source's share of the draws, in any unit."""

    name: str
    examples: Sequence[Example]
    weight: float = 1.0


class Mixture(Dataset[list[Example]]):
    """Map-style: `mixture[index]` is a group of instructed examples, a pure function of (seed, index).

    So a run resumes at any step, on any number of ranks and workers, by counting; nothing but the count needs to be saved.

    mix: a tree over the sources' names (see `mix`); without it, all are drawn by their weights.
    group = 1: one example, drawn on its own as `mix` says: none of a source comes again before all of it came.
    group = k: an image drawn evenly among all images, then k examples about it: a source by its share among those that
        have some left for this image, then one of those. Only when all are used up do they come again, so a group is
        always k long. (The collator packs a group behind one shared image.)
    length: how many groups there are to ask for, steps x groups per step. prompts: "short" or "wide" (see `templates`).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        length: int,
        group: int = 1,
        mix: Node | None = None,
        prompts: str = "short",
    ) -> None:
        _check(sources, seed, length, group, mix)
        if prompts not in SETS:
            raise ValueError(f"there is no set of prompts {prompts!r}; sets: {', '.join(SETS)}")
        used = {source.name for source in sources if source.weight > 0} if mix is None else set(mix.shares())
        self.sources = [source for source in sources if source.name in used]
        self.seed = seed
        self.length = length
        self.group = group
        self.prompts = prompts
        weights = [source.weight for source in self.sources]
        self.mix = mix or Weighted([Leaf(s.name, len(s.examples)) for s in self.sources], weights)
        self._examples = {source.name: source.examples for source in self.sources}
        shares = weights if mix is None else [mix.shares()[source.name] for source in self.sources]
        self._weights = [float(share) for share in np.array(shares, dtype=np.float64) / np.sum(shares)]
        self._images = _ImageIndex(self.sources, self.mix) if group > 1 else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Example]:
        """The group at a global index in [0, length); IndexError outside."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of a mixture of {self.length} groups")
        return self._at(index)

    def spare(self, number: int) -> list[Example]:
        """A group that stands at no index, for one that cannot be used; number: any, the same one gives the same group."""
        return self._at(SPARES + number % SPARES)

    def _at(self, index: int) -> list[Example]:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        drawn = [self._independent(index)] if self._images is None else self._about_one_image(self._images, rng)
        return [instruct(example, rng, prompts=self.prompts) for example in drawn]

    def _independent(self, index: int) -> Example:
        name, place = self.mix.at(index, mixed(self.seed))
        return self._examples[name][place]

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

    def __init__(self, sources: Sequence[Source], mix: Node) -> None:
        kept = {leaf.name: leaf for leaf in mix.leaves()}
        numbers: dict[str, int] = {}
        images, owners, places = [], [], []
        for owner, source in enumerate(sources):
            names, codes = image_codes(source.examples)
            if (codes < 0).any():
                missing = source.examples[int(np.argmax(codes < 0))].id
                raise ValueError(
                    f"source {source.name}: example {missing} has no image, but group > 1 gathers examples "
                    "about one image; use group = 1 for this mixture or leave the source out"
                )
            table = np.array([numbers.setdefault(str(name), len(numbers)) for name in names], dtype=np.int64)
            leaf = kept[source.name]
            chosen = np.arange(len(codes), dtype=np.int64)
            if leaf.kept < leaf.count:
                chosen = np.array(sorted(leaf.chosen(item) for item in range(leaf.kept)), dtype=np.int64)
            images.append(table[codes[chosen]])
            owners.append(np.full(len(chosen), owner, dtype=np.int32))
            places.append(chosen)
        number = np.concatenate(images)
        order = np.argsort(number, kind="stable")
        self._owners = np.concatenate(owners)[order]
        self._places = np.concatenate(places)[order]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(numbers)))])
        self._shown = np.flatnonzero(np.diff(self._bounds))

    def __len__(self) -> int:
        return len(self._shown)

    def examples_of(self, image: int) -> dict[int, list[int]]:
        """source -> places of its examples about the image-th image that has any."""
        number = self._shown[image]
        start, end = int(self._bounds[number]), int(self._bounds[number + 1])
        found: dict[int, list[int]] = {}
        for owner, place in zip(self._owners[start:end].tolist(), self._places[start:end].tolist(), strict=True):
            found.setdefault(owner, []).append(place)
        return found


def _check(sources: Sequence[Source], seed: int, length: int, group: int, mix: Node | None) -> None:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"two sources have the same name: {', '.join(names)}; name them apart")
    if mix is not None:
        sizes = {source.name: len(source.examples) for source in sources}
        wrong = next((leaf for leaf in mix.leaves() if sizes.get(leaf.name) != leaf.count), None)
        if wrong is not None:
            raise ValueError(f"the mix is for a source {wrong.name} of {wrong.count} examples, which is not given")
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
