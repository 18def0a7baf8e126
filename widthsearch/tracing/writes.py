"""Size rules of operations that write into a part of a tensor.

Meta kernels do not compare the sizes of an indexed write. Without these rules the width of a mask
token in ``x[mask] = self.token`` would be free, although it must be that of ``x``.

Example: ``x`` has the shape ``(2, 4, s0)``, ``mask`` the shape ``(2, 4)`` and ``token`` the shape
``(s1,)``. ``x[mask]`` has the shape ``(n, s0)``, where ``n`` depends on the mask's values. The
token is broadcast to it, so ``s1 = s0`` is imposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from widthsearch.torch_internals import check_sizes
from widthsearch.tracing.symbolic_ints import poly_of

aten = torch.ops.aten

Pin = Callable[[Any], Any]
"""Fixes a size at its value in the model as given."""
SCATTERS = (
    *(aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_),
    *(aten.scatter_reduce, aten.scatter_reduce_),
)
_MASKS = (torch.bool, torch.uint8)


def indexed_dims(indices: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
    """The first dim of a tensor that each of its index tensors takes the place of."""
    dim = 0
    for index in indices:
        if index is not None:
            yield dim, index
        dim += index.dim() if index is not None and index.dtype in _MASKS else 1


def taken_dims(indices: Sequence[Tensor | None]) -> Iterator[int]:
    """Every dim of a tensor that its index tensors take the place of: a mask may take several."""
    for dim, index in indexed_dims(indices):
        yield from range(dim, dim + (index.dim() if index.dtype in _MASKS else 1))


def _equate(a: Sequence[Any], b: Sequence[Any]) -> None:
    check_sizes(len(a) == len(b))
    for m, n in zip(a, b, strict=True):
        check_sizes(m == n)


def _index_put(
    pin: Pin, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, *_: Any
) -> None:
    taken = list(taken_dims(indices))
    places = [(dim, index) for dim, index in indexed_dims(indices)]
    for dim, mask in places:
        if mask.dtype in _MASKS:
            _equate(mask.shape, x.shape[dim : dim + mask.dim()])
    if not taken:
        return
    # Numbers of written positions are no widths: they stand as None.
    positions = max([1, *(index.dim() for _, index in places if index.dtype not in _MASKS)])
    kept: list[Any] = [n for dim, n in enumerate(x.shape) if dim not in taken]
    adjacent = taken == list(range(taken[0], taken[-1] + 1))
    at = taken[0] if adjacent else 0
    kept[at:at] = [None] * positions
    for n, written in zip(reversed(values.shape), reversed(kept), strict=False):
        if written is None:
            pin(n)
        elif poly_of(n) != {(): 1}:  # otherwise it is broadcast
            check_sizes(n == written)


def _masked_scatter(pin: Pin, x: Tensor, _mask: Tensor, source: Tensor, *_: Any) -> None:
    # Elements are copied in order. The rows of the source stay rows if both are equally long.
    *rows, last = source.shape or (1,)
    for n in rows:
        pin(n)
    if last != x.shape[-1]:
        pin(last)
        pin(x.shape[-1])


def _index_add(
    _pin: Pin, x: Tensor, dim: int, index: Tensor, source: Tensor, *_: Any, **__: Any
) -> None:
    wanted = list(x.shape)
    wanted[dim] = index.numel()
    _equate(source.shape, wanted)


def _scatter(_pin: Pin, x: Tensor, dim: int, index: Tensor, *source: Any, **_: Any) -> None:
    # An index may be shorter than the tensors. Where it is as long, it stays so.
    for other in (x, *(s for s in source if isinstance(s, Tensor))):
        for d, (m, n) in enumerate(zip(index.shape, other.shape, strict=True)):
            if d != dim % index.dim() or other is not x:
                bool(m == n)  # a true equality is imposed, a false one is not


def _put(pin: Pin, *args: Any) -> None:
    for tensor in args[0], args[2]:
        for n in tensor.shape:
            pin(n)


def _into(view: Callable[..., Tensor]) -> Callable[..., None]:
    """The rule of an operation that returns ``x`` with another content in one of its views."""

    def rule(_pin: Pin, x: Tensor, source: Tensor, *where: Any, **more: Any) -> None:
        _equate(source.shape, view(x, *where, **more).shape)

    return rule


WRITES: dict[Any, Callable[..., None]] = {
    aten.index_put: _index_put,
    aten.index_put_: _index_put,
    aten._unsafe_index_put: _index_put,
    aten.masked_scatter: _masked_scatter,
    aten.masked_scatter_: _masked_scatter,
    aten.index_add: _index_add,
    aten.index_add_: _index_add,
    **dict.fromkeys(SCATTERS, _scatter),
    aten.gather: _scatter,
    aten.put: _put,
    aten.put_: _put,
    aten.select_scatter: _into(aten.select),
    aten.slice_scatter: _into(aten.slice),
    aten.diagonal_scatter: _into(aten.diagonal),
}
"""Per operation a function of :data:`Pin` and its arguments that imposes its size rules."""
