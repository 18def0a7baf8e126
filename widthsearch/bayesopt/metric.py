"""The metric of a study: its goal, its range, and the scores that stand for its values.

The rest of the package compares *scores*, which are higher for better values, whatever the goal;
only this file knows the goal. Notation::

    a        a value of the metric, in its own unit
    l, h     the ends of its range; −∞ or ∞ where it has none
    d        half a percent of h − l, so that scores of l and h are finite
    z        the score of a; +t(a) if the goal is to maximize, −t(a) if it is to minimize

    logit    t(a) = log((a − l + d) / (h − a + d))        a range with two ends
    log      t(a) = log(a − l)  or  −log(h − a)           a range with one end
    linear   t(a) = a                                     no range

The surrogate standardises scores and takes their noise for normal and alike everywhere. Logits and
logarithms make that nearly true at both small and large values: the noise of an RMSE is about
proportional to it, and an IoU of 95% varies less than one of 60%. Both map back into the range, so
no estimate and no end of an interval leaves it; ``linear`` estimates are cut at the ends.

Accuracy in percent, the default, has the transform ``linear``: the benchmarks of the search chose
it. Its learning curves are extrapolated in logits: see :meth:`Metric.link`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, Field, model_validator
from scipy.special import expit

from widthsearch.utils.validation import validated_dataclass

Array = NDArray[np.float64]
Transform = Literal["logit", "log", "linear"]
End = float | None

EXACT_COSTS = ("macs", "params", "activations", "weight_bytes")
"""The costs that widths determine."""

COSTS = (*EXACT_COSTS, "latency_ms")
"""The costs of a network, each to be minimised."""

_TINY = 1e-12
"""The least distance from the end of a range whose logarithm is taken."""


def _no_other_name(name: str) -> str:
    if name in (*COSTS, "epoch", "seconds", "mode"):
        raise ValueError(f"must be no cost and no column of a curve, but was {name!r}")
    return name


@validated_dataclass("metric")
class Metric:
    """What a study optimises beside the costs.

    Attributes:
        name: Its name among the numbers that a training reports.
        goal: ``maximize`` or ``minimize``.
        range: Its least and greatest value, None for an end that it has not. By default [0, None]
            for a metric to minimize and [None, None] for one to maximize. A report outside is an
            error.
        transform: ``logit``, ``log`` or ``linear``; None chooses by the range. ``linear`` takes any
            range, ``log`` one with one end, ``logit`` one with two.

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> rmse = Metric("rmse", "minimize")
        >>> rmse.kind, rmse.score([1.0, 0.5]).round(2).tolist()
        ('log', [-0.0, 0.69])
        >>> miou = Metric("miou", "maximize", range=(0, 100))
        >>> miou.value([-9.0, 0.0, 9.0]).round(1).tolist()  # never below 0 or above 100
        [0.0, 50.0, 100.0]
        >>> Metric("miou", "maximise")
        Traceback (most recent call last):
        widthsearch.errors.StudyError: metric.goal must be 'maximize' or 'minimize', but was \
'maximise'
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z][\w./-]*$"), AfterValidator(_no_other_name)]
    goal: Literal["maximize", "minimize"]
    range: tuple[End, End] | None = None
    transform: Transform | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.ends
        if not low < high:
            raise ValueError(f"range must be [min, max] with min < max, but was {self.range!r}")
        if self.transform not in (None, "linear", _transform_of(low, high)):
            raise ValueError(
                f"transform must fit the range, but was {self.transform!r} with the range "
                f"[{low:g}, {high:g}]: logit needs two ends, log one; leave it out"
            )
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """l and h."""
        low, high = self.range or (0.0 if self.goal == "minimize" else None, None)
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def kind(self) -> Transform:
        """The transform of the surrogate."""
        return self.transform or _transform_of(*self.ends)

    @property
    def sign(self) -> float:
        """1 to maximize, −1 to minimize: ``sign * value`` is higher for better values."""
        return 1.0 if self.goal == "maximize" else -1.0

    @property
    def unit(self) -> str:
        """The percent sign for accuracy in percent; else empty."""
        return "%" if self == ACCURACY else ""

    @property
    def title(self) -> str:
        """Its name with its unit, e.g. ``accuracy (%)``."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def points(self) -> str:
        """The unit of a difference in words."""
        return "points" if self.unit else self.name

    def contains(self, value: float) -> bool:
        """Whether a value is within the range."""
        return self.ends[0] <= value <= self.ends[1]

    def required(self, limits: Mapping[str, tuple[float, float]]) -> float:
        """The score that limits by name require of the metric; −∞ where they do not."""
        low, high = limits.get(self.name, (-math.inf, math.inf))
        end = low if self.goal == "maximize" else high
        return -math.inf if math.isinf(end) else float(self.score(end))

    def score(self, values: ArrayLike) -> Array:
        """Values as scores, of the same shape."""
        return self._forward(values, self.kind)

    def value(self, scores: ArrayLike) -> Array:
        """Scores as values, within the range."""
        return np.clip(self._back(scores, self.kind), *self.ends)

    def slope(self, scores: ArrayLike) -> Array:
        """How much better the value is for a score that is higher by a small amount, over that."""
        return self._slope(scores, self.kind)

    def link(self, values: ArrayLike) -> Array:
        """Values as scores of the transform that the range itself asks for.

        Learning curves are extrapolated there: early and late values differ by a constant much more
        nearly in logits or logarithms than in the unit of the metric.
        """
        return self._forward(values, _transform_of(*self.ends))

    def from_link(self, location: float, variance: float) -> tuple[float, float]:
        """Mean and variance of a score, to first order, from those of its link."""
        kind = _transform_of(*self.ends)
        if kind == self.kind:
            return location, variance
        slope = float(self._slope(location, kind))  # of a linear score over its link
        return self.sign * float(self._back(location, kind)), slope**2 * variance

    def text(self, value: float) -> str:
        """A value in a table: to 1/20,000 of the range, or to four digits where it has no two ends.

        Example:
            >>> ACCURACY.text(91.5), Metric("iou", "maximize", (0, 1)).text(0.71)
            ('91.50', '0.7100')
            >>> Metric("rmse", "minimize").text(3.14159)
            '3.142'
        """
        return f"{value:.{self.decimals(value)}f}"

    def decimals(self, value: float) -> int:
        """The digits behind the point in :meth:`text`."""
        low, high = self.ends
        size, digits = (high - low, 4) if math.isfinite(high - low) else (abs(value), 3)
        return max(0, min(9, digits - math.floor(math.log10(size or 1.0) + 1e-9)))

    def _forward(self, values: ArrayLike, kind: Transform) -> Array:
        (low, high), up = self.ends, np.asarray(values, np.float64)
        if kind == "logit":
            pad = 0.005 * (high - low)
            up = np.log((up - low + pad) / (high + pad - up))
        elif kind == "log" and high == math.inf:
            up = np.log(np.maximum(up - low, _TINY))
        elif kind == "log":
            up = -np.log(np.maximum(high - up, _TINY))
        return up if self.goal == "maximize" else -up

    def _back(self, scores: ArrayLike, kind: Transform) -> Array:
        (low, high), up = self.ends, np.asarray(scores, np.float64) * self.sign
        if kind == "linear":
            return up
        if kind == "logit":
            pad, share = 0.005 * (high - low), np.asarray(expit(up), np.float64)
            return (high - low + 2 * pad) * share + (low - pad)
        with np.errstate(over="ignore"):
            distance = np.maximum(np.exp(up if high == math.inf else -up), _TINY)
        return low + distance if high == math.inf else high - distance

    def _slope(self, scores: ArrayLike, kind: Transform) -> Array:
        (low, high), up = self.ends, np.asarray(scores, np.float64) * self.sign
        if kind == "linear":
            return np.ones_like(up)
        if kind == "logit":
            share = np.asarray(expit(up), np.float64)
            return 1.01 * (high - low) * share * (1 - share)
        with np.errstate(over="ignore"):
            return np.exp(up if high == math.inf else -up)


def _transform_of(low: float, high: float) -> Transform:
    """The transform that a range asks for."""
    kinds: tuple[Transform, ...] = ("linear", "log", "logit")
    return kinds[math.isfinite(low) + math.isfinite(high)]


ACCURACY = Metric("accuracy", "maximize", (0, 100), "linear")
"""Top-1 accuracy in percent: the metric of a study that names none."""
