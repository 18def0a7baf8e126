"""Narrower networks from trained ones: channels are extracted with their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.errors import SpaceError, WidthsError
from widthsearch.modules.tree import join, tensors_of
from widthsearch.tracing.elimination import solved
from widthsearch.tracing.polynomials import evaluate
from widthsearch.tracing.traced_model import TracedModel
from widthsearch.widths import Widths

Keep = Mapping[str, Iterable[int]]
"""Per axis by name, the channels that are kept; an axis that is left out keeps all of its own."""


def kept_groups(model: TracedModel, graph: DependencyGraph, keep: Keep) -> list[NDArray[np.bool_]]:
    """Per axis, a mask of the groups that are kept.

    Raises:
        WidthsError: An axis or a channel does not exist, or a part of a group is kept.
        SpaceError: The positions of an axis's channels are unknown.
    """
    out = [np.ones(n, bool) for n in graph.groups]
    for name, chosen in keep.items():
        if name not in graph.widths:
            raise WidthsError(f"space {model.name!r} has no axis {name!r} to keep channels of")
        i = graph.widths.names.index(name)
        width, per_group = graph.widths.vector[i], model.trace.axes[i].divisor
        kept = np.zeros(width, bool)
        for channel in chosen:
            if not 0 <= channel < width:
                raise WidthsError(
                    f"axis {name!r} has channels 0 to {width - 1}, but {channel} was to be kept"
                )
            kept[channel] = True
        if not kept.all() and i in graph.unknown:
            raise SpaceError(
                f"the channels of axis {name!r} cannot be removed one by one, since "
                f"{graph.unknown[i]}; leave the axis out"
            )
        counts = np.bincount(graph.channels[i][kept], minlength=len(out[i]))
        if not np.isin(counts, (0, per_group)).all():
            raise WidthsError(
                f"channels of axis {name!r} are kept in groups of {per_group}, but group "
                f"{int(np.argmax((counts != 0) & (counts != per_group)))} was to be kept in part"
            )
        out[i] = counts == per_group
    return out


def kept_positions(
    graph: DependencyGraph, kept: Sequence[NDArray[np.bool_]], where: tuple[str, int]
) -> NDArray[np.bool_]:
    """The positions along a dim, (size,), that belong to no axis or to a group that is kept.

    Args:
        graph: The dependency graph.
        kept: Per axis, a mask of its groups.
        where: The tensor's name and the dim.
    """
    axes, groups = graph.axis[where], graph.group[where]
    return np.array([a < 0 or kept[a][g] for a, g in zip(axes, groups, strict=True)], bool)


def extract(
    model: TracedModel, network: nn.Module, keep: Keep, graph: DependencyGraph | None = None
) -> nn.Module:
    """A narrower network with the weights of the channels that are kept.

    In eval mode its outputs are those of ``network`` with the other channels masked
    (:func:`~widthsearch.channels.masking.masked`).

    Args:
        model: The traced model.
        network: A network of the model, at any of its widths; it is left unchanged.
        keep: Per axis by name, the channels to keep, numbered as in the layer that the axis is
            named after; an axis that is left out keeps all of its channels.
        graph: The dependency graph of ``network``, if it is known.

    Raises:
        WidthsError: The channels do not fit the axes, or their number is not on the grid.
    """
    graph = graph or build_dependency_graph(model, widths_of(model, network))
    kept = kept_groups(model, graph, keep)
    counts = [int(k.sum()) * a.divisor for k, a in zip(kept, model.trace.axes, strict=True)]
    narrow = model.resized(network, counts)
    old = {join(layer, name): tensor for _, layer, name, tensor in tensors_of(network)}
    with torch.no_grad():
        for _, layer, name, new in tensors_of(narrow):
            key = join(layer, name)
            values = old[key].detach()
            for dim in range(values.dim()):
                if (key, dim) in graph.axis:
                    index = np.flatnonzero(kept_positions(graph, kept, (key, dim)))
                    values = values.index_select(dim, torch.from_numpy(index).to(values.device))
            new.data = values.clone()  # with the network's device and dtype
    return narrow.train(network.training)


def widths_of(model: TracedModel, network: nn.Module | Mapping[str, Tensor]) -> Widths:
    """The widths of a network of a traced model's code: the inverse of the shapes of its tensors.

    Args:
        model: The traced model.
        network: A network with the model's layers at any widths, in whole groups; or its state
            dict, where buffers that are not saved may be missing.

    Raises:
        WidthsError: A tensor is missing, is none of the model's, or has a shape that no widths
            give. The message names it.
    """
    shapes, kept = model.trace.shapes, model.template.state_dict().keys()
    if isinstance(network, nn.Module):
        sizes = {join(layer, name): tuple(t.shape) for _, layer, name, t in tensors_of(network)}
        needed = set(shapes)
    else:
        if not isinstance(network, Mapping):
            raise WidthsError(
                "widths are read from a network or its state dict, but were to be from "
                f"{type(network).__name__}"
            )
        for key, tensor in network.items():
            if not isinstance(tensor, Tensor):
                raise WidthsError(
                    f"a state dict must hold tensors by name, but {key!r} is "
                    f"{type(tensor).__name__}"
                )
        sizes = {key: tuple(tensor.shape) for key, tensor in network.items()}
        needed = set(shapes) & kept
    for key in shapes:
        if key in needed and key not in sizes:
            wrapped = (f"{n!r}: remove the prefix" for n in sizes if n.endswith(f".{key}"))
            raise WidthsError(
                f"a network of {model.name!r} must have a tensor {key!r}: it has "
                f"{next(wrapped, 'none')}"
            )
    for key in sizes:
        if key not in shapes and key not in kept:  # a tensor of two names is traced by the first
            raise WidthsError(
                f"a network of {model.name!r} has no tensor {key!r}: give one of the same code"
            )

    axes = model.trace.axes
    every = [(key, dim) for key in shapes if key in sizes for dim in range(len(shapes[key]))]
    for places in ([axis.maker for axis in axes], every):  # a maker may have channels of others too
        lengths = ((shapes[key][dim], sizes[key][dim : dim + 1]) for key, dim in places)
        found = solved((poly, n) for poly, size in lengths for n in size)
        if len(found) == len(axes):
            break
    x = [max(1, found.get(i, 1)) for i in range(len(axes))]
    for key in (key for key in shapes if key in sizes):
        given = [evaluate(n, x) for n in shapes[key]]
        if list(sizes[key]) != given:
            raise WidthsError(
                f"widths must give the shape of every tensor, but {key!r} has {list(sizes[key])}, "
                f"and the widths of the other tensors give it {given}"
            )
    vector = tuple(n * axis.divisor for n, axis in zip(x, axes, strict=True))
    return Widths(tuple(axis.name for axis in axes), vector)
