"""The sampler: new widths on the grid, the same for the same seed and outcomes."""

from __future__ import annotations

import tiny

from widthsearch.sampler import Known, draw

AXES = tiny.space().axes
OBJECTIVES = ("accuracy", "macs")


def known(count: int) -> list[Known]:
    """Outcomes along the grid's diagonal, one in three of them stopped."""
    return [
        Known(tiny.widths(w, w), None if w % 3 == 0 else (float(w), float(w * w)))
        for w in range(2, 2 * count + 1, 2)
    ]


def test_a_draw_is_new_on_the_grid_and_repeatable() -> None:
    """Whatever the seed; and it depends on the seed."""
    outcomes = known(8)
    seen = {trial.widths for trial in outcomes}
    draws = [draw(AXES, OBJECTIVES, outcomes, seen, seed) for seed in range(10)]
    for widths in draws:
        assert widths is not None
        assert widths not in seen
        assert all(w in axis.grid for axis, w in zip(AXES, widths.vector, strict=True))
    assert draws == [draw(AXES, OBJECTIVES, outcomes, seen, seed) for seed in range(10)]
    assert len(set(draws)) > 1


def test_every_width_vector_is_found_once_and_then_none() -> None:
    """The sampler repeats itself; the caller never sees it."""
    grid = {tiny.widths(a, b) for a in AXES[0].grid for b in AXES[1].grid}
    seen = {tiny.widths(3, 3)}  # of a study that had other bounds: not on the grid
    while (widths := draw(AXES, OBJECTIVES, known(4), seen, seed=len(seen))) is not None:
        assert widths not in seen
        seen.add(widths)
    assert seen == grid | {tiny.widths(3, 3)}


def test_outcomes_of_other_bounds_are_left_out() -> None:
    """Widths off today's grid are no parameters of today's."""
    assert draw(AXES, OBJECTIVES, [Known(tiny.widths(3, 3), (1.0, 1.0))], set(), 0) is not None
