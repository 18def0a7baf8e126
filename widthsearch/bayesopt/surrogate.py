"""The surrogate: a Gaussian process over widths that predicts scores and their uncertainty.

Notation, beside that of :mod:`~widthsearch.bayesopt.kernel`::

    a     scores that were observed; of accuracy, the percents themselves     (N,)
    y     the same, standardised: (a − their mean) / their standard deviation (N,)
    σ²    variance of one training around its widths' mean, in units of y
    v     further variance of each y: 0 if finished, else of its extrapolation (N,)
    K     k(w, w) + diag(σ² + v) of the observed networks;  K = L Lᵀ          (N, N)
    α     K⁻¹ y                                                               (N,)
    w*    networks whose score is predicted                                   (M, A)

    posterior mean        k(w*, w) α
    posterior covariance  k(w*, w*) − Hᵀ H   with   H = L⁻¹ k(w, w*)

(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2.) The mean is that
of the score *expected over seeds*: σ² is part of K, never of the posterior covariance.

Each network's standard deviation is then widened, for what the model does not know of itself::

    d     standard deviation of that posterior                                (M,)
    d₁    the same if only the nearest training were known, but exactly       (M,)
    z²    squared errors of trainings left out, in the variance foretold      (N,)
    g     how like the left-out predictions are to w*'s posterior mean        (M, N)

    widened   d max(d₁ / d, 1)^½ √((5 + g z²) / (5 + Σ g))

All trainings beyond the nearest thus give half of the information, log(d₁ / d), that they would
give to a model of the right form. At a trained network d₁ is 0: its interval rests on its own
score. The last factor makes intervals wide where scores are like those that were foretold badly,
and narrow where they are like others (benchmarks/results/search.md). The sampler takes d itself.

Trials of earlier studies of the same axes, of another recipe or data set, may be learned from too::

    s     the study of a training: 0 is this one
    r_s   loading: correlation of study s with what all studies share, −1 to 1; r_0 = 1   (studies,)
    c_s   scale of study s, beside that of its scores; c_0 = 1                            (studies,)
    σ_s   noise of study s; y is standardised within each study                           (studies,)

    k((w, s), (w', s')) = c_s² k(w, w')                          if s = s'
                          c_s c_s' r_s r_s' (k(w, w') − σ₀²)     otherwise

so that a study is a multiple of a shared function, and a deviation of its own (linear model of
coregionalisation with one factor: Bonilla, Chai and Williams, Multi-task Gaussian process
prediction, NeurIPS 2007). Levels are not shared. Of an earlier study that misleads, r is learned to
be about 0.

Amplitudes, relevances, σ, r and c maximise the marginal likelihood times priors, by gradient
(:mod:`~widthsearch.bayesopt.hyperparameters`). Everything is closed form in numpy and nothing is
sampled, so the same trials give the same surrogate.

Example, one axis, four trainings, of which the last two are of the same widths:

    >>> from widthsearch.widths import Axis
    >>> axis = Axis("conv1", base=16, min_width=8, max_width=32, step=8)
    >>> space = Coordinates([axis], {"macs": lambda widths: 1000 * widths[:, 0]})
    >>> surrogate = Surrogate.fit(space, [[8], [16], [32], [32]], [60.0, 70.0, 79.5, 80.5])
    >>> posterior = surrogate.posterior([[24], [32]])
    >>> bool(70 < posterior.mean[0] < posterior.mean[1] < 81)
    True
    >>> later = surrogate.condition_on([[24]]).posterior([[24]])  # as if 24 came out as predicted
    >>> bool(later.sd[0] < posterior.sd[0])
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.special import ndtri
from threadpoolctl import ThreadpoolController

from widthsearch.bayesopt.hyperparameters import (
    JITTER,
    Hyperparameters,
    factor,
    linked,
    most_probable,
)
from widthsearch.bayesopt.kernel import (
    LEVEL_VARIANCE,
    Array,
    Coordinates,
    Features,
    weighted_sum,
)
from widthsearch.bayesopt.learning_curves import CurveRegression
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation

_MAX_FIT = 256
"""Trainings, at most, that amplitudes are learned from: each step of the fit is O(N³)."""
_DISCOUNT = 0.5
"""Share of the information of all trainings but the nearest that intervals forgo."""
_USUAL_ERRORS = 5.0
"""Number of left-out errors with z² = 1 that each network's own are averaged with."""
_ALIKE = 0.4
"""Difference of two predictions, in units of y, at which g is e^−½."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior of some networks' scores, each by itself.

    Attributes:
        mean: Expected score over seeds, (N,).
        sd: Its standard deviation, (N,); without the noise of a training.

    Example:
        >>> posterior = Posterior(mean=np.array([90.0, 92.0]), sd=np.array([0.5, 2.0]))
        >>> (posterior.mean - 1.645 * posterior.sd).round(1).tolist()  # where 90% intervals begin
        [89.2, 88.7]
    """

    mean: Array
    sd: Array


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A Gaussian process fitted to trials: see :meth:`fit` and :meth:`fit_observations`.

    Attributes:
        coordinates: The coordinates that widths are given in.
        noise: Standard deviation of one training's score around its widths' mean.
        fitted: The hyperparameters.
    """

    coordinates: Coordinates
    noise: float
    fitted: Hyperparameters
    _mean: float
    _scale: float
    _seen: Features
    _study: NDArray[np.intp]
    _y: Array
    _lower: Array
    _fitted: int

    @classmethod
    def fit(
        cls,
        coordinates: Coordinates,
        widths: ArrayLike | Features,
        scores: ArrayLike,
        variance: ArrayLike | float = 0.0,
        earlier: Sequence[tuple[ArrayLike | Features, ArrayLike]] = (),
    ) -> Surrogate:
        """The surrogate of some trainings.

        Args:
            coordinates: The axes and costs.
            widths: (N, A), in channels, or their features; N ≥ 1, rows may repeat.
            scores: (N,), in any unit, which is then the unit of the posterior.
            variance: Variance of each score beyond that of a finished training, (N,).
            earlier: Widths (or their features) and scores of each earlier study, (M, A) and (M,),
                M ≥ 1.
        """
        own, *others = (
            given if isinstance(given, Features) else Features.of(coordinates, given)
            for given in (widths, *(given for given, _ in earlier))
        )
        scored = [np.asarray(a, np.float64) for a in (scores, *(a for _, a in earlier))]
        spreads = [float(a.std()) for a in scored]
        mean, scale = float(scored[0].mean()), next((d for d in spreads if d > 0), 1.0)
        y = np.concatenate(
            [(a - a.mean()) / (d or 1.0) for a, d in zip(scored, spreads, strict=True)]
        )
        seen = Features.concatenate([own, *others])
        study = np.repeat(np.arange(len(scored)), [len(a) for a in scored])
        v = np.zeros(len(y))
        v[study == 0] = np.asarray(variance, np.float64) / scale**2
        some = np.unique(np.linspace(0, len(y) - 1, min(len(y), _MAX_FIT)).astype(np.intp))
        part = seen.rows(some)
        with one_blas_thread():
            fitted = most_probable(part, y[some], v[some], study[some])
            seen = seen.weighted(fitted.relevances)
            covariance = weighted_sum(fitted.amplitudes, seen.covariances(seen))
            covariance = linked(covariance, fitted.loadings, fitted.scales, study, study)
            lower = factor(covariance, fitted.noises[study] ** 2 + v)
        noise = float(fitted.noises[0]) * scale
        return cls(coordinates, noise, fitted, mean, scale, seen, study, y, lower, len(y))

    @classmethod
    def fit_observations(
        cls,
        *spaces: tuple[Coordinates, Sequence[Observation]],
        metric: Metric = ACCURACY,
        earlier: Sequence[Sequence[tuple[Coordinates, Sequence[Observation]]]] = (),
    ) -> Surrogate:
        """The surrogate of trials, the unfinished ones by what their curves foretell.

        Args:
            spaces: The observations of each space; with several spaces, coordinates made
                :meth:`~Coordinates.together`. Widths are then given in the first space's
                coordinates: see :meth:`of_space`.
            metric: The metric that they report.
            earlier: Likewise the observations of earlier studies of some of these spaces, which
                report the same metric under another recipe or of other data. Unfinished ones are
                left out.

        Raises:
            ValueError: No trial is finished.
        """
        every = [o for _, own in spaces for o in own]
        if all(o.value is None for o in every):
            raise ValueError("a surrogate must have a finished trial to learn from, but has none")
        epochs = {len(o.curve) for o in every if o.value is None}
        regressions = {e: CurveRegression.fit(every, e, metric, use_costs=False) for e in epochs}

        def final(o: Observation) -> tuple[float, float] | None:
            """Score and its variance; None where there are too few curves to extrapolate."""
            if o.value is not None:
                return float(metric.score(o.value)), 0.0
            regression = regressions[len(o.curve)]
            return None if regression is None else regression.predict(o).moments()

        seen, moments = [], []
        for coordinates, own in spaces:
            known = [(o.widths, moment) for o in own if (moment := final(o)) is not None]
            if known:
                seen.append(Features.of(coordinates, [widths for widths, _ in known]))
                moments += [moment for _, moment in known]
        scores, variance = np.array(moments).T
        before = [ended for study in earlier if (ended := _finished(study, metric)) is not None]
        return cls.fit(spaces[0][0], Features.concatenate(seen), scores, variance, before)

    def of_space(self, coordinates: Coordinates) -> Surrogate:
        """The same surrogate, with widths given in another of its spaces' coordinates."""
        return replace(self, coordinates=coordinates)

    @property
    def size(self) -> int:
        """The number of this study's trainings that it was fitted to."""
        return int((self._study == 0).sum())

    def condition_on(self, widths: ArrayLike | Features) -> Surrogate:
        """The surrogate if networks, (M, A), are trained and each has its posterior mean.

        Means stay; standard deviations shrink near those networks (Kriging believer: Ginsbourger,
        Le Riche and Carraro, 2010). Running trials are accounted for in this way.
        """
        new = self._features(widths)
        across = self._across(new).T
        corner = weighted_sum(self.fitted.amplitudes, new.covariances(new))
        corner[np.diag_indices(len(corner))] += self.fitted.noises[0] ** 2 + JITTER
        # The factor of a bordered matrix: the old rows stay.
        side = solve_triangular(self._lower, across, lower=True, check_finite=False)
        lower = np.block(
            [
                [self._lower, np.zeros_like(across)],
                [side.T, np.linalg.cholesky(corner - side.T @ side)],
            ]
        )
        y = np.concatenate([self._y, across.T @ self._weights])
        seen = Features.concatenate([self._seen, new])
        study = np.append(self._study, np.zeros(len(y) - len(self._y), np.intp))
        return replace(self, _seen=seen, _study=study, _y=y, _lower=lower)

    def mean(self, widths: ArrayLike | Features) -> Array:
        """The posterior mean of some networks, (M, A) to (M,): O(N M), deviations are O(N² M)."""
        return self._mean_from(self._across(self._features(widths)))

    def posterior(self, widths: ArrayLike | Features, *, widen: bool = True) -> Posterior:
        """The posterior of each of some networks by itself, (M, A); with d if not ``widen``."""
        at = self._features(widths)
        across = self._across(at)
        prior = weighted_sum(self.fitted.amplitudes, at.variances())
        variance = np.maximum(prior - (self._half(across) ** 2).sum(axis=0), 1e-12)
        mean = self._mean_from(across)
        sd = np.sqrt(variance) * self._scale
        return Posterior(mean, sd * self._widening(prior, across, mean, variance) if widen else sd)

    def joint_posterior(self, widths: ArrayLike | Features) -> tuple[Array, Array]:
        """Mean and covariance of the expected scores of networks, (M,) and (M, M)."""
        at = self._features(widths)
        across = self._across(at)
        half, mean = self._half(across), self._mean_from(across)
        prior = weighted_sum(self.fitted.amplitudes, at.covariances(at))
        covariance = prior - half.T @ half
        variance = np.maximum(covariance.diagonal(), 1e-12)
        wider = self._widening(prior.diagonal(), across, mean, variance) * self._scale
        return mean, covariance * np.outer(wider, wider)

    def loo_posterior(self) -> Posterior:
        """The prediction of each observed score from all others, noise included.

        Closed form (Rasmussen and Williams, 2006, equation 5.12), with the amplitudes and noise of
        the fit to all, and not widened.
        """
        mean, variance = (moment[self._study == 0] for moment in _left_out(self._lower, self._y))
        return Posterior(mean * self._scale + self._mean, np.sqrt(variance) * self._scale)

    def coverage(self, level: float = 0.9) -> float:
        """The share of observed scores within their central interval of :meth:`loo_posterior`.

        Calibrated intervals of probability ``level`` give about ``level``.
        """
        left_out = self.loo_posterior()
        seen = self._y[self._study == 0] * self._scale + self._mean
        return float((np.abs(seen - left_out.mean) <= ndtri(0.5 + level / 2) * left_out.sd).mean())

    def _features(self, widths: ArrayLike | Features) -> Features:
        at = widths if isinstance(widths, Features) else Features.of(self.coordinates, widths)
        return at.weighted(self.fitted.relevances)

    @cached_property
    def _weights(self) -> Array:
        """α, (N,)."""
        weights: Array = cho_solve((self._lower, True), self._y, check_finite=False)
        return weights

    @cached_property
    def _errors(self) -> tuple[Array, Array]:
        """Left-out predictions and z² of this study's trainings, without the assumed ones."""
        known = slice(self._fitted)
        y, own = self._y[known], self._study[known] == 0
        predicted, variance = _left_out(self._lower[known, known], y)
        return predicted[own], (y - predicted)[own] ** 2 / variance[own]

    def _half(self, across: Array) -> Array:
        """H, (N, M), from k(w*, w)."""
        half: Array = solve_triangular(self._lower, across.T, lower=True, check_finite=False)
        return half

    def _widening(self, prior: Array, across: Array, mean: Array, variance: Array) -> Array:
        """Widened deviations over d, (M,), from k(w*, w*), k(w*, w), the mean and d²."""
        own = np.flatnonzero(self._study == 0)
        seen = weighted_sum(self.fitted.amplitudes, self._seen.rows(own).variances())
        # Without the level, which is known from all trainings, be they near or far.
        told = (across[:, own] - LEVEL_VARIANCE) ** 2 / np.maximum(seen - LEVEL_VARIANCE, JITTER)
        alone = prior - LEVEL_VARIANCE - told.max(axis=1)
        predicted, squares = self._errors
        apart = (mean[:, None] - self._mean) / self._scale - predicted
        alike = np.exp(-0.5 * (apart / _ALIKE) ** 2)
        erred = (_USUAL_ERRORS + alike @ squares) / (_USUAL_ERRORS + alike.sum(axis=1))
        factors: Array = np.maximum(alone / variance, 1) ** (_DISCOUNT / 2) * np.sqrt(erred)
        return factors

    def _across(self, at: Features) -> Array:
        """k(w*, w), (M, N)."""
        covariance = weighted_sum(self.fitted.amplitudes, at.covariances(self._seen))
        own = np.zeros(len(covariance), np.intp)
        return linked(covariance, self.fitted.loadings, self.fitted.scales, own, self._study)

    def _mean_from(self, across: Array) -> Array:
        mean: Array = across @ self._weights * self._scale + self._mean
        return mean


def one_blas_thread() -> AbstractContextManager[object]:
    """A context in which numpy's and scipy's BLAS runs on one thread.

    The matrices are small: more threads would only wait for the cores that train, and on a busy
    machine a fit takes thirty times as long.
    """
    limited: AbstractContextManager[object] = _blas().limit(limits=1, user_api="blas")
    return limited


_blas = cache(ThreadpoolController)


def _left_out(lower: Array, y: Array) -> tuple[Array, Array]:
    """Mean and variance of each observed y from all others, (N,) each."""
    inverse = solve_triangular(lower, np.eye(len(y)), lower=True, check_finite=False)
    variance = 1 / (inverse**2).sum(axis=0)
    return y - cho_solve((lower, True), y, check_finite=False) * variance, variance


def _finished(
    study: Sequence[tuple[Coordinates, Sequence[Observation]]], metric: Metric
) -> tuple[Features, Array] | None:
    """Features and scores of a study's finished trials; None where there are none."""
    known = [(space, [o for o in own if o.value is not None]) for space, own in study]
    seen = [Features.of(space, [o.widths for o in own]) for space, own in known if own]
    values = np.array([o.value for _, own in known for o in own], np.float64)
    return (Features.concatenate(seen), metric.score(values)) if seen else None
