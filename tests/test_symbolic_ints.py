"""Symbolic sizes: polynomials, the system of equations, and torch on top of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from widthsearch.torch_internals import enable_python_dispatcher
from widthsearch.tracing.polynomials import Poly, System, add, divide, evaluate, multiply
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


def solved(system: System, count: int) -> dict[int, Poly]:
    """The values of those of the first symbols that are no longer free."""
    values = {symbol: system.value(symbol) for symbol in range(count)}
    return {symbol: value for symbol, value in values.items() if value != {(symbol,): 1}}


RELATIONS: dict[str, tuple[tuple[int, ...], Callable[..., Any], dict[int, Poly]]] = {
    # The oldest symbol stays free: it names the axis.
    "an equality": ((8, 8), lambda a, b: a == b, {1: {(0,): 1}}),
    "an inequality": ((8, 16), lambda a, b: a != b, {}),
    "a concatenation": ((8, 4, 12), lambda a, b, c: a + b == c, {2: {(0,): 1, (1,): 1}}),
    # s0 = 4 · s1, though s0 is older: only so are both whole.
    "a multiple": ((32, 8), lambda a, b: a == 4 * b, {0: {(1,): 4}}),
    # 2 · s0 = 3 · s1 has the whole solutions s0 = 3t, s1 = 2t alone.
    "coprime factors": ((6, 4), lambda a, b: 2 * a == 3 * b, {0: {(2,): 3}, 1: {(2,): 2}}),
    # Halves are thirds: all are multiples of a sixth.
    "parts at other seams": (
        (6, 6, 4, 4, 4),
        lambda a, b, c, d, e: a + b == c + d + e,
        {0: {(5,): 3}, 1: {(5,): 3}, 2: {(5,): 2}, 3: {(5,): 2}, 4: {(5,): 2}},
    ),
    # 2·a = c + 2·d: c = 2·t is even.
    "parts at other seams, of two sizes": (
        (10, 10, 8, 6, 6),
        lambda a, b, c, d, e: a + b == c + d + e,
        {0: {(3,): 1, (5,): 1}, 1: {(3,): 1, (5,): 1}, 2: {(5,): 2}, 4: {(3,): 1}},
    ),
    # It is odd at every width, as it is in the model as given.
    "an odd sum": (
        (5, 7, 3),
        lambda a, b, c: 2 * a == b + c,
        {0: {(3,): 1, (4,): 1, (): -1}, 1: {(3,): 2, (): -1}, 2: {(4,): 2, (): -1}},
    ),
    "one less": ((7, 13), lambda a, b: 2 * a == b + 1, {1: {(0,): 2, (): -1}}),
    "a number below the step": ((2, 1), lambda a, b: 3 * a == b + 5, {0: {(): 2}, 1: {(): 1}}),
    # That 8 is not a multiple of 3 says nothing about other widths.
    "a remainder": ((8,), lambda a: a % 3 != 0, {}),
    # Padding to a multiple cannot be followed, so the width is pinned rather than wrong.
    "a remainder that is a size": ((8, 2), lambda a, b: a % 3 == b, {0: {(): 8}, 1: {(): 2}}),
    # It says nothing about t: tokens, some of them parameters.
    "a common factor": ((4, 16, 8), lambda t, a, b: (5 + t) * a == (5 + t) * b * 2, {1: {(2,): 2}}),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_a_relation_that_holds_is_imposed(name: str) -> None:
    """It is solved for its youngest symbol, or for one that all whole solutions allow."""
    hints, relation, expected = RELATIONS[name]
    system = System()
    assert relation(*sizes(system, *hints))
    assert solved(system, len(hints)) == expected


parts = st.lists(st.integers(1, 20), min_size=2, max_size=5)


@given(parts, parts, st.lists(st.integers(1, 9), min_size=40, max_size=40))
def test_sums_that_are_equal_stay_so_at_all_sizes(a: list[int], b: list[int], x: list[int]) -> None:
    """Of a concatenation that is split at any seams, every part keeps a size of 1 or more."""
    rest = sum(a) - sum(b)
    (a if rest < 0 else b).extend([abs(rest)] if rest else [])
    system = System()
    made = sizes(system, *a, *b)
    assert sum(made[: len(a)]) == sum(made[len(a) :])
    assert [system.hint(system.value(s)) for s in range(len(made))] == [*a, *b]
    at_x = [evaluate(system.value(s), x) for s in range(len(made))]
    assert sum(at_x[: len(a)]) == sum(at_x[len(a) :])
    assert min(at_x) >= 1


QUOTIENTS: dict[str, tuple[tuple[int, ...], Callable[..., Any], Poly, dict[int, Poly]]] = {
    # A half of a width is whole at every width.
    "half": ((8,), lambda a: a // 2, {(1,): 1}, {0: {(1,): 2}}),
    "the rest of a half": ((8,), lambda a: (a // 2, a % 2)[1], {}, {0: {(1,): 2}}),
    "half as a float": ((8,), lambda a: torch.sym_int(a / 2) * 2, {(1,): 2}, {0: {(1,): 2}}),
    # (2t + 1) // 2 is t, and (3t - 1) // t is 2, whatever t is.
    "half of an odd number": ((8,), lambda t: (2 * t + 1) // 2, {(0,): 1}, {}),
    "nearly three times": ((8,), lambda t: (3 * t - 1) // t, {(): 2}, {}),
    # The number of splits of 112 channels by 14: another width has as many, of another size.
    "rounded up": ((112, 14), lambda a, b: (a + b - 1) // b, {(): 8}, {0: {(1,): 8}}),
    # Of 100 channels by 14, two are left; at other widths one cannot know.
    "with a rest": ((100, 14), lambda a, b: a // b, {(): 7}, {0: {(): 100}, 1: {(): 14}}),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_a_quotient_is_exact_and_imposes_what_it_needs(name: str) -> None:
    """Divisibility where there is a factor, fixed sizes where something is left over."""
    hints, quotient, expected, imposed = QUOTIENTS[name]
    system = System()
    assert poly_of(quotient(*sizes(system, *hints))) == expected
    assert solved(system, len(hints)) == imposed


def test_a_needed_value_is_pinned_with_its_reason() -> None:
    """int() takes a symbol's freedom and says why."""
    system = System(reason=lambda _: "somewhere")
    (a,) = sizes(system, 8)
    assert int(a) == 8
    assert [(pin.symbol, pin.reason) for pin in system.pins] == [(0, "somewhere")]


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
