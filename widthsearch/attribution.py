"""What pinned widths cost: one more symbolic run, in which they are symbols too.

A pinned width has no polynomial: once its value is needed, all that follows is computed with
numbers. Here nothing is imposed and nothing pinned: comparisons are answered for the model as
given, and a size that is not a multiple at every width may be a fraction of another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules import clone, join, set_size, sync_attributes, tensors_of
from widthsearch.polynomials import Poly, System, as_constant, constant, divide
from widthsearch.running import Stopped, execute
from widthsearch.symbolic import size
from widthsearch.trace import Trace, within


class _Lenient(System):
    """Every symbol stays free, and every question is answered for the model as given."""

    def hint(self, p: Poly) -> int:
        return int(super().hint(p))

    def pin(self, symbols: Any, reason: str) -> None:
        pass

    def pin_value(self, p: Poly, reason: str) -> int:
        return self.hint(p)

    def impose(self, p: Poly) -> None:
        pass

    def remainder(self, a: Poly, b: Poly) -> Poly:
        return constant(self.hint(a) % self.hint(b))

    def quotient(self, a: Poly, b: Poly) -> Poly:
        exact = divide(a, b)
        if exact is not None:
            return exact
        divisor = as_constant(b)
        if divisor is None or as_constant(a) is not None or self.hint(a) % divisor:
            return constant(self.hint(a) // self.hint(b))
        scaled: Any = {m: Fraction(c) / divisor for m, c in a.items()}
        return scaled  # type: ignore[no-any-return]  # a polynomial with rational coefficients


def pinned_macs(model: nn.Module, inputs: Any, trace: Trace) -> list[int] | None:
    """For each pinned width of a trace, the MACs of the model as given that would vanish with it.

    Args:
        model: What was traced, perhaps on the meta device; it is left as it is.
        inputs: One sample of what it takes.
        trace: Its trace, before any axis was pinned or tied by a user.

    Returns:
        One number a pinned width; they overlap, as a product has two widths or more. None where the
        model does not run so.
    """
    fixed: dict[str, str] = {}
    while True:
        try:
            return _pinned_macs(model, inputs, trace, fixed)
        except Stopped as stop:
            if not stop.layer or within(stop.layer, fixed) is not None:
                return None
            fixed = {**fixed, stop.layer: stop.reason}


def _pinned_macs(
    model: nn.Module, inputs: Any, trace: Trace, fixed: Mapping[str, str]
) -> list[int] | None:
    first = len(trace.axes)  # the symbol of the first pinned width
    system = _Lenient([a.base // a.unit for a in trace.axes] + [p.size for p in trace.pinned])
    pins = {place: i for i, pin in enumerate(trace.pinned) for place in pin.places}
    copies: dict[int, Tensor] = {}
    for _, layer, name, tensor in tensors_of(model):
        key = join(layer, name)
        shape: list[Any] = []
        for dim, (n, poly) in enumerate(zip(tensor.shape, trace.shapes[key], strict=True)):
            if within(layer, fixed) is not None:
                poly = constant(n)
            elif (key, dim) in pins:
                i = pins[key, dim]
                poly = {(first + i,): Fraction(n, trace.pinned[i].size)}  # type: ignore[dict-item]
            shape.append(size(system, poly))
        meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=False)
        copies[id(tensor)] = meta
    symbolic = clone(model, copies)
    for (layer, attribute), poly in trace.attributes.items():
        if within(layer, fixed) is None:
            set_size(symbolic, layer, attribute, size(system, poly))
    for module in symbolic.modules():
        sync_attributes(module)
    run = execute(symbolic, system, inputs, fixed, train=False)

    terms = [
        (set(monomial), int(c * math.prod(system.hints[s] for s in monomial)))
        for poly in run.flops.values()
        for monomial, c in poly.items()
    ]
    base = [a.base // a.unit for a in trace.axes]
    macs = sum(c * math.prod(base[s] for s in monomial) for monomial, c in trace.macs.items())
    if sum(flops for _, flops in terms) != 2 * macs:
        return None
    return [
        sum(flops for symbols, flops in terms if first + i in symbols) // 2
        for i in range(len(trace.pinned))
    ]
