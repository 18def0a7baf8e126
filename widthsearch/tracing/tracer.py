"""Traces a model: finds its free widths, the shape of every tensor, and its cost.

Every size of every parameter and buffer becomes a symbol, and the model runs once on meta tensors
of these sizes. Each equation that the run imposes couples two layers; the symbols that remain free
are the axes. FLOPs are counted during the run by torch's own formulas, so they are polynomials in
the symbols.

Example: in ``Linear(5, 8)``, ``ReLU``, ``Linear(8, 3)`` the weights have the sizes ``s0 × s1`` and
``s2 × s3``. The input imposes ``s1 = 5``, the product in the second layer ``s3 = s0``, and the
output pins ``s2 = 3``. One axis is left: ``s0``, with a base of 8 channels, named after layer 0.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.errors import TraceError, first_line
from widthsearch.modules.initialisation import is_uniform
from widthsearch.modules.solving import Follows
from widthsearch.modules.tree import (
    clone,
    holders_of,
    is_estimate,
    is_synced,
    join,
    owner_of,
    set_size,
    sizes_held_by,
    sizes_in,
    sync_attributes,
    tensors_of,
)
from widthsearch.torch_internals import ConvNd, buffers_of, tree_map_only
from widthsearch.tracing.collection import SizeSymbol, collect, numel
from widthsearch.tracing.elimination import solved
from widthsearch.tracing.inputs import Inputs, as_inputs
from widthsearch.tracing.interpreter import TraceInterrupted, execute
from widthsearch.tracing.polynomials import (
    Poly,
    System,
    add,
    as_constant,
    constant,
    evaluate,
    multiply,
    substitute,
    symbols_of,
)
from widthsearch.tracing.refusals import forward_error, refuse_model
from widthsearch.tracing.symbolic_ints import size
from widthsearch.tracing.trace import Trace


@dataclass(frozen=True)
class Demands:
    """What a model's constructors ask of its trace.

    Attributes:
        astray: Tensors whose content does not follow their sizes, each with the reason; None if
            that of no buffer does.
        derived: Attributes that they compute from widths, by layer and name.
        kept: Attributes that are not made symbolic, since they compute them otherwise.
        ties: Numbers that one argument gives, as pairs of the sizes that they follow.

    Example:
        >>> Demands(astray={"fc.weight": "content that fits the base's width alone"}).kept
        frozenset()
    """

    astray: Mapping[str, str] | None = None
    derived: Set[tuple[str, str]] = frozenset()
    kept: Set[tuple[str, str]] = frozenset()
    ties: Sequence[tuple[Follows, Follows]] = ()


def trace(model: nn.Module, inputs: Inputs, demands: Demands = Demands()) -> Trace:
    """Run ``model`` on symbolic widths.

    Modules store sizes in attributes (``self.hidden_dim``) and use them in forward, which fixes a
    width. After such a run the model runs again with these attributes symbolic, and the run with
    the most free widths is kept. A module whose code needs integers gets integers: its widths are
    pinned, and the rest of the model is traced around it.

    Args:
        model: Any module; neither it nor its tensors are changed.
        inputs: One sample's shape, e.g. ``(3, 224, 224)``; see :data:`Inputs` for several inputs.
        demands: What the model's constructors ask of the trace.

    Raises:
        TraceError: The model cannot run on meta tensors (the message names the module and the
            operation), or not on such an input.
    """
    inputs = as_inputs(inputs)
    refuse_model(model)
    fixed: dict[str, str] = {}
    while True:
        try:
            return _sound(model, inputs, fixed, demands)
        except TraceInterrupted as stop:
            if not stop.layer or reason_within(stop.layer, fixed) is not None:
                if (failure := forward_error(model, inputs)) is not None:
                    shown = tree_map_only(Tensor, lambda t: f"{t.dtype} {(*t.shape,)}", inputs)
                    raise TraceError(
                        f"the model fails on its input {shown!r}: {first_line(failure)}; give one "
                        "sample as the model takes it: a shape without the batch, or a tensor "
                        "where the dtype matters"
                    ) from failure
                raise TraceError(str(stop)) from stop.__cause__
            fixed = {**fixed, stop.layer: stop.reason}


def _sound(
    model: nn.Module,
    inputs: Any,
    fixed: Mapping[str, str],
    demands: Demands,
) -> Trace:
    """The trace of the freest attempt in which no plain number taken from a width is a size.

    Whether a number that code took with ``float()`` or ``int()`` only scales values is found by
    runs at other widths. If it does not, the lines that take numbers pin their widths: one of
    them if that is enough, else all.
    """
    freest = _freest(model, inputs, fixed, demands)
    taken = tuple(freest.system.taken)
    found = freest.collect()
    if not taken or freest.holds(found):
        return found
    for strict in dict.fromkeys([*((line,) for line in taken), taken]):
        attempt = _freest(model, inputs, fixed, demands, frozenset(strict))
        if attempt.holds(trace := attempt.collect()):
            return trace
    return found


def _freest(
    model: nn.Module,
    inputs: Any,
    fixed: Mapping[str, str],
    demands: Demands,
    strict: frozenset[str] = frozenset(),
) -> _Attempt:
    """The attempt with the most free sizes, over choices of attributes to make symbolic."""
    begin = partial(_Attempt, model, inputs, fixed=fixed, demands=demands, strict=strict)
    best = latest = begin(frozenset(demands.derived - demands.kept))
    tried = frozenset(demands.kept)
    while repeated := latest.repeated_sizes(tried):
        tried |= repeated
        try:
            latest = begin(latest.attributes | repeated)
        except TraceInterrupted:  # the code needs an integer there
            continue
        if latest.freedom < best.freedom:
            break  # one of them was no size: made symbolic, it couples sizes that are independent
        if latest.freedom == best.freedom:  # one attribute may pin what another one frees
            for part in _by_name(repeated):
                with suppress(TraceInterrupted):
                    attempt = begin(best.attributes | part)
                    if attempt.freedom > best.freedom:
                        best = latest = attempt
                        break
        else:
            best = latest
    for group in best.sizes_elsewhere(tried):
        with suppress(TraceInterrupted):
            attempt = begin(best.attributes | group)
            if attempt.freedom > best.freedom:
                best = attempt
    return best


def _by_name(places: Set[tuple[str, str]]) -> list[frozenset[tuple[str, str]]]:
    """The attributes grouped by name; an empty list if all have the same name."""
    parts: dict[str, set[tuple[str, str]]] = {}
    for layer, name in sorted(places):
        parts.setdefault(name.partition("[")[0], set()).add((layer, name))
    return [frozenset(part) for part in parts.values()] if len(parts) > 1 else []


def reason_within(layer: str, fixed: Mapping[str, str]) -> str | None:
    """The reason for which a layer, or a module that contains it, runs on integers; else None."""
    for name, reason in fixed.items():
        if layer == name or layer.startswith(f"{name}."):
            return reason
    return None


class _Attempt:
    """One run with a choice of symbolic attributes and of layers that run on integers."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        attributes: frozenset[tuple[str, str]],
        fixed: Mapping[str, str],
        demands: Demands,
        strict: frozenset[str],
    ) -> None:
        self.model, self.inputs, self.attributes, self.fixed = model, inputs, attributes, fixed
        self.demands = demands
        self.system = System(strict=strict)
        self.symbols: dict[int, SizeSymbol] = {}
        self.sized: dict[str, Tensor] = {}
        self.values: dict[tuple[str, str], Poly] = {}
        self.contents: dict[int, str] = {}
        self.symbolic = self._symbolic()
        self.run = execute(self.symbolic, self.system, inputs, fixed, train=False)
        for pair in demands.ties:
            self._tie(*pair)
        for symbol, content in self.contents.items():  # after the run, which names what they tie
            self.system.pin_value({(symbol,): 1}, content)

    def _tie(self, a: Follows, b: Follows) -> None:
        """Impose that one number gives two sizes, each a multiple of it beside an offset.

        A size is one of a tensor, or an attribute that is symbolic in this attempt.
        """
        sizes: dict[Any, Poly] = {(of.tensor, of.dim): {(s,): 1} for s, of in self.symbols.items()}
        sizes.update(self.values)
        if a.where in sizes and b.where in sizes:
            # (size_a - offset_a) / slope_a = (size_b - offset_b) / slope_b, in whole numbers
            factors = b.slope, -a.slope, a.slope * b.offset - b.slope * a.offset
            whole = math.lcm(*(factor.denominator for factor in factors))
            of_a, of_b, rest = (int(factor * whole) for factor in factors)
            system = self.system
            scaled = multiply(system.canonical(sizes[a.where]), constant(of_a))
            equation = add(scaled, system.canonical(sizes[b.where]), of_b)
            system.impose(add(equation, constant(rest)))

    @property
    def freedom(self) -> int:
        """The number of tensor sizes that are not fixed."""
        values = (self.system.value(symbol) for symbol in self.symbols)
        return sum(as_constant(value) is None for value in values)

    def repeated_sizes(self, tried: Set[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """Integer attributes of the modules in which a width was fixed.

        Attributes with the value of a fixed width come first: only if there are none left, all
        other integers of these modules are returned.
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

    def sizes_elsewhere(self, tried: Set[tuple[str, str]]) -> list[frozenset[tuple[str, str]]]:
        """Integers of any module, or of an object that it holds, with the value of a fixed width.

        A module may be given its parent's number as an argument, or read a configuration.

        Returns:
            Places of one name and one value, which are made symbolic together; the largest first.
        """
        fixed = {
            self.system.hints[pin.symbol]
            for pin in self.system.pins
            if pin.reason in self.run.lines
        } - {1}
        groups: dict[tuple[str, int], set[tuple[str, str]]] = {}
        seen: set[tuple[int, str]] = set()
        running = {*self.run.fixed_in, ""}
        for layer, module in self.model.named_modules() if fixed else ():
            own = [] if is_synced(module) else sizes_in(module)
            around = any(at.startswith(f"{layer}.") or not layer for at in running)
            # Small numbers of other modules are strides and dims.
            integers = ((0, name, n) for name, n in own if around or n >= 8)
            for holder, name, value in (*integers, *sizes_held_by(module)):
                key = holder, name.rpartition(".")[2]
                if value in fixed and (layer, name) not in tried and key not in seen:
                    seen.update([key] if holder else ())
                    groups.setdefault((key[1], value), set()).add((layer, name))
        largest = sorted(groups, key=lambda key: -key[1])[:8]  # each costs a run
        return [frozenset(groups[key]) for key in largest]

    def _symbolic(self) -> nn.Module:
        """A copy of the model on meta tensors with symbolic sizes."""
        copies: dict[int, Tensor] = {}
        learned = {n for p in self.model.parameters() for n in p.shape if n >= 4}
        learned |= {n // 2 for n in learned if n % 2 == 0 and n >= 16}  # sines beside cosines
        followed = frozenset() if self.demands.astray is None else learned
        holders = holders_of(self.model)
        for module, layer, name, tensor in tensors_of(self.model):
            owner = owner_of(layer)
            numbers = fixed_dims(module, name, tensor, followed)
            why = reason_within(owner, self.fixed)
            layer_of = self.model.get_submodule(owner) if owner != layer else module
            convolution = isinstance(layer_of, ConvNd) and tensor.dim() > 2
            output = 1 if convolution and layer_of.transposed else 0
            key = join(layer, name)
            shape: list[torch.SymInt | int] = []
            for dim, n in enumerate(tensor.shape):
                if n == 1 or dim in numbers or (convolution and dim > 1):
                    shape.append(n)
                    continue
                symbol = self.system.fresh(n)
                makes = dim == output and tensor.dim() > 1 and isinstance(tensor, nn.Parameter)
                self.symbols[symbol] = SizeSymbol(holders[id(tensor)], key, dim, makes)
                content = (self.demands.astray or {}).get(key)
                if why is not None:
                    self.system.pin([symbol], why)
                elif content is not None and not is_uniform(tensor, [dim]):
                    self.contents[symbol] = content
                shape.append(size(self.system, self.system.value(symbol)))
            meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=False)
            copies[id(tensor)] = self.sized[key] = meta
        symbolic = clone(self.model, copies)
        chosen = set(self.attributes)
        for layer, module in symbolic.named_modules():
            if reason_within(layer, self.fixed) is not None:
                continue
            if isinstance(module, ConvNd) and 1 < module.groups == module.in_channels:
                chosen.add((layer, "groups"))
        for layer, name in sorted(chosen - self.demands.kept):
            owner_module = symbolic.get_submodule(layer)
            held = ((place, value) for _, place, value in sizes_held_by(owner_module))
            hint = dict((*sizes_in(owner_module), *held))[name]
            symbol = self.system.fresh(hint)
            self.values[layer, name] = {(symbol,): 1}
            self.system.soft.add(symbol)
            set_size(symbolic, layer, name, size(self.system, self.values[layer, name]))
        for module in symbolic.modules():
            sync_attributes(module)
        return symbolic

    def _settle(self, used: set[int]) -> None:
        """Pin sizes of unused tensors, attributes in no tensor's shape, and cubic terms."""
        system = self.system
        for symbol, where in self.symbols.items():
            if id(self.sized[where.tensor]) not in used:
                system.pin_value({(symbol,): 1}, "never used in forward")
        for poly in (self.run.activations, *self.run.flops.values()):
            system.transparent(poly)
        shaping = {s for symbol in self.symbols for s in symbols_of(system.value(symbol))}
        for (layer, name), poly in self.values.items():
            loose = symbols_of(system.canonical(poly)) - shaping
            system.pin(sorted(loose), f"attribute {join(layer, name)!r} is no tensor's size")
        costs = [*self.run.flops.values(), self.run.activations, *map(numel, self.sized.values())]
        while high := [m for poly in costs for m in system.canonical(poly) if len(m) > 2]:
            # Most often a number of tokens that are parameters, which is a factor of every layer,
            # or a number of experts, which is the smallest factor.
            powers = Counter(s for monomial in high for s in monomial)
            worst = max(powers, key=lambda s: (powers[s], -system.hints[s], s))
            system.pin([worst], "the cost is not quadratic in it")
        self._tell_apart()

    def _tell_apart(self) -> None:
        """Tie or pin symbols of attributes that only stand together in sizes.

        Example: zeros before and after a stream, ``F.pad(x, (0, 0, before, after))``, of a layer
        with ``width = before + after + x.shape[1]``. Any layer has the width that both make
        together, so they are one axis if they are equal in the model as given.
        """
        system = self.system
        while self.values:
            sizes = [value for s in self.symbols if symbols_of(value := system.value(s))]
            alone = {s for value in sizes if len(value) == 1 for (s, *rest) in value if not rest}
            free = {s for value in sizes for s in symbols_of(value)}
            loose = free - alone and free - solved((p, system.hint(p)) for p in sizes).keys()
            if not loose:
                return
            pair = next(
                (
                    (a, b)
                    for a, b in itertools.combinations(sorted(loose), 2)
                    if system.hints[a] == system.hints[b] and _exchangeable(a, b, sizes)
                ),
                None,
            )
            if pair is None:
                system.pin([max(loose)], "no tensor's size tells it from another width")
            else:
                system.impose({(pair[0],): 1, (pair[1],): -1})

    def holds(self, trace: Trace) -> bool:
        """Whether the model costs what its trace predicts at narrower and at wider widths."""
        base = trace.variables(trace.base)
        for x in (
            [max(2, n // 8) for n in base],  # of width 1, torch.einsum makes uncounted products
            [n // 2 + 1 + i % 2 for i, n in enumerate(base)],
            [2 * n for n in base],
        ):
            tensors: dict[int, Tensor] = {}
            for _, layer, name, old in tensors_of(self.model):
                shape = [evaluate(poly, x) for poly in trace.shapes[join(layer, name)]]
                new = torch.empty(shape, dtype=old.dtype, device="meta")
                tensors[id(old)] = (
                    nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
                )
            network = clone(self.model, tensors)
            for (layer, name), poly in trace.attributes.items():
                set_size(network, layer, name, evaluate(poly, x))
            for module in network.modules():
                sync_attributes(module)
            try:
                run = execute(network, System(), self.inputs, {}, train=False)
            except TraceInterrupted:
                return False
            macs = {layer: evaluate(p, x) for layer, p in trace.layer_macs.items()}
            found = {layer: evaluate(p, ()) // 2 for layer, p in run.flops.items()}
            activations = evaluate(run.activations, ()), evaluate(trace.activations, x)
            if found != macs or run.outputs != self.run.outputs or activations[0] != activations[1]:
                return False
        return True

    def collect(self) -> Trace:
        """The trace: shapes and costs as polynomials over the axes."""
        used = self.run.used
        if any(id(tensor) not in used for tensor in self.sized.values()):
            # Some layers run only in training mode (auxiliary heads); they impose equations too.
            again = execute(self.symbolic, self.system, self.inputs, self.fixed, train=True)
            used = used | again.used
        self._settle(used)
        return collect(self.system, self.symbols, self.sized, self.values, self.run)


def _exchangeable(a: int, b: int, polys: Iterable[Poly]) -> bool:
    """Whether polynomials are the same with two symbols exchanged."""
    other = {a: b, b: a}
    return all(p == substitute(p, lambda s: {(other.get(s, s),): 1}) for p in polys)


def fixed_dims(module: nn.Module, name: str, tensor: Tensor, followed: Set[int]) -> frozenset[int]:
    """The dims of a buffer along which its content differs, so that it has no other sizes.

    Args:
        module: The module that holds the tensor.
        name: Its name there.
        tensor: A buffer or a parameter; parameters have no such dims.
        followed: Sizes of which the constructor may give the content too.
    """
    if name not in buffers_of(module) or is_estimate(module, name):
        return frozenset()
    dims = range(tensor.dim())
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return frozenset(dims)
    if tensor.device.type == "meta":
        return frozenset()
    return frozenset(
        d for d in dims if tensor.shape[d] not in followed and not is_uniform(tensor, [d])
    )
