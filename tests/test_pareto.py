"""The front and its geometry: checked by hand, by brute force, and for what must not matter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from widthsearch.bayesopt import pareto

Points = NDArray[np.float64]


@st.composite
def point_sets(draw: st.DrawFn, max_points: int = 14, columns: tuple[int, int] = (1, 5)) -> Points:
    """Points on a small grid, so that ties and duplicates are common."""
    width = draw(st.integers(*columns))
    row = st.lists(st.integers(0, 4), min_size=width, max_size=width)
    return np.array(draw(st.lists(row, min_size=1, max_size=max_points)), dtype=np.float64)


def dominates(a: Points, b: Points) -> bool:
    """The definition."""
    return bool((a <= b).all() and (a < b).any())


def slow_front(points: Points) -> list[bool]:
    """The definition, point by point."""
    return [not any(dominates(other, point) for other in points) for point in points]


def slow_volume(points: Points, corner: int) -> int:
    """Count the unit cells below the corner that some point dominates; points are integers."""
    cells = itertools.product(range(corner), repeat=points.shape[1])
    return sum(bool((points <= np.array(cell)).all(axis=1).any()) for cell in cells)


# --- dominance ---


@given(point_sets())
def test_front_is_what_nobody_dominates(points: Points) -> None:
    """The fast mask equals the definition, duplicates included."""
    assert pareto.non_dominated(points).tolist() == slow_front(points)


@given(point_sets())
def test_ranks_peel_the_fronts(points: Points) -> None:
    """Rank 0 is the front, rank 1 the front of what is left, and so on."""
    left, expected = np.arange(len(points)), np.zeros(len(points), dtype=int)
    for rank in range(len(points)):
        mask = np.array(slow_front(points[left]), dtype=bool)
        expected[left[mask]] = rank
        left = left[~mask]
        if not len(left):
            break
    assert pareto.ranks(points).tolist() == expected.tolist()


@given(point_sets(), st.randoms())
def test_order_does_not_matter(points: Points, random: Any) -> None:
    """Ranks, crowding, hypervolume and promotion follow the points through any reordering."""
    order = list(range(len(points)))
    random.shuffle(order)
    shuffled = points[order]
    corner = np.full(points.shape[1], 5.0)
    assert (pareto.non_dominated(shuffled) == pareto.non_dominated(points)[order]).all()
    assert (pareto.ranks(shuffled) == pareto.ranks(points)[order]).all()
    assert pareto.hypervolume(shuffled, corner) == pareto.hypervolume(points, corner)
    assert (shuffled[pareto.knee(shuffled)] == points[pareto.knee(points)]).all()
    for place, index in enumerate(order):
        assert pareto.promoted(shuffled, place, 3) == pareto.promoted(points, index, 3)


def test_large_sets() -> None:
    """Ten thousand points: all on a sphere are a front, and a line has a rank for each."""
    rng = np.random.default_rng(0)
    for columns in (2, 3):
        sphere = np.abs(rng.normal(size=(10_000, columns)))
        sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
        assert pareto.non_dominated(-sphere).all()
        assert pareto.ranks(-sphere).max() == 0
        line = np.repeat(rng.permutation(10_000)[:, None], columns, axis=1)
        assert (pareto.ranks(line) == line[:, 0]).all()


# --- hypervolume ---


def test_hypervolume_by_hand() -> None:
    """One box; two boxes that overlap; a point beyond the reference; none at all."""
    assert pareto.hypervolume([[3.0]], [10.0]) == 7
    assert pareto.hypervolume([[1, 2]], [4, 4]) == 6
    assert pareto.hypervolume([[1, 2], [2, 1]], [4, 4]) == 6 + 6 - 4
    assert pareto.hypervolume([[1, 1, 1], [0, 2, 2]], [3, 3, 3]) == 8 + 3 - 2
    assert pareto.hypervolume([[1, 1, 1, 1], [0, 2, 2, 2]], [3, 3, 3, 3]) == 16 + 3 - 2
    assert pareto.hypervolume([[1, 2], [0, 4], [5, 0]], [4, 4]) == 6
    assert pareto.hypervolume(np.empty((0, 3)), [1, 1, 1]) == 0
    # A quarter disc: what n points on its rim leave out is a staircase of 1 - pi/4.
    angle = np.linspace(0, np.pi / 2, 20_001)
    rim = 1 - np.column_stack([np.sin(angle), np.cos(angle)])
    assert pareto.hypervolume(rim, [1, 1]) == pytest.approx(np.pi / 4, abs=1e-4)


@settings(deadline=None)
@given(point_sets(max_points=8, columns=(1, 4)), st.integers(1, 5))
def test_hypervolume_counts_cells(points: Points, corner: int) -> None:
    """On integers it is the number of unit cells that some point dominates."""
    reference = np.full(points.shape[1], float(corner))
    assert pareto.hypervolume(points, reference) == slow_volume(points, corner)


@given(point_sets(columns=(1, 4)), st.data())
def test_hypervolume_grows_with_points(points: Points, data: st.DataObject) -> None:
    """Another point never takes away, and adds if and only if it is new and not dominated."""
    corner = np.full(points.shape[1], 5.0)
    row = data.draw(st.lists(st.integers(0, 4), min_size=len(corner), max_size=len(corner)))
    point = np.array(row, dtype=np.float64)
    before = pareto.hypervolume(points, corner)
    after = pareto.hypervolume(np.vstack([points, point]), corner)
    covered = bool((points <= point).all(axis=1).any())
    assert after == before if covered else after > before


# --- knee, crowding, rungs ---


def test_knee_by_hand() -> None:
    """The point farthest below the line through the ends; off the front there is no knee."""
    assert pareto.knee([[0, 10], [1, 2], [6, 1], [10, 0]]) == 1
    assert pareto.knee([[0, 100], [0.4, 20], [1, 0], [0, 200]]) == 1  # scales do not matter
    assert pareto.knee([[5, 5], [0, 3], [3, 0], [1, 1]]) == 3
    assert pareto.knee([[2.0, 7.0]]) == 0


def test_crowding_by_hand() -> None:
    """Both ends are infinitely lonely; between, the gaps of the neighbours, scaled, add up."""
    points = [[0, 10], [2, 6], [3, 5], [10, 0]]
    expected = [math.inf, 3 / 10 + 5 / 10, 8 / 10 + 6 / 10, math.inf]
    assert pareto.crowding(points).tolist() == pytest.approx(expected)
    assert pareto.crowding([*points, [2, 6]]).tolist() == pytest.approx([*expected, expected[1]])


def test_promotion_by_hand() -> None:
    """The best third: by rank first, then by loneliness; never by one column alone."""
    points = [[0, 10], [2, 6], [3, 5], [10, 0], [4, 11], [11, 11], [12, 12]]
    assert [pareto.promoted(points, i, 3) for i in range(7)] == [
        *(True, False, True, True),
        *(False, False, False),
    ]
    assert [pareto.promoted(points, i, 7) for i in range(7)] == [True, *[False] * 2, True] + (
        [False] * 3
    )
    assert pareto.promoted([[5, 5]], 0, 3)
    # The least accurate of all goes on where it is by far the cheapest.
    accuracy, macs = [10, 90, 91, 92, 93, 94], [1, 50, 60, 70, 80, 90]
    rung = np.column_stack([-np.array(accuracy), macs])
    assert pareto.promoted(rung, 0, 3)


@given(point_sets(), st.integers(2, 5))
def test_promotion_keeps_the_best_share(points: Points, eta: int) -> None:
    """ceil(N / eta) go on, or more by ties; so does every point that dominates one of them."""
    quota = math.ceil(len(points) / eta)
    goes_on = [pareto.promoted(points, i, eta) for i in range(len(points))]
    assert sum(goes_on) >= quota
    rank = pareto.ranks(points)
    for i, point in enumerate(points):
        if goes_on[i]:
            assert all(goes_on[j] for j, other in enumerate(points) if dominates(other, point))
            assert (rank < rank[i]).sum() < quota
