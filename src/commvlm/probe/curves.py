"""What a probe found, with intervals: images and seeds are drawn anew, the same images for every curve, so that differences
are paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike

from .fitting import MERGES, tallies_of
from .run import read_record

DRAWS = 1000


class Interval(NamedTuple):
    """value: mean over seeds of the score on all test images. low, high: 2.5 and 97.5 percentiles over `DRAWS` samples."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> int:
        """For a difference: 1 above 0, -1 below it, 0 where the interval holds it."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Halves:
    """A score on every other test image, and on those between. values (2,): means over seeds. draws (2, DRAWS): on other
    images and seeds. weights (2,), weighed (2, DRAWS): each half's part of the whole score."""

    values: np.ndarray
    draws: np.ndarray
    weights: np.ndarray
    weighed: np.ndarray


@dataclass(frozen=True)
class Point:
    """One score. seeds (S,): each seed's. draws (DRAWS,): the score on other images and seeds. halves: the same on two halves
    of the images; None where these are not known."""

    seeds: np.ndarray
    draws: np.ndarray
    halves: Halves | None = None

    @property
    def interval(self) -> Interval:
        low, high = np.quantile(self.draws, (0.025, 0.975))
        return Interval(float(self.seeds.mean()), float(low), float(high))

    def minus(self, other: Point) -> Interval:
        """The paired difference."""
        low, high = np.quantile(self.draws - other.draws, (0.025, 0.975))
        return Interval(float(self.seeds.mean() - other.seeds.mean()), float(low), float(high))


class Probe:
    """A finished probe's folder. points: (source, place, head, metric) -> its score."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.record: dict[str, Any] = read_record(out)
        self.sources: dict[str, dict[str, Any]] = self.record["sources"]
        if not self.sources:
            raise ValueError(f"{out} holds a probe that is not finished; run the same command again")

    @cached_property
    def points(self) -> dict[tuple[str, str, str, str], Point]:
        """Raises ValueError for a damaged file of results."""
        images = self.record["test"]
        rng = np.random.default_rng(0)
        times = rng.multinomial(images, np.full(images, 1 / images), size=DRAWS).astype(np.float64)
        found = {}
        for source in self.sources:
            for path in sorted((self.out / "units").glob(f"{source}.*.npz")):
                place = path.name.removeprefix(f"{source}.").removesuffix(".npz")
                for (head, metric), (sums, counts) in tallies_of(path).items():
                    key = (source, place, head, metric)
                    found[key] = _point(sums, counts, times, seed=crc32("/".join(key).encode()))
        return found

    def encoders(self) -> list[str]:
        """Those that are no controls, in order."""
        return [name for name, source in self.sources.items() if source["kind"] in ("trained", "random")]

    def twin(self, encoder: str) -> str | None:
        """The name of an encoder's random twin, where it was read."""
        name = f"{encoder}-twin"
        return name if name in self.sources else None

    def position(self, encoder: str) -> str:
        """The name of the control that sees only the places of this encoder's patches."""
        rows, columns = self.sources[encoder]["grid"]
        return f"position-{rows}x{columns}"

    def curve(self, source: str, head: str, metric: str) -> dict[int, Point]:
        """Layer -> score, ascending; empty where that was not asked."""
        layers = self.sources[source]["layers"]
        return {
            k: self.points[source, str(k), head, metric]
            for k in layers
            if (source, str(k), head, metric) in self.points
        }

    def merged(self, encoder: str, head: str, metric: str) -> dict[str, Point]:
        """Merge -> score."""
        return {m: self.points[encoder, m, head, metric] for m in MERGES if (encoder, m, head, metric) in self.points}

    def control(self, encoder: str, head: str, metric: str) -> Point | None:
        """The position control's score."""
        return self.points.get((self.position(encoder), "none", head, metric))

    def metrics(self) -> list[str]:
        """Those that were asked, in order of their first appearance."""
        return list(dict.fromkeys(metric for *_, metric in self.points))

    def heads(self) -> list[str]:
        """As asked."""
        return list(self.record["asked"]["heads"])


def _point(sums: np.ndarray, counts: np.ndarray, times: np.ndarray, *, seed: int) -> Point:
    """times (draws, images): how often each image is drawn."""
    chosen = np.random.default_rng(seed).integers(len(sums), size=(len(times), len(sums)))

    def drawn(images: slice) -> tuple[np.ndarray, np.ndarray]:
        total = times[:, images] @ counts[images]
        empty = np.full((len(times), len(sums)), np.nan)
        scores = np.divide(times[:, images] @ sums[:, images].T, total[:, None], out=empty, where=total[:, None] > 0)
        return np.take_along_axis(scores, chosen, axis=1).mean(1), total

    halves = [slice(0, None, 2), slice(1, None, 2)]
    (one, first), (other, second) = (drawn(images) for images in halves)
    parts = np.array([counts[images].sum() for images in halves])
    return Point(
        sums.sum(1) / counts.sum(),
        drawn(slice(None))[0],
        Halves(
            np.array([sums[:, images].sum() / max(counts[images].sum(), 1e-12) / len(sums) for images in halves]),
            np.stack([one, other]), parts / parts.sum(), np.stack([first, second]) / np.maximum(first + second, 1e-12),
        ),
    )  # fmt: skip


def highest(curve: Mapping[int, Point]) -> Point:
    """The best place's score, on images that did not choose it: each half of the test images is answered by the place that is
    best on the other half. The highest of many equal scores would be above any one of them by chance alone.

    Points whose halves are not known give the best of them as it stands.
    """
    points = list(curve.values())
    known = [point.halves for point in points if point.halves is not None]
    if len(known) < len(points):
        return max(points, key=lambda point: point.seeds.mean())
    tops = [max(known, key=lambda halves, other=other: halves.values[other]) for other in (1, 0)]
    value = sum(top.weights[half] * top.values[half] for half, top in enumerate(tops))
    draws = sum(top.weighed[half] * np.nan_to_num(top.draws[half]) for half, top in enumerate(tops))
    return Point(np.array([value]), np.asarray(draws))


def best(curve: dict[int, Point]) -> tuple[int, list[int]]:
    """The layer with the highest score, and the layers that are the best in more than 2.5 percent of the samples."""
    layers = list(curve)
    top = max(layers, key=lambda layer: curve[layer].seeds.mean())
    winners = np.argmax(np.stack([curve[layer].draws for layer in layers]), axis=0)
    share = np.bincount(winners, minlength=len(layers)) / DRAWS
    return top, [layer for layer, part in zip(layers, share, strict=True) if part > 0.025]


def layer_shift(a: dict[int, Point], b: dict[int, Point]) -> Interval:
    """By how many layers the best of b lies deeper than the best of a, over the samples."""
    layers = [np.array(list(curve))[np.argmax([p.draws for p in curve.values()], axis=0)] for curve in (a, b)]
    low, high = np.quantile(layers[1] - layers[0], (0.025, 0.975))
    return Interval(best(b)[0] - best(a)[0], float(low), float(high))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """The correlation of ranks, ties sharing theirs; nan where either is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    deviations = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    return float((deviations[0] * deviations[1]).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") - 1) / 2
