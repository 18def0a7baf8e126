"""The search as an Optuna sampler, and a space as Optuna knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from widthsearch.bayesopt.kernel import Coordinates, CostedSpace
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.search import BayesianSearch
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.widths import Axis


def distributions(axes: Sequence[Axis]) -> dict[str, IntDistribution]:
    """The parameters of an Optuna study over some axes, by axis name."""
    return {
        axis.name: IntDistribution(axis.min_width, axis.max_width, step=axis.step) for axis in axes
    }


def directions(objectives: Sequence[str], metric: Metric = ACCURACY) -> list[StudyDirection]:
    """The direction of each objective: the metric's own, and down for every cost."""
    up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    maximized = metric.goal == "maximize"
    return [up if name == metric.name and maximized else down for name in objectives]


class WidthSampler(BaseSampler):
    """Samples the widths whose training is expected to improve the front most.

    For any Optuna study whose parameters are the axes of a space; the method is that of
    :class:`~widthsearch.bayesopt.search.BayesianSearch`. Running trials count as trained with their
    posterior mean, failed and diverged ones (a value or a curve that is not finite) are forgotten,
    and pruned ones count by their curve: a list of ``{"accuracy": percent}`` (or the metric's
    name), one an epoch, in the trial's user attribute ``curve``.

    Args:
        search: The search, whose objectives are the study's values; :meth:`of` makes one for a
            space.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> axes = [Axis("conv1", 16, 8, 32, 8), Axis("conv2", 16, 8, 32, 8)]
        >>> costs = {"macs": lambda widths: widths[:, 0] * widths[:, 1]}
        >>> sampler = WidthSampler(BayesianSearch(Coordinates(axes, costs)))
        >>> study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        >>> trial = study.ask(sampler.distributions)
        >>> trial.params
        {'conv1': 8, 'conv2': 8}
        >>> study.tell(trial, [80.0, 64.0]).state.name
        'COMPLETE'
    """

    def __init__(self, search: BayesianSearch) -> None:
        self.search = search

    @classmethod
    def of(cls, space: CostedSpace, **options: Any) -> WidthSampler:
        """A sampler for a space.

        Args:
            space: The space.
            options: Those of :class:`~widthsearch.bayesopt.search.BayesianSearch`, e.g.
                ``objectives``.

        Raises:
            ValueError: The metric is no objective, or a limit has no cost.
        """
        named = (*options.get("objectives", ()), *options.get("limits", ()))
        return cls(BayesianSearch(Coordinates.of(space, named), **options))

    @property
    def distributions(self) -> dict[str, IntDistribution]:
        """The study's parameters, for ``study.ask``."""
        return distributions(self.search.coordinates.axes)

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
            ValueError: The study's directions are not the objectives', or no widths are left.
        """
        objectives, metric = self.search.objectives, self.search.metric
        wanted = directions(objectives, metric)
        if study.directions != wanted:
            asked, found = ([d.name.lower() for d in own] for own in (wanted, study.directions))
            raise ValueError(
                f"a study of {', '.join(objectives)} must have the directions {asked}, but has "
                f"{found}"
            )
        suggestion = self.search.suggest(self._observations(study, exclude=trial.number))
        if suggestion is None:
            raise ValueError("no widths are left within the limits that were not sampled before")
        return dict(suggestion.widths)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
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
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        self.search = replace(self.search, seed=seed)

    def surrogate(self, study: Study) -> Surrogate:
        """The surrogate of the metric's scores, fitted to the study's trials.

        Raises:
            ValueError: No trial is finished.
        """
        return self.search.surrogate(self._observations(study))

    def _observations(self, study: Study, exclude: int = -1) -> list[Observation]:
        known = [
            self._observation(trial)
            for trial in study.get_trials(deepcopy=False)
            if trial.number != exclude
            and trial.state not in (TrialState.FAIL, TrialState.WAITING)
            and self.distributions.keys() <= trial.params.keys()
        ]
        # Optuna takes infinity as a value; one would make every estimate NaN.
        return [o for o in known if np.isfinite([o.value or 0.0, *o.costs, *o.curve]).all()]

    def _observation(self, trial: FrozenTrial) -> Observation:
        finished, name = trial.state == TrialState.COMPLETE, self.search.metric.name
        values = dict(zip(self.search.objectives, trial.values, strict=True)) if finished else {}
        return Observation(
            tuple(trial.params[name] for name in self.distributions),
            value=values.pop(name, None),
            costs=tuple(values.values()),
            curve=tuple(row[name] for row in trial.user_attrs.get("curve", ())),
            running=trial.state == TrialState.RUNNING,
        )
