"""The next network of a study, from all its trials so far: one Bayesian search per space."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import Points
from widthsearch.bayesopt.search import BayesianSearch, Rival
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.latency.predictor import LatencyPredictor
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.front import observation
from widthsearch.study.trial import Architecture, Trial, TrialState


@dataclass
class LatencyEstimates:
    """Predicted latency of networks, from stored profiles and the study's own measurements.

    Attributes:
        spaces: The spaces by name.
        profiles: The stored profiles of some of them.
        trials: Every trial by number; read anew at each call.

    Example:
        >>> from torch import nn
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (4,))
        >>> profile = LatencyPredictor.fit(space, [[2], [8], [16]], [0.5, 0.6, 1.0])
        >>> estimates = LatencyEstimates({"net": space}, {"net": profile}, trials={})
        >>> ms, sd_ms = estimates("net", np.array([[2], [16]]))
        >>> ms.round(1).tolist()
        [0.5, 1.0]
    """

    spaces: Mapping[str, SearchSpace]
    profiles: Mapping[str, LatencyPredictor]
    trials: Mapping[int, Trial]
    _fitted: dict[str, tuple[int, LatencyPredictor]] = field(default_factory=dict, init=False)

    @property
    def base_ms(self) -> float | None:
        """The base model's latency, measured once per study; None until then.

        All latencies of the study are on this scale.
        """
        measured = (trial.latency for trial in self.trials.values())
        return next((latency.base_ms for latency in measured if latency is not None), None)

    def __call__(self, space: str, vectors: NDArray[np.int64]) -> tuple[Points, Points]:
        """The latency of a space's networks in ms, and its standard deviation.

        Args:
            space: The space's name.
            vectors: Widths in channels, shape (N, axes).

        Returns:
            Two arrays of shape (N,).
        """
        measured = [
            (trial.widths.vector, trial.latency)
            for trial in self.trials.values()
            if trial.space == space and trial.latency is not None
        ]
        count, predictor = self._fitted.get(space, (-1, None))
        if predictor is None or count != len(measured):
            rows = [(v, latency.median_ms, latency.standard_error_ms) for v, latency in measured]
            rows += self._profiled(space)
            predictor = LatencyPredictor.fit(self.spaces[space], *zip(*rows, strict=True))
            self._fitted[space] = len(measured), predictor
        return predictor(vectors)

    def _profiled(self, space: str) -> list[tuple[tuple[int, ...], float, float]]:
        """The measurements of a space's profile, rescaled to this study's base_ms."""
        profile, base_ms = self.profiles.get(space), self.base_ms
        if profile is None:
            return []
        base = np.array([self.spaces[space].base.vector])
        scale = 1.0 if base_ms is None else base_ms / float(profile.predicted(base)[0])
        return [
            (tuple(vector), ms * scale, sd * scale)
            for vector, ms, sd in zip(profile.vectors.tolist(), profile.ms, profile.sd, strict=True)
        ]


class Suggestions:
    """Suggests the network that is expected to improve the front most, of all spaces.

    Several spaces share one surrogate, and the networks of the others are rivals: the volume that
    they dominate is no improvement.

    Args:
        config: The study's configuration.
        latency: Predicts latency; has the spaces, and the trials, read anew for each suggestion.
        proposed: Networks whose multiples are among the candidates.
        earlier: Earlier studies to learn from.

    Example:
        >>> from torch import nn
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (4,))
        >>> estimates = LatencyEstimates({"net": space}, {}, trials={})
        >>> suggestions = Suggestions(StudyConfig(name="mine", trials=4), estimates, proposed=[])
        >>> suggestions.next(seen=[]).widths  # the narrowest network comes first
        Widths({'0': 1})
    """

    def __init__(
        self,
        config: StudyConfig,
        latency: LatencyEstimates,
        proposed: Sequence[Candidate],
        earlier: Sequence[EarlierStudy] = (),
    ) -> None:
        self._objectives, self._metric = config.objectives, config.metric
        self._trials = latency.trials
        self._latency, self._earlier = latency, earlier
        spaces = latency.spaces
        named = (*config.objectives, *config.limits)
        placed = Coordinates.together([Coordinates.of(space, named) for space in spaces.values()])
        self._searches = {
            name: BayesianSearch(
                coordinates,
                config.objectives,
                config.metric,
                seed=config.seed,
                limits=config.limits,
                latency=partial(latency, name),
                profiles=[c.widths for c in proposed if c.space == name],
                earlier=[study.trials[name] for study in earlier if name in study.trials],
            )
            for name, coordinates in zip(spaces, placed, strict=True)
        }

    def next(self, seen: Collection[Architecture]) -> Candidate | None:
        """The network with the greatest expected improvement, of equals in the space tried least.

        Args:
            seen: Networks that are not to be suggested, each with its space's name.

        Returns:
            None where no network within the limits is left.
        """
        found: list[tuple[float, int, Candidate]] = []
        observed = {
            name: [
                observation(trial, self._objectives, self._metric)
                for trial in self._trials.values()
                if trial.space == name and not trial.is_comparison
                if trial.state != TrialState.FAILED
            ]
            for name in self._searches
        }
        shared = self._shared_surrogate(observed)
        for name, search in self._searches.items():
            surrogate, rivals = None, list[Rival]()
            if shared is not None:
                surrogate, rivals = shared.of_space(search.coordinates), self._rivals(name, shared)
            suggestion = search.suggest(
                observed[name],
                seen=[widths for space, widths in seen if space == name],
                rivals=rivals,
                surrogate=surrogate,
            )
            if suggestion is not None:
                origin: dict[str, Any] = {"sampler": "search"}
                if math.isfinite(suggestion.gain):
                    origin["gain"] = float(f"{suggestion.gain:.3g}")
                candidate = Candidate(name, suggestion.widths, origin)
                found.append((suggestion.improvement, -len(observed[name]), candidate))
        return max(found, key=lambda each: each[:2])[2] if found else None

    def _shared_surrogate(self, observed: Mapping[str, Sequence[Observation]]) -> Surrogate | None:
        """One surrogate of several spaces; None of a single space, or before a trial finished."""
        if len(observed) == 1 or all(o.value is None for own in observed.values() for o in own):
            return None
        placed = {name: search.coordinates for name, search in self._searches.items()}
        return Surrogate.fit_observations(
            *((placed[name], own) for name, own in observed.items()),
            metric=self._metric,
            earlier=[study.placed(placed) for study in self._earlier],
        )

    def _rivals(self, space: str, shared: Surrogate) -> list[Rival]:
        """The other spaces' networks, finished or running."""
        live = [
            trial
            for trial in self._trials.values()
            if trial.state in (TrialState.FINISHED, TrialState.RUNNING) and not trial.is_comparison
        ]
        timed = "latency_ms" in self._objectives
        rivals: list[Rival] = []
        for name, search in self._searches.items():
            own = [trial for trial in live if trial.space == name]
            if name == space or not own or (timed and all(t.latency is None for t in own)):
                continue
            vectors = np.array([trial.widths.vector for trial in own])
            mean = shared.of_space(search.coordinates).mean(vectors).tolist()
            ms = self._latency(name, vectors)[0].tolist() if timed else [math.nan] * len(own)
            for trial, score, predicted_ms in zip(own, mean, ms, strict=True):
                seen = observation(trial, self._objectives, self._metric, predicted_ms)
                if not np.isnan(seen.costs).any():  # a running trial has reported nothing yet
                    rivals.append((score, seen.costs))
        return rivals
