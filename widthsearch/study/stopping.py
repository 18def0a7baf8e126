"""Early stopping of a study's trials: never by the metric alone."""

from __future__ import annotations

from collections.abc import Collection

from widthsearch.bayesopt import pareto
from widthsearch.study.config import StudyConfig
from widthsearch.study.front import objective_points, observation
from widthsearch.study.sections import Rungs
from widthsearch.study.trial import Trial, TrialState

_NEVER_STOPPED = ("base", "baseline", "confirms", "compares")
"""Origins of trials that always finish: the front is compared with the bases and the baselines, and
confirmations and comparisons with the network's first training."""


def is_stopped(trial: Trial, trials: Collection[Trial], config: StudyConfig) -> bool:
    """Whether a running trial is stopped after the last epoch of its curve.

    Args:
        trial: The trial, with an epoch before the recipe's last.
        trials: Every trial of the study, this one too.
        config: The study's configuration.
    """
    trials = [each for each in trials if not each.is_comparison]
    rule, objectives, metric = config.early_stopping, config.objectives, config.metric
    if rule is None or not trial.origin.keys().isdisjoint(_NEVER_STOPPED):
        return False
    if isinstance(rule, Rungs):
        return _is_below_rung(trial, trials, config, rule)
    finished = [t for t in trials if t.state == TrialState.FINISHED]
    if len(finished) < rule.finished:
        return False
    peers = [observation(peer, objectives, metric) for peer in finished]
    required = metric.required(config.limits)
    return rule(observation(trial, objectives, metric), peers, metric, required)


def _is_below_rung(
    trial: Trial, trials: Collection[Trial], config: StudyConfig, rule: Rungs
) -> bool:
    """Whether a rung stops a trial.

    All trials that have reached the epoch are on the rung, also those that were stopped; failed
    ones are not.
    """
    epoch = trial.curve[-1].epoch
    if epoch not in rule.rungs(config.recipe.epochs):
        return False
    rung = [t for t in trials if t.state != TrialState.FAILED and len(t.curve) >= epoch]
    points, metric = objective_points(rung, config.objectives, config.metric), config.metric
    column = [-metric.sign * t.values[epoch - 1] for t in rung]
    points[:, config.objectives.index(metric.name)] = column
    place = [peer.number for peer in rung].index(trial.number)
    return not pareto.promoted(points, place, rule.eta)
