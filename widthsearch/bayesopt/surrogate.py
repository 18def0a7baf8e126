"""The surrogate: accuracy from widths, with what it does not know.

A Gaussian process over log widths. Its covariance is a sum of parts, each scaled by an amplitude
that is learned, so that a part which explains nothing vanishes:

- ``capacity``: smooth trends in the mean log width and in the log of each cost;
- ``linear``: a slope for each axis, together a trend that the data may tilt axis by axis;
- ``curved``: saturation and bends of each axis (three cosines, Hilbert-space approximation of a
  smooth kernel: Solin and Särkkä, Statistics and Computing 30, 2020);
- ``pairs``: products of two axes' trends (additive kernels of order two: Duvenaud et al., NeurIPS
  2011);
- ``whole``: all axes at once, so networks of like shape and size share what is their own;
- ``own``: where several spaces are learned from, each one's level and capacity trends;
- noise: what two trainings of the same widths differ by.

Networks of different spaces (depth × width) have the level and ``capacity`` in common, and every
amplitude; what is said of axes is each space's own. So a space with few outcomes takes its trend
from the others, and what it differs by is learned (a hierarchical model: Gelman et al., Bayesian
Data Analysis, 3rd ed., chapter 5).

Amplitudes and noise maximise the marginal likelihood times log-normal priors. All is closed form in
numpy; nothing is sampled, so the same outcomes give the same surrogate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtri

from widthsearch.widths import Axis

Array = NDArray[np.float64]
CostFunction = Callable[[NDArray[np.int64]], NDArray[np.number]]

_PRIOR = np.log([1.0, 0.5, 0.3, 0.15, 0.3, 0.3])
_PRIOR_NOISE = np.log(0.3)
"""Median amplitude of each part and of the noise, in standard deviations of what was seen."""
_PRIOR_SD = 1.2  # of their logarithms
_LENGTH = 0.7  # of `whole`, where two random networks are sqrt(2) apart
_APART = 10.0  # in the same unit: networks of two spaces
_LEVEL_VARIANCE = 25.0  # of the level that all networks share
_FITTED_ON = 256  # outcomes that amplitudes are learned from, at most
_JITTER = 1e-8


class Priced(Protocol):
    """What has axes and exact costs: a space, or what a storage keeps of one."""

    @property
    def axes(self) -> Sequence[Axis]:
        """The axes."""
        ...

    def macs(self, widths: NDArray[np.int64], /) -> NDArray[np.int64]:
        """MACs, (N, axes) to (N,)."""
        ...

    def params(self, widths: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Parameters, (N, axes) to (N,)."""
        ...


class Family(Protocol):
    """A curve of widths, such as :class:`~widthsearch.proposers.families.LinearFamily`."""

    @property
    def members(self) -> NDArray[np.int64]:
        """Every member, (N, axes), in channels."""
        ...


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is believed of some networks.

    Attributes:
        mean: Expected accuracy over seeds, (N,), in the unit that was given.
        sd: Standard deviation of that belief, (N,), without the noise of a training.
    """

    mean: Array
    sd: Array


@dataclass(frozen=True)
class Training:
    """What is known of one training.

    Attributes:
        widths: In channels, one of each axis.
        accuracy: The final one; None where the training did not come to its end, and its curve
            must stand for it (where that is too short, it is left out).
        curve: Accuracy after each epoch; empty where it is not known.
    """

    widths: tuple[int, ...]
    accuracy: float | None
    curve: Sequence[float] = ()

    def guess(self, finished: Sequence[Sequence[float]]) -> tuple[float, float] | None:
        """The final accuracy and the variance of what it stands for: see :func:`extrapolated`."""
        if self.accuracy is not None:
            return self.accuracy, 0.0
        return extrapolated(self.curve, finished)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The widths of a space as the surrogate sees them.

    Attributes:
        axes: The axes.
        costs: Exact costs by name: integers (N, axes) to (N,).
        spaces: The coordinates of all spaces that one surrogate learns from, in one order for all:
            see :meth:`together`; empty where it is this one alone.
        place: Which of them this is.
    """

    axes: Sequence[Axis]
    costs: Mapping[str, CostFunction]
    spaces: Sequence[Coordinates] = ()
    place: int = 0

    @classmethod
    def of(cls, space: Priced) -> Coordinates:
        """Those of a space, with its MACs and parameters."""
        return cls(space.axes, {"macs": space.macs, "params": space.params})

    @staticmethod
    def together(spaces: Sequence[Coordinates]) -> list[Coordinates]:
        """Those of several spaces, with the same costs by name, for one surrogate of all."""
        if len(spaces) == 1:
            return list(spaces)
        return [replace(own, spaces=spaces, place=i) for i, own in enumerate(spaces)]

    @cached_property
    def _least(self) -> Array:
        return np.log([axis.min_width for axis in self.axes])

    @cached_property
    def _span(self) -> Array:
        span = np.log([axis.max_width for axis in self.axes]) - self._least
        return np.where(span > 0, span, 1.0)

    @cached_property
    def _own_range(self) -> dict[str, tuple[float, float]]:
        corners = np.array([[a.min_width for a in self.axes], [a.max_width for a in self.axes]])
        return {
            name: (float(np.log(low)), float(np.log(high)))
            for name, cost in self.costs.items()
            for low, high in [cost(corners)]
        }

    @cached_property
    def cost_range(self) -> dict[str, tuple[float, float]]:
        """Log of each cost at the narrowest and at the widest network, of all spaces."""
        ranges = [space._own_range for space in self.spaces or (self,)]
        return {
            name: (min(r[name][0] for r in ranges), max(r[name][1] for r in ranges))
            for name in self.costs
        }

    def sizes(self, widths: ArrayLike) -> Array:
        """Mean log width, and log costs as shares of all spaces' range, (N, 1 + costs)."""
        sizes = [self.units(widths).mean(axis=1)]
        for name, (low, high) in self.cost_range.items():
            sizes.append((self.log_cost(name, widths) - low) / max(high - low, 1e-9))
        return np.stack(sizes, axis=1)

    def placed(self, features: Array) -> Array:
        """Features of each axis, (N, k · axes), with zeros for the axes of the other spaces."""
        each = features.shape[1] // len(self.axes)
        before, after = (
            each * sum(len(space.axes) for space in spaces)
            for spaces in (self.spaces[: self.place], self.spaces[self.place + 1 :])
        )
        return np.pad(features, ((0, 0), (before, after)))

    def units(self, widths: ArrayLike) -> Array:
        """Log widths, 0 at each axis's least and 1 at its most, (N, axes)."""
        units: Array = (np.log(np.asarray(widths, np.float64)) - self._least) / self._span
        return units

    def log_cost(self, name: str, widths: ArrayLike) -> Array:
        """Log of a cost, (N,)."""
        logs: Array = np.log(self.costs[name](np.asarray(widths, np.int64)))
        return logs


@dataclass(frozen=True, eq=False)
class Features:
    """Networks as the parts of the covariance see them: about unit variance on random widths.

    Attributes:
        capacity: Trends in mean log width and log costs, (N, features).
        linear: Log widths, centred, (N, axes).
        curved: Cosines of log widths, (N, features).
        units: Log widths, scaled for the distance of two networks, (N, axes).
        own: A constant and trends in capacity of each space, (N, features); none of a single one.
    """

    capacity: Array
    linear: Array
    curved: Array
    units: Array
    own: Array

    @classmethod
    def of(cls, coordinates: Coordinates, widths: ArrayLike) -> Features:
        """Those of some widths, (N, axes)."""
        u = coordinates.units(widths)
        axes = u.shape[1]
        t = coordinates.sizes(widths)
        trend = np.concatenate([np.sqrt(12) * (t - 0.5), _cosines(t, (2, 3))], axis=1)
        trend /= np.sqrt(t.shape[1])
        units = coordinates.placed(np.sqrt(6 / axes) * u)
        own = np.empty((len(u), 0))
        if coordinates.spaces:
            which = np.eye(len(coordinates.spaces))[[coordinates.place] * len(u)]
            units = np.concatenate([units, _APART / np.sqrt(2) * which], axis=1)
            level_and_trend = np.concatenate([np.ones((len(u), 1)), trend], axis=1)
            own = np.einsum("ns,nf->nsf", which, level_and_trend).reshape(len(u), -1)
        return cls(
            capacity=trend,
            linear=coordinates.placed(np.sqrt(12 / axes) * (u - 0.5)),
            curved=coordinates.placed(np.sqrt(1.85 / axes) * _cosines(u, (1, 2, 3))),
            units=units,
            own=own,
        )

    def covariances(self, other: Features) -> list[Array]:
        """Each part of the covariance at amplitude 1, (N, M)."""
        linear = self.linear @ other.linear.T
        pairs = linear**2 - (self.linear**2) @ (other.linear**2).T
        apart = -2 * self.units @ other.units.T
        apart += (self.units**2).sum(axis=1)[:, None] + (other.units**2).sum(axis=1)
        whole = np.exp(-0.5 * np.maximum(apart, 0) / _LENGTH**2)
        capacity, curved = self.capacity @ other.capacity.T, self.curved @ other.curved.T
        parts = [capacity, linear, curved, 0.7 * pairs, whole]
        return [*parts, self.own @ other.own.T] if self.own.size else parts

    def variances(self) -> list[Array]:
        """The diagonals of :meth:`covariances` with itself, (N,)."""
        squares = self.linear**2
        linear = squares.sum(axis=1)
        pairs = linear**2 - (squares**2).sum(axis=1)
        capacity, curved = (self.capacity**2).sum(axis=1), (self.curved**2).sum(axis=1)
        parts = [capacity, linear, curved, 0.7 * pairs, np.ones(len(linear))]
        return [*parts, (self.own**2).sum(axis=1)] if self.own.size else parts

    def rows(self, index: NDArray[np.intp]) -> Features:
        """Some of the networks."""
        return Features(*(getattr(self, field.name)[index] for field in fields(self)))

    def and_(self, other: Features) -> Features:
        """These networks and others."""
        names = [field.name for field in fields(self)]
        return Features(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))


def _cosines(x: Array, orders: Sequence[int]) -> Array:
    return np.concatenate([np.cos(np.pi * k * x) / k**2 for k in orders], axis=1)


def _blend(scales: Array, parts: Sequence[Array]) -> Array:
    out = np.full(parts[0].shape, _LEVEL_VARIANCE)
    for scale, part in zip(scales, parts, strict=True):
        out += scale**2 * part
    return out


def _learn(parts: Sequence[Array], y: Array, extra: Array) -> Array:
    """The amplitude of each part and of the noise that are most probable given y, (parts + 1,)."""
    eye = np.eye(len(y))
    prior = np.append(_PRIOR[: len(parts)], _PRIOR_NOISE)

    def loss(logs: Array) -> tuple[float, Array]:
        scales = np.exp(logs)
        covariance = _blend(scales[:-1], parts)
        covariance[np.diag_indices(len(y))] += scales[-1] ** 2 + extra + _JITTER
        lower = cholesky(covariance, lower=True, check_finite=False)
        half = solve_triangular(lower, eye, lower=True, check_finite=False)
        inverse = half.T @ half
        weights = inverse @ y
        off = (logs - prior) / _PRIOR_SD
        q = np.outer(weights, weights) - inverse
        slopes = [np.vdot(q, part) for part in parts] + [np.trace(q)]
        value = 0.5 * y @ weights + np.log(np.diag(lower)).sum() + 0.5 * off @ off
        return float(value), off / _PRIOR_SD - scales**2 * np.array(slopes)

    bounds = [(-6.0, 3.0)] * len(parts) + [(-5.0, 1.0)]
    found = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds)
    scales: Array = np.exp(found.x)
    return scales


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Accuracy from widths, as it is believed after some outcomes. Made by :meth:`fit`.

    Attributes:
        coordinates: How widths are seen.
        noise: Standard deviation of one training's accuracy around its widths' mean.
        amplitudes: Of each part and of the noise, in standard deviations of what was seen.
    """

    coordinates: Coordinates
    noise: float
    amplitudes: Array
    _level: float
    _unit: float
    _seen: Features
    _y: Array
    _lower: Array

    @classmethod
    def fit(
        cls,
        coordinates: Coordinates,
        widths: ArrayLike,
        accuracy: ArrayLike,
        variance: ArrayLike | float = 0.0,
    ) -> Surrogate:
        """The surrogate after some outcomes.

        Args:
            coordinates: The axes and costs.
            widths: (N, axes), in channels, N ≥ 1; the same widths may come more than once.
            accuracy: (N,), in any unit.
            variance: Of each accuracy beyond that of a finished training, (N,): see
                :func:`extrapolated`.
        """
        return cls._learned(coordinates, Features.of(coordinates, widths), accuracy, variance)

    @classmethod
    def _learned(
        cls,
        coordinates: Coordinates,
        seen: Features,
        accuracy: ArrayLike,
        variance: ArrayLike | float,
    ) -> Surrogate:
        a = np.asarray(accuracy, np.float64)
        level, unit = float(a.mean()), float(a.std()) or 1.0
        y = (a - level) / unit
        extra = np.broadcast_to(np.asarray(variance, np.float64) / unit**2, a.shape)
        some = np.unique(np.linspace(0, len(y) - 1, min(len(y), _FITTED_ON)).astype(np.intp))
        part = seen.rows(some)
        scales = _learn(part.covariances(part), y[some], extra[some])
        lower = factor(scales, seen, extra)
        noise = float(scales[-1]) * unit
        return cls(coordinates, noise, scales, level, unit, seen, y, lower)

    @classmethod
    def of_trainings(cls, *spaces: tuple[Coordinates, Sequence[Training]]) -> Surrogate:
        """The surrogate after trainings of which some were stopped or still go on.

        Args:
            spaces: The trainings of each space; of several, with coordinates made
                :meth:`~Coordinates.together`. It sees widths as of the first: see :meth:`of_space`.

        Raises:
            ValueError: None came to its end.
        """
        every = [training for _, own in spaces for training in own]
        finished = [t.curve for t in every if t.curve and t.accuracy is not None]
        if all(training.accuracy is None for training in every):
            raise ValueError("a surrogate must have a finished trial to learn from, but has none")
        seen, finals = [], []
        for coordinates, own in spaces:
            guesses = [(training.widths, training.guess(finished)) for training in own]
            known = [(widths, guess) for widths, guess in guesses if guess is not None]
            if known:
                seen.append(Features.of(coordinates, [widths for widths, _ in known]))
                finals += [guess for _, guess in known]
        accuracy, variance = np.array(finals).T
        return cls._learned(spaces[0][0], reduce(Features.and_, seen), accuracy, variance)

    def of_space(self, coordinates: Coordinates) -> Surrogate:
        """The same, seeing the widths of another of the spaces that it learned from."""
        return replace(self, coordinates=coordinates)

    @property
    def size(self) -> int:
        """How many trainings it has learned from."""
        return len(self._y)

    def condition_on(self, widths: ArrayLike | Features) -> Surrogate:
        """This surrogate once networks are trained, (N, axes), if each comes out as believed.

        Means stay; what is uncertain near those networks is less so (Kriging believer: Ginsbourger,
        Le Riche and Carraro, 2010).
        """
        new = self._features(widths)
        across = _blend(self.amplitudes[:-1], self._seen.covariances(new))
        corner = _blend(self.amplitudes[:-1], new.covariances(new))
        corner[np.diag_indices(len(corner))] += self.amplitudes[-1] ** 2 + _JITTER
        side = solve_triangular(self._lower, across, lower=True, check_finite=False)
        lower = np.block(
            [
                [self._lower, np.zeros_like(across)],
                [side.T, np.linalg.cholesky(corner - side.T @ side)],
            ]
        )
        y = np.concatenate([self._y, across.T @ self._weights])
        return replace(self, _seen=self._seen.and_(new), _y=y, _lower=lower)

    def _features(self, widths: ArrayLike | Features) -> Features:
        return widths if isinstance(widths, Features) else Features.of(self.coordinates, widths)

    @cached_property
    def _weights(self) -> Array:
        weights: Array = cho_solve((self._lower, True), self._y, check_finite=False)
        return weights

    def posterior(self, widths: ArrayLike | Features) -> Prediction:
        """What is believed of networks, trained or not, (N, axes)."""
        at = self._features(widths)
        across = _blend(self.amplitudes[:-1], at.covariances(self._seen))
        half = solve_triangular(self._lower, across.T, lower=True, check_finite=False)
        variance = _blend(self.amplitudes[:-1], at.variances()) - (half**2).sum(axis=0)
        sd = np.sqrt(np.maximum(variance, 1e-12)) * self._unit
        return Prediction(across @ self._weights * self._unit + self._level, sd)

    def joint(self, widths: ArrayLike | Features) -> tuple[Array, Array]:
        """Mean and covariance of the expected accuracies of networks, (N,) and (N, N)."""
        at = self._features(widths)
        across = _blend(self.amplitudes[:-1], at.covariances(self._seen))
        half = solve_triangular(self._lower, across.T, lower=True, check_finite=False)
        own = _blend(self.amplitudes[:-1], at.covariances(at)) - half.T @ half
        return across @ self._weights * self._unit + self._level, own * self._unit**2

    def along(self, family: Family) -> Prediction:
        """What is believed of each member of a family, narrowest first."""
        return self.posterior(family.members)

    def loo_posterior(self) -> Prediction:
        """What is believed of each outcome's accuracy when it is left out, noise included.

        Closed form (Rasmussen and Williams, Gaussian Processes, 2006, equation 5.12), with
        amplitudes and noise as they were learned from all.
        """
        inverse = cho_solve((self._lower, True), np.eye(len(self._y)), check_finite=False)
        variance = 1 / np.diag(inverse)
        mean = (self._y - self._weights * variance) * self._unit + self._level
        return Prediction(mean, np.sqrt(variance) * self._unit)

    def coverage(self, level: float = 0.9) -> float:
        """The share of outcomes inside their central interval of probability ``level``, left out.

        Calibrated intervals give about ``level``.
        """
        left = self.loo_posterior()
        seen = self._y * self._unit + self._level
        return float((np.abs(seen - left.mean) <= ndtri(0.5 + level / 2) * left.sd).mean())


def factor(scales: Array, seen: Features, extra: Array) -> Array:
    """The Cholesky factor of the covariance of what was seen, (N, N)."""
    covariance = _blend(scales[:-1], seen.covariances(seen))
    covariance[np.diag_indices(len(covariance))] += scales[-1] ** 2 + extra + _JITTER
    lower: Array = cholesky(covariance, lower=True, check_finite=False)
    return lower


def extrapolated(
    curve: Sequence[float], finished: Sequence[Sequence[float]]
) -> tuple[float, float] | None:
    """The final accuracy of a training from its first epochs, and the variance of that guess.

    Final accuracy is regressed on the accuracy after as many epochs in the trainings that were
    finished; the slope is drawn to 1 (a constant gap). A trial that a rung stopped did worse than
    those: the variance grows with the distance.

    Args:
        curve: The accuracy after each epoch that was trained.
        finished: The same of finished trainings.

    Returns:
        Mean and variance; None with fewer than three finished trainings to learn from.
    """
    epochs = len(curve)
    pairs = np.array([(c[epochs - 1], c[-1]) for c in finished if len(c) >= epochs > 0])
    if len(pairs) < 3:
        return None
    early, final = pairs.T
    centred = early - early.mean()
    gap = final - early
    total = float(centred @ centred)
    ridge = 4 * float(gap.var())  # prior of the slope: 1 ± 0.5, in units of the gap's spread
    slope = 1 + float(centred @ gap) / (total + ridge) if total + ridge > 0 else 1.0
    residual = final - final.mean() - slope * centred
    spread = float(residual @ residual) / (len(pairs) - 2)
    away = curve[-1] - float(early.mean())
    mean = float(final.mean()) + slope * away
    leverage = 1 / len(pairs) + (away**2 / (total + ridge) if total + ridge > 0 else 0.0)
    return mean, spread * (1 + leverage)
