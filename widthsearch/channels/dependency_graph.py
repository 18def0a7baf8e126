"""Which elements of which tensors belong to channel i of an axis.

Every position along every symbolic dim of every parameter and buffer is an element. The model runs
once, and next to each tensor runs a tensor of the elements it is made of: views, concatenations and
shuffles act on the elements as they act on values; where values meet (in a sum, a norm, a matrix
product) their elements are one. What is one in the end is a *unit* of an axis: what can only be
removed together. A unit is a channel, or as many channels as the axis has groups or heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from widthsearch.errors import SpaceError, WidthsError
from widthsearch.modules.tree import join, tensors_of
from widthsearch.tracing.inputs import sample
from widthsearch.tracing.interpreter import BATCH_NORMS, run_on_meta
from widthsearch.tracing.polynomials import System, as_constant, divide, symbols_of
from widthsearch.tracing.symbolic_ints import poly_of, size
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace

aten = torch.ops.aten

Field = Tensor
"""Elements (int64) of a tensor, broadcastable to its shape; -1 where there is none."""

_SHAPE_KEEPING = 2  # the spatial dims that pooling, resizing and padding may change


@dataclass(frozen=True, eq=False)
class Channels:
    """Where the units of each axis lie in a network of certain widths.

    Attributes:
        widths: The network's widths.
        units: Per axis, how many units it has: its width by its channels per unit.
        axis: Per tensor and dim that follows axes, the axis of each position, -1 where unknown.
        unit: The same for the unit within the axis.
        readers: Per tensor, the dim along which it multiplies channels that it reads.
        unknown: Axes for which the run did not show where all of their units lie.
    """

    widths: Widths
    units: tuple[int, ...]
    axis: Mapping[tuple[str, int], NDArray[np.int64]]
    unit: Mapping[tuple[str, int], NDArray[np.int64]]
    readers: Mapping[str, int]
    unknown: frozenset[int]


class _Elements:
    """Elements, and which of them are one (union-find).

    Attributes:
        wandering: Elements whose place depends on the widths.
    """

    def __init__(self) -> None:
        self.parent = np.empty(0, np.int64)
        self.wandering: list[NDArray[np.int64]] = []

    def new(self, count: int) -> NDArray[np.int64]:
        """So many new elements."""
        first = len(self.parent)
        made = np.arange(first, first + count, dtype=np.int64)
        self.parent = np.concatenate([self.parent, made])
        return made

    def find(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """The representative of each element."""
        while True:
            up = self.parent[elements]
            if (up == elements).all():
                return up
            self.parent[elements] = self.parent[up]
            elements = up

    def unite(self, a: Field, b: Field) -> None:
        """Make elements at the same place one; -1 is no element."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (x >= 0) & (y >= 0)
        x, y = self.find(x[both]), self.find(y[both])
        while (apart := x != y).any():
            x, y = x[apart], y[apart]
            np.minimum.at(self.parent, np.maximum(x, y), np.minimum(x, y))
            x, y = self.find(x), self.find(y)


def _hinted(value: Any) -> Any:
    """Symbolic sizes as numbers."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, list | tuple):
        return type(value)(_hinted(v) for v in value)
    return value


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(_hinted(n) for n in tensor.shape)


def _compressed(field: Field) -> Field:
    """The same, with size 1 along every dim on which it does not depend."""
    for dim in range(field.dim()):
        if field.shape[dim] > 1 and bool((field == field.narrow(dim, 0, 1)).all()):
            field = field.narrow(dim, 0, 1)
    return field


def _varies(field: Field) -> set[int]:
    return {dim for dim, n in enumerate(field.shape) if n > 1}


_VIEWS = frozenset(
    getattr(aten, name)
    for name in [
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "flip",
        "roll",
        "alias",
        "detach",
        "clone",
        "contiguous",
        "unfold",
        "repeat",
        "pixel_shuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "view_as_real",
        "movedim",
        "narrow",
        "flatten",
        "unflatten",
        "lift_fresh",
        "swapaxes",
    ]
    if hasattr(aten, name)
)
_SPATIAL = frozenset(
    getattr(aten, name)
    for name in [
        "max_pool2d_with_indices",
        "max_pool2d",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "avg_pool1d",
        "max_pool3d_with_indices",
        "upsample_bilinear2d",
        "upsample_nearest2d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "reflection_pad2d",
        "replication_pad2d",
        "avg_pool3d",
        "_adaptive_avg_pool3d",
    ]
    if hasattr(aten, name)
)
_REDUCTIONS = frozenset({aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.logsumexp})


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries elements beside tensors."""

    def __init__(self, elements: _Elements) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        self.fields: dict[int, list[Field]] = {}
        self.kept: list[Tensor] = []  # so that no id is used twice
        self.parameters: dict[int, str] = {}
        self.readers: dict[str, int] = {}

    def put(self, tensor: Tensor, fields: Iterable[Field]) -> None:
        """Say what a tensor is made of."""
        found = [f for f in fields if _varies(f)]
        if found:
            self.fields[id(tensor)] = found
            self.kept.append(tensor)
        else:
            self.fields.pop(id(tensor), None)

    def of(self, tensor: Any) -> list[Field]:
        """What a tensor is made of."""
        return self.fields.get(id(tensor), []) if isinstance(tensor, Tensor) else []

    def along(self, tensor: Tensor, dim: int) -> Field | None:
        """The elements along one dim of a tensor, shape (n,), if that is all they depend on."""
        for field in self.of(tensor):
            if _varies(field) == {dim % tensor.dim()}:
                return field.reshape(-1)
        return None

    def read(self, weight: Tensor, dim: int) -> None:
        """Note that a parameter multiplies what it reads along a dim."""
        base = weight if id(weight) in self.parameters else self.origin.get(id(weight), weight)
        if id(base) in self.parameters:
            name = self.parameters[id(base)]
            if base is not weight:  # a view of it, turned or repeated for a batch
                own = self.along(weight, dim)
                held = [self.along(base, d) for d in range(base.dim())]
                if base.dim() == 2:
                    dim = 1 - (dim + base.dim() - weight.dim())  # with one channel: turned
                for d, elements in enumerate(held):
                    if own is not None and elements is not None and torch.equal(own, elements):
                        dim = d
            self.readers[name] = dim

    origin: dict[int, Tensor]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if any(isinstance(a, Tensor) and a.device.type != "meta" for a in args):
            args = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        if packet in BATCH_NORMS:
            return self._batch_norm(len(func._schema.returns), *args)
        out = func(*args, **kwargs)
        self._carry(func, packet, args, kwargs, out)
        return out

    def _batch_norm(self, returns: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        for vector in rest:
            if isinstance(vector, Tensor) and vector.dim() == 1:
                self._meet(x, vector, 1)
        self.put(out, self.of(x))
        nothing = torch.empty((0,), device="meta")
        return (out, *([nothing] * (returns - 1)))

    def _meet(self, x: Tensor, vector: Tensor, dim: int) -> None:
        """A vector acts on the channels of x, along a dim."""
        of_x, of_vector = self.along(x, dim), self.along(vector, 0)
        if of_x is not None and of_vector is not None:
            self.elements.unite(of_x, of_vector)

    def _carry(
        self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if packet is aten.convolution:
            self._convolution(out, *args)
        elif packet in (aten.mm, aten.bmm):
            self._product(args[0], args[1], out)
        elif packet in (aten.addmm, aten.baddbmm):
            self._product(args[1], args[2], out)
            self._meet(out, args[0], out.dim() - 1)
        elif "scaled_dot_product" in func._schema.name:
            self._attention(args[0], args[1], args[2], out)
        elif packet in _VIEWS:
            self._view(func, args, kwargs, out)
        elif packet in (aten.cat, aten.stack):
            self._join(packet, args, kwargs, out)
        elif packet in _SPATIAL:
            first = out[0] if isinstance(out, tuple) else out
            kept = [f for f in self.of(args[0]) if max(_varies(f)) < f.dim() - _SHAPE_KEEPING]
            self.put(first, kept)
        elif packet in _REDUCTIONS:
            self._reduce(func, args, kwargs, out)
        elif packet is aten.constant_pad_nd:
            self._pad(args, out)
        elif packet is aten.native_group_norm:
            for vector in args[1:3]:
                if isinstance(vector, Tensor):
                    self._meet(args[0], vector, 1)
            channels = self.along(args[0], 1)
            if channels is not None:  # one can only go from all groups at once
                grouped = channels.view(args[6], -1)
                self.elements.unite(grouped, grouped[:1])
            self.put(out[0], self.of(args[0]))
        elif packet is aten.native_layer_norm:
            for vector in args[2:4]:
                if isinstance(vector, Tensor):
                    self._meet(args[0], vector, args[0].dim() - 1)
            self.put(out[0], self.of(args[0]))
        else:
            self._pointwise(args, kwargs, out)

    # -- rules -------------------------------------------------------------------------------

    def _convolution(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> None:
        transposed, groups = options[3], _hinted(options[5])
        own, other = self.along(weight, 0), self.along(weight, 1)
        channels = self.along(x, 1)
        inputs, outputs = _shape(x)[1], _shape(out)[1]
        if channels is not None or other is not None:  # a stem reads no axis
            self.read(weight, 0 if transposed else 1)
        if transposed:
            made = other
            if channels is not None and own is not None:
                self.elements.unite(channels, own)
        else:
            made = own
            if channels is not None and other is not None:
                self.elements.unite(channels.view(groups, -1), other.view(1, -1))
        follows = not isinstance(options[5], int)  # else so many groups at any widths
        if channels is not None and made is not None and inputs == groups > 1 and follows:
            # depthwise: each filter has a channel of its own
            self.elements.unite(channels.view(-1, 1), made.view(inputs, -1))
        if made is not None and transposed and groups > 1:
            made = made.repeat(groups)
        elif made is not None and groups > 1 and isinstance(options[5], int):
            grouped = made.view(groups, -1)  # one filter can only go from all groups at once
            self.elements.unite(grouped, grouped[:1])
        if made is not None and bias is not None:
            of_bias = self.along(bias, 0)
            if of_bias is not None:
                self.elements.unite(made, of_bias)
        if made is not None:
            self.put(out, [made.view(1, outputs, *[1] * (out.dim() - 2))])

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """(…, m, k) × (…, k, n)."""
        self.read(b, 0 if b.dim() == 2 else 1)
        rows, columns = [], []
        for f in self.of(a):
            contracted = f.dim() - 1 in _varies(f)
            for g in self.of(b):
                if contracted and g.dim() - 2 in _varies(g):
                    self.elements.unite(f.transpose(-1, -2), g)
            if f.dim() - 2 in _varies(f) and not contracted:
                rows.append(f)
            elif contracted and f.dim() == 3 and 0 in _varies(f):
                rows.append(f.narrow(-1, 0, 1))  # the head that it belongs to
        for g in self.of(b):
            contracted = g.dim() - 2 in _varies(g)
            if g.dim() - 1 in _varies(g) and not contracted:
                columns.append(g)
        fields = rows + columns
        for f in rows:
            for g in columns:
                if f.dim() == 3 and _varies(f) == {0} and 0 in _varies(g):
                    self._heads(f, g, out.shape[0])
                    fields = columns
        self.put(out, fields)

    def _heads(self, scores: Field, values: Field, heads: Any) -> None:
        """Scores of a head meet its values: all of them go with the head, if heads can go."""
        if as_constant(poly_of(heads)) is None:
            self.elements.unite(scores, values)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        for f in self.of(query):
            for g in self.of(key):
                if _varies(f) == _varies(g):
                    self.elements.unite(f, g)
            for g in self.of(value):
                if query.dim() == 4 and 1 in _varies(f) and 1 in _varies(g):
                    self._heads(f.narrow(-1, 0, 1), g, query.shape[1])
        self.put(first, self.of(value))

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, rest = args[0], _hinted(list(args[1:]))
        outputs = list(out) if isinstance(out, list | tuple) else [out]
        if id(x) in self.parameters or id(x) in self.origin:
            for o in outputs:
                self.origin[id(o)] = self.origin.get(id(x), x)
                self.kept.append(o)
        collected: list[list[Field]] = [[] for _ in outputs]
        for field in self.of(x):
            full = field.expand(_shape(x))
            name = func._schema.name.split("::")[1]
            if name in ("view", "_unsafe_view"):
                moved: Any = full.reshape(_shape(out))
                self._check_split(field, x, out)
            elif name in ("alias", "detach", "clone", "contiguous", "lift_fresh"):
                moved = full
            else:
                moved = func(full, *rest, **{k: _hinted(v) for k, v in kwargs.items()})
            parts = list(moved) if isinstance(moved, list | tuple) else [moved]
            made = [_compressed(part) for part in parts]
            if len(made) > 1:
                first = made[0]
                for part in made[1:]:
                    if part.shape == first.shape and _varies(part):
                        self.elements.unite(first, part)  # halves shrink together
            for fields, part, o in zip(collected, made, outputs, strict=True):
                fields.append(self._rigid(part, o))
        for o, fields in zip(outputs, collected, strict=True):
            self.put(o, fields)

    def _check_split(self, field: Field, x: Tensor, out: Tensor) -> None:
        """Parts of a sum that is split evenly cross the seams as their widths change."""
        for dim in _varies(field):
            whole = poly_of(x.shape[dim])
            if len(whole) > 1 and all(divide(poly_of(n), whole) is None for n in out.shape):
                self.elements.wandering.append(field.reshape(-1).numpy())

    def _rigid(self, field: Field, tensor: Tensor) -> Field:
        """Along a dim whose size is fixed nothing can go alone: all along it is one."""
        for dim in sorted(_varies(field)):
            if as_constant(poly_of(tensor.shape[dim])) is not None:
                self.elements.unite(field, field.narrow(dim, 0, 1))
        return field

    def _join(
        self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        parts = args[0]
        if not any(self.of(p) for p in parts):
            return
        whole = []
        for p in parts:
            fields = self.of(p)
            missing = torch.full([1] * p.dim(), -1)
            whole.append((fields[0] if fields else missing).expand(_shape(p)))
        for p in parts:  # what concatenation does not move must agree
            for f, g in zip(self.of(p), self.of(parts[0]), strict=False):
                if packet is aten.cat and dim % p.dim() not in _varies(f) | _varies(g):
                    self.elements.unite(f, g)
        joined = torch.cat(whole, dim) if packet is aten.cat else torch.stack(whole, dim)
        self.put(out, [_compressed(joined)])

    def _reduce(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = args[0]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(out, Tensor) or dims is None:
            return
        gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        keep = out.dim() == x.dim()
        fields = []
        for f in self.of(x):
            if not _varies(f) & gone:
                shape = [n for d, n in enumerate(f.shape) if keep or d not in gone]
                fields.append(f.reshape(shape))
        self.put(out, fields)

    def _pad(self, args: tuple[Any, ...], out: Tensor) -> None:
        amounts = _hinted(list(args[1]))
        fields = []
        for f in self.of(args[0]):
            full = f.expand(_shape(args[0]))
            fields.append(_compressed(torch.constant_pad_nd(full, amounts, -1)))
        self.put(out, fields)

    def _pointwise(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Values that meet at the same place are one."""
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not isinstance(first, Tensor):
            return
        shape = _shape(first)
        fields: list[Field] = []
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            for f in self.of(x):
                if f.dim() > len(shape) or x.dim() > len(shape):
                    continue
                f = f.view(*[1] * (len(shape) - f.dim()), *f.shape)
                if any(n not in (1, m) for n, m in zip(f.shape, shape, strict=True)):
                    continue
                same = [i for i, g in enumerate(fields) if _varies(g) & _varies(f)]
                for i in same:
                    self.elements.unite(fields[i], f)
                if not same:
                    fields.append(f)
                else:
                    i = same[0]
                    a, b = torch.broadcast_tensors(fields[i], f)  # type: ignore[no-untyped-call]
                    fields[i] = _compressed(torch.where(a >= 0, a, b))
        self.put(first, fields)


def find_channels(space: SearchSpace, widths: Widths) -> Channels:
    """Where each axis's units lie in every parameter and buffer of a network of these widths."""
    system = System(
        hints=[w // a.unit for w, a in zip(widths.vector, space.trace.axes, strict=True)]
    )
    elements = _Elements()
    run = _Run(elements)
    run.origin = {}
    own: dict[tuple[str, int], NDArray[np.int64]] = {}
    copies: dict[int, Tensor] = {}
    for _, layer, name, tensor in tensors_of(space.template):
        key = join(layer, name)
        shape = space.trace.shapes[key]
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
    symbolic = space.substituted(copies, lambda poly: size(system, poly)).eval()
    run_on_meta(symbolic, sample(space.input_shape, 1, "meta"), run)
    units = [w // a.unit for w, a in zip(widths.vector, space.trace.axes, strict=True)]
    roots = {where: elements.find(made) for where, made in own.items()}
    unit_of = [_numbered(space, i, count, roots) for i, count in enumerate(units)]
    axes: dict[tuple[str, int], NDArray[np.int64]] = {}
    unit: dict[tuple[str, int], NDArray[np.int64]] = {}
    unknown: set[int] = set()
    for (key, dim), these in roots.items():
        length = space.trace.shapes[key][dim]
        owners = sorted(symbols_of(length))
        found = np.full((len(these), 2), -1)
        for position, root in enumerate(these.tolist()):
            for number in owners:
                if root in unit_of[number]:
                    found[position] = number, unit_of[number][root]
        axes[key, dim], unit[key, dim] = found.T
        for number in owners:
            counts = np.bincount(found[found[:, 0] == number, 1], minlength=units[number])
            if (counts != length.get((number,), 0)).any():
                unknown.add(number)
    lost = np.concatenate([np.empty(0, np.int64), *elements.wandering])
    lost_roots = set(elements.find(lost[lost >= 0]).tolist())
    unknown.update(i for i, a in enumerate(unit_of) if not lost_roots.isdisjoint(a))
    for i, a in enumerate(unit_of):  # a channel of one axis that is also one of another's
        unknown.update(n for k, b in enumerate(unit_of[:i]) if a.keys() & b.keys() for n in (i, k))
    return Channels(widths, tuple(units), axes, unit, run.readers, frozenset(unknown))


def _numbered(
    space: SearchSpace,
    axis: int,
    count: int,
    roots: Mapping[tuple[str, int], NDArray[np.int64]],
) -> dict[int, int]:
    """The unit of an axis that each representative stands for.

    An axis can hold several sets of channels that only have their number in common (the residual
    stream of a transformer, and the heads of its attention). Each is numbered on its own, from the
    axis's maker on. Where one has more channels than there are units, a unit is several of them.
    """
    followers = [
        where for where in roots if space.trace.shapes[where[0]][where[1]].keys() == {(axis,)}
    ]
    followers.sort(key=lambda where: where != space.trace.axes[axis].maker)
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


def unit_sums(channels: Channels, key: str, dim: int, values: Tensor) -> dict[int, Tensor]:
    """Sum values by the unit that they belong to.

    Args:
        channels: Where units lie.
        key: A parameter or buffer.
        dim: One of its dims that follows axes.
        values: One value for each position along the dim, shape (n,).

    Returns:
        Per axis that the dim follows, shape (units,).
    """
    axes, units = channels.axis[key, dim], channels.unit[key, dim]
    out = {}
    for axis in sorted(set(axes.tolist()) - {-1}):
        mine = torch.from_numpy(np.flatnonzero(axes == axis)).to(values.device)
        index = torch.from_numpy(units[axes == axis]).to(values.device)
        sums = torch.zeros(channels.units[axis], dtype=values.dtype, device=values.device)
        out[axis] = sums.index_add_(0, index, values[mine])
    return out


def gate_gradients(channels: Channels, model: nn.Module) -> list[Tensor]:
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
    out = [torch.zeros(n, device=device) for n in channels.units]
    read: set[int] = set()

    def collect(key: str, dim: int) -> None:
        parameter = parameters[key]
        if parameter.grad is None:
            return
        products = (parameter.detach() * parameter.grad).movedim(dim, 0)
        products = products.reshape(len(products), -1).sum(1)
        for axis, sums in unit_sums(channels, key, dim, products).items():
            read.add(axis)
            out[axis] = out[axis] + sums

    for key, dim in channels.readers.items():
        where = _read_dim(channels, parameters[key], key, dim)
        if where is not None:
            collect(*where)
    unread = set(range(len(out))) - read
    for layer, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            for name in ("weight", "bias"):
                where = join(layer, name), 0
                if where in channels.axis and set(channels.axis[where].tolist()) <= unread:
                    collect(*where)
    return out


# -- keeping some of them ----------------------------------------------------------------------

Keep = Mapping[str, Iterable[int]]
"""Per axis by name, the channels that are kept; axes left out keep all of theirs."""


def kept_units(space: SearchSpace, channels: Channels, keep: Keep) -> list[NDArray[np.bool_]]:
    """Per axis, which units are kept.

    Raises:
        WidthsError: An axis or a channel does not exist, or channels are kept without those of the
            same unit (of a group, or a head).
        SpaceError: The run did not show where an axis's channels lie.
    """
    out = [np.ones(n, bool) for n in channels.units]
    for name, chosen in keep.items():
        if name not in channels.widths:
            raise WidthsError(f"space {space.name!r} has no axis {name!r} to keep channels of")
        i = channels.widths.names.index(name)
        width, unit = channels.widths.vector[i], space.trace.axes[i].unit
        kept = np.zeros(width, bool)
        for channel in chosen:
            if not 0 <= channel < width:
                raise WidthsError(
                    f"axis {name!r} has channels 0 to {width - 1}, but {channel} was to be kept"
                )
            kept[channel] = True
        if not kept.all() and i in channels.unknown:
            raise SpaceError(
                f"the channels of axis {name!r} cannot be told apart from those of others, so none "
                "of them can be cut; leave the axis out"
            )
        counts = np.bincount(channels.unit[space.trace.axes[i].maker][kept], minlength=len(out[i]))
        if not np.isin(counts, (0, unit)).all():
            raise WidthsError(
                f"channels of axis {name!r} go in units of {unit} (groups or heads), but unit "
                f"{int(np.argmax((counts != 0) & (counts != unit)))} was to be kept in part"
            )
        out[i] = counts == unit
    return out


def _kept_positions(
    channels: Channels, kept: Sequence[NDArray[np.bool_]], where: tuple[str, int]
) -> NDArray[np.bool_]:
    axes, units = channels.axis[where], channels.unit[where]
    return np.array([a < 0 or kept[a][u] for a, u in zip(axes, units, strict=True)], bool)


def inherit(
    space: SearchSpace, model: nn.Module, keep: Keep, channels: Channels | None = None
) -> nn.Module:
    """A narrower network with the weights that belong to the channels that are kept.

    In eval mode it computes what ``model`` does with the other channels masked (:func:`masked`),
    but where a width is part of the function itself (the 1/√d of attention).

    Args:
        space: The space.
        model: A network of the space, at any of its widths; it is left as it is.
        keep: Per axis by name, the channels to keep, in terms of the layer that the axis is named
            after; axes left out keep all.
        channels: Where the units lie in ``model``, if that is known.

    Raises:
        WidthsError: The channels do not fit the axes, or their number is not on the grid.
    """
    channels = channels or find_channels(space, _widths_of(space, model))
    kept = kept_units(space, channels, keep)
    counts = [int(k.sum()) * a.unit for k, a in zip(kept, space.trace.axes, strict=True)]
    narrow = space.build(counts, initialise=False)
    old = {join(layer, name): tensor for _, layer, name, tensor in tensors_of(model)}
    with torch.no_grad():
        for _, layer, name, new in tensors_of(narrow):
            key = join(layer, name)
            values = old[key].detach()
            for dim in range(values.dim()):
                if (key, dim) in channels.axis:
                    index = np.flatnonzero(_kept_positions(channels, kept, (key, dim)))
                    values = values.index_select(dim, torch.from_numpy(index).to(values.device))
            new.copy_(values)
    return narrow.to(next(model.parameters()).device).train(model.training)


def _widths_of(space: SearchSpace, model: nn.Module) -> Widths:
    """The widths of a network of a space."""
    sizes = {join(layer, name): tensor.shape for _, layer, name, tensor in tensors_of(model)}
    vector = tuple(sizes[a.maker[0]][a.maker[1]] for a in space.trace.axes)
    return Widths(tuple(axis.name for axis in space.trace.axes), vector)


@contextmanager
def masked(space: SearchSpace, model: nn.Module, keep: Keep) -> Iterator[nn.Module]:
    """While it lasts, ``model`` computes as if only the channels that are kept were there.

    Nobody reads the others: the weights that multiply them are zero meanwhile, as are those that
    make them in a layer that reads (what attention compares is read by no weight), and layer and
    group norms leave them out of their statistics.

    Args:
        space: The space.
        model: A network of the space.
        keep: As for :func:`inherit`.

    Yields:
        The same network.
    """
    channels = find_channels(space, _widths_of(space, model))
    kept = kept_units(space, channels, keep)
    parameters = dict(model.named_parameters())
    before: dict[str, Tensor] = {}
    norms: dict[int, Tensor] = {}
    with torch.no_grad():
        for key, dim in _masked_dims(channels, parameters):
            mask = torch.from_numpy(_kept_positions(channels, kept, (key, dim)))
            before.setdefault(key, parameters[key].detach().clone())
            shape = [-1 if d == dim else 1 for d in range(parameters[key].dim())]
            parameters[key].mul_(mask.view(shape).to(parameters[key]))
    for layer, module in model.named_modules():
        where = join(layer, "weight"), 0
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and where in channels.axis:
            norms[id(module.weight)] = torch.from_numpy(_kept_positions(channels, kept, where))
    try:
        with _MaskedNorms(norms):
            yield model
    finally:
        with torch.no_grad():
            for key, values in before.items():
                parameters[key].copy_(values)


def _masked_dims(channels: Channels, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """The dims of parameters along which a masked network has zeros."""
    for key in channels.readers:
        for name in (key, f"{key.removesuffix('weight')}bias"):
            if name in parameters:
                dims = range(parameters[name].dim())
                yield from ((name, dim) for dim in dims if (name, dim) in channels.axis)


def _read_dim(channels: Channels, parameter: Tensor, key: str, dim: int) -> tuple[str, int] | None:
    """The dim of a reader along which it has the channels that it reads."""
    if (key, dim) in channels.axis:
        return key, dim
    if dim == 1 and parameter.shape[1] == 1 and (key, 0) in channels.axis:
        return key, 0  # depthwise: the filter is the channel
    return None


class _MaskedNorms(TorchFunctionMode):
    """Layer and group norms over the channels that are kept."""

    def __init__(self, masks: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        mask = self.masks.get(id(weight))
        if mask is None or mask.all():
            return F.layer_norm(x, normalized_shape, weight, bias, eps)
        inside = mask.to(x)
        mean = (x * inside).sum(-1, keepdim=True) / inside.sum()
        variance = ((x - mean).square() * inside).sum(-1, keepdim=True) / inside.sum()
        out = (x - mean) / (variance + eps).sqrt()
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def _group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        mask = self.masks.get(id(weight))
        if mask is None or mask.all():
            return F.group_norm(x, num_groups, weight, bias, eps)
        grouped = x.view(len(x), num_groups, -1, *x.shape[2:])
        inside = mask.to(x).view(1, num_groups, -1, *[1] * (x.dim() - 2)).expand_as(grouped)
        dims = tuple(range(2, grouped.dim()))
        count = inside.sum(dims, keepdim=True)
        mean = (grouped * inside).sum(dims, keepdim=True) / count
        variance = ((grouped - mean).square() * inside).sum(dims, keepdim=True) / count
        out = ((grouped - mean) / (variance + eps).sqrt()).view_as(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)
