"""Bayesian optimisation of widths: the next trials to run, given those so far. Numpy only.

One step, :meth:`BayesianSearch.suggest`:

1. The first trials need no model: the narrowest network, the widest, then random ones.
2. The surrogate is fitted to the trials; the front is drawn by posterior means. Running trials
   count as trained with their posterior mean, so that suggestions one after another differ.
3. The acquisition function is the expected improvement of the front's hypervolume, over score ×
   log costs, by one training of a candidate. One noisy training moves a network's posterior mean
   with the standard deviation s² / √(s² + σ²), where s is its posterior standard deviation and σ
   the noise of a training: that takes the place of s (knowledge gradient of the candidate's own
   mean: Frazier, Powell and Dayanik, 2009). Costs are exact; latency is predicted until measured.
4. It is maximised over all networks of a small space, else over candidates made from the front, of
   proposals and at random, and then over the neighbours of the best.

All randomness comes from the seed and the number of trials, so the same trials give the same
suggestions, after a resume too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from widthsearch.bayesopt.acquisition import HypervolumeImprovement
from widthsearch.bayesopt.candidates import Batch, Grid
from widthsearch.bayesopt.kernel import Array, Coordinates, Features
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import non_dominated
from widthsearch.bayesopt.surrogate import Surrogate, one_blas_thread
from widthsearch.widths import Widths

CostPredictor = Callable[[Batch], tuple[Array, Array]]
"""A cost of networks and its standard deviation, (N, axes) to (N,) each; latency in ms."""

Rival = tuple[float, tuple[float, ...]]
"""The posterior mean score of a network of another space, and its costs."""

INITIAL_TRIALS = 8
"""Trials before the surrogate is used, over all spaces; at least two of each space."""
MAX_EXHAUSTIVE = 4096
"""Networks of a space, at most, for the acquisition function to be evaluated on all of them."""
_MAX_PARENTS = 32
"""Networks of the front, at most, that candidates are made from; and of the profiles."""
_CANDIDATES_PER_KIND = 300
"""Random candidates, mixtures and crossings, each; twice as many mutations."""
_REFINED = 4
"""Best candidates whose neighbours are candidates too, in each of two rounds."""


@dataclass(frozen=True)
class Suggestion:
    """A network to train next.

    Attributes:
        widths: Its widths.
        improvement: The expected improvement of the hypervolume, in units of score times the log of
            each cost; infinite for the first trials, which need no surrogate.
        gain: The same as a share of the hypervolume of the front so far; infinite before there is
            a front.

    Example:
        >>> Suggestion(Widths(("conv1",), (24,)), improvement=0.5).widths["conv1"]
        24
    """

    widths: Widths
    improvement: float
    gain: float = np.inf


@dataclass(frozen=True, eq=False)
class BayesianSearch:
    """Suggests the widths whose training is expected to improve the front most.

    Attributes:
        coordinates: The space's axes and exact costs; with several spaces in one study, made
            :meth:`~Coordinates.together`.
        objectives: The metric's name, and names of exact costs, ``latency_ms``, or other positive
            numbers to be minimised, which are learned from the observations.
        metric: The metric, which maps its values to scores.
        seed: The seed of the first trials and of the candidates.
        limits: The least and greatest value of objectives, exact costs or ``latency_ms``: no
            network with costs outside is suggested, and a metric outside improves nothing.
        latency: Predicts latency; None to learn it from the observations.
        profiles: Widths whose multiples are among the candidates, beside the base's: proposals.
        allowed: The only width vectors that may be suggested, (N, axes); None for the whole grid.
        earlier: Trials of earlier studies of the same axes and metric, under another recipe or of
            other data, that the surrogate learns from: see
            :mod:`~widthsearch.bayesopt.surrogate`. Two trials are then enough for a suggestion.

    Example:
        >>> from widthsearch.widths import Axis
        >>> axes = [Axis("conv1", 16, 8, 32, 8), Axis("conv2", 16, 8, 32, 8)]
        >>> space = Coordinates(axes, {"macs": lambda widths: widths[:, 0] * widths[:, 1]})
        >>> search = BayesianSearch(space, seed=0)
        >>> search.suggest([]).widths  # the narrowest network comes first
        Widths({'conv1': 8, 'conv2': 8})
        >>> search.suggest([Observation((8, 8), value=80.0, costs=(64.0,))]).widths
        Widths({'conv1': 32, 'conv2': 32})
    """

    coordinates: Coordinates
    objectives: Sequence[str] = ("accuracy", "macs")
    metric: Metric = ACCURACY
    seed: int = 0
    limits: Mapping[Any, tuple[float, float]] = field(default_factory=dict)
    latency: CostPredictor | None = None
    profiles: Sequence[Widths] = ()
    allowed: ArrayLike | None = None
    earlier: Sequence[Sequence[Observation]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):  # a study's YAML takes a name; this is Python
            raise ValueError(
                f"metric must be a Metric, such as Metric('rmse', 'minimize'), but was "
                f"{self.metric!r}"
            )
        known = [*self.objectives, *self.coordinates.exact, *["latency_ms"] * bool(self.latency)]
        if self.metric.name not in self.objectives or not self.limits.keys() <= set(known):
            raise ValueError(
                f"objectives must hold {self.metric.name}, and limits must be of objectives, exact "
                f"costs, or of latency_ms with a `latency`, but objectives are "
                f"{', '.join(self.objectives)} and limits are of {', '.join(self.limits) or 'none'}"
            )

    def suggest(
        self,
        observations: Sequence[Observation],
        *,
        seen: Collection[Widths] = (),
        rivals: Sequence[Rival] = (),
        surrogate: Surrogate | None = None,
    ) -> Suggestion | None:
        """The next trial; None where no widths within the limits are left.

        Args:
            observations: The trials of this space so far, in order of their numbers.
            seen: Further widths that are not to be suggested.
            rivals: Finished and running trials of other spaces: the volume that they dominate is no
                improvement.
            surrogate: A surrogate of all spaces that are searched together; None to fit one to the
                observations.
        """
        excluded = {widths.vector for widths in seen} | {o.widths for o in observations}
        informed = len([o for trials in self.earlier for o in trials if o.value is not None])
        informed += 0 if surrogate is None else surrogate.size
        shared = informed >= INITIAL_TRIALS
        enough = len(observations) >= (2 if shared else INITIAL_TRIALS)
        rng = np.random.default_rng((self.seed, len(observations)))
        with one_blas_thread():
            if enough and any(o.value is not None for o in observations):
                acquisition = self._acquisition(observations, rivals, surrogate)
                return self._maximise(rng, acquisition, excluded)
            return self._initial(rng, len(observations), excluded)

    def surrogate(self, trials: Sequence[Observation]) -> Surrogate:
        """The surrogate of some trials of this space, and of those of earlier studies.

        Raises:
            ValueError: No trial is finished.
        """
        return Surrogate.fit_observations(
            (self.coordinates, trials),
            metric=self.metric,
            earlier=[[(self.coordinates, study)] for study in self.earlier],
        )

    def _acquisition(
        self,
        trials: Sequence[Observation],
        rivals: Sequence[Rival],
        surrogate: Surrogate | None,
    ) -> _Acquisition:
        """The acquisition function after some trials, of which at least one is finished."""
        surrogate = surrogate or self.surrogate(trials)
        names = tuple(name for name in self.objectives if name != self.metric.name)
        finished = [o for o in trials if o.value is not None]
        widths = np.array([o.widths for o in finished])
        values = np.array([o.costs for o in finished])
        predicted = {} if self.latency is None else {"latency_ms": self.latency}
        predicted |= {
            name: fit_cost(self.coordinates, widths, values[:, i])
            for i, name in enumerate(names)
            if name not in (*predicted, *self.coordinates.exact)
        }
        mean, costs = surrogate.mean(widths), np.log(values)
        window = np.array([self._window(name, costs[:, i]) for i, name in enumerate(names)])
        # The floor is below every network of the front, so that each counts: at most the least
        # score of all, and of the narrowest network of each space. Below a limit nothing counts.
        spaces = Coordinates.together(self.coordinates.spaces) or [self.coordinates]
        narrowest = [
            surrogate.of_space(space).mean([[axis.min_width for axis in space.axes]])[0]
            for space in spaces
        ]
        improvement = HypervolumeImprovement(
            scores=np.concatenate([mean, [score for score, _ in rivals]]),
            costs=np.log([o.costs for o in finished] + [costs for _, costs in rivals]),
            window=window.reshape(-1, 2).T,
            floor=max(float(min(mean.min(), *narrowest)), self.metric.required(self.limits)),
        )
        # Trials may be from before a change of the axes' bounds: parents are on today's grid.
        front = self._grid.nearest(widths[non_dominated(np.column_stack([-mean, costs]))])
        acquisition = _Acquisition(names, self.limits, surrogate, predicted, improvement, front)
        running = [o.widths for o in trials if o.running]
        return acquisition.condition_on(self._candidates(running)) if running else acquisition

    def _window(self, name: str, logs: Array) -> tuple[float, float]:
        """The least and the greatest log of a cost that matter; of others, those observed."""
        low, high = self.coordinates.cost_range.get(name, (logs.min(), logs.max()))
        if name in self.limits:
            least, greatest = self.limits[name]
            low = max(low, np.log(least)) if least > 0 else low
            high = min(high, np.log(greatest))
        return low, max(high, low + 1e-9)

    def _initial(
        self, rng: np.random.Generator, number: int, excluded: Collection[tuple[int, ...]]
    ) -> Suggestion | None:
        """The narrowest network within the limits, the widest, then random ones."""
        pool = self._all
        if pool is None:
            batch = self._random(rng)
            if number < 2 or self.limits:
                profiles = np.array([*self._profiles[-_MAX_PARENTS:], *batch[:16]])
                batch = np.concatenate([batch, self._grid.families(profiles, 64)])
            pool = self._allowed_candidates(batch)
        widths = pool.widths[self._within_limits(pool)]
        order = rng.permutation(len(widths))
        if number < 2:
            size = self.coordinates.unit_widths(widths).sum(axis=1)
            order = np.argsort(size if number == 0 else -size, kind="stable")
        return self._best(widths[order], np.full(len(order), np.inf), excluded)

    def _maximise(
        self,
        rng: np.random.Generator,
        acquisition: _Acquisition,
        excluded: Collection[tuple[int, ...]],
    ) -> Suggestion | None:
        """The candidate of greatest expected improvement, after two rounds of single steps."""
        if self._all is not None:
            values = self._evaluate(acquisition, self._all)
            return self._best(self._all.widths, values, excluded, acquisition.improvement.volume)
        grid, each = self._grid, _CANDIDATES_PER_KIND
        parents, given = (
            some[np.sort(rng.permutation(len(some))[:_MAX_PARENTS])]
            for some in (acquisition.front, np.array(self._profiles))
        )
        profiles = [given, parents[:: max(1, len(parents) // 8)]]
        if self.limits:  # few candidates may be within: more profiles, at more multipliers
            profiles.append(self._random(rng)[:16])
        batch = np.concatenate(
            [
                grid.families(np.concatenate(profiles), 64 if self.limits else 32),
                grid.mixtures(rng, parents, each),
                grid.crossings(rng, parents, each),
                grid.mutations(rng, parents, 2 * each),
                self._random(rng),
            ]
        )
        widths, values = np.empty((0, len(grid.axes)), np.int64), np.empty(0)
        for _ in range(3):
            pool = self._allowed_candidates(batch)
            widths = np.concatenate([widths, pool.widths])
            values = np.concatenate([values, self._evaluate(acquisition, pool)])
            batch = grid.neighbours(widths[np.argsort(-values, kind="stable")[:_REFINED]])
        return self._best(widths, values, excluded, acquisition.improvement.volume)

    def _evaluate(self, acquisition: _Acquisition, pool: _Candidates) -> Array:
        """The expected improvement by each candidate, (N,); −∞ outside the limits."""
        return np.where(self._within_limits(pool), acquisition(pool), -np.inf)

    def _best(
        self,
        widths: Batch,
        values: Array,
        excluded: Collection[tuple[int, ...]],
        volume: float = 0.0,
    ) -> Suggestion | None:
        """The network of greatest value that is not excluded; of equals the first.

        Args:
            widths: The networks, (N, axes).
            values: The expected improvement by each, (N,).
            excluded: Width vectors that are not suggested.
            volume: The hypervolume of the front.
        """
        names = tuple(axis.name for axis in self.coordinates.axes)
        for i in np.argsort(-values, kind="stable"):
            vector = tuple(widths[i].tolist())
            if values[i] > -np.inf and vector not in excluded:
                value = float(values[i])
                gain = value / volume if volume > 0 else np.inf
                return Suggestion(Widths(names, vector), value, gain)
        return None

    def _within_limits(self, pool: _Candidates) -> NDArray[np.bool_]:
        """Which candidates' exact costs are within the limits, (N,)."""
        within = np.ones(len(pool.widths), np.bool_)
        for name, (low, high) in self.limits.items():
            if name in pool.log_costs:
                cost = self.coordinates.exact[name](pool.widths)
                within &= (cost >= low) & (cost <= high)
        return within

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self.coordinates.axes)

    @cached_property
    def _profiles(self) -> list[tuple[int, ...]]:
        base = tuple(axis.base for axis in self.coordinates.axes)
        return [*(widths.vector for widths in self.profiles), base]

    @cached_property
    def _allowed(self) -> Batch | None:
        if self.allowed is None:
            return None
        return np.unique(np.asarray(self.allowed, np.int64), axis=0)

    @cached_property
    def _allowed_rows(self) -> set[bytes]:
        return set() if self._allowed is None else {row.tobytes() for row in self._allowed}

    @cached_property
    def _all(self) -> _Candidates | None:
        """Every network of the space, where they are few enough to be evaluated each time."""
        widths = self._allowed
        if widths is None and self._grid.size <= MAX_EXHAUSTIVE:
            widths = self._grid.whole()
        return None if widths is None or len(widths) > MAX_EXHAUSTIVE else self._candidates(widths)

    def _random(self, rng: np.random.Generator) -> Batch:
        if self._allowed is not None:
            return self._allowed[rng.permutation(len(self._allowed))[: 4 * _CANDIDATES_PER_KIND]]
        return self._grid.random(rng, _CANDIDATES_PER_KIND)

    def _allowed_candidates(self, batch: Batch) -> _Candidates:
        batch = np.unique(batch, axis=0)
        if self._allowed is not None:
            batch = batch[[row.tobytes() in self._allowed_rows for row in batch]]
        return self._candidates(batch)

    def _candidates(self, widths: ArrayLike) -> _Candidates:
        batch = np.asarray(widths)
        named = {*self.objectives, *self.limits} & self.coordinates.exact.keys()
        logs = {name: self.coordinates.log_cost(name, batch) for name in named}
        return _Candidates(batch, Features.of(self.coordinates, batch), logs)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Networks that may be suggested: widths (N, axes), their features, log costs by name (N,)."""

    widths: Batch
    features: Features
    log_costs: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class _Acquisition:
    """The acquisition function after some trials.

    Attributes:
        costs: The objectives' names but the metric's, D of them.
        limits: Those of the search.
        surrogate: Of the metric's scores.
        predicted: Predicts the costs that are not exact, by name.
        improvement: Of the hypervolume over the front so far.
        front: The front's widths, (F, axes), on the grid.
    """

    costs: tuple[str, ...]
    limits: Mapping[Any, tuple[float, float]]
    surrogate: Surrogate
    predicted: Mapping[str, CostPredictor]
    improvement: HypervolumeImprovement
    front: Batch

    def __call__(self, pool: _Candidates) -> Array:
        """The expected improvement by each candidate, (N,)."""
        posterior = self.surrogate.posterior(pool.features, widen=False)
        moved = posterior.sd**2 / np.sqrt(posterior.sd**2 + self.surrogate.noise**2)
        improvement = self.improvement(posterior.mean, moved, *self._log_costs(pool))
        for name in self.limits.keys() & self.predicted.keys():
            # Times the probability that the cost is within its limits.
            cost, sd = self.predicted[name](pool.widths)
            low, high = ((limit - cost) / np.maximum(sd, 1e-12) for limit in self.limits[name])
            improvement *= ndtr(high) - ndtr(low)
        return improvement

    def condition_on(self, pool: _Candidates) -> _Acquisition:
        """The acquisition function if networks are trained and have their posterior means."""
        mean = self.surrogate.mean(pool.features)
        improvement = replace(
            self.improvement,
            scores=np.concatenate([self.improvement.scores, mean]),
            costs=np.concatenate([self.improvement.costs, self._log_costs(pool)[0]]),
        )
        surrogate = self.surrogate.condition_on(pool.features)
        return replace(self, surrogate=surrogate, improvement=improvement)

    def _log_costs(self, pool: _Candidates) -> tuple[Array, Array]:
        """Logs of the costs and their standard deviations, (N, D); 0 where exact."""
        shape = (len(pool.widths), len(self.costs))
        logs, sd = np.empty(shape), np.zeros(shape)
        for i, name in enumerate(self.costs):
            if name in pool.log_costs:
                logs[:, i] = pool.log_costs[name]
            else:
                cost, spread = self.predicted[name](pool.widths)
                logs[:, i], sd[:, i] = np.log(cost), spread / cost
        return logs, sd


def fit_cost(coordinates: Coordinates, widths: Batch, costs: Array) -> CostPredictor:
    """A predictor from measured networks alone: the surrogate, of log cost."""
    surrogate = Surrogate.fit(coordinates, widths, np.log(costs))

    def predict(at: Batch) -> tuple[Array, Array]:
        posterior = surrogate.posterior(at, widen=False)
        median = np.exp(posterior.mean)
        return median, median * posterior.sd

    return predict
