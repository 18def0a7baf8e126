"""Sums of values by the group of channels that they belong to, and the gradients of gates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.modules.tree import join
from widthsearch.torch_internals import NormBase


def group_sums(channels: DependencyGraph, key: str, dim: int, values: Tensor) -> dict[int, Tensor]:
    """Sum values by the unit that they belong to.

    Args:
        channels: Where units lie.
        key: A parameter or buffer.
        dim: One of its dims that follows axes.
        values: One value for each position along the dim, shape (n,).

    Returns:
        Per axis that the dim follows, shape (units,).
    """
    axes, units = channels.axis[key, dim], channels.group[key, dim]
    out = {}
    for axis in sorted(set(axes.tolist()) - {-1}):
        mine = torch.from_numpy(np.flatnonzero(axes == axis)).to(values.device)
        index = torch.from_numpy(units[axes == axis]).to(values.device)
        sums = torch.zeros(channels.groups[axis], dtype=values.dtype, device=values.device)
        out[axis] = sums.index_add_(0, index, values[mine])
    return out


def gate_gradients(channels: DependencyGraph, model: nn.Module) -> list[Tensor]:
    """∂L/∂c for a gate c = 1 on each unit of each axis, where the axis is read.

    The gate on the inputs of an axis's readers need not be there: its gradient is the sum over
    readers of ⟨W[:, i], ∂L/∂W[:, i]⟩. It stands after batch norm and activation, so that neither
    undoes it. An axis that no layer reads with a weight is gated where it is made, after batch
    norm: γ·∂L/∂γ + β·∂L/∂β.

    Args:
        channels: Where the units lie in ``model``.
        model: A network whose parameters have gradients.

    Returns:
        Per axis, shape (units,).
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    out = [torch.zeros(n, device=device) for n in channels.groups]
    read: set[int] = set()

    def collect(key: str, dim: int) -> None:
        parameter = parameters[key]
        if parameter.grad is None:
            return
        products = (parameter.detach() * parameter.grad).movedim(dim, 0)
        products = products.reshape(len(products), -1).sum(1)
        for axis, sums in group_sums(channels, key, dim, products).items():
            read.add(axis)
            out[axis] = out[axis] + sums

    for key, dim in channels.consumers.items():
        where = _read_dim(channels, parameters[key], key, dim)
        if where is not None:
            collect(*where)
    unread = set(range(len(out))) - read
    for layer, module in model.named_modules():
        if isinstance(module, NormBase | nn.GroupNorm | nn.LayerNorm):
            for name in ("weight", "bias"):
                where = join(layer, name), 0
                if where in channels.axis and set(channels.axis[where].tolist()) <= unread:
                    collect(*where)
    return out


def _read_dim(
    channels: DependencyGraph, parameter: Tensor, key: str, dim: int
) -> tuple[str, int] | None:
    """The dim of a reader along which it has the channels that it reads."""
    if (key, dim) in channels.axis:
        return key, dim
    if dim == 1 and parameter.shape[1] == 1 and (key, 0) in channels.axis:
        return key, 0  # depthwise: the filter is the channel
    return None
