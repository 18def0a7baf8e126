"""A model after its symbolic run: builds networks of its class at any widths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.construction import Recorder, kept_generators
from widthsearch.modules.initialisation import Scheme, is_fixed, is_uniform
from widthsearch.modules.replay import Content
from widthsearch.modules.solving import Follows
from widthsearch.modules.tree import clone, exchange, join, tensors_of
from widthsearch.tracing.constructor import Constructor, free_attributes, resized, to_meta
from widthsearch.tracing.leftovers import Leftover, leftovers
from widthsearch.tracing.polynomials import (
    Poly,
    as_constant,
    constant,
    evaluate,
    multiply,
    total,
)
from widthsearch.tracing.trace import Trace
from widthsearch.tracing.tracer import Demands, trace


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model and the trace of its symbolic run, before any width is chosen.

    Attributes:
        name: The model's name in messages.
        input_shape: The shape of one sample, e.g. ``(3, 32, 32)``, or a tree of several inputs.
        trace: The result of the symbolic run.
        template: The model as given, on the meta device (sizes without values).
        scheme: How tensors are filled that the model's constructors do not fill.
        constructor: The model's own constructors; None where a module was given.
        init: Called on each network after that.

    Example:
        >>> model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> traced = TracedModel.of(model, (5,), "mlp", None, None)
        >>> network = traced.build([6], seed=0)
        >>> network[0], network[2].weight.shape
        (Linear(in_features=5, out_features=6, bias=True), torch.Size([3, 6]))
    """

    name: str
    input_shape: Any
    trace: Trace
    template: nn.Module
    scheme: Scheme
    constructor: Constructor | None = None
    init: Callable[[nn.Module], Any] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        name: str,
        recorder: Recorder | None,
        init: Callable[[nn.Module], Any] | None,
        known: Trace | None = None,
    ) -> TracedModel:
        """Trace a model.

        Args:
            model: The model; it is left unchanged.
            inputs: One sample's shape, as :func:`~widthsearch.tracing.inputs.as_inputs` returns it.
            name: The model's name in messages.
            recorder: The recorder of its constructors; None where a module was given.
            init: Called on each network after its constructor.
            known: The model's trace, if it was traced before; then it is not run again.

        Raises:
            TraceError: The model cannot be traced.
        """
        recording = recorder and recorder.recording
        if recording is not None and not recording.complete:
            recorder = None  # a module was made before, and is no other's at other widths
        template = clone(model, {id(t): to_meta(t) for *_, t in tensors_of(model)})
        scheme = Scheme.of(model, recorder)

        astray: dict[str, str] = {}  # grows until the contents of all free widths follow them

        kept: set[tuple[str, str]] = set()
        ties: list[tuple[Follows, Follows]] = []
        partners: list[tuple[Follows, Follows]] = []

        def traced_with(derived: Set[tuple[str, str]]) -> TracedModel:
            while True:
                demands = Demands(astray if recorder else None, derived, kept, ties)
                traced = known or trace(model, inputs, demands)
                calls = Constructor(recording, traced, template, inputs) if recording else None
                found = cls(name, inputs, traced, template, scheme, calls, init)
                more, tied = ({}, []) if known else found._astray(model, recorder)
                if new := [pair for pair in tied if pair not in ties]:
                    ties.extend(new)
                    continue
                others = calls.misfits - kept if calls and not known else frozenset()
                if more.keys() <= astray.keys() and not others:
                    return found
                rivals = calls.replay.rivals if calls and calls.replay else []
                if new := [of for of in rivals if of not in ties and of[1].where in others]:
                    ties.extend(new)  # as its argument gives them; if that is not enough, they stay
                    continue
                if others and calls and calls.replay:
                    partners.extend(of for of in calls.replay.partners if of[1].where in others)
                astray.update(more)
                kept.update(others)

        found = traced_with(frozenset())
        if first := {of.where: (tensor, of) for tensor, of in reversed(partners)}:
            # An attribute that keeps the constructor's number may fix widths. As multiples of the
            # width that its argument gives too, it and they follow that width.
            before = set(kept), list(ties), dict(astray)
            kept -= first.keys()
            ties += first.values()
            tied = traced_with(frozenset())
            if _freedom(tied.trace) > _freedom(found.trace):
                found = tied
            else:
                (kept, ties, astray) = before
        if known is None and found.constructor and (derived := found.constructor.changed):
            other = traced_with(derived.keys())
            if _pinning(other.trace) <= _pinning(found.trace):
                return other
        return found

    def _astray(
        self, model: nn.Module, recorder: Recorder | None
    ) -> tuple[dict[str, str], list[tuple[Follows, Follows]]]:
        """Tensors with a free width whose content does not follow it, each with the reason.

        Also sizes that would have to change together for it to follow them.
        """
        suspects: dict[str, Content] = {}
        for module, layer, name, tensor in tensors_of(model):
            key = join(layer, name)
            free = [d for d, n in enumerate(self.trace.shapes[key]) if as_constant(n) is None]
            if key not in self.scheme.rules and not is_uniform(tensor, free):
                origin = recorder.origins.of(tensor) if recorder else None
                patched = origin.patched_along(tensor, free) if origin else None
                if patched or is_fixed(module, name, tensor, recorder):
                    writer, line = (origin.writer, origin.line) if origin else (None, "")
                    unlike = (d for d in free if patched or not is_uniform(tensor, [d]))
                    suspects[key] = Content(patched or writer, line, tuple(unlike), patched)
        if not suspects:
            return {}, []
        if self.constructor is None:
            why = "content of a module that was given as an object, without its constructor"
            return dict.fromkeys(suspects, why), []
        if self.constructor.replay is None:
            why = f"content of a model that cannot be constructed anew: {self.constructor.failure}"
            return dict.fromkeys(suspects, why), []
        found = self.constructor.replay.astray(suspects)
        return found, self.constructor.replay.tying({key: suspects[key] for key in found})

    @cached_property
    def leftovers(self) -> tuple[Leftover, ...]:
        """Numbers and contents that networks of other widths keep from the base."""
        return leftovers(self.template, self.trace, self.scheme, self.constructor)

    @property
    def weight_bytes(self) -> Poly:
        """Bytes of all parameters and buffers, by the element sizes of the model as given."""
        of = {
            join(layer, name): t.element_size() for _, layer, name, t in tensors_of(self.template)
        }
        shapes = self.trace.shapes.items()
        return total(functools.reduce(multiply, n, constant(of[key])) for key, n in shapes)

    def build(
        self,
        vector: Sequence[int],
        *,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        initialise: bool = True,
    ) -> nn.Module:
        """A new network at these widths, in training mode.

        Args:
            vector: One width per axis of the trace, in channels: a multiple of its divisor.
            seed: Seeds the initialisation and leaves the global generators as they were; None
                draws from them.
            device: Where the tensors are placed. Random numbers are the CPU's on every device.
            initialise: False leaves values undefined, for weights that are loaded next.
        """
        x = self.trace.variables(vector)
        shapes = self._shapes(x)
        if torch.device(device).type == "meta":
            return self._copied(x, device)
        with kept_generators() if seed is not None or not initialise else nullcontext():
            if seed is not None:
                torch.manual_seed(seed)
            network = self._constructed(shapes, x)
            if network is None:
                network = self._copied(x, "cpu")
                if initialise:
                    self.scheme.apply(network)
            if initialise and self.init is not None:
                self.init(network)
        built: nn.Module = network.to(device).train()
        return built

    def reference(self, vector: Sequence[int], seed: int) -> nn.Module | None:
        """The network that the model's function makes with other arguments of its own.

        Where :meth:`build` also corrects constructor calls within, this exchanges the arguments of
        the outermost ones alone; at the base it is the function's own network.

        Returns:
            None if networks are copies, or if no such arguments give these widths.
        """
        if self.constructor is None or self.constructor.replay is None:
            return None
        x = self.trace.variables(vector)
        with kept_generators():
            torch.manual_seed(seed)
            if list(x) == list(self.trace.variables(self.trace.base)):
                network: nn.Module | None = self.constructor.recording.make_model()
            else:
                attributes = {where: evaluate(p, x) for where, p in free_attributes(self.trace)}
                network = self.constructor.plain(self._shapes(x), attributes)
            if network is not None and self.init is not None:
                self.init(network)
        return network and network.train()

    def _shapes(self, x: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(evaluate(n, x) for n in s) for key, s in self.trace.shapes.items()}

    def _constructed(self, shapes: Mapping[str, tuple[int, ...]], x: Sequence[int]) -> Any:
        """A network that the model's own constructors make, if they do."""
        if self.constructor is None:
            return None
        attributes = {where: evaluate(p, x) for where, p in free_attributes(self.trace)}
        network = self.constructor.build(shapes, attributes)
        if network is None:
            return None
        others: dict[str, Tensor] = {}
        replaced: dict[int, Tensor] = {}
        for _, layer, name, tensor in tensors_of(network):
            key = join(layer, name)
            if tensor.shape != shapes[key]:
                others[key] = replaced[id(tensor)] = _empty(tensor, shapes[key], "cpu")
        if others:
            exchange(network, replaced)
            self.scheme.apply(network, others)
        return network

    def _copied(self, x: Sequence[int], device: Any, of: nn.Module | None = None) -> nn.Module:
        """A copy of the template, or of a network, at these sizes and without values."""
        of = of or self.template
        tensors: dict[int, Tensor] = {}
        for _, layer, name, old in tensors_of(of):
            shape = [evaluate(n, x) for n in self.trace.shapes[join(layer, name)]]
            tensors[id(old)] = _empty(old, shape, device)
        return resized(of, self.trace, tensors, lambda poly: evaluate(poly, x)).train()

    def resized(self, network: nn.Module, vector: Sequence[int]) -> nn.Module:
        """A copy of a network of this model at other widths, without values.

        Unlike :meth:`build`, it keeps the numbers that the network's constructors computed from
        its widths: it computes the same function of fewer channels.
        """
        device = next(network.parameters()).device
        return self._copied(self.trace.variables(vector), device, network)

    def substituted(self, tensors: Mapping[int, Tensor], value: Callable[[Poly], Any]) -> nn.Module:
        """The template with other tensors; see :func:`~widthsearch.tracing.constructor.resized`."""
        return resized(self.template, self.trace, tensors, value)


def _freedom(trace: Trace) -> int:
    """The number of sizes of tensors that are not fixed."""
    return sum(as_constant(n) is None for shape in trace.shapes.values() for n in shape)


def _pinning(trace: Trace) -> tuple[int, int]:
    """How little is free: the MACs in products without a free width, then minus the axes."""
    return trace.macs.get((), 0), -len(trace.axes)


def _empty(like: Tensor, shape: Sequence[int], device: Any) -> Tensor:
    new = torch.empty(shape, dtype=like.dtype, device=device)
    if isinstance(like, nn.Parameter):
        return nn.Parameter(new, requires_grad=like.requires_grad)
    return new
