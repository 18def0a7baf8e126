"""Polynomials in unknown sizes, and a system of equations that is solved as equations arrive.

Notation: a symbol is an integer, numbered in the order of creation: ``s0`` is older than ``s1``.
A monomial is the tuple of its symbols, ``(1, 2)`` for ``s1·s2`` and ``()`` for the constant term; a
polynomial is the dictionary of its coefficients: ``{(): 5, (0,): 2}`` is ``5 + 2·s0``. The *hint*
of a symbol or polynomial is its value in the model as given. A symbol is *solved* once an equation
expresses it by other symbols, *pinned* once it is a constant, and *free* otherwise. Every size is 1
or more.

When a symbolic run finds two sizes equal, ``System.impose`` solves the equation at once. Equations
of networks are linear (residual sums, concatenations, flattening) but for a few products (heads
times their width). Each is solved for its youngest symbol, so that the oldest symbols remain free;
these become the axes.

Example: a stem of ``s0 = 8`` channels and a branch of ``s1 = 4``, concatenated::

    found by the run                         equation          afterwards
    a norm of s2 = 12 channels reads both    s2 = s0 + s1      s2 → s0 + s1
    s3 = 12 channels are added to them       s3 = s2           s3 → s0 + s1
    they are split into 4 groups of s4 = 3   4·s4 = s0 + s1    s0 → 4·s5, s1 → 4·s6, s4 → s5 + s6
    code compares s0 with a literal 8        4·s5 = 8          s5 → 2, pinned

``s6`` is the only free symbol in the end: the branch is an axis, in steps of 4 channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Monomial = tuple[int, ...]
"""The symbols of one term, ascending, repeated for powers; ``()`` for the constant."""
Poly = dict[Monomial, int]
"""A polynomial: the non-zero coefficient of each monomial. It is never changed in place."""


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
        value = out.get(monomial, 0) + factor * coefficient
        if value:
            out[monomial] = value
        else:
            out.pop(monomial, None)
    return out


def total(polys: Iterable[Poly]) -> Poly:
    """The sum of polynomials."""
    return functools.reduce(add, polys, {})


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
            value = out.get(product, 0) + c * d
            if value:
                out[product] = value
            else:
                out.pop(product, None)
    return out


def substitute(p: Poly, value: Callable[[int], Poly]) -> Poly:
    """``p`` with each symbol replaced by a polynomial."""
    out: Poly = {}
    for monomial, coefficient in p.items():
        term = constant(coefficient)
        for symbol in monomial:
            term = multiply(term, value(symbol))
        out = add(out, term)
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


def evaluate(poly: Poly, x: Sequence[int] | Mapping[int, int]) -> int:
    """The value of a polynomial where symbol ``i`` is ``x[i]``."""
    return sum(c * math.prod(x[i] for i in monomial) for monomial, c in poly.items())


@dataclass(frozen=True)
class Pin:
    """A symbol that became a constant.

    Attributes:
        symbol: The symbol.
        reason: The line of code that needed its value, or the rule that fixed it.

    Example:
        >>> system = System()
        >>> width = system.fresh(8)
        >>> system.pin([width], "net.py:3 `if width == 8`")
        >>> system.pins
        [Pin(symbol=0, reason='net.py:3 `if width == 8`')]
    """

    symbol: int
    reason: str


@dataclass
class System:
    """Symbols, their values in the model as given, and every equation solved so far.

    Attributes:
        hints: The value of each symbol in the model as given.
        solution: For each symbol that is no longer free, the affine form it equals.
        pins: Each symbol that became a constant, with the reason.
        parents: For each solved symbol, the symbols in its equation.
        opaque: Symbols that stand for a non-zero remainder ``a % b``, each with the sum of the
            symbols of ``a`` and ``b``. They may be compared; where one would reach a shape, the
            symbols of ``a`` and ``b`` are pinned.
        soft: Symbols of integer attributes of modules, which are pinned before any tensor's.
        strict: Lines on which a plain number that is taken from symbols pins them.
        taken: The other lines on which a plain number was taken. It is assumed to scale values
            without reaching a size.
        line: Returns the line that is running.
        reason: Returns the reason of a pin now: the line that is running, or the rule behind the
            equation given, if there is one.

    Example:
        >>> system = System()
        >>> a, b, both = (system.fresh(hint) for hint in (8, 4, 12))
        >>> system.impose({(both,): 1, (a,): -1, (b,): -1})  # both = a + b
        >>> system.value(both)
        {(0,): 1, (1,): 1}
        >>> system.pin_value({(a,): 1}, "a literal 8")
        8
        >>> system.value(both)
        {(): 8, (1,): 1}
    """

    hints: list[int] = field(default_factory=list)
    solution: dict[int, Poly] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    parents: dict[int, frozenset[int]] = field(default_factory=dict)
    opaque: dict[int, Poly] = field(default_factory=dict)
    soft: set[int] = field(default_factory=set)
    strict: frozenset[str] = frozenset()
    taken: dict[str, None] = field(default_factory=dict)
    line: Callable[[], str] = field(default=lambda: "")
    reason: Callable[[Poly], str] = field(default=lambda _equation: "")

    def fresh(self, hint: int) -> int:
        """A new free symbol."""
        self.hints.append(hint)
        return len(self.hints) - 1

    def canonical(self, p: Poly) -> Poly:
        """``p`` in free symbols alone."""
        for monomial in p:  # mostly there is nothing to replace: then no new dictionary is made
            for symbol in monomial:
                if symbol in self.solution:
                    return substitute(p, self.value)
        return p

    def value(self, symbol: int) -> Poly:
        """The polynomial that ``symbol`` equals, in free symbols alone."""
        if symbol not in self.solution:
            return {(symbol,): 1}
        known = self.solution[symbol]
        resolved = self.canonical(known)
        if resolved is not known:
            self.solution[symbol] = resolved
        return resolved

    def hint(self, p: Poly) -> int:
        """The value of ``p`` in the model as given."""
        return evaluate(p, self.hints)

    def least(self, p: Poly) -> int | None:
        """The minimum of ``p`` over all sizes of 1 or more; None if it has none."""
        p = self.canonical(p)
        # Without negative coefficients the minimum is at 1 for every symbol: the coefficients' sum.
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

    def take(self, symbols: Iterable[int]) -> None:
        """Note that code takes a plain number that was computed from these symbols."""
        free = symbols_of(total(map(self.value, symbols)))
        if free and (line := self.line()) in self.strict:
            self.pin(sorted(free), self.reason({}))
        elif free:
            self.taken[line] = None

    def impose(self, p: Poly) -> None:
        """Impose ``p = 0``, which holds for the model as given."""
        p = given = self.transparent(p)
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
            self.pin(linear, self.reason(given))
            return
        self._balance(linear, p.get((), 0))

    def _simplify(self, p: Poly) -> None:
        """Impose ``p = 0`` for a ``p`` with products: solved if its factors are, else pinned."""
        for symbol in symbols_of(p):  # (x + c)·f = 0, with c >= 0, means f = 0
            slope = {_without(m, symbol): c for m, c in p.items() if symbol in m}
            rest = {m: c for m, c in p.items() if symbol not in m}
            c = divide(rest, slope)
            if c is not None and all(value >= 0 for value in c.values()):
                self.impose(slope)
                return
        factors = {s for m in p if len(m) > 1 for s in m}
        if pairs := self._equal_factors(p):
            for pair in pairs:
                self.impose(pair)
        elif soft := factors & self.soft:
            # Of heads times their width, the smaller number stays free: that is the heads.
            self.pin([max(soft, key=lambda s: (self.hints[s], s))], self.reason(p))
            self.impose(p)
        else:
            self.pin(sorted(symbols_of(p)), self.reason(p))

    def _equal_factors(self, p: Poly) -> list[Poly]:
        """For ``a·b = c·d``, the factors of both sides in pairs of equal hints, as equations.

        This is stronger than the equation. Example: ``8·s1 = s3·s4``, with the hints 8·14 = 14·8,
        becomes ``s1 = s3``, ``s4 = 8``: two tensors of these sizes are flattened.
        """
        if len(p) != 2:
            return []
        (m, a), (n, b) = p.items()
        left = self._factors(m, abs(a))
        right = self._factors(n, abs(b))
        if a * b > 0 or list(map(self.hint, left)) != list(map(self.hint, right)):
            return []
        return [add(x, y, -1) for x, y in zip(left, right, strict=True)]

    def _factors(self, monomial: Monomial, coefficient: int) -> list[Poly]:
        """The symbols of a term and its coefficient, by their hints."""
        factors: list[Poly] = [{(s,): 1} for s in monomial]
        factors += [constant(coefficient)] * (coefficient > 1)
        return sorted(factors, key=self.hint)

    def _balance(self, linear: dict[int, int], rest: int) -> None:
        """Solve ``Σ linear[s]·s + rest = 0`` so that no size can become negative.

        The negative terms are moved to the right: ``Σ c·s = Σ c·s`` with positive coefficients.
        If one side is a single symbol, the equation is solved for it, and its value is a sum. If
        both sides are sums, they are equated term by term, a stronger condition than the equation.
        If that is impossible, parts of one size on a side are equated, and the equation is solved
        again; where no side has such parts, all symbols are pinned.

        Example: ``s5 + s6 = s1 + s2``, with the hints 8 + 4 = 8 + 4, becomes ``s5 = s1``, ``s6 =
        s2``. With the hints 8 + 4 = 6 + 6 it becomes ``s1 = s2 = s6 + t`` with ``s5 = s6 + 2·t``.
        """
        left = {s: c for s, c in linear.items() if c > 0}
        right = {s: -c for s, c in linear.items() if c < 0}
        alone = [
            (symbol, factor, other, more)
            for side, other, more in ((left, right, -rest), (right, left, rest))
            for symbol, factor in side.items()
            if len(side) == 1 and (more >= 0 or sum(other.values()) + more >= factor)
        ]
        units = [one for one in alone if one[1] == 1]
        if units or alone:
            self._solve_for(*max(units or alone, key=lambda one: one[0]))
        elif rest == 0 and (pairs := self._pairs(left, right)):
            for a, b in pairs:
                self.impose({(a,): left[a], (b,): -right[b]})
        elif equal := list(self._equal_parts(linear)):
            for a, b in equal:
                self.impose({(a,): 1, (b,): -1})
            self.impose({**{(s,): c for s, c in linear.items()}, **constant(rest)})
        else:
            self.pin(sorted(linear), self.reason({}))

    def _equal_parts(self, linear: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Pairs with one hint and coefficient; with one hint alone if all symbols have that."""
        alike = len({self.hints[s] for s in linear}) == 1
        oldest: dict[tuple[int, int], int] = {}
        for s in sorted(linear):
            first = oldest.setdefault((self.hints[s], 0 if alike else linear[s]), s)
            if first != s:
                yield first, s

    def _solve_for(self, symbol: int, factor: int, other: dict[int, int], rest: int) -> None:
        """Solve ``factor·symbol = Σ other[s]·s + rest`` for ``symbol``.

        Every term must be a multiple of the factor: where a coefficient is not, its symbol is
        replaced by a multiple of a new one. ``2·s9 = 3·s1`` becomes ``s1 = 2·t``, ``s9 = 3·t``.
        Where the hints are no such multiples, equal parts stay equal: ``3·s9 = s1 + s2 + s3`` with
        ``16 = 16 + 16 + 16`` becomes ``s1 = s2 = s3 = s9``; others keep the rest of their division:
        ``2·s9 = s1 + s2`` with ``2·5 = 7 + 3`` becomes ``s1 = 2·t - 1``, ``s2 = 2·u - 1``.
        If a hint is smaller than such a step, all symbols are pinned.
        """
        units = {s: factor // math.gcd(factor, c) for s, c in other.items()}
        rests = {s: -(-self.hints[s] % unit) for s, unit in units.items()}
        if any(rests.values()):
            first, *others = sorted(other)
            parts = sum(other.values()) // math.gcd(*other.values())
            alike = len({self.hints[s] for s in other}) == 1
            if others and alike and not rest and factor % parts == 0:
                for s in others:
                    self.impose({(first,): 1, (s,): -1})
                self.impose({(symbol,): factor, (first,): -sum(other.values())})
                return
            if any(self.hints[s] < unit for s, unit in units.items()):
                self.pin(sorted([symbol, *other]), self.reason({}))
                return
        value = constant((rest + sum(c * rests[s] for s, c in other.items())) // factor)
        for s, c in other.items():
            if units[s] == 1:
                value = add(value, {(s,): c // factor})
        for s, c in other.items():
            if (unit := units[s]) > 1:
                t = self.fresh((self.hints[s] - rests[s]) // unit)
                self._solve(s, add({(t,): unit}, constant(rests[s])))
                value = add(value, {(t,): c * unit // factor})
        self._solve(symbol, value)

    def _pairs(self, left: dict[int, int], right: dict[int, int]) -> list[tuple[int, int]]:
        """The terms of two sums paired from old to young, if the hints of each pair are equal."""
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
                self.pin_value(self.opaque[symbol], self.reason({}))
                self.pin([symbol], self.reason({}))
            p = self.canonical(p)
        return p

    def remainder(self, a: Poly, b: Poly) -> Poly:
        """``a % b``; if it is 0 in the model as given, it is imposed to be 0."""
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
        """``a // b``; the remainder in the model as given is imposed at every width."""
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
        elif divisor is None and r:  # the remainder of a narrower b is unknown
            return constant(
                self.pin_value(a, self.reason({})) // self.pin_value(b, self.reason({}))
            )
        fixed = divisor is None or as_constant(a) is not None
        out: Poly = constant(q) if fixed else {(self.fresh(q),): 1}
        self.impose(add(a, add(multiply(out, b), remainder), -1))
        return self.canonical(out)


def _scaled_down(p: Poly, divisor: int) -> Poly:
    return {m: c // divisor for m, c in p.items() if c // divisor}


def _without(monomial: Monomial, symbol: int) -> Monomial:
    i = monomial.index(symbol)
    return monomial[:i] + monomial[i + 1 :]
