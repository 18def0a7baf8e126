"""The values that equations determine, once all of them are known.

A :class:`~widthsearch.tracing.polynomials.System` solves equations one by one, as they arrive, and
keeps their freedom. Here the values of some polynomials are given, and the symbols are wanted.

Example: of ``a = 4`` and ``a·b = 12`` the first has one symbol, and then the second has.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from widthsearch.tracing.polynomials import (
    Poly,
    add,
    constant,
    evaluate,
    multiply,
    substitute,
    symbols_of,
)


def solved(equations: Iterable[tuple[Poly, int]]) -> dict[int, int]:
    """The symbols that the values of some polynomials determine, each with its value.

    Example:
        >>> # a = 4, a·b = 12, c + d = 7 and c + 2·d = 9
        >>> left = {(0,): 1}, {(0, 1): 1}, {(2,): 1, (3,): 1}, {(2,): 1, (3,): 2}
        >>> solved(zip(left, (4, 12, 7, 9)))
        {0: 4, 1: 3, 2: 5, 3: 2}
    """
    found: dict[int, int] = {}
    rows = [add(poly, constant(value), -1) for poly, value in equations]  # each is 0

    def value(symbol: int) -> Poly:
        return constant(found[symbol]) if symbol in found else {(symbol,): 1}

    while True:
        unique = {tuple(sorted(substitute(row, value).items())) for row in rows}
        rows = sorted((dict(row) for row in unique if row), key=len)
        single = [row for row in rows if _grows(row)]
        if not single:
            rows = _eliminated(rows)
            single = [row for row in rows if _grows(row)]
        if not single:
            return dict(sorted(found.items()))
        for row in single:
            (symbol,) = symbols_of(row)
            sign = max(row.items())[1]
            values = range(1 + abs(row.get((), 0)))
            at = {symbol: 0}

            def height(n: int) -> int:
                at[symbol] = n  # noqa: B023
                return sign * evaluate(row, at)  # noqa: B023

            found[symbol] = bisect.bisect_left(values, 0, key=height)


def _grows(row: Poly) -> bool:
    """Whether a polynomial has one symbol, and its value one direction in it."""
    signs = {c > 0 for monomial, c in row.items() if monomial}
    return len(signs) == 1 and len(symbols_of(row)) == 1


def _eliminated(rows: Sequence[Poly]) -> list[Poly]:
    """Equations reduced by each other, with each monomial as an unknown of its own."""
    out: list[Poly] = []
    for row in rows:
        for other in out:
            lead = max(other)
            if lead in row:
                row = add(multiply(row, constant(other[lead])), other, -row[lead])
        if any(row):
            lead = max(row)
            out = [
                add(multiply(p, constant(row[lead])), row, -p[lead]) if lead in p else p
                for p in out
            ]
            out.append(row)
    return out
