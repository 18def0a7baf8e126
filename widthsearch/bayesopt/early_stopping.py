"""Early stopping that knows the front: a trial ends when it will hardly be a member.

A running trial's final accuracy is extrapolated from the study's own finished curves, and compared
with what the front already offers at no more than the trial's own costs. A small network is never
compared with a larger one.

The extrapolation is a Bayesian linear regression, at the epoch that the trial is in, of finished
networks' final accuracy on their accuracy at that epoch, its mean over the few epochs before and
their costs, all as logits and logarithms. Its prediction is a Student t, wide while few are
finished (Gelman et al., Bayesian Data Analysis, 3rd ed., section 14.2, with normal priors of the
weights in proportion to the spread of what is predicted). That the finished ones are those that
were not stopped does no harm: what stopped the others is among the regressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from widthsearch.errors import StudyError

Array = NDArray[np.float64]

_BEFORE = 3  # epochs before the last one whose mean says how noisy that one is
# In shares of the spread of what is predicted: σ, as if it were known from so many trials, and the
# standard deviations of the weights and of the constant. No accuracy is taken for granted.
_NOISE, _NOISE_WEIGHT = 0.5, 4.0
_SLOPE, _LEVEL = 2.0, 100.0
_LEAST_SPREAD = 0.02  # of logits: a tenth of a point at 95%, half a point at 50%


@dataclass(frozen=True)
class Curve:
    """What stopping looks at in a trial.

    Attributes:
        accuracy: After each epoch so far, in percent.
        costs: Its value of each cost objective, all above 0.
    """

    accuracy: tuple[float, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """A Student t over the logit of a final accuracy.

    Attributes:
        mean: Its mean.
        scale: Its scale.
        freedom: Its degrees of freedom.
    """

    mean: float
    scale: float
    freedom: float

    def chance_above(self, accuracy: float) -> float:
        """The probability of a final accuracy above this one, in percent."""
        return float(stdtr(self.freedom, (self.mean - float(logit(accuracy))) / self.scale))


@dataclass(frozen=True)
class FrontStopping:
    """Stops a trial whose chance to reach the front at its own costs is small.

    Attributes:
        kind: ``front``.
        chance: The least probability of reaching the front with which a trial goes on.
        finished: How many trials must be finished before any is stopped.
        first_epoch: The first epoch after which a trial may be stopped.
    """

    kind: Literal["front"] = "front"
    chance: float = 0.1
    finished: int = 8
    first_epoch: int = 1

    def __post_init__(self) -> None:
        for field, rule, holds in (
            ("chance", "0 < chance < 1", 0 < self.chance < 1),
            ("finished", "finished >= 3", self.finished >= 3),
            ("first_epoch", "first_epoch >= 1", self.first_epoch >= 1),
        ):
            if not holds:
                value = getattr(self, field)
                raise StudyError(f"`{rule}` must hold, but early_stopping has {field}={value!r}")

    def __call__(self, trial: Curve, finished: Sequence[Curve]) -> bool:
        """Whether the trial is to be stopped.

        Args:
            trial: The running trial; at least one epoch.
            finished: Those that were trained to the end, with the same cost objectives.
        """
        if len(finished) < self.finished or len(trial.accuracy) < self.first_epoch:
            return False
        return chance_of_front(trial, finished) < self.chance


def chance_of_front(trial: Curve, finished: Sequence[Curve]) -> float:
    """The probability that no finished network will dominate a running one.

    That is, that its final accuracy is above that of all that cost no more in every objective; 1
    where there are none. The arguments are those of :class:`FrontStopping`, with two finished
    trials or more.
    """
    at_its_cost = [
        peer.accuracy[-1]
        for peer in finished
        if all(a <= b for a, b in zip(peer.costs, trial.costs, strict=True))
    ]
    if not at_its_cost:
        return 1.0
    return extrapolate(trial, finished).chance_above(max(at_its_cost))


def extrapolate(trial: Curve, finished: Sequence[Curve]) -> Prediction:
    """A running trial's final accuracy, from those that are finished.

    The arguments are those of :class:`FrontStopping`, with two finished trials or more.
    """
    epoch = len(trial.accuracy)
    now = logit([peer.accuracy[epoch - 1] for peer in finished])
    final = logit([peer.accuracy[-1] for peer in finished])
    # What is learned is how much is gained from here: with few finished, the curve as it stands.
    gain = _regressed(
        np.array([_regressors(peer, epoch) for peer in finished]),
        final - now,
        _regressors(trial, epoch),
    )
    return Prediction(gain.mean + float(logit(trial.accuracy[-1])), gain.scale, gain.freedom)


def logit(accuracy: float | Sequence[float]) -> Array:
    """The logit of accuracies in percent, half a point from 0 and 100 so that all are finite."""
    a = np.asarray(accuracy, np.float64)
    return np.log((a + 0.5) / (100.5 - a))


def _regressors(curve: Curve, epoch: int) -> Array:
    accuracy = logit(curve.accuracy[:epoch])
    before = accuracy[max(0, epoch - 1 - _BEFORE) : max(1, epoch - 1)]
    return np.array([accuracy[-1], before.mean(), *np.log(curve.costs)])


def _regressed(x: Array, y: Array, at: Array) -> Prediction:
    """The posterior predictive at a point of a normal-inverse-gamma regression, x (N, D)."""
    centre, spread = x.mean(0), x.std(0)
    spread[spread < 1e-9] = 1.0
    rows = np.column_stack([np.ones(len(y)), (x - centre) / spread])
    row = np.append(1.0, (at - centre) / spread)
    noise = _NOISE * max(float(y.std(ddof=1)), _LEAST_SPREAD)
    penalty = _NOISE**2 / np.append(_LEVEL, np.full(x.shape[1], _SLOPE)) ** 2
    covariance = np.linalg.inv(rows.T @ rows + np.diag(penalty))
    weights = covariance @ rows.T @ y
    energy = float(((y - rows @ weights) ** 2).sum() + (penalty * weights**2).sum())
    freedom = _NOISE_WEIGHT + len(y)
    variance = (_NOISE_WEIGHT * noise**2 + energy) / freedom
    scale = math.sqrt(variance * (1 + float(row @ covariance @ row)))
    return Prediction(float(row @ weights), scale, freedom)
