"""The acquisition function: the hypervolume that a training is expected to add to the front.

Notation::

    F, N   networks on the front so far, candidates
    D      cost objectives; c their values, (F, D) or (N, D), in logs
    a      score of a network on the front
    Ω      the window of costs that matter, a box in D dimensions
    b(z)   for costs z in Ω: the highest a among networks of the front with c ≤ z in each objective,
           or the floor where there is none
    X      the score of a candidate, normal with mean m and standard deviation s

The front's hypervolume is ∫_Ω b(z) dz, less the floor's. A candidate of costs c raises b(z) to X
wherever z ≥ c and X > b(z), so the expected improvement of the hypervolume is

    ∫_Ω P(c ≤ z) E[max(X − b(z), 0)] dz

and the expectation inside has a closed form (expected improvement: Jones, Schonlau and Welch, 1998;
of hypervolume: Emmerich, Deutz and Klinkenberg, 2011; here the score is uncertain, and costs are
exact or predicted). b takes few values, so the integral is a sum over them: the closed form at each
*level* of b, times the volume in which b has that level and the candidate is affordable.

Example, one cost from 0 to 1, one network of 60% at cost 0.5, floor 50%: b is 50 below the cost 0.5
and 60 above. A candidate that surely reaches 70% at cost 0.25 adds (70 − 50) · ¼ + (70 − 60) · ½.

    >>> window = np.array([[0.0], [1.0]])
    >>> front = HypervolumeImprovement(np.array([60.0]), np.array([[0.5]]), window, floor=50.0)
    >>> mean, sd, cost = np.array([70.0]), np.array([1e-9]), np.array([[0.25]])
    >>> front(mean, sd, cost, costs_sd=np.zeros((1, 1))).tolist()
    [10.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]

_NODES = 512
"""Quasi-Monte Carlo nodes in Ω, for two costs or more, or uncertain ones; a power of 2."""


@dataclass(frozen=True, eq=False)
class HypervolumeImprovement:
    """The expected improvement of the hypervolume, in units of score times units of cost.

    Attributes:
        scores: a, (F,); dominated networks may be among them.
        costs: c, (F, D), each to be minimised, D ≥ 0.
        window: The least and the greatest cost of Ω, (2, D).
        floor: The score below which nothing counts.
    """

    scores: Array
    costs: Array
    window: Array
    floor: float

    def __call__(self, mean: Array, sd: Array, costs: Array, costs_sd: Array) -> Array:
        """The expected improvement by each of N candidates, (N,).

        Args:
            mean: m, (N,).
            sd: s, (N,), above 0.
            costs: Means of the costs, (N, D).
            costs_sd: Their standard deviations, (N, D); 0 where a cost is exact.
        """
        if costs.shape[1] == 1 and not costs_sd.any():
            levels, volumes = self._steps_above(costs[:, 0])
        else:
            levels, volumes = self._nodes_above(costs, costs_sd)
        improvement: Array = (volumes * exceedance(mean[:, None], sd[:, None], levels)).sum(axis=1)
        return improvement

    @property
    def volume(self) -> float:
        """The hypervolume of the front above the floor, in the same units.

        Example:
            >>> window = np.array([[0.0], [1.0]])
            >>> front = HypervolumeImprovement(np.array([60.0]), np.array([[0.5]]), window, 50.0)
            >>> front.volume  # (60 - 50) · ½
            5.0
        """
        if self.costs.shape[1] == 1:
            edges, levels = self._staircase
            return float(np.diff(edges) @ (levels - self.floor))
        _, best = self._nodes
        return float((best - self.floor).mean() * np.prod(self.window[1] - self.window[0]))

    def _steps_above(self, costs: Array) -> tuple[Array, Array]:
        """For one exact cost: the levels of b, (L,), and their lengths above each cost, (N, L)."""
        edges, levels = self._staircase
        lengths = np.maximum(edges[1:] - np.maximum(edges[:-1], costs[:, None]), 0)
        return levels, lengths

    @cached_property
    def _staircase(self) -> tuple[Array, Array]:
        """b over one cost: the edges of its steps, (L + 1,), and their levels, (L,)."""
        low, high = self.window[:, 0]
        edges, levels = [low], [self.floor]
        for i in np.lexsort((-self.scores, self.costs[:, 0])):
            if self.scores[i] > levels[-1] and self.costs[i, 0] < high:
                edges.append(max(self.costs[i, 0], low))
                levels.append(self.scores[i])
        return np.array([*edges, max(high, edges[-1])]), np.array(levels)

    def _nodes_above(self, costs: Array, costs_sd: Array) -> tuple[Array, Array]:
        """For any costs: the levels of b, (L,), and the affordable volume of each, (N, L)."""
        nodes, best = self._nodes
        levels, which = np.unique(best, return_inverse=True)
        is_level = np.zeros((len(nodes), len(levels)))
        is_level[np.arange(len(nodes)), which.reshape(-1)] = 1.0
        affordable = np.ones((len(costs), len(nodes)))
        for d in range(costs.shape[1]):
            slack = nodes[:, d] - costs[:, d, None]
            spread = costs_sd[:, d, None]
            affordable *= np.where(
                spread > 0, ndtr(slack / np.where(spread > 0, spread, 1)), slack >= 0
            )
        volume = float(np.prod(self.window[1] - self.window[0]))
        return levels, affordable @ is_level * (volume / len(nodes))

    @cached_property
    def _nodes(self) -> tuple[Array, Array]:
        """Nodes in Ω, (nodes, D), and b there, (nodes,)."""
        from scipy.stats import qmc  # takes as long to import as the rest of this package

        low, high = self.window
        nodes = np.zeros((1, 0))
        if len(low):
            # One fixed sequence: candidates are compared on the same nodes, in every run.
            nodes = low + (high - low) * qmc.Sobol(len(low), scramble=True, rng=0).random(_NODES)
        within = (self.costs[None] <= nodes[:, None]).all(axis=2)
        best = np.where(within, self.scores, self.floor).max(axis=1, initial=self.floor)
        return nodes, best


def exceedance(mean: Array, sd: Array, level: Array) -> Array:
    """E[max(X − level, 0)] of normal X."""
    z = (mean - level) / sd
    out: Array = sd * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi) + (mean - level) * ndtr(z)
    return out
