"""Size rules of views: which dims of a tensor are those of its new shape.

Torch compares the numbers of elements alone, and infers ``-1`` by a division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from widthsearch.tracing.polynomials import System, add, symbols_of
from widthsearch.tracing.symbolic_ints import poly_of


def impose_view(system: System, x: Tensor, shape: Sequence[Any]) -> None:
    """Impose what a new shape says about a tensor's dims.

    Args:
        system: The symbols in the tensor's sizes.
        x: The tensor.
        shape: The new shape; one of its sizes may be -1.
    """
    _keep(system, x.shape, shape)
    _keep(system, x.shape[::-1], shape[::-1])
    _take_apart(system, x, shape)


def _keep(system: System, sizes: Sequence[Any], shape: Sequence[Any]) -> None:
    """Equate each of the first dims, while they stay, with the attribute that stands for it.

    Example: ``weight.view(self.out_features, -1)``.
    """
    for n, m in zip(sizes, shape, strict=False):
        own, wanted = poly_of(n), poly_of(m)
        if system.hint(own) != system.hint(wanted):
            break
        if symbols_of(wanted) & system.soft:
            system.impose(add(own, wanted, -1))


def _take_apart(system: System, x: Tensor, shape: Sequence[Any]) -> None:
    """Equate the parts of a concatenation that a view takes apart again.

    Example: ``cat((q, k, v)).view(3, heads, -1)``. Only of equally long parts is the first third
    ``q``, so these are one width.
    """
    hint = system.hint
    for dim, n in enumerate(x.shape):
        parts = {m: c for m, c in poly_of(n).items() if m}
        if len(parts) < 2 or len({(len(m), hint({m: 1})) for m in parts}) > 1:
            continue
        count = sum(parts.values()) // math.gcd(*parts.values())
        before = math.prod(hint(poly_of(size)) for size in x.shape[:dim])
        target = [hint(poly_of(size)) for size in shape]
        if -1 in target:
            whole = math.prod(hint(poly_of(size)) for size in x.shape)
            target[target.index(-1)] = whole // -math.prod(target)
        at = next((i for i in range(len(shape)) if math.prod(target[:i]) == before), None)
        while at is not None and at < len(shape) and target[at] == 1:
            at += 1
        if at is None or at == len(shape) or not isinstance(shape[at], int):
            continue
        if parts and () not in poly_of(n) and target[at] % count == 0:
            first, *others = parts
            for other in others:
                system.impose({first: 1, other: -1})
