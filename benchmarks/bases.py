"""A study over several bases, simulated: one surrogate of all spaces against one of each.

    python -m benchmarks.bases [--trials 20 30 40 60] [--runs 8]

Thin ResNets of four depths. Each run has a world of its own: errors that fall with MACs by a power
law, a gain or loss by depth, a tilt of each axis, random effects of pairs of axes, and normal noise
a training. Scored by expected accuracy: the hypervolume of the chosen front as a fraction of that
of a front drawn with full knowledge from 20,000 networks of each space.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from search_spaces.resnet_cifar import resnet
from widthsearch import SearchSpace
from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.candidates import Grid
from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.search import BayesianSearch
from widthsearch.bayesopt.surrogate import Surrogate

Array = NDArray[np.float64]
DEPTHS = (8, 14, 20, 32)


class World:
    """What training would give: its noise is normal, in points."""

    def __init__(self, spaces: Sequence[SearchSpace], seed: int, noise: float) -> None:
        rng = np.random.default_rng(seed)
        self.spaces, self.noise = spaces, noise
        self._slope = rng.uniform(0.18, 0.3)
        self._deeper = 0.5 * rng.uniform(-0.15, 0.25, len(spaces)).cumsum()
        self._tilts = [rng.normal(0, 0.12, len(space.axes)) for space in spaces]
        self._pairs = [rng.normal(0, 0.03, (len(space.axes),) * 2) for space in spaces]
        self._rng = rng
        corners = [
            space.macs(np.array([[getattr(axis, end) for axis in space.axes]]))[0]
            for space in spaces
            for end in ("min_width", "max_width")
        ]
        self._low, self._high = np.log(min(corners)), np.log(max(corners))
        fronts = [self._front(i, rng) for i in range(len(spaces))]
        self._full = self._hypervolume(np.concatenate(fronts))

    def accuracy(self, i: int, widths: NDArray[np.int64]) -> Array:
        """Expected accuracy of networks of a space, (N,)."""
        space, axes = self.spaces[i], len(self.spaces[i].axes)
        wide = np.log(widths / np.array(space.base.vector))
        shape = wide - wide.mean(axis=1, keepdims=True)
        macs = np.log(space.macs(widths) / self.spaces[0].cost(1.0).macs)
        error = np.log(18) - self._slope * macs - self._deeper[i]
        error -= shape @ self._tilts[i] / np.sqrt(axes)
        error += 0.15 * (shape**2).mean(axis=1)
        error += np.einsum("ni,ij,nj->n", shape, self._pairs[i], shape) / axes
        accuracy: Array = 100 - np.exp(error)
        return accuracy

    def train(self, i: int, widths: tuple[int, ...]) -> Observation:
        """One training, with its noise."""
        vectors = np.array([widths])
        accuracy = float(self.accuracy(i, vectors)[0] + self._rng.normal(0, self.noise))
        return Observation(widths, accuracy, (float(self.spaces[i].macs(vectors)[0]),))

    def share(self, chosen: Sequence[tuple[int, tuple[int, ...]]]) -> float:
        """The hypervolume of some networks, as a fraction of all that there is."""
        points = [self._points(i, np.array([widths])) for i, widths in chosen]
        return self._hypervolume(np.concatenate(points)) / self._full

    def _points(self, i: int, widths: NDArray[np.int64]) -> Array:
        return np.column_stack([-self.accuracy(i, widths), np.log(self.spaces[i].macs(widths))])

    def _front(self, i: int, rng: np.random.Generator) -> Array:
        points = self._points(i, Grid(self.spaces[i].axes).random(rng, 20_000))
        return points[pareto.non_dominated(points)]

    def _hypervolume(self, points: Array) -> float:
        scaled = np.column_stack(
            [points[:, 0] / 50, (points[:, 1] - self._low) / (self._high - self._low)]
        )
        return pareto.hypervolume(scaled, np.array([-1.0, 1.0]))


def searched(world: World, trials: Sequence[int], together: bool, seed: int) -> list[float]:
    """The share of hypervolume after so many trials, the bases among them."""
    plain = [Coordinates.of(space) for space in world.spaces]
    coordinates = Coordinates.together(plain) if together else plain
    searches = [BayesianSearch(own, seed=seed) for own in coordinates]
    observed = [[world.train(i, space.base.vector)] for i, space in enumerate(world.spaces)]

    def surrogates() -> list[Surrogate]:
        pairs = list(zip(coordinates, observed, strict=True))
        if together:
            shared = Surrogate.fit_observations(*pairs)
            return [shared.of_space(own) for own in coordinates]
        return [Surrogate.fit_observations(pair) for pair in pairs]

    def estimated(fitted: Sequence[Surrogate]) -> list[list[Observation]]:
        """All trainings, with the posterior means of their accuracies."""
        return [
            [replace(o, value=accuracy) for o, accuracy in zip(own, mean.tolist(), strict=True)]
            for own, surrogate in zip(observed, fitted, strict=True)
            for mean in [surrogate.posterior([o.widths for o in own]).mean]
        ]

    scores = []
    while sum(map(len, observed)) < max(trials):
        fitted = surrogates()
        means = estimated(fitted)
        found = []
        for i, search in enumerate(searches):
            rivals = [
                (o.value or 0.0, o.costs) for j, own in enumerate(means) if j != i for o in own
            ]
            suggestion = search.suggest(observed[i], rivals=rivals, surrogate=fitted[i])
            if suggestion is not None:
                widths = suggestion.widths.vector
                found.append((suggestion.improvement, -len(observed[i]), i, widths))
        *_, i, widths = max(found, key=lambda each: each[:2])
        observed[i].append(world.train(i, widths))
        if sum(map(len, observed)) in trials:
            networks = [(i, o) for i, own in enumerate(estimated(surrogates())) for o in own]
            kept = pareto.non_dominated([(-(o.value or 0), *o.costs) for _, o in networks])
            chosen = [(i, o.widths) for (i, o), on in zip(networks, kept, strict=True) if on]
            scores.append(world.share(chosen))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[20, 30, 40, 60])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.4, help="points, of one training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spaces = [resnet(depth, side=16) for depth in DEPTHS]
    print("| surrogate | " + " | ".join(f"{n} trials" for n in sorted(options.trials)) + " |")
    print("| --- |" + " ---: |" * len(options.trials))
    for together in (False, True):
        scores = [
            searched(World(spaces, seed, options.noise), sorted(options.trials), together, seed)
            for seed in range(options.runs)
        ]
        cells = (f"{np.mean(s):.3f} ± {np.std(s):.3f}" for s in zip(*scores, strict=True))
        name = "one of all spaces" if together else "one of each"
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
