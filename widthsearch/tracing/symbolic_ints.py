"""Symbolic integers for torch: sizes of tensors that are polynomials in unknown widths.

Torch accepts a ``SymInt`` as a tensor's size: a thin wrapper around any object with the interface
of a *symbolic node*. Torch's kernels compute with sizes through the node's methods.

Notation:

- ``SizeNode``, an integer: a ``Poly`` over the symbols of a ``System``.
- ``RatioNode``, a float: its value in the model as given, and the quotient that it came from.
- ``TruthNode``, a boolean: a relation of a polynomial with 0, or a combination of such relations.
- *hint*: the value in the model as given.
- *guard*: torch's word for a request for a plain value, e.g. to take a branch. A guard on an
  integer pins its symbols; on an equality that holds, it imposes the equality on the system; on any
  other relation it imposes nothing: ``SearchSpace.check`` tests whether it holds at other widths.

Example: in ``x + y`` torch asks whether the channels ``s0`` of ``x`` and ``s1`` of ``y`` are equal:
``eq`` makes ``TruthNode(("eq", s0 - s1))`` and ``guard_bool`` evaluates it with the hints,
``16 - 16 = 0``. It is true, so ``s1 = s0`` is imposed, and both layers share one axis from here on.

Torch's own symbolic shapes do the same for the compiler with sympy. This is about a hundred times
faster (``docs/log.md``): a polynomial here is a small dictionary, and widths need no ranges, no
replay of guards and no code generation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import torch

from widthsearch.torch_internals import SymbolicNode
from widthsearch.tracing.polynomials import (
    Poly,
    System,
    add,
    as_constant,
    constant,
    multiply,
    symbols_of,
    total,
)


class _Node(SymbolicNode):
    """A node whose value depends on the symbols of a system."""

    def __init__(self, system: System) -> None:
        self.system = system

    def wrap_int(self, value: int) -> SizeNode:
        return SizeNode(self.system, constant(value))

    def wrap_float(self, value: float) -> RatioNode:
        return RatioNode(self.system, value)

    def wrap_bool(self, value: bool) -> TruthNode:
        return TruthNode(self.system, value)


class SizeNode(_Node):
    """A size: a polynomial in the symbols of a system.

    Example:
        >>> system = System()
        >>> width = torch.SymInt(SizeNode(system, {(system.fresh(8),): 1}))
        >>> poly_of(2 * width + 3)
        {(0,): 2, (): 3}
    """

    kind = "int"

    def __init__(self, system: System, poly: Poly) -> None:
        super().__init__(system)
        self._poly = poly

    @property
    def poly(self) -> Poly:
        """The size in free symbols alone."""
        self._poly = self.system.canonical(self._poly)
        return self._poly

    @property
    def hint(self) -> int:
        """The size in the model as given."""
        return self.system.hint(self.poly)

    def __repr__(self) -> str:
        return " + ".join(f"{c}·{m}" for m, c in self.poly.items()) or "0"

    def maybe_as_int(self) -> int | None:
        return as_constant(self.poly)

    constant_int = maybe_as_int

    def guard_int(self, _file: str = "", _line: int = 0) -> int:
        return self.system.pin_value(self.poly, self.system.reason({}))

    int_ = guard_int

    def _new(self, poly: Poly) -> SizeNode:
        return SizeNode(self.system, poly)

    def add(self, other: SizeNode) -> SizeNode:
        return self._new(add(self.poly, other.poly))

    def sub(self, other: SizeNode) -> SizeNode:
        return self._new(add(self.poly, other.poly, -1))

    def mul(self, other: SizeNode) -> SizeNode:
        return self._new(multiply(self.poly, other.poly))

    def neg(self) -> SizeNode:
        return self._new(multiply(self.poly, constant(-1)))

    def pos(self) -> SizeNode:
        return self

    round = floor = ceil = trunc = sym_int = pos

    def abs(self) -> SizeNode:
        return self if self.hint >= 0 else self.neg()

    def sym_sum(self, nodes: Sequence[SizeNode]) -> SizeNode:
        return self._new(total(node.poly for node in nodes))

    def pow(self, other: SizeNode) -> SizeNode:
        out = constant(1)
        for _ in range(other.guard_int()):
            out = multiply(out, self.poly)
        return self._new(out)

    pow_by_natural = pow

    def int_floordiv(self, other: SizeNode) -> SizeNode:
        return self._new(self.system.quotient(self.poly, other.poly))

    floordiv = int_floordiv

    def mod(self, other: SizeNode) -> SizeNode:
        return self._new(self.system.remainder(self.poly, other.poly))

    python_mod = mod

    def truediv(self, other: SizeNode) -> RatioNode:
        return RatioNode(self.system, self.hint / other.hint, (self.poly, other.poly))

    int_truediv = float_truediv = truediv

    def sym_float(self) -> RatioNode:
        return RatioNode(self.system, float(self.hint), (self.poly, constant(1)))

    # The larger of two sizes in the model as given is taken to be the larger at every width.

    def sym_max(self, other: SizeNode) -> SizeNode:
        return self if self.hint >= other.hint else other

    def sym_min(self, other: SizeNode) -> SizeNode:
        return self if self.hint <= other.hint else other

    def _compare(self, other: SizeNode, relation: str) -> TruthNode:
        return TruthNode(self.system, (relation, add(self.poly, other.poly, -1)))

    # Memory formats: answered from the known sizes and strides, without imposing anything.

    def _dense_in(self, sizes: list[Any], strides: list[Any], order: Iterable[int]) -> TruthNode:
        expected = constant(1)
        for d in order:
            size = _poly_of(sizes[d])
            if size != {(): 1} and add(_poly_of(strides[d]), expected, -1):
                return self.wrap_bool(False)
            expected = multiply(expected, size)
        return self.wrap_bool(True)

    def is_contiguous(self, sizes: list[Any], strides: list[Any]) -> TruthNode:
        return self._dense_in(sizes, strides, reversed(range(len(sizes))))

    def _channels_last(self, order: Sequence[int], sizes: list[Any], strides: Any) -> TruthNode:
        if len(sizes) != len(order):
            return self.wrap_bool(False)
        return self._dense_in(sizes, strides, order)

    is_channels_last_contiguous_2d = partialmethod(_channels_last, (1, 3, 2, 0))
    is_channels_last_contiguous_3d = partialmethod(_channels_last, (1, 4, 3, 2, 0))

    is_channels_last_strides_2d = is_channels_last_contiguous_2d
    is_channels_last_strides_3d = is_channels_last_contiguous_3d

    def is_non_overlapping_and_dense(self, sizes: list[Any], strides: list[Any]) -> TruthNode:
        by_stride = sorted(range(len(sizes)), key=lambda d: self.system.hint(_poly_of(strides[d])))
        return self._dense_in(sizes, strides, by_stride)

    is_non_overlapping_and_dense_indicator = is_non_overlapping_and_dense


def _poly_of(size: Any) -> Poly:
    if isinstance(size, int):
        return constant(size)
    node = size if isinstance(size, SizeNode) else size.node
    poly: Poly = node.poly
    return poly


def _taking(number: type) -> Callable[[Any], Any]:
    """A conversion of symbolic numbers to ``int`` or ``float`` that notes the line."""

    def convert(value: Any) -> Any:
        node: Any = value.node
        if not hasattr(node, "system"):  # a compiler's
            return number(node.guard_int("", 0) if node.is_int() else node.guard_float("", 0))
        node.system.take(symbols_of(node.poly) if isinstance(node, SizeNode) else node.symbols)
        return number(node.hint)

    return convert


def _of_float(function: Callable[[float], float]) -> Callable[[Any], float]:
    return lambda value: function(float(value))


@contextmanager
def plain_numbers() -> Iterator[None]:
    """Let ``int()``, ``float()``, ``math`` and ``numpy`` take plain numbers from sizes.

    They most often scale values: ``x / math.sqrt(x.size(-1))``. Those that reach a size at other
    widths are found by the tracer, which runs the model at other widths.
    """
    patches: dict[str, Callable[[Any], Any]] = {
        "__float__": _taking(float),
        "__int__": _taking(int),
        "sqrt": lambda value: value**0.5,  # numpy calls methods of unknown objects
        "floor": math.floor,
        "ceil": math.ceil,
    }
    for function in (math.exp, math.log, math.log2, math.log10):
        patches[function.__name__] = _of_float(function)
    before = [
        (kind, name, vars(kind).get(name))
        for kind in (torch.SymInt, torch.SymFloat)
        for name in patches
    ]
    for kind, name, _ in before:
        setattr(kind, name, patches[name])
    try:
        yield
    finally:
        for kind, name, method in before:
            delattr(kind, name) if method is None else setattr(kind, name, method)


class RatioNode(_Node):
    """A float computed from sizes: its value in the model as given, and its quotient of sizes.

    A float reaches a shape only by rounding. A plain quotient of sizes is rounded exactly; any
    other float is rounded to a plain number (:meth:`System.take`).

    Example:
        >>> system = System()
        >>> width = size(system, {(system.fresh(8),): 4})
        >>> poly_of(math.floor(width / 2))  # a quotient of sizes is rounded exactly
        {(0,): 2}
    """

    kind = "float"

    def __init__(
        self,
        system: System,
        value: float,
        quotient: tuple[Poly, Poly] | None = None,
        symbols: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(system)
        self.value, self.quotient = value, quotient
        if quotient is not None:
            symbols = symbols | symbols_of(quotient[0]) | symbols_of(quotient[1])
        self.symbols = symbols

    def __repr__(self) -> str:
        return repr(self.value)

    hint = property(lambda self: self.value)

    def guard_float(self, _file: str = "", _line: int = 0) -> float:
        return self.value

    def sym_float(self) -> RatioNode:
        return self

    def _rounded(self, rounding: Callable[[float], int]) -> SizeNode:
        if self.quotient is not None:
            a, b = self.quotient
            down = self.system.quotient(a, b)
            gap = rounding(self.value) - math.floor(self.value)
            return SizeNode(self.system, add(down, constant(gap)))
        self.system.take(self.symbols)
        return SizeNode(self.system, constant(rounding(self.value)))

    def trunc(self) -> SizeNode:
        return self._rounded(math.trunc)

    sym_int = trunc

    def floor(self) -> SizeNode:
        return self._rounded(math.floor)

    def ceil(self) -> SizeNode:
        return self._rounded(math.ceil)

    def round(self, _digits: Any = None) -> SizeNode:
        return self._rounded(round)


def _float_operation(name: str, function: Callable[..., float]) -> None:
    def method(self: RatioNode, other: Any) -> RatioNode:
        value = other.value if isinstance(other, RatioNode) else float(other.hint)
        symbols = getattr(other, "symbols", frozenset()) | self.symbols
        return RatioNode(self.system, function(self.value, value), None, symbols)

    setattr(RatioNode, name, method)


_ARITHMETIC: dict[str, Any] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv")},
    "float_truediv": operator.truediv,
    "pow": math.pow,
    "float_pow": math.pow,
    "sym_max": max,
    "sym_min": min,
}
_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
for _name, _function in _ARITHMETIC.items():
    _float_operation(_name, _function)
for _name, _relation in _RELATIONS.items():
    setattr(
        RatioNode,
        _name,
        lambda self, other, f=_relation: self.wrap_bool(f(self.value, float(other.hint))),
    )
    setattr(SizeNode, _name, lambda self, other, name=_name: self._compare(other, name))
for _name, _unary in {"neg": operator.neg, "abs": abs, "sqrt": math.sqrt}.items():
    setattr(
        RatioNode,
        _name if _name != "sqrt" else "sym_sqrt",
        lambda self, f=_unary: RatioNode(self.system, f(self.value), None, self.symbols),
    )


class TruthNode(_Node):
    """A relation of sizes, or a combination of relations.

    ``content`` is a bool, ``(relation, polynomial)``, which means ``polynomial relation 0``, or
    ``("not" | "and" | "or", *nodes)``. A branch on it takes the branch of the model as given.

    Example:
        >>> system = System()
        >>> a, b = (size(system, {(system.fresh(8),): 1}) for _ in range(2))
        >>> if a == b:  # the branch of the model as given
        ...     print(system.value(1))
        {(0,): 1}
    """

    kind = "bool"

    def __init__(self, system: System, content: Any) -> None:
        super().__init__(system)
        self.content = content

    def __repr__(self) -> str:
        return repr(self.content)

    def known(self) -> bool | None:
        """Its truth value if that is the same at every width, else None."""
        content = self.content
        if isinstance(content, bool):
            return content
        name, *parts = content
        if name == "not":
            inner: bool | None = parts[0].known()
            return None if inner is None else not inner
        if name in ("and", "or"):
            known: list[bool | None] = [part.known() for part in parts]
            decisive: bool = name == "or"
            if decisive in known:
                return decisive
            return None if None in known else not decisive
        p = self.system.canonical(parts[0])
        value = as_constant(p)
        if value is not None:
            return _RELATIONS[name](value, 0)
        for sign in (1, -1):
            least = self.system.least(multiply(p, constant(sign)))
            if least is not None and least >= 0:  # sign · p is never below 0, perhaps never 0
                at_bound, beyond = _RELATIONS[name](0, 0), _RELATIONS[name](sign, 0)
                if at_bound == beyond or least > 0:
                    return beyond
        return None

    @property
    def hint(self) -> bool:
        """Whether it holds for the model as given."""
        content = self.content
        if isinstance(content, bool):
            return content
        name, *parts = content
        if name == "not":
            return not parts[0].hint
        if name == "and":
            return all(part.hint for part in parts)
        if name == "or":
            return any(part.hint for part in parts)
        return _RELATIONS[name](self.system.hint(self.system.canonical(parts[0])), 0)

    def _assume(self, truth: bool) -> None:
        """Impose the equalities that make this node ``truth``, as it is for the model as given."""
        if isinstance(self.content, bool) or self.known() is not None:
            return
        name, *parts = self.content
        if name == "not":
            parts[0]._assume(not truth)
        elif (name == "and") == truth and name in ("and", "or"):
            for part in parts:
                part._assume(truth)
        elif name in ("and", "or"):
            next(part for part in parts if part.hint is truth)._assume(truth)
        elif (name == "eq") == truth and name in ("eq", "ne"):
            self.system.impose(parts[0])

    def guard_bool(self, _file: str = "", _line: int = 0) -> bool:
        truth = self.hint
        self._assume(truth)
        return truth

    expect_true = bool_ = guard_bool

    def guard_or_false(self, _file: str = "", _line: int = 0) -> bool:
        known = self.known()
        if known is not None:
            return known
        equality = isinstance(self.content, tuple) and self.content[0] == "eq"
        return False if equality else self.hint

    guard_size_oblivious = guard_or_false

    def statically_known_true(self, _file: str = "", _line: int = 0) -> bool:
        return self.known() is True

    def guard_or_true(self, _file: str = "", _line: int = 0) -> bool:
        return self.known() is not False

    def sym_not(self) -> TruthNode:
        return TruthNode(self.system, ("not", self))

    not_ = sym_not

    def sym_and(self, other: TruthNode) -> TruthNode:
        return TruthNode(self.system, ("and", self, other))

    and_ = sym_and

    def sym_or(self, other: TruthNode) -> TruthNode:
        return TruthNode(self.system, ("or", self, other))

    or_ = sym_or

    def sym_ite(self, then: SymbolicNode, otherwise: SymbolicNode) -> SymbolicNode:
        return then if self.guard_bool() else otherwise


def size(system: System, poly: Poly) -> torch.SymInt | int:
    """A size for torch: an int where it is known, else a ``SymInt``."""
    value = as_constant(poly)
    if value is not None:
        return value
    return torch.SymInt(SizeNode(system, poly))  # type: ignore[arg-type]  # torch types it SymNode


def poly_of(value: torch.SymInt | int) -> Poly:
    """The polynomial behind a size."""
    return constant(value) if isinstance(value, int) else _poly_of(value.node)
