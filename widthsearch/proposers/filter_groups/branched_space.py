"""The branched space: convolutions as parallel branches, each with out- and in-widths of its own.

A branch makes some of a layer's output channels from some of its input channels (intra-channel
pruning; Park et al. 2023, arXiv 2303.09736). The network around the layers stays the user's. The
trace of the plain space is rewritten, not run anew: each such layer's terms give way to those of
its branches, so that costs stay exact and a branched space is a :class:`SearchSpace` like any
other.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.errors import WidthsError
from widthsearch.modules.initialisation import Scheme
from widthsearch.modules.tree import clone, join, sync_attributes, tensors_of
from widthsearch.space.constraints import default_axis, substituted
from widthsearch.space.cost import QuadraticForm
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import ConvNd, children_of
from widthsearch.tracing.polynomials import Poly, add, constant, multiply, symbols_of
from widthsearch.tracing.trace import Trace, TracedAxis
from widthsearch.widths import Widths


@dataclass(frozen=True)
class Branch:
    """A part of a convolution.

    Attributes:
        filters: The layer's output channels that it makes, ascending.
        inputs: The layer's input channels that it reads, ascending.
    """

    filters: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class BranchedArchitecture:
    """An architecture with branches, as plain integers.

    Attributes:
        widths: The widths of the plain space without ties and pins (:attr:`SearchSpace.free`),
            perhaps off its grid; channels that no branch makes count.
        layers: The branches of each layer that has any. An output channel is made by one branch at
            most, and is zero where none makes it.
    """

    widths: Widths
    layers: Mapping[str, tuple[Branch, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        return {
            "widths": self.widths.to_json(),
            "layers": {
                layer: [{"filters": list(b.filters), "inputs": list(b.inputs)} for b in branches]
                for layer, branches in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, content: Any, space: SearchSpace) -> BranchedArchitecture:
        """The architecture behind :meth:`to_json`'s values, also where a person edited them.

        Args:
            content: What a JSON file holds.
            space: The plain space that it is of.

        Raises:
            WidthsError: It does not fit the space: one line that names the culprit.
        """
        given, layers = (_mapping(content, key) for key in ("widths", "layers"))
        free = space.unconstrained
        names = free.names
        if sorted(map(str, given)) != sorted(names):
            odd = sorted(set(map(str, given)) ^ set(names))[0]
            raise WidthsError(
                f"`widths` must name the {len(names)} axes of space {free.name!r}, but "
                f"{odd!r} is in one of the two alone"
            )
        for axis, traced in zip(free.axes, free.trace.axes, strict=True):
            width = given[axis.name]
            if not _whole(width) or width < 1 or width % traced.divisor:
                raise WidthsError(
                    f"axis {axis.name!r} takes multiples of {traced.divisor} from "
                    f"{traced.divisor} on, but `widths` has {width!r}"
                )
        out = {}
        for layer, listed in layers.items():
            if not isinstance(listed, list) or not listed:
                raise WidthsError(f"layer {layer!r} must list its branches, but has {listed!r}")
            out[layer] = tuple(_branch(layer, number, b) for number, b in enumerate(listed))
        made = cls(Widths(names, tuple(given[name] for name in names)), out)
        made.check(space)
        return made

    @classmethod
    def load(cls, path: Path | str, space: SearchSpace) -> BranchedArchitecture:
        """The architecture in a JSON file of :meth:`save`.

        Raises:
            WidthsError: It cannot be read, or does not fit the space.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
            raise WidthsError(f"the file {str(path)!r} cannot be read: {reason}") from None
        try:
            return cls.from_json(content, space)
        except WidthsError as error:
            raise WidthsError(f"{str(path)!r}: {error}") from None

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    def check(self, space: SearchSpace) -> None:
        """Refuse what does not fit a space.

        Raises:
            WidthsError: A layer cannot have branches, a channel does not exist, is listed twice or
                out of order, or a branch is empty.
        """
        for layer, branches in self.layers.items():
            outputs, inputs = self.sizes(space, layer)
            made: set[int] = set()
            for number, branch in enumerate(branches):
                for what, channels, count in (
                    ("filters", branch.filters, outputs),
                    ("inputs", branch.inputs, inputs),
                ):
                    where = f"`{what}` of branch {number} of layer {layer!r}"
                    if not channels:
                        raise WidthsError(f"{where} must not be empty; leave the branch out")
                    if any(a >= b for a, b in pairwise(channels)):
                        raise WidthsError(f"{where} must ascend without repeats")
                    if not 0 <= channels[0] <= channels[-1] < count:
                        odd = channels[0] if channels[0] < 0 else channels[-1]
                        raise WidthsError(f"{where} must lie in 0 to {count - 1}, but one is {odd}")
                if both := sorted(made.intersection(branch.filters)):
                    raise WidthsError(
                        f"one branch makes a channel, but two of layer {layer!r} make {both[0]}"
                    )
                made.update(branch.filters)

    def sizes(self, space: SearchSpace, layer: str) -> tuple[int, int]:
        """How many output and input channels a layer has.

        Raises:
            WidthsError: The layer cannot have branches.
        """
        key = join(layer, "weight")
        if not branchable(space, layer):
            module = dict(space.model.template.named_modules()).get(layer)
            raise WidthsError(
                f"a layer with branches must be an ungrouped Conv2d that runs, but {layer!r} is "
                f"{'no layer' if module is None else type(module).__name__} of space "
                f"{space.name!r}"
            )
        shape = space.unconstrained.trace.shapes[key]
        units = [axis.divisor for axis in space.unconstrained.trace.axes]
        outputs, inputs = (QuadraticForm.from_poly(poly, units) for poly in shape[:2])
        return int(outputs(self.widths.vector)), int(inputs(self.widths.vector))


def branchable(space: SearchSpace, layer: str) -> bool:
    """Whether a layer can have branches: an ungrouped Conv2d of that very class, run by itself."""
    module = dict(space.model.template.named_modules()).get(layer)
    return type(module) is nn.Conv2d and module.groups == 1 and layer in space.trace.layer_macs


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution that reads one channel a filter, and several in all."""
    convolution = isinstance(module, ConvNd)
    return convolution and 1 < module.groups == module.in_channels  # type: ignore[operator, return-value]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mapping(content: Any, key: str) -> dict[str, Any]:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, dict):
        raise WidthsError(f"a branched architecture must hold a mapping `{key}`, but has {value!r}")
    return value


def _branch(layer: str, number: int, content: Any) -> Branch:
    lists = []
    for key in ("filters", "inputs"):
        channels = content.get(key) if isinstance(content, dict) else None
        if not isinstance(channels, list) or not all(map(_whole, channels)):
            raise WidthsError(
                f"`{key}` of branch {number} of layer {layer!r} must list whole numbers, but is "
                f"{channels!r:.60}"
            )
        lists.append(tuple(channels))
    return Branch(*lists)


# -- the layer ---------------------------------------------------------------------------------


class BranchedConv2d(nn.Module):
    """A convolution as parallel branches: gathers inputs, convolves per branch, places outputs.

    Which channels a branch reads and makes is what it was given at the sizes it was given for. At
    other sizes (of a :func:`branched` space) it follows from the sizes alone: branch b of B reads
    the n channels from ``b · C / B`` on, going round; outputs are made in order, spread evenly
    where there are fewer filters than channels, and evenly spaced filters count where there are
    more.

    Args:
        conv: Whose kernel, stride, padding, dilation, dtype and bias it has.
        in_channels: Input channels of the layer.
        out_channels: Output channels of the layer; those that no branch makes are zero (plus bias).
        given: The branches.
        device: Where the tensors are made; their values are undefined.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        conv: nn.Conv2d,
        in_channels: int,
        out_channels: int,
        given: Sequence[Branch],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.given = tuple(given)
        like: dict[str, Any] = {
            name: getattr(conv, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        like |= {"device": "meta", "dtype": conv.weight.dtype, "bias": False}
        self.branches = nn.ModuleList(
            nn.Conv2d(len(branch.inputs), len(branch.filters), **like) for branch in given
        )
        self.branches.requires_grad_(conv.weight.requires_grad)
        self.register_parameter("bias", None)
        if conv.bias is not None:
            values = torch.empty(out_channels, dtype=conv.bias.dtype, device="meta")
            self.bias = nn.Parameter(values, requires_grad=conv.bias.requires_grad)
        self.to_empty(device=device)
        self._given_for = self._sizes()
        self._places: dict[Any, tuple[list[Tensor | None], Tensor | None]] = {}

    def reset_parameters(self) -> None:
        """Initialise the bias as torch's convolutions do; the branches initialise themselves."""
        if self.bias is not None:
            bound = (self.in_channels * self._convs()[0].weight[0, 0].numel()) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def _convs(self) -> list[nn.Conv2d]:
        return list(self.branches)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        size: tuple[Any, ...] = x.shape
        if isinstance(size[1], torch.SymInt):  # channels cannot be followed through here
            parts = [b(x.new_empty((size[0], b.in_channels, *size[2:]))) for b in self._convs()]
            y = x.new_empty((size[0], self.out_channels, *parts[0].shape[2:]))
        else:
            gathers, source = self._indices(x.device)
            y = torch.cat(
                [
                    branch(x if gather is None else x.index_select(1, gather))
                    for branch, gather in zip(self._convs(), gathers, strict=True)
                ],
                1,
            )
            if source is not None:
                y = nn.functional.pad(y, (0, 0, 0, 0, 0, 1)).index_select(1, source)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def extra_repr(self) -> str:
        """The sizes; what the branches are is below."""
        return f"{self.in_channels}, {self.out_channels}"

    def current(self) -> tuple[Branch, ...]:
        """The channels of each branch at the present sizes; filters beyond the width have none."""
        sizes = self._sizes()
        if sizes == self._given_for:
            return self.given
        total, inputs, outputs = sum(f for f, _ in sizes[2:]), *sizes[:2]
        out, made = [], 0
        for number, (filters, count) in enumerate(sizes[2:]):
            start = number * inputs // (len(sizes) - 2)
            reads = [(start + i) % inputs for i in range(count)]
            if total <= outputs:
                makes = [(made + i) * outputs // total for i in range(filters)]
            else:
                wanted = {j * total // outputs: j for j in range(outputs)}
                makes = [wanted.get(made + i, -1) for i in range(filters)]
            made += filters
            out.append(Branch(tuple(makes), tuple(reads)))
        return tuple(out)

    def _sizes(self) -> tuple[Any, ...]:
        pairs = [tuple(branch.weight.shape[:2]) for branch in self._convs()]
        return self.in_channels, self.out_channels, *pairs

    def _indices(self, device: torch.device) -> tuple[list[Tensor | None], Tensor | None]:
        """What each branch gathers, and where each output channel lies in their concatenation.

        None is all in order; a channel that no branch makes lies behind the last.
        """
        key = device, self._sizes()
        if key not in self._places:
            everything = tuple(range(self.in_channels))
            branches = self.current()
            makes = [channel for branch in branches for channel in branch.filters]
            source = [len(makes)] * self.out_channels
            for position, channel in enumerate(makes):
                if channel >= 0:
                    source[channel] = position
            in_order = makes == list(range(self.out_channels))
            with torch.inference_mode(False):  # what is kept from here must train later
                gathers = [
                    None if b.inputs == everything else torch.tensor(b.inputs, device=device)
                    for b in branches
                ]
                placed = None if in_order else torch.tensor(source, device=device)
            self._places = {key: (gathers, placed)}
        return self._places[key]


# -- the space ---------------------------------------------------------------------------------


def branched(space: SearchSpace, architecture: BranchedArchitecture) -> SearchSpace:
    """The space around a branched architecture: its base is exactly that.

    Axes are ``LAYER.branches.I.out`` and ``LAYER.branches.I.in`` for each branch, and the plain
    axes of ``space.free``, but for those that one branched layer alone makes: such a width is the
    sum of its branches' filters. At the base, networks have the architecture's channels; at other
    widths :class:`BranchedConv2d` says which. Each branch is initialised as the model initialises
    the layer, at the branch's sizes. Which channel is which is not followed through branches.

    Args:
        space: The plain space; its ties, pins and grid do not hold in the new one.
        architecture: The branches of each of its layers that has any.

    Raises:
        WidthsError: The architecture does not fit the space.
    """
    architecture.check(space)
    free = space.unconstrained
    trace, bases = _rewritten(free, architecture)
    axes = [default_axis(a.name, bases[a.name], a.divisor, a.layers) for a in trace.axes]
    template = clone(free.model.template, {})
    for layer, branches in architecture.layers.items():
        conv = template.get_submodule(layer)
        assert isinstance(conv, nn.Conv2d)
        outputs, inputs = architecture.sizes(space, layer)
        _put(template, conv, BranchedConv2d(conv, inputs, outputs, branches, "meta"))
    digest = hashlib.sha256(json.dumps(architecture.to_json()).encode()).hexdigest()[:8]
    name = f"{free.name}-branched-{digest}"
    scheme = _scheme(free.model.scheme, architecture)
    model = replace(free.model, name=name, trace=trace, template=template, scheme=scheme)
    return SearchSpace(name, tuple(axes), model)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it stands."""
    for module in list(model.modules()):
        for name, child in children_of(module).items():
            if child is old:
                children_of(module)[name] = new


def _names(layer: str, count: int) -> list[str]:
    return [f"{layer}.branches.{number}" for number in range(count)]


def positions(space: SearchSpace, layer: str) -> int:
    """How often a layer's kernel is applied to one sample: its MACs over its weights' number.

    Args:
        space: A plain space without ties and pins.
        layer: A convolution of it.
    """
    units = [axis.divisor for axis in space.trace.axes]
    base = space.base.vector
    weights = 1
    for poly in space.trace.shapes[join(layer, "weight")]:
        weights *= int(QuadraticForm.from_poly(poly, units)(base))
    macs = int(QuadraticForm.from_poly(space.trace.layer_macs[layer], units)(base))
    assert macs % weights == 0
    return macs // weights


def _rewritten(
    space: SearchSpace, architecture: BranchedArchitecture
) -> tuple[Trace, dict[str, int]]:
    """The plain trace with the branches' terms, and the base of each of its axes."""
    bases = dict(architecture.widths)
    made_by = _sole_makers(space, architecture)
    kept = [i for i in range(len(space.axes)) if i not in made_by]
    axes = [replace(space.trace.axes[i], base=bases[space.names[i]]) for i in kept]
    values: list[Poly] = [{}] * len(space.axes)
    for new, old in enumerate(kept):
        values[old] = {(new,): 1}
    pairs: dict[str, list[tuple[Poly, Poly]]] = {}
    for layer, branches in architecture.layers.items():
        for name, branch in zip(_names(layer, len(branches)), branches, strict=True):
            pair: list[Poly] = []
            for dim, end, count in ((0, "out", branch.filters), (1, "in", branch.inputs)):
                maker = f"{name}.weight", dim
                pair.append({(len(axes),): 1})
                axes.append(TracedAxis(f"{name}.{end}", len(count), 1, (name,), maker))
                bases[f"{name}.{end}"] = len(count)
            pairs.setdefault(layer, []).append((pair[0], pair[1]))
    for axis, layer in made_by.items():
        values[axis] = _sum([outputs for outputs, _ in pairs[layer]])
    trace = substituted(space.trace, axes, (), values)
    macs, params, activations = trace.macs, trace.params, trace.activations
    shapes, layer_macs, attributes = (
        dict(trace.shapes),
        dict(trace.layer_macs),
        dict(trace.attributes),
    )
    for layer, branches_of in pairs.items():
        outputs, inputs, *kernel = shapes.pop(join(layer, "weight"))
        times = positions(space, layer)
        area = multiply(kernel[0], kernel[1])
        plain = multiply(multiply(outputs, inputs), area)
        macs = add(macs, layer_macs.pop(layer), -1)
        params = add(params, plain, -1)
        activations = add(activations, outputs, -times)
        for name, (out, into) in zip(_names(layer, len(branches_of)), branches_of, strict=True):
            weights = multiply(multiply(out, into), area)
            layer_macs[name] = multiply(weights, constant(times))
            macs = add(macs, layer_macs[name])
            params = add(params, weights)
            activations = add(activations, out, times)
            shapes[f"{name}.weight"] = (out, into, *kernel)
        attributes[layer, "out_channels"] = outputs
        attributes[layer, "in_channels"] = inputs
    for i, traced in enumerate(axes):
        if traced.maker[0] not in shapes:  # a layer that has branches now: whoever has that size
            same = [
                (key, dim)
                for key, shape in shapes.items()
                for dim, poly in enumerate(shape)
                if poly == {(i,): traced.divisor}
            ]
            axes[i] = replace(traced, maker=(same or [traced.maker])[0])
    rewritten = replace(
        trace,
        axes=tuple(axes),
        shapes=shapes,
        attributes=attributes,
        macs=macs,
        params=params,
        activations=activations,
        layer_macs=layer_macs,
    )
    return rewritten, bases


def _sum(polys: Sequence[Poly]) -> Poly:
    out: Poly = {}
    for poly in polys:
        out = add(out, poly)
    return out


def _sole_makers(space: SearchSpace, architecture: BranchedArchitecture) -> dict[int, str]:
    """The axes whose channels one branched layer makes, each of them, and nothing else does."""
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


def _scheme(scheme: Scheme, architecture: BranchedArchitecture) -> Scheme:
    """The scheme with each branch initialised like its layer."""

    def of(entries: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(entries)
        for layer, branches in architecture.layers.items():
            key = join(layer, "weight")
            if key in out:
                value = out.pop(key)
                names = _names(layer, len(branches))
                out.update({f"{name}.weight": value for name in names})
        return out

    return Scheme(
        of(scheme.steps), of(scheme.shapes), of(scheme.constants), of(scheme.moments), scheme.kept
    )


# -- networks ----------------------------------------------------------------------------------


@torch.no_grad()
def with_branches(model: nn.Module, architecture: BranchedArchitecture) -> nn.Module:
    """A plain network's copy with branches, with its weights where a branch has them.

    It computes what the network does with all other weights of those layers at zero.

    Args:
        model: A network of the plain space, at the architecture's widths; it is left as it is.
        architecture: The branches.
    """
    out = copy.deepcopy(model)
    for layer, branches in architecture.layers.items():
        conv = out.get_submodule(layer)
        assert isinstance(conv, nn.Conv2d)
        new = _like(conv, branches)
        for part, branch in zip(new._convs(), branches, strict=True):
            filters, inputs = (_index(c, conv.weight) for c in (branch.filters, branch.inputs))
            part.weight.copy_(conv.weight[filters[:, None], inputs])
        if new.bias is not None:
            assert conv.bias is not None
            new.bias.copy_(conv.bias)
        _put(out, conv, new.train(conv.training))
    return out


@torch.no_grad()
def without_branches(model: nn.Module) -> nn.Module:
    """The plain network that computes the same, with zeros where no branch has a weight."""
    out = copy.deepcopy(model)
    for layer in [m for m in out.modules() if isinstance(m, BranchedConv2d)]:
        first = layer._convs()[0]
        weight = first.weight.new_zeros(layer.out_channels, layer.in_channels, *first.kernel_size)
        for part, branch in zip(layer._convs(), layer.current(), strict=True):
            kept = [i for i, channel in enumerate(branch.filters) if channel >= 0]
            rows = weight.new_zeros(len(kept), *weight.shape[1:])
            rows.index_add_(1, _index(branch.inputs, weight), part.weight[kept])
            weight[[branch.filters[i] for i in kept]] = rows
        _put(out, layer, _plain(layer, weight))
    return out


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """A copy for inference, where branches that read the same channels are one convolution.

    A layer that is left with one branch, of all its channels, is a plain ``Conv2d``. The outputs
    are the same up to rounding; the MACs are the same.
    """
    out = copy.deepcopy(model)
    for layer in [m for m in out.modules() if isinstance(m, BranchedConv2d)]:
        buckets: dict[tuple[int, ...], list[tuple[Branch, Tensor]]] = {}
        for part, branch in zip(layer._convs(), layer.current(), strict=True):
            buckets.setdefault(branch.inputs, []).append((branch, part.weight))
        merged: list[Branch] = []
        weights: list[Tensor] = []
        for inputs, parts in buckets.items():
            filters = [channel for branch, _ in parts for channel in branch.filters]
            order = sorted(range(len(filters)), key=filters.__getitem__)
            merged.append(Branch(tuple(sorted(filters)), inputs))
            weights.append(torch.cat([weight for _, weight in parts])[order])
        everything = Branch(tuple(range(layer.out_channels)), tuple(range(layer.in_channels)))
        if merged == [everything]:
            _put(out, layer, _plain(layer, weights[0]))
            continue
        new = _like(layer, merged)
        for part, weight in zip(new._convs(), weights, strict=True):
            part.weight.copy_(weight)
        if layer.bias is not None:
            assert new.bias is not None
            new.bias.copy_(layer.bias)
        _put(out, layer, new.train(layer.training))
    return out


def _index(channels: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(channels, device=like.device)


def _like(layer: nn.Conv2d | BranchedConv2d, branches: Sequence[Branch]) -> BranchedConv2d:
    """A layer with other branches and undefined weights."""
    conv = _plain(layer, layer._convs()[0].weight) if isinstance(layer, BranchedConv2d) else layer
    return BranchedConv2d(conv, layer.in_channels, layer.out_channels, branches, conv.weight.device)


def _plain(layer: BranchedConv2d, weight: Tensor) -> nn.Conv2d:
    """A plain layer with the kernel, stride and so on of a branched one."""
    conv = copy.copy(layer._convs()[0])
    conv._parameters = {"weight": nn.Parameter(weight), "bias": layer.bias}
    sync_attributes(conv)
    return conv
