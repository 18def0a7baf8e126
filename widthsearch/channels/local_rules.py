"""The rules of operators that keep channels apart: pointwise, views, pooling, look-ups.

See ``rules.py`` for the others, and for the table of operators.
"""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widthsearch.channels.elements import Field, compressed, hinted, in_blocks, shape_of, varies
from widthsearch.torch_internals import schema_of, tree_leaves
from widthsearch.tracing.polynomials import Poly, add, as_constant, constant, divide, symbols_of
from widthsearch.tracing.symbolic_ints import poly_of

if TYPE_CHECKING:
    from widthsearch.channels.propagation import Call, Propagation

aten = torch.ops.aten


def from_front(dims: Any, x: Tensor) -> set[int]:
    """Dims counted from the front; all of them for None or an empty list."""
    dims = [dims] if isinstance(dims, int) else dims
    return {d % max(1, x.dim()) for d in (dims or range(x.dim()))}


def pointwise(run: Propagation, call: Call) -> None:
    """Unite elements at the same position of the operands."""
    first = call.outputs[0]
    shape = shape_of(first)
    fields: list[Field] = []
    for x in tensors_in((call.args, call.kwargs)):
        for f in run.fields_of(x):
            f = f.reshape(*[1] * (len(shape) - f.dim()), *f.shape)
            if f.dim() > len(shape) or any(
                n not in (1, m) for n, m in zip(f.shape, shape, strict=True)
            ):
                run.lose(f)
            else:
                fields.append(f)
    run.set_fields(first, run.elements.merged(fields))
    for other in call.outputs[1:]:  # masks of dropout
        if shape_of(other) == shape:
            run.set_fields(other, run.fields_of(first))
    if any(first is x for x in (*call.args, *call.kwargs.values())):
        run.write_through(first)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in a tree of arguments."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def uniform(run: Propagation, call: Call) -> None:
    """An output that is equal in every position, such as ``zeros_like``."""


def moved(call: Call, field: Field) -> list[Field]:
    """Apply a view to a field that has the full shape of the view's operand."""
    name = schema_of(call.func).name.split("::")[1].rstrip("_")
    if name in ("view", "_unsafe_view", "reshape"):
        return [field.reshape(shape_of(call.outputs[0]))]
    if name in ("alias", "detach", "clone", "contiguous", "lift_fresh"):
        return [field]
    if name == "view_as_real":
        return [field.unsqueeze(-1)]
    if name == "view_as_complex":
        return [field.select(-1, 0)]
    named = {k: hinted(v) for k, v in call.kwargs.items()}
    out = getattr(aten, name)(field, *hinted(list(call.args[1:])), **named)
    return list(out) if isinstance(out, list | tuple) else [out]


def view(run: Propagation, call: Call) -> None:
    """Move elements like values; a cut into parts makes seams."""
    x, outputs = call.args[0], call.outputs
    collected: list[list[Field]] = [[] for _ in outputs]
    for field in run.fields_of(x):
        _cut(run, call, field)
        if call.func.overloadpacket in (aten.view, aten._unsafe_view):
            _check_reshaped_sum(run, call, field)
        parts = moved(call, field.expand(shape_of(x)))
        for fields, part, o in zip(collected, parts, outputs, strict=True):
            fields.append(_unite_fixed_dims(run, compressed(part), o))
    for index, (o, fields) in enumerate(zip(outputs, collected, strict=True)):
        if o is not x:
            run.views[id(o)] = x, call, index
        run.set_fields(o, fields)


def _cut(run: Propagation, call: Call, field: Field) -> None:
    """Record the seams of slices, parts and rolls."""
    x, name, named = call.args[0], call.func.overloadpacket, call.named
    dims = from_front(named["dim"], x) if "dim" in named else from_front(named.get("dims"), x)
    if name is aten.roll:
        for shift, dim in zip(named["shifts"], named["dims"], strict=False):
            length = poly_of(x.shape[dim])
            run.cut(field, dim % x.dim(), add(length, poly_of(shift), -1), length)
        if not named["dims"]:
            run.lose(field)
        return
    if name in (aten.channel_shuffle, aten.native_channel_shuffle) and 1 in varies(field):
        blocks = in_blocks(field, 1, hinted(named["groups"]))
        run.elements.unite(blocks, blocks.narrow(1, 0, 1))
    if name not in (aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind):
        return
    (dim,) = dims
    length = poly_of(x.shape[dim])
    positions: list[Poly] = []
    if name is aten.slice:
        bounds = [n for n in (named["start"], named["end"]) if n is not None and n != sys.maxsize]
        step = hinted(named["step"])
        positions = [_position(n, length) for n in bounds if step == 1 or hinted(n) >= step]
        if step != 1 and dim in varies(field):
            if hinted(x.shape[dim]) % step:
                run.lose(field)
            else:  # of each block of `step` channels one is taken
                blocks = in_blocks(field, dim, field.shape[dim] // step)
                run.elements.unite(blocks, blocks.narrow(dim + 1, 0, 1))
    elif name is aten.select:
        first = _position(named["index"], length)
        positions = [first, add(first, constant(1))]
    elif name is aten.unbind:
        positions = [constant(i) for i in range(1, len(call.outputs))]
    else:
        position: Poly = {}
        for part in call.outputs[:-1]:
            position = add(position, poly_of(part.shape[dim]))
            positions.append(position)
    for position in positions:
        run.cut(field, dim, position, length)
    if len(length) > 1 and varies(field) == {dim}:
        for part, elements in zip(
            call.outputs, moved(call, field.expand(shape_of(x))), strict=True
        ):
            if part.dim() == x.dim() and (size := poly_of(part.shape[dim])):
                run.parts.append((size, compressed(elements).reshape(-1).numpy()))


def _position(bound: Any, length: Poly) -> Poly:
    position = poly_of(bound)
    return add(position, length) if hinted(bound) < 0 else position


def _check_reshaped_sum(run: Propagation, call: Call, field: Field) -> None:
    """Give up on a dim of several axes that is reshaped: other widths shift its elements."""
    for dim in varies(field):
        whole = poly_of(call.args[0].shape[dim])
        shape = call.outputs[0].shape
        if len(whole) > 1 and all(divide(poly_of(n), whole) is None for n in shape):
            run.lose(field)


def _unite_fixed_dims(run: Propagation, field: Field, tensor: Tensor) -> Field:
    """Unite all elements along each dim of a fixed size: none of them can go alone."""
    for dim in sorted(varies(field)):
        if as_constant(poly_of(tensor.shape[dim])) is not None:
            first = field.narrow(dim, 0, 1)
            run.elements.unite(field, first)
            field = first if bool((field >= 0).all()) else field
    return field


def gated_halves(run: Propagation, call: Call) -> None:
    """GLU: the first half of a dim, multiplied by a function of the second."""
    x = call.args[0]
    (dim,) = from_front(call.named["dim"], x)
    length = poly_of(x.shape[dim])
    fields = []
    for f in run.fields_of(x):
        if dim in varies(f):
            run.cut(f, dim, poly_of(call.outputs[0].shape[dim]), length)
            first, second = f.chunk(2, dim)
            run.elements.unite(first, second)
            f = first
        fields.append(f)
    run.set_fields(call.outputs[0], fields)


def spatial(run: Propagation, call: Call) -> None:
    """Pooling, resizing and sampling: the last dims of the operands are no channels."""
    digit = re.search(r"(\d)d", schema_of(call.func).name)
    dims = int(digit[1]) if digit else 2
    fields = []
    for f in (f for x in tensors_in(call.args) for f in run.fields_of(x)):
        if max(varies(f)) < f.dim() - dims:
            fields.append(f)
        else:
            run.lose(f)
    fields = run.elements.merged(fields)
    for o in call.outputs:
        run.set_fields(o, fields)


def pad(run: Propagation, call: Call) -> None:
    """Positions that padding adds have all channels; those beside channels are channels too."""
    x, out, amounts = call.args[0], call.outputs[0], list(call.args[1])
    ends = [(x.dim() - 1 - i // 2, n) for i, n in enumerate(amounts)]  # of each dim: before, after
    fields = [
        torch.constant_pad_nd(f, [hinted(n) if dim in varies(f) else 0 for dim, n in ends], -1)
        for f in run.fields_of(x)
    ]
    for i, (dim, n) in enumerate(ends):
        if len(symbols_of(size := poly_of(n))) == len(size) == 1:
            made = run.new_part(size, hinted(n))
            added = torch.full([shape_of(out)[dim]], -1)
            added[-len(made) if i % 2 else 0 :][: len(made)] = made
            fields.append(added.view([-1 if d == dim else 1 for d in range(x.dim())]))
    run.set_fields(out, run.elements.merged(fields))


def concatenate(run: Propagation, call: Call) -> None:
    """Elements lie one after the other; along the other dims the parts must agree."""
    parts, out = call.args[0], call.outputs[0]
    dim = call.named["dim"] % out.dim()
    fields = [run.fields_of(p) for p in parts]
    if call.func.overloadpacket is aten.stack:
        run.set_fields(out, run.elements.merged(f.unsqueeze(dim) for own in fields for f in own))
        return
    along = [
        next((f for f in own if dim in varies(f)), torch.full([1] * p.dim(), -1)).expand(
            shape_of(p)
        )
        for p, own in zip(parts, fields, strict=True)
    ]
    other = run.elements.merged(f for own in fields for f in own if dim not in varies(f))
    run.set_fields(out, [compressed(torch.cat(along, dim)), *other])


def along_dim(run: Propagation, call: Call) -> None:
    """Sorting, FFT and the like: entries along some dims are mixed, the others are kept apart."""
    dims = from_front(call.named["dim"], call.args[0])
    for f in (f for x in tensors_in(call.args) for f in run.fields_of(x)):
        if varies(f) & dims or f.dim() != call.outputs[0].dim():
            run.lose(f)
    pointwise(run, call)


def indexed(run: Propagation, call: Call) -> None:
    """Look-ups and writes by positions, or by a mask: the indexed dims must have no elements.

    Written values have the elements of the entries that they replace.
    """
    x, indices, *values = call.args[:3]
    positions: list[Tensor | None] = []
    for i in indices:
        for f in run.fields_of(i):
            run.lose(f)
        if i is None:
            positions.append(None)
        elif i.dtype == torch.bool:  # a mask stands for its dims, and selects along one
            positions += [torch.zeros(1, dtype=torch.long)] * i.dim()
        else:
            positions.append(torch.zeros(shape_of(i), dtype=torch.long))
    gone = {d for d, at in enumerate(positions) if at is not None}
    fields = []
    for f in run.fields_of(x):
        if varies(f) & gone:
            run.lose(f)
        else:
            fields.append(compressed(aten.index(f.expand(shape_of(x)), positions)))
    if not values:
        run.set_fields(call.outputs[0], fields)
        return
    for f in run.fields_of(values[0]):
        f = f.view(*[1] * (max(g.dim() for g in [f, *fields]) - f.dim()), *f.shape)
        if not any(varies(g) == varies(f) for g in fields):
            run.lose(f)
        run.elements.merged([*fields, f])
    run.set_fields(call.outputs[0], run.fields_of(x))


def windows(run: Propagation, call: Call) -> None:
    """``F.unfold`` and ``F.fold``: each channel has one position for each entry of a window."""
    x, out = call.args[0], call.outputs[0]
    count = math.prod(hinted(call.named["kernel_size"]))
    fields = []
    for f in run.fields_of(x):
        if varies(f) != {1} or out.dim() + x.dim() != 7:  # a batch
            run.lose(f)
        elif x.dim() == 4:
            fields.append(f.reshape(1, -1, 1).repeat_interleave(count, 1))
        else:
            blocks = f.reshape(-1, count)
            run.elements.unite(blocks, blocks[:, :1])
            fields.append(blocks[:, 0].view(1, -1, 1, 1))
    run.set_fields(out, fields)


def embedding(run: Propagation, call: Call) -> None:
    """A table's rows are looked up, or combined in bags; its columns are the output's last dim."""
    out = call.outputs[0]
    table, *others = tensors_in((call.args, call.kwargs))
    for f in (f for other in others for f in run.fields_of(other)):  # a weight for each row
        run.lose(f)
    for f in run.fields_of(table):
        if varies(f) == {1}:
            run.set_fields(out, [f.view([1] * (out.dim() - 1) + [-1])])
        else:
            run.lose(f)
