"""The dependency graph: which positions of which tensors belong to channel i of an axis.

Every position along every symbolic dim of every parameter and buffer is an element
(``elements.py``). The model runs once, and each operation unites the elements that depend on each
other (``propagation.py``). Each equivalence class is a *group*: the smallest set of channels that
can be pruned together. A group is one channel of its axis, or several where a convolution has
groups or attention has heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.elements import Elements
from widthsearch.channels.propagation import Propagation
from widthsearch.modules.tree import join, tensors_of
from widthsearch.tracing.inputs import sample
from widthsearch.tracing.interpreter import run_on_meta
from widthsearch.tracing.polynomials import System, as_constant, symbols_of
from widthsearch.tracing.symbolic_ints import size
from widthsearch.tracing.traced_model import TracedModel
from widthsearch.widths import Widths


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """The positions of each axis's groups in the tensors of a network of certain widths.

    Attributes:
        widths: The network's widths.
        groups: Per axis, its number of groups: its width divided by its channels per group.
        axis: Per tensor and dim that depends on axes, the axis of each position; -1 if unknown.
        group: The same for the group within the axis.
        consumers: Per weight that multiplies channels of its input, the dim along which it does.
        unknown: Axes with groups whose positions the run did not determine; they cannot be pruned
            channel by channel.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 5, 1))
        >>> traced = TracedModel.of(model, (3, 8, 8), "net", None, None)
        >>> graph = build_dependency_graph(traced, Widths(("0",), (2,)))
        >>> graph.group["0.weight", 0], graph.group["1.bias", 0], graph.group["2.weight", 1]
        (array([0, 1]), array([0, 1]), array([0, 1]))
        >>> graph.consumers
        {'2.weight': 1}
    """

    widths: Widths
    groups: tuple[int, ...]
    axis: Mapping[tuple[str, int], NDArray[np.int64]]
    group: Mapping[tuple[str, int], NDArray[np.int64]]
    consumers: Mapping[str, int]
    unknown: frozenset[int]


def build_dependency_graph(model: TracedModel, widths: Widths) -> DependencyGraph:
    """The dependency graph of a network with these widths.

    Args:
        model: The traced model.
        widths: The network's widths, one per axis of the trace.
    """
    groups = model.trace.variables(widths.vector)
    system = System(hints=list(groups))
    elements = Elements()
    run = Propagation(elements)
    own: dict[tuple[str, int], NDArray[np.int64]] = {}
    copies: dict[int, Tensor] = {}
    for _, layer, name, tensor in tensors_of(model.template):
        key = join(layer, name)
        shape = model.trace.shapes[key]
        meta = torch.empty([size(system, p) for p in shape], dtype=tensor.dtype, device="meta")
        fields = []
        for dim, p in enumerate(shape):
            if as_constant(p) is None:
                own[key, dim] = elements.new(system.hint(p))
                along_dim = [-1 if d == dim else 1 for d in range(len(shape))]
                fields.append(torch.from_numpy(own[key, dim]).view(along_dim))
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=False)
            run.parameters[id(meta)] = key
        run.set_fields(meta, fields)
        copies[id(tensor)] = meta
    symbolic = model.substituted(copies, lambda poly: size(system, poly)).eval()
    run_on_meta(symbolic, sample(model.input_shape, 1, "meta"), run)
    roots = {where: elements.find(made) for where, made in own.items()}
    group_of = [_number_groups(model, i, count, roots) for i, count in enumerate(groups)]
    axes: dict[tuple[str, int], NDArray[np.int64]] = {}
    group: dict[tuple[str, int], NDArray[np.int64]] = {}
    unknown: set[int] = set()
    for (key, dim), these in roots.items():
        length = model.trace.shapes[key][dim]
        owners = sorted(symbols_of(length))
        found = np.full((len(these), 2), -1)
        for position, root in enumerate(these.tolist()):
            for number in owners:
                if root in group_of[number]:
                    found[position] = number, group_of[number][root]
        axes[key, dim], group[key, dim] = found.T
        for number in owners:
            counts = np.bincount(found[found[:, 0] == number, 1], minlength=groups[number])
            # A dim of `c·x` positions has c of each of the axis's x groups, or some were not found.
            if (counts != length.get((number,), 0)).any():
                unknown.add(number)
    unfollowed = np.concatenate([np.empty(0, np.int64), *elements.unfollowed])
    unfollowed_roots = set(elements.find(unfollowed[unfollowed >= 0]).tolist())
    unknown.update(i for i, a in enumerate(group_of) if not unfollowed_roots.isdisjoint(a))
    for i, a in enumerate(group_of):  # axes with a common class cannot be pruned independently
        unknown.update(n for k, b in enumerate(group_of[:i]) if a.keys() & b.keys() for n in (i, k))
    return DependencyGraph(widths, tuple(groups), axes, group, run.consumers, frozenset(unknown))


def _number_groups(
    model: TracedModel,
    axis: int,
    count: int,
    roots: Mapping[tuple[str, int], NDArray[np.int64]],
) -> dict[int, int]:
    """The number of the group of each class, by the class's representative.

    One axis can hold several sets of channels that only have their number in common (the residual
    stream of a transformer, and the heads of its attention). Each set is numbered on its own, the
    set of the axis's maker first. A set of more channels than there are groups has several
    consecutive channels in each group.
    """
    # Dims whose size is a multiple of this axis's variable; sums of axes are numbered through them.
    remaining = [
        where for where in roots if model.trace.shapes[where[0]][where[1]].keys() == {(axis,)}
    ]
    remaining.sort(key=lambda where: where != model.trace.axes[axis].maker)
    numbered: dict[int, int] = {}
    while remaining:
        connected = remaining[:1]
        classes: dict[int, None] = {}  # a set that keeps its order
        while connected:  # all dims that share a class with the first, directly or through others
            remaining = [where for where in remaining if where not in connected]
            classes.update(dict.fromkeys(c for where in connected for c in roots[where].tolist()))
            connected = [w for w in remaining if not classes.keys().isdisjoint(roots[w].tolist())]
        if len(classes) % count == 0:
            per_group = len(classes) // count
            numbered.update({root: i // per_group for i, root in enumerate(classes)})
    return numbered
