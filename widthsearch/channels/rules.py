"""The rules of operators for the elements of their operands (``propagation.py``).

A rule takes the propagation and a call. It sets the fields of the outputs, unites elements, and
records reads, consumers and seams. :data:`RULES` holds them by operator. Operators with torch's
``pointwise`` tag need no entry; all others without one lose the axes that they touch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widthsearch.channels.elements import Field, compressed, hinted, shape_of, varies
from widthsearch.torch_internals import tree_leaves
from widthsearch.tracing.interpreter import BATCH_NORMS, operators
from widthsearch.tracing.polynomials import Poly, add, as_constant, constant, divide
from widthsearch.tracing.symbolic_ints import poly_of

if TYPE_CHECKING:
    from widthsearch.channels.propagation import Call, Propagation

aten = torch.ops.aten


def _positive(dims: Any, x: Tensor) -> set[int]:
    """Dims counted from the front; all of them for None or an empty list."""
    dims = [dims] if isinstance(dims, int) else dims
    return {d % max(1, x.dim()) for d in (dims or range(x.dim()))}


# -- operators that keep channels apart -----------------------------------------------------------


def pointwise(run: Propagation, call: Call) -> None:
    """Unite elements at the same position of the operands."""
    first = call.outputs[0]
    shape = shape_of(first)
    fields: list[Field] = []
    for x in _tensors((call.args, call.kwargs)):
        for f in run.fields_of(x):
            f = f.reshape(*[1] * (len(shape) - f.dim()), *f.shape)
            if f.dim() > len(shape) or any(
                n not in (1, m) for n, m in zip(f.shape, shape, strict=True)
            ):
                run.lose(f, call)
            else:
                fields.append(f)
    run.set_fields(first, run.elements.merged(fields))
    for other in call.outputs[1:]:  # masks of dropout
        if shape_of(other) == shape:
            run.set_fields(other, run.fields_of(first))
    if any(first is x for x in (*call.args, *call.kwargs.values())):
        run.write_through(first, call)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def uniform(run: Propagation, call: Call) -> None:
    """An output that is equal in every position, such as ``zeros_like``."""


def moved(call: Call, field: Field) -> list[Field]:
    """Apply a view to a field that has the full shape of the view's operand."""
    name = call.func._schema.name.split("::")[1].rstrip("_")
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
        if call.func._overloadpacket in (aten.view, aten._unsafe_view):
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
    x, name, named = call.args[0], call.func._overloadpacket, call.named
    dims = _positive(named["dim"], x) if "dim" in named else _positive(named.get("dims"), x)
    if name is aten.roll:
        for shift, dim in zip(named["shifts"], named["dims"], strict=False):
            length = poly_of(x.shape[dim])
            run.cut(field, dim % x.dim(), add(length, poly_of(shift), -1), length)
        if not named["dims"]:
            run.lose(field, call)
        return
    if name in (aten.channel_shuffle, aten.native_channel_shuffle) and 1 in varies(field):
        blocks = field.unflatten(1, (hinted(named["groups"]), -1))
        run.elements.unite(blocks, blocks.narrow(1, 0, 1))
    if name not in (aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind):
        return
    (dim,) = dims
    length = poly_of(x.shape[dim])
    positions: list[Poly] = []
    if name is aten.slice:
        bounds = [n for n in (named["start"], named["end"]) if n is not None and n != sys.maxsize]
        positions = [_from_front(n, length) for n in bounds]
        if hinted(named["step"]) != 1 and dim in varies(field):
            step = hinted(named["step"])
            if hinted(x.shape[dim]) % step:
                run.lose(field, call)
            else:
                blocks = field.unflatten(dim, (-1, step))
                run.elements.unite(blocks, blocks.narrow(dim + 1, 0, 1))
    elif name is aten.select:
        first = _from_front(named["index"], length)
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


def _from_front(bound: Any, length: Poly) -> Poly:
    position = poly_of(bound)
    return add(position, length) if hinted(bound) < 0 else position


def _check_reshaped_sum(run: Propagation, call: Call, field: Field) -> None:
    """Give up on a dim of several axes that is reshaped: other widths shift its elements."""
    for dim in varies(field):
        whole = poly_of(call.args[0].shape[dim])
        shape = call.outputs[0].shape
        if len(whole) > 1 and all(divide(poly_of(n), whole) is None for n in shape):
            run.lose(field, call)


def _unite_fixed_dims(run: Propagation, field: Field, tensor: Tensor) -> Field:
    """Unite all elements along each dim of a fixed size: none of them can go alone."""
    for dim in sorted(varies(field)):
        if as_constant(poly_of(tensor.shape[dim])) is not None:
            run.elements.unite(field, field.narrow(dim, 0, 1))
    return field


def gated_halves(run: Propagation, call: Call) -> None:
    """GLU: the first half of a dim, multiplied by a function of the second."""
    x = call.args[0]
    (dim,) = _positive(call.named["dim"], x)
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
    """Pooling and resizing: the last dims of the operand are no channels."""
    digit = re.search(r"(\d)d", call.func._schema.name)
    dims = int(digit[1]) if digit else 2
    fields = []
    for f in run.fields_of(call.args[0]):
        if max(varies(f)) < f.dim() - dims:
            fields.append(f)
        else:
            run.lose(f, call)
    for o in call.outputs:
        run.set_fields(o, fields)


def pad(run: Propagation, call: Call) -> None:
    """Padding has no elements."""
    amounts = hinted(list(call.args[1]))
    fields = []
    for f in run.fields_of(call.args[0]):
        full = f.expand(shape_of(call.args[0]))
        fields.append(compressed(torch.constant_pad_nd(full, amounts, -1)))
    run.set_fields(call.outputs[0], fields)


def concatenate(run: Propagation, call: Call) -> None:
    """Elements lie one after the other; along the other dims the parts must agree."""
    stacked = call.func._overloadpacket is aten.stack
    parts, out = call.args[0], call.outputs[0]
    dim = call.named["dim"] % out.dim()
    along: list[Field] = []
    other: list[Field] = []
    for p in parts:
        shape = list(shape_of(p))
        whole = torch.full([1] * p.dim(), -1)
        for f in run.fields_of(p):
            if stacked or dim in varies(f):
                whole = torch.where(whole < 0, f, whole) if bool((whole < 0).all()) else whole
                if not stacked:
                    continue
            other.append(f.unsqueeze(dim) if stacked else f)
        along.append(whole.expand(shape))
    fields = run.elements.merged(other)
    if not stacked:
        joined = compressed(torch.cat(along, dim))
        fields = [joined, *(f for f in fields if dim not in varies(f))]
    run.set_fields(out, fields)


def along_dim(run: Propagation, call: Call) -> None:
    """Sorting and the like: entries along one dim are mixed, and the others are kept apart."""
    (dim,) = _positive(call.named["dim"], call.args[0])
    shape = shape_of(call.outputs[0])
    fields = []
    for x in _tensors(call.args):
        for f in run.fields_of(x):
            kept = f.dim() == len(shape) and dim not in varies(f)
            if kept and all(n in (1, m) for n, m in zip(f.shape, shape, strict=True)):
                fields.append(f)
            else:
                run.lose(f, call)
    fields = run.elements.merged(fields)
    for o in call.outputs:
        run.set_fields(o, fields)
    if any(call.outputs[0] is x for x in call.args):
        run.write_through(call.outputs[0], call)


def indexed(run: Propagation, call: Call) -> None:
    """Look-ups by a tensor of positions: the indexed dims must have no elements."""
    x, indices = call.args[0], call.args[1]
    fields = []
    masks = any(i is not None and i.dtype == torch.bool for i in indices)
    for f in run.fields_of(x):
        gone = {d for d, i in enumerate(indices) if i is not None}
        if masks or varies(f) & gone:
            run.lose(f, call)
            continue
        zeros = [None if i is None else torch.zeros(shape_of(i), dtype=torch.long) for i in indices]
        fields.append(compressed(aten.index(f.expand(shape_of(x)), zeros)))
    run.set_fields(call.outputs[0], fields)


def embedding(run: Propagation, call: Call) -> None:
    """A table's rows are looked up; its columns are the last dim of the output."""
    out = call.outputs[0]
    for f in run.fields_of(call.args[0]):
        if varies(f) == {1}:
            run.set_fields(out, [f.view([1] * (out.dim() - 1) + [-1])])
        else:
            run.lose(f, call)


# -- operators that combine channels --------------------------------------------------------------


def convolution(run: Propagation, call: Call) -> None:
    """Unite the channels of the input with the weight's, by groups or one to one."""
    x, weight, bias, _, _, _, transposed, _, count = call.args
    out, groups = call.outputs[0], hinted(count)
    own, other = run.field_along(weight, 0), run.field_along(weight, 1)
    for tensor in (x, weight):
        for f in run.fields_of(tensor):
            if len(varies(f)) > 1 or max(varies(f)) > 1:
                run.lose(f, call)
    channels = run.field_along(x, 1)
    inputs, outputs = shape_of(x)[1], shape_of(out)[1]
    read, filters = (own, other) if transposed else (other, own)
    if channels is not None and read is not None:
        if transposed:
            run.elements.unite(channels, read)
        else:
            run.elements.unite(channels.view(groups, -1), read.view(1, -1))
    follows = not isinstance(count, int)  # else the number of groups is fixed
    depthwise = inputs == groups > 1 and follows
    if depthwise:  # each filter has its own channel
        if channels is not None and filters is not None:
            run.elements.unite(channels.view(-1, 1), filters.view(inputs, -1))
        run.consume(weight, filters, x, 1)
    else:
        run.consume(weight, read, x)
        for f in (channels, read):
            if f is not None:
                run.read(f, (0,), 0, call)
    if filters is None:
        return
    if transposed and groups > 1:
        filters = filters.repeat(groups)
    elif groups > 1 and not follows:
        grouped = filters.view(groups, -1)  # a filter goes from all groups at once
        run.elements.unite(grouped, grouped[:1])
    run.set_fields(out, [filters.view(1, outputs, *[1] * (out.dim() - 2))])
    run.unite_vectors(out, [bias], 1)


def product(run: Propagation, call: Call) -> None:
    """``mm``, ``bmm``, ``mv`` and ``dot``."""
    _multiply(run, call, call.args[0], call.args[1])


def product_with_bias(run: Propagation, call: Call) -> None:
    """``addmm``, ``baddbmm`` and ``addmv``: the bias is added to the product."""
    bias, a, b = call.args[:3]
    _multiply(run, call, a, b)
    out = call.outputs[0]
    for f in run.fields_of(bias):
        f = f.view(*[1] * (out.dim() - f.dim()), *f.shape)
        run.set_fields(out, run.elements.merged([*run.fields_of(out), f]))


def _multiply(run: Propagation, call: Call, a: Tensor, b: Tensor) -> None:
    """(…, m, k) × (…, k, n): unite the elements along k, and keep those along m and n."""
    out, vector = call.outputs[0], b.dim() == 1
    k = 0 if vector else b.dim() - 2
    rows: list[Field] = []
    columns: list[Field] = []
    for f in run.fields_of(a):
        contracted = f.dim() - 1 in varies(f)
        for g in run.fields_of(b):
            if contracted and k in varies(g):
                run.elements.unite(f if vector else f.transpose(-1, -2), g)
        if contracted:
            run.read(f, (f.dim() - 1,), 0, call)
            if len(varies(f)) == 1:
                run.consume(a, f, b)
        rows += run.elements.collapsed(f, {f.dim() - 1})
    for g in run.fields_of(b):
        if k in varies(g):
            run.read(g, (k,), 0, call)
            if len(varies(g)) == 1:
                run.consume(b, g, a)
        columns += run.elements.collapsed(g, {k})
    if vector:
        rows, columns = [f.squeeze(-1) for f in rows], []
    run.set_fields(out, run.elements.merged([*columns, *rows]))  # in dim 0 lie heads of both


def attention(run: Propagation, call: Call) -> None:
    """Fused attention: queries and keys are read along the width of a head."""
    query, key, value = call.args[:3]
    last = query.dim() - 1
    tokens = last - 1
    free = query.dim() == 4 and as_constant(poly_of(query.shape[1])) is None
    for f in run.fields_of(query):
        run.read(f, (last,), 0, call)
        for g in run.fields_of(key):
            if varies(f) == varies(g):
                run.elements.unite(f, g)
        for g in run.fields_of(value):
            if free and 1 in varies(f) and 1 in varies(g):
                run.elements.unite(f.narrow(-1, 0, 1), g)
    for f in run.fields_of(key):
        run.read(f, (last,), 0, call)
    for f in (*run.fields_of(query), *run.fields_of(key), *run.fields_of(value)):
        if tokens in varies(f):
            run.lose(f, call)
    run.set_fields(call.outputs[0], run.fields_of(value))


def reduction(fill: Any) -> Callable[[Propagation, Call], None]:
    """The rule of a reduction; ``fill`` takes masked entries out, and None if nothing does."""

    def rule(run: Propagation, call: Call) -> None:
        x, named = call.args[0], call.named
        gone = _positive(named.get("dim"), x)
        powers = named.get("ord", named.get("p"))
        usable = fill is not None and (powers is None or powers > 0)
        fields = []
        for f in run.fields_of(x):
            if varies(f) & gone and not usable:
                run.lose(f, call)
            else:
                run.read(f, gone, fill, call)
            keep = call.outputs[0].dim() == x.dim()
            for g in run.elements.collapsed(f, gone):
                shape = [n for d, n in enumerate(g.shape) if keep or d not in gone]
                fields.append(g.reshape(shape))
        for o in call.outputs:
            run.set_fields(o, fields)

    return rule


def scan(fill: Any) -> Callable[[Propagation, Call], None]:
    """The rule of a softmax or running sum, whose output has the shape of its operand."""

    def rule(run: Propagation, call: Call) -> None:
        for f in run.fields_of(call.args[0]):
            run.read(f, _positive(call.named["dim"], call.args[0]), fill, call)
        run.set_fields(call.outputs[0], run.fields_of(call.args[0]))

    return rule


def batch_norm(run: Propagation, call: Call) -> None:
    """Each channel has its own statistics."""
    x = call.args[0]
    run.unite_vectors(x, call.args[1:], 1)
    for f in run.fields_of(x):
        if max(varies(f)) > 1:
            run.lose(f, call)
    run.set_fields(call.outputs[0], run.fields_of(x))


def group_norm(run: Propagation, call: Call) -> None:
    """The groups keep equal sizes: a channel goes from all of them, or a whole group does."""
    x, weight, bias, *_, count, _ = call.args
    run.unite_vectors(x, (weight, bias), 1)
    channels = run.field_along(x, 1)
    for f in run.fields_of(x):
        run.read(f, range(1, x.dim()), "statistics", call)
    if channels is not None:
        grouped = channels.view(hinted(count), -1)
        fixed = isinstance(count, int)
        run.elements.unite(grouped, grouped[:1] if fixed else grouped[:, :1])
    run.set_fields(call.outputs[0], run.fields_of(x))


def layer_norm(run: Propagation, call: Call) -> None:
    """Layer norm and RMS norm, over the last dims."""
    x, shape = call.args[:2]
    gone = range(x.dim() - len(shape), x.dim())
    fields = run.fields_of(x)
    for vector in call.args[2:4]:
        for f in run.fields_of(vector):
            f = f.view(*[1] * (x.dim() - f.dim()), *f.shape)
            fields = run.elements.merged([*fields, f])
    for f in fields:
        run.read(f, gone, "statistics", call)
    run.set_fields(call.outputs[0], fields)


def weight_norm(run: Propagation, call: Call) -> None:
    """``w = g·v/‖v‖``, with a norm for each position of one dim."""
    v, g = call.args[:2]
    dim = call.named["dim"] % v.dim()
    for f in run.fields_of(v):
        run.read(f, set(range(v.dim())) - {dim}, 0, call)
    run.set_fields(call.outputs[0], run.elements.merged([*run.fields_of(v), *run.fields_of(g)]))


UNIFORM = operators(
    """
    empty full zeros ones new_empty new_full new_zeros new_ones empty_like full_like zeros_like
    ones_like scalar_tensor empty_strided _local_scalar_dense sym_size sym_numel sym_stride
    sym_storage_offset lift_fresh
    """
)
"""Operators whose output is equal in every position."""

RULES: dict[Any, Callable[[Propagation, Call], None]] = {}
for _rule, _names in {
    uniform: " ".join(
        f"{n}_like {n}" for n in ("empty", "full", "zeros", "ones", "new_empty", "new_zeros")
    )
    + " new_full new_ones",
    pointwise: """hardswish hardswish_ dropout native_dropout copy_ _to_copy fill_ zero_ prelu
        _prelu_kernel masked_fill_ log_sigmoid_forward real imag _conj polar complex to""",
    view: """view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice select
        split split_with_sizes unbind flip roll alias detach contiguous unfold repeat
        pixel_shuffle channel_shuffle native_channel_shuffle view_as_real view_as_complex movedim narrow flatten
        unflatten lift_fresh swapaxes pixel_unshuffle clone transpose_ unsqueeze_ squeeze_ t_""",
    spatial: """max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d
        adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d max_pool3d_with_indices
        upsample_bilinear2d upsample_nearest2d upsample_bicubic2d _upsample_bilinear2d_aa
        reflection_pad2d replication_pad2d avg_pool3d _adaptive_avg_pool3d adaptive_avg_pool1d
        adaptive_max_pool1d max_pool1d max_pool1d_with_indices adaptive_max_pool3d
        adaptive_avg_pool3d upsample_nearest1d upsample_linear1d upsample_nearest3d
        upsample_trilinear3d reflection_pad1d reflection_pad3d replication_pad1d
        replication_pad3d _upsample_bicubic2d_aa _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d""",
    pad: "constant_pad_nd",
    concatenate: "cat stack",
    along_dim: """sort topk gather index_select scatter scatter_ scatter_add scatter_add_
        index_add index_add_ index_fill index_fill_ index_copy index_copy_ cummax cummin
        cumprod logcumsumexp kthvalue slice_scatter select_scatter""",
    gated_halves: "glu",
    indexed: "index _unsafe_index",
    embedding: "embedding",
    convolution: "convolution",
    product: "mm bmm mv dot vdot",
    product_with_bias: "addmm baddbmm addmv",
    attention: """scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math""",
    batch_norm: "",
    group_norm: "native_group_norm",
    layer_norm: "native_layer_norm _fused_rms_norm rms_norm",
    weight_norm: "_weight_norm_interface _weight_norm",
    reduction(0): "sum nansum linalg_vector_norm norm count_nonzero",
    reduction(1): "prod",
    reduction("statistics"): "mean var std var_mean std_mean",
    reduction(-torch.inf): "amax logsumexp",
    reduction(torch.inf): "amin",
    reduction(None): "max min argmax argmin any all median mode nanmedian aminmax",
    scan(0): "cumsum",
    scan(-torch.inf): "_softmax _log_softmax _safe_softmax",
}.items():
    RULES.update(dict.fromkeys(operators(_names), _rule))
RULES.update(dict.fromkeys(BATCH_NORMS, batch_norm))
RULES[aten.clone] = view
