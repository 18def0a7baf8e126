"""Which elements of which tensors belong to channel i of an axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.polynomials import Poly, as_constant, constant, multiply
from widthsearch.space import SearchSpace
from widthsearch.trace import Trace, join
from widthsearch.widths import Widths

Positions = Mapping[int, NDArray[np.int64]]
"""Per axis index, shape (channels, k): the k positions along one dim that channel i has."""


_Key = tuple[tuple[tuple[int, ...], int], ...]


def positions(trace: Trace, dim: Poly, widths: Widths) -> Positions | None:
    """Where each axis's channels lie along a dim of a network with these widths.

    Args:
        trace: The space's trace.
        dim: The dim's size as a polynomial over the axes.
        widths: The network's widths.

    Returns:
        Positions by axis index (axes that appear twice have their positions side by side), or
        None where the run did not show how the dim is laid out.
    """
    layouts = {_key(whole): parts for whole, parts in trace.layouts}
    found: dict[int, list[NDArray[np.int64]]] = {}
    size = _place(trace, layouts, dim, widths, 0, 1, found)
    if size is None:
        return None
    return {axis: np.concatenate(parts, axis=1) for axis, parts in found.items()}


def _key(poly: Poly) -> _Key:
    return tuple(sorted(poly.items()))


def _place(
    trace: Trace,
    layouts: Mapping[_Key, tuple[tuple[Poly, int], ...]],
    dim: Poly,
    widths: Widths,
    start: int,
    repeat: int,
    found: dict[int, list[NDArray[np.int64]]],
) -> int | None:
    """Place ``dim``, each of its elements ``repeat`` long, at ``start``; return its length."""
    value = as_constant(dim)
    if value is not None:
        return value * repeat
    if len(dim) == 1:
        ((monomial, coefficient),) = dim.items()
        axis = monomial[0]
        if len(monomial) == 1 and coefficient == trace.axes[axis].unit:
            n = widths.vector[axis]
            first = start + np.arange(n)[:, None] * repeat
            found.setdefault(axis, []).append(first + np.arange(repeat)[None, :])
            return n * repeat
    parts = layouts.get(_key(dim))
    if parts is None:
        return None
    length = 0
    for part, inner in parts:
        placed = _place(trace, layouts, part, widths, start + length, repeat * inner, found)
        if placed is None:
            return None
        length += placed
    return length


@dataclass(frozen=True)
class Reader:
    """A layer whose weight multiplies an axis's channels.

    Attributes:
        layer: Its name.
        positions: Where each axis's channels lie among the layer's input channels.
    """

    layer: str
    positions: Positions


def readers(space: SearchSpace, widths: Widths) -> list[Reader]:
    """Every convolution and linear layer whose input channels' layout is known."""
    out = []
    for layer, module in space.template.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        shape = space.trace.shapes.get(join(layer, "weight"))
        if shape is None:
            continue
        inputs = shape[1]
        if isinstance(module, nn.modules.conv._ConvNd):
            if module.transposed:
                inputs = shape[0]
            else:
                groups = space.trace.attributes.get((layer, "groups"), constant(module.groups))
                inputs = multiply(inputs, groups)
        where = positions(space.trace, inputs, widths)
        if where:
            out.append(Reader(layer, where))
    return out


def input_products(module: nn.Module, products: Tensor) -> Tensor:
    """Sum a weight-shaped tensor over everything but the layer's input channels.

    Args:
        module: A convolution or linear layer.
        products: Shaped like its weight, e.g. weight × gradient.

    Returns:
        Shape (input channels,).
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed:
            return products.flatten(1).sum(1)
        grouped = products.reshape(module.groups, -1, products.shape[1], products[0, 0].numel())
        return grouped.sum((1, 3)).flatten()
    return products.sum(0)


def gate_gradients(space: SearchSpace, widths: Widths, model: nn.Module) -> list[Tensor]:
    """∂L/∂c for a gate c = 1 on each channel, where the axis is read.

    A gate on the inputs of its readers needs not be there: its gradient is Σ over readers of
    ⟨W[:, i], ∂L/∂W[:, i]⟩. It stands after batch norm and activation, so neither undoes it.
    Axes that no layer reads with a weight use the makers: γ·∂L/∂γ + β·∂L/∂β of their batch norms.

    Args:
        space: The space.
        widths: The widths of ``model``.
        model: A network of the space whose parameters have gradients.

    Returns:
        Per axis, shape (channels,).
    """
    modules = dict(model.named_modules())
    out = [torch.zeros(n, device=next(model.parameters()).device) for n in widths.vector]
    read: set[int] = set()
    for reader in readers(space, widths):
        module = modules[reader.layer]
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or weight.grad is None:
            continue
        by_input = input_products(module, weight.detach() * weight.grad)
        for axis, where in reader.positions.items():
            read.add(axis)
            out[axis] += by_input[torch.from_numpy(where).to(by_input.device)].sum(1)
    for axis in set(range(len(widths))) - read:
        for layer in space.axes[axis].layers:
            module = modules[layer]
            vectors = [p for p in module.parameters(recurse=False) if p.dim() == 1]
            norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
            if norm and all(p.grad is not None and len(p) == len(out[axis]) for p in vectors):
                for p in vectors:
                    out[axis] += p.detach() * p.grad
    return out
