"""Sums of values over each group of channels, and the gradients of gates on groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.call_sites import CallSites, Site, with_operands
from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.modules.tree import join
from widthsearch.torch_internals import NormBase


def group_sums(graph: DependencyGraph, key: str, dim: int, values: Tensor) -> dict[int, Tensor]:
    """Sum the values of each group.

    Args:
        graph: The dependency graph of the network.
        key: A parameter or buffer.
        dim: One of its dims that depend on axes.
        values: One value for each position along the dim, shape (n,).

    Returns:
        Per axis that the dim depends on, the sums, shape (groups,).
    """
    axes, groups = graph.axis[key, dim], graph.group[key, dim]
    out = {}
    for axis in sorted(set(axes.tolist()) - {-1}):
        mine = torch.from_numpy(np.flatnonzero(axes == axis)).to(values.device)
        index = torch.from_numpy(groups[axes == axis]).to(values.device)
        sums = torch.zeros(graph.groups[axis], dtype=values.dtype, device=values.device)
        out[axis] = sums.index_add_(0, index, values[mine])
    return out


def gate_gradients(
    graph: DependencyGraph, model: nn.Module, loss: Callable[[], Tensor]
) -> list[Tensor]:
    """∂L/∂c for a gate c = 1 that multiplies each group of each axis in its consumers' inputs.

    The gates multiply the weights that the consumers read, which is the same and costs less. They
    may be computed from parameters (weight norm, quantisation). A gate stands behind batch norm and
    activation, so that neither cancels it. For an axis without consumers the gate stands behind the
    norm of its maker, and its gradient is γ·∂L/∂γ + β·∂L/∂β.

    Args:
        graph: The dependency graph of ``model``.
        model: A network.
        loss: Computes the loss L by passes of the network. Gradients are not accumulated in its
            parameters.

    Returns:
        Per axis, shape (groups,).
    """
    with Gates(graph, model) as gates:
        value = loss()
    return gates.gradients(torch.autograd.grad(value, gates.leaves, allow_unused=True))


class Gates(CallSites):
    """Gates c = 1 on each group of each axis, while it is active; see :func:`gate_gradients`.

    Args:
        graph: The dependency graph of the network.
        model: The network.

    Attributes:
        leaves: The tensors whose gradients :meth:`gradients` needs.

    Example:
        >>> from widthsearch.channels.dependency_graph import build_dependency_graph
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> space = SearchSpace.from_model(net, (2,))
        >>> model, graph = space.build(space.base), build_dependency_graph(space.model, space.base)
        >>> with Gates(graph, model) as gates:
        ...     model(torch.ones(3, 2)).sum().backward()
        >>> [g.shape for g in gates.gradients([leaf.grad for leaf in gates.leaves])]
        [torch.Size([4])]
    """

    def __init__(self, graph: DependencyGraph, model: nn.Module) -> None:
        super().__init__(model)
        self._graph = graph
        first = next(model.parameters())
        self._gates = [first.new_ones(n, requires_grad=True) for n in graph.groups]
        self._one = torch.ones_like(self._gates[0][:1])
        consumed = {i for found in graph.gates.values() for o in found for i in np.unique(o.axis)}
        self._norms = [
            (key, getattr(module, name))
            for layer, module in model.named_modules()
            if isinstance(module, NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
            for name in ("weight", "bias")
            for key in [join(layer, name)]
            if (key, 0) in graph.axis and consumed.isdisjoint(graph.axis[key, 0])
        ]
        self.leaves = [*self._gates, *(parameter for _, parameter in self._norms)]

    def call(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call, with gated weights if it is a consumer's."""
        for operand in self._graph.gates.get(site, ()):
            gate = operand.select(self._gates, self._one)
            change = {operand.index: lambda weight, gate=gate: weight * gate.to(weight)}
            args, kwargs = with_operands(change, args, kwargs)
        return func(*args, **kwargs)

    def gradients(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of the gates.

        Args:
            found: The gradient of each of the leaves; None for those that the loss does not use.

        Returns:
            Per axis, shape (groups,).
        """
        every = [
            torch.zeros_like(x) if g is None else g for x, g in zip(self.leaves, found, strict=True)
        ]
        out, of_norms = every[: len(self._gates)], every[len(self._gates) :]
        for (key, parameter), gradient in zip(self._norms, of_norms, strict=True):
            for axis, sums in group_sums(
                self._graph, key, 0, parameter.detach() * gradient
            ).items():
                out[axis] = out[axis] + sums
        return out


def of_input_channels(values: NDArray[np.int64], channels: int) -> NDArray[np.int64]:
    """Convert values of the positions of a consumer's dim to values of its input's channels.

    An input channel has several positions in a row after flattening and in depthwise convolutions;
    a position stands for one channel of each group in grouped convolutions.

    Example:
        >>> of_input_channels(np.array([0, 0, 1, 1]), 2).tolist()
        [0, 1]
        >>> of_input_channels(np.array([0, 1]), 4).tolist()
        [0, 1, 0, 1]
    """
    if channels >= len(values):
        return np.tile(values, channels // len(values))
    return values[:: len(values) // channels]
