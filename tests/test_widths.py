"""Axes and widths."""

from __future__ import annotations

import json
import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from refusals import refusals
from strategies import axes, refused

from widthsearch.errors import WidthsError
from widthsearch.widths import Axis, Widths, fingerprint


@given(axes(), st.floats(-1e6, 1e6))
def test_nearest_is_idempotent_and_on_the_grid(axis: Axis, width: float) -> None:
    """Snapping gives a grid value, and snapping that changes nothing."""
    snapped = axis.nearest(width)
    assert snapped in axis.grid
    assert axis.nearest(snapped) == snapped


@given(axes(), st.floats(-1e4, 1e4))
def test_no_grid_value_is_nearer_than_nearest(axis: Axis, width: float) -> None:
    """Snapping is to the nearest."""
    distance = abs(axis.nearest(width) - width)
    assert distance == min(abs(value - width) for value in axis.grid)


@given(axes())
def test_bounds_and_base_are_on_the_grid(axis: Axis) -> None:
    """Least, base and most are widths that check accepts."""
    for width in (axis.min_width, axis.base, axis.max_width):
        assert axis.check(width) == width


@refusals("axis")
def test_an_impossible_axis_is_refused(values: dict[str, int], message: str) -> None:
    """Bad values cannot be constructed; the message says rule, culprit and value."""
    with refused(WidthsError, message):
        Axis("a", **values)


@refusals("width")
def test_a_width_off_the_grid_is_refused(values: Any, message: str) -> None:
    """The message names the axis's range and the nearest width on its grid."""
    with refused(WidthsError, message):
        Axis("a", 32, 8, 64, 8).check(values)


names = st.lists(st.text(min_size=1), min_size=1, max_size=8, unique=True)


@given(names, st.data())
def test_widths_survive_json(names: list[str], data: st.DataObject) -> None:
    """A mapping in axis order that JSON gives back as it was."""
    vector = data.draw(st.tuples(*[st.integers(1, 4096)] * len(names)))
    widths = Widths(tuple(names), vector)
    again = json.loads(json.dumps(widths.to_json()))
    assert Widths(tuple(again), tuple(again.values())) == widths
    assert list(again) == names


def test_widths_are_values() -> None:
    """Equal content is equal, hashes equally, and survives pickling for workers."""
    a, b = Widths(("x", "y"), (1, 2)), Widths(("x", "y"), (1, 2))
    assert a == b
    assert len({a, b}) == 1
    assert a != Widths(("y", "x"), (1, 2))
    assert pickle.loads(pickle.dumps(a)) == a
    assert a["y"] == 2
    assert dict(a) == {"x": 1, "y": 2}


def test_the_fingerprint_depends_on_meaning_alone() -> None:
    """Bounds, steps and the order of a cost's terms may change; names, ties and costs may not."""
    a, b = Axis("a", 16, 8, 32, 8), Axis("b", 16, 8, 32, 8)
    macs = {(0, 1): 9, (0,): 27}
    of = fingerprint("s", [a, b], [macs])
    assert of == "7013b8781bb767f4"
    assert of == fingerprint("s", [Axis("a", 16, 2, 64, 2), b], [{(0,): 27, (0, 1): 9}])
    tied = Axis("a", 16, 8, 32, 8, tied=("c",))
    others = {
        fingerprint("s", [b, a], [macs]),
        fingerprint("t", [a, b], [macs]),
        fingerprint("s", [tied, b], [macs]),
        fingerprint("s", [a, b], [{**macs, (0, 1): 25}]),
    }
    assert len({of, *others}) == 5
