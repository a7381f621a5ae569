"""What a mixture is made of: a tree of sources, concatenated or drawn by weight, each an endless order known by counting.

    source     every example once in an order of its own, then again in another, and so on
    concat     all items of its children once, shuffled, then again: shares by size
    weighted   a child for every draw, by its weight; the child goes on where it was

Every node answers "what stands at place m?" from (seed, m) alone. For `weighted`, the draws come in blocks in which every
child has its exact share (up to one draw, over any number of blocks), shuffled within the block, so how often a child was
drawn before is known without looking back.

In YAML a node is a source's name, or one of

    {source: NAME, portion: 1/20, seed: 42, repeat: 3}     a fixed random part of its examples; as if there were three of it
    {concat: [NODE, ...]}
    {weighted: [NODE with weight, ...]}
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

from .order import mixed, permuted

BLOCK = 1024
"""Draws of a block of `weighted`, at least; more where a child's share is under 2 / 1024."""
Place = tuple[str, int]
"""A source's name, and a place among its examples."""


class Leaf:
    """size: items in one round, repeats included."""

    def __init__(
        self, name: str, count: int, *, portion: Fraction = Fraction(1), seed: int = 0, repeat: int = 1
    ) -> None:
        self.name = name
        self.count = count
        self.seed = seed
        self.kept = math.floor(count * portion)
        self.size = self.kept * repeat

    def at(self, place: int, key: int) -> Place:
        round_, place = divmod(place, self.kept)
        item = permuted(place, self.kept, mixed(key, round_))
        return self.name, self.chosen(item)

    def chosen(self, item: int) -> int:
        """The item-th of the examples that the portion keeps: the same ones in every run, whatever the run's seed."""
        return item if self.kept == self.count else permuted(item, self.count, mixed(self.seed))

    def shares(self) -> dict[str, float]:
        return {self.name: 1.0}

    def leaves(self) -> list[Leaf]:
        return [self]


class Concat:
    def __init__(self, children: Sequence[Node]) -> None:
        self.children = list(children)
        self._ends = list(accumulate(child.size for child in children))
        self.size = self._ends[-1]

    def at(self, place: int, key: int) -> Place:
        round_, place = divmod(place, self.size)
        slot = permuted(place, self.size, mixed(key, round_))
        which = bisect_right(self._ends, slot)
        child = self.children[which]
        begun = self._ends[which] - child.size
        return child.at(round_ * child.size + slot - begun, mixed(key, -1 - which & 0xFFFF))

    def shares(self) -> dict[str, float]:
        return _weighed((child.size / self.size, child) for child in self.children)

    def leaves(self) -> list[Leaf]:
        return [leaf for child in self.children for leaf in child.leaves()]


class Weighted:
    """size: draws until the first child has given all its items once."""

    def __init__(self, children: Sequence[Node], weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        total = sum(exact)
        self.children = list(children)
        self.probabilities = [weight / total for weight in exact]
        self._shares = list(accumulate(self.probabilities))
        self._block = 1 << max(BLOCK.bit_length() - 1, math.ceil(math.log2(2 / min(self.probabilities))))
        self.size = min(math.floor(c.size / p) for c, p in zip(children, self.probabilities, strict=True))

    def at(self, place: int, key: int) -> Place:
        block, place = divmod(place, self._block)
        before, after = self._drawn(block * self._block), self._drawn((block + 1) * self._block)
        ends = [b - a for a, b in zip(before, after, strict=True)]
        slot = permuted(place, self._block, mixed(key, block))
        which = bisect_right(ends, slot)
        earlier = before[which] - (before[which - 1] if which else 0)
        within = slot - (ends[which - 1] if which else 0)
        return self.children[which].at(earlier + within, mixed(key, -1 - which & 0xFFFF))

    def _drawn(self, draws: int) -> list[int]:
        """How many of the first draws went to child 0, to children 0 and 1, and so on."""
        return [share.numerator * draws // share.denominator for share in self._shares]

    def shares(self) -> dict[str, float]:
        return _weighed((float(p), child) for p, child in zip(self.probabilities, self.children, strict=True))

    def leaves(self) -> list[Leaf]:
        return [leaf for child in self.children for leaf in child.leaves()]


Node = Leaf | Concat | Weighted


def _weighed(parts: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for weight, child in parts:
        for name, share in child.shares().items():
            found[name] = found.get(name, 0.0) + weight * share
    return found


KINDS = ("source", "concat", "weighted")
FIELDS = {"source": {"source", "portion", "seed", "repeat"}, "concat": {"concat"}, "weighted": {"weighted"}}


def parse_mix(spec: Any, counts: Mapping[str, int], where: str = "mix") -> Node:
    """A node of YAML -> the tree. counts: examples of every source, by name. Raises ValueError that names the place."""
    if isinstance(spec, str):
        spec = {"source": spec}
    kinds = [kind for kind in KINDS if isinstance(spec, Mapping) and kind in spec]
    if len(kinds) != 1:
        raise ValueError(f"{where}: is {spec!r:.80}, it must be a source's name or have one of {', '.join(KINDS)}")
    kind = kinds[0]
    unknown = sorted(set(spec) - FIELDS[kind] - {"weight"})
    if unknown:
        known = ", ".join(sorted(FIELDS[kind] | {"weight"}))
        raise ValueError(f"{where}: a {kind} has no {unknown[0]!r}; known: {known}")
    if kind == "source":
        return _leaf(spec, counts, where)
    items = spec[kind]
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where}.{kind}: is {items!r:.80}, it must be a list that is not empty")
    children, weights = [], []
    for number, item in enumerate(items):
        place = f"{where}.{kind}[{number}]"
        has_weight = isinstance(item, Mapping) and "weight" in item
        if has_weight and kind == "concat":
            raise ValueError(f"{place}: has a weight, but a concat draws by size; use portion or repeat")
        weight = item["weight"] if has_weight else 1
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"{place}: weight {weight!r} must be a number, at least 0")
        if weight > 0:
            children.append(parse_mix(item, counts, place))
            weights.append(weight)
    if not children:
        raise ValueError(f"{where}.{kind}: all weights are 0, nothing is left to draw")
    return Concat(children) if kind == "concat" else Weighted(children, weights)


def _leaf(spec: Mapping[str, Any], counts: Mapping[str, int], where: str) -> Leaf:
    name, portion, repeat, seed = spec["source"], spec.get("portion", 1), spec.get("repeat", 1), spec.get("seed", 0)
    if name not in counts:
        raise ValueError(f"{where}: there is no source {name!r}; sources: {', '.join(counts)}")
    try:
        share = Fraction(str(portion).replace(" ", ""))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: portion {portion!r} must be a fraction such as 1/20") from error
    if not 0 < share <= 1:
        raise ValueError(f"{where}: portion {portion!r} must be above 0 and at most 1; repeat takes more than all")
    if type(repeat) is not int or repeat < 1 or type(seed) is not int or seed < 0:
        raise ValueError(f"{where}: repeat {repeat!r} must be a whole number from 1, seed {seed!r} one from 0")
    leaf = Leaf(name, counts[name], portion=share, seed=seed, repeat=repeat)
    if leaf.kept == 0:
        raise ValueError(f"{where}: source {name!r} has {counts[name]} examples, {portion} of them is none")
    return leaf


def mixed_sources(spec: Any) -> list[str]:
    """Names of the sources that a node of YAML mentions, in order, each once; nothing is checked."""
    if isinstance(spec, str):
        return [spec]
    if not isinstance(spec, Mapping):
        return []
    names = [spec["source"]] if isinstance(spec.get("source"), str) else []
    for kind in ("concat", "weighted"):
        items = spec.get(kind)
        names += [name for item in (items if isinstance(items, list) else []) for name in mixed_sources(item)]
    return list(dict.fromkeys(names))
