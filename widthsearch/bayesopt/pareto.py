"""The geometry of Pareto fronts: dominance, ranks, hypervolume, knee, rungs.

The geometry works on an array of points (N, M) where **every column is to be minimised** (so
accuracy goes in negated), without NaN. A point dominates another when it is no worse in every
column and better in one; equal points do not dominate each other, so duplicates live and die
together. All results depend on the set of points only, never on their order.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


class _Cover(Protocol):
    """Points that were added in lexicographic order, asked whether they dominate the next."""

    def covers(self, point: tuple[float, ...]) -> bool: ...

    def add(self, point: tuple[float, ...]) -> None: ...


class _Staircase:
    """The front of a growing set of points in the plane: x ascends, y descends.

    ``area`` is what the set dominates inside ``reference``; each step takes O(log n) (plus a
    memory move).
    """

    def __init__(self, reference: tuple[float, float] = (math.inf, math.inf)) -> None:
        self.reference = reference
        self.area = 0.0
        self.xs: list[float] = []
        self.ys: list[float] = []

    def covers(self, point: tuple[float, ...]) -> bool:
        x, y = point[-2:]
        i = bisect_right(self.xs, x)
        return i > 0 and self.ys[i - 1] <= y

    def add(self, point: tuple[float, ...]) -> None:
        x, y = point[-2:]
        if self.covers(point):
            return
        first = bisect_left(self.xs, x)
        last = first  # the members first .. last - 1 are the ones that (x, y) now dominates
        while last < len(self.xs) and self.ys[last] >= y:
            last += 1
        if math.isfinite(self.reference[0]):
            # Left to right, the strips between the old stairs and y.
            ceiling = self.ys[first - 1] if first else self.reference[1]
            left = x
            for i in range(first, last):
                self.area += (self.xs[i] - left) * (ceiling - y)
                left, ceiling = self.xs[i], self.ys[i]
            right = self.xs[last] if last < len(self.xs) else self.reference[0]
            self.area += (right - left) * (ceiling - y)
        self.xs[first:last] = [x]
        self.ys[first:last] = [y]


class _Rows:
    """The same question in any number of dimensions, by comparing with every member."""

    def __init__(self, dimensions: int) -> None:
        self.rows: Points = np.empty((16, dimensions))
        self.count = 0

    def covers(self, point: tuple[float, ...]) -> bool:
        return bool((self.rows[: self.count] <= point).all(axis=1).any())

    def add(self, point: tuple[float, ...]) -> None:
        if self.count == len(self.rows):
            self.rows = np.concatenate([self.rows, np.empty_like(self.rows)])
        self.rows[self.count] = point
        self.count += 1


def _cover(dimensions: int) -> _Cover:
    # Points come in lexicographic order, so the first column needs no look: up to three columns
    # are a question in the plane.
    return _Staircase() if dimensions <= 3 else _Rows(dimensions)


def _checked(points: ArrayLike) -> Points:
    array = np.asarray(points, dtype=np.float64)
    assert array.ndim == 2, array.shape
    assert array.shape[1] > 0, array.shape
    assert not np.isnan(array).any()
    return array


def _distinct(points: Points) -> tuple[list[tuple[float, ...]], NDArray[np.intp]]:
    """The different points in lexicographic order (at least two columns), and who is which."""
    if points.shape[1] == 1:
        points = np.column_stack([np.zeros(len(points)), points])
    rows, inverse = np.unique(points, axis=0, return_inverse=True)
    return [tuple(row) for row in rows.tolist()], inverse.reshape(-1)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates; a mask (N,). O(N log N) for up to 3 columns."""
    array = _checked(points)
    rows, inverse = _distinct(array)
    cover = _cover(array.shape[1])
    kept = np.zeros(len(rows), dtype=np.bool_)
    for i, row in enumerate(rows):
        if not cover.covers(row):
            cover.add(row)
            kept[i] = True
    return kept[inverse]


def ranks(points: ArrayLike) -> NDArray[np.int64]:
    """Each point's place in non-dominated sorting, (N,): 0 on the front, 1 on the next, and so on.

    In lexicographic order each point joins the first front that does not dominate it. Where a front
    dominates a point so do all before it, so bisection finds that front (ENS-BS: Zhang et al., An
    Efficient Approach to Nondominated Sorting, IEEE TEC 19(2), 2015).
    """
    array = _checked(points)
    rows, inverse = _distinct(array)
    fronts: list[_Cover] = []
    rank = np.zeros(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        joined, above = 0, len(fronts)
        while joined < above:
            middle = (joined + above) // 2
            if fronts[middle].covers(row):
                joined = middle + 1
            else:
                above = middle
        if joined == len(fronts):
            fronts.append(_cover(array.shape[1]))
        fronts[joined].add(row)
        rank[i] = joined
    return rank[inverse]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume that the points dominate inside the reference point; exact for any M.

    Up to three columns by one sweep (O(N log N); Beume et al., On the Complexity of Computing the
    Hypervolume Indicator, IEEE TEC 13(5), 2009), more by slicing down to three. Points that are not
    better than the reference in every column count for nothing.
    """
    array, corner = _checked(points), np.asarray(reference, dtype=np.float64)
    assert np.isfinite(array).all() and np.isfinite(corner).all()
    assert corner.shape == (array.shape[1],), (corner.shape, array.shape)
    inside = array[(array < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    padding = max(0, 3 - array.shape[1])  # a line or a plane is a sweep through slabs 1 thick
    inside = np.pad(inside, ((0, 0), (padding, 0)))
    return _volume(inside, np.pad(corner, (padding, 0), constant_values=1.0))


def _volume(points: Points, corner: Points) -> float:
    """Slabs along the first column: their thickness times what all points up to them dominate."""
    rows, _ = _distinct(points[non_dominated(points)])
    heights = [row[0] for row in rows[1:]] + [float(corner[0])]
    volume = 0.0
    if len(corner) == 3:
        stairs = _Staircase((float(corner[1]), float(corner[2])))
        for row, height in zip(rows, heights, strict=True):
            stairs.add(row)
            volume += stairs.area * (height - row[0])
        return volume
    rest = np.array([row[1:] for row in rows]).reshape(len(rows), len(corner) - 1)
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if height > row[0]:
            volume += _volume(rest[: i + 1], corner[1:]) * (height - row[0])
    return volume


def knee(points: ArrayLike) -> int:
    """The index of the front's point of greatest bulge; of equals, the one least in column 0.

    With each column scaled to 0 .. 1 over the front, the point whose columns' sum is least. With
    two columns that is the point farthest below the line through the two ends (Das, On
    Characterizing the "Knee" of the Pareto Curve, Structural Optimization 18, 1999).
    """
    array = _checked(points)
    members = np.flatnonzero(non_dominated(array))
    front = array[members]
    span = np.ptp(front, axis=0)
    bulge = ((front - front.min(axis=0)) / np.where(span > 0, span, 1.0)).sum(axis=1)
    return int(members[np.lexsort([*front.T[::-1], bulge])[0]])


def crowding(points: ArrayLike) -> Points:
    """NSGA-II's crowding distance of mutually non-dominated points, (N,): large is lonely.

    Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEC 6(2), 2002,
    section III-B. Equal points share one distance; the ends of each column have infinity.
    """
    array = _checked(points)
    rows, inverse = np.unique(array, axis=0, return_inverse=True)
    distance = np.zeros(len(rows))
    for column in rows.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
            distance[order[[0, -1]]] = np.inf
    return distance[inverse.reshape(-1)]


def promoted(points: ArrayLike, index: int, eta: int) -> bool:
    """Whether a rung lets point ``index`` go on: fewer than ceil(N / eta) points are better.

    Better is a lower non-dominated rank, or the same rank and a larger crowding distance; never
    accuracy alone (MO-ASHA, Schmucker et al., arXiv 2106.12639).
    """
    array = _checked(points)
    rank = ranks(array)
    peers = np.flatnonzero(rank == rank[index])
    distance = crowding(array[peers])
    lonelier = distance > distance[np.searchsorted(peers, index)]
    better = int((rank < rank[index]).sum()) + int(lonelier.sum())
    return better < math.ceil(len(array) / eta)
