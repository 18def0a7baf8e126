"""Which elements of which tensors belong to channel i of an axis.

Every position along every symbolic dim of every parameter and buffer is an element. The model runs
once, and next to each tensor runs a tensor of the elements it is made of: views, concatenations and
shuffles act on the elements as they act on values; where values meet (in a sum, a norm, a matrix
product) their elements are one. Each equivalence class is a *group*: the smallest set of channels
that can be pruned together. A group of an axis is one channel, or several where a convolution has
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
    """Where the groups of each axis lie in a network of certain widths.

    Attributes:
        widths: The network's widths.
        groups: Per axis, its number of groups: its width by its channels per group.
        axis: Per tensor and dim that follows axes, the axis of each position, -1 where unknown.
        group: The same for the group within the axis.
        readers: Per tensor, the dim along which it multiplies channels that it reads.
        unknown: Axes for which the run did not show where all of their groups lie.
    """

    widths: Widths
    groups: tuple[int, ...]
    axis: Mapping[tuple[str, int], NDArray[np.int64]]
    group: Mapping[tuple[str, int], NDArray[np.int64]]
    consumers: Mapping[str, int]
    unknown: frozenset[int]


def build_dependency_graph(model: TracedModel, widths: Widths) -> DependencyGraph:
    """Where each axis's groups lie in every parameter and buffer of a network of these widths."""
    system = System(
        hints=[w // a.divisor for w, a in zip(widths.vector, model.trace.axes, strict=True)]
    )
    elements = Elements()
    run = Propagation(elements)
    run.origin = {}
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
                form = [1] * len(shape)
                form[dim] = -1
                fields.append(torch.from_numpy(own[key, dim]).view(form))
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=False)
            run.parameters[id(meta)] = key
        run.put(meta, fields)
        copies[id(tensor)] = meta
    symbolic = model.substituted(copies, lambda poly: size(system, poly)).eval()
    run_on_meta(symbolic, sample(model.input_shape, 1, "meta"), run)
    groups = [w // a.divisor for w, a in zip(widths.vector, model.trace.axes, strict=True)]
    roots = {where: elements.find(made) for where, made in own.items()}
    group_of = [_numbered(model, i, count, roots) for i, count in enumerate(groups)]
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
            if (counts != length.get((number,), 0)).any():
                unknown.add(number)
    lost = np.concatenate([np.empty(0, np.int64), *elements.wandering])
    lost_roots = set(elements.find(lost[lost >= 0]).tolist())
    unknown.update(i for i, a in enumerate(group_of) if not lost_roots.isdisjoint(a))
    for i, a in enumerate(group_of):  # a channel of one axis that is also one of another's
        unknown.update(n for k, b in enumerate(group_of[:i]) if a.keys() & b.keys() for n in (i, k))
    return DependencyGraph(widths, tuple(groups), axes, group, run.consumers, frozenset(unknown))


def _numbered(
    model: TracedModel,
    axis: int,
    count: int,
    roots: Mapping[tuple[str, int], NDArray[np.int64]],
) -> dict[int, int]:
    """The group of an axis that each representative stands for.

    An axis can hold several sets of channels that only have their number in common (the residual
    stream of a transformer, and the heads of its attention). Each is numbered on its own, from the
    axis's maker on. Where one has more channels than there are groups, a group is several of them.
    """
    followers = [
        where for where in roots if model.trace.shapes[where[0]][where[1]].keys() == {(axis,)}
    ]
    followers.sort(key=lambda where: where != model.trace.axes[axis].maker)
    numbered: dict[int, int] = {}
    while followers:
        together: dict[int, None] = {}
        rest = followers
        grown = True
        while grown:  # all dims that share a channel with the first
            mine = [
                w for w in rest if not together or not together.keys().isdisjoint(roots[w].tolist())
            ]
            mine = mine if together else rest[:1]
            grown = bool(mine)
            rest = [w for w in rest if w not in mine]
            together.update(dict.fromkeys(root for w in mine for root in roots[w].tolist()))
        followers = rest
        if len(together) % count == 0:
            each = len(together) // count
            numbered.update({root: i // each for i, root in enumerate(together)})
    return numbered
