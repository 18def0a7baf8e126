"""The dependency graph: which positions of which tensors belong to channel i of an axis.

Every position along every symbolic dim of every parameter and buffer is an element
(``elements.py``). The model runs once, and each operation unites the elements that depend on each
other (``propagation.py``). Each equivalence class is a *group*: the smallest set of channels that
can be pruned together. A group is one channel of its axis, or several where a convolution has
groups or attention has heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.call_sites import Operand, Site
from widthsearch.channels.elements import Elements, compressed
from widthsearch.channels.propagation import Propagation, Sites
from widthsearch.modules.tree import join, tensors_of
from widthsearch.torch_internals import tree_leaves
from widthsearch.tracing.inputs import sample
from widthsearch.tracing.interpreter import run_on_meta
from widthsearch.tracing.polynomials import Poly, System, as_constant, symbols_of
from widthsearch.tracing.symbolic_ints import size
from widthsearch.tracing.trace import TracedAxis
from widthsearch.tracing.traced_model import TracedModel
from widthsearch.widths import Widths


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """The positions of each axis's groups in the tensors of a network of certain widths.

    Attributes:
        widths: The network's widths.
        groups: Per axis, its number of groups: its width divided by its channels per group.
        channels: Per axis, the group of each channel, numbered as in the axis's maker.
        axis: Per tensor and dim that depends on axes, the axis of each position; -1 if unknown.
        group: The same for the group within the axis.
        consumers: Per weight that multiplies channels of its input, the dim along which it does:
            that of the filters, if each one multiplies the channels of its own group.
        unknown: Axes whose channels cannot be pruned one by one, each with the reason.
        masks: Per call of a torch function that combines channels, the operands whose removed
            channels a mask takes out.
        gates: Per such call, the weights that multiply channels of the call's other operands.

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
    channels: tuple[NDArray[np.int64], ...]
    axis: Mapping[tuple[str, int], NDArray[np.int64]]
    group: Mapping[tuple[str, int], NDArray[np.int64]]
    consumers: Mapping[str, int]
    unknown: Mapping[int, str]
    masks: Mapping[Site, tuple[Operand, ...]]
    gates: Mapping[Site, tuple[Operand, ...]]


def build_dependency_graph(model: TracedModel, widths: Widths) -> DependencyGraph:
    """The dependency graph of a network with these widths.

    Args:
        model: The traced model.
        widths: The network's widths, one per axis of the trace.
    """
    x = model.trace.variables(widths.vector)
    system = System(hints=list(x))
    elements = Elements()
    inputs = sample(model.input_shape, 1, "meta")
    run = Propagation(elements, [t for t in tree_leaves(inputs) if isinstance(t, Tensor)])
    own: dict[tuple[str, int], NDArray[np.int64]] = {}
    copies: dict[int, Tensor] = {}
    for _, layer, name, tensor in tensors_of(model.template):
        key = join(layer, name)
        shape = model.trace.shapes[key]
        meta = torch.empty([size(system, p) for p in shape], dtype=tensor.dtype, device="meta")
        parameter = isinstance(tensor, nn.Parameter)
        fields = []
        for dim, p in enumerate(shape):
            if as_constant(p) is None:
                own[key, dim] = elements.new(system.hint(p))
                run.add_place(own[key, dim], key if parameter else None, dim)
                along_dim = [-1 if d == dim else 1 for d in range(len(shape))]
                fields.append(torch.from_numpy(own[key, dim]).view(along_dim))
        if parameter:
            meta = nn.Parameter(meta, requires_grad=False)
            run.parameters[id(meta)] = key
        run.set_fields(meta, fields)
        copies[id(tensor)] = meta
    symbolic = model.substituted(copies, lambda poly: size(system, poly)).eval()
    with Sites(symbolic, run):
        run_on_meta(symbolic, inputs, run)
    numbers = _Numbers.of(model, x, elements, own, run.parts)
    while True:
        broken = [(seam, seam.broken(numbers.axis, numbers.group, x)) for seam in run.seams]
        if not sum(seam.pair_parts(elements) for seam, axes in broken if axes):
            break
        numbers = _Numbers.of(model, x, elements, own, run.parts)
    unknown = dict(run.lost_axes)
    for seam, axes in broken:
        for i in axes:
            unknown.setdefault(i, f"its channels change sides of a cut by {seam.reason}")
    dims = list(own)
    for lost, reason in run.lost:
        lost = lost[lost >= 0]
        axes = set(numbers.axis[lost].tolist())
        for n in np.unique(np.searchsorted(run.starts, lost[numbers.axis[lost] < 0], "right")):
            if n <= len(dims):  # it has no numbers, so all that it may belong to are lost
                key, dim = dims[n - 1]
                axes |= symbols_of(model.trace.shapes[key][dim])
        for i in axes:
            unknown.setdefault(i, reason)
    unknown |= {i: why() for i, why in numbers.unknown.items() if i not in unknown}
    unknown = {i: unknown[i] for i in sorted(unknown) if 0 <= i < len(x)}
    return DependencyGraph(
        widths,
        tuple(x),
        tuple(numbers.channels(i, a, x[i]) for i, a in enumerate(model.trace.axes)),
        numbers.axes,
        numbers.groups,
        {key: dim for key, dim in run.consumers.items() if (key, dim) in own},
        unknown,
        *_operands(run, numbers),
    )


@dataclass
class _Numbers:
    """The axis and group of each class of elements.

    One axis can hold several sets of channels that only have their number in common (the residual
    stream of a transformer, and the heads of its attention). Each is numbered on its own, from the
    axis's maker and the shortest dims on; one of an axis that has no dim of its own, from the parts
    on that forward takes out of dims or adds to them. A set of more channels than there are groups
    has several consecutive channels in each group.

    Attributes:
        axis: The axis of each element; -1 for none.
        group: Its group.
        axes: Per dim, the axis of each position.
        groups: The same for the group.
        unknown: Axes whose positions are not all known, each with a function of the reason.
    """

    axis: NDArray[np.int64]
    group: NDArray[np.int64]
    axes: dict[tuple[str, int], NDArray[np.int64]]
    groups: dict[tuple[str, int], NDArray[np.int64]]
    unknown: dict[int, Callable[[], str]]

    @classmethod
    def of(
        cls,
        model: TracedModel,
        x: Sequence[int],
        elements: Elements,
        own: Mapping[tuple[str, int], NDArray[np.int64]],
        parts: Iterable[tuple[Poly, NDArray[np.int64]]],
    ) -> _Numbers:
        """Number the classes.

        Args:
            model: The traced model.
            x: The number of groups of each axis.
            elements: The classes.
            own: The elements of each dim.
            parts: The size of each part that forward takes out of a dim or adds, and its elements.
        """
        shapes = model.trace.shapes
        unknown: dict[int, Callable[[], str]] = {}
        root = elements.find(np.arange(len(elements.parent)))
        # A class can have a group in several axes, which then cannot be pruned independently.
        group = [np.full(len(root), -1) for _ in x]
        places = [(1, shapes[key][dim], these) for (key, dim), these in own.items()]
        places += [(2, length, these) for length, these in parts]
        single: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}  # of a multiple of one variable
        for rank, length, these in places:
            monomial = next(iter(length))
            if len(length) == len(monomial) == 1 and (i := monomial[0]) < len(x):
                first = these is own[model.trace.axes[i].maker]
                single.setdefault(i, []).append((0 if first else rank, these))
        for i, dims in single.items():
            for _, these in sorted(dims, key=lambda at: (at[0], len(at[1]))):
                roots = root[these]
                left = np.array(list(dict.fromkeys(roots[group[i][roots] < 0].tolist())), np.int64)
                if len(left) and len(left) % x[i] == 0:
                    group[i][left] = np.arange(len(left)) // (len(left) // x[i])
        axis_of, group_of = np.full(len(root), -1), np.full(len(root), -1)
        for i, of_axis in enumerate(group):
            mine = of_axis >= 0
            for other in np.unique(axis_of[mine & (axis_of >= 0)]).tolist():
                both = [model.trace.axes[n] for n in (other, i)]
                why = partial(_why_in_common, both, elements, own)
                unknown |= {i: why, other: why}
            axis_of[mine], group_of[mine] = i, of_axis[mine]
        axes, groups = {}, {}
        for where, these in own.items():
            length = shapes[where[0]][where[1]]
            found = np.full((2, len(these)), -1)
            for i in sorted(symbols_of(length)):
                mine = group[i][root[these]] >= 0
                found[:, mine] = [[i] * int(mine.sum()), group[i][root[these]][mine]]
                counts = np.bincount(found[1, found[0] == i], minlength=x[i])
                # A dim of `c·x` positions has c of each group, or some were not found.
                if (counts != length.get((i,), 0)).any():
                    pair = these, own[model.trace.axes[i].maker]
                    unknown.setdefault(i, partial(_why_not_told, where[0], elements, pair))
            axes[where], groups[where] = found
        return cls(axis_of[root], group_of[root], axes, groups, unknown)

    def channels(self, i: int, axis: TracedAxis, groups: int) -> NDArray[np.int64]:
        """The group of each channel of an axis; its maker may have those of other axes too."""
        found = self.groups[axis.maker][self.axes[axis.maker] == i]
        in_order = np.arange(groups).repeat(axis.divisor)
        return found if len(found) == len(in_order) else in_order


def _why_in_common(
    pair: Sequence[TracedAxis], elements: Elements, own: Mapping[tuple[str, int], NDArray[np.int64]]
) -> str:
    """The reason for two axes with common channels, with the operator that united some of both."""

    def met(classes: Elements) -> bool:
        a, b = (classes.find(own[axis.maker]) for axis in pair)
        return bool(np.isin(a, b).any())

    first, second = (repr(axis.name) for axis in pair)
    return f"axes {first} and {second} have channels in common by {elements.cause(met)}"


def _why_not_told(key: str, elements: Elements, dims: Iterable[NDArray[np.int64]]) -> str:
    """The reason for positions that are in one class, with the operator that united them last."""
    for these in dims:
        found = len(np.unique(elements.find(these)))
        if cause := elements.cause(lambda now: len(np.unique(now.find(these))) == found):  # noqa: B023
            return f"its channels in {key!r} are tied to each other by {cause}"
    return f"no layer has its channels alone, and nothing tells them from others in {key!r}"


def _operands(
    run: Propagation, numbers: _Numbers
) -> tuple[dict[Site, tuple[Operand, ...]], dict[Site, tuple[Operand, ...]]]:
    """Per call, the operands that masks change, and those that gates do."""
    masks: dict[Site, tuple[Operand, ...]] = {}
    gates: dict[Site, tuple[Operand, ...]] = {}
    base = 1 + int(numbers.group.max(initial=0))
    code = np.where(numbers.axis < 0, -1, numbers.axis * base + numbers.group)
    # Indexed by -1, "no element", code and chosen give their last entries: -1 and False.
    code = np.append(code, -1)
    for site, record in run.sites.items():
        # A mask is of codes, since what belongs to the same groups as elements that are read is
        # undefined too, such as the bias of a query.
        read = np.zeros(code.max() + 2, bool)
        consumed = np.zeros(len(code), bool)
        for f, dims in record.reads:
            read_codes = code[f.numpy()]
            first = read_codes[tuple(slice(1 if d in dims else None) for d in range(f.dim()))]
            if (read_codes != first).any():  # else whole groups are combined
                read[read_codes] = True
        for f in record.consumed:
            consumed[f.numpy()] = True
        read[-1] = consumed[-1] = False
        for chosen, out in ((read[code], masks), (consumed & (code >= 0), gates)):
            found = []
            for index, fields in record.operands.items():
                for e in (f.numpy() for f in fields):
                    if chosen[e].any():
                        # The dims of a batch, and heads that all lose the same, have size 1.
                        codes = torch.from_numpy(np.where(chosen[e], code[e], -1))
                        found.append(Operand(index, *decoded(compressed(codes).numpy(), base)))
            if found:
                out[site] = tuple(found)
    return masks, gates


def decoded(code: NDArray[np.int64], base: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The axes and groups behind ``axis * base + group``; -1 and -1 behind -1."""
    return np.where(code < 0, -1, code // base), np.where(code < 0, -1, code % base)
