"""What may be said of rows: means over seeds, 95 % intervals over seeds and images, differences on equal questions and seeds.

One draw of the bootstrap takes images with replacement, the same ones for every row, so what makes an image hard for two rows
cancels in their difference. Seeds are few, so they are not drawn: to each draw belongs an error of the mean over seeds,
t-distributed, with a variance that is the row's own drawn towards the usual one of all rows (a moderated t, Smyth 2004,
doi:10.2202/1544-6115.1027, its prior's degrees of freedom fixed at PRIOR). That error is not drawn: its distribution is
summed over the draws of images, so that ends of intervals and small p are not those of a few draws in its tails. Rows near
100 % hardly move from seed to seed and rows half way do, so what is usual is reckoned in logits: 100 p (1 - p) points each;
of CIDEr, which has no ceiling, in shares of the row's own.

A seed settles the order of the data for every row, so a difference is taken seed by seed, and its variance is that of
these differences. Two rows that differ by seed noise alone are then told apart in 0 to 6 % of cases with three seeds
and in 0 to 9 % with two, whether noise is alike in points or in logits, ten times as large in some rows as in others,
or shared between rows; in 8 to 13 % where it is the other way round, large near 100 % and small elsewhere. Drawing
seeds with replacement did so in 21 and 35 %. It says nothing of other encoders, worlds or budgets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr

from .tallies import Tally

DRAWS = 4000
PRIOR = 2
"""Degrees of freedom that the spread of all rows' seeds counts for beside a row's own."""


@dataclass(frozen=True)
class Estimate:
    """A row, or a difference of rows. seeds: seed -> its value. drawn: seed -> its value in each draw of images (d,).
    error: of the mean over seeds; free: its degrees of freedom. unit: of seed noise, in points."""

    seeds: Mapping[int, float]
    drawn: Mapping[int, np.ndarray]
    error: float
    free: int
    unit: float = 1.0

    @cached_property
    def mean(self) -> float:
        """Over seeds and images."""
        return float(np.mean(list(self.seeds.values())))

    @cached_property
    def draws(self) -> np.ndarray:
        """(d,) of images alone, the mean over seeds."""
        return np.mean(list(self.drawn.values()), axis=0)

    def below(self, value: float) -> float:
        """The share of the distribution that lies below a value."""
        if not self.error:
            return float(((self.draws < value).mean() + (self.draws <= value).mean()) / 2)
        return float(stdtr(self.free, (value - self.draws) / self.error).mean())

    @cached_property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self._quantile(0.025)

    @cached_property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self._quantile(0.975)

    @property
    def p(self) -> float:
        """Two-sided, that it is zero (of differences). Without an error between seeds never below one over the draws."""
        tail = 2 * min(self.below(0.0), 1 - self.below(0.0))
        return min(1.0, tail if self.error else max(tail, 1 / len(self.draws)))

    def _quantile(self, share: float) -> float:
        if not self.error:
            return float(np.quantile(self.draws, share))
        wide = 10 * self.error  # a t of two degrees, the fewest, ends at 4.3 of them
        ends = self.draws.min() - wide, self.draws.max() + wide
        return float(brentq(lambda value: self.below(value) - share, *ends, xtol=1e-6))  # type: ignore[arg-type]


def estimates(rows: Mapping[str, Mapping[int, Tally]], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """Row -> its tallies of one task by seed -> row -> estimate; all of them drawn together. Rows with one and the same
    mapping of tallies are names of one run: they have one estimate, and count once.

    Raises ValueError where two tallies are not about the same images and questions.
    """
    every = [(name, tally) for name, tallies in rows.items() for tally in tallies.values()]
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
    first_name: dict[int, str] = {}
    for name, own in rows.items():
        if own:
            first_name.setdefault(id(own), name)
    values = {name: {s: tally.value() for s, tally in rows[name].items()} for name in first_name.values()}
    bounded = all((tally.sums <= tally.counts).all() for _, tally in every)
    units = {name: unit_of(float(np.mean(list(own.values()))), bounded=bounded) for name, own in values.items()}
    errors = seed_errors({name: np.asarray(list(own.values())) for name, own in values.items()}, units)
    found = {}
    for name, own in values.items():
        drawn = {s: tally.values(weights) for s, tally in rows[name].items()}
        found[name] = Estimate(own, drawn, errors[name], PRIOR + len(own) - 1, units[name])
    return {name: found[first_name[id(own)]] for name, own in rows.items() if own}


def difference(rows: Mapping[str, Estimate], terms: Mapping[str, float], *, usual: float) -> Estimate:
    """The sum of rows times their parts, seed by seed and draw by draw, over the seeds that all of them have.

    usual: `usual_variance` of the rows. Raises ValueError where they have no seed in common.
    """
    common = seeds_of(rows, terms)
    if not common:
        raise ValueError(f"{' and '.join(terms)} have no seed in common")
    values = {s: sum(part * rows[name].seeds[s] for name, part in terms.items()) for s in common}
    drawn = {s: np.sum([part * rows[name].drawn[s] for name, part in terms.items()], axis=0) for s in common}
    free = len(common) - 1
    own = float(np.var(list(values.values()), ddof=1)) * free if free else 0.0
    expected = usual * sum((part * rows[name].unit) ** 2 for name, part in terms.items())
    variance = (PRIOR * expected + own) / (PRIOR + free)
    return Estimate(values, drawn, math.sqrt(variance / len(common)), PRIOR + free)


def seeds_of(rows: Mapping[str, Estimate], names: Iterable[str]) -> list[int]:
    """Those that all of these rows have."""
    return sorted(set.intersection(*(set(rows[name].seeds) for name in names)))


def unit_of(mean: float, *, bounded: bool) -> float:
    """The points in which a row's noise from seed to seed is measured. bounded: whether the figure ends at 100."""
    if not bounded:
        return max(mean, 1.0)
    p = min(max(mean / 100, 0.005), 0.995)
    return 100 * p * (1 - p)


def usual_variance(rows: Mapping[str, Estimate]) -> float:
    """What a row gives, from seed to seed, to the variance of a difference, in its units squared: from the mean standard
    deviation of the differences of every two rows (unbiased for its number of seeds), names of one run once. 0 where no two
    have two seeds in common."""
    spreads = []
    for one, other in itertools.combinations({id(row): name for name, row in rows.items()}.values(), 2):
        common = seeds_of(rows, (one, other))
        if len(common) > 1:
            gaps = [rows[one].seeds[s] - rows[other].seeds[s] for s in common]
            spreads.append(np.std(gaps, ddof=1) / _bias(len(common)) / math.hypot(rows[one].unit, rows[other].unit))
    return float(np.mean(spreads)) ** 2 if spreads else 0.0


def seed_errors(values: Mapping[str, np.ndarray], units: Mapping[str, float]) -> dict[str, float]:
    """Row -> its values by seed, and its unit -> row -> the standard error of its mean over seeds: its own variance and the
    usual one, weighted by degrees of freedom, PRIOR for the latter. 0 where no row has two seeds.

    The usual one is the square of the rows' mean standard deviation in units (unbiased for its number of seeds): a row that
    broke off on its own counts for less than in a mean of variances.
    """
    several = {name: own for name, own in values.items() if len(own) > 1}
    spreads = [own.std(ddof=1) / _bias(len(own)) / units[name] for name, own in several.items()]
    usual = float(np.mean(spreads)) ** 2 if spreads else 0.0
    errors = {}
    for name, own in values.items():
        free = len(own) - 1
        variance = (PRIOR * usual * units[name] ** 2 + (own.var(ddof=1) * free if free else 0.0)) / (PRIOR + free)
        errors[name] = float(np.sqrt(variance / len(own)))
    return errors


def _bias(n: int) -> float:
    """c4(n): the mean of n normal values' standard deviation, in units of the true one."""
    return math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values: what each would be, had all of the comparisons been meant."""
    order = sorted(ps, key=lambda name: ps[name])
    adjusted, running = {}, 0.0
    for k, name in enumerate(order):
        running = max(running, min(1.0, (len(order) - k) * ps[name]))
        adjusted[name] = running
    return adjusted
