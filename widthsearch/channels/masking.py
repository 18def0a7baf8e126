"""Masks: a network computes as if it only had the channels that are kept, at its own widths.

Entries of removed channels are undefined. Each call that combines channels (a *read* of
``propagation.py``) gets its operands without them: they are 0 in sums and products, -inf in a
softmax, and left out of the statistics of norms. Numbers that are computed from widths, such as the
1/√d of attention, are those of the narrow network.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.channels.call_sites import CallSites, Site, with_operands
from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.extraction import Keep, extract, kept_groups, widths_of
from widthsearch.channels.propagation import FILLS
from widthsearch.errors import SpaceError
from widthsearch.torch_internals import tree_leaves, tree_map_only
from widthsearch.tracing.inputs import call, sample
from widthsearch.tracing.traced_model import TracedModel

Masks = Mapping[int, list[Tensor]]
"""Per operand of a call, whether its positions are kept, broadcastable to the operand."""


@contextmanager
def masked(model: TracedModel, network: nn.Module, keep: Keep) -> Iterator[nn.Module]:
    """Within the context, ``network`` computes as if it only had the channels that are kept.

    Args:
        model: The traced model.
        network: A network of the model; its tensors remain as they are.
        keep: As for :func:`~widthsearch.channels.extraction.extract`, also for its errors.

    Yields:
        The same network.
    """
    graph = build_dependency_graph(model, widths_of(model, network))
    kept = [torch.from_numpy(k) for k in kept_groups(model, graph, keep)]
    masks: dict[Site, dict[int, list[Tensor]]] = {}
    for site, operands in graph.masks.items():
        for operand in operands:
            mask = operand.select(kept, torch.ones(1, dtype=torch.bool))
            if not mask.all():
                masks.setdefault(site, {}).setdefault(operand.index, []).append(mask)
    narrow = extract(model, network, keep, graph).cpu().eval()
    floats = (p.dtype for p in narrow.parameters() if p.is_floating_point())
    dtype = next(floats, torch.get_default_dtype())
    inputs = tree_map_only(
        Tensor,
        lambda x: x.to(dtype) if x.is_floating_point() else x,
        sample(model.input_shape, 1, "cpu"),
    )
    with _Numbers(narrow) as numbers, torch.no_grad():
        call(narrow, inputs)
    with _Masked(network, masks, numbers.found):
        yield network


class _Numbers(CallSites):
    """Records the numbers among the arguments of each call.

    Attributes:
        found: Per call, its floats by place, and integers that are no sizes; the width of an
            attention head is at -1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: dict[Site, dict[int, float]] = {}

    def call(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        self.found[site] = _numbers(site, args, kwargs)
        return func(*args, **kwargs)


def _numbers(site: Site, args: Any, kwargs: Any) -> dict[int, float]:
    leaves = enumerate(tree_leaves((args, kwargs)))
    found = {i: x for i, x in leaves if isinstance(x, float | int) and not isinstance(x, bool)}
    if site[1] in ("full", "new_full"):
        found = {i: found[i] for i in sorted(found)[-1:]}  # others are the shape
    elif not _takes_values(site[1]):
        found = {i: x for i, x in found.items() if isinstance(x, float)}
    if site[1] == "scaled_dot_product_attention":
        found[-1] = args[0].shape[-1]
    elif site[1] == "multi_head_attention_forward":
        found[-1] = args[3] // args[4]  # embed_dim_to_check, num_heads
    return found


@functools.cache
def _takes_values(name: str) -> bool:
    """Whether integers among a function's arguments are values, not sizes or positions."""
    name = re.sub(r"^__[ir]?(?=\w+__$)|_+$", "", name)
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet else ()
    return name in _VALUES or any(torch.Tag.pointwise in each.tags for each in overloads)


_VALUES = {
    *("truediv", "floordiv", "floor_divide", "mod", "masked_fill", "where"),
    *("tensor", "as_tensor", "scalar_tensor", "full_like", "fill"),
}

_NUMPYS = {"axis": "dim", "keepdims": "keepdim"}
"""Numpy's names of arguments, which torch's own functions take too."""


class _Masked(CallSites):
    """Makes the calls of a network as if it only had the channels that are kept.

    Args:
        model: The network.
        masks: Per call, the masks of its operands.
        numbers: Per call, the numbers among its arguments in the narrow network.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[Site, Masks], numbers: Mapping[Site, Any]
    ) -> None:
        super().__init__(model)
        self.masks, self.numbers = masks, numbers

    def call(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        numbers, masks = self.numbers.get(site, {}), self.masks.get(site)
        own = _numbers(site, args, kwargs)
        if changed := {i: n for i, n in numbers.items() if i >= 0 and own.get(i, n) != n}:
            substitutes = {i: (lambda _, n=n: n) for i, n in changed.items()}
            args, kwargs = with_operands(substitutes, args, kwargs)
        if masks is not None:
            fill = FILLS.get(site[1], 0)
            if fill == "statistics":
                inside = torch.ones(())
                for mask in masks.get(0, []):
                    inside = inside.to(args[0]) * mask.to(args[0])
                if inside.dim():
                    kwargs = {_NUMPYS.get(name, name): value for name, value in kwargs.items()}
                    return _STATISTICS[site[1]](inside.expand_as(args[0]), *args, **kwargs)
            else:
                fills = {i: partial(_filled, of, fill) for i, of in masks.items()}
                args, kwargs = with_operands(fills, args, kwargs)
        if -1 in numbers and own[-1] != numbers[-1]:
            args, kwargs = _scaled(site, own[-1] / numbers[-1], args, kwargs)
        return func(*args, **kwargs)


def _filled(masks: list[Tensor], fill: float, x: Tensor) -> Tensor:
    for mask in masks:
        if any(n not in (1, m) for n, m in zip(mask.shape, x.shape, strict=True)):
            raise SpaceError(
                f"a mask of shape {tuple(mask.shape)} fits no operand of shape {tuple(x.shape)}: "
                "the model merges channels with its batch; use `extract`"
            )
        if not x.is_floating_point() and not x.is_complex():
            whole = torch.iinfo(x.dtype) if x.dtype != torch.bool else None
            fill = bool(fill) if whole is None else int(max(whole.min, min(fill, whole.max)))
        x = torch.where(mask.to(x.device), x, fill)
    return x


def _scaled(site: Site, ratio: float, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of attention whose heads are ``ratio`` times as wide as those that remain."""
    if site[1] == "scaled_dot_product_attention":
        if kwargs.get("scale") is None:
            kwargs = kwargs | {"scale": (args[0].shape[-1] / ratio) ** -0.5}
        return args, kwargs
    factor, width = math.sqrt(ratio), args[3]

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x[:width] * factor, x[width:]])

    args = (*args[:5], rows(args[5]), rows(args[6]), *args[7:])
    if kwargs.get("q_proj_weight") is not None:
        kwargs = kwargs | {"q_proj_weight": kwargs["q_proj_weight"] * factor}
    return args, kwargs


# -- statistics over the entries that are kept: ``inside`` is 1 there and 0 elsewhere --------------


def _moments(inside: Tensor, x: Tensor, dims: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The number of entries, their mean and the sum of squared deviations, with dims kept."""
    dims = list(range(x.dim())) if dims in (None, ()) else dims
    count = inside.sum(dims, keepdim=True)
    x = torch.where(inside > 0, x, 0)
    mean = x.sum(dims, keepdim=True) / count
    return count, mean, ((x - mean).square() * inside).sum(dims, keepdim=True)


def _mean(inside: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _squeezed(_moments(inside, x, dim)[1], dim, keepdim)


def _squeezed(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    if keepdim:
        return x
    return x.squeeze() if dim in (None, ()) else x.squeeze(dim)


def _spread(
    root: bool,
    with_mean: bool,
    inside: Tensor,
    x: Tensor,
    dim: Any = None,
    unbiased: Any = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    """Variance or standard deviation, by the arguments of ``torch.var``."""
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, unbiased = None, dim
    count, mean, squares = _moments(inside, x, dim)
    out = squares / (count - (int(unbiased) if correction is None else correction))
    out = _squeezed(out.sqrt() if root else out, dim, keepdim)
    return (out, _squeezed(mean, dim, keepdim)) if with_mean else out


def _layer_norm(
    inside: Tensor, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    count, mean, squares = _moments(inside, x, list(range(-len(shape), 0)))
    out = (x - mean) / (squares / count + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _group_norm(
    inside: Tensor, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    count, mean, squares = _moments(inside.reshape(grouped.shape), grouped, [2])
    out = ((grouped - mean) / (squares / count + eps).sqrt()).view_as(x)
    return _affine(out, weight, bias)


def _batch_norm(
    inside: Tensor, x: Tensor, *_: Any, weight: Any = None, bias: Any = None, eps: float, **__: Any
) -> Tensor:
    """By statistics of the batch; torch passes all options by name."""
    count, mean, squares = _moments(inside, x, [0, *range(2, x.dim())])
    return _affine((x - mean) / (squares / count + eps).sqrt(), weight, bias)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _rms_norm(
    inside: Tensor, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(shape), 0))
    squares = (torch.where(inside > 0, x, 0).square()).sum(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * (squares / inside.sum(dims, keepdim=True) + eps).rsqrt()
    return out if weight is None else out * weight


_STATISTICS: dict[str, Any] = {
    "mean": _mean,
    "var": partial(_spread, False, False),
    "std": partial(_spread, True, False),
    "var_mean": partial(_spread, False, True),
    "std_mean": partial(_spread, True, True),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
}
