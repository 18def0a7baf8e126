"""The branched space: convolutions as parallel branches, each with out- and in-widths of its own.

A branch makes some output channels of a layer from some of its input channels (intra-channel
pruning; Park et al. 2023, arXiv 2303.09736). The network around the layers stays the user's. No
model is run: the trace of the plain space is rewritten, and the terms of each branched layer are
replaced by those of its branches. Costs therefore stay exact, and a branched space is a
:class:`SearchSpace` like any other.

For example, a 3×3 convolution from a to b channels at P positions has 9Pab MACs. With two branches
of o₁ and o₂ filters that read i₁ and i₂ channels it has 9P(o₁i₁ + o₂i₂). If the layer alone makes
its b output channels, b = o₁ + o₂ replaces the axis b in the terms of all other layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from widthsearch.modules.initialisation import Scheme
from widthsearch.modules.tree import clone, is_depthwise, join, sizes_in, tensors_of
from widthsearch.proposers.filter_groups.architecture import BranchedArchitecture
from widthsearch.proposers.filter_groups.branched_layers import BranchedConv2d, replace_module
from widthsearch.space.constraints import default_axis, substituted
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import ConvNd
from widthsearch.tracing.constructor import Constructor, free_attributes
from widthsearch.tracing.polynomials import (
    Poly,
    add,
    constant,
    evaluate,
    multiply,
    symbols_of,
    total,
)
from widthsearch.tracing.trace import Trace, TracedAxis
from widthsearch.tracing.traced_model import TracedModel


def branched(space: SearchSpace, architecture: BranchedArchitecture) -> SearchSpace:
    """The space whose base is a branched architecture.

    Each branch has the axes ``LAYER.branches.I.out`` and ``LAYER.branches.I.in``. The plain axes of
    ``space.unconstrained`` remain, except those that a single branched layer makes: such a width is
    the sum of the filters of the branches. At the base, networks have the channels of the
    architecture; :class:`BranchedConv2d` chooses channels at other widths. Branches are initialised
    as the model initialises the layer, at the sizes of the branch. A dependency graph of the space
    does not follow channels through branches.

    Args:
        space: The plain space; its ties, pins and grid do not apply to the new space.
        architecture: The branches.

    Raises:
        WidthsError: The architecture does not fit the space.

    Example:
        >>> from widthsearch.proposers.filter_groups.architecture import Branch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        >>> space = SearchSpace.from_model(net, (3, 8, 8))
        >>> halves = (Branch((0, 1), (0, 1)), Branch((2, 3), (2, 3)))
        >>> narrow = branched(space, BranchedArchitecture(space.base, {"1": halves}))
        >>> narrow.names[1:]  # the second width is the sum of the branches' filters
        ('1.branches.0.out', '1.branches.0.in', '1.branches.1.out', '1.branches.1.in')
        >>> (space.cost(space.base).macs - narrow.cost(narrow.base).macs) // 64  # 4·4 - 2·2·2
        8
    """
    architecture.check(space)
    plain = space.unconstrained
    trace = _rewritten(plain, architecture)
    axes = [default_axis(axis) for axis in trace.axes]
    template = clone(plain.model.template, {})
    for layer, branches in architecture.layers.items():
        conv = template.get_submodule(layer)
        assert isinstance(conv, nn.Conv2d)
        outputs, inputs = architecture.sizes(space, layer)
        replace_module(template, conv, BranchedConv2d(conv, inputs, outputs, branches, "meta"))
    digest = hashlib.sha256(json.dumps(architecture.to_json()).encode()).hexdigest()[:8]
    name = f"{plain.name}-branched-{digest}"
    scheme = _BranchedScheme.around(plain.model, architecture)
    model = replace(
        plain.model, name=name, trace=trace, template=template, scheme=scheme, constructor=None
    )
    return SearchSpace(name, tuple(axes), model)


def _names(layer: str, count: int) -> list[str]:
    return [f"{layer}.branches.{number}" for number in range(count)]


def positions(space: SearchSpace, layer: str) -> int:
    """The number of positions of a layer's kernel in one sample: its MACs by its weights.

    Args:
        space: A plain space without ties and pins.
        layer: A convolution of the space.
    """
    x = space.trace.variables(space.base.vector)
    weights = math.prod(evaluate(n, x) for n in space.trace.shapes[join(layer, "weight")])
    macs = evaluate(space.trace.layer_macs[layer], x)
    assert macs % weights == 0
    return macs // weights


def _rewritten(space: SearchSpace, architecture: BranchedArchitecture) -> Trace:
    """The trace with the terms of the branches."""
    made_by = _sole_makers(space, architecture)
    axes: list[TracedAxis] = []
    values: list[Poly] = [{}] * len(space.axes)
    for i, traced in enumerate(space.trace.axes):
        if i not in made_by:
            values[i] = {(len(axes),): 1}
            axes.append(replace(traced, base=architecture.widths[traced.name]))
    sizes: dict[str, dict[str, tuple[Poly, Poly]]] = {}  # out and in of each branch, by layer
    for layer, branches in architecture.layers.items():
        sizes[layer] = {}
        for name, branch in zip(_names(layer, len(branches)), branches, strict=True):
            sizes[layer][name] = {(len(axes),): 1}, {(len(axes) + 1,): 1}
            for dim, end, channels in ((0, "out", branch.filters), (1, "in", branch.inputs)):
                maker = f"{name}.weight", dim
                axes.append(TracedAxis(f"{name}.{end}", len(channels), 1, (name,), maker))
    for axis, layer in made_by.items():
        values[axis] = total(out for out, _ in sizes[layer].values())
    trace = substituted(space.trace, axes, (), values)
    macs, params, activations = trace.macs, trace.params, trace.activations
    shapes, layer_macs = dict(trace.shapes), dict(trace.layer_macs)
    attributes = dict(trace.attributes)
    for layer, of_branches in sizes.items():
        outputs, inputs, *kernel = shapes.pop(join(layer, "weight"))
        times, area = positions(space, layer), multiply(*kernel)
        macs = add(macs, layer_macs.pop(layer), -1)
        params = add(params, multiply(multiply(outputs, inputs), area), -1)
        activations = add(activations, outputs, -times)
        for name, (out, into) in of_branches.items():
            weights = multiply(multiply(out, into), area)
            layer_macs[name] = multiply(weights, constant(times))
            macs = add(macs, layer_macs[name])
            params = add(params, weights)
            activations = add(activations, out, times)
            shapes[f"{name}.weight"] = (out, into, *kernel)
        attributes |= {(layer, "out_channels"): outputs, (layer, "in_channels"): inputs}
    for i, traced in enumerate(axes):
        if traced.maker[0] not in shapes:  # its maker has branches now: take another of that size
            same = (
                (key, dim)
                for key, shape in shapes.items()
                for dim, poly in enumerate(shape)
                if poly == {(i,): traced.divisor}
            )
            axes[i] = replace(traced, maker=next(same, traced.maker))
    costed = replace(
        trace, macs=macs, params=params, activations=activations, layer_macs=layer_macs
    )
    return replace(costed, axes=tuple(axes), shapes=shapes, attributes=attributes)


def _sole_makers(space: SearchSpace, architecture: BranchedArchitecture) -> dict[int, str]:
    """The axes all of whose channels are made by one branched layer and by no other layer."""
    makers: dict[int, set[str]] = {}
    for module, layer, name, tensor in tensors_of(space.model.template):
        shape = space.trace.shapes[join(layer, name)]
        if tensor.dim() < 2 or is_depthwise(module):
            continue  # biases and norms follow their layer, depthwise convolutions their input
        reads = -1
        if isinstance(module, nn.Linear | ConvNd):
            reads = 0 if getattr(module, "transposed", False) else 1
        for dim, poly in enumerate(shape):
            for axis in symbols_of(poly) if dim != reads else ():
                makers.setdefault(axis, set()).add(layer)
    return {
        axis: layer
        for axis, (layer, *others) in makers.items()
        if not others
        and layer in architecture.layers
        and space.trace.shapes[join(layer, "weight")][0] == {(axis,): 1}
        and sum(len(b.filters) for b in architecture.layers[layer])
        == architecture.widths.vector[axis]
    }


@dataclass(frozen=True)
class _BranchedScheme(Scheme):
    """Fills each branch as the model's constructors fill its layer at the branch's sizes."""

    layers: Mapping[str, int]  # the number of branches
    constructor: Constructor | None

    @classmethod
    def around(cls, plain: TracedModel, architecture: BranchedArchitecture) -> _BranchedScheme:
        """The scheme of a model with branches."""

        def of(entries: Mapping[str, Any]) -> dict[str, Any]:
            out = dict(entries)
            for layer, branches in architecture.layers.items():
                if (key := join(layer, "weight")) in out:
                    value = out.pop(key)
                    out.update({f"{name}.weight": value for name in _names(layer, len(branches))})
            return out

        scheme = plain.scheme
        counts = {layer: len(branches) for layer, branches in architecture.layers.items()}
        return cls(
            of(scheme.rules), of(scheme.values), of(scheme.moments), counts, plain.constructor
        )

    @torch.no_grad()
    def apply(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        """Fill the model from a plain one, and its branches from one each with their sizes."""
        if self.constructor is None:
            super().apply(model, only)
            return
        own = {join(layer, name): tensor for _, layer, name, tensor in tensors_of(model)}
        plain = self.constructor.trace.shapes
        shapes = {key: tuple(tensor.shape) for key, tensor in own.items() if key in plain}
        attributes = {
            (layer, name): dict(sizes_in(model.get_submodule(layer)))[name]
            for (layer, name), _ in free_attributes(self.constructor.trace)
        }
        for layer in self.layers:
            conv: Any = model.get_submodule(layer)
            kernel = conv.branches[0].kernel_size
            shapes[join(layer, "weight")] = conv.out_channels, conv.in_channels, *kernel
        for number in range(-1, max(self.layers.values(), default=0)):
            names = {
                join(layer, "weight"): f"{_names(layer, count)[number]}.weight"
                for layer, count in self.layers.items()
                if 0 <= number < count
            }
            arguments = {
                layer.removesuffix(".weight"): {"out_channels": outputs, "in_channels": inputs}
                for layer, name in names.items()
                for outputs, inputs, *_ in [own[name].shape]
            }
            donor = self.constructor.build(shapes, attributes, arguments)
            if donor is None:
                super().apply(model, only)
                return
            for _, layer, name, tensor in tensors_of(donor):
                key = join(layer, name)
                place = key if number < 0 else names.get(key)
                if place in own and own[place].shape == tensor.shape:
                    own[place].copy_(tensor)
