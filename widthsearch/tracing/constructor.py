"""The user's own constructors, called for any widths of a trace.

What a constructor computes from its arguments (scales, contents, initialisation) is then what the
user's class has at these widths. The analysis that this takes runs once, when it is first needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.construction import Recorder
from widthsearch.modules.replay import ConstructionError, Replay
from widthsearch.modules.solving import Where
from widthsearch.modules.tree import (
    SIZED,
    clone,
    join,
    set_size,
    sizes_in,
    sync_attributes,
    tensors_of,
)
from widthsearch.tracing.polynomials import Poly, System, as_constant, evaluate
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
        recorder: The recorder of the model's constructor calls.
        trace: The model's trace.
        template: The model on the meta device.
    """

    recorder: Recorder
    trace: Trace
    template: nn.Module
    _replay: Replay | ConstructionError | None = field(default=None, repr=False)

    @property
    def replay(self) -> Replay | None:
        """How the function makes the model at other sizes; None if it cannot."""
        if self._replay is None:
            try:
                self._replay = Replay(self.recorder, *self._samples())
            except ConstructionError as error:
                self._replay = error
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
            None where the constructors refuse such sizes.
        """
        if self.replay is None:
            return None
        sizes: dict[Where, int] = {
            (key, d): n for key, s in shapes.items() for d, n in enumerate(s)
        }
        sizes.update(attributes)
        try:
            return self.replay.build(sizes, arguments)
        except ConstructionError:
            return None

    def _samples(self) -> tuple[dict[Where, tuple[int, ...]], dict[Where, tuple[int, ...]]]:
        """The sizes at the base, at a multiple of each width, and at random widths.

        Returns:
            Those of tensors and attributes that the trace knows, and those that layers repeat.
        """
        rng = random.Random(0)
        base = self.trace.variables(self.trace.base)
        points = [base, [x * rng.choice((2, 3)) for x in base]]
        points += [[rng.randint(1 + x // 4, 3 + 2 * x) for x in base] for _ in range(3)]

        def at(poly: Poly) -> tuple[int, ...]:
            return tuple(evaluate(poly, x) for x in points)

        samples: dict[Where, tuple[int, ...]] = {
            (key, dim): at(poly)
            for key, shape in self.trace.shapes.items()
            for dim, poly in enumerate(shape)
        }
        samples.update({where: at(poly) for where, poly in free_attributes(self.trace)})
        symbolic = with_symbols(self.template, self.trace, System(hints=list(base)))
        repeated = {
            (layer, name): at(poly_of(value))
            for layer, module in symbolic.named_modules()
            if isinstance(module, SIZED)
            for name, value in sizes_in(module, torch.SymInt)
        }
        return samples, repeated


def free_attributes(trace: Trace) -> Iterator[tuple[tuple[str, str], Poly]]:
    """The attributes that follow a width."""
    return ((where, p) for where, p in trace.attributes.items() if as_constant(p) is None)
