"""Rank correlations of short and full trainings of the same networks, with their intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from widthsearch.bayesopt.metric import Metric
from widthsearch.study.trial import Trial

Array = NDArray[np.float64]

RATES = (0.5, 1.0, 2.0)
"""Multiples of the recipe's learning rate."""

ENOUGH = 5
"""Networks of an interval. Where τ is 0.8 over all networks, the bootstrap's 90% interval has it in
90% of the samples of five networks, in 75% of four and in 49% of three, where it is one point in
half of them (1,000 samples each from a normal copula, three seeds a network)."""

_DRAWS = 2000
_EXACT = 40_320  # orders of 8 networks; of more a sample


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval.

    Attributes:
        value: Kendall's τ-b or Spearman's ρ of the mean values.
        interval: Its 90% interval, by a bootstrap over networks and their seeds; None of fewer than
            :data:`ENOUGH` networks.

    Example:
        >>> short, full = np.array([[1.0], [2.0], [3.0]]), np.array([[5.0], [7.0], [6.0]])
        >>> found = Correlation.of(kendall, short, full)
        >>> round(found.value, 2), found.interval
        (0.33, None)
    """

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def of(
        cls, statistic: Callable[[Array, Array], Array], first: Array, second: Array
    ) -> Correlation:
        """The correlation of two trainings of each network, (networks, seeds) each."""
        value = float(statistic(first.mean(1)[None], second.mean(1)[None])[0])
        if len(first) < ENOUGH:
            return cls(value, None)
        rng = np.random.default_rng(0)
        shape = (_DRAWS, len(first))
        chosen = rng.integers(0, len(first), shape)

        def resampled(values: Array) -> Array:
            # A network that is drawn twice has one value, so that it ties with itself.
            seeds = rng.integers(0, values.shape[1], (*shape, values.shape[1]))
            means = values[np.arange(len(values))[:, None], seeds].mean(axis=2)
            drawn: Array = np.take_along_axis(means, chosen, axis=1)
            return drawn

        draws = statistic(resampled(first), resampled(second))
        low, high = np.nanquantile(draws, (0.05, 0.95)) if np.isfinite(draws).any() else (-1, 1)
        return cls(value, (float(low), float(high)))

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.2f}"
        low, high = self.interval
        return f"{self.value:.2f} (90% interval {low:.2f} to {high:.2f})"


def kendall(first: Array, second: Array) -> Array:
    """Kendall's τ-b of each pair of rows, (N, networks) each to (N,); NaN for a constant row.

    Example:
        >>> kendall(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 3.0, 2.0]])).round(2).tolist()
        [0.33]
    """
    signs = [np.sign(each[:, :, None] - each[:, None]) for each in (first, second)]
    agree = (signs[0] * signs[1]).sum(axis=(1, 2))
    untied = [np.abs(sign).sum(axis=(1, 2)) for sign in signs]
    with np.errstate(invalid="ignore"):
        tau: Array = agree / np.sqrt(untied[0] * untied[1])
    return tau


def spearman(first: Array, second: Array) -> Array:
    """Spearman's ρ of each pair of rows; shapes and NaN as in :func:`kendall`."""
    ranks = [rankdata(each, axis=1) for each in (first, second)]
    one, other = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    with np.errstate(invalid="ignore"):
        rho: Array = (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return rho


@dataclass(frozen=True, eq=False)
class RankCheck:
    """Networks that were trained by a short and by a full recipe.

    Attributes:
        members: The networks, fewest MACs first.
        short: The metric by the study's recipe, (members, seeds); NaN where a training diverged.
        full: The same by the full one.
        epochs: The epochs of both.
        rated: Three of the members: the narrowest, the middle and the widest; empty for a recipe
            without ``lr``.
        rates: Their metric at each learning rate, (rates, 3, seeds).
        lr: The recipe's learning rate; None without one.
        metric: The metric.

    Example:
        >>> from widthsearch.bayesopt.metric import ACCURACY
        >>> values = np.array([[60.0], [70.0], [80.0]])
        >>> check = RankCheck((), values, values + 9, (8, 40), (), np.array([]), None, ACCURACY)
        >>> check.correlation(spearman).value, round(check.chance(), 3)  # one order of six
        (1.0, 0.167)
    """

    members: tuple[Trial, ...]
    short: Array
    full: Array
    epochs: tuple[int, int]
    rated: tuple[Trial, ...]
    rates: Array
    lr: float | None
    metric: Metric

    def correlation(self, statistic: Callable[[Array, Array], Array]) -> Correlation:
        """A rank correlation of the short and the full trainings."""
        return Correlation.of(statistic, self._scores(self.short), self._scores(self.full))

    def rate_correlation(self, rate: int) -> float:
        """Kendall's τ of the three networks at the recipe's learning rate and at another one."""
        usual, other = (self._scores(self.rates[i]) for i in (RATES.index(1.0), rate))
        return Correlation.of(kendall, usual, other).value

    def chance(self) -> float:
        """The share of all orders of the networks whose τ is as high as the one that was found."""
        short, full = (self._scores(each).mean(1) for each in (self.short, self.full))
        found, n = kendall(short[None], full[None])[0], len(short)
        rng = np.random.default_rng(0)
        orders = (
            np.array(list(itertools.permutations(range(n))))
            if math.factorial(n) <= _EXACT
            else np.array([rng.permutation(n) for _ in range(_EXACT)])
        )
        taus = kendall(np.broadcast_to(short, orders.shape), full[orders])
        return float((taus >= found - 1e-12).mean())

    def _scores(self, values: Array) -> Array:
        """Higher for better values; a training that diverged is below all others."""
        scores = self.metric.sign * values
        known = scores[np.isfinite(scores)]
        return np.where(np.isfinite(scores), scores, known.min(initial=0.0) - 1.0)
