"""Posterior of the metric for the trained networks, and the Pareto front it implies.

One training's value is noisy: the noise of its seed is as large as the differences that matter, so
the best single training is overestimated (winner's curse). The surrogate estimates the noise and
each network's expected score from all trainings; the front is drawn by these estimates.

An estimate is the value of the expected score: the mean over seeds for a ``linear`` metric, else
the median (:mod:`~widthsearch.bayesopt.metric`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.kernel import Coordinates, CostedSpace, Features
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import Points
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.study.config import StudyConfig
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.front import Limits, cost_value, objective_points
from widthsearch.study.trial import Architecture, Trial, TrialState

ENOUGH = 8
"""Finished trainings that the surrogate needs; with fewer, the mean of each network's trainings
stands for its expected score."""

INTERVAL = 1.645
"""Standard deviations to each side that hold 90% of a normal distribution."""

_DRAWS = 2048


@dataclass(frozen=True)
class Estimate:
    """The posterior of one network's value of the metric.

    Attributes:
        value: The value of its expected score, in the metric's unit.
        sd: The standard deviation of its expected score, in percent for accuracy; None where there
            is no surrogate.
        trainings: The number of its finished trainings.
        dominated: The probability that another trained network within the limits dominates it: one
            with no more of any cost and a better value; None where there is no surrogate.
        metric: The metric.

    Example:
        >>> Estimate(99.5, sd=0.5, trainings=1).interval  # cut at 100%
        (98.6775, 100.0)
        >>> low, high = Estimate(2.0, 0.1, 1, metric=Metric("rmse", "minimize")).interval
        >>> round(low, 2), round(high, 2)
        (1.7, 2.36)
    """

    value: float
    sd: float | None
    trainings: int
    dominated: float | None = None
    metric: Metric = ACCURACY

    @property
    def interval(self) -> tuple[float, float] | None:
        """The central 90% interval, within the range; None where there is no surrogate."""
        if self.sd is None:
            return None
        score, half = self.metric.score(self.value), INTERVAL * self.sd
        low, high = sorted(self.metric.value([score - half, score + half]).tolist())
        return low, high

    @property
    def doubtful(self) -> bool:
        """Whether it is dominated with a probability above one half."""
        return self.dominated is not None and self.dominated > 0.5

    def to_json(self) -> dict[str, Any]:
        """JSON values in the metric's unit, the value under the metric's name."""
        names = ("interval", "trainings", "dominated")
        return {self.metric.name: self.value, **{name: getattr(self, name) for name in names}}


class MetricPosterior:
    """The posterior of the metric for all trained networks, and their front.

    Everything is computed when it is first asked for: the front takes one fit of the surrogate, the
    probabilities of being dominated take draws from the joint posterior.

    Args:
        trials: All trials of a study.
        spaces: Its spaces, or their records, by name.
        objectives: Its objectives.
        limits: The least and greatest values of costs, and of estimates of the metric: no network
            outside is on the front.
        metric: Its metric.
        earlier: The earlier studies that the surrogate learns from.

    Attributes:
        trials: The trials; comparisons of starts have no part in any estimate.
        objectives: The objectives.
        metric: The metric.
        earlier: The earlier studies.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.cost import Cost
        >>> from widthsearch.space.search_space import SearchSpace
        >>> from widthsearch.training.recipe import EpochResult
        >>> from widthsearch.widths import Widths
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)), (4,))
        >>> def trial(number, width, accuracy):
        ...     curve = (EpochResult(1, 0.1, accuracy, 1.0),)
        ...     cost, widths = Cost(100 * width, width, width), Widths(("0",), (width,))
        ...     finished = TrialState.FINISHED
        ...     return Trial(number, "net", widths, {}, 0, cost, curve=curve, state=finished)
        >>> trials = [trial(0, 8, 90.0), trial(1, 16, 92.0), trial(2, 16, 94.0), trial(3, 32, 91.0)]
        >>> posterior = MetricPosterior(trials, {"net": space}, ("accuracy", "macs"))
        >>> [(t.number, posterior[t].value, posterior[t].trainings) for t in posterior.front()]
        [(0, 90.0, 1), (1, 93.0, 2)]
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        spaces: Mapping[str, CostedSpace],
        objectives: Sequence[str],
        limits: Limits | None = None,
        metric: Metric = ACCURACY,
        earlier: Sequence[EarlierStudy] = (),
    ) -> None:
        self.metric = metric
        self.objectives = tuple(objectives)
        self._limits = limits or {}
        self.trials = trials
        self.earlier = tuple(earlier)
        self._own = [trial for trial in trials if not trial.is_comparison]
        self._spaces = spaces

    @classmethod
    def of(
        cls,
        config: StudyConfig,
        trials: Sequence[Trial],
        spaces: Mapping[str, CostedSpace],
        earlier: Sequence[EarlierStudy] = (),
    ) -> MetricPosterior:
        """The posterior of a study as it is configured."""
        named = config.objectives, config.limits, config.metric
        return cls(trials, spaces, *named, earlier)

    @cached_property
    def members(self) -> list[Trial]:
        """The first finished training of each architecture that has all objectives."""
        first: dict[Architecture, Trial] = {}
        points = objective_points(self._own, self.objectives, self.metric)
        for trial, point in zip(self._own, points, strict=True):
            if trial.state == TrialState.FINISHED and not np.isnan(point).any():
                first.setdefault(trial.architecture, trial)
        return list(first.values())

    @property
    def base(self) -> Trial | None:
        """The trial of the first space's base; None until it has finished."""
        return next((t for t in self.members if t.origin.get("base")), None)

    @cached_property
    def coordinates(self) -> dict[str, Coordinates]:
        """Those of the spaces with a finished trial, by name."""
        trained = {trial.space for trial in self._own if trial.value is not None}
        names = [name for name in self._spaces if name in trained]
        placed = Coordinates.together([Coordinates.of(self._spaces[name]) for name in names])
        return dict(zip(names, placed, strict=True))

    @cached_property
    def surrogate(self) -> Surrogate | None:
        """Fitted to the trials of all spaces; None with fewer than ``ENOUGH`` finished ones."""
        trainings = {name: list[Observation]() for name in self.coordinates}
        for t in self._own:
            if t.state in (TrialState.FINISHED, TrialState.STOPPED) and t.space in trainings:
                trainings[t.space].append(Observation(t.widths.vector, t.value, curve=t.values))
        every = [training for own in trainings.values() for training in own]
        if sum(training.value is not None for training in every) < ENOUGH:
            return None
        return Surrogate.fit_observations(
            *((self.coordinates[name], own) for name, own in trainings.items()),
            metric=self.metric,
            earlier=[study.placed(self.coordinates) for study in self.earlier],
        )

    @property
    def correlations(self) -> list[float | None]:
        """How each earlier study's scores correlate with this one's, as the surrogate has learned.

        None of all without a surrogate, and of studies of spaces without a finished trial.
        """
        if self.surrogate is None:
            return [None] * len(self.earlier)
        known = iter(self.surrogate.fitted.loadings[1:].tolist())
        used = (study.trials.keys() & self.coordinates for study in self.earlier)
        return [next(known) if each else None for each in used]

    def __getitem__(self, trial: Trial) -> Estimate:
        """The estimate of a finished trial's architecture."""
        return self._estimates[trial.architecture]

    def value(self, trial: Trial) -> float:
        """The estimated value of a finished trial's architecture, in the metric's unit."""
        return self._means[trial.architecture]

    def score(self, trial: Trial) -> float:
        """The score of :meth:`value`."""
        return float(self.metric.score(self.value(trial)))

    def goodness(self, trial: Trial) -> float:
        """The estimated value, negated for a metric to minimize: higher is better."""
        return self.metric.sign * self.value(trial)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The names of the further numbers that the trainings reported."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.reported))

    @property
    def noise(self) -> float | None:
        """The standard deviation of one training at the median network, in the metric's unit."""
        if self.surrogate is None:
            return None
        middle = float(np.median([self.score(t) for t in self.members]))
        return float(self.surrogate.noise * self.metric.slope(middle))

    def front(self) -> list[Trial]:
        """The members within the limits that no other dominates by estimated value.

        Returns:
            The first training of each network of the front, fewest MACs first.
        """
        return list(self._front)

    @property
    def best_value(self) -> float | None:
        """The best estimated value on the front; None for an empty front."""
        return max(map(self.value, self._front), key=lambda v: self.metric.sign * v, default=None)

    @cached_property
    def _front(self) -> list[Trial]:
        inside = self.members_within_limits
        kept = np.flatnonzero(pareto.non_dominated(self.points(inside)))
        low, high = self._range
        front = [inside[i] for i in kept if low <= self.value(inside[i]) <= high]
        return sorted(front, key=lambda t: (t.cost.macs, t.number))

    @property
    def _range(self) -> tuple[float, float]:
        """The limits of the metric."""
        return self._limits.get(self.metric.name, (-math.inf, math.inf))

    @cached_property
    def members_within_limits(self) -> list[Trial]:
        """The members whose costs are within the limits, in the members' order."""
        return [member for member in self.members if self._is_within(member)]

    def _is_within(self, member: Trial) -> bool:
        return all(
            low <= cost_value(member, name) <= high
            for name, (low, high) in self._limits.items()
            if name != self.metric.name
        )

    @property
    def undecided(self) -> list[Trial]:
        """Members within the limits that are dominated with a probability from 5% to 95%.

        Of a limit on the metric it is enough that the 90% interval reaches it.

        Returns:
            Those nearest to 50% first.
        """
        (low, high), doubts = self._range, {}
        for t in self.members_within_limits:
            first, last = self[t].interval or (-math.inf, math.inf)
            if first <= high and last >= low:
                doubts[t.number] = self[t].dominated or 0.0
        open_ = [t for t in self.members if 0.05 <= doubts.get(t.number, 0.0) <= 0.95]
        return sorted(open_, key=lambda t: (abs(doubts[t.number] - 0.5), t.number))

    def points(self, trials: Sequence[Trial]) -> Points:
        """Finished trials as points to minimise, (N, objectives), by estimated value."""
        points = objective_points(trials, self.objectives)
        points[:, self.objectives.index(self.metric.name)] = [-self.goodness(t) for t in trials]
        return points

    @cached_property
    def _trained(self) -> dict[Architecture, list[float]]:
        """The score of each finished training."""
        trained: dict[Architecture, list[float]] = {}
        for trial in self._own:
            if trial.value is not None:
                score = float(self.metric.score(trial.value))
                trained.setdefault(trial.architecture, []).append(score)
        return trained

    @cached_property
    def _features(self) -> Features:
        """The members as the surrogate sees them, in their order."""
        seen, places = [], list[int]()
        for name, coordinates in self.coordinates.items():
            own = [i for i, member in enumerate(self.members) if member.space == name]
            if own:
                vectors = [self.members[i].widths.vector for i in own]
                seen.append(Features.of(coordinates, vectors))
                places += own
        return Features.concatenate(seen).rows(np.argsort(places))

    @cached_property
    def _means(self) -> dict[Architecture, float]:
        """The estimated values."""
        means = {key: statistics.fmean(own) for key, own in self._trained.items()}
        if self.surrogate is not None and self.members:
            found = self.surrogate.mean(self._features)
            for member, mean in zip(self.members, found, strict=True):
                means[member.architecture] = float(mean)
        return {key: float(self.metric.value(mean)) for key, mean in means.items()}

    @cached_property
    def _joint(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and covariance of the members' expected scores, (N,) and (N, N)."""
        assert self.surrogate is not None
        return self.surrogate.joint_posterior(self._features)

    def mean_difference(self, pairs: Sequence[tuple[Trial, Trial]]) -> tuple[float, float]:
        """The mean over pairs of members by how much the first's value is better.

        Args:
            pairs: Minuend and subtrahend. A network may be in several pairs.

        Returns:
            The estimate in the metric's unit, and its standard deviation: sqrt(wᵀ C w) with C the
            joint posterior covariance of the members' scores and w the weight of each in the mean,
            times the slope of its value over its score. It needs a surrogate.
        """
        place = {member.architecture: i for i, member in enumerate(self.members)}
        weights = np.zeros(len(self.members))
        for first, second in pairs:
            weights[place[first.architecture]] += 1 / len(pairs)
            weights[place[second.architecture]] -= 1 / len(pairs)
        weights *= self.metric.slope([self.score(t) for t in self.members])
        mean = sum(self.goodness(first) - self.goodness(second) for first, second in pairs)
        variance = float(weights @ self._joint[1] @ weights)
        return mean / len(pairs), math.sqrt(max(0.0, variance))

    @cached_property
    def _estimates(self) -> dict[Architecture, Estimate]:
        estimated = {
            key: Estimate(mean, None, len(self._trained[key]), metric=self.metric)
            for key, mean in self._means.items()
        }
        if self.surrogate is None or not self.members:
            return estimated
        mean, covariance = self._joint
        draws = np.random.default_rng(0).multivariate_normal(
            mean, covariance, _DRAWS, check_valid="ignore", method="eigh"
        )
        points = objective_points(self.members, self.objectives, self.metric)
        costs = np.delete(points, self.objectives.index(self.metric.name), axis=1)
        within = np.array([self._is_within(member) for member in self.members])
        best = _best_at_costs(costs, np.where(within[:, None], draws.T, -np.inf))
        beaten = (best > draws.T).mean(axis=1)
        for i, member in enumerate(self.members):
            estimated[member.architecture] = replace(
                estimated[member.architecture],
                sd=float(np.sqrt(covariance[i, i])),
                dominated=float(beaten[i]),
            )
        return estimated


def _best_at_costs(costs: Points, draws: Points) -> Points:
    """For each network, the greatest draw among those that cost no more in any cost, (N, draws).

    Networks of equal costs share a row. A row's greatest draw is its own or that of a row which it
    *covers*: one that is cheaper with no third row between the two. For one cost that is a running
    maximum; in general far fewer rows than all cheaper ones.

    Args:
        costs: (N, costs).
        draws: (N, draws).
    """
    rows, row_of = np.unique(costs, axis=0, return_inverse=True)  # cheaper ones come first
    best = np.full((len(rows), draws.shape[1]), -np.inf)
    np.maximum.at(best, row_of, draws)
    below: NDArray[np.bool_] = np.asarray((rows[:, None] >= rows).all(axis=2))
    np.fill_diagonal(below, False)
    chains = np.linalg.matrix_power(below.astype(np.float32), 2)  # rows between two rows
    for row, covers in enumerate(below & (chains == 0)):
        for covered in np.flatnonzero(covers):
            np.maximum(best[row], best[covered], out=best[row])
    return best[row_of]
