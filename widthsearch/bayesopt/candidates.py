"""Candidates: networks of a space as arrays, at random and made from others; all on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthsearch.widths import Axis

Batch = NDArray[np.int64]
"""Width vectors, (N, axes), in channels."""


class Grid:
    """All width vectors of some axes.

    Attributes:
        axes: The axes.
        min_width: The narrowest network, (axes,).
        max_width: The widest network, (axes,).
        step: Each axis's step, (axes,).

    Example:
        >>> grid = Grid([Axis("conv1", 8, 4, 16, step=4), Axis("conv2", 4, 2, 6, step=2)])
        >>> grid.size
        12
        >>> grid.nearest(np.array([[7.0, 100.0]])).tolist()
        [[8, 6]]
        >>> grid.families(np.array([[8, 4]]), 3).tolist()  # multiples of one network
        [[4, 2], [8, 4], [16, 6]]
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = axes
        rows = np.array([(axis.min_width, axis.max_width, axis.step) for axis in axes])
        self.min_width, self.max_width, self.step = rows.T

    @property
    def size(self) -> int:
        """The number of width vectors."""
        return math.prod(len(axis.grid) for axis in self.axes)

    def whole(self) -> Batch:
        """Every width vector, (size, axes)."""
        levels = np.meshgrid(*[np.array(axis.grid) for axis in self.axes], indexing="ij")
        return np.stack([level.reshape(-1) for level in levels], axis=1)

    def nearest(self, widths: NDArray[Any]) -> Batch:
        """The width vectors on the grid nearest to real numbers, (N, axes)."""
        steps = np.floor((widths - self.min_width) / self.step + 0.5).astype(np.int64)
        return self._inside(steps * self.step + self.min_width)

    def random(self, rng: np.random.Generator, count: int) -> Batch:
        """Networks of all sizes and shapes, (count, axes).

        Half are uniform in channels, and mostly wide. Half lie around a point between narrowest and
        widest that is uniform in log widths: they cover all sizes.
        """
        span = np.log(self.max_width / self.min_width)
        size = rng.random((count, 1))
        around = size + rng.normal(0, 0.25, (count, len(self.axes)))
        scaled = self.min_width * np.exp(np.clip(around, 0, 1) * span)
        uniform = self.min_width + rng.random(scaled.shape) * (self.max_width - self.min_width)
        return self.nearest(np.where(rng.random((count, 1)) < 0.5, uniform, scaled))

    def families(self, profiles: Batch, count: int) -> Batch:
        """``count`` multiples of each profile: from all axes at min_width to all at max_width."""
        low, high = (self.min_width / profiles).min(), (self.max_width / profiles).max()
        multipliers = np.geomspace(low, high, count)
        scaled = multipliers[:, None, None] * profiles
        return self.nearest(scaled.reshape(-1, len(self.axes)))

    def mixtures(self, rng: np.random.Generator, parents: Batch, count: int) -> Batch:
        """Networks between two parents and a little beyond, on a line in log widths."""
        first, second = np.log(self._pairs(rng, parents, count))
        share = rng.uniform(-0.25, 1.25, (count, 1))
        return self.nearest(np.exp(first + share * (second - first)))

    def crossings(self, rng: np.random.Generator, parents: Batch, count: int) -> Batch:
        """Each axis from one of two parents."""
        first, second = self._pairs(rng, parents, count)
        crossed: Batch = np.where(rng.random(first.shape) < rng.random((count, 1)), first, second)
        return crossed

    def mutations(self, rng: np.random.Generator, parents: Batch, count: int) -> Batch:
        """Parents with one to three axes moved, each by a step or to anywhere."""
        child = parents[rng.integers(len(parents), size=count)].copy()
        for moves in range(3):
            moved = np.flatnonzero(rng.random(count) < 1 / (1 + moves))
            axis = rng.integers(len(self.axes), size=len(moved))
            near = child[moved, axis] + rng.choice((-1, 1), len(moved)) * self.step[axis]
            levels = (self.max_width - self.min_width)[axis] // self.step[axis] + 1
            far = self.min_width[axis] + rng.integers(levels) * self.step[axis]
            child[moved, axis] = np.where(rng.random(len(moved)) < 0.5, near, far)
        return self._inside(child)

    def neighbours(self, parents: Batch) -> Batch:
        """Parents with one axis moved by one step, up and down."""
        moves = np.concatenate([np.diag(self.step), -np.diag(self.step)])
        moved = parents[:, None] + moves
        return self._inside(moved.reshape(-1, len(self.axes)))

    def _pairs(self, rng: np.random.Generator, parents: Batch, count: int) -> Batch:
        pairs: Batch = parents[rng.integers(len(parents), size=(2, count))]
        return pairs

    def _inside(self, widths: Batch) -> Batch:
        inside: Batch = np.clip(widths, self.min_width, self.max_width)
        return inside
