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

Amplitudes and σ maximise the marginal likelihood times log-normal priors, by gradient. Everything
is closed form in numpy and nothing is sampled, so the same trials give the same surrogate.

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
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtri

from widthsearch.bayesopt.kernel import Array, Coordinates, Features, weighted_sum
from widthsearch.bayesopt.learning_curves import CurveRegression
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation

_PRIOR_AMPLITUDES = np.log([1.0, 0.5, 0.6, 0.3, 0.6, 0.3])
_PRIOR_NOISE = np.log(0.3)
"""Log of the prior medians of θ, in the order of the parts, and of σ; in units of y."""
_PRIOR_SD = np.array([1.2, 0.6, 0.6, 0.6, 0.6, 1.2])
_PRIOR_SD_NOISE = 1.2
"""Prior standard deviations of log θ and of log σ: 1.2 is a factor of 3.3 each way.

Narrower for the parts of axes, of pairs and of like networks: a search trains networks near the
front, among which these parts show little. With a wide prior they are lost, and intervals elsewhere
are too narrow (benchmarks/results/search.md).
"""
_MAX_FIT = 256
"""Trainings, at most, that amplitudes are learned from: each step of the fit is O(N³)."""
_JITTER = 1e-8
"""Added to the diagonal of K, so that equal networks leave it positive definite."""


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
        amplitudes: θ of each part and σ, in units of y, (parts + 1,).
    """

    coordinates: Coordinates
    noise: float
    amplitudes: Array
    _mean: float
    _scale: float
    _seen: Features
    _y: Array
    _lower: Array

    @classmethod
    def fit(
        cls,
        coordinates: Coordinates,
        widths: ArrayLike | Features,
        scores: ArrayLike,
        variance: ArrayLike | float = 0.0,
    ) -> Surrogate:
        """The surrogate of some trainings.

        Args:
            coordinates: The axes and costs.
            widths: (N, A), in channels, or their features; N ≥ 1, rows may repeat.
            scores: (N,), in any unit, which is then the unit of the posterior.
            variance: Variance of each score beyond that of a finished training, (N,).
        """
        seen = widths if isinstance(widths, Features) else Features.of(coordinates, widths)
        a = np.asarray(scores, np.float64)
        mean, scale = float(a.mean()), float(a.std()) or 1.0
        y = (a - mean) / scale
        v = np.broadcast_to(np.asarray(variance, np.float64) / scale**2, a.shape)
        some = np.unique(np.linspace(0, len(y) - 1, min(len(y), _MAX_FIT)).astype(np.intp))
        part = seen.rows(some)
        amplitudes = _most_probable_amplitudes(part.covariances(part), y[some], v[some])
        lower = factor(amplitudes, seen.covariances(seen), v)
        noise = float(amplitudes[-1]) * scale
        return cls(coordinates, noise, amplitudes, mean, scale, seen, y, lower)

    @classmethod
    def fit_observations(
        cls, *spaces: tuple[Coordinates, Sequence[Observation]], metric: Metric = ACCURACY
    ) -> Surrogate:
        """The surrogate of trials, the unfinished ones by what their curves foretell.

        Args:
            spaces: The observations of each space; with several spaces, coordinates made
                :meth:`~Coordinates.together`. Widths are then given in the first space's
                coordinates: see :meth:`of_space`.
            metric: The metric that they report.

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
        return cls.fit(spaces[0][0], Features.concatenate(seen), scores, variance)

    def of_space(self, coordinates: Coordinates) -> Surrogate:
        """The same surrogate, with widths given in another of its spaces' coordinates."""
        return replace(self, coordinates=coordinates)

    @property
    def size(self) -> int:
        """The number of trainings that it was fitted to."""
        return len(self._y)

    def condition_on(self, widths: ArrayLike | Features) -> Surrogate:
        """The surrogate if networks, (M, A), are trained and each has its posterior mean.

        Means stay; standard deviations shrink near those networks (Kriging believer: Ginsbourger,
        Le Riche and Carraro, 2010). Running trials are accounted for in this way.
        """
        new = self._features(widths)
        across = weighted_sum(self.amplitudes[:-1], self._seen.covariances(new))
        corner = weighted_sum(self.amplitudes[:-1], new.covariances(new))
        corner[np.diag_indices(len(corner))] += self.amplitudes[-1] ** 2 + _JITTER
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
        return replace(self, _seen=seen, _y=y, _lower=lower)

    def mean(self, widths: ArrayLike | Features) -> Array:
        """The posterior mean of some networks, (M, A) to (M,): O(N M), deviations are O(N² M)."""
        return self._mean_from(self._across(self._features(widths)))

    def posterior(self, widths: ArrayLike | Features) -> Posterior:
        """The posterior of each of some networks by itself, (M, A)."""
        at = self._features(widths)
        mean, half = self._project(at)
        variance = weighted_sum(self.amplitudes[:-1], at.variances()) - (half**2).sum(axis=0)
        return Posterior(mean, np.sqrt(np.maximum(variance, 1e-12)) * self._scale)

    def joint_posterior(self, widths: ArrayLike | Features) -> tuple[Array, Array]:
        """Mean and covariance of the expected scores of networks, (M,) and (M, M)."""
        at = self._features(widths)
        mean, half = self._project(at)
        prior = weighted_sum(self.amplitudes[:-1], at.covariances(at))
        return mean, (prior - half.T @ half) * self._scale**2

    def loo_posterior(self) -> Posterior:
        """The prediction of each observed score from all others, noise included.

        Closed form (Rasmussen and Williams, 2006, equation 5.12), with the amplitudes and noise of
        the fit to all.
        """
        inverse = cho_solve((self._lower, True), np.eye(len(self._y)), check_finite=False)
        variance = 1 / np.diag(inverse)
        mean = (self._y - self._weights * variance) * self._scale + self._mean
        return Posterior(mean, np.sqrt(variance) * self._scale)

    def coverage(self, level: float = 0.9) -> float:
        """The share of observed scores within their central interval of :meth:`loo_posterior`.

        Calibrated intervals of probability ``level`` give about ``level``.
        """
        left_out = self.loo_posterior()
        seen = self._y * self._scale + self._mean
        return float((np.abs(seen - left_out.mean) <= ndtri(0.5 + level / 2) * left_out.sd).mean())

    def _features(self, widths: ArrayLike | Features) -> Features:
        return widths if isinstance(widths, Features) else Features.of(self.coordinates, widths)

    @cached_property
    def _weights(self) -> Array:
        """α, (N,)."""
        weights: Array = cho_solve((self._lower, True), self._y, check_finite=False)
        return weights

    def _project(self, at: Features) -> tuple[Array, Array]:
        """The posterior mean, (M,), and H, (N, M)."""
        across = self._across(at)
        half = solve_triangular(self._lower, across.T, lower=True, check_finite=False)
        return self._mean_from(across), half

    def _across(self, at: Features) -> Array:
        """k(w*, w), (M, N)."""
        return weighted_sum(self.amplitudes[:-1], at.covariances(self._seen))

    def _mean_from(self, across: Array) -> Array:
        mean: Array = across @ self._weights * self._scale + self._mean
        return mean


def factor(amplitudes: Array, parts: Sequence[Array], variance: Array) -> Array:
    """L of observed networks, (N, N), from the parts of their covariance and v."""
    covariance = weighted_sum(amplitudes[:-1], parts)
    covariance[np.diag_indices(len(covariance))] += amplitudes[-1] ** 2 + variance + _JITTER
    lower: Array = cholesky(covariance, lower=True, check_finite=False)
    return lower


def _most_probable_amplitudes(parts: Sequence[Array], y: Array, variance: Array) -> Array:
    """θ of each part and σ, (parts + 1,), that maximise the posterior density of their logs."""
    eye = np.eye(len(y))
    prior = np.append(_PRIOR_AMPLITUDES[: len(parts)], _PRIOR_NOISE)
    prior_sd = np.append(_PRIOR_SD[: len(parts)], _PRIOR_SD_NOISE)

    def loss(logs: Array) -> tuple[float, Array]:
        """−log density and its gradient: dK/d log θ_p = 2 θ_p² k_p, dL/dK = ½ (K⁻¹ − α αᵀ)."""
        scales = np.exp(logs)
        lower = factor(scales, parts, variance)
        half = solve_triangular(lower, eye, lower=True, check_finite=False)
        inverse = half.T @ half
        weights = inverse @ y
        off = (logs - prior) / prior_sd
        q = np.outer(weights, weights) - inverse
        slopes = [np.vdot(q, part) for part in parts] + [np.trace(q)]
        value = 0.5 * y @ weights + np.log(np.diag(lower)).sum() + 0.5 * off @ off
        return float(value), off / prior_sd - scales**2 * np.array(slopes)

    # In these bounds a part may vanish (e⁻⁶) or take all, and K stays well conditioned.
    bounds = [(-6.0, 3.0)] * len(parts) + [(-5.0, 1.0)]
    found = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds)
    amplitudes: Array = np.exp(found.x)
    return amplitudes
