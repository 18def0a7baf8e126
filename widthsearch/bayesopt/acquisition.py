"""What training a network is expected to add to the front.

A front's hypervolume is an integral over costs of the best accuracy within those costs. What a
network adds is then an integral too, of by how much it beats that best wherever it is affordable;
its expectation over a normal accuracy has a closed form at each place (expected hypervolume
improvement: Emmerich, Deutz and Klinkenberg, 2011; here costs are known, and only accuracy is
not).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import qmc

Array = NDArray[np.float64]

_NODES = 512  # where the integral over two or more costs, or uncertain ones, is evaluated


@dataclass(frozen=True, eq=False)
class HypervolumeImprovement:
    """The expected gain of hypervolume over accuracy and costs, in accuracy times units of cost.

    Attributes:
        accuracy: Of the front so far, (F,); dominated members are allowed.
        costs: Of the same, (F, D), each to be minimised, D ≥ 0.
        window: The least and most of each cost that matter, (2, D).
        floor: The accuracy that counts for nothing.
    """

    accuracy: Array
    costs: Array
    window: Array
    floor: float

    def __call__(self, mean: Array, sd: Array, costs: Array, costs_sd: Array) -> Array:
        """The expected gain by each of N networks.

        Args:
            mean: Expected accuracy, (N,).
            sd: Its standard deviation, (N,).
            costs: (N, D).
            costs_sd: Standard deviations, (N, D); 0 where a cost is exact.
        """
        if costs.shape[1] == 1 and not costs_sd.any():
            levels, areas = self._along(costs[:, 0])
        else:
            levels, areas = self._over(costs, costs_sd)
        gain: Array = (areas * exceedance(mean[:, None], sd[:, None], levels)).sum(axis=1)
        return gain

    def _along(self, costs: Array) -> tuple[Array, Array]:
        """The levels of a staircase front, and how much of each step lies above each cost."""
        edges, levels = self._stairs
        areas = np.maximum(edges[1:] - np.maximum(edges[:-1], costs[:, None]), 0)
        return levels, areas

    @cached_property
    def _stairs(self) -> tuple[Array, Array]:
        low, high = self.window[:, 0]
        edges, levels = [low], [self.floor]
        for i in np.lexsort((-self.accuracy, self.costs[:, 0])):
            if self.accuracy[i] > levels[-1] and self.costs[i, 0] < high:
                edges.append(max(self.costs[i, 0], low))
                levels.append(self.accuracy[i])
        return np.array([*edges, max(high, edges[-1])]), np.array(levels)

    def _over(self, costs: Array, costs_sd: Array) -> tuple[Array, Array]:
        """The same for a front in more dimensions, by a quasi-Monte Carlo sum over its nodes."""
        nodes, best = self._nodes
        levels, which = np.unique(best, return_inverse=True)
        member = np.zeros((len(nodes), len(levels)))
        member[np.arange(len(nodes)), which.reshape(-1)] = 1.0
        inside = np.ones((len(costs), len(nodes)))
        for d in range(costs.shape[1]):
            slack = nodes[:, d] - costs[:, d, None]
            spread = costs_sd[:, d, None]
            inside *= np.where(
                spread > 0, ndtr(slack / np.where(spread > 0, spread, 1)), slack >= 0
            )
        volume = float(np.prod(self.window[1] - self.window[0]))
        return levels, inside @ member * (volume / len(nodes))

    @cached_property
    def _nodes(self) -> tuple[Array, Array]:
        """Places in the window, and the best accuracy within the costs there."""
        low, high = self.window
        if not len(low):
            nodes = np.zeros((1, 0))
        else:
            nodes = low + (high - low) * qmc.Sobol(len(low), scramble=True, rng=0).random(_NODES)
        within = (self.costs[None] <= nodes[:, None]).all(axis=2)
        best = np.where(within, self.accuracy, self.floor).max(axis=1, initial=self.floor)
        return nodes, best


def exceedance(mean: Array, sd: Array, level: Array) -> Array:
    """E[max(X − level, 0)] of normal X (expected improvement: Jones et al., 1998)."""
    z = (mean - level) / sd
    out: Array = sd * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi) + (mean - level) * ndtr(z)
    return out
