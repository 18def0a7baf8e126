"""Extrapolation of learning curves: the final value of a trial from its first epochs.

Notation::

    e     the epoch that the trial is in
    a_e   value of the metric after epoch e;  a_E  the final one
    ℓ     link of a value, higher for better ones: its logit, logarithm or itself, by the metric's
          range (:meth:`~widthsearch.bayesopt.metric.Metric.link`)
    N     finished trials with a curve of at least e epochs
    x     regressors of a trial: ℓ_e, the mean of ℓ over the three epochs before, log costs     (D,)
    y     the gain that is still to come, ℓ_E − ℓ_e

    y = β₀ + x β + ε,   ε ~ Normal(0, σ²)

The regression is fitted at each epoch anew, with normal priors of β and an inverse-gamma prior of
σ², all in proportion to the spread of y: no amount of gain is taken for granted. The prediction
is a Student t, wide while few trials are finished (Gelman et al., Bayesian Data Analysis, 3rd ed.,
section 14.2). That the finished trials are those which were not stopped does no harm: what the
others were stopped for is among the regressors.

Why the epochs before: their mean tells how noisy the last one is. Log costs are left out
where the prediction feeds the surrogate: it has costs among its own features, and would count them
twice.

Example, trials that all gain the same between their second epoch and the last:

    >>> finals = [60.0, 70.0, 80.0, 90.0]
    >>> done = [Observation((8,), a, curve=(a - 20, a - 5, a)) for a in finals]
    >>> regression = CurveRegression.fit(done, epoch=2, use_costs=False)
    >>> mean, variance = regression.predict(Observation((8,), curve=(45.0, 60.0))).moments()
    >>> round(mean), variance < 4
    (65, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation

Array = NDArray[np.float64]

MIN_CURVES = 3
"""Finished curves that a regression needs."""
_SMOOTHED_EPOCHS = 3
"""Epochs before e that are averaged over."""
_PRIOR_SIGMA = 0.5
"""Prior estimate of σ, in standard deviations of y over the finished trials …"""
_PRIOR_TRIALS = 4.0
"""… as if it had been estimated from so many trials."""
_PRIOR_SLOPE, _PRIOR_LEVEL = 2.0, 100.0
"""Prior standard deviations of β (of standardised regressors) and β₀, in the same unit."""
_MIN_SPREAD = 0.02
"""Least standard deviation of y: in logits a tenth of a point at 95%, half a point at 50%; in
logarithms 2%; without a range in standard deviations of the final values."""


@dataclass(frozen=True)
class FinalValue:
    """A prediction of a final value: a Student t over its link.

    Attributes:
        metric: The metric.
        location: Its centre.
        scale: Its scale.
        dof: Its degrees of freedom, above 2.

    Example:
        >>> final = FinalValue(ACCURACY, float(ACCURACY.link(90.0)), scale=0.2, dof=10.0)
        >>> [round(final.probability_above(link), 2) for link in ACCURACY.link([85.0, 90.0, 95.0])]
        [0.98, 0.5, 0.0]
    """

    metric: Metric
    location: float
    scale: float
    dof: float

    def probability_above(self, link: float) -> float:
        """The probability that the final value is better than the one with this link."""
        return float(stdtr(self.dof, (self.location - link) / self.scale))

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the score, to first order around the location."""
        variance = self.scale**2 * self.dof / (self.dof - 2)
        return self.metric.from_link(self.location, variance)


@dataclass(frozen=True, eq=False)
class CurveRegression:
    """The regression of final values on the curves up to one epoch: see :meth:`fit`.

    Attributes:
        metric: The metric.
        epoch: e, from 1.
        use_costs: Whether log costs are among the regressors.
    """

    metric: Metric
    epoch: int
    use_costs: bool
    _centre: Array
    _spread: Array
    _weights: Array
    _covariance: Array
    _variance: float
    _dof: float

    @classmethod
    def fit(
        cls,
        observations: Sequence[Observation],
        epoch: int,
        metric: Metric = ACCURACY,
        *,
        use_costs: bool = True,
    ) -> CurveRegression | None:
        """The regression over the finished trials among some; None with fewer than ``MIN_CURVES``.

        Args:
            observations: Trials; with ``use_costs``, all with the same costs.
            epoch: e.
            metric: The metric that they report.
            use_costs: Whether log costs are regressors.
        """
        final = [
            (o, o.value) for o in observations if o.value is not None and len(o.curve) >= epoch
        ]
        if epoch < 1 or len(final) < MIN_CURVES:
            return None
        x = _regressors([o for o, _ in final], epoch, metric, use_costs)
        links = metric.link([value for _, value in final])
        y = links - x[:, 0]
        centre, spread = x.mean(0), x.std(0)
        spread[spread < 1e-9] = 1.0  # a regressor that does not vary says nothing
        rows = np.column_stack([np.ones(len(y)), (x - centre) / spread])
        least = _MIN_SPREAD * (1.0 if np.isfinite(metric.ends).any() else float(links.std()))
        sigma = _PRIOR_SIGMA * (max(float(y.std(ddof=1)), least) or 1.0)
        precision = _PRIOR_SIGMA**2 / np.append(_PRIOR_LEVEL, [_PRIOR_SLOPE] * x.shape[1]) ** 2
        covariance = np.linalg.inv(rows.T @ rows + np.diag(precision))
        weights = covariance @ rows.T @ y
        squares = float(((y - rows @ weights) ** 2).sum() + (precision * weights**2).sum())
        dof = _PRIOR_TRIALS + len(y)
        variance = (_PRIOR_TRIALS * sigma**2 + squares) / dof
        return cls(metric, epoch, use_costs, centre, spread, weights, covariance, variance, dof)

    def predict(self, trial: Observation) -> FinalValue:
        """The final value of a trial with a curve of at least e epochs."""
        x = _regressors([trial], self.epoch, self.metric, self.use_costs)[0]
        row = np.append(1.0, (x - self._centre) / self._spread)
        scale = math.sqrt(self._variance * (1 + float(row @ self._covariance @ row)))
        return FinalValue(self.metric, float(row @ self._weights + x[0]), scale, self._dof)


def _regressors(
    observations: Sequence[Observation], epoch: int, metric: Metric, use_costs: bool
) -> Array:
    """x of each trial, (N, D); in the first epoch, which has none before it, ℓ_e stands twice."""
    start = max(0, epoch - 1 - _SMOOTHED_EPOCHS)
    curves = metric.link([o.curve[start:epoch] for o in observations])
    columns = [curves[:, -1:], curves[:, : max(1, epoch - 1 - start)].mean(axis=1, keepdims=True)]
    if use_costs:
        columns.append(np.log([o.costs for o in observations]))
    return np.concatenate(columns, axis=1)
