"""The trace of a run whose equations are solved: axes with names, shapes and costs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from widthsearch.tracing.interpreter import SymbolicInterpreter
from widthsearch.tracing.polynomials import (
    Poly,
    System,
    as_constant,
    constant,
    multiply,
    symbols_of,
    total,
)
from widthsearch.tracing.symbolic_ints import poly_of
from widthsearch.tracing.trace import Pinned, Trace, TracedAxis


@dataclass
class SizeSymbol:
    """The dim of a tensor whose size a symbol is.

    Attributes:
        layers: The layers that hold the tensor: several where they share it.
        tensor: Its name in the state dict.
        dim: The dim.
        makes: Whether it is the output width of a layer's weight.

    Example:
        >>> SizeSymbol(("conv1",), "conv1.weight", 0, makes=True)
        SizeSymbol(layers=('conv1',), tensor='conv1.weight', dim=0, makes=True)
    """

    layers: tuple[str, ...]
    tensor: str
    dim: int
    makes: bool


def numel(tensor: Tensor) -> Poly:
    """A tensor's number of elements."""
    return functools.reduce(multiply, map(poly_of, tensor.shape), constant(1))


def collect(
    system: System,
    symbols: Mapping[int, SizeSymbol],
    sized: Mapping[str, Tensor],
    attributes: Mapping[tuple[str, str], Poly],
    run: SymbolicInterpreter,
) -> Trace:
    """The trace of a run.

    Args:
        system: Every equation that the run imposed, solved.
        symbols: What each symbol is the size of.
        sized: The tensors of symbolic sizes, by name.
        attributes: The values of symbolic attributes.
        run: The run.
    """
    owners: dict[int, list[int]] = {}  # free symbol -> symbols that are a multiple of it
    layers: dict[int, dict[str, None]] = {}  # free symbol -> layers whose shapes depend on it
    for symbol, where in symbols.items():
        value = system.value(symbol)
        for free in symbols_of(value):
            layers.setdefault(free, {}).update(dict.fromkeys(where.layers))
            if len(value) == 1 and len(next(iter(value))) == 1:
                owners.setdefault(free, []).append(symbol)

    # An axis is named after the oldest symbol that is a multiple of the free one, if possible the
    # output width of a weight. Its width counts that symbol's channels.
    ordered: list[tuple[int, int]] = []  # (symbol that names the axis, free symbol)
    for free in layers:
        named = owners.get(free) or [min(s for s in symbols if free in symbols_of(system.value(s)))]
        makers = [s for s in named if symbols[s].makes]
        ordered.append((min(makers or named), free))
    ordered.sort()
    axes: list[TracedAxis] = []
    for namer, free in ordered:
        where = symbols[namer]
        name = where.layers[0] or where.tensor
        if any(axis.name == name for axis in axes):
            name = where.tensor
        count = sum(axis.name.split("#")[0] == name for axis in axes)
        name = f"{name}#{count + 1}" if count else name
        divisor = system.value(namer).get((free,), 1) if namer in owners.get(free, ()) else 1
        maker = where.tensor, where.dim
        base = system.hints[free] * divisor
        axes.append(TracedAxis(name, base, divisor, tuple(layers[free]), maker))

    index = {free: i for i, (_, free) in enumerate(ordered)}

    def over_axes(poly: Poly) -> Poly:
        canonical = system.canonical(poly)
        return {tuple(sorted(index[s] for s in m)): c for m, c in canonical.items()}

    params = total(numel(tensor) for tensor in sized.values() if isinstance(tensor, nn.Parameter))
    return Trace(
        axes=tuple(axes),
        pinned=_pinned(system, symbols),
        shapes={name: tuple(over_axes(poly_of(n)) for n in t.shape) for name, t in sized.items()},
        attributes={where: over_axes(poly) for where, poly in attributes.items()},
        macs=_halved(over_axes(total(run.flops.values()))),
        params=over_axes(params),
        activations=over_axes(run.activations),
        layer_macs={layer: _halved(over_axes(poly)) for layer, poly in run.flops.items()},
    )


def _halved(flops: Poly) -> Poly:
    assert all(c % 2 == 0 for c in flops.values()), "torch counts two FLOPs a MAC"
    return {m: c // 2 for m, c in flops.items()}


def _pinned(system: System, symbols: Mapping[int, SizeSymbol]) -> tuple[Pinned, ...]:
    reasons = {pin.symbol: pin.reason for pin in system.pins}
    grouped: dict[int, list[int]] = {}
    for symbol in symbols:
        if as_constant(system.value(symbol)) is not None:
            root = symbol  # the symbol whose pin made this one a constant
            while root not in reasons:
                root = min(system.parents[root], key=lambda s: s not in reasons)
            grouped.setdefault(root, []).append(symbol)
    rows: dict[tuple[str, int, str], list[SizeSymbol]] = {}
    for root, members in grouped.items():
        first = symbols[members[0]]
        row = first.layers[0] or first.tensor, system.hints[members[0]], reasons[root]
        rows.setdefault(row, []).extend(symbols[s] for s in members)
    return tuple(
        Pinned(
            *row,
            layers=tuple(dict.fromkeys(layer for where in found for layer in where.layers)),
            places=tuple((where.tensor, where.dim) for where in found),
        )
        for row, found in rows.items()
    )
