"""Checks of a study's parts, before it starts."""

from __future__ import annotations

import pytest
import tiny

from widthsearch.errors import SpaceError, StudyError
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.checks import check_parts


def widened(max_width: float) -> SearchSpace:
    """The tiny space up to a multiple of its base; such networks are never built."""
    return SearchSpace.from_model(tiny.Net, (1, 4, 4), name="tiny", max_width=max_width)


def test_costs_that_a_float_does_not_hold_are_refused() -> None:
    """Beyond 2^53 two costs may be equal as points of a front, and beyond 2^63 they overflow."""
    check_parts(tiny.config(), {"tiny": widened(2.0**10)}, tiny.task())
    with pytest.raises(StudyError) as caught:
        check_parts(tiny.config(), {"tiny": widened(2.0**24)}, tiny.task())
    assert str(caught.value) == (
        "a study's costs must be at most 2^53 = 9,007,199,254,740,992, so that they are compared "
        "exactly, but the widest network of space 'tiny' has 2,594,073,405,229,629,440 macs: lower "
        "the axes' max_width or the input shape"
    )
    with pytest.raises(SpaceError, match="costs must be below 2"):
        check_parts(tiny.config(), {"tiny": widened(2.0**30)}, tiny.task())
