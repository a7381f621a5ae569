"""What may be said of rows: means over seeds, 95 % intervals over seeds and images, differences on the same questions.

One draw of the bootstrap takes images with replacement, the same ones for every row, and for every row its seeds with
replacement. A difference of two rows is taken draw by draw, so what makes an image hard for both cancels. With three seeds
the interval is a little narrow; it says nothing of other encoders, worlds or budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .tallies import Tally

DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """mean: over seeds and images. low, high: 95 %. p: two-sided, that it is zero (of differences). draws (d,)."""

    mean: float
    low: float
    high: float
    draws: np.ndarray

    @classmethod
    def of(cls, mean: float, draws: np.ndarray) -> Estimate:
        low, high = np.percentile(draws, [2.5, 97.5])
        return cls(mean, float(low), float(high), draws)

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference: both were drawn from the same images."""
        return Estimate.of(self.mean - other.mean, self.draws - other.draws)

    @property
    def p(self) -> float:
        """Two-sided, by the share of draws on the other side of zero; never below one over the number of draws."""
        tail = min((self.draws <= 0).mean(), (self.draws >= 0).mean())
        return float(min(1.0, max(2 * tail, 1 / len(self.draws))))

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def estimates(rows: Mapping[str, Sequence[Tally]], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """Row -> its tallies of one task, one per seed -> row -> estimate; all of them drawn together.

    Raises ValueError where two tallies are not about the same images and questions.
    """
    every = [(name, tally) for name, tallies in rows.items() for tally in tallies]
    if not every:
        return {}
    first = every[0][1]
    for name, tally in every:
        same = (tally.images, tally.groups) == (first.images, first.groups)
        if not same or not np.array_equal(tally.counts, first.counts):
            raise ValueError(f"{name} and {every[0][0]} were not asked the same questions: they cannot be compared")
    rng = np.random.default_rng(seed)
    c = len(first.images)
    weights = rng.multinomial(c, np.full(c, 1 / c), size=draws).astype(np.float64)
    found = {}
    for name, tallies in rows.items():
        if not tallies:
            continue
        by_seed = np.stack([tally.values(weights) for tally in tallies])
        chosen = rng.integers(len(tallies), size=(len(tallies), draws))
        drawn = np.take_along_axis(by_seed, chosen, axis=0).mean(axis=0)
        found[name] = Estimate.of(float(np.mean([tally.value() for tally in tallies])), drawn)
    return found


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values: what each would be, had all of the comparisons been meant."""
    order = sorted(ps, key=lambda name: ps[name])
    adjusted, running = {}, 0.0
    for k, name in enumerate(order):
        running = max(running, min(1.0, (len(order) - k) * ps[name]))
        adjusted[name] = running
    return adjusted
