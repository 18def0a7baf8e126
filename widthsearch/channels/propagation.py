"""Carries elements beside tensors through one run of a model: a rule for each kind of operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from widthsearch.channels.elements import Elements, Field, compressed, hinted, shape_of, varies
from widthsearch.torch_internals import TorchDispatchMode, tree_leaves
from widthsearch.tracing.interpreter import BATCH_NORMS
from widthsearch.tracing.polynomials import as_constant, divide
from widthsearch.tracing.symbolic_ints import poly_of

aten = torch.ops.aten

_SHAPE_KEEPING = 2  # the spatial dims that pooling, resizing and padding may change

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


class Propagation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries elements beside tensors."""

    def __init__(self, elements: Elements) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        self.fields: dict[int, list[Field]] = {}
        self.kept: list[Tensor] = []  # so that no id is used twice
        self.parameters: dict[int, str] = {}
        self.consumers: dict[str, int] = {}

    def put(self, tensor: Tensor, fields: Iterable[Field]) -> None:
        """Say what a tensor is made of."""
        found = [f for f in fields if varies(f)]
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
            if varies(field) == {dim % tensor.dim()}:
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
            self.consumers[name] = dim

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
            kept = [f for f in self.of(args[0]) if max(varies(f)) < f.dim() - _SHAPE_KEEPING]
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
        transposed, groups = options[3], hinted(options[5])
        own, other = self.along(weight, 0), self.along(weight, 1)
        channels = self.along(x, 1)
        inputs, outputs = shape_of(x)[1], shape_of(out)[1]
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
            contracted = f.dim() - 1 in varies(f)
            for g in self.of(b):
                if contracted and g.dim() - 2 in varies(g):
                    self.elements.unite(f.transpose(-1, -2), g)
            if f.dim() - 2 in varies(f) and not contracted:
                rows.append(f)
            elif contracted and f.dim() == 3 and 0 in varies(f):
                rows.append(f.narrow(-1, 0, 1))  # the head that it belongs to
        for g in self.of(b):
            contracted = g.dim() - 2 in varies(g)
            if g.dim() - 1 in varies(g) and not contracted:
                columns.append(g)
        fields = rows + columns
        for f in rows:
            for g in columns:
                if f.dim() == 3 and varies(f) == {0} and 0 in varies(g):
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
                if varies(f) == varies(g):
                    self.elements.unite(f, g)
            for g in self.of(value):
                if query.dim() == 4 and 1 in varies(f) and 1 in varies(g):
                    self._heads(f.narrow(-1, 0, 1), g, query.shape[1])
        self.put(first, self.of(value))

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, rest = args[0], hinted(list(args[1:]))
        outputs = list(out) if isinstance(out, list | tuple) else [out]
        if id(x) in self.parameters or id(x) in self.origin:
            for o in outputs:
                self.origin[id(o)] = self.origin.get(id(x), x)
                self.kept.append(o)
        collected: list[list[Field]] = [[] for _ in outputs]
        for field in self.of(x):
            full = field.expand(shape_of(x))
            name = func._schema.name.split("::")[1]
            if name in ("view", "_unsafe_view"):
                moved: Any = full.reshape(shape_of(out))
                self._check_split(field, x, out)
            elif name in ("alias", "detach", "clone", "contiguous", "lift_fresh"):
                moved = full
            else:
                moved = func(full, *rest, **{k: hinted(v) for k, v in kwargs.items()})
            parts = list(moved) if isinstance(moved, list | tuple) else [moved]
            made = [compressed(part) for part in parts]
            if len(made) > 1:
                first = made[0]
                for part in made[1:]:
                    if part.shape == first.shape and varies(part):
                        self.elements.unite(first, part)  # halves shrink together
            for fields, part, o in zip(collected, made, outputs, strict=True):
                fields.append(self._rigid(part, o))
        for o, fields in zip(outputs, collected, strict=True):
            self.put(o, fields)

    def _check_split(self, field: Field, x: Tensor, out: Tensor) -> None:
        """Parts of a sum that is split evenly cross the seams as their widths change."""
        for dim in varies(field):
            whole = poly_of(x.shape[dim])
            if len(whole) > 1 and all(divide(poly_of(n), whole) is None for n in out.shape):
                self.elements.wandering.append(field.reshape(-1).numpy())

    def _rigid(self, field: Field, tensor: Tensor) -> Field:
        """Along a dim whose size is fixed nothing can go alone: all along it is one."""
        for dim in sorted(varies(field)):
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
            whole.append((fields[0] if fields else missing).expand(shape_of(p)))
        for p in parts:  # what concatenation does not move must agree
            for f, g in zip(self.of(p), self.of(parts[0]), strict=False):
                if packet is aten.cat and dim % p.dim() not in varies(f) | varies(g):
                    self.elements.unite(f, g)
        joined = torch.cat(whole, dim) if packet is aten.cat else torch.stack(whole, dim)
        self.put(out, [compressed(joined)])

    def _reduce(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = args[0]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(out, Tensor) or dims is None:
            return
        gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        keep = out.dim() == x.dim()
        fields = []
        for f in self.of(x):
            if not varies(f) & gone:
                shape = [n for d, n in enumerate(f.shape) if keep or d not in gone]
                fields.append(f.reshape(shape))
        self.put(out, fields)

    def _pad(self, args: tuple[Any, ...], out: Tensor) -> None:
        amounts = hinted(list(args[1]))
        fields = []
        for f in self.of(args[0]):
            full = f.expand(shape_of(args[0]))
            fields.append(compressed(torch.constant_pad_nd(full, amounts, -1)))
        self.put(out, fields)

    def _pointwise(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Values that meet at the same place are one."""
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not isinstance(first, Tensor):
            return
        shape = shape_of(first)
        fields: list[Field] = []
        for x in tree_leaves((args, kwargs)):
            for f in self.of(x):
                if f.dim() > len(shape) or x.dim() > len(shape):
                    continue
                f = f.view(*[1] * (len(shape) - f.dim()), *f.shape)
                if any(n not in (1, m) for n, m in zip(f.shape, shape, strict=True)):
                    continue
                same = [i for i, g in enumerate(fields) if varies(g) & varies(f)]
                for i in same:
                    self.elements.unite(fields[i], f)
                if not same:
                    fields.append(f)
                else:
                    i = same[0]
                    a, b = torch.broadcast_tensors(fields[i], f)  # type: ignore[no-untyped-call]
                    fields[i] = compressed(torch.where(a >= 0, a, b))
        self.put(first, fields)
