"""Affine algebra of unknown sizes: polynomials, and a system of equations solved as they come.

A polynomial is a small dictionary. When a symbolic run finds two sizes equal, the equation is
imposed on the :class:`System`, which solves it at once: that is how layers that must agree find
each other. All equations that networks impose are linear (residual sums, concatenations,
flattening); each is solved for its youngest symbol, so what remains free are the oldest symbols,
and those become the axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Monomial = tuple[int, ...]
"""The symbols of one term, ascending, repeated for powers; ``()`` for the constant."""
Poly = dict[Monomial, int]
"""A polynomial: the non-zero coefficient of each monomial. Never changed once it is made."""


def constant(value: int) -> Poly:
    """The polynomial that is ``value`` everywhere."""
    return {(): value} if value else {}


def as_constant(p: Poly) -> int | None:
    """The value of ``p`` if it has no symbol, else None."""
    if not p:
        return 0
    if len(p) == 1 and () in p:
        return p[()]
    return None


def symbols_of(p: Poly) -> set[int]:
    """Every symbol in ``p``."""
    return {s for monomial in p for s in monomial}


def add(a: Poly, b: Poly, factor: int = 1) -> Poly:
    """``a + factor · b``."""
    out = dict(a)
    for monomial, coefficient in b.items():
        total = out.get(monomial, 0) + factor * coefficient
        if total:
            out[monomial] = total
        else:
            out.pop(monomial, None)
    return out


def multiply(a: Poly, b: Poly) -> Poly:
    """``a · b``."""
    if (value := as_constant(b)) is not None:
        return {m: c * value for m, c in a.items()} if value else {}
    if (value := as_constant(a)) is not None:
        return {m: c * value for m, c in b.items()} if value else {}
    out: Poly = {}
    for m, c in a.items():
        for n, d in b.items():
            product = tuple(sorted(m + n))
            total = out.get(product, 0) + c * d
            if total:
                out[product] = total
            else:
                out.pop(product, None)
    return out


def divide(a: Poly, b: Poly) -> Poly | None:
    """``a / b`` if that is a polynomial with integer coefficients, else None."""

    def order(monomial: Monomial) -> tuple[int, Monomial]:
        return len(monomial), monomial

    if not b:
        return None
    lead = max(b, key=order)
    quotient: Poly = {}
    while a:
        top = max(a, key=order)
        rest = list(top)
        for symbol in lead:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        if a[top] % b[lead]:
            return None
        term = {tuple(rest): a[top] // b[lead]}
        quotient = add(quotient, term)
        a = add(a, multiply(term, b), -1)
    return quotient


@dataclass(frozen=True)
class Pin:
    """Why one symbol lost its freedom.

    Attributes:
        symbol: The symbol.
        reason: The line of code that needed its value, or what it is tied to.
    """

    symbol: int
    reason: str


@dataclass
class System:
    """Symbols, their values in the model as given, and every equation solved so far.

    Attributes:
        hints: The value of each symbol in the model as given.
        solution: For each symbol that is no longer free, the affine form it equals.
        pins: Each symbol that became a constant, and why.
        parents: For each solved symbol, the symbols that its equation tied it to.
        opaque: Symbols that stand for a non-zero remainder, each with what it came from. They may
            be compared; where one would reach a shape, what it came from is pinned.
        soft: Symbols of numbers that a model's code keeps, which are fixed before any tensor's.
        reason: Says which code is running; asked when an equation takes a symbol's freedom.
    """

    hints: list[int] = field(default_factory=list)
    solution: dict[int, Poly] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    parents: dict[int, frozenset[int]] = field(default_factory=dict)
    opaque: dict[int, Poly] = field(default_factory=dict)
    soft: set[int] = field(default_factory=set)
    reason: Callable[[], str] = field(default=lambda: "")

    def fresh(self, hint: int) -> int:
        """A new free symbol."""
        self.hints.append(hint)
        return len(self.hints) - 1

    def canonical(self, p: Poly) -> Poly:
        """``p`` in free symbols alone."""
        solution = self.solution
        if solution:
            for monomial in p:
                for symbol in monomial:
                    if symbol in solution:
                        return self._substitute(p)
        return p

    def _substitute(self, p: Poly) -> Poly:
        out: Poly = {}
        for monomial, coefficient in p.items():
            term: Poly = {(): coefficient}
            for symbol in monomial:
                term = multiply(term, self.value(symbol))
            out = add(out, term)
        return out

    def value(self, symbol: int) -> Poly:
        """What ``symbol`` equals, in free symbols alone."""
        if symbol not in self.solution:
            return {(symbol,): 1}
        known = self.solution[symbol]
        resolved = self.canonical(known)
        if resolved is not known:
            self.solution[symbol] = resolved
        return resolved

    def hint(self, p: Poly) -> int:
        """The value of ``p`` in the model as given."""
        total = 0
        for monomial, coefficient in p.items():
            total += coefficient * math.prod(self.hints[s] for s in monomial)
        return total

    def least(self, p: Poly) -> int | None:
        """A bound that ``p`` is never below, as every size is 1 or more; None if there is none."""
        p = self.canonical(p)
        if any(c < 0 for m, c in p.items() if m) or any(s in self.opaque for s in symbols_of(p)):
            return None
        return sum(p.values())

    def never_below(self, a: Poly, b: Poly) -> bool:
        """Whether ``a >= b`` at every width."""
        least = self.least(add(a, b, -1))
        return least is not None and least >= 0

    def pin(self, symbols: Iterable[int], reason: str) -> None:
        """Fix each free symbol in ``symbols`` at its value in the model as given."""
        for symbol in symbols:
            if symbol not in self.solution:
                self.solution[symbol] = constant(self.hints[symbol])
                self.pins.append(Pin(symbol, reason))

    def pin_value(self, p: Poly, reason: str) -> int:
        """Fix every free symbol that ``p`` depends on, and return its value."""
        p = self.canonical(p)
        self.pin(sorted(symbols_of(p)), reason)
        return self.hint(p)

    def impose(self, p: Poly) -> None:
        """Impose ``p = 0``, which holds for the model as given."""
        p = self.transparent(p)
        assert self.hint(p) == 0, "an equation that does not hold for the model as given"
        if not p:
            return
        shared = set.intersection(*(set(m) for m in p))
        for symbol in shared:  # sizes are never 0: x·f = 0 means f = 0
            p = {_without(m, symbol): c for m, c in p.items()}
        divisor = math.gcd(*p.values())
        p = {m: c // divisor for m, c in p.items()}
        if any(len(m) > 1 for m in p):
            self._simplify(p)
            return
        linear = {m[0]: c for m, c in p.items() if m}
        if len(linear) == 1:
            self.pin(linear, self.reason())
            return
        self._balance(linear, p.get((), 0))

    def _simplify(self, p: Poly) -> None:
        """Impose ``p = 0``, which has products: those are made linear, or else all is fixed."""
        for symbol in symbols_of(p):  # (x + c)·f = 0, with c >= 0, means f = 0
            slope = {_without(m, symbol): c for m, c in p.items() if symbol in m}
            rest = {m: c for m, c in p.items() if symbol not in m}
            c = divide(rest, slope)
            if c is not None and all(value >= 0 for value in c.values()):
                self.impose(slope)
                return
        factors = {s for m in p if len(m) > 1 for s in m}
        if soft := factors & self.soft:
            # Of heads times their width, the smaller number stays free: that is the heads.
            self.pin([max(soft, key=lambda s: (self.hints[s], s))], self.reason())
            self.impose(p)
        else:
            self.pin(sorted(symbols_of(p)), self.reason())

    def _balance(self, linear: dict[int, int], rest: int) -> None:
        """Solve ``Σ linear[s]·s + rest = 0`` so that no size can become negative.

        With the positive terms on one side and the negative ones on the other, a side that is one
        symbol is solved for it: what it equals is then a sum. Where both sides are sums they are
        matched part by part, which asks more than the equation does.
        """
        left = {s: c for s, c in linear.items() if c > 0}
        right = {s: -c for s, c in linear.items() if c < 0}
        alone = [
            (symbol, factor, other)
            for side, other, with_rest in ((left, right, rest > 0), (right, left, rest < 0))
            for symbol, factor in side.items()
            if len(side) == 1 and not with_rest
        ]
        units = [one for one in alone if one[1] == 1]
        if units or alone:
            symbol, factor, other = max(units or alone, key=lambda one: one[0])
            self._solve_for(symbol, factor, other, abs(rest))
        elif rest == 0 and (pairs := self._pairs(left, right)):
            for a, b in pairs:
                self.impose({(a,): left[a], (b,): -right[b]})
        else:
            self.pin(sorted(linear), self.reason())

    def _solve_for(self, symbol: int, factor: int, other: dict[int, int], rest: int) -> None:
        """Solve ``factor·symbol = Σ other[s]·s + rest``: every part becomes a multiple."""
        if rest % factor:
            self.pin(sorted([symbol, *other]), self.reason())
            return
        value: Poly = constant(rest // factor)
        for s, c in other.items():
            unit = factor // math.gcd(factor, c)
            if unit == 1:
                value = add(value, {(s,): c // factor})
                continue
            if self.hints[s] % unit:  # the parts are not multiples in the model as given
                self.pin(sorted([symbol, *other]), self.reason())
                return
        for s, c in other.items():
            unit = factor // math.gcd(factor, c)
            if unit > 1:
                t = self.fresh(self.hints[s] // unit)
                self._solve(s, {(t,): unit})
                value = add(value, {(t,): c * unit // factor})
        self._solve(symbol, value)

    def _pairs(self, left: dict[int, int], right: dict[int, int]) -> list[tuple[int, int]]:
        """The terms of two sums matched in order of age, if each is worth the same."""
        if len(left) != len(right):
            return []
        pairs = list(zip(sorted(left), sorted(right), strict=True))
        same = all(left[a] * self.hints[a] == right[b] * self.hints[b] for a, b in pairs)
        return pairs if same else []

    def _solve(self, symbol: int, value: Poly) -> None:
        self.solution[symbol] = value
        self.parents[symbol] = frozenset(symbols_of(value))

    def transparent(self, p: Poly) -> Poly:
        """``p`` in free symbols alone, none of them opaque."""
        p = self.canonical(p)
        while hidden := [s for s in symbols_of(p) if s in self.opaque]:
            for symbol in hidden:
                self.pin_value(self.opaque[symbol], self.reason())
                self.pin([symbol], self.reason())
            p = self.canonical(p)
        return p

    def remainder(self, a: Poly, b: Poly) -> Poly:
        """``a % b``: divisibility that holds for the model as given is imposed."""
        a, b = self.canonical(a), self.canonical(b)
        left = self.hint(a) % self.hint(b)
        if left == 0:
            self.quotient(a, b)
            return {}
        if as_constant(a) is not None and as_constant(b) is not None:
            return constant(left)
        symbol = self.fresh(left)
        self.opaque[symbol] = {(s,): 1 for s in symbols_of(a) | symbols_of(b)}
        return {(symbol,): 1}

    def quotient(self, a: Poly, b: Poly) -> Poly:
        """``a // b``, with the remainder that it has for the model as given imposed."""
        a, b = self.canonical(a), self.canonical(b)
        exact = divide(a, b)
        if exact is not None:
            return exact
        q, r = divmod(self.hint(a), self.hint(b))
        divisor = as_constant(b)
        guess = constant(q) if divisor is None else _scaled_down(a, divisor)
        rest = add(a, multiply(guess, b), -1)
        if self.never_below(rest, {}) and self.never_below(b, add(rest, constant(1))):
            return guess  # 0 <= rest < b at every width
        remainder = constant(r)
        if divisor is None and r == self.hint(b) - 1:  # (x + b - 1) // b, rounding up
            remainder = add(b, constant(1), -1)
        elif divisor is None and r:  # what is left of a narrower b is not known
            return constant(self.pin_value(a, self.reason()) // self.pin_value(b, self.reason()))
        fixed = divisor is None or as_constant(a) is not None
        out: Poly = constant(q) if fixed else {(self.fresh(q),): 1}
        self.impose(add(a, add(multiply(out, b), remainder), -1))
        return self.canonical(out)


def _scaled_down(p: Poly, divisor: int) -> Poly:
    return {m: c // divisor for m, c in p.items() if c // divisor}


def _without(monomial: Monomial, symbol: int) -> Monomial:
    i = monomial.index(symbol)
    return monomial[:i] + monomial[i + 1 :]
