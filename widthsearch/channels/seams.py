"""Seams: positions at which a dim is cut into parts, ``x[:, :c // 2]`` and ``x[:, c // 2:]``.

Other widths move a seam, and the channels beside it change sides unless as many of them are removed
on each side as the sizes of the parts say.

Notation: a dim has ``n = Σ c_i·x_i`` positions over the axes' variables ``x_i``, and the seam lies
at ``s = Σ k_i·x_i``. It is *kept* if ``k_i`` of ``c_i`` positions of each group of each axis lie
before it. A seam between concatenated parts is kept as it is. For others in a dim of a single axis,
with ``s/n = p/q``, the elements at equal positions of ``q`` equal blocks are united.

Example: 6 channels of one axis in halves, so ``q = 2``: 0 is united with 3, 1 with 4 and 2 with 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from widthsearch.channels.elements import Elements, Field, in_blocks
from widthsearch.tracing.polynomials import Poly, evaluate, symbols_of


@dataclass(frozen=True, eq=False)
class Seam:
    """A position at which a dim is cut.

    Attributes:
        field: The elements of the tensor that is cut.
        dim: The dim.
        position: The first position behind the seam.
        length: The size of the dim.
        reason: The line of code that cuts.

    Example:
        >>> # Two channels a group, cut in the middle: kept if one of each group is before.
        >>> seam = Seam(torch.arange(4).reshape(1, 4), 1, {(0,): 1}, {(0,): 2}, "x[:, :2]")
        >>> axis, group = np.zeros(4, np.int64), np.array([0, 0, 1, 1])
        >>> seam.broken(axis, group, [2])  # both of group 0
        {0}
        >>> seam.broken(axis, np.array([0, 1, 0, 1]), [2])
        set()
    """

    field: Field
    dim: int
    position: Poly
    length: Poly
    reason: str

    def _ratios(self) -> dict[int, Fraction | None]:
        """Per axis of the dim, k/c; None if it differs between the terms."""
        out: dict[int, Fraction | None] = {}
        for monomial in {*self.length, *self.position}:
            c, k = self.length.get(monomial, 0), self.position.get(monomial, 0)
            for i in set(monomial):
                ratio = Fraction(k, c) if c else None
                out[i] = ratio if out.get(i, ratio) == ratio else None
        return out

    def broken(
        self, axis: NDArray[np.int64], group: NDArray[np.int64], x: Sequence[int]
    ) -> set[int]:
        """The axes for which the seam is not kept.

        Args:
            axis: The axis of each element; -1 for none.
            group: The group of each element.
            x: The values of the axes' variables.
        """
        owners = symbols_of(self.length) | symbols_of(self.position)
        if any(i >= len(x) for i in owners):
            return {i for i in owners if i < len(x)}
        at = evaluate(self.position, x)
        before, after = (
            f.reshape(-1).numpy()
            for f in torch.split(self.field, [at, self.field.shape[self.dim] - at], self.dim)
        )
        # Parts without elements, such as zeros that are not written yet, are not counted.
        constant_parts = bool((before < 0).any() or (after < 0).any())
        out = set()
        present = {*np.unique(axis[before[before >= 0]]), *np.unique(axis[after[after >= 0]])}
        ratios = self._ratios()
        for i in {*owners, *(int(i) for i in present if i >= 0)}:
            counts = [
                np.bincount(group[e[(e >= 0) & (axis[e] == i)]], minlength=x[i])
                for e in (before, after)
            ]
            ratio = ratios.get(i)
            if constant_parts:
                kept = all((of == of[0]).all() for of in counts)
            elif ratio is not None:
                k, c = ratio.numerator, ratio.denominator
                kept = (counts[0] * (c - k) == counts[1] * k).all()
            else:
                kept = False
            if not kept:
                out.add(i)
        return out

    def pair_parts(self, elements: Elements) -> bool:
        """Unite the elements at equal positions of equal blocks; False if that changes nothing."""
        ratios = set(self._ratios().values())
        ratio = ratios.pop() if len(self.length) == 1 and len(ratios) == 1 else None
        if ratio is None or ratio.denominator == 1:
            return False
        blocks = in_blocks(self.field, self.dim, ratio.denominator)
        before = elements.find(self.field.numpy())
        elements.unite(blocks, blocks.narrow(self.dim, 0, 1))
        return bool((elements.find(self.field.numpy()) != before).any())
