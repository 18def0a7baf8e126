"""The surrogate's covariance: widths as coordinates, and the parts that are summed.

Notation::

    N, M      networks
    A, C      axes of a space, its exact costs (MACs, parameters)
    w         widths in channels                                            (N, A)
    u         log w scaled to [0, 1] on each axis: 0 at its min_width       (N, A)
    t         capacity: the mean of u, and log of each cost scaled to [0,1] (N, 1 + C)
    e         unevenness: the standard deviation of u over a network's axes (N,)
    b         relevance of an axis, which its features below are multiplied with (A,)
    φ_p(w)    features of part p of the covariance                          (N, F_p)
    k_p       covariance of part p at amplitude 1                           (N, M)
    θ_p       amplitude of part p, in standard deviations of the scores
    σ₀²       variance of the level that all networks share

    k(w, w') = σ₀² + Σ_p θ_p² k_p(w, w')

Each part has about unit variance on random widths, so amplitudes compare with one another, and one
that is learned to be 0 removes its part:

- ``capacity``: smooth trends in t, and a slope in e. The metric depends on size above all; and a
  layer that is much narrower than the others is a bottleneck, whichever it is.
- ``linear``: a slope for each axis; with ``capacity``, a trend that is tilted axis by axis.
- ``curved``: saturation and bends of each axis (three cosines: a reduced-rank approximation of a
  smooth kernel, Solin and Särkkä, Statistics and Computing 30, 2020).
- ``pairs``: products of two axes' slopes (additive kernels of order two: Duvenaud et al., NeurIPS
  2011).
- ``whole``: a squared exponential over all axes: networks of like widths deviate alike from the
  trends.
- ``own``: with several spaces, a level and capacity trends of each.

An axis's relevance is that of its slope, bends, products and distances alike, so that few trainings
tell which axes matter (automatic relevance determination: Neal, Bayesian Learning for Neural
Networks, 1996; here with a prior around 1).

Several spaces (depth × width) share σ₀, ``capacity`` and every amplitude, while each axis keeps
its own relevance; the other parts are zero
between networks of different spaces. A space with few trials thus takes its trend from the others,
and its difference from them is learned (a hierarchical model: Gelman et al., Bayesian Data
Analysis, 3rd ed., chapter 5).

Example, one axis of 8 to 32 channels whose MACs are proportional to its width:

    >>> axis = Axis("conv1", base=16, min_width=8, max_width=32, step=8)
    >>> space = Coordinates([axis], {"macs": lambda widths: 1000 * widths[:, 0]})
    >>> space.unit_widths([[8], [16], [32]]).ravel().tolist()  # u: half way in logarithms
    [0.0, 0.5, 1.0]
    >>> networks = Features.of(space, [[8], [16], [32]])
    >>> networks.linear.ravel().round(2).tolist()  # √12 (u − ½): variance 1 for uniform u
    [-1.73, 0.0, 1.73]
    >>> _, linear, *_ = networks.covariances(networks)
    >>> linear.round(1).tolist()  # a slope: the ends vary against one another
    [[3.0, 0.0, -3.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 3.0]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from widthsearch.bayesopt.metric import EXACT_COSTS
from widthsearch.widths import Axis

Array = NDArray[np.float64]
CostFunction = Callable[[NDArray[np.int64]], NDArray[np.number]]
"""An exact cost: integers (N, A), in channels, to (N,)."""

_LENGTH_SCALE = 0.7
"""Of ``whole``, in a distance in which two networks of uniformly random u are about 1 apart."""
_PAIRS = 0.7
"""Of the products of two axes, which makes their variance about 1."""
_DISTANCE_OF_SPACES = 10.0
"""In the same distance: networks of two spaces; exp(−½ (10 / 0.7)²) is 0."""
LEVEL_VARIANCE = 25.0
"""σ₀², in variances of the scores: wide, since the level is the scores' own."""


class CostedSpace(Protocol):
    """Axes and exact costs: a search space, or a storage's record of one."""

    @property
    def axes(self) -> Sequence[Axis]:
        """The axes."""

    def macs(self, widths: NDArray[np.int64], /) -> NDArray[np.int64]:
        """MACs, (N, A) to (N,)."""

    def params(self, widths: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Parameters, (N, A) to (N,)."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The widths of a space, as the surrogate sees them.

    Attributes:
        axes: The axes.
        costs: Exact costs by name, which are features of a network.
        spaces: The coordinates of all spaces that one surrogate covers, in the same order for each
            of them; empty for a single space.
        place: The index of this space among them.
        others: Further exact costs by name, which are no features.
    """

    axes: Sequence[Axis]
    costs: Mapping[str, CostFunction]
    spaces: Sequence[Coordinates] = ()
    place: int = 0
    others: Mapping[str, CostFunction] = field(default_factory=dict)

    @classmethod
    def of(cls, space: CostedSpace, names: Iterable[str] = ()) -> Coordinates:
        """The coordinates of a space, with its MACs and parameters, and other costs by name."""
        others = {name: getattr(space, name) for name in names if name in EXACT_COSTS[2:]}
        return cls(space.axes, {"macs": space.macs, "params": space.params}, others=others)

    @cached_property
    def exact(self) -> dict[str, CostFunction]:
        """All exact costs by name."""
        return {**self.costs, **self.others}

    @staticmethod
    def together(spaces: Sequence[Coordinates]) -> list[Coordinates]:
        """The coordinates of several spaces, with the same costs by name, for one surrogate."""
        if len(spaces) == 1:
            return list(spaces)
        return [replace(own, spaces=spaces, place=i) for i, own in enumerate(spaces)]

    @cached_property
    def _log_min(self) -> Array:
        return np.log([axis.min_width for axis in self.axes])

    @cached_property
    def _log_span(self) -> Array:
        span = np.log([axis.max_width for axis in self.axes]) - self._log_min
        return np.where(span > 0, span, 1.0)  # an axis of one width is at u = 0

    @cached_property
    def cost_range(self) -> dict[str, tuple[float, float]]:
        """Log of each cost at the narrowest and at the widest network, over all spaces.

        Common to the spaces, so that equal costs are equal capacities in each of them.
        """
        ends: dict[str, list[Array]] = {name: [] for name in self.costs}
        for space in self.spaces or (self,):
            corners = np.array([(axis.min_width, axis.max_width) for axis in space.axes]).T
            for name, logs in ends.items():
                logs.append(space.log_cost(name, corners))
        return {name: (float(np.min(logs)), float(np.max(logs))) for name, logs in ends.items()}

    def unit_widths(self, widths: ArrayLike) -> Array:
        """u: log widths, 0 at each axis's min_width and 1 at its max_width, (N, A)."""
        u: Array = (np.log(np.asarray(widths, np.float64)) - self._log_min) / self._log_span
        return u

    def log_cost(self, name: str, widths: ArrayLike) -> Array:
        """Log of a cost, (N,)."""
        logs: Array = np.log(self.exact[name](np.asarray(widths, np.int64)))
        return logs

    def capacity(self, widths: ArrayLike) -> Array:
        """t: the mean of u, and log costs as shares of their range, (N, 1 + C)."""
        columns = [self.unit_widths(widths).mean(axis=1)]
        for name, (low, high) in self.cost_range.items():
            columns.append((self.log_cost(name, widths) - low) / max(high - low, 1e-9))
        return np.stack(columns, axis=1)

    def embed(self, features: Array) -> Array:
        """Features of this space's axes, (N, A), among zeros for the axes of the other spaces.

        Scalar products between networks of different spaces then vanish.
        """
        axes = [len(space.axes) for space in self.spaces]
        before, after = sum(axes[: self.place]), sum(axes[self.place + 1 :])
        return np.pad(features, ((0, 0), (before, after)))


@dataclass(frozen=True, eq=False)
class Features:
    """Networks as the parts of the covariance see them; of one space, or of several.

    Attributes:
        capacity: Trends in t and e, (N, F).
        linear: Centred u, (N, axes of all spaces).
        curved: Cosines of u, (N, 3 × axes of all spaces): all axes of one order, then of the next.
        position: u, and then the space, scaled for the distance of two networks, (N, F).
        own: A constant and capacity trends of each space, (N, F); no columns for a single space.
    """

    capacity: Array
    linear: Array
    curved: Array
    position: Array
    own: Array

    @classmethod
    def of(cls, coordinates: Coordinates, widths: ArrayLike) -> Features:
        """The features of networks of one space, widths (N, A) in channels."""
        u, t = coordinates.unit_widths(widths), coordinates.capacity(widths)
        axes = u.shape[1]
        # A uniform u has variance 1/12, and √12 (u − ½) variance 1; the sum over axes or columns is
        # divided by their number. Cosines of t begin at order 2: order 1 is nearly the line itself.
        # e is 1/√12 for uniform u, and at most ½: from even to uneven the column moves by 2.
        uneven = 4 * (u.std(axis=1, keepdims=True) - np.sqrt(1 / 12))
        trend = np.concatenate([np.sqrt(12) * (t - 0.5), _cosines(t, (2, 3)), uneven], axis=1)
        trend /= np.sqrt(t.shape[1])
        # Two uniform u differ by 1/6 in mean square: over all axes, a squared distance of 1.
        position = coordinates.embed(np.sqrt(6 / axes) * u)
        own = np.empty((len(u), 0))
        if coordinates.spaces:
            which = np.eye(len(coordinates.spaces))[[coordinates.place] * len(u)]
            # Networks of two spaces differ in two columns, each by the distance over √2.
            position = np.concatenate([position, _DISTANCE_OF_SPACES / np.sqrt(2) * which], axis=1)
            level_and_trend = np.concatenate([np.ones((len(u), 1)), trend], axis=1)
            own = np.einsum("ns,nf->nsf", which, level_and_trend).reshape(len(u), -1)
        return cls(
            capacity=trend,
            linear=coordinates.embed(np.sqrt(12 / axes) * (u - 0.5)),
            # Squares of the cosines average ½ (1 + 1/2⁴ + 1/3⁴) = 1 / 1.86.
            curved=np.sqrt(1.85 / axes)
            * np.concatenate([coordinates.embed(_cosines(u, (k,))) for k in (1, 2, 3)], axis=1),
            position=position,
            own=own,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Features]) -> Features:
        """The networks of all parts, in their order; their coordinates are made together."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def rows(self, index: NDArray[np.intp]) -> Features:
        """Some of the networks."""
        return Features(*(getattr(self, field.name)[index] for field in fields(self)))

    def weighted(self, relevances: Array) -> Features:
        """The same, with the features of each axis times its relevance, (axes of all spaces,)."""
        axes = len(relevances)
        position = self.position.copy()  # its last columns tell spaces apart
        position[:, :axes] *= relevances
        curved = self.curved * np.tile(relevances, self.curved.shape[1] // axes)
        return replace(self, linear=self.linear * relevances, curved=curved, position=position)

    def relevance_gradient(
        self, by_covariance: Array, amplitudes: Array, parts: Sequence[Array]
    ) -> Array:
        """The gradient by log b of a function of the covariance of these networks with themselves.

        Args:
            by_covariance: Its gradient by each of their covariances, symmetric, (N, N).
            amplitudes: θ of each part.
            parts: k_p, as :meth:`covariances` gives them, of features that are
                :meth:`weighted` by b already.
        """

        def sums(features: Array, by: Array) -> Array:
            """Σ_ij by_ij f_ia f_ja for each column a."""
            out: Array = (features * (by @ features)).sum(axis=0)
            return out

        axes = self.linear.shape[1]
        _, _, _, _, whole, *_ = parts
        slope, bend, pair, alike = amplitudes[1:5] ** 2
        slopes = sums(self.linear, by_covariance)
        bends = sums(self.curved, by_covariance).reshape(-1, axes).sum(axis=0)
        # Of 0.7 ((Σ l l')² − Σ l² l'²), where l has one factor b.
        products = sums(self.linear, by_covariance * parts[1])
        pairs = 2 * _PAIRS * (products - sums(self.linear**2, by_covariance))
        # Σ by (p_i − p_j)² = 2 Σ by p_i² − 2 Σ by p_i p_j
        by_distance, place = by_covariance * whole, self.position[:, :axes]
        apart = by_distance.sum(axis=1) @ place**2 - sums(place, by_distance)
        half = slope * slopes + bend * bends + pair * pairs - alike / _LENGTH_SCALE**2 * apart
        out: Array = 2 * half
        return out

    def covariances(self, other: Features) -> list[Array]:
        """k_p for each part, (N, M)."""
        distance = -2 * self.position @ other.position.T
        distance += (self.position**2).sum(axis=1)[:, None] + (other.position**2).sum(axis=1)
        whole = np.exp(-0.5 * np.maximum(distance, 0) / _LENGTH_SCALE**2)  # rounding goes below 0
        return self._parts(other, whole, lambda a, b: a @ b.T)

    def variances(self) -> list[Array]:
        """The diagonals of :meth:`covariances` with itself, (N,)."""
        return self._parts(self, np.ones(len(self.linear)), lambda a, b: (a * b).sum(axis=1))

    def _parts(
        self, other: Features, whole: Array, product: Callable[[Array, Array], Array]
    ) -> list[Array]:
        linear = product(self.linear, other.linear)
        # Twice the sum over pairs of axes: all products less those of an axis with itself.
        pairs = linear**2 - product(self.linear**2, other.linear**2)
        capacity = product(self.capacity, other.capacity)
        curved = product(self.curved, other.curved)
        parts = [capacity, linear, curved, _PAIRS * pairs, whole]
        return [*parts, product(self.own, other.own)] if self.own.size else parts


def weighted_sum(amplitudes: Array, parts: Sequence[Array]) -> Array:
    """σ₀² + Σ θ_p² k_p, of the shape of the parts."""
    out = np.full(parts[0].shape, LEVEL_VARIANCE)
    for amplitude, part in zip(amplitudes, parts, strict=True):
        out += amplitude**2 * part
    return out


def _cosines(x: Array, orders: Sequence[int]) -> Array:
    """cos(π k x) / k²: the higher the order, the less weight, so that functions are smooth."""
    return np.concatenate([np.cos(np.pi * k * x) / k**2 for k in orders], axis=1)
