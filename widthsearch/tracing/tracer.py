"""One symbolic run of a model: its axes, the shape of every tensor, and its cost.

Every parameter and buffer gets symbols for sizes, the model runs once on meta tensors, and what
the run had to equate *is* the coupling of its layers (``symbolic.py``). FLOPs are counted on the
way with torch's own formulas, so they come out as polynomials in the widths.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from widthsearch.errors import TraceError, first_line
from widthsearch.modules.tree import (
    clone,
    is_estimate,
    is_synced,
    join,
    owner_of,
    set_size,
    sizes_in,
    sync_attributes,
    tensors_of,
)
from widthsearch.torch_internals import ConvNd, buffers_of, parameters_of
from widthsearch.tracing.inputs import Inputs, as_inputs, call, sample
from widthsearch.tracing.interpreter import Stopped, SymbolicInterpreter, execute
from widthsearch.tracing.polynomials import (
    Poly,
    System,
    add,
    as_constant,
    constant,
    multiply,
    symbols_of,
)
from widthsearch.tracing.symbolic_ints import poly_of, size


@dataclass(frozen=True)
class TracedAxis:
    """An axis as the run found it.

    Attributes:
        name: The first layer that makes the width.
        base: The width in the model as given, in channels.
        divisor: Channels per unit of the polynomials' variable; widths are multiples of it
            (groups of a grouped convolution, heads).
        layers: Every layer with a tensor whose shape depends on the axis.
        maker: The tensor and the dim that the axis is named after.
    """

    name: str
    base: int
    divisor: int
    layers: tuple[str, ...]
    maker: tuple[str, int]


@dataclass(frozen=True)
class Pinned:
    """A width that is not free.

    Attributes:
        name: The first layer with this width.
        size: Its value, in channels.
        reason: What fixes it.
        layers: Every layer whose shape depends on it.
        places: The tensors and dims with this width, or a multiple of it.
    """

    name: str
    size: int
    reason: str
    layers: tuple[str, ...]
    places: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Trace:
    """What one symbolic run of a model tells.

    Polynomials are over the axes' indices; variable ``i`` is ``width_i / axes[i].divisor``.

    Attributes:
        axes: The free widths.
        pinned: The widths that are not free, each with its reason.
        shapes: Per parameter and buffer, its sizes as polynomials.
        attributes: Per module and attribute that repeats a size, its value.
        macs: Multiply-accumulates of one sample's forward pass in eval mode (half of what
            ``FlopCounterMode`` counts as FLOPs).
        params: Number of parameters.
        activations: Output elements of every operation that multiplies (convolutions, matrix
            products) for one sample; "activations" of Radosavovic et al. 2020 (RegNet, section 2).
        layer_macs: The MACs of each layer.
    """

    axes: tuple[TracedAxis, ...]
    pinned: tuple[Pinned, ...]
    shapes: Mapping[str, tuple[Poly, ...]]
    attributes: Mapping[tuple[str, str], Poly]
    macs: Poly
    params: Poly
    activations: Poly
    layer_macs: Mapping[str, Poly]


@dataclass
class _Symbol:
    """Where a symbol stands."""

    layer: str
    tensor: str  # its name in the state dict
    dim: int
    makes: bool
    """Whether it is the output width of a layer's weight."""


def numel(tensor: Tensor) -> Poly:
    """A tensor's number of elements."""
    out = constant(1)
    for n in tensor.shape:
        out = multiply(out, poly_of(n))
    return out


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run ``model`` on symbolic widths.

    Modules keep sizes in attributes of their own (``self.hidden_dim``) and use them in forward,
    which fixes a width. Where a run met that, it is run again with those attributes symbolic, and
    what that frees is kept. A module whose code needs numbers is given numbers: its widths are
    pinned, and the run goes on around it.

    Args:
        model: Any module; neither it nor its tensors are changed.
        inputs: One sample's shape, e.g. ``(3, 224, 224)``; see :data:`Inputs` for several inputs.

    Raises:
        TraceError: The model cannot run on meta tensors; names the module and the operation. Or it
            cannot run on such an input at all.
    """
    inputs = as_inputs(inputs)
    _refuse_lazy(model)
    fixed: dict[str, str] = {}
    while True:
        try:
            return _freest(model, inputs, fixed).collect()
        except Stopped as stop:
            if not stop.layer or within(stop.layer, fixed) is not None:
                if (failure := _failure(model, inputs)) is not None:
                    raise TraceError(
                        f"the model fails on its input {inputs!r}: {first_line(failure)}; give one "
                        "sample as the model takes it: a shape without the batch, or a tensor "
                        "where the dtype matters"
                    ) from failure
                raise TraceError(str(stop)) from stop.__cause__
            fixed = {**fixed, stop.layer: stop.reason}


def _freest(model: nn.Module, inputs: Any, fixed: Mapping[str, str]) -> _Attempt:
    """The attempt with the attributes symbolic that free the most."""
    best = latest = _Attempt(model, inputs, frozenset(), fixed)
    tried: frozenset[tuple[str, str]] = frozenset()
    while repeated := latest.repeated_sizes(tried):
        tried |= repeated
        try:
            latest = _Attempt(model, inputs, latest.attributes | repeated, fixed)
        except Stopped:  # the code needs a number there
            continue
        if latest.freedom < best.freedom:
            break  # a number that was none: with it symbolic, less can be followed
        if latest.freedom == best.freedom:  # such a number may undo what another one frees
            for part in _by_name(repeated):
                with suppress(Stopped):
                    attempt = _Attempt(model, inputs, best.attributes | part, fixed)
                    if attempt.freedom > best.freedom:
                        best = latest = attempt
                        break
        else:
            best = latest
    return best


def _by_name(places: Set[tuple[str, str]]) -> list[frozenset[tuple[str, str]]]:
    """Attributes (of modules) of several names in parts of one name each; nothing if of one."""
    parts: dict[str, set[tuple[str, str]]] = {}
    for layer, name in sorted(places):
        parts.setdefault(name.partition("[")[0], set()).add((layer, name))
    return [frozenset(part) for part in parts.values()] if len(parts) > 1 else []


def within(layer: str, fixed: Mapping[str, str]) -> str | None:
    """Why a layer is to be given numbers, if it is."""
    for name, reason in fixed.items():
        if layer == name or layer.startswith(f"{name}."):
            return reason
    return None


def _failure(model: nn.Module, inputs: Any) -> Exception | None:
    """What goes wrong where the model itself runs on zeros, if it is on the CPU."""
    tensors = {id(tensor): tensor for *_, tensor in tensors_of(model)}
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return None
    for *_, tensor in tensors_of(model):
        if not isinstance(tensor, nn.Parameter):  # a run may write to it
            tensors[id(tensor)] = tensor.detach().clone()
    with torch.no_grad(), torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(clone(model, tensors).eval(), sample(inputs, 1, "cpu"))
        except Exception as error:  # noqa: BLE001  a model may raise anything
            return error
    return None


def _refuse_lazy(model: nn.Module) -> None:
    for layer, module in model.named_modules():
        if any(p is not None and is_lazy(p) for p in parameters_of(module).values()):
            raise TraceError(
                f"a model's tensors must have sizes, but module {layer or '(the model itself)'!r} "
                f"({type(module).__name__}) has none before its first run: run the model once on "
                "a sample where it is made"
            )


class _Attempt:
    """A run with certain attributes symbolic and certain layers in numbers, and all it told."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        attributes: frozenset[tuple[str, str]],
        fixed: Mapping[str, str],
    ) -> None:
        self.model, self.inputs, self.attributes, self.fixed = model, inputs, attributes, fixed
        self.system = System()
        self.symbols: dict[int, _Symbol] = {}
        self.sized: dict[str, Tensor] = {}
        self.values: dict[tuple[str, str], Poly] = {}
        self.symbolic = self._symbolic()
        self.run = execute(self.symbolic, self.system, inputs, fixed, train=False)

    @property
    def freedom(self) -> int:
        """How many sizes of tensors are not fixed."""
        values = (self.system.value(symbol) for symbol in self.symbols)
        return sum(as_constant(value) is None for value in values)

    def repeated_sizes(self, tried: Set[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """Attributes of modules in which a width was fixed that may be sizes.

        First those that have such a width's value, then any other number.
        """
        fixed = {self.system.hints[pin.symbol] for pin in self.system.pins} - {1}
        numbers = {
            (layer, name): value
            for layer in self.run.fixed_in
            for module in [self.model.get_submodule(layer)]
            if not is_synced(module)
            for name, value in sizes_in(module)
            if value > 1 and (layer, name) not in tried
        }
        likely = {place for place, value in numbers.items() if value in fixed}
        return frozenset(likely or numbers)

    def _symbolic(self) -> nn.Module:
        """A copy of the model on meta tensors with symbolic sizes."""
        copies: dict[int, Tensor] = {}
        for module, layer, name, tensor in tensors_of(self.model):
            owner = owner_of(layer)
            numbers = name in buffers_of(module) and has_content(module, name, tensor)
            why = within(owner, self.fixed)
            layer_of = self.model.get_submodule(owner) if owner != layer else module
            convolution = isinstance(layer_of, ConvNd) and tensor.dim() > 2
            output = 1 if convolution and layer_of.transposed else 0
            key = join(layer, name)
            shape: list[torch.SymInt | int] = []
            for dim, n in enumerate(tensor.shape):
                if n == 1 or numbers or (convolution and dim > 1):
                    shape.append(n)
                    continue
                symbol = self.system.fresh(n)
                makes = dim == output and tensor.dim() > 1
                self.symbols[symbol] = _Symbol(owner, key, dim, makes)
                if why is not None:
                    self.system.pin([symbol], why)
                shape.append(size(self.system, self.system.value(symbol)))
            meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=False)
            copies[id(tensor)] = self.sized[key] = meta
        symbolic = clone(self.model, copies)
        chosen = set(self.attributes)
        for layer, module in symbolic.named_modules():
            depthwise = isinstance(module, ConvNd) and (1 < module.groups == module.in_channels)
            if depthwise and within(layer, self.fixed) is None:
                chosen.add((layer, "groups"))
        for layer, name in sorted(chosen):
            hint = dict(sizes_in(symbolic.get_submodule(layer)))[name]
            symbol = self.system.fresh(hint)
            self.values[layer, name] = {(symbol,): 1}
            self.system.soft.add(symbol)
            set_size(symbolic, layer, name, size(self.system, self.values[layer, name]))
        for module in symbolic.modules():
            sync_attributes(module)
        return symbolic

    def _settle(self, used: set[int]) -> None:
        """Pin what is left open: what nothing read, what is in no tensor, what is not quadratic."""
        system = self.system
        for symbol, where in self.symbols.items():
            if id(self.sized[where.tensor]) not in used:
                system.pin_value({(symbol,): 1}, "never used in forward")
        for poly in (self.run.activations, *self.run.flops.values()):
            system.transparent(poly)
        shaping = {s for symbol in self.symbols for s in symbols_of(system.value(symbol))}
        for (layer, name), poly in self.values.items():
            loose = symbols_of(system.canonical(poly)) - shaping
            system.pin(sorted(loose), f"attribute {join(layer, name)!r}, which no tensor repeats")
        costs = [*self.run.flops.values(), self.run.activations, *map(numel, self.sized.values())]
        while high := [m for poly in costs for m in system.canonical(poly) if len(m) > 2]:
            # Most often a number of tokens that are parameters, which every layer multiplies.
            powers = Counter(s for monomial in high for s in monomial)
            worst = max(powers, key=lambda s: (powers[s], s))
            system.pin([worst], "the cost is not quadratic in it")

    def collect(self) -> Trace:
        """What the run told, in terms of axes."""
        used = self.run.used
        if any(id(tensor) not in used for tensor in self.sized.values()):
            # Some layers run in training alone (auxiliary heads): let them say what they tie.
            again = execute(self.symbolic, self.system, self.inputs, self.fixed, train=True)
            used = used | again.used
        self._settle(used)
        return _collect(self.system, self.symbols, self.sized, self.values, self.run)


def has_content(module: nn.Module, name: str, buffer: Tensor) -> bool:
    """Whether a buffer holds more than one value, so that it has no like at other sizes."""
    if is_estimate(module, name):
        return False
    if not buffer.is_floating_point():
        return True
    return buffer.device.type != "meta" and bool((buffer != buffer.flatten()[:1]).any())


def _collect(
    system: System,
    symbols: Mapping[int, _Symbol],
    sized: Mapping[str, Tensor],
    attributes: Mapping[tuple[str, str], Poly],
    run: SymbolicInterpreter,
) -> Trace:
    owners: dict[int, list[int]] = {}  # free symbol -> the symbols that are a multiple of it
    layers: dict[int, dict[str, None]] = {}  # free symbol -> the layers it shapes
    for symbol, where in symbols.items():
        value = system.value(symbol)
        for free in symbols_of(value):
            layers.setdefault(free, {})[where.layer] = None
            if len(value) == 1 and len(next(iter(value))) == 1:
                owners.setdefault(free, []).append(symbol)

    ordered: list[tuple[int, int]] = []  # (symbol that names the axis, free symbol)
    for free in layers:
        named = owners.get(free) or [min(s for s in symbols if free in symbols_of(system.value(s)))]
        makers = [s for s in named if symbols[s].makes]
        ordered.append((min(makers or named), free))
    ordered.sort()
    axes: list[TracedAxis] = []
    for namer, free in ordered:
        where = symbols[namer]
        name = where.layer or where.tensor
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

    flops: Poly = {}
    for poly in run.flops.values():
        flops = add(flops, poly)
    params: Poly = {}
    for tensor in sized.values():
        if isinstance(tensor, nn.Parameter):
            params = add(params, numel(tensor))
    return Trace(
        axes=tuple(axes),
        pinned=_pinned(system, symbols),
        shapes={name: tuple(over_axes(poly_of(n)) for n in t.shape) for name, t in sized.items()},
        attributes={where: over_axes(poly) for where, poly in attributes.items()},
        macs=_halved(over_axes(flops)),
        params=over_axes(params),
        activations=over_axes(run.activations),
        layer_macs={layer: _halved(over_axes(poly)) for layer, poly in run.flops.items()},
    )


def _halved(flops: Poly) -> Poly:
    assert all(c % 2 == 0 for c in flops.values()), "torch counts two FLOPs a MAC"
    return {m: c // 2 for m, c in flops.items()}


def _pinned(system: System, symbols: Mapping[int, _Symbol]) -> tuple[Pinned, ...]:
    reasons = {pin.symbol: pin.reason for pin in system.pins}
    grouped: dict[int, list[int]] = {}
    for symbol in symbols:
        if as_constant(system.value(symbol)) is not None:
            root = symbol
            while root not in reasons:
                root = min(system.parents[root], key=lambda s: s not in reasons)
            grouped.setdefault(root, []).append(symbol)
    rows: dict[tuple[str, int, str], list[_Symbol]] = {}
    for root, members in grouped.items():
        first = symbols[members[0]]
        row = first.layer or first.tensor, system.hints[members[0]], reasons[root]
        rows.setdefault(row, []).extend(symbols[s] for s in members)
    return tuple(
        Pinned(
            *row,
            layers=tuple(dict.fromkeys(where.layer for where in found)),
            places=tuple((where.tensor, where.dim) for where in found),
        )
        for row, found in rows.items()
    )


def trace_to_json(trace: Trace) -> dict[str, Any]:
    """A trace as JSON values."""
    return {
        "axes": [[a.name, a.base, a.divisor, a.layers, a.maker] for a in trace.axes],
        "pinned": [[p.name, p.size, p.reason, p.layers, p.places] for p in trace.pinned],
        "shapes": [[name, *map(_terms, shape)] for name, shape in trace.shapes.items()],
        "attributes": [[*where, _terms(poly)] for where, poly in trace.attributes.items()],
        "macs": _terms(trace.macs),
        "params": _terms(trace.params),
        "activations": _terms(trace.activations),
        "layer_macs": [[layer, _terms(poly)] for layer, poly in trace.layer_macs.items()],
    }


def trace_from_json(content: Mapping[str, Any]) -> Trace:
    """The trace that :func:`trace_to_json` was given."""
    return Trace(
        axes=tuple(
            TracedAxis(name, base, unit, tuple(layers), (maker[0], maker[1]))
            for name, base, unit, layers, maker in content["axes"]
        ),
        pinned=tuple(
            Pinned(name, size, reason, tuple(layers), tuple((key, dim) for key, dim in places))
            for name, size, reason, layers, places in content["pinned"]
        ),
        shapes={name: tuple(map(_poly, shape)) for name, *shape in content["shapes"]},
        attributes={(layer, name): _poly(terms) for layer, name, terms in content["attributes"]},
        macs=_poly(content["macs"]),
        params=_poly(content["params"]),
        activations=_poly(content["activations"]),
        layer_macs={layer: _poly(terms) for layer, terms in content["layer_macs"]},
    )


def _terms(poly: Poly) -> list[list[int]]:
    return [[coefficient, *monomial] for monomial, coefficient in poly.items()]


def _poly(terms: Iterable[list[int]]) -> Poly:
    return {tuple(monomial): coefficient for coefficient, *monomial in terms}
