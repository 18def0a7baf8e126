"""A model after its symbolic run: builds networks of its class at any widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.initialisation import Recorder, Scheme, kept_generators
from widthsearch.modules.tree import clone, join, set_size, sync_attributes, tensors_of
from widthsearch.tracing.polynomials import Poly, evaluate
from widthsearch.tracing.trace import Trace
from widthsearch.tracing.tracer import trace


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model and the trace of its symbolic run, before any width is chosen.

    Attributes:
        name: The model's name in messages.
        input_shape: The shape of one sample, e.g. ``(3, 32, 32)``, or a tree of several inputs.
        trace: The result of the symbolic run.
        template: The model as given, on the meta device (sizes without values).
        scheme: How the model's constructor initialises it.
        init: Called on each network after the recorded scheme.

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
            recorder: The recorder of its constructor; None where a module was given.
            init: Called on each network after the recorded scheme.
            known: The model's trace, if it was traced before; then it is not run again.

        Raises:
            TraceError: The model cannot be traced.
        """
        traced = known or trace(model, inputs)
        template = clone(model, {id(t): _meta(t) for *_, t in tensors_of(model)})
        return cls(name, inputs, traced, template, Scheme.of(model, recorder), init)

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
            device: Where the tensors are created.
            initialise: False leaves values undefined, for weights that are loaded next.
        """
        x = self.trace.variables(vector)
        tensors: dict[int, Tensor] = {}
        for _, layer, name, old in tensors_of(self.template):
            shape = [evaluate(poly, x) for poly in self.trace.shapes[join(layer, name)]]
            new = torch.empty(shape, dtype=old.dtype, device=device)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            tensors[id(old)] = new
        network = self.substituted(tensors, lambda poly: evaluate(poly, x))
        if initialise and torch.device(device).type != "meta":
            with nullcontext() if seed is None else kept_generators():
                if seed is not None:
                    torch.manual_seed(seed)
                self.scheme.apply(network)
                if self.init is not None:
                    self.init(network)
        return network.train()

    def substituted(self, tensors: Mapping[int, Tensor], value: Callable[[Poly], Any]) -> nn.Module:
        """The template with other tensors, and its attributes set to fit them.

        Args:
            tensors: The replacement of each tensor of the template, by the tensor's id.
            value: Evaluates the polynomial of an attribute.
        """
        network = clone(self.template, tensors)
        for (layer, attribute), poly in self.trace.attributes.items():
            set_size(network, layer, attribute, value(poly))
        for module in network.modules():
            sync_attributes(module)
        return network


def _meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, requires_grad=tensor.requires_grad)
    return meta
