"""Narrower networks from trained ones: channels are masked, or extracted with their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.errors import SpaceError, WidthsError
from widthsearch.modules.tree import join, tensors_of
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
                f"the channels of axis {name!r} cannot be separated from those of others, so none "
                "of them can be removed; leave the axis out"
            )
        counts = np.bincount(graph.group[model.trace.axes[i].maker][kept], minlength=len(out[i]))
        if not np.isin(counts, (0, per_group)).all():
            raise WidthsError(
                f"channels of axis {name!r} are kept in groups of {per_group}, but group "
                f"{int(np.argmax((counts != 0) & (counts != per_group)))} was to be kept in part"
            )
        out[i] = counts == per_group
    return out


def _kept_positions(
    graph: DependencyGraph, kept: Sequence[NDArray[np.bool_]], where: tuple[str, int]
) -> NDArray[np.bool_]:
    axes, groups = graph.axis[where], graph.group[where]
    return np.array([a < 0 or kept[a][g] for a, g in zip(axes, groups, strict=True)], bool)


def extract(
    model: TracedModel, network: nn.Module, keep: Keep, graph: DependencyGraph | None = None
) -> nn.Module:
    """A narrower network with the weights of the channels that are kept.

    In eval mode its outputs are those of ``network`` with the other channels masked
    (:func:`masked`), unless a width is part of the function itself (the 1/√d of attention).

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
    narrow = model.build(counts, initialise=False)
    old = {join(layer, name): tensor for _, layer, name, tensor in tensors_of(network)}
    with torch.no_grad():
        for _, layer, name, new in tensors_of(narrow):
            key = join(layer, name)
            values = old[key].detach()
            for dim in range(values.dim()):
                if (key, dim) in graph.axis:
                    index = np.flatnonzero(_kept_positions(graph, kept, (key, dim)))
                    values = values.index_select(dim, torch.from_numpy(index).to(values.device))
            new.copy_(values)
    return narrow.to(next(network.parameters()).device).train(network.training)


def widths_of(model: TracedModel, network: nn.Module) -> Widths:
    """The widths of a network that was built from a traced model."""
    sizes = {join(layer, name): tensor.shape for _, layer, name, tensor in tensors_of(network)}
    vector = tuple(sizes[a.maker[0]][a.maker[1]] for a in model.trace.axes)
    return Widths(tuple(axis.name for axis in model.trace.axes), vector)


@contextmanager
def masked(model: TracedModel, network: nn.Module, keep: Keep) -> Iterator[nn.Module]:
    """Within the context, ``network`` computes as if it only had the channels that are kept.

    The weights that multiply the other channels are zero meanwhile. So are the weights that produce
    them in a consumer, because queries and keys are multiplied by each other and by no weight.
    Layer and group norms leave masked channels out of their statistics.

    Args:
        model: The traced model.
        network: A network of the model.
        keep: As for :func:`extract`.

    Yields:
        The same network.
    """
    graph = build_dependency_graph(model, widths_of(model, network))
    kept = kept_groups(model, graph, keep)
    parameters = dict(network.named_parameters())
    before: dict[str, Tensor] = {}
    norms: dict[int, Tensor] = {}
    with torch.no_grad():
        for key, dim in _masked_dims(graph, parameters):
            mask = torch.from_numpy(_kept_positions(graph, kept, (key, dim)))
            before.setdefault(key, parameters[key].detach().clone())
            shape = [-1 if d == dim else 1 for d in range(parameters[key].dim())]
            parameters[key].mul_(mask.view(shape).to(parameters[key]))
    for layer, module in network.named_modules():
        where = join(layer, "weight"), 0
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and where in graph.axis:
            norms[id(module.weight)] = torch.from_numpy(_kept_positions(graph, kept, where))
    try:
        with _MaskedNorms(norms):
            yield network
    finally:
        with torch.no_grad():
            for key, values in before.items():
                parameters[key].copy_(values)


def _masked_dims(
    graph: DependencyGraph, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, int]]:
    """The parameters and dims along which a mask is applied: those of consumers."""
    for key in graph.consumers:
        for name in (key, f"{key.removesuffix('weight')}bias"):
            if name in parameters:
                dims = range(parameters[name].dim())
                yield from ((name, dim) for dim in dims if (name, dim) in graph.axis)


class _MaskedNorms(TorchFunctionMode):
    """Computes layer and group norms over the channels that are kept.

    Args:
        masks: Per norm's weight, by id, whether each channel is kept.
    """

    def __init__(self, masks: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, F.group_norm):
            return self._norm(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _norm(self, func: Any, x: Tensor, size: Any, *rest: Any, **named: Any) -> Tensor:
        """The norm of x over its unmasked channels; ``size`` is a shape, or a number of groups."""
        weight, bias, eps = _weight_bias_eps(*rest, **named)
        mask = self.masks.get(id(weight))
        if weight is None or mask is None or mask.all():
            return func(x, size, *rest, **named)  # type: ignore[no-any-return]
        if func is F.layer_norm:
            grouped, shape = x, list(weight.shape)
            inside, dims = mask.to(x), [-1]
        else:
            grouped = x.view(len(x), size, -1, *x.shape[2:])
            shape = [1, -1, *[1] * (x.dim() - 2)]
            inside = mask.to(x).view(1, size, -1, *shape[2:]).expand_as(grouped)
            dims = list(range(2, grouped.dim()))
        count = inside.sum(dims, keepdim=True)
        mean = (grouped * inside).sum(dims, keepdim=True) / count
        variance = ((grouped - mean).square() * inside).sum(dims, keepdim=True) / count
        out = ((grouped - mean) / (variance + eps).sqrt()).view_as(x) * weight.view(shape)
        return out if bias is None else out + bias.view(shape)


def _weight_bias_eps(
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor | None, Tensor | None, float]:
    return weight, bias, eps
