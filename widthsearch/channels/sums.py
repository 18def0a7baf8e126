"""Sums of values over each group of channels, and the gradients of gates on groups."""

from __future__ import annotations

import numpy as np
import torch
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

    for key, dim in graph.consumers.items():
        where = _consuming_dim(graph, parameters[key], key, dim)
        if where is not None:
            collect(*where)
    without_consumer = set(range(len(out))) - gated
    for layer, module in model.named_modules():
        if isinstance(module, NormBase | nn.GroupNorm | nn.LayerNorm):
            for name in ("weight", "bias"):
                where = join(layer, name), 0
                if where in graph.axis and set(graph.axis[where].tolist()) <= without_consumer:
                    collect(*where)
    return out


def _consuming_dim(
    graph: DependencyGraph, parameter: Tensor, key: str, dim: int
) -> tuple[str, int] | None:
    """The dim of a consumer along which its input channels lie."""
    if (key, dim) in graph.axis:
        return key, dim
    if dim == 1 and parameter.shape[1] == 1 and (key, 0) in graph.axis:
        return key, 0  # depthwise: filter i multiplies channel i
    return None
