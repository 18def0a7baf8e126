"""Propagates elements through one run of a model: a rule for each kind of operator.

Notation as in ``elements.py``: each tensor of the run has *fields*, which name the elements that
its entries depend on. An operator's rule computes the fields of its output and *unites* the
elements that can only be removed together. A *consumer* is a weight that multiplies channels along
one of its dims: to mask a channel is to zero its consumers there.

- Views, shuffles and concatenations move elements like values: the operator itself runs on the
  fields.
- Pointwise operators, norms and biases unite elements at the same position.
- A convolution or matrix product unites the channels of its input with the weight's input dim, and
  its output has the elements of the weight's output dim.
- A dim of a fixed size cannot lose single positions: all elements along it are united.

Example: ``x`` with the field ``[0, 1]`` along its channels enters a convolution. Its weight has the
elements ``[2, 3, 4]`` along dim 0 and ``[5, 6]`` along dim 1. The rule unites 0 with 5 and 1 with
6, records the weight as a consumer along dim 1, and the output has the field ``[2, 3, 4]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from widthsearch.channels.elements import Elements, Field, compressed, hinted, shape_of, varies
from widthsearch.torch_internals import TorchDispatchMode, tree_leaves
from widthsearch.tracing.interpreter import BATCH_NORMS, operators
from widthsearch.tracing.polynomials import as_constant, divide
from widthsearch.tracing.symbolic_ints import poly_of

aten = torch.ops.aten

_SPATIAL_DIMS = 2  # trailing dims that pooling, resizing and padding may change

_VIEWS = operators(
    """
    view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice select split
    split_with_sizes unbind flip roll alias detach clone contiguous unfold repeat pixel_shuffle
    channel_shuffle native_channel_shuffle view_as_real movedim narrow flatten unflatten
    lift_fresh swapaxes
    """
)
_SPATIAL = operators(
    """
    max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d
    adaptive_max_pool2d avg_pool1d max_pool3d_with_indices upsample_bilinear2d
    upsample_nearest2d upsample_bicubic2d _upsample_bilinear2d_aa reflection_pad2d
    replication_pad2d avg_pool3d _adaptive_avg_pool3d
    """
)
_REDUCTIONS = frozenset({aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.logsumexp})


class Propagation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the fields of every operation's outputs and unites the elements that it combines.

    Attributes:
        elements: The elements of the model's parameters and buffers.
        parameters: The name of each parameter, by the id of its meta tensor.
        consumers: Per parameter that multiplies channels, the dim along which it does.
    """

    def __init__(self, elements: Elements) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        self.parameters: dict[int, str] = {}
        self.consumers: dict[str, int] = {}
        self._fields: dict[int, list[Field]] = {}
        self._viewed: dict[int, Tensor] = {}  # views of parameters, by id, and the parameters
        self._alive: list[Tensor] = []  # ids are only unique among tensors that are alive

    def set_fields(self, tensor: Tensor, fields: Iterable[Field]) -> None:
        """Set the fields of a tensor; those that vary along no dim are left out."""
        found = [f for f in fields if varies(f)]
        if found:
            self._fields[id(tensor)] = found
            self._alive.append(tensor)
        else:
            self._fields.pop(id(tensor), None)

    def fields_of(self, tensor: Any) -> list[Field]:
        """The fields of a tensor; an empty list for anything else."""
        return self._fields.get(id(tensor), []) if isinstance(tensor, Tensor) else []

    def field_along(self, tensor: Tensor, dim: int) -> Field | None:
        """The field of a tensor that varies along this dim alone, shape (n,), if there is one."""
        for field in self.fields_of(tensor):
            if varies(field) == {dim % tensor.dim()}:
                return field.reshape(-1)
        return None

    def _add_consumer(self, weight: Tensor, dim: int) -> None:
        """Record that a parameter, or a view of one, multiplies channels along a dim."""
        base = weight if id(weight) in self.parameters else self._viewed.get(id(weight), weight)
        if id(base) not in self.parameters:
            return
        if base is not weight:  # the view may be transposed, or expanded to a batch
            own = self.field_along(weight, dim)
            if base.dim() == 2:
                # A dim of one channel has no field: find it by its position in the transpose.
                dim = 1 - (dim + base.dim() - weight.dim())
            for d in range(base.dim()):
                of_base = self.field_along(base, d)
                if own is not None and of_base is not None and torch.equal(own, of_base):
                    dim = d
        self.consumers[self.parameters[id(base)]] = dim

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if any(isinstance(a, Tensor) and a.device.type != "meta" for a in args):
            args = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        if packet in BATCH_NORMS:
            return self._batch_norm(len(func._schema.returns), *args)
        out = func(*args, **kwargs)
        self._propagate(func, packet, args, kwargs, out)
        return out

    def _batch_norm(self, returns: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        self._unite_vectors(x, rest, 1)
        self.set_fields(out, self.fields_of(x))
        nothing = torch.empty((0,), device="meta")
        return (out, *([nothing] * (returns - 1)))

    def _unite_vectors(self, x: Tensor, vectors: Iterable[Any], dim: int) -> None:
        """Unite the elements of vectors (biases, norms' weights) with those of x along a dim."""
        of_x = self.field_along(x, dim)
        for vector in vectors:
            of_vector = self.field_along(vector, 0) if isinstance(vector, Tensor) else None
            if of_x is not None and of_vector is not None:
                self.elements.unite(of_x, of_vector)

    def _propagate(
        self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if packet is aten.convolution:
            self._convolution(out, *args)
        elif packet in (aten.mm, aten.bmm):
            self._product(args[0], args[1], out)
        elif packet in (aten.addmm, aten.baddbmm):
            self._product(args[1], args[2], out)
            self._unite_vectors(out, args[:1], out.dim() - 1)
        elif "scaled_dot_product" in func._schema.name:
            self._attention(args[0], args[1], args[2], out)
        elif packet in _VIEWS:
            self._view(func, args, kwargs, out)
        elif packet in (aten.cat, aten.stack):
            self._concatenate(packet, args, kwargs, out)
        elif packet in _SPATIAL:
            first = out[0] if isinstance(out, tuple) else out
            kept = [f for f in self.fields_of(args[0]) if max(varies(f)) < f.dim() - _SPATIAL_DIMS]
            self.set_fields(first, kept)
        elif packet in _REDUCTIONS:
            self._reduce(func, args, kwargs, out)
        elif packet is aten.constant_pad_nd:
            self._pad(args, out)
        elif packet is aten.native_group_norm:
            self._unite_vectors(args[0], args[1:3], 1)
            channels = self.field_along(args[0], 1)
            if channels is not None:  # groups keep equal sizes: a channel goes from all of them
                grouped = channels.view(args[6], -1)
                self.elements.unite(grouped, grouped[:1])
            self.set_fields(out[0], self.fields_of(args[0]))
        elif packet is aten.native_layer_norm:
            self._unite_vectors(args[0], args[2:4], args[0].dim() - 1)
            self.set_fields(out[0], self.fields_of(args[0]))
        else:
            self._pointwise(args, kwargs, out)

    # -- rules -------------------------------------------------------------------------------

    def _convolution(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> None:
        transposed, groups = options[3], hinted(options[5])
        own, other = self.field_along(weight, 0), self.field_along(weight, 1)
        channels = self.field_along(x, 1)
        inputs, outputs = shape_of(x)[1], shape_of(out)[1]
        if channels is not None or other is not None:  # a stem's input channels are no axis
            self._add_consumer(weight, 0 if transposed else 1)
        if transposed:
            filters = other
            if channels is not None and own is not None:
                self.elements.unite(channels, own)
        else:
            filters = own
            if channels is not None and other is not None:
                self.elements.unite(channels.view(groups, -1), other.view(1, -1))
        follows = not isinstance(options[5], int)  # else the number of groups is fixed
        if channels is not None and filters is not None and inputs == groups > 1 and follows:
            # depthwise: each filter has its own channel
            self.elements.unite(channels.view(-1, 1), filters.view(inputs, -1))
        if filters is not None and transposed and groups > 1:
            filters = filters.repeat(groups)
        elif filters is not None and groups > 1 and isinstance(options[5], int):
            grouped = filters.view(groups, -1)  # a filter goes from all groups at once
            self.elements.unite(grouped, grouped[:1])
        if filters is not None:
            self.set_fields(out, [filters.view(1, outputs, *[1] * (out.dim() - 2))])
            self._unite_vectors(out, [bias], 1)

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """(…, m, k) × (…, k, n): unites the elements along k, and keeps those along m and n."""
        self._add_consumer(b, 0 if b.dim() == 2 else 1)
        rows, columns = [], []
        for f in self.fields_of(a):
            contracted = f.dim() - 1 in varies(f)
            for g in self.fields_of(b):
                if contracted and g.dim() - 2 in varies(g):
                    self.elements.unite(f.transpose(-1, -2), g)
            if f.dim() - 2 in varies(f) and not contracted:
                rows.append(f)
            elif contracted and f.dim() == 3 and 0 in varies(f):
                rows.append(f.narrow(-1, 0, 1))  # contracted over k: the head in dim 0 remains
        for g in self.fields_of(b):
            contracted = g.dim() - 2 in varies(g)
            if g.dim() - 1 in varies(g) and not contracted:
                columns.append(g)
        fields = rows + columns
        for f in rows:
            for g in columns:
                if f.dim() == 3 and varies(f) == {0} and 0 in varies(g):
                    self._unite_heads(f, g, out.shape[0])
                    fields = columns
        self.set_fields(out, fields)

    def _unite_heads(self, scores: Field, values: Field, heads: Any) -> None:
        """Unite the scores and values of each head, if the number of heads is free."""
        if as_constant(poly_of(heads)) is None:
            self.elements.unite(scores, values)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        for f in self.fields_of(query):
            for g in self.fields_of(key):
                if varies(f) == varies(g):
                    self.elements.unite(f, g)
            for g in self.fields_of(value):
                if query.dim() == 4 and 1 in varies(f) and 1 in varies(g):
                    self._unite_heads(f.narrow(-1, 0, 1), g, query.shape[1])
        self.set_fields(first, self.fields_of(value))

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x, rest = args[0], hinted(list(args[1:]))
        outputs = list(out) if isinstance(out, list | tuple) else [out]
        if id(x) in self.parameters or id(x) in self._viewed:
            for o in outputs:
                self._viewed[id(o)] = self._viewed.get(id(x), x)
                self._alive.append(o)
        collected: list[list[Field]] = [[] for _ in outputs]
        for field in self.fields_of(x):
            full = field.expand(shape_of(x))
            name = func._schema.name.split("::")[1]
            if name in ("view", "_unsafe_view"):
                moved: Any = full.reshape(shape_of(out))
                self._check_reshaped_sum(field, x, out)
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
                        self.elements.unite(first, part)  # equal parts stay equal
            for fields, part, o in zip(collected, made, outputs, strict=True):
                fields.append(self._unite_fixed_dims(part, o))
        for o, fields in zip(outputs, collected, strict=True):
            self.set_fields(o, fields)

    def _check_reshaped_sum(self, field: Field, x: Tensor, out: Tensor) -> None:
        """Give up on a dim of several axes that is reshaped: other widths shift its elements."""
        for dim in varies(field):
            whole = poly_of(x.shape[dim])
            if len(whole) > 1 and all(divide(poly_of(n), whole) is None for n in out.shape):
                self.elements.unfollowed.append(field.reshape(-1).numpy())

    def _unite_fixed_dims(self, field: Field, tensor: Tensor) -> Field:
        """Unite all elements along each dim of a fixed size: none of them can go alone."""
        for dim in sorted(varies(field)):
            if as_constant(poly_of(tensor.shape[dim])) is not None:
                self.elements.unite(field, field.narrow(dim, 0, 1))
        return field

    def _concatenate(
        self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        parts = args[0]
        if not any(self.fields_of(p) for p in parts):
            return
        whole = []
        for p in parts:
            fields = self.fields_of(p)
            missing = torch.full([1] * p.dim(), -1)
            whole.append((fields[0] if fields else missing).expand(shape_of(p)))
        for p in parts:  # along the other dims the parts must agree
            for f, g in zip(self.fields_of(p), self.fields_of(parts[0]), strict=False):
                if packet is aten.cat and dim % p.dim() not in varies(f) | varies(g):
                    self.elements.unite(f, g)
        joined = torch.cat(whole, dim) if packet is aten.cat else torch.stack(whole, dim)
        self.set_fields(out, [compressed(joined)])

    def _reduce(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = args[0]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(out, Tensor) or dims is None:
            return
        gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        keep = out.dim() == x.dim()
        fields = []
        for f in self.fields_of(x):
            if not varies(f) & gone:
                shape = [n for d, n in enumerate(f.shape) if keep or d not in gone]
                fields.append(f.reshape(shape))
        self.set_fields(out, fields)

    def _pad(self, args: tuple[Any, ...], out: Tensor) -> None:
        amounts = hinted(list(args[1]))
        fields = []
        for f in self.fields_of(args[0]):
            full = f.expand(shape_of(args[0]))
            fields.append(compressed(torch.constant_pad_nd(full, amounts, -1)))
        self.set_fields(out, fields)

    def _pointwise(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Unite elements at the same position of the inputs."""
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not isinstance(first, Tensor):
            return
        shape = shape_of(first)
        fields: list[Field] = []
        for x in tree_leaves((args, kwargs)):
            for f in self.fields_of(x):
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
        self.set_fields(first, fields)
