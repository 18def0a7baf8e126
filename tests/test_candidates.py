"""The grid: whatever is made of it lies on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import axes

from widthsearch.bayesopt.candidates import Batch, Grid
from widthsearch.widths import Axis


def on_grid(grid: Grid, batch: Batch) -> bool:
    """Whether every width is its axis's."""
    return all(
        w in axis.grid for row in batch.tolist() for w, axis in zip(row, grid.axes, strict=True)
    )


@given(st.lists(axes(), min_size=1, max_size=4), st.integers(0, 2**32))
def test_all_moves_stay_on_the_grid(some: list[Axis], seed: int) -> None:
    """Random networks, families, mixtures, crossings, mutations, neighbours."""
    grid, rng = Grid(some), np.random.default_rng(seed)
    parents = grid.random(rng, 5)
    made = [
        parents,
        grid.families(parents, 7),
        grid.mixtures(rng, parents, 9),
        grid.crossings(rng, parents, 9),
        grid.mutations(rng, parents, 9),
        grid.neighbours(parents),
    ]
    assert [len(batch) for batch in made] == [5, 35, 9, 9, 9, 10 * len(some)]
    for batch in made:
        assert on_grid(grid, batch)


AXES = [Axis("a", 8, 4, 16, 4), Axis("b", 6, 2, 6, 2)]


def test_the_whole_grid_is_every_vector_once() -> None:
    """4 × 3 widths."""
    whole = Grid(AXES).whole()
    assert len(whole) == Grid(AXES).size == 12
    assert {tuple(row) for row in whole.tolist()} == {
        (a, b) for a in AXES[0].grid for b in AXES[1].grid
    }


def test_a_family_goes_from_all_least_to_all_most() -> None:
    """Whatever the profile; in between it is the profile's multiples."""
    family = Grid(AXES).families(np.array([[8, 2]]), 40)
    assert family[0].tolist() == [4, 2]
    assert family[-1].tolist() == [16, 6]
    assert [8, 2] in family.tolist()


def test_nearest_is_the_axes_own() -> None:
    """As :meth:`Axis.nearest`, ties up."""
    values = np.array([[0.0, 0.0], [6.0, 3.0], [9.9, 5.1], [99.0, 99.0]])
    expected = [[a.nearest(v) for a, v in zip(AXES, row, strict=True)] for row in values.tolist()]
    assert Grid(AXES).nearest(values).tolist() == expected


def test_a_crossing_takes_each_axis_from_a_parent() -> None:
    """And both parents are taken from."""
    parents = np.array([[4, 2], [16, 6]])
    crossed = Grid(AXES).crossings(np.random.default_rng(0), parents, 50)
    assert {tuple(row) for row in crossed.tolist()} == {(4, 2), (4, 6), (16, 2), (16, 6)}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mutation_moves_an_axis(seed: int) -> None:
    """Most children differ from their parent."""
    parents = np.array([[8, 4]])
    children = Grid(AXES).mutations(np.random.default_rng(seed), parents, 100)
    assert (children != parents).any(axis=1).mean() > 0.6
