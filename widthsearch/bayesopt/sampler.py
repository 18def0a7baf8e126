"""The sampler: the widths whose training is expected to add most to the true front.

An Optuna sampler for any study whose parameters are the axes of a space. Accuracy is what the
surrogate believes, costs are exact, and latency is predicted until it is measured. What is asked
next depends on the seed and on the study's trials alone: it is the same after a resume as without
one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from widthsearch.bayesopt.acquisition import HypervolumeImprovement
from widthsearch.bayesopt.candidates import Batch, Grid
from widthsearch.bayesopt.pareto import non_dominated
from widthsearch.bayesopt.surrogate import (
    Array,
    Coordinates,
    CostFunction,
    Features,
    Surrogate,
    Training,
)
from widthsearch.study.storage import directions, distributions
from widthsearch.widths import Axis, Widths

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace

_blas = functools.cache(ThreadpoolController)
"""Small matrices: threads would wait for cores that train."""

LatencyPredictor = Callable[[Batch], tuple[Array, Array]]
"""Latency of networks and the standard deviation of that prediction, (N,), in milliseconds."""

FIRST = 8
"""Networks that are trained before the surrogate is asked, of all spaces; two of each at least."""
WHOLE = 4096
"""Networks of a space that are still all looked at, each time."""
_PARENTS = 32  # of the front, at most, that candidates are made of; and of given profiles
_EACH = 300  # candidates of each kind


@dataclass(frozen=True)
class Known:
    """What the sampler knows of a trial.

    Attributes:
        widths: Its architecture.
        values: The value of each objective as a person reads it; None while it is being trained or
            when it was stopped.
        curve: Its accuracy after each epoch so far, where that is known.
        running: Whether it is being trained.
    """

    widths: Widths
    values: tuple[float, ...] | None = None
    curve: tuple[float, ...] = ()
    running: bool = False


@dataclass(frozen=True)
class Proposed:
    """What the sampler asks for.

    Attributes:
        widths: The architecture.
        gain: The expected gain of hypervolume, accuracy times log of each cost; infinite for the
            first networks, which are trained without a surrogate.
    """

    widths: Widths
    gain: float


@dataclass(frozen=True, eq=False)
class _Pool:
    """Candidates: their widths (N, axes), what the surrogate sees, and log costs by name."""

    widths: Batch
    features: Features
    log_costs: Mapping[str, Array]

    @classmethod
    def of(cls, coordinates: Coordinates, widths: Batch) -> _Pool:
        """Those of some widths."""
        logs = {name: coordinates.log_cost(name, widths) for name in coordinates.costs}
        return cls(widths, Features.of(coordinates, widths), logs)


class WidthSampler(BaseSampler):
    """Asks for the widths with the greatest expected gain of the true front.

    The gain is that of hypervolume over accuracy and log costs when a candidate has been trained
    once and the front is drawn by posterior means: expected improvement with the standard deviation
    by which one noisy training moves the mean, s² / sqrt(s² + noise²) (knowledge gradient of the
    candidate's own mean: Frazier, Powell and Dayanik, 2009), integrated over the costs. In closed
    form for one exact cost; for more costs, or predicted ones, over a fixed Sobol sequence. Trials
    that are being trained are taken to come out as believed.

    Args:
        axes: The axes of the study's space.
        costs: Exact costs by name, integers (N, axes) to (N,); objectives among them need no
            model, and the others inform the surrogate.
        objectives: The names of the study's values: ``accuracy``, costs, ``latency_ms``.
        seed: Of what is random in the first networks and the candidates.
        limits: The least and most of costs or ``latency_ms``: networks outside are not asked for.
        latency: Predicts latency; None learns it from the trials' own measurements.
        profiles: Widths whose families are among the candidates: proposals, and the base model.
        allowed: The only width vectors that may be asked for, (N, axes); None for the whole grid.
        repeats: Whether widths may be asked for again.
        coordinates: Those of the axes and costs, made :meth:`~Coordinates.together` with other
            spaces' where one study searches them all.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        costs: Mapping[str, CostFunction],
        objectives: Sequence[str] = ("accuracy", "macs"),
        *,
        seed: int = 0,
        limits: Mapping[str, tuple[float, float]] | None = None,
        latency: LatencyPredictor | None = None,
        profiles: Sequence[Widths] = (),
        allowed: ArrayLike | None = None,
        repeats: bool = False,
        coordinates: Coordinates | None = None,
    ) -> None:
        named = [*objectives, *(limits or {})]
        unknown = [n for n in named if n not in (*costs, "accuracy", "latency_ms")]
        if "accuracy" not in objectives or unknown:
            raise ValueError(
                "objectives must hold accuracy, and each name of objectives and limits must be of "
                f"accuracy, latency_ms, {', '.join(costs)}, but they are {', '.join(named)}"
            )
        if "latency_ms" in (limits or {}) and "latency_ms" not in objectives and latency is None:
            raise ValueError("limits of latency_ms need it among the objectives, or a `latency`")
        self.axes = tuple(axes)
        self.objectives = tuple(objectives)
        self.coordinates = coordinates or Coordinates(self.axes, costs)
        self._names = tuple(axis.name for axis in axes)
        self._seed = seed
        self._limits = dict(limits or {})
        self._latency = latency
        self._profiles = [widths.vector for widths in profiles]
        self._profiles.append(tuple(axis.base for axis in axes))
        self._allowed = (
            None if allowed is None else np.unique(np.asarray(allowed, np.int64), axis=0)
        )
        self._repeats = repeats

    @classmethod
    def of(
        cls, space: SearchSpace, objectives: Sequence[str] = ("accuracy", "macs"), **options: Any
    ) -> WidthSampler:
        """A sampler for a space; the options are those of the class."""
        return cls(space.axes, Coordinates.of(space).costs, objectives, **options)

    # -- Optuna ------------------------------------------------------------------------------

    @property
    def distributions(self) -> dict[str, IntDistribution]:
        """The study's parameters, for ``study.ask``."""
        return distributions(self.axes)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All axes."""
        return dict(self.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next widths.

        Raises:
            ValueError: The study's directions are not those of the objectives.
        """
        if study.directions != directions(self.objectives):
            raise ValueError(
                f"a study of {', '.join(self.objectives)} maximises accuracy and minimises the "
                f"rest, but its directions are {[d.name.lower() for d in study.directions]}"
            )
        known = self._known(study, but=trial.number)
        found = self.propose(known)
        if not found:
            raise ValueError("no widths are left within the limits that were not asked for before")
        return dict(found[0].widths)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Never: every parameter is an axis.

        Raises:
            ValueError: Names the parameter.
        """
        raise ValueError(
            f"each parameter must be an axis on its grid, but {param_name!r} in "
            f"{param_distribution} is not: ask with `sampler.distributions`"
        )

    def reseed_rng(self) -> None:
        """Another seed, for a process of its own."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])

    def surrogate(self, study: Study) -> Surrogate:
        """What is believed after the study's trials.

        Raises:
            ValueError: None is finished.
        """
        return self.fit_surrogate(self._known(study))

    def front(self, study: Study) -> list[FrozenTrial]:
        """The finished trials that no other dominates by posterior mean, fewest of the costs first.

        Only trained networks are on it: a prediction is not a result.
        """
        done = [
            t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.values
        ]
        if not done:
            return []
        widths = [[t.params[name] for name in self._names] for t in done]
        points = np.array([t.values for t in done]) * self._signs
        points[:, self._accuracy] = -self.surrogate(study).posterior(widths).mean
        kept = np.flatnonzero(non_dominated(points))
        costs = np.delete(points, self._accuracy, axis=1)
        return [done[i] for i in sorted(kept, key=lambda i: (*costs[i], done[i].number))]

    def _known(self, study: Study, but: int = -1) -> list[Known]:
        known = []
        for trial in study.get_trials(deepcopy=False):
            whole = all(name in trial.params for name in self._names)
            if (
                trial.number == but
                or not whole
                or trial.state in (TrialState.FAIL, TrialState.WAITING)
            ):
                continue
            widths = Widths(self._names, tuple(trial.params[name] for name in self._names))
            values = tuple(trial.values) if trial.state == TrialState.COMPLETE else None
            curve = tuple(row["accuracy"] for row in trial.user_attrs.get("curve", ()))
            known.append(Known(widths, values, curve, trial.state == TrialState.RUNNING))
        return known

    # -- the search --------------------------------------------------------------------------

    def fit_surrogate(self, known: Sequence[Known]) -> Surrogate:
        """The surrogate of accuracy: finished trials, and what the curves of others foretell.

        Raises:
            ValueError: No trial is finished.
        """
        return Surrogate.of_trainings((self.coordinates, self.trainings(known)))

    def trainings(self, known: Sequence[Known]) -> list[Training]:
        """What a surrogate learns from trials."""
        return [
            Training(
                trial.widths.vector,
                trial.values[self._accuracy] if trial.values else None,
                trial.curve,
            )
            for trial in known
        ]

    def propose(
        self,
        known: Sequence[Known],
        count: int = 1,
        *,
        seen: Collection[Widths] = (),
        rivals: Sequence[tuple[float, ...]] = (),
        surrogate: Surrogate | None = None,
    ) -> list[Proposed]:
        """The next widths; each takes those before it to be in training.

        Args:
            known: The trials so far.
            count: How many.
            seen: More widths that are not to be asked for.
            rivals: Values of trials of other spaces: what they dominate is no gain.
            surrogate: What is believed, where it is known already: of all spaces that are searched
                together, by trials that may be from any of them.

        Returns:
            Fewer than ``count`` where no widths within the limits are left.
        """
        with _blas().limit(limits=1, user_api="blas"):
            return self._propose(known, count, seen, rivals, surrogate)

    def _propose(
        self,
        known: Sequence[Known],
        count: int,
        seen: Collection[Widths],
        rivals: Sequence[tuple[float, ...]],
        surrogate: Surrogate | None,
    ) -> list[Proposed]:
        barred = {widths.vector for widths in seen}
        if not self._repeats:
            barred |= {trial.widths.vector for trial in known}
        fewest = 2 if surrogate is not None and surrogate.size >= FIRST else FIRST
        trials = list(known)
        out: list[Proposed] = []
        view: _View | None = None
        while len(out) < count:
            rng = np.random.default_rng((self._seed, len(trials)))
            if len(trials) < fewest or not any(trial.values for trial in known):
                found = self._first(rng, len(trials), barred)
            else:
                view = view or self._view(trials, rivals, surrogate or self.fit_surrogate(trials))
                found = self._best(rng, view, barred)
            if found is None:
                break
            barred.add(found.widths.vector)
            out.append(found)
            trials.append(Known(found.widths, running=True))
            if view is not None:
                view = view.condition_on(
                    _Pool.of(self.coordinates, np.array([found.widths.vector]))
                )
        return out

    @cached_property
    def _accuracy(self) -> int:
        return self.objectives.index("accuracy")

    @cached_property
    def _signs(self) -> Array:
        return np.array([-1.0 if name == "accuracy" else 1.0 for name in self.objectives])

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self.axes)

    @cached_property
    def _whole(self) -> _Pool | None:
        """Every candidate, where they are few enough to be all looked at."""
        widths = self._allowed
        if widths is None and self._grid.size <= WHOLE:
            widths = self._grid.whole()
        if widths is None or len(widths) > WHOLE:
            return None
        return _Pool.of(self.coordinates, widths)

    @cached_property
    def _allowed_rows(self) -> set[bytes]:
        return set() if self._allowed is None else {row.tobytes() for row in self._allowed}

    def _pool(self, batch: Batch) -> _Pool:
        """Those of some widths that may be asked for."""
        batch = np.unique(batch, axis=0)
        if self._allowed is not None:
            batch = batch[[row.tobytes() in self._allowed_rows for row in batch]]
        return _Pool.of(self.coordinates, batch)

    def _view(
        self,
        trials: Sequence[Known],
        rivals: Sequence[tuple[float, ...]],
        surrogate: Surrogate,
    ) -> _View:
        done = [trial for trial in trials if trial.values is not None]
        values = np.array([trial.values for trial in done])
        widths = np.array([trial.widths.vector for trial in done])
        latency = self._latency
        if latency is None and "latency_ms" in self.objectives:
            ms = values[:, self.objectives.index("latency_ms")]
            latency = learned_latency(self.coordinates, widths, ms)
        mean = surrogate.posterior(widths).mean
        costs = np.log(np.delete(values, self._accuracy, axis=1))
        names = [name for name in self.objectives if name != "accuracy"]
        window = np.array([self._window(name, costs[:, i]) for i, name in enumerate(names)])
        spaces = Coordinates.together(self.coordinates.spaces) or [self.coordinates]
        narrowest = [
            surrogate.of_space(space).posterior([[axis.min_width for axis in space.axes]]).mean[0]
            for space in spaces
        ]
        others = np.array(rivals).reshape(-1, len(self.objectives))
        gain = HypervolumeImprovement(
            accuracy=np.concatenate([mean, others[:, self._accuracy]]),
            costs=np.concatenate([costs, np.log(np.delete(others, self._accuracy, axis=1))]),
            window=window.reshape(-1, 2).T,
            floor=float(min(mean.min(), *narrowest)),
        )
        front = self._grid.nearest(widths[non_dominated(np.column_stack([-mean, costs]))])
        view = _View(tuple(names), self._limits, surrogate, latency, gain, front)
        running = [trial.widths.vector for trial in trials if trial.running]
        if running:
            view = view.condition_on(_Pool.of(self.coordinates, np.array(running)))
        return view

    def _window(self, name: str, seen: Array) -> tuple[float, float]:
        """The least and most log of a cost that matter."""
        low, high = self.coordinates.cost_range.get(name, (seen.min(), seen.max()))
        if name in self._limits:
            least, most = self._limits[name]
            low = max(low, np.log(least)) if least > 0 else low
            high = min(high, np.log(most))
        return low, max(high, low + 1e-9)

    def _first(
        self, rng: np.random.Generator, number: int, barred: Collection[tuple[int, ...]]
    ) -> Proposed | None:
        """The narrowest network within the limits, the widest, then random ones."""
        pool = self._whole
        if pool is None:
            batch = self._random(rng)
            if number < 2 or self._limits:
                lines = self._grid.families(
                    np.array([*self._profiles[-_PARENTS:], *batch[:16]]), 64
                )
                batch = np.concatenate([batch, lines])
            pool = self._pool(batch)
        within = np.flatnonzero(self._within(pool))
        size = self.coordinates.units(pool.widths[within]).sum(axis=1)
        order = rng.permutation(len(within))
        if number < 2:
            order = np.argsort(size if number == 0 else -size, kind="stable")
        return self._unbarred(pool.widths[within[order]], np.full(len(order), np.inf), barred)

    def _best(
        self, rng: np.random.Generator, view: _View, barred: Collection[tuple[int, ...]]
    ) -> Proposed | None:
        """The candidate of greatest gain, after two rounds of single steps from the best."""
        whole = self._whole
        if whole is not None:
            return self._unbarred(*_descending(whole.widths, self._gains(view, whole)), barred)
        grid, parents = self._grid, view.front
        parents, given = (
            some[np.sort(rng.permutation(len(some))[:_PARENTS])]
            for some in (parents, np.array(self._profiles))
        )
        profiles = [given, parents[:: max(1, len(parents) // 8)]]
        if self._limits:
            profiles.append(self._random(rng)[:16])
        batch = np.concatenate(
            [
                grid.families(np.concatenate(profiles), 64 if self._limits else 32),
                grid.mixtures(rng, parents, _EACH),
                grid.crossings(rng, parents, _EACH),
                grid.mutations(rng, parents, 2 * _EACH),
                self._random(rng),
            ]
        )
        widths, gains = np.empty((0, len(self.axes)), np.int64), np.empty(0)
        for _ in range(3):
            pool = self._pool(batch)
            widths = np.concatenate([widths, pool.widths])
            gains = np.concatenate([gains, self._gains(view, pool)])
            widths, gains = _descending(widths, gains)
            batch = grid.neighbours(widths[:4])
        return self._unbarred(widths, gains, barred)

    def _random(self, rng: np.random.Generator) -> Batch:
        if self._allowed is not None:
            return self._allowed[rng.permutation(len(self._allowed))[: 4 * _EACH]]
        return self._grid.random(rng, _EACH)

    def _gains(self, view: _View, pool: _Pool) -> Array:
        return np.where(self._within(pool), view.gains(pool), -np.inf)

    def _unbarred(
        self, widths: Batch, gains: Array, barred: Collection[tuple[int, ...]]
    ) -> Proposed | None:
        """The first that is not barred and not outside the limits."""
        for row, gain in zip(widths.tolist(), gains.tolist(), strict=True):
            if gain > -np.inf and tuple(row) not in barred:
                return Proposed(Widths(self._names, tuple(row)), gain)
        return None

    def _within(self, pool: _Pool) -> NDArray[np.bool_]:
        """Which candidates' exact costs are within the limits, (N,)."""
        within = np.ones(len(pool.widths), np.bool_)
        for name, (low, high) in self._limits.items():
            if name in pool.log_costs:
                cost = self.coordinates.costs[name](pool.widths)
                within &= (cost >= low) & (cost <= high)
        return within


@dataclass(frozen=True, eq=False)
class _View:
    """What is believed while the next widths are sought.

    Attributes:
        costs: The objectives' names but accuracy.
        limits: As the sampler's.
        surrogate: Of accuracy.
        latency: Predicts latency, where anything needs it.
        gain: Of hypervolume over the front so far.
        front: The front's widths on the grid, (F, axes); its members may be of other bounds.
    """

    costs: tuple[str, ...]
    limits: Mapping[str, tuple[float, float]]
    surrogate: Surrogate
    latency: LatencyPredictor | None
    gain: HypervolumeImprovement
    front: Batch

    def gains(self, pool: _Pool) -> Array:
        """The expected gain by each candidate, (N,)."""
        estimate = self.surrogate.posterior(pool.features)
        moved = estimate.sd**2 / np.sqrt(estimate.sd**2 + self.surrogate.noise**2)
        costs, costs_sd = self._log_costs(pool)
        gains = self.gain(estimate.mean, moved, costs, costs_sd)
        if "latency_ms" in self.limits and self.latency is not None:
            ms, sd = self.latency(pool.widths)
            low, high = (
                (limit - ms) / np.maximum(sd, 1e-12) for limit in self.limits["latency_ms"]
            )
            gains *= ndtr(high) - ndtr(low)
        return gains

    def condition_on(self, pool: _Pool) -> _View:
        """The same once networks are trained that come out as believed."""
        mean = self.surrogate.posterior(pool.features).mean
        gain = replace(
            self.gain,
            accuracy=np.concatenate([self.gain.accuracy, mean]),
            costs=np.concatenate([self.gain.costs, self._log_costs(pool)[0]]),
        )
        return replace(self, surrogate=self.surrogate.condition_on(pool.features), gain=gain)

    def _log_costs(self, pool: _Pool) -> tuple[Array, Array]:
        """Logs of the costs and their standard deviations, (N, D); 0 where exact."""
        shape = (len(pool.widths), len(self.costs))
        logs, sd = np.empty(shape), np.zeros(shape)
        for i, name in enumerate(self.costs):
            if name in pool.log_costs:
                logs[:, i] = pool.log_costs[name]
            else:
                assert self.latency is not None
                ms, spread = self.latency(pool.widths)
                logs[:, i], sd[:, i] = np.log(ms), spread / ms
        return logs, sd


def learned_latency(coordinates: Coordinates, widths: Batch, ms: Array) -> LatencyPredictor:
    """A predictor from measured networks alone: the surrogate, of log latency."""
    surrogate = Surrogate.fit(coordinates, widths, np.log(ms))

    def predict(at: Batch) -> tuple[Array, Array]:
        estimate = surrogate.posterior(at)
        median = np.exp(estimate.mean)
        return median, median * estimate.sd

    return predict


def _descending(widths: Batch, gains: Array) -> tuple[Batch, Array]:
    order = np.argsort(-gains, kind="stable")
    return widths[order], gains[order]
