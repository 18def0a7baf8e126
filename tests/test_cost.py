"""Costs: by hand for small nets, and as exact forms for any."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import space_of, spaces, widths_of

from widthsearch.errors import SpaceError
from widthsearch.space.cost import QuadraticForm
from widthsearch.space.search_space import SearchSpace


def test_a_plain_net_counted_by_hand() -> None:
    """conv 3→a 3×3 at 8×8, conv a→b 3×3 at 4×4, linear 16·b→10, with biases."""
    space = space_of("Plain")
    a, b = 6, 20
    cost = space.cost([a, b])
    assert cost.macs == 3 * a * 9 * 64 + a * b * 9 * 16 + 16 * b * 10
    assert cost.params == (3 * a * 9 + a) + (a * b * 9 + b) + (16 * b * 10 + 10)
    assert cost.activations == a * 64 + b * 16 + 10


def test_a_depthwise_net_counted_by_hand() -> None:
    """The depthwise convolution costs its width once, the pointwise ones its width twice."""
    space = space_of("Depthwise")
    assert space.names == ("stem", "expand")
    a, b = 4, 24
    cost = space.cost({"stem": a, "expand": b})
    assert cost.macs == (3 * a * 9 + a * b + b * 9 + b * a) * 64 + a * 10
    assert cost.params == 27 * a + 2 * a * b + 9 * b + 2 * b * 2 + 2 * a + 10 * a + 10


def test_a_grouped_net_counted_by_hand() -> None:
    """Four groups: each filter reads a quarter of the input channels."""
    space = space_of("Grouped")
    a, b, c = 32, 12, 8
    assert space.cost([a, b, c]).macs == (3 * a + (a // 4) * b * 9 + b * c) * 64 + c * 10


@given(st.data(), spaces)
def test_a_batch_is_its_members(data: st.DataObject, space: SearchSpace) -> None:
    """Costs of many vectors at once are those of each."""
    batch = data.draw(st.lists(widths_of(space), min_size=1, max_size=5))
    for quantity in ("macs", "params", "activations"):
        form = space.cost_form(quantity)
        assert form(np.array(batch)).tolist() == [int(form(w)) for w in batch]


@given(st.data(), spaces)
def test_costs_grow_with_every_axis(data: st.DataObject, space: SearchSpace) -> None:
    """No axis is free: a wider network costs more."""
    narrow = data.draw(widths_of(space))
    i = data.draw(st.integers(0, len(narrow) - 1))
    wide = list(narrow)
    wide[i] = space.axes[i].max_width + space.axes[i].step
    for quantity in ("macs", "params", "activations"):
        assert space.cost_form(quantity)(wide) > space.cost_form(quantity)(narrow)


@given(st.data(), spaces)
def test_the_marginal_cost_is_the_derivative(data: st.DataObject, space: SearchSpace) -> None:
    """Of a quadratic form the central difference is exact."""
    widths = np.array(data.draw(widths_of(space)))
    form = space.cost_form("macs")
    marginal = form.marginal(widths)
    for i, axis in enumerate(space.axes):
        step = np.zeros_like(widths)
        step[i] = axis.step
        slope = (int(form(widths + step)) - int(form(widths - step))) / (2 * axis.step)
        assert marginal[i] == pytest.approx(slope)


@given(st.data(), spaces)
def test_shares_are_what_vanishes_with_the_axis(data: st.DataObject, space: SearchSpace) -> None:
    """The share of an axis is the cost without it, taken from the whole."""
    widths = np.array(data.draw(widths_of(space)))
    form = space.cost_form("macs")
    for i, share in enumerate(form.share(widths)):
        without = widths.copy()
        without[i] = 0
        assert share == pytest.approx(1 - int(form(without)) / int(form(widths)))


def test_large_costs_stay_exact() -> None:
    """Beyond 2^53 the form counts in integers; beyond 2^63 it refuses."""
    form = QuadraticForm.from_poly({(0, 1): 1, (): 1}, [1, 1])
    w = 2**31 - 1
    assert int(form([w, w])) == w * w + 1
    message = r"costs must be below 2\^63, but are up to 1\.8e\+19: lower the widths, the axes' max"
    with pytest.raises(SpaceError, match=message):
        form([2**32, 2**32])
    with pytest.raises(SpaceError, match=message):
        QuadraticForm.from_poly({(0,): 2**64}, [1])


@given(st.data(), spaces)
def test_a_form_survives_json(data: st.DataObject, space: SearchSpace) -> None:
    """As plain values; the same costs at any widths."""
    widths = data.draw(widths_of(space))
    for quantity in ("macs", "params", "activations"):
        form = space.cost_form(quantity)
        again = QuadraticForm.from_json(json.loads(json.dumps(form.to_json())))
        assert int(again(widths)) == int(form(widths))
        assert (again.marginal(widths) == form.marginal(widths)).all()
