"""Standard errors by resampling whole images: questions about one image are not independent of each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
CELLS = 4_000_000
"""Most entries of one chunk of the resampling matrix (32 MB)."""


class Interval(NamedTuple):
    """Of a mean: its bootstrap standard error and the 2.5 and 97.5 percentiles, in the values' unit."""

    standard_error: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """How far the mean of `values` would move on other images: whole clusters are drawn with replacement.

    values: (n,), one per question. clusters: (n,), the image of each. groups: (n,), when the figure is the mean of
    the groups' means (POPE's three sets) instead of the mean over all questions.
    Returns None where there are fewer than two clusters: then nothing can be said.
    The result depends on the seed and on the set of rows, not on their order.
    """
    row = np.asarray(values, dtype=np.float64)
    if len(row) != len(clusters) or (groups is not None and len(row) != len(groups)):
        raise ValueError(f"{len(row)} values need as many clusters and groups, got {len(clusters)} clusters")
    names, cluster = _numbered(clusters)
    if len(names) < 2:
        return None
    kinds, group = _numbered(groups) if groups is not None else ([0], np.zeros(len(row), dtype=np.intp))
    shape = (len(names), len(kinds))
    cell = cluster * len(kinds) + group
    counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
    sums = np.bincount(cell, weights=row, minlength=shape[0] * shape[1]).reshape(shape)
    means = _resampled_means(sums, counts, seed=seed, draws=draws)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(standard_error=float(means.std(ddof=1)), low=float(low), high=float(high))


def _numbered(names: Sequence[Hashable]) -> tuple[list[Hashable], np.ndarray]:
    """Names -> their distinct ones in sorted order, and each row's number among them."""
    distinct = sorted(set(names), key=repr)
    number = {name: k for k, name in enumerate(distinct)}
    return distinct, np.array([number[name] for name in names], dtype=np.intp)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, *, seed: int, draws: int) -> np.ndarray:
    """(clusters, groups) sums and counts -> (draws,) means over groups of the means of each resample."""
    rng = np.random.default_rng(seed)
    clusters = len(sums)
    chance = np.full(clusters, 1.0 / clusters)
    chunk = max(1, CELLS // clusters)
    means = []
    for start in range(0, draws, chunk):
        times = rng.multinomial(clusters, chance, size=min(chunk, draws - start)).astype(np.float64)
        drawn = times @ counts
        share = np.divide(times @ sums, drawn, out=np.full_like(drawn, np.nan), where=drawn > 0)
        # A resample can miss a group altogether: the mean is then over the groups it has.
        means.append(np.nanmean(share, axis=1))
    return np.concatenate(means)
