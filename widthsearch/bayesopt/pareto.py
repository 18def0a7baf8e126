"""The geometry of Pareto fronts: dominance, ranks, hypervolume, knee, rungs.

The geometry works on an array of points (N, M) where **every column is to be minimised** (so a
metric to maximize goes in negated), without NaN. A point dominates another when it is no worse in
every column and better in one; equal points do not dominate each other, so duplicates live and die
together. All results depend on the set of points only, never on their order.

Example, three networks by error and cost, of which the last is dominated by the second:

    >>> points = [[4.0, 9.0], [5.0, 3.0], [6.0, 3.0]]
    >>> non_dominated(points).tolist(), ranks(points).tolist()
    ([True, True, False], [0, 0, 1])
    >>> hypervolume(points, reference=[10.0, 10.0])  # 6 · 1 + 5 · 7, less the common 5 · 1
    36.0
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


def _checked(points: ArrayLike) -> Points:
    array = np.asarray(points, dtype=np.float64)
    assert array.ndim == 2 and array.shape[1] > 0, array.shape
    assert not np.isnan(array).any()
    return array


def _distinct(points: ArrayLike) -> tuple[Points, NDArray[np.intp]]:
    """The different points in lexicographic order, as columns (M, D), and the index of each.

    In that order a point can be dominated by an earlier one only.
    """
    rows, inverse = np.unique(_checked(points), axis=0, return_inverse=True)
    return np.ascontiguousarray(rows.T), inverse.reshape(-1)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates; a mask (N,). O(N F) for a front of F points."""
    columns, inverse = _distinct(points)
    kept = np.zeros(columns.shape[1], dtype=np.bool_)
    left = np.arange(columns.shape[1])
    while len(left):  # the first that is left is on the front; what it dominates is not
        first, left = left[0], left[1:]
        kept[first] = True
        left = left[(columns[:, left] < columns[:, first, None]).any(axis=0)]
    return kept[inverse]


def ranks(points: ArrayLike) -> NDArray[np.int64]:
    """Each point's rank in non-dominated sorting, (N,): 0 on the front, 1 on the next, …. O(N²).

    A point's rank is the length of the longest chain of points in which each dominates the next and
    the last one dominates the point.
    """
    columns, inverse = _distinct(points)
    rank = np.zeros(columns.shape[1], dtype=np.int64)
    for i in range(1, len(rank)):
        dominating = (columns[:, :i] <= columns[:, i, None]).all(axis=0)
        rank[i] = (rank[:i][dominating] + 1).max(initial=0)
    return rank[inverse]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume that the points dominate inside the reference point; exact for any M.

    Points that are not better than the reference in every column count for nothing. O(N log N) for
    two columns; each further column multiplies that by the points of the front.
    """
    array, corner = _checked(points), np.asarray(reference, dtype=np.float64)
    assert np.isfinite(array).all() and np.isfinite(corner).all()
    assert corner.shape == (array.shape[1],), (corner.shape, array.shape)
    return _volume(array[(array < corner).all(axis=1)], corner)


def _volume(points: Points, corner: Points) -> float:
    """Sum over slabs along the first column: thickness times what the points up to it dominate."""
    if len(corner) == 1:
        return float(corner[0] - points.min(initial=corner[0]))
    if len(corner) > 2:
        points = points[non_dominated(points)]
    rows = points[np.lexsort(points.T[::-1])]
    thickness = np.diff(rows[:, 0], append=corner[0])
    if len(corner) == 2:
        return float(thickness @ (corner[1] - np.minimum.accumulate(rows[:, 1])))
    slabs = (t * _volume(rows[: i + 1, 1:], corner[1:]) for i, t in enumerate(thickness) if t > 0)
    return float(sum(slabs))


def knee(points: ArrayLike) -> int:
    """The index of the front's knee: its point of greatest bulge; of equals the first by column 0.

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
    """NSGA-II's crowding distance of mutually non-dominated points, (N,): large in sparse regions.

    Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEC 6(2), 2002,
    section III-B. Equal points share one distance; the ends of each column have infinity.
    """
    columns, inverse = _distinct(points)
    distance = np.zeros(columns.shape[1])
    for column in columns:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
            distance[order[[0, -1]]] = np.inf
    return distance[inverse]


def promoted(points: ArrayLike, index: int, eta: int) -> bool:
    """Whether a rung promotes point ``index``: fewer than ceil(N / eta) points are better.

    Better is a lower non-dominated rank, or the same rank and a larger crowding distance; never
    the metric alone (MO-ASHA, Schmucker et al., arXiv 2106.12639).
    """
    array = _checked(points)
    rank = ranks(array)
    peers = np.flatnonzero(rank == rank[index])
    distance = crowding(array[peers])
    sparser = distance > distance[np.searchsorted(peers, index)]
    better = int((rank < rank[index]).sum()) + int(sparser.sum())
    return better < math.ceil(len(array) / eta)
