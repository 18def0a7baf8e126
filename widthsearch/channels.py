"""Which elements of which tensors belong to channel i of an axis.

Every position along every symbolic dim of every parameter and buffer is an element. The model runs
once, and next to each tensor runs a tensor of the elements it is made of: views, concatenations and
shuffles act on the elements as they act on values; where values meet (in a sum, a norm, a matrix
product) their elements are one. What is one in the end is a *unit* of an axis: what can only be
removed together. A unit is a channel, or as many channels as the axis has groups or heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from widthsearch.polynomials import System, as_constant, symbols_of
from widthsearch.space import SearchSpace
from widthsearch.symbolic import poly_of, size
from widthsearch.trace import BATCH_NORMS, join, run_on_meta, tensors_of
from widthsearch.widths import Widths

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
    """Elements, and which of them are one (union-find)."""

    def __init__(self) -> None:
        self.parent = np.empty(0, np.int64)

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
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs = pairs[:, (pairs >= 0).all(0)]
        if pairs.shape[1] == 0:
            return
        for x, y in torch.unique(pairs, dim=1).T.tolist():
            i, j = self._root(x), self._root(y)
            if i != j:
                self.parent[max(i, j)] = min(i, j)

    def _root(self, x: int) -> int:
        while self.parent[x] != x:
            self.parent[x] = self.parent[self.parent[x]]
            x = int(self.parent[x])
        return x


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
            turned = base is not weight and base.dim() == 2
            self.readers[name] = 1 - dim % 2 if turned else dim

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
        self.read(weight, 0 if transposed else 1)
        if transposed:
            made = other
            if channels is not None and own is not None:
                self.elements.unite(channels, own)
        else:
            made = own
            if channels is not None and other is not None:
                self.elements.unite(channels.view(groups, -1), other.view(1, -1))
        if channels is not None and made is not None and inputs == groups and inputs > 1:
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
    run_on_meta(symbolic, torch.empty((1, *space.input_shape), device="meta"), run)
    units = [w // a.unit for w, a in zip(widths.vector, space.trace.axes, strict=True)]
    unit_of: list[dict[int, int]] = []  # per axis, the unit that a representative stands for
    for axis, count in zip(space.trace.axes, units, strict=True):
        classes = dict.fromkeys(elements.find(own[axis.maker]).tolist())
        numbered = {root: u for u, root in enumerate(classes)}
        unit_of.append(numbered if len(numbered) == count else {})
    axes: dict[tuple[str, int], NDArray[np.int64]] = {}
    unit: dict[tuple[str, int], NDArray[np.int64]] = {}
    unknown: set[int] = set()
    for (key, dim), made in own.items():
        length = space.trace.shapes[key][dim]
        owners = sorted(symbols_of(length))
        found = np.full((len(made), 2), -1)
        for position, root in enumerate(elements.find(made).tolist()):
            for number in owners:
                if root in unit_of[number]:
                    found[position] = number, unit_of[number][root]
        axes[key, dim], unit[key, dim] = found.T
        for number in owners:
            counts = np.bincount(found[found[:, 0] == number, 1], minlength=units[number])
            if (counts != length.get((number,), 0)).any():
                unknown.add(number)
    for i, a in enumerate(unit_of):  # a channel of one axis that is also one of another's
        unknown.update(n for k, b in enumerate(unit_of[:i]) if a.keys() & b.keys() for n in (i, k))
    return Channels(widths, tuple(units), axes, unit, run.readers, frozenset(unknown))


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
        products = (parameter.detach() * parameter.grad).movedim(dim, 0).flatten(1).sum(1)
        for axis, sums in unit_sums(channels, key, dim, products).items():
            read.add(axis)
            out[axis] = out[axis] + sums

    for key, dim in channels.readers.items():
        if (key, dim) in channels.axis:
            collect(key, dim)
        elif (key, 0) in channels.axis and dim == 1 and parameters[key].shape[1] == 1:
            collect(key, 0)  # depthwise: the filter is the channel
    unread = set(range(len(out))) - read
    for layer, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            for name in ("weight", "bias"):
                where = join(layer, name), 0
                if where in channels.axis and set(channels.axis[where].tolist()) <= unread:
                    collect(*where)
    return out
