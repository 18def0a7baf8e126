"""Front-aware early stopping: a trial stops once it is unlikely to become Pareto-optimal.

After each epoch the final value of a running trial is predicted from the study's finished curves
(:mod:`~widthsearch.bayesopt.learning_curves`) and compared with those of the finished trials that
cost no more. A small network is never compared with a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from widthsearch.bayesopt.learning_curves import MIN_CURVES, CurveRegression
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("early_stopping")
class FrontStopping:
    """Stops a trial whose probability of reaching the front at its own costs is small.

    Attributes:
        kind: ``front``.
        chance: The least probability of reaching the front with which a trial goes on.
        finished: How many trials must be finished before any is stopped.
        first_epoch: The first epoch after which a trial may be stopped.

    Raises:
        StudyError: A value is outside its range.

    Example:
        >>> done = [Observation((8,), a, (1e6,), (a - 9, a - 3, a)) for a in (88.0, 90.0, 92.0)]
        >>> stopping = FrontStopping(finished=3)
        >>> stopping(Observation((8,), costs=(2e6,), curve=(60.0, 66.0)), done)
        True
        >>> stopping(Observation((8,), costs=(5e5,), curve=(60.0, 66.0)), done)  # none is as cheap
        False
    """

    kind: Literal["front"] = "front"
    chance: float = Field(default=0.1, gt=0, lt=1)
    finished: int = Field(default=8, ge=MIN_CURVES)
    first_epoch: int = Field(default=1, ge=1)

    def __call__(
        self,
        trial: Observation,
        finished: Sequence[Observation],
        metric: Metric = ACCURACY,
        required: float = -math.inf,
    ) -> bool:
        """Whether to stop a trial.

        Args:
            trial: The running trial, with its costs and at least one epoch.
            finished: The finished trials, with the same cost objectives.
            metric: The metric that they report.
            required: A score that the trial must surpass as well: that of a limit of the study.
        """
        if len(finished) < self.finished or len(trial.curve) < self.first_epoch:
            return False
        return front_probability(trial, finished, metric, required) < self.chance


def front_probability(
    trial: Observation,
    finished: Sequence[Observation],
    metric: Metric = ACCURACY,
    required: float = -math.inf,
) -> float:
    """The probability that no finished trial will dominate a running one.

    That is, that its final value is better than that of all which cost no more in every objective,
    and than the required score's; 1 where there are none. The arguments are those of
    :class:`FrontStopping`, with three finished trials or more.
    """
    to_surpass = [float(metric.value(required))] if math.isfinite(required) else []
    to_surpass += [
        peer.value
        for peer in finished
        if peer.value is not None
        and all(a <= b for a, b in zip(peer.costs, trial.costs, strict=True))
    ]
    if not to_surpass:
        return 1.0
    regression = CurveRegression.fit(finished, len(trial.curve), metric)
    assert regression is not None, len(finished)
    return regression.predict(trial).probability_above(metric.link(to_surpass).max())
