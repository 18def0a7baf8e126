"""Predicts the latency of width vectors from measurements of whole networks.

Notation:

    w           widths, one per axis; s: the device's block of channels (1, 2, 4, ... 64)
    ⌈w⌉_s       widths rounded up to whole blocks
    M_l, A_l    MACs and output elements of layer l, as shares of the base network's sums
    off_l(w)    e^p for each of the two widths of layer l that is not whole blocks
    u, δ_l, ε_l log speeds: of the whole network, and of each layer relative to them

    t(w) = e^{u_0} + Σ_l e^{u_1 + δ_l + off_l(w)} M_l(⌈w⌉_s) + Σ_l e^{u_2 + ε_l} A_l(⌈w⌉_s)

A network's time is a constant, plus each layer's MACs and output elements at the widths that the
device computes, each at the layer's own speed.

Example: a network of one convolution with base width 32, s = 16, e^u = (0.1, 0.6, 0.3) ms,
δ = ε = 0 and e^p = 0.05. At w = 32 both shares are 1, so t = 0.1 + 0.6 + 0.3 = 1 ms. At w = 17 the
device computes 32 channels, with slower kernels: t = 0.1 + 0.6 e^0.05 + 0.3 = 1.03 ms. At w = 16
both shares are a half: t = 0.1 + 0.3 + 0.15 = 0.55 ms.

Priors: δ, ε ~ N(0, σ_δ²), so that with few measurements all layers have one speed, and the
prediction is one from MACs; u and p are wide. The measured log time is log t(w) plus a Student t of
scale σ: errors are relative, predictions are positive, and outliers hardly count. σ_δ and σ are
estimated by expectation maximisation around the Laplace approximation (MacKay, Information Theory,
Inference and Learning Algorithms, 2003, ch. 27). s is averaged over by its evidence: where all
measured widths are multiples of 8, smaller blocks cannot be told apart, and the standard deviation
reflects that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

from widthsearch.errors import StudyError
from widthsearch.latency.block_layers import Array, BlockLayers
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths

BLOCKS = (1, 2, 4, 8, 16, 32, 64)
"""The candidates for a device's block of channels."""

_FOLDS = 10
_Z90 = 1.645
_ITERATIONS, _SETTLE = 80, 12
_U_SD = 3.0  # prior of u: log times of the three parts at the base
_OFF, _OFF_SD = math.log(0.05), 1.5  # prior of p: incomplete blocks cost a little more
_DELTA, _DELTA_WEIGHT = 0.3, 4.0  # prior of σ_δ, and the number of layers that it is worth
_SIGMA, _SIGMA_WEIGHT = 0.03, 4.0  # prior of σ, and the number of measurements that it is worth
_TAIL = 4.0  # degrees of freedom: other processes make some measurements far too slow

Features = tuple[Array, Array, Array]


@dataclass(frozen=True)
class PredictionErrors:
    """Errors of a predictor out of sample, by ten-fold cross-validation.

    Attributes:
        networks: The number of measured networks.
        median: The median relative error.
        tau: Kendall's τ between predictions and measurements.
        coverage: The share of measurements inside their 90% intervals.
        median_macs: The median relative error of ``a + b · MACs``, fitted to the same folds.
        tau_macs: Kendall's τ between MACs and measurements.

    Example:
        >>> errors = PredictionErrors(40, 0.02, 0.9, coverage=0.9, median_macs=0.1, tau_macs=0.7)
        >>> errors.median < errors.median_macs  # better than a line in MACs
        True
    """

    networks: int
    median: float
    tau: float
    coverage: float
    median_macs: float
    tau_macs: float


@dataclass(frozen=True)
class Stair:
    """Predicted latency around one width of an axis, with all other widths fixed.

    Attributes:
        name: The axis.
        width: Its width.
        ms: The predicted latency at that width.
        less_ms: The latency one grid step below; None at the minimum width.
        more_ms: The latency one grid step above; None at the maximum width.
        flat_from: The smallest width with the same latency, down from the axis's width.
        flat_to: The largest width with the same latency, up from the axis's width.

    Example:
        >>> stair = Stair("conv1", 24, 1.0, less_ms=0.8, more_ms=1.0, flat_from=17, flat_to=32)
        >>> stair.flat_to - stair.width  # channels that cost no latency
        8
    """

    name: str
    width: int
    ms: float
    less_ms: float | None
    more_ms: float | None
    flat_from: int
    flat_to: int


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """Predicts the latency of a space's networks on one device. Made by :meth:`fit`.

    Attributes:
        space: The space.
        vectors: The measured width vectors, shape (N, axes).
        ms: Their latencies, shape (N,).
        sd: Their standard errors, shape (N,).

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> space = SearchSpace.from_model(net, (3, 16, 16))
        >>> predictor = LatencyPredictor.fit(space, [[8], [16], [32]], [0.5, 0.6, 1.0])
        >>> mean_ms, sd_ms = predictor([[8], [32]])
        >>> mean_ms.round(1).tolist()
        [0.5, 1.0]
    """

    space: SearchSpace
    vectors: NDArray[np.int64]
    ms: Array
    sd: Array
    _layers: BlockLayers
    _fits: tuple[tuple[float, _Fit], ...]
    _stored_errors: PredictionErrors | None = None

    @classmethod
    def fit(
        cls, space: SearchSpace, vectors: ArrayLike, ms: ArrayLike, sd: ArrayLike | None = None
    ) -> LatencyPredictor:
        """Fit a predictor to measured networks: one is enough, about 40 identify the block size.

        Args:
            space: The space.
            vectors: Integers, shape (N, axes), in channels; need not be on the grid.
            ms: Latencies, shape (N,), in milliseconds or as ratios to the base.
            sd: Standard errors, shape (N,), in the same unit; None if unknown.

        Raises:
            StudyError: There is no measurement, or a shape or value is invalid.
        """
        widths = np.asarray(vectors, np.int64)
        measured = np.asarray(ms, np.float64)
        error = np.zeros_like(measured) if sd is None else np.asarray(sd, np.float64)
        shape = (len(measured), len(space.axes))
        if not len(measured) or widths.shape != shape or error.shape != measured.shape:
            raise StudyError(
                f"a latency predictor of {space.name!r} needs vectors (N, {len(space.axes)}), ms "
                f"and sd (N,) with N >= 1, but has {widths.shape}, {measured.shape}, {error.shape}"
            )
        sound = np.isfinite(measured) & (measured > 0) & np.isfinite(error) & (error >= 0)
        if not sound.all():
            bad = int(np.flatnonzero(~sound)[0])
            raise StudyError(
                "`ms > 0` and `sd >= 0` must hold and be finite, but network "
                f"{widths[bad].tolist()} has ms={measured[bad]:g}, sd={error[bad]:g}"
            )
        layers = BlockLayers(space)
        return cls(
            space, widths, measured, error, layers, _fit_all_blocks(layers, widths, measured, error)
        )

    def __call__(self, vectors: ArrayLike) -> tuple[Array, Array]:
        """Predict the latency of width vectors.

        Args:
            vectors: Integers, shape (N, axes) or (axes,), in channels.

        Returns:
            Mean and standard deviation of the true latency, in the unit of the measurements, each
            (N,) or ().
        """
        shape = np.shape(vectors)[:-1]
        log_ms, variance, weight = self._logs(np.atleast_2d(np.asarray(vectors)))
        means = np.exp(log_ms + variance / 2)
        mean = weight @ means
        second = weight @ (means**2 * np.exp(variance))
        return mean.reshape(shape), np.sqrt(np.maximum(second - mean**2, 0)).reshape(shape)

    def predicted(self, vectors: NDArray[np.int64]) -> Array:
        """The mean alone, as ``Setting.latency`` of proposers."""
        return self(vectors)[0]

    @property
    def blocks(self) -> dict[int, float]:
        """The probability of each block size, without negligible ones."""
        return {fit.block: weight for weight, fit in self._fits}

    @cached_property
    def networks(self) -> int:
        """The number of different measured networks."""
        return len(np.unique(self.vectors, axis=0))

    def stairs(self, widths: Widths, tolerance: float = 0.01) -> tuple[Stair, ...]:
        """Per axis, the predicted latency of fewer and more channels with other widths fixed.

        Args:
            widths: A width vector on the grid.
            tolerance: Latencies with a smaller relative difference count as the same.
        """
        out = []
        for i, axis in enumerate(self.space.axes):
            grid = np.array(axis.grid)
            vectors = np.tile(np.array(widths.vector), (len(grid), 1))
            vectors[:, i] = grid
            ms = self.predicted(vectors)
            here = axis.grid.index(widths.vector[i])
            flat = np.abs(ms / ms[here] - 1) <= tolerance
            down = here - int(np.argmin(np.append(flat[here::-1], False))) + 1
            up = here + int(np.argmin(np.append(flat[here:], False))) - 1
            out.append(
                Stair(
                    name=axis.name,
                    width=widths.vector[i],
                    ms=float(ms[here]),
                    less_ms=float(ms[here - 1]) if here else None,
                    more_ms=float(ms[here + 1]) if here + 1 < len(grid) else None,
                    flat_from=int(grid[down]),
                    flat_to=int(grid[up]),
                )
            )
        return tuple(out)

    @cached_property
    def errors(self) -> PredictionErrors:
        """Errors out of sample.

        Raises:
            StudyError: Fewer than three different networks were measured.
        """
        if self._stored_errors is not None:
            return self._stored_errors
        if self.networks < 3:
            raise StudyError(
                f"errors out of sample need 3 different networks, but {self.networks} were measured"
            )
        _, network = np.unique(self.vectors, axis=0, return_inverse=True)
        order = np.random.default_rng(0).permutation(self.networks)
        fold = (order % min(_FOLDS, self.networks))[network.reshape(-1)]
        predicted, linear, inside = np.empty((3, len(self.ms)))
        for out in range(fold.max() + 1):
            test, train = fold == out, fold != out
            part = (self.vectors[train], self.ms[train], self.sd[train])
            fits = _fit_all_blocks(self._layers, *part)
            model = LatencyPredictor(self.space, *part, self._layers, fits)
            mean, sd = model(self.vectors[test])
            predicted[test] = mean
            inside[test] = np.abs(mean - self.ms[test]) < _Z90 * np.hypot(sd, self.sd[test])
            linear[test] = line_of_macs(self.space, *part[:2])(self.vectors[test])
        return PredictionErrors(
            networks=self.networks,
            median=float(np.median(np.abs(predicted / self.ms - 1))),
            tau=float(kendalltau(predicted, self.ms).statistic),
            coverage=float(inside.mean()),
            median_macs=float(np.median(np.abs(linear / self.ms - 1))),
            tau_macs=float(kendalltau(self.space.macs(self.vectors), self.ms).statistic),
        )

    def _logs(self, vectors: NDArray[Any]) -> tuple[Array, Array, Array]:
        """Mean and variance of log ms of each fit, (fits, N), and the weights of the fits."""
        parts = [fit.log_ms(self._layers(vectors, fit.block)) for _, fit in self._fits]
        means, variances = (np.stack(part) for part in zip(*parts, strict=True))
        return means, variances, np.array([weight for weight, _ in self._fits])

    @classmethod
    def from_json(cls, space: SearchSpace, content: Mapping[str, Any]) -> LatencyPredictor:
        """A predictor of the measurements in a profile.

        Args:
            space: The space.
            content: The space's ``fingerprint``; ``vectors``, ``ms`` and ``sd`` of the measured
                networks; and ``errors``, the fields of :attr:`errors`, or None if unknown.

        Raises:
            StudyError: The measurements are of another space.
        """
        if content["fingerprint"] != space.fingerprint:
            raise StudyError(
                f"a latency profile must be of its space, but this one is not of {space.name!r}: "
                "measure a new one"
            )
        model = cls.fit(space, content["vectors"], content["ms"], content["sd"])
        known = content["errors"]
        return replace(model, _stored_errors=None if known is None else PredictionErrors(**known))


@dataclass(frozen=True, eq=False)
class _Fit:
    """The posterior for one block size: mean θ = (u_0, u_1, u_2, p, δ, ε) and covariance."""

    block: int
    sigma: float
    theta: Array
    covariance: Array
    evidence: float

    def log_ms(self, features: Features) -> tuple[Array, Array]:
        """Mean and variance of log ms, each (N,)."""
        value, jacobian = _evaluate(self.theta, features)
        spread = np.einsum("ij,jk,ik->i", jacobian, self.covariance, jacobian)
        return value, spread + self.sigma**2 * _TAIL / (_TAIL - 2)


def _evaluate(theta: Array, features: Features) -> tuple[Array, Array]:
    """log t, (N,), and its gradient, (N, parameters).

    The gradient with respect to the log of a part's time is the part's share of t.
    """
    macs, elements, off = features
    slower = math.exp(theta[3]) * off
    layers = macs.shape[1]
    compute = macs * np.exp(theta[1] + theta[4 : 4 + layers] + slower)
    traffic = elements * np.exp(theta[2] + theta[4 + layers :])
    constant = np.full((len(macs), 1), math.exp(theta[0]))
    total = constant[:, 0] + compute.sum(1) + traffic.sum(1)
    parts = [constant, compute.sum(1, keepdims=True), traffic.sum(1, keepdims=True)]
    parts += [(compute * slower).sum(1, keepdims=True), compute, traffic]
    return np.log(total), np.concatenate(parts, 1) / total[:, None]


def _fit(features: Features, y: Array, noise: Array, block: int) -> _Fit:
    """Maximise the posterior by damped Gauss-Newton, with σ_δ, σ and the weights by EM.

    Args:
        features: M, A and the number of incomplete widths, each (N, layers).
        y: Measured log times, (N,).
        noise: Their standard errors, (N,).
        block: The block size of the features.
    """
    layers = features[0].shape[1]
    delta, sigma = _DELTA, _SIGMA
    centre = np.zeros(4 + 2 * layers)
    # The start: each of the three parts takes a third of the base's time.
    parts = 1 + features[0].sum(1) + features[1].sum(1)
    centre[:3] = np.median(y - np.log(parts))
    centre[3] = _OFF
    theta = centre.copy()
    trust = np.ones(len(y))
    changed = math.inf

    def misfit(at: Array) -> float:
        prior = (((at - centre) / width) ** 2).sum()
        return float((weight * (y - _evaluate(at, features)[0]) ** 2).sum() + prior)

    for iteration in range(_ITERATIONS + 1):
        width = np.concatenate([[_U_SD] * 3, [_OFF_SD], np.full(2 * layers, delta)])
        weight = trust / (sigma**2 + noise**2)
        value, jacobian = _evaluate(theta, features)
        precision = (jacobian.T * weight) @ jacobian + np.diag(width**-2)
        covariance = np.linalg.inv(precision)
        move = covariance @ (jacobian.T @ (weight * (y - value)) - (theta - centre) / width**2)
        if iteration == _ITERATIONS or max(np.abs(move).max(), changed) < 1e-3:
            break
        move /= max(1.0, np.abs(move).max())
        error = misfit(theta)
        while misfit(theta + move) > error and np.abs(move).max() > 1e-3:
            move /= 2
        theta = theta + move
        if iteration < _SETTLE:  # the first misfits are not noise
            continue
        energy = float((theta[4:] ** 2 + np.diag(covariance)[4:]).sum())
        delta = _updated(energy, 2 * layers, _DELTA, _DELTA_WEIGHT)
        missed = (y - value) ** 2 + np.einsum("ij,jk,ik->i", jacobian, covariance, jacobian)
        trust = (_TAIL + 1) / (_TAIL + missed / (sigma**2 + noise**2))
        # The share of each misfit that is not the known noise of the measurement.
        own = sigma**2 / (sigma**2 + noise**2)
        energy = float((own**2 * trust * missed + own * noise**2).sum())
        before, sigma = sigma, _updated(energy, len(y), _SIGMA, _SIGMA_WEIGHT)
        changed = abs(math.log(sigma / before))
    scale = np.sqrt(sigma**2 + noise**2)
    evidence = float(
        -np.log(scale).sum()  # without constants that all block sizes share
        - (_TAIL + 1) / 2 * np.log1p(((y - value) / scale) ** 2 / _TAIL).sum()
        - 0.5 * (((theta - centre) / width) ** 2).sum()
        - np.log(width).sum()
        - 0.5 * np.linalg.slogdet(precision)[1]
    )
    for found, expected, w in ((delta, _DELTA, _DELTA_WEIGHT), (sigma, _SIGMA, _SIGMA_WEIGHT)):
        evidence -= w * (math.log(found) + 0.5 * (expected / found) ** 2)
    return _Fit(block, sigma, theta, np.asarray(covariance, np.float64), evidence)


def _updated(energy: float, count: int, expected: float, weight: float) -> float:
    """The posterior scale of ``count`` values with a sum of squares, under a prior scale."""
    return math.sqrt((weight * expected**2 + energy) / (weight + count))


def _fit_all_blocks(
    layers: BlockLayers, vectors: NDArray[np.int64], ms: Array, sd: Array
) -> tuple[tuple[float, _Fit], ...]:
    """The fits of all block sizes with their probabilities, without those below 1%."""
    fits = [_fit(layers(vectors, block), np.log(ms), sd / ms, block) for block in BLOCKS]
    evidence = np.array([fit.evidence for fit in fits])
    weight = np.exp(evidence - evidence.max())
    weight[weight < 0.01 * weight.sum()] = 0
    weight /= weight.sum()
    return tuple((float(w), fit) for w, fit in zip(weight, fits, strict=True) if w)


def line_of_macs(
    space: SearchSpace, vectors: ArrayLike, ms: ArrayLike
) -> Callable[[ArrayLike], Array]:
    """Fit ``a + b · MACs`` by least squares of relative errors: the baseline of any predictor."""

    def terms(widths: ArrayLike) -> Array:
        macs = space.macs(np.atleast_2d(np.asarray(widths))) / space.cost(space.base).macs
        return np.stack([np.ones(len(macs)), macs], 1)

    measured = np.asarray(ms, np.float64)
    rows = terms(vectors) / measured[:, None]
    line = np.linalg.lstsq(rows, np.ones_like(measured), rcond=None)[0]
    return lambda widths: terms(widths) @ line
