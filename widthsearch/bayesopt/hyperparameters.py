"""Hyperparameters of the surrogate: those of the most probable covariance, given the trainings.

The notation is that of :mod:`~widthsearch.bayesopt.kernel` and
:mod:`~widthsearch.bayesopt.surrogate`. The vector x of log θ, log σ, artanh r, log c and log b
maximises the marginal likelihood times normal priors, by gradient (L-BFGS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize

from widthsearch.bayesopt.kernel import LEVEL_VARIANCE, Array, Features, weighted_sum

JITTER = 1e-8
"""Added to the diagonal of K, so that equal networks leave it positive definite."""
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
_PRIOR_LOADING, _PRIOR_SD_LOADING = 1.0, 1.0
"""Prior median and standard deviation of artanh r: r from −0.57 to 0.99, and most often 0.76."""
_PRIOR_SD_SCALE = 0.5
"""Prior standard deviation of log c."""
_PRIOR_SD_RELEVANCE = 0.8
"""Prior standard deviation of log b, whose median is 1: of two axes one counts most often up to
three times as much as the other (benchmarks/results/search.md)."""


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """What the covariance of trainings depends on, beside their widths.

    Attributes:
        amplitudes: θ of each part, in units of y, (parts,).
        noises: σ of each study, in units of y, (studies,).
        loadings: r of this study, which is 1, and of each earlier one, (studies,).
        scales: c, likewise.
        relevances: b, (axes of all spaces,).

    Example:
        >>> from widthsearch.bayesopt.kernel import Coordinates, Features
        >>> from widthsearch.widths import Axis
        >>> axes = [Axis("conv1", 16, 8, 64, 8), Axis("conv2", 16, 8, 64, 8)]
        >>> space = Coordinates(axes, {"macs": lambda widths: widths[:, 0] * widths[:, 1]})
        >>> widths = np.array([[w, v] for w in (8, 24, 64) for v in (8, 24, 64)])
        >>> y = np.log(widths[:, 0]) - np.log(widths[:, 0]).mean()  # conv2 has no effect
        >>> found = most_probable(Features.of(space, widths), y, np.zeros(9), np.zeros(9, int))
        >>> bool(found.relevances[0] > 2 * found.relevances[1])
        True
    """

    amplitudes: Array
    noises: Array
    loadings: Array
    scales: Array
    relevances: Array


def linked(
    covariance: Array,
    loadings: Array,
    scales: Array,
    left: NDArray[np.intp],
    right: NDArray[np.intp],
) -> Array:
    """k between trainings of studies ``left``, (N,), and ``right``, (M,), from k within one."""
    if len(loadings) == 1:
        return covariance
    between = np.outer(loadings[left], loadings[right]) * (covariance - LEVEL_VARIANCE)
    same = left[:, None] == right
    out: Array = np.outer(scales[left], scales[right]) * np.where(same, covariance, between)
    return out


def factor(covariance: Array, variance: Array) -> Array:
    """L of observed networks, (N, N): the variance of each training, (N,), is added to k."""
    covariance[np.diag_indices(len(covariance))] += variance + JITTER
    lower: Array = cholesky(covariance, lower=True, check_finite=False)
    return lower


def most_probable(
    seen: Features, y: Array, variance: Array, study: NDArray[np.intp]
) -> Hyperparameters:
    """The hyperparameters that maximise the posterior density of x.

    Args:
        seen: N networks.
        y: Their standardised scores, (N,).
        variance: v of each of them, (N,).
        study: The study of each of them, (N,).
    """
    eye, count = np.eye(len(y)), len(seen.variances())
    axes = seen.linear.shape[1]
    whose = np.eye(int(study.max()) + 1)[study]  # (N, studies)
    studies, earlier = whose.shape[1], whose.shape[1] - 1
    noise, loading = np.full(studies, _PRIOR_NOISE), np.full(earlier, _PRIOR_LOADING)
    prior = np.concatenate([_PRIOR_AMPLITUDES[:count], noise, loading, np.zeros(earlier + axes)])
    sizes = (studies, earlier, earlier, axes)
    deviations = np.repeat(
        (_PRIOR_SD_NOISE, _PRIOR_SD_LOADING, _PRIOR_SD_SCALE, _PRIOR_SD_RELEVANCE), sizes
    )
    prior_sd = np.concatenate([_PRIOR_SD[:count], deviations])
    ends = np.cumsum((count, studies, earlier, earlier))

    def unpack(x: Array) -> Hyperparameters:
        logs, log_sigma, loadings, log_scales, log_relevances = np.split(x, ends)
        r, c = np.append(1.0, np.tanh(loadings)), np.append(1.0, np.exp(log_scales))
        return Hyperparameters(np.exp(logs), np.exp(log_sigma), r, c, np.exp(log_relevances))

    def loss(x: Array) -> tuple[float, Array]:
        """−log density and its gradient: dL/dK = ½ (K⁻¹ − α αᵀ), and where q = α αᵀ − K⁻¹

        dK/d log θ_p = 2 θ_p² k_p, times c r c' r' between studies; dK/d log σ = 2 σ² I; and
        dK/d log r_s, dK/d log c_s are K in the rows and columns of s, the former without s itself.
        """
        at = unpack(x)
        theta, sigma, r, c = at.amplitudes, at.noises, at.loadings, at.scales
        networks = seen.weighted(at.relevances)
        parts = networks.covariances(networks)
        within = weighted_sum(theta, parts)
        signal = linked(within.copy(), r, c, study, study)
        lower = factor(signal.copy(), sigma[study] ** 2 + variance)
        half = solve_triangular(lower, eye, lower=True, check_finite=False)
        inverse = half.T @ half
        weights = inverse @ y
        off = (x - prior) / prior_sd
        q = np.outer(weights, weights) - inverse
        slopes = [np.zeros(0)]
        scaled = q
        if earlier:
            link = np.outer(r[study], r[study])
            same = study[:, None] == study
            scaled = q * np.where(same, 1.0, link) * np.outer(c[study], c[study])
            rows = q * signal
            by_scale = (rows.sum(axis=1) @ whose)[1:]
            toward = np.where(same, 0.0, q * np.outer(c[study], (c * r)[study]))
            toward *= within - LEVEL_VARIANCE
            by_loading = (toward.sum(axis=1) @ whose)[1:] * (1 - r[1:] ** 2)
            slopes = [by_loading, by_scale]
        by_theta = theta**2 * [np.vdot(scaled, part) for part in parts]
        by_sigma = sigma**2 * (q.diagonal() @ whose)
        by_relevance = networks.relevance_gradient(scaled / 2, theta, parts)
        value = 0.5 * y @ weights + np.log(np.diag(lower)).sum() + 0.5 * off @ off
        gains = np.concatenate([by_theta, by_sigma, *slopes, by_relevance])
        return float(value), off / prior_sd - gains

    # In these bounds a part may vanish (e⁻⁶) or take all, and K stays well conditioned.
    limits = ((-5.0, 1.0), (-3.0, 3.0), (-2.0, 2.0), (-4.0, 3.0))
    bounds = [(-6.0, 3.0)] * count
    bounds += [limit for limit, size in zip(limits, sizes, strict=True) for _ in range(size)]
    found = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds)
    return unpack(found.x)
