"""The user's own constructors, called for any widths of a trace.

What a constructor computes from its arguments (scales, contents, initialisation) is then what the
user's class has at these widths. The analysis that this takes runs once, when it is first needed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.errors import SpaceError, TraceError
from widthsearch.modules.construction import Recording
from widthsearch.modules.probing import Where, shapes_of
from widthsearch.modules.replay import ConstructionError, Replay
from widthsearch.modules.source import names_in_forward
from widthsearch.modules.tree import (
    SIZED,
    aliases_of,
    clone,
    is_synced,
    join,
    own_configurations,
    set_size,
    sharing,
    sizes_in,
    sync_attributes,
    tensors_of,
)
from widthsearch.tracing.interpreter import TraceInterrupted, execute, place_of
from widthsearch.tracing.polynomials import Poly, System, as_constant, evaluate, total
from widthsearch.tracing.symbolic_ints import poly_of, size
from widthsearch.tracing.trace import Trace


def resized(
    template: nn.Module, trace: Trace, tensors: Mapping[int, Tensor], value: Callable[[Poly], Any]
) -> nn.Module:
    """A copy of a model with other tensors, and its attributes set to fit them.

    Args:
        template: A model of the trace, at any widths.
        trace: The trace.
        tensors: The replacement of each tensor of the template, by the tensor's id.
        value: Evaluates the polynomial of an attribute.
    """
    network = clone(template, tensors)
    for (layer, attribute), poly in trace.attributes.items():
        set_size(network, layer, attribute, value(poly))
    for module in network.modules():
        sync_attributes(module)
    return network


def with_symbols(template: nn.Module, trace: Trace, system: System) -> nn.Module:
    """A copy of a model on meta tensors, whose sizes are the trace's polynomials."""
    copies: dict[int, Tensor] = {}
    for _, layer, name, tensor in tensors_of(template):
        shape = [size(system, n) for n in trace.shapes[join(layer, name)]]
        meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=False)
        copies[id(tensor)] = meta
    return resized(template, trace, copies, lambda poly: size(system, poly))


@dataclass(eq=False)
class Constructor:
    """Constructs networks of a traced model.

    Args:
        recording: The model's constructor calls.
        trace: The model's trace.
        template: The model on the meta device.
        inputs: One sample's shape, as the trace takes it.

    Attributes:
        failed_at: The line at which the function fails at other sizes, if it does.

    Example:
        >>> from widthsearch.modules.construction import record
        >>> from widthsearch.tracing.traced_model import TracedModel
        >>> class Scaled(nn.Sequential):
        ...     def __init__(self, width=16):
        ...         super().__init__(nn.Linear(3, width), nn.Linear(width, 2))
        ...         self.scale = width**-0.5
        >>> model, recorder = record(Scaled)
        >>> constructor = TracedModel.of(model, (3,), "net", recorder, None).constructor
        >>> shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}
        >>> constructor.build(shapes, {}).scale
        0.5
    """

    recording: Recording
    trace: Trace
    template: nn.Module
    inputs: Any
    failed_at: str = ""
    _replay: Replay | ConstructionError | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "examples"}

    @property
    def replay(self) -> Replay | None:
        """How the function makes the model at other sizes; None if it cannot."""
        if self._replay is None:
            for values in (False, True):  # some constructors read values, which takes longer
                try:
                    self._replay = Replay(self.recording, *self._samples(), values=values)
                    break
                except ConstructionError as error:
                    self.failed_at = place_of(error.__cause__ or error)
                    self._replay = error.with_traceback(None)
                    error.__cause__ = error.__context__ = None  # they would keep modules alive
        return None if isinstance(self._replay, ConstructionError) else self._replay

    @property
    def failure(self) -> str | None:
        """Why it cannot."""
        return None if self.replay is not None else str(self._replay)

    def build(
        self,
        shapes: Mapping[str, Sequence[int]],
        attributes: Mapping[tuple[str, str], int],
        arguments: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> nn.Module | None:
        """A network with these sizes; ``arguments`` as for :meth:`Replay.build`.

        Returns:
            None if :attr:`replay` is None.

        Raises:
            SpaceError: The constructors refuse such sizes.
        """
        if self.replay is None:
            return None
        kept = self.kept  # it may hold numbers that the constructors are given
        try:
            network = self.replay.build(self._sizes(shapes, attributes), arguments)
            if shapes_of(network).keys() != shapes.keys():
                raise ConstructionError(f"{type(network).__name__} would have other tensors")
        except ConstructionError as error:
            raise SpaceError(
                f"networks are made by the model's own constructors, but they refuse these widths: "
                f"{error}; choose widths that they take (by `step`), or pin the axis"
            ) from error
        wanted = {
            place: value
            for at, value in {**kept, **attributes}.items()
            for place in sharing(self.template, at)
        }
        own_configurations(network, wanted)
        for (layer, name), value in wanted.items():
            set_size(network, layer, name, value)
        return network

    def plain(
        self, shapes: Mapping[str, Sequence[int]], attributes: Mapping[tuple[str, str], int]
    ) -> nn.Module | None:
        """The model by its outermost constructors' arguments alone: see :meth:`Replay.plain`."""
        if self.replay is None:
            return None
        _ = self.kept  # as in `build`
        return self.replay.plain(self._sizes(shapes, attributes))

    def _sizes(
        self, shapes: Mapping[str, Sequence[int]], attributes: Mapping[tuple[str, str], int]
    ) -> dict[Where, int]:
        shared = dict(aliases_of(self.template))
        every = {**shapes, **{alias: shapes[key] for alias, key in shared.items()}}
        sizes: dict[Where, int] = {(key, d): n for key, s in every.items() for d, n in enumerate(s)}
        sizes.update(attributes)  # type: ignore[arg-type]
        return sizes

    @property
    def example(self) -> nn.Module | None:
        """A network with other widths throughout, on the meta device."""
        return next((network for network, _ in self.examples), None)

    @cached_property
    def examples(self) -> list[tuple[nn.Module, list[int]]]:
        """Such networks, each with its widths: a number may be the base's at some by chance."""
        found: list[tuple[nn.Module, list[int]]] = []
        if (replay := self.replay) is None:
            return found
        _, *two, last = self._points()
        for number, x in enumerate((*two[:2], last)):
            with suppress(ConstructionError, TraceError):
                made = replay.example(number)
                found.append((clone(made, {id(t): to_meta(t) for *_, t in tensors_of(made)}), x))
        return found

    @cached_property
    def changed(self) -> dict[tuple[str, str], int]:
        """Integers that forward may read, that change with widths, and that the trace fixes.

        Returns:
            Per layer and attribute, the value in the base.
        """
        free = dict(free_attributes(self.trace))
        numbers = {
            (layer, name): value
            for layer, module in self.template.named_modules()
            for name, value in sizes_in(module)
            if value > 1 and (layer, name) not in free and _is_read(module, name.partition("[")[0])
        }
        changed = {
            (layer, name)
            for network, _ in (self.examples if numbers else ())
            for layer, module in network.named_modules()
            for name, value in sizes_in(module)
            if numbers.get((layer, name), value) != value
        }
        return {where: value for where, value in numbers.items() if where in changed}

    @property
    def misfits(self) -> frozenset[tuple[str, str]]:
        """Free attributes for which the constructors compute other numbers than the trace.

        Example: of ``before = (width - 4) // 2`` and ``behind = width - 4 - before`` channels that
        are added, the trace lets each number follow the width; the constructor changes both.
        """
        free = dict(free_attributes(self.trace))
        x = self._points()[0]
        base = {where: evaluate(poly, x) for where, poly in free.items()}
        other: set[tuple[str, str]] = set()  # than the trace has
        changed: set[tuple[str, str]] = set()  # those that no literal gives
        for network, x in self.examples if free else ():
            made = {(layer, n): v for layer, m in network.named_modules() for n, v in sizes_in(m)}
            other |= {at for at, p in free.items() if made.get(at, base[at]) != evaluate(p, x)}
            changed |= {at for at, value in base.items() if made.get(at, value) != value}
        asked = self.replay.misfits if free and self.replay else set()
        return frozenset((other & changed) | (free.keys() & asked))

    @cached_property
    def kept(self) -> dict[tuple[str, str], int]:
        """Those of :attr:`changed` that keep the base's value, or costs would be others."""
        kept = self.changed
        if not kept or all(itertools.starmap(self._costs_agree, self.examples)):
            return {}
        if self.replay is not None and self.replay.hold({layer for layer, _ in kept}):
            del self.examples, self.changed  # they were made before that
            return self.changed
        return kept

    def _costs_agree(self, network: nn.Module, x: Sequence[int]) -> bool:
        """Whether a network costs what the trace predicts at its widths."""
        try:
            run = execute(network, System(), self.inputs, {}, train=False)
        except TraceInterrupted:
            return False
        counted = as_constant(total(run.flops.values())), as_constant(run.activations)
        return counted == (2 * evaluate(self.trace.macs, x), evaluate(self.trace.activations, x))

    def _points(self) -> list[list[int]]:
        """The base, and other values of the polynomials' variables: multiples, any, and odd ones.

        Constructors may ask for even widths, or for whole blocks. So the first two are multiples
        of the base, and of the largest power of two up to 8 in it. Together they tell any two
        variables apart: sizes that are equal at the base may be different ones. The last is twice
        the base: widths that one argument gives are equal there too.
        """
        rng = random.Random(0)
        base = self.trace.variables(self.trace.base)
        multiples, blocks = [], []
        seen: set[tuple[int, Fraction]] = set()
        for x in base:
            unit = math.gcd(x, 8)
            for attempt in itertools.count():
                multiple = rng.randint(2, 3 + attempt // 8)
                block = unit * rng.randint(1, 2 + 2 * x // unit)
                if (pair := (multiple, Fraction(block, x))) not in seen:
                    break
            seen.add(pair)
            multiples.append(multiple * x)
            blocks.append(block)
        anywhere = [[rng.randint(1 + x // 4, 3 + 2 * x) for x in base] for _ in range(4)]
        twice = [2 * x for x in base]
        return [base, multiples, blocks, *anywhere, [x | 1 for x in anywhere[0]], twice]

    def _samples(self) -> tuple[dict[Where, tuple[int, ...]], dict[Where, tuple[int, ...]]]:
        """The sizes at the base, at a multiple of each width, and at random widths.

        Returns:
            Those of tensors and attributes that the trace knows, and those that layers repeat.
        """
        points = self._points()

        def at(poly: Poly) -> tuple[int, ...]:
            return tuple(evaluate(poly, x) for x in points)

        names = {key: key for key in self.trace.shapes} | dict(aliases_of(self.template))
        samples: dict[Where, tuple[int, ...]] = {
            (name, dim): at(poly)
            for name, key in names.items()
            for dim, poly in enumerate(self.trace.shapes[key])
        }
        samples.update({where: at(poly) for where, poly in free_attributes(self.trace)})
        symbolic = with_symbols(self.template, self.trace, System(hints=points[0]))
        repeated: dict[Where, tuple[int, ...]] = {
            (layer, name): at(poly_of(value))
            for layer, module in symbolic.named_modules()
            if isinstance(module, SIZED)
            for name, value in sizes_in(module, torch.SymInt)
        }
        return samples, repeated


def _is_read(module: nn.Module, name: str) -> bool:
    """Whether forward may read an integer that its tensors do not give."""
    if isinstance(module, nn.GroupNorm):
        return name == "num_groups"
    synced = is_synced(module) or type(module).__module__.startswith("torch.")
    return not synced and name in names_in_forward(module)


def to_meta(tensor: Tensor) -> Tensor:
    """A tensor's like without values."""
    meta = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, requires_grad=tensor.requires_grad)
    return meta


def free_attributes(trace: Trace) -> Iterator[tuple[tuple[str, str], Poly]]:
    """The attributes that follow a width."""
    return ((where, p) for where, p in trace.attributes.items() if as_constant(p) is None)
