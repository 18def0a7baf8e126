"""Early stopping of a study's trials: never by accuracy alone."""

from __future__ import annotations

from collections.abc import Mapping

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.early_stopping import FrontStopping
from widthsearch.study.config import Rungs, StudyConfig
from widthsearch.study.front import objective_points, observation
from widthsearch.study.trial import Trial, TrialState

_NEVER_STOPPED = ("base", "baseline", "confirms")
"""Origins of trials that always finish: the front is compared with the bases and the baselines, and
a confirmation with the network's first training."""


class EarlyStopping:
    """Decides after each epoch whether a trial is stopped.

    Args:
        config: The study's configuration.
        trials: Every trial by number; read anew for each decision.
    """

    def __init__(self, config: StudyConfig, trials: Mapping[int, Trial]) -> None:
        self._config = config
        self._trials = trials

    def stops(self, trial: Trial) -> bool:
        """Whether a running trial is stopped after the last epoch of its curve.

        Args:
            trial: One of the trials, with an epoch before the recipe's last.
        """
        rule, objectives = self._config.early_stopping, self._config.objectives
        if rule is None or not trial.origin.keys().isdisjoint(_NEVER_STOPPED):
            return False
        if isinstance(rule, Rungs):
            return self._is_below_rung(trial, rule)
        assert isinstance(rule, FrontStopping)
        finished = [t for t in self._trials.values() if t.state == TrialState.FINISHED]
        if len(finished) < rule.finished:
            return False
        peers = [observation(peer, objectives) for peer in finished]
        return rule(observation(trial, objectives), peers)

    def _is_below_rung(self, trial: Trial, rule: Rungs) -> bool:
        """Whether a rung stops a trial.

        All trials that have reached the epoch are on the rung, also those that were stopped; failed
        ones are not.
        """
        epoch, objectives = trial.curve[-1].epoch, self._config.objectives
        if epoch not in rule.rungs(self._config.recipe.epochs):
            return False
        rung = [
            peer
            for peer in self._trials.values()
            if peer.state != TrialState.FAILED and len(peer.curve) >= epoch
        ]
        points = objective_points(rung, objectives)
        points[:, objectives.index("accuracy")] = [-p.curve[epoch - 1].accuracy for p in rung]
        place = [peer.number for peer in rung].index(trial.number)
        return not pareto.promoted(points, place, rule.eta)
