"""The front: dominance, ranks, hypervolume, knee, rungs, and picking a member.

The geometry works on an array of points (N, M) where **every column is to be minimised** (so
accuracy goes in negated), without NaN. A point dominates another when it is no worse in every
column and better in one; equal points do not dominate each other, so duplicates live and die
together. All results depend on the set of points only, never on their order.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from widthsearch.errors import StudyError

if TYPE_CHECKING:
    from widthsearch.study.trial import Outcome

OBJECTIVES = ("accuracy", "macs", "params", "latency_ms")
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


def objective_value(outcome: Outcome, objective: str) -> float:
    """An outcome's value of an objective as a person reads it; NaN where it has none."""
    value: Any
    if objective in ("macs", "params"):
        value = getattr(outcome.cost, objective)
    else:
        value = getattr(outcome, objective)
    return math.nan if value is None else float(value)


def objective_points(outcomes: Sequence[Outcome], objectives: Sequence[str]) -> Points:
    """The outcomes as points to minimise, (N, objectives): accuracy negated, NaN where missing."""
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise StudyError(
                f"an objective must be one of {', '.join(OBJECTIVES)}, but was {objective!r}"
            )
    sign = [-1.0 if objective == "accuracy" else 1.0 for objective in objectives]
    values = [[objective_value(o, objective) for objective in objectives] for o in outcomes]
    return np.array(values).reshape(len(outcomes), len(objectives)) * sign


def front(outcomes: Sequence[Outcome], objectives: Sequence[str]) -> list[Outcome]:
    """The finished outcomes that no other dominates, fewest MACs first.

    An outcome that lacks one of the objectives (a latency that was never measured) takes no part.
    """
    points = objective_points(outcomes, objectives)
    known = [
        i for i, o in enumerate(outcomes) if o.state == "finished" and not np.isnan(points[i]).any()
    ]
    mask = non_dominated(points[known])
    members = [outcomes[i] for i, kept in zip(known, mask, strict=True) if kept]
    return sorted(members, key=lambda o: (o.cost.macs, o.id))


def gains(
    chosen: Sequence[Outcome],
    rivals: Sequence[Outcome],
    cost: str,
    accuracy: Callable[[Outcome], float],
) -> list[float]:
    """By how many points the best of some outcomes beats each rival at no more of a cost.

    Args:
        chosen: Finished outcomes.
        rivals: Finished outcomes, e.g. a baseline.
        cost: ``macs``, ``params`` or ``latency_ms``.
        accuracy: What is believed of an outcome.

    Returns:
        One number for each rival that some outcome can be compared with: one that costs no more.
    """
    found = []
    for rival in rivals:
        limit = objective_value(rival, cost)
        within = [accuracy(o) for o in chosen if objective_value(o, cost) <= limit]
        if within:
            found.append(max(within) - accuracy(rival))
    return found


def pick(
    front: Sequence[Outcome],
    spec: str | int,
    objectives: Sequence[str] = ("accuracy", "macs"),
    accuracy: Callable[[Outcome], float] | None = None,
    trials: Sequence[Outcome] = (),
) -> Outcome:
    """The front's member that ``spec`` asks for, or by its ID any finished trial.

    ``best`` is the most accurate, ``knee`` the one of greatest bulge over ``objectives``, a number
    the trial of that ID, and a limit such as ``macs<=2e6``, ``params<=1e5`` or ``latency_ms<=0.5``
    the most accurate within it.

    Args:
        front: The front.
        spec: What is asked for.
        objectives: What the front is of.
        accuracy: What is believed of a member; None for what one training came to.
        trials: Others that an ID may name, such as a baseline.

    Raises:
        StudyError: The spec is none of these, or no member fits it.
    """
    if not front:
        raise StudyError(f"a pick needs a front, but {spec!r} picks from none: run the study first")
    of = accuracy or (lambda outcome: outcome.accuracy or 0.0)

    def most_accurate(members: Sequence[Outcome]) -> Outcome:
        return max(members, key=lambda o: (of(o), -o.cost.macs, -o.id))

    spec = str(spec).strip()
    if spec == "knee":
        points = objective_points(front, objectives)
        points[:, list(objectives).index("accuracy")] = [-of(member) for member in front]
        return front[knee(points)]
    if spec == "best":
        return most_accurate(front)
    if spec.isdecimal():
        known = {o.id: o for o in (*trials, *front)}
        named = known.get(int(spec))
        if named is not None and named.state == "finished":
            return named
        some = [str(o.id) for o in known.values() if o.state == "finished"]
        raise StudyError(
            f"a picked ID must be a finished trial's, but {spec} "
            f"{f'has {named.state}' if named else 'is none'}; finished are "
            f"{', '.join(some[:8])}{', …' if len(some) > 8 else ''}, and on the front "
            f"{', '.join(str(member.id) for member in front)}"
        )
    objective, limit = _limit(spec)
    values = [objective_value(member, objective) for member in front]
    within = [member for member, value in zip(front, values, strict=True) if value <= limit]
    if not within:
        measured = [value for value in values if not math.isnan(value)]
        least = (
            f"the least {objective} on the front is {min(measured):g}"
            if measured
            else (f"no member of the front has a {objective}")
        )
        raise StudyError(
            f"a pick's limit must leave a member of the front, but {spec!r} leaves none; {least}"
        )
    return most_accurate(within)


def _limit(spec: str) -> tuple[str, float]:
    objective, _, number = (part.strip() for part in spec.partition("<="))
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if objective not in OBJECTIVES[1:] or math.isnan(limit):
        raise StudyError(
            "a pick must be a trial's ID, best, knee, or a limit on macs, params or latency_ms "
            f"such as 'macs<=2e6', but was {spec!r}"
        )
    return objective, limit
