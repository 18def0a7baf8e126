"""Symbolic sizes: polynomials, the system of equations, and torch on top of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from widthsearch.torch_internals import enable_python_dispatcher
from widthsearch.tracing.polynomials import Poly, System, add, divide, multiply
from widthsearch.tracing.symbolic_ints import plain_numbers, poly_of, size

polys = st.dictionaries(
    st.lists(st.integers(0, 3), max_size=2).map(lambda m: tuple(sorted(m))),
    st.integers(-9, 9).filter(bool),
    max_size=4,
)
values = st.tuples(*[st.integers(1, 50)] * 4)


def at(p: Poly, x: tuple[int, ...]) -> int:
    """The polynomial's value."""
    return System(hints=list(x)).hint(p)


@given(polys, polys, values)
def test_arithmetic_agrees_with_integers(a: Poly, b: Poly, x: tuple[int, ...]) -> None:
    """Adding and multiplying polynomials is adding and multiplying their values."""
    assert at(add(a, b, -3), x) == at(a, x) - 3 * at(b, x)
    assert at(multiply(a, b), x) == at(a, x) * at(b, x)


@given(polys, polys.filter(bool))
def test_division_undoes_multiplication(a: Poly, b: Poly) -> None:
    """An exact quotient is found."""
    assert divide(multiply(a, b), b) == a


def sizes(system: System, *hints: int) -> list[torch.SymInt]:
    """Fresh symbolic sizes."""
    made = [size(system, {(system.fresh(h),): 1}) for h in hints]
    return [n for n in made if isinstance(n, torch.SymInt)]


def test_an_equality_that_holds_ties_the_younger_to_the_older() -> None:
    """The oldest symbol stays free: it names the axis."""
    system = System()
    a, b = sizes(system, 8, 8)
    assert a == b
    assert system.solution == {1: {(0,): 1}}


def test_an_equality_that_does_not_hold_ties_nothing() -> None:
    """A branch not taken imposes nothing."""
    system = System()
    a, b = sizes(system, 8, 16)
    assert not bool(a == b)
    assert system.solution == {}


def test_a_concatenation_is_solved_for_the_sum() -> None:
    """s2 = s0 + s1."""
    system = System()
    a, b, c = sizes(system, 8, 4, 12)
    assert a + b == c
    assert system.value(2) == {(0,): 1, (1,): 1}


def test_groups_keep_their_factor() -> None:
    """s0 = 4 · s1, though s0 is older: only so are both whole."""
    system = System()
    a, b = sizes(system, 32, 8)
    assert a == 4 * b
    assert system.value(0) == {(1,): 4}


def test_coprime_factors_share_a_new_symbol() -> None:
    """2 · s0 = 3 · s1 has the whole solutions s0 = 3t, s1 = 2t alone."""
    system = System()
    a, b = sizes(system, 6, 4)
    assert 2 * a == 3 * b
    assert system.value(0) == {(2,): 3}
    assert system.value(1) == {(2,): 2}
    assert system.hints[2] == 2


def test_a_needed_value_is_pinned_with_its_reason() -> None:
    """int() takes a symbol's freedom and says why."""
    system = System(reason=lambda _: "somewhere")
    (a,) = sizes(system, 8)
    assert int(a) == 8
    assert [(pin.symbol, pin.reason) for pin in system.pins] == [(0, "somewhere")]


def test_halving_imposes_divisibility() -> None:
    """A half of a width is whole at every width."""
    system = System()
    (a,) = sizes(system, 8)
    half = a // 2
    assert poly_of(half) == {(1,): 1}
    assert system.value(0) == {(1,): 2}
    assert poly_of(a % 2) == {}


def test_a_comparison_with_a_remainder_imposes_nothing() -> None:
    """That 8 is not a multiple of 3 says nothing about other widths."""
    system = System()
    (a,) = sizes(system, 8)
    assert bool(a % 3 != 0)
    assert system.solution == {}


def test_a_remainder_in_a_shape_pins_what_it_came_from() -> None:
    """Padding to a multiple cannot be followed, so the width is pinned rather than wrong."""
    system = System(reason=lambda _: "padding")
    a, b = sizes(system, 8, 2)
    assert a % 3 == b
    assert system.value(0) == {(): 8}
    assert system.value(1) == {(): 2}


def test_floor_of_a_true_division_is_exact() -> None:
    """int(width / 2) is followed like width // 2."""
    system = System()
    (a,) = sizes(system, 8)
    half = torch.sym_int(a / 2)
    assert poly_of(half * 2) == poly_of(a)


@pytest.mark.parametrize("strict", [True, False])
def test_other_floats_are_plain_numbers_when_rounded(strict: bool) -> None:
    """int(0.3 · width) is not a polynomial: its line is noted, or pins the width."""
    lines = frozenset({"rounded"} if strict else ())
    system = System(reason=lambda _: "rounded", line=lambda: "rounded", strict=lines)
    (a,) = sizes(system, 10)
    with plain_numbers():
        assert int(a * 0.3) == torch.sym_int(a * 0.3) == 3
        assert math.isclose(math.sqrt(a), 10**0.5)
    assert system.value(0) == ({(): 10} if strict else {(0,): 1})
    assert list(system.taken) == ([] if strict else ["rounded"])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_products_of_unknowns_are_pinned_not_guessed(hints: list[int]) -> None:
    """An equation that is not linear fixes its symbols at their values."""
    system = System(reason=lambda _: "product")
    made = sizes(system, *hints, hints[0] * hints[-1])
    assert made[0] * made[len(hints) - 1] == made[-1]
    assert all(system.hint(system.value(s)) == h for s, h in enumerate(system.hints))


@pytest.mark.parametrize("name", ["sum", "mean", "relu", "flatten"])
def test_torch_runs_on_symbolic_sizes(name: str) -> None:
    """Meta tensors carry the sizes through torch's own operations."""
    system = System()
    (a,) = sizes(system, 8)
    x = torch.empty((2, a, 4, 4), device="meta")
    with enable_python_dispatcher():
        out = {
            "sum": lambda: x.sum((2, 3)),
            "mean": lambda: x.mean((2, 3)),
            "relu": lambda: torch.relu(x),
            "flatten": lambda: x.flatten(1),
        }[name]()
    assert poly_of(out.shape[1]) == {(0,): 16 if name == "flatten" else 1}
    assert system.solution == {}


def test_a_quotient_that_needs_no_equation_imposes_none() -> None:
    """(2t + 1) // 2 is t, and (3t - 1) // t is 2, whatever t is."""
    system = System()
    (t,) = sizes(system, 8)
    assert poly_of((2 * t + 1) // 2) == {(0,): 1}
    assert poly_of((3 * t - 1) // t) == {(): 2}
    assert system.solution == {}


def test_rounding_up_imposes_divisibility() -> None:
    """The number of splits of 112 channels by 14: another width has as many, of another size."""
    system = System()
    a, b = sizes(system, 112, 14)
    assert poly_of((a + b - 1) // b) == {(): 8}
    assert system.value(0) == {(1,): 8}


def test_what_a_division_leaves_over_is_fixed() -> None:
    """Of 100 channels by 14, two are left; at other widths one cannot know."""
    system = System()
    a, b = sizes(system, 100, 14)
    assert poly_of(a // b) == {(): 7}
    assert system.value(0) == {(): 100}
    assert system.value(1) == {(): 14}


def test_a_common_factor_is_taken_out() -> None:
    """(5 + t)·a = (5 + t)·2·b says nothing about t: tokens, some of them parameters."""
    system = System()
    t, a, b = sizes(system, 4, 16, 8)
    assert (5 + t) * a == (5 + t) * b * 2
    assert system.value(1) == {(2,): 2}
    assert 0 not in system.solution


def test_of_a_product_the_larger_number_that_code_keeps_is_fixed() -> None:
    """Heads times their width: the heads stay free."""
    system = System(reason=lambda _: "here")
    a, heads, width = sizes(system, 48, 4, 12)
    system.soft |= {1, 2}
    assert a == heads * width
    assert system.value(0) == {(1,): 12}
    assert [(pin.symbol, pin.reason) for pin in system.pins] == [(2, "here")]


def test_comparisons_are_known_where_sizes_of_one_or_more_decide_them() -> None:
    """t + 1 > 1 always; t > 1 as the run goes."""
    system = System()
    (t,) = sizes(system, 8)
    assert (t + 1 > 1).node.known() is True
    assert (t < 1).node.known() is False
    assert (t > 1).node.known() is None
    assert (t == 0).node.known() is False
    assert (t > 1).node.statically_known_true() is False
