"""The rules of operators for the elements of their operands (``propagation.py``), by operator.

A rule takes the propagation and a call. It sets the fields of the outputs, unites elements, and
records reads, consumers and seams. Operators with torch's ``pointwise`` tag need no entry in
:data:`RULES`, families of names stand in :data:`_BY_PATTERNS`; all other operators lose the axes
that they touch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widthsearch.channels import local_rules as local
from widthsearch.channels.elements import Field, hinted, shape_of, varies
from widthsearch.channels.local_rules import from_front
from widthsearch.torch_internals import schema_of
from widthsearch.tracing.interpreter import BATCH_NORMS, operators
from widthsearch.tracing.polynomials import as_constant
from widthsearch.tracing.symbolic_ints import poly_of

if TYPE_CHECKING:
    from widthsearch.channels.propagation import Call, Propagation

aten = torch.ops.aten


def convolution(run: Propagation, call: Call) -> None:
    """Unite the channels of the input with the weight's, by groups or one to one."""
    x, weight, bias, _, _, _, transposed, _, count = call.args
    out, groups = call.outputs[0], hinted(count)
    own, other = run.field_along(weight, 0), run.field_along(weight, 1)
    for f in (f for tensor in (x, weight) for f in run.fields_of(tensor)):
        if varies(f) not in ({0}, {1}):
            run.lose(f)
    rows = [f for f in run.fields_of(x) if varies(f) == {0}]  # channels merged with the batch
    channels = run.field_along(x, 1)
    outputs = shape_of(out)[1]
    read, filters = (own, other) if transposed else (other, own)
    if channels is not None and read is not None:
        count_read = 1 if transposed else groups  # groups share the positions that they read
        run.elements.unite(channels.view(count_read, -1), read.view(1, -1))
    fixed = isinstance(count, int)
    if groups > 1 and not fixed and other is None:  # whole groups go, with their filters
        if shape_of(weight)[0] >= shape_of(x)[1]:
            run.consume(weight, own, x)
        if channels is not None:
            grouped = channels.view(groups, -1)
            run.elements.unite(grouped, grouped[:, :1])
            if own is not None and not transposed:
                run.elements.unite(own.view(groups, -1), grouped[:, :1])
            if filters is None:  # the same constants for all, as in a blur
                filters = grouped[:, 0].repeat_interleave(outputs // groups)
    else:
        if read is None:
            run.consume(weight, read, x)
        else:
            run.contract(read, 0, weight, x, 1, channels is not None)
        if channels is not None:
            run.contract(channels, 0, x, weight, 0 if transposed else 1, read is not None)
        if filters is not None and transposed:
            filters = filters.repeat(groups)
        ends = channels if transposed else filters
        if ends is not None and groups > 1 and fixed:  # one goes from all groups at once
            run.elements.unite(ends.view(groups, -1), ends.view(groups, -1)[:1])
    fields = [] if filters is None else [filters.view(1, outputs, *[1] * (out.dim() - 2))]
    run.set_fields(out, [*fields, *rows])
    run.unite_vectors(out, [bias], 1)


def product(run: Propagation, call: Call) -> None:
    """``mm``, ``bmm``, ``mv`` and ``dot``."""
    run.set_fields(call.outputs[0], _multiply(run, call.args[0], call.args[1]))


def product_with_bias(run: Propagation, call: Call) -> None:
    """``addmm``, ``baddbmm`` and ``addmv``: the bias is added to the product."""
    bias, a, b = call.args[:3]
    out = call.outputs[0]
    fields = _multiply(run, a, b)
    for f in run.fields_of(bias):
        fields.append(f.view(*[1] * (out.dim() - f.dim()), *f.shape))
    run.set_fields(out, run.elements.merged(fields))


def _multiply(run: Propagation, a: Tensor, b: Tensor) -> list[Field]:
    """(…, m, k) × (…, k, n) as (…, m, k, 1) × (…, 1, k, n)."""
    rank = a.dim()
    new_a, new_b = [rank] if b.dim() > 1 else [], [rank - 2] if rank > 1 else []
    return _contracted(run, (b, a), (new_b, new_a), [rank - 1])  # in dim 0 lie heads of both


def trilinear(run: Propagation, call: Call) -> None:
    """``nn.Bilinear``: a weight between two inputs, contracted with both."""
    fields = _contracted(run, call.args[:3], call.args[3:6], call.args[6])
    run.set_fields(call.outputs[0], fields)


def _contracted(
    run: Propagation, tensors: Sequence[Tensor], new: Sequence[list[int]], dims: list[int]
) -> list[Field]:
    """The fields of a product of tensors that is summed along some dims, two factors along each.

    Args:
        run: The propagation.
        tensors: The factors.
        new: Per factor, the dims of the product that it does not have.
        dims: The dims of the product that are summed.
    """
    fields = [list(run.fields_of(x)) for x in tensors]
    for of_x, places in zip(fields, new, strict=True):
        for dim in sorted(places):
            of_x[:] = [f.unsqueeze(dim) for f in of_x]
    for dim in dims:
        a, b = (i for i, places in enumerate(new) if dim not in places)
        for i, j in ((a, b), (b, a)):
            other = [g for g in fields[j] if dim in varies(g)]
            for f in (f for f in fields[i] if dim in varies(f)):
                for g in other:
                    run.elements.unite(f, g)
                own = dim - sum(d < dim for d in new[j])
                run.contract(f, dim, tensors[i], tensors[j], own, bool(other))
    found = [g for of_x in fields for f in of_x for g in run.elements.collapsed(f, set(dims))]
    return run.elements.merged(f.squeeze(dims) for f in found)


def distance(run: Propagation, call: Call) -> None:
    """Distances of the rows of two tensors, a sum over their last dims if p > 0."""
    a, b = call.args[:2]
    fields = []
    for x, other, along in ((a, b, -2), (b, a, -1)):
        last = x.dim() - 1
        of_other = run.field_along(other, -1)
        for f in run.fields_of(x):
            if varies(f) == {last} and of_other is not None and call.named.get("p", 2) > 0:
                run.elements.unite(f.reshape(-1), of_other)
                run.read(f, (last,), 0, x)
            elif varies(f) == {last - 1}:  # the rows of one are rows of the output, or columns
                f = f.squeeze(-1)
                fields.append(f.unsqueeze(-1) if along == -2 else f.unsqueeze(-2))
            else:
                run.lose(f)
    run.set_fields(call.outputs[0], fields)


def attention(run: Propagation, call: Call) -> None:
    """Fused attention: queries and keys are read along the width of a head."""
    query, key, value = call.args[:3]
    last = query.dim() - 1
    tokens = last - 1
    free = query.dim() == 4 and as_constant(poly_of(query.shape[1])) is None
    for f in run.fields_of(query):
        run.read(f, (last,), 0, query, key)
        for g in run.fields_of(key):
            if varies(f) == varies(g):
                run.elements.unite(f, g)
        for g in run.fields_of(value):
            if free and 1 in varies(f) and 1 in varies(g):
                run.elements.unite(f.narrow(-1, 0, 1), g)
    for f in run.fields_of(key):
        run.read(f, (last,), 0, query, key)
    for f in (*run.fields_of(query), *run.fields_of(key), *run.fields_of(value)):
        if tokens in varies(f):
            run.lose(f)
    run.set_fields(call.outputs[0], run.fields_of(value))


def reduction(fill: Any) -> Callable[[Propagation, Call], None]:
    """The rule of a reduction; ``fill`` takes masked entries out, and None if nothing does."""

    def rule(run: Propagation, call: Call) -> None:
        x, named = call.args[0], call.named
        gone = from_front(named.get("dim"), x)
        powers = named.get("ord", named.get("p"))
        usable = fill is not None and (powers is None or powers > 0)
        fields = []
        for f in run.fields_of(x):
            if varies(f) & gone and not usable:
                run.lose(f)
            else:
                run.read(f, gone, fill)
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
        dims = from_front(call.named["dim"], call.args[0])
        for f in run.fields_of(call.args[0]):
            run.read(f, dims, fill)
        for o in call.outputs:
            run.set_fields(o, run.fields_of(call.args[0]))

    return rule


def batch_norm(run: Propagation, call: Call) -> None:
    """Each channel has its own statistics: stored ones, or those of the batch in training."""
    x = call.args[0]
    run.unite_vectors(x, call.args[1:], 1)
    if call.named.get("training", False):
        for f in run.fields_of(x):
            run.read(f, set(range(x.dim())) - {1}, "statistics")
    run.set_fields(call.outputs[0], run.fields_of(x))


def prelu(run: Propagation, call: Call) -> None:
    """Each channel has its own slope, or all have the same."""
    run.unite_vectors(call.args[0], call.args[1:], 1)
    run.set_fields(call.outputs[0], run.fields_of(call.args[0]))


def group_norm(run: Propagation, call: Call) -> None:
    """The groups keep equal sizes: a channel goes from all of them, or a whole group does."""
    x, weight, bias, *_, count, _ = call.args
    run.unite_vectors(x, (weight, bias), 1)
    channels = run.field_along(x, 1)
    for f in run.fields_of(x):
        run.read(f, range(1, x.dim()), "statistics")
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
        run.read(f, gone, "statistics")
    run.set_fields(call.outputs[0], fields)


def weight_norm(run: Propagation, call: Call) -> None:
    """``w = g·v/‖v‖``, with a norm for each position of one dim."""
    v, g = call.args[:2]
    dim = call.named["dim"] % v.dim()
    for f in run.fields_of(v):
        run.read(f, set(range(v.dim())) - {dim}, 0)
    run.set_fields(call.outputs[0], run.elements.merged([*run.fields_of(v), *run.fields_of(g)]))


def keeps_zeros(call: Call, zero: Callable[[Any], bool]) -> bool:
    """Whether entries of the output are zero where those of operands are.

    Args:
        call: The call.
        zero: Whether an operand's masked entries are zero.
    """
    packet = call.func.overloadpacket
    tensors = [zero(t) for t in local.tensors_in((call.args, call.kwargs))]
    if packet in _ANY_ZERO:
        return any(tensors)
    if packet in _ALL_ZERO:  # not with a number added
        return all(tensors) and (packet not in _SUMS or len(tensors) == 2)
    first = bool(call.args) and zero(call.args[0])
    return first and (packet in _FIRST_ZERO or rule_of(call.func) is local.view)


_ANY_ZERO = operators("mul mul_ _weight_norm_interface")
_SUMS = operators("add add_ sub sub_")
_ALL_ZERO = _SUMS | operators("mm bmm addmm baddbmm convolution cat stack")
_FIRST_ZERO = operators(
    "div div_ abs neg sqrt square sign sgn relu relu_ tanh gelu silu _to_copy native_dropout"
)
UNIFORM = operators(
    """
    empty full zeros ones new_empty new_full new_zeros new_ones empty_like full_like zeros_like
    ones_like scalar_tensor empty_strided _local_scalar_dense lift_fresh
    """
)
"""Operators whose output is equal in every position."""

_Rule = Callable[["Propagation", "Call"], None]
RULES: dict[Any, _Rule] = dict.fromkeys(BATCH_NORMS, batch_norm)
_BY_NAMES: dict[_Rule, str] = {
    local.pointwise: """
        hardswish hardswish_ dropout native_dropout copy_ _to_copy fill_ zero_ _prelu_kernel
        masked_fill_ log_sigmoid_forward real imag _conj polar complex as_strided_ where
        floor_divide floor_divide_
    """,
    local.view: """
        view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice select split
        split_with_sizes unbind flip roll alias detach contiguous unfold repeat pixel_shuffle
        pixel_unshuffle channel_shuffle native_channel_shuffle view_as_real view_as_complex movedim
        narrow flatten unflatten swapaxes clone
    """,
    local.pad: "constant_pad_nd",
    local.concatenate: "cat stack",
    local.along_dim: """
        sort topk gather index_select scatter scatter_ scatter_add scatter_add_ index_add
        index_add_ index_fill index_fill_ index_copy index_copy_ kthvalue slice_scatter
        select_scatter
    """,
    local.gated_halves: "glu",
    local.indexed: "index _unsafe_index index_put index_put_ _unsafe_index_put",
    local.windows: "im2col col2im",
    local.embedding: "embedding _embedding_bag _embedding_bag_forward_only",
    convolution: "convolution",
    product: "mm bmm mv dot vdot",
    product_with_bias: "addmm baddbmm addmv",
    attention: """
        scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
    """,
    prelu: "prelu",
    group_norm: "native_group_norm",
    layer_norm: "native_layer_norm _fused_rms_norm rms_norm",
    trilinear: "_trilinear",
    distance: "_cdist_forward _euclidean_dist",
    weight_norm: "_weight_norm_interface _weight_norm",
    reduction(0): "sum nansum linalg_vector_norm norm count_nonzero any",
    reduction(1): "prod all",
    reduction("statistics"): "mean var std var_mean std_mean",
    reduction(-torch.inf): "amax max logsumexp",
    reduction(torch.inf): "amin min",
    reduction(None): "argmax argmin median mode nanmedian aminmax",
    scan(0): "cumsum",
    scan(1): "cumprod",
    scan(-torch.inf): "_softmax _log_softmax _safe_softmax cummax logcumsumexp",
    scan(torch.inf): "cummin",
}
_BY_PATTERNS = {
    r"pool\dd|upsample_|(reflection|replication)_pad\dd|grid_sampler_\dd": local.spatial,
    r"::_?fft_": local.along_dim,
}
for _rule, _names in _BY_NAMES.items():
    RULES.update(dict.fromkeys(operators(_names), _rule))


@functools.cache
def rule_of(func: Any) -> _Rule | None:
    """The rule of an operator, if it has one."""
    if func.overloadpacket in RULES:
        return RULES[func.overloadpacket]
    if func.overloadpacket in UNIFORM:
        return local.uniform
    if torch.Tag.pointwise in func.tags:
        return local.pointwise
    for pattern, rule in _BY_PATTERNS.items():
        if re.search(pattern, schema_of(func).name):
            return rule
    return None
