"""Sums of values over each group of channels, and the gradients of gates on groups."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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


def gate_gradients(graph: DependencyGraph, model: nn.Module) -> list[Tensor]:
    """∂L/∂c for a gate c = 1 that multiplies each group of each axis in its consumers' inputs.

    The gates need not exist: with W the weights of the consumers, the gradient of gate i is the
    sum over consumers of ⟨W[:, i], ∂L/∂W[:, i]⟩. A gate stands behind batch norm and activation,
    so that neither cancels it. For an axis without consumers the gate stands behind the batch norm
    of its maker, and its gradient is γ·∂L/∂γ + β·∂L/∂β.

    Args:
        graph: The dependency graph of ``model``.
        model: A network whose parameters have gradients.

    Returns:
        Per axis, shape (groups,).
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    out = [torch.zeros(n, device=device) for n in graph.groups]
    gated: set[int] = set()

    def collect(key: str, dim: int) -> None:
        parameter = parameters[key]
        if parameter.grad is None:
            return
        products = (parameter.detach() * parameter.grad).movedim(dim, 0)
        products = products.reshape(len(products), -1).sum(1)
        for axis, sums in group_sums(graph, key, dim, products).items():
            gated.add(axis)
            out[axis] = out[axis] + sums

    for key, dim in consuming_dims(graph, model):
        collect(key, dim)
    without_consumer = set(range(len(out))) - gated
    for layer, module in model.named_modules():
        if isinstance(module, NormBase | nn.GroupNorm | nn.LayerNorm):
            for name in ("weight", "bias"):
                where = join(layer, name), 0
                if where in graph.axis and set(graph.axis[where].tolist()) <= without_consumer:
                    collect(*where)
    return out


def consuming_dims(graph: DependencyGraph, model: nn.Module) -> list[tuple[str, int]]:
    """The weight of each consumer, and the dim along which it has the channels of its input."""
    parameters = dict(model.named_parameters())
    out = []
    for key, dim in graph.consumers.items():
        if (key, dim) in graph.axis:
            out.append((key, dim))
        elif dim == 1 and parameters[key].shape[1] == 1 and (key, 0) in graph.axis:
            out.append((key, 0))  # depthwise: filter i multiplies channel i
    return out


def of_input_channels(values: NDArray[np.int64], channels: int) -> NDArray[np.int64]:
    """Convert values of the positions of :func:`consuming_dims` to values of the input's channels.

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
